"""Checkpoints: complete, atomic, without pickle.

A checkpoint is a folder checkpoints/step-NNNN with the trained weights (fp32 masters; of LoRA the adapter's), the
optimizer's state and the averaged weights as safetensors, and state.json. It is written aside, fsynced and renamed: a
folder under its final name is whole. There is no RNG state: everything random is a function of seed and position.
"""

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inpo_fast.optim import Average
from inpo_fast.refusal import Refusal
from inpo_fast.weights import Weights


@dataclass(frozen=True)
class State:
    """step: optimizer steps done. seconds: spent training so far. dropped: unusable pairs met, by all processes.
    loss_scale: value and good steps of fp16's. numbers: the optimizer's state that is not a tensor, by parameter."""

    step: int
    seconds: float
    dropped: list[str]
    loss_scale: tuple[float, int] | None = None
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)


def save(
    folder: Path,
    state: State,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    *,
    keep: int,
) -> Path:
    """Writes folder/step-NNNN and removes all but the newest `keep`. Refusal when the disk is full; the
    previous checkpoint is left alone."""
    final = folder / f"step-{state.step:04d}"
    aside = folder / f".tmp-step-{state.step:04d}"
    tensors, numbers = {}, {}
    for name, master in zip(weights.names, weights.masters, strict=True):
        for key, value in optimizer.state.get(master, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _save(dict(zip(weights.names, weights.masters, strict=True)), aside / "policy.safetensors")
        _save(tensors, aside / "optimizer.safetensors")
        if average is not None:
            _save(dict(zip(weights.names, average.mean, strict=True)), aside / "average.safetensors")
        (aside / "state.json").write_text(json.dumps(vars(replace(state, numbers=numbers)), indent=1))
        for file in aside.iterdir():
            _sync(file)
        _sync(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(aside, ignore_errors=True)
        raise Refusal(
            f"{final}: checkpoint could not be written ({problem}); earlier checkpoints are intact: free "
            "some space and continue with --resume"
        ) from problem
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def found(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]  # not a user's step-0050-kept
    return sorted(complete, key=lambda path: int(path.name[5:]))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    own, seen = {}, set()
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        # bitsandbytes shares one table between all parameters: safetensors wants each stored apart
        own[name] = x.clone() if x.data_ptr() in seen else x
        seen.add(x.data_ptr())
    save_file(own, path)


@torch.no_grad()
def load(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer, average: Average | None) -> State:
    """Puts one checkpoint back, in place. Refusal when it does not fit the run or is damaged."""
    try:
        state = State(**json.loads((folder / "state.json").read_text()))
        saved, tensors = (load_file(folder / f"{part}.safetensors") for part in ("policy", "optimizer"))
        kept = load_file(folder / "average.safetensors") if average is not None else {}
        _check_names(saved, weights)
        states: dict[str, dict] = {name: dict(state.numbers.get(name, {})) for name in weights.names}
        for key, value in tensors.items():
            name, _, part = key.rpartition("/")
            states[name][part] = value
        for name, master in zip(weights.names, weights.masters, strict=True):
            master.copy_(saved[name])
            optimizer.state[master] = {
                key: _place(key, value, optimizer, master) for key, value in states[name].items()
            }
        weights.refresh()
        if average is not None:
            for name, mean in zip(weights.names, average.mean, strict=True):
                mean.copy_(kept[name])
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise Refusal(
            f"{folder}: checkpoint cannot be loaded ({reason}); remove this folder to continue from the one before it"
        ) from problem
    return state


def _check_names(saved: dict[str, torch.Tensor], weights: Weights) -> None:
    differ = sorted(set(saved) ^ set(weights.names))
    if differ:
        raise KeyError(f"it was saved with other trained parameters: {differ[0]} is only on one side")


def _place(key: str, value, optimizer: torch.optim.Optimizer, master: torch.Tensor):
    """Where the optimizer keeps a piece of state: AdamW's step count is on the CPU unless it is fused."""
    if not isinstance(value, torch.Tensor) or (key == "step" and not optimizer.defaults.get("fused")):
        return value
    return value.to(master.device)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
