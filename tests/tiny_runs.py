"""The trainer's command line on the tiny world: in this process, which saves the imports of a new one, in others that
are forked with the imports done, in one that begins anew, and under torchrun."""

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_world import one_level, save_pairs, tiny_pipeline

from inpo_fast import train as train_command
from inpo_fast.report import plots
from inpo_fast.training import saved_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def save_recipe(folder: Path, **groups: dict) -> None:
    """folder/tiny.yaml: four steps of four pairs; `groups` beside or in place of what stands here."""
    recipe = {
        "objective": {"beta": 500.0},
        "inversion": {"steps": 2, "batch": 8},
        "train": {"steps": 4, "pairs_per_step": 4, "micro_batch": 2, "checkpoint_every": 2, "threads": 1},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
    }
    recipe |= {name: recipe.get(name, {}) | keys for name, keys in groups.items()}
    if "models" not in recipe:
        one_level(tiny_pipeline()).save_pretrained(folder / "model")
        recipe["models"] = {"base": str(folder / "model")}
    if "data" not in recipe:
        recipe["data"] = {"source": save_pairs(folder / "pairs.parquet")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))


def train_in(folder: Path, name: str, *extra: str, curves: bool = False) -> Path:
    """A run of folder/tiny.yaml; its output folder. The report has its curves only if asked: to draw them takes as long
    as everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *_words(folder, name, *extra)])
        if not curves:
            _leave_out_curves(patch)
        train_command.main()
    return folder / name


def _leave_out_curves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")


class Forked:
    """`run(*args)` in a process of its own, with these environment variables; it has imported the trainer before it
    begins. Named as in subprocess.Popen; what it prints is in the file `said`, what goes to stderr in `complaints`."""

    def __init__(self, place: Path, run: Callable, *args, **environment: str):
        self.said, self.complaints = place.with_suffix(".out"), place.with_suffix(".err")
        files = [str(self.said), str(self.complaints)]
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["forked_imports"])
        self._process = forking.Process(target=_child, args=(files, environment, run, args))
        with pytest.MonkeyPatch.context() as patch:  # the first time it starts the process that imports
            for name, value in (ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}).items():
                patch.setenv(name, value)
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"did not end within {timeout} s"
        return self._process.exitcode


def _child(files: list[str], environment: dict[str, str], run: Callable, args: tuple) -> None:
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    run(*args)


def start(folder: Path, name: str, *extra: str) -> Forked:
    """The trainer's command in another process."""
    return Forked(folder / name, run_training, *_words(folder, name, *extra))


def run_training(*words: str) -> None:
    """`python -m inpo_fast.train words` in this process, without curves."""
    with pytest.MonkeyPatch.context() as patch:
        _leave_out_curves(patch)
        run_command("inpo_fast.train", *words)


def ran(place: Path, module: str, *words: str) -> SimpleNamespace:
    """`python -m module words` to its end, in a process of its own that is forked with the imports done."""
    process = Forked(place, run_command, module, *words)
    code = process.wait()
    return SimpleNamespace(returncode=code, stdout=process.said.read_text(), stderr=process.complaints.read_text())


def run_code(code: str, *words: str) -> None:
    """`python -c code words` in this process."""
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def run_command(module: str, *words: str) -> None:
    """`python -m module words` in this process: it ends with SystemExit where the command has an exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        patch.delitem(sys.modules, module, raising=False)  # it runs as __main__, and warns of one that is there
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def torchrun(
    processes: int, folder: Path, name: str, *extra: str, options: tuple[str, ...] = ("--standalone",)
) -> list:
    program = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(processes)]
    return [*program, "-m", "inpo_fast.train", *_words(folder, name, *extra)]


def _words(folder: Path, name: str, *extra: str) -> list[str]:
    return ["--config", str(folder / "tiny.yaml"), "--output", str(folder / name), *extra]


def finished(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs it to its end, whatever that is."""
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    return saved_checkpoint.read(run / "checkpoints" / f"step-{step:04d}")


def same_bits(one: Path, other: Path, step: int) -> bool:
    ours, theirs = saved(one, step), saved(other, step)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def metric(run: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(run)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def policy(run: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = saved_checkpoint.read(run / "checkpoints" / f"step-{step:04d}")
    return {name.removeprefix("policy/"): x for name, x in tensors.items() if name.startswith("policy/")}
