"""The output folder of a run: fixed names, never two runs in one folder by accident.

config.yaml  manifest.json  metrics.jsonl  checkpoints/  model/  evaluation.json  samples.png  report.html
warnings.json
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from inpo_fast.config import RunConfig, flat, shipped, to_dict, to_yaml
from inpo_fast.data.order import describe, make_order
from inpo_fast.data.pair import Source
from inpo_fast.handover.output_model import reference_in_words, reopens_base, save_adapter, untouched_parts
from inpo_fast.models.files.diffusers_folder import write_folder
from inpo_fast.models.models import Models
from inpo_fast.runtime import lock, sealed_json
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text
from inpo_fast.runtime.masking import masked, masked_tree
from inpo_fast.runtime.outputs import check_folder
from inpo_fast.training import replaced_run, run_inputs, run_length
from inpo_fast.training.saved_checkpoint import found, step_of

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "numpy", "pillow")
# keys that may differ between a run and its continuation: they do not touch what is computed
FREE_ON_RESUME = (
    "output",
    "resume",
    "dry_run",
    "plan.",
    "overwrite",
    "accept_changed_inputs",
    "evaluate",
    "observe.",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.milestone_every",
    "train.shard_states",
    "train.patience_minutes",
    "train.micro_batch",
    "train.threads",
    "online.keep",
    "inversion.batch",
    "inversion.cache",
    "data.cache",
    "data.vae_batch",
    "data.workers",
    "data.prefetch_mb",
    "data.cache_mb",
    "data.bad_pair_limit",
)


@dataclass(frozen=True)
class Before:
    """What a run that goes on began with. config: its settings, keys joined by dots. inputs: see run_inputs; None: a
    run of an earlier version, whose manifest has none."""

    config: dict
    manifest: dict
    inputs: dict[str, dict] | None


class RunFolder:
    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.lock: int | None = None  # held as long as this process lives
        self.notes: list[str] = []  # to be said before the first step
        self.inputs: dict[str, dict] = {}  # what this run began with
        self._before: Before | None = None
        self._model_step: int | None = None  # of what lies in model/, where that is known
        self._has_other_base = False  # accepted in this start
        self._other_places: dict[str, dict] = {}  # accepted, though no fingerprint says what lay there
        self._changed: list[dict] = []  # of the inputs, what was accepted, for the manifest

    def check(self) -> None:
        """Refuses a folder that holds another run, unless told what to do with it. Brings a run back that was to be
        replaced, where its successor never had a checkpoint and is not asked for."""
        resume, overwrite = self.config.resume, self.config.overwrite
        if resume and overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one")
        if self.config.accept_changed_inputs and not resume:
            raise UserError(f"{run_inputs.ACCEPT} is of --resume: a new run takes its inputs as they are")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; name a folder")
        lock.check(self.path)
        check_folder("--output", self.path)  # before a model is loaded
        restored = "" if overwrite else self._restore()
        taken = replaced_run.there(self.path)
        if taken and not (resume or overwrite):
            raise UserError(
                f"{self.path} already holds a run ({', '.join(taken[:3])}){restored}; continue it with --resume, "
                "replace it with --overwrite, or choose another --output"
            )
        if overwrite:
            replaced_run.check(self.path, self.config)
        if resume:
            self._check_continuation(taken)

    def _restore(self) -> str:
        """Words for a refusal where an earlier run came back, or is still aside."""
        if not replaced_run.is_kept(self.path):
            return ""
        if replaced_run.is_whole(self.path) and found(self.checkpoints):
            self.notes.append(words := replaced_run.way_back(self.path))
            return f"; {words}"
        if self.config.resume and replaced_run.successor_began(self.path):
            self.notes.append(
                f"{self.path / replaced_run.ASIDE} has the run that this one replaces, until a checkpoint that is due"
            )
            return ""
        self._writing(lambda: replaced_run.restore(self.path))
        self.notes.append(f"{self.path}: the run that was to be replaced is back, as the new one had no checkpoint")
        return ": the one that was to be replaced is back, as the new one had no checkpoint"

    def _writing(self, work: Callable[[], None]) -> None:
        handle = lock.take(self.path)
        try:
            work()
        except OSError as problem:
            raise UserError(f"--output {self.path} cannot be written ({problem.strerror})") from problem
        finally:
            os.close(handle)

    def _check_continuation(self, taken: list[str]) -> None:
        newest = found(self.checkpoints)
        if taken:
            manifest, inputs = self._read_manifest()
            old = self._check_same_recipe(inputs)
            run_length.check_length(self.config, old, step_of(newest[-1]) if newest else 0, self.path)
            self._before = Before(old, manifest, inputs)
        if not newest and "model" in taken:
            raise UserError(
                f"--resume: the run in {self.path} is finished and its checkpoints are gone; replace it with "
                "--overwrite, or choose another --output"
            )
        if not newest:
            self.notes.insert(0, f"--resume: {self.path} has no checkpoint to continue from; starting at step 0")

    def _check_same_recipe(self, inputs: dict[str, dict] | None) -> dict:
        """The run's settings before, keys joined by dots. inputs: its fingerprints, which decide of places."""
        try:
            old = flat(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as problem:
            why = " ".join(str(problem).split())[:200]  # AttributeError: not a mapping
            raise UserError(
                f"{self.path / 'config.yaml'}: cannot be read ({why}); the run cannot be continued"
            ) from problem
        new = flat(yaml.safe_load(to_yaml(self.config)))
        # masked: another key to the same place is the same place
        old, new = ({key: masked_tree(shipped.from_home(value)) for key, value in run.items()} for run in (old, new))
        free = (*FREE_ON_RESUME, *run_length.KEYS)
        names = run_inputs.PLACES
        differ = [k for k in new if old.get(k) != new[k] and k not in names and not k.startswith(free)]
        places = run_inputs.other_places(old, new, inputs)
        if self.config.accept_changed_inputs:
            self._other_places = {k: {"then": _named(old.get(k)), "now": _named(new[k])} for k in places}
        else:
            differ += places
        if differ:
            key = differ[0]
            accept = f", accept it with {run_inputs.ACCEPT}" if key in names else ""
            raise UserError(
                f"--resume: {key} is {new[key]!r} but the run in {self.path} has {old.get(key)!r}; give the "
                f"same value{accept}, or start a new run with another --output"
            )
        return old

    def _read_manifest(self) -> tuple[dict, dict[str, dict] | None]:
        """And of it what the run began with, None where it does not say."""
        path = self.path / replaced_run.MANIFEST
        try:
            manifest, is_sealed = sealed_json.loads(path.read_bytes()) if path.exists() else ({}, False)
            inputs = manifest.get("inputs")
            if is_sealed != (inputs is not None):
                raise ValueError("its SHA-256 is gone")
        except (OSError, ValueError) as problem:
            if not self.config.accept_changed_inputs:
                raise UserError(
                    f"--resume: {path} is damaged ({problem}), so what the run began with is not known; "
                    f"{run_inputs.ACCEPT} goes on with what there is now"
                ) from problem
            manifest, inputs = {}, None
        return manifest, inputs

    def accept_inputs(self, inputs: dict[str, dict], done: int) -> None:
        """Holds what the run begins with now against what it began with. UserError by name, unless it is accepted."""
        self.inputs, before = inputs, self._before
        if before is None:
            return
        self._changed = before.manifest.get("changed_inputs", [])
        self._model_step = before.manifest.get("model_of_step")
        if before.inputs is None:
            self.notes.append(
                f"warning: {self.path / replaced_run.MANIFEST} does not say what the run began with; whether "
                "pairs and base are still the same was not checked"
            )
        same_key = {key for key in (run_inputs.HELD_OUT,) if before.config.get(key) == self._setting(key)}
        then = inputs if before.inputs is None else before.inputs
        changed = run_inputs.changes(then, inputs, leave_out={run_inputs.HELD_OUT} - same_key) | self._other_places
        if not same_key:
            self._note_held_out(then.get(run_inputs.HELD_OUT), inputs.get(run_inputs.HELD_OUT), done)
        if not changed:
            return
        if not self.config.accept_changed_inputs:
            raise UserError(
                f"--resume: {run_inputs.refusal(changed)}; put back what the run began with, or accept it with "
                f"{run_inputs.ACCEPT} (manifest.json keeps both)"
            )
        self._changed = [*self._changed, {"step": done, **changed}]
        self._has_other_base = any(name.startswith("models.") for name in changed)
        self.notes.append(f"{run_inputs.ACCEPT}: {run_inputs.refusal(changed)}")

    def _note_held_out(self, then: dict | None, now: dict | None, done: int) -> None:
        """Of held-out pairs under another name, which are free: where they are others, the curve is of both."""
        key = run_inputs.HELD_OUT
        if not run_inputs.changes({key: then} if then else {}, {key: now} if now else {}, leave_out=set()):
            return
        earlier = [then, *(each[key]["then"] for each in reversed(self._changed) if key in each)]
        known = next((each for each in earlier if each), None)  # also of a start that had none
        self._changed = [*self._changed, {"step": done, key: {"then": then, "now": now}}]
        if now and known and run_inputs.changes({key: known}, {key: now}, leave_out=set()):
            self.notes.append(
                f"warning: {key} has other pairs than before: held_out_ metrics up to step {done} and after it are not "
                "to be compared (manifest.json keeps both)"
            )

    @property
    def former_steps(self) -> tuple[int, ...]:
        """What train.steps was before, of a run that got another length."""
        if self._before is None:
            return ()
        known = [*self._before.manifest.get("former_steps", []), self._before.config["train.steps"]]
        return tuple(step for step in dict.fromkeys(known) if step != self.config.train.steps)

    def _setting(self, key: str) -> object:
        return shipped.from_home(flat(to_dict(self.config))[key])

    def start(self, done: int, dropped: list[str], source: Source, models: Models, variant: str, world: int) -> None:
        """Writes manifest.json and config.yaml; a run that is to be replaced is put aside.

        After `accept_inputs`. dropped: unusable pairs met before.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock.take(self.path)
            if self.config.overwrite:
                replaced_run.set_aside(self.path)
            elif done:
                replaced_run.clear(self.path)
            manifest = self._manifest(done, source, models, variant, world)
            manifest["data"]["dropped"] = masked_tree(dropped)
            self._write_manifest(manifest)
            config = replace(self.config, resume=False, overwrite=False, accept_changed_inputs=False)
            write_text(self.path / "config.yaml", yaml.safe_dump(masked_tree(to_dict(config)), sort_keys=False))
            lock.note_launch(self.lock)
        except OSError as problem:
            raise UserError(f"--output {self.path} cannot be written ({problem.strerror})") from problem

    def has_checkpoint(self) -> None:
        """The run that was replaced is not needed any more."""
        with contextlib.suppress(OSError):  # what is left of it goes with the next checkpoint or start
            replaced_run.forget(self.path)

    def _write_manifest(self, manifest: dict) -> None:
        write_text(self.path / replaced_run.MANIFEST, sealed_json.dumps(manifest))

    def release(self) -> None:
        """Gives the folder back."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _manifest(self, done: int, source: Source, models: Models, variant: str, world: int) -> dict:
        found = {
            "variant": variant,
            "config_sha256": hashlib.sha256(
                masked(json.dumps(to_dict(self.config), sort_keys=True)).encode()
            ).hexdigest(),
            "data": {
                "source": self.config.data.source,
                "pairs": len(source),
                "ties_left_out": source.ties,
                "left_out_by_filters": getattr(source, "left_out", {}),
                "weighted_by_filters": getattr(source, "reweighted", 0),
                **({"labels": source.labels} if getattr(source, "labels", None) else {}),
                "order": describe(make_order(source, self.config.data.shuffle, self.config.seed)),
                "dropped": [],
            },
            "model": {
                "base": self.config.models.base,
                "init": self.config.models.init,
                "reference": reference_in_words(self.config.models),
                "unet_parameters": sum(p.numel() for p in models.policy.parameters()),
                "trained_parameters": sum(p.numel() for p in models.weights.working),
            },
            **({"former_steps": list(self.former_steps)} if self.former_steps else {}),
            "inputs": self.inputs,
            **({"changed_inputs": self._changed} if self._changed else {}),
            "continued_from_step": done,
            **({"model_of_step": self._model_step} if self._model_step is not None else {}),
            "processes": world,
            "device": torch.cuda.get_device_name(models.device) if models.device.type == "cuda" else "cpu",
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        }
        return masked_tree(found)

    def record_dropped(self, dropped: list[str]) -> None:
        dropped = masked_tree(dropped)
        self._change_manifest(lambda manifest: manifest | {"data": manifest["data"] | {"dropped": dropped}})

    def _change_manifest(self, change: Callable[[dict], dict]) -> None:
        try:
            manifest, _ = sealed_json.loads((self.path / replaced_run.MANIFEST).read_bytes())
        except ValueError:  # somebody wrote into it while the run trained
            return
        self._write_manifest(change(manifest))

    def unchanged_parts(self) -> dict[str, Path]:
        """At the end: the parts that were not trained and may be copied, as they are what the run began with; what is
        not is written from memory. UserError where memory has it in rounded numbers: the result would be of two models.
        """
        replaced = run_inputs.replaced_since(self.config.models, self.inputs)
        if replaced and reopens_base(self.config.models):
            raise UserError(
                f"{replaced[0]} was replaced while the run trained, so its model cannot be written; every checkpoint "
                "is whole: put back what the run began with and repeat with --resume"
            )
        gone = {re.search(r"\((\w+)\)", name)[1] for name in replaced if "(" in name}
        return {name: path for name, path in untouched_parts(self.config.models).items() if name not in gone}

    def save_model(self, pipeline: DiffusionPipeline, untouched: dict[str, Path], step: int) -> None:
        """model/: a diffusers folder. Written aside and renamed; what is there stays until then.

        untouched: see `unchanged_parts`. step: an evaluation of a model of another step, or with parts of another base,
        goes with that model.
        """
        is_new = self._model_step not in (None, step) or self._has_other_base
        self._save("model", lambda folder: write_folder(pipeline, folder, untouched), is_new)
        self._model_step = step
        self._change_manifest(lambda manifest: manifest | {"model_of_step": step})

    def save_adapter(self, models: Models, masters: dict[str, torch.Tensor]) -> None:
        """lora/: what `pipeline.load_lora_weights(folder)` reads, and beside it the same in kohya's names."""
        self._save("lora", lambda folder: save_adapter(models, folder, masters))

    def _save(self, name: str, write: Callable[[Path], None], is_new: bool = False) -> None:
        final, aside, old = self.path / name, self.path / f".tmp-{name}", self.path / f".tmp-old-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write(aside)
            if is_new:
                for left in ("evaluation.json", "samples.png", "report.html", ".evaluation"):
                    replaced_run.remove(self.path / left)
            if os.path.lexists(final):
                replaced_run.remove(old)
                final.rename(old)
            aside.rename(final)
            if old.is_dir():
                replaced_run.carry(name, old, final)
            replaced_run.remove(old)
        except (OSError, SafetensorError) as problem:
            shutil.rmtree(aside, ignore_errors=True)
            why = getattr(problem, "strerror", None) or problem
            raise UserError(
                f"{final} cannot be written ({why}); free some space and repeat with "
                "--resume: the last checkpoint is complete"
            ) from problem
        except BaseException:  # asked to stop
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _named(place: object) -> dict | None:
    return None if place is None else {"content": str(place)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
