"""Checkpoints: complete, atomic, without pickle.

A checkpoint is a folder checkpoints/step-NNNN with the policy, the optimizer's moments and the averaged
weights as safetensors, and state.json. It is written aside, fsynced and renamed: a folder under its
final name is whole. There is no RNG state: everything random is a function of seed and position.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from inpo_fast.optim import Average
from inpo_fast.refusal import Refusal


@dataclass(frozen=True)
class State:
    """step: optimizer steps done. seconds: spent training so far. dropped: unusable pairs met, by all processes."""

    step: int
    seconds: float
    dropped: list[str]


def save(
    folder: Path,
    state: State,
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    *,
    keep: int,
) -> Path:
    """Writes folder/step-NNNN and removes all but the newest `keep`. Refusal when the disk is full; the
    previous checkpoint is left alone."""
    final = folder / f"step-{state.step:04d}"
    aside = folder / f".tmp-step-{state.step:04d}"
    names = [name for name, _ in policy.named_parameters()]
    moments = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = value
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({k: v.contiguous() for k, v in policy.state_dict().items()}, aside / "policy.safetensors")
        save_file({k: v.contiguous() for k, v in moments.items()}, aside / "optimizer.safetensors")
        if average is not None:
            save_file(dict(zip(names, average.mean, strict=True)), aside / "average.safetensors")
        (aside / "state.json").write_text(json.dumps(vars(state), indent=1))
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


def load(folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> State:
    """Puts one checkpoint back, in place. Refusal when it does not fit the run or is damaged."""
    try:
        state = State(**json.loads((folder / "state.json").read_text()))
        device = next(policy.parameters()).device.type
        policy.load_state_dict(load_file(folder / "policy.safetensors", device=device))
        moments = load_file(folder / "optimizer.safetensors", device=device)
        for name, parameter in policy.named_parameters():
            prefix = name + "/"
            own = {k[len(prefix) :]: v for k, v in moments.items() if k.startswith(prefix)}
            own["step"] = own["step"].cpu()
            optimizer.state[parameter] = own
        if average is not None:
            kept = load_file(folder / "average.safetensors", device=device)
            for (name, _), mean in zip(policy.named_parameters(), average.mean, strict=True):
                mean.copy_(kept[name])
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise Refusal(
            f"{folder}: checkpoint cannot be loaded ({reason}); remove this folder to continue from the one before it"
        ) from problem
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
