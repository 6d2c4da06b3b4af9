"""The output folder of a run: fixed names, never two runs in one folder by accident.

config.yaml  manifest.json  metrics.jsonl  checkpoints/  model/  evaluation.json  samples.png  report.html
warnings.json
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from inpo_fast.config import RunConfig, flat, shipped, to_dict, to_yaml
from inpo_fast.data.order import describe, make_order
from inpo_fast.data.pair import Source
from inpo_fast.handover.output_model import save_adapter, untouched_parts
from inpo_fast.models.files.diffusers_folder import write_folder
from inpo_fast.models.models import Models
from inpo_fast.runtime import lock
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import write_text
from inpo_fast.runtime.masking import masked, masked_tree

OURS = (
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "evaluation.json",
    "samples.png",
    "report.html",
    "warnings.json",
)
OUR_FOLDERS = ("checkpoints", "model", "lora", "tensorboard", "images", "online", "wandb", ".evaluation")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "triton", "numpy", "pillow")
# keys that may differ between a run and its continuation: they do not touch what is computed
FREE_ON_RESUME = (
    "output",
    "resume",
    "dry_run",
    "plan.",
    "overwrite",
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


class RunFolder:
    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.lock: int | None = None  # held as long as this process lives

    def check(self) -> None:
        """Refuses a folder that holds another run, unless told what to do with it."""
        if self.config.resume and self.config.overwrite:
            raise UserError("--resume and --overwrite contradict each other; give one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output {self.path} is a file; name a folder")
        lock.check(self.path)
        self._check_writable()
        taken = [name for name in (*OURS, *OUR_FOLDERS) if (self.path / name).exists()]
        if taken and not (self.config.resume or self.config.overwrite):
            raise UserError(
                f"{self.path} already holds a run ({', '.join(taken)}); continue it with --resume, replace "
                "it with --overwrite, or choose another --output"
            )
        if self.config.resume and taken:
            self._check_same_recipe()

    def _check_writable(self) -> None:
        """Before a model is loaded: the nearest folder that exists must take a file."""
        nearest = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as problem:
            raise UserError(
                f"--output {self.path} cannot be written ({problem.strerror}); choose another folder or mend its rights"
            ) from problem

    def _check_same_recipe(self) -> None:
        try:
            old = flat(yaml.safe_load((self.path / "config.yaml").read_text()))
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as problem:  # AttributeError: not a mapping
            raise UserError(
                f"{self.path / 'config.yaml'}: cannot be read ({problem}); the run cannot be continued"
            ) from problem
        new = flat(yaml.safe_load(to_yaml(self.config)))
        # masked: another key to the same place is the same place
        old, new = ({key: masked_tree(shipped.from_home(value)) for key, value in run.items()} for run in (old, new))
        differ = [key for key in new if old.get(key) != new[key] and not key.startswith(FREE_ON_RESUME)]
        if differ:
            key = differ[0]
            raise UserError(
                f"--resume: {key} is {new[key]!r} but the run in {self.path} has {old.get(key)!r}; give the "
                "same value, or start a new run with another --output"
            )

    def start(self, done: int, source: Source, models: Models, variant: str, world: int) -> None:
        """Writes config.yaml and manifest.json; clears what a continued or replaced run must not keep."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock.take(self.path)
            if self.config.overwrite:
                for name in (*OURS, *OUR_FOLDERS):
                    _remove(self.path / name)
            own = masked_tree(to_dict(replace(self.config, resume=False, overwrite=False)))
            write_text(self.path / "config.yaml", yaml.safe_dump(own, sort_keys=False))
            write_text(
                self.path / "manifest.json", json.dumps(self._manifest(done, source, models, variant, world), indent=1)
            )
        except OSError as problem:
            raise UserError(f"--output {self.path} cannot be written ({problem.strerror})") from problem

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
                "unet_parameters": sum(p.numel() for p in models.policy.parameters()),
                "trained_parameters": sum(p.numel() for p in models.weights.working),
            },
            "continued_from_step": done,
            "processes": world,
            "device": torch.cuda.get_device_name(models.device) if models.device.type == "cuda" else "cpu",
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        }
        return masked_tree(found)

    def record_dropped(self, dropped: list[str]) -> None:
        path = self.path / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["data"]["dropped"] = masked_tree(dropped)
        write_text(path, json.dumps(manifest, indent=1))

    def save_model(self, pipeline: DiffusionPipeline) -> None:
        """model/: a diffusers folder. Written aside and renamed."""
        self._save("model", lambda folder: write_folder(pipeline, folder, untouched_parts(self.config.models)))

    def save_adapter(self, models: Models, masters: dict[str, torch.Tensor]) -> None:
        """lora/: what `pipeline.load_lora_weights(folder)` reads, and beside it the same in kohya's names."""
        self._save("lora", lambda folder: save_adapter(models, folder, masters))

    def _save(self, name: str, write: Callable[[Path], None]) -> None:
        final, aside = self.path / name, self.path / f".tmp-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            write(aside)
            _remove(final)
            aside.rename(final)
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
