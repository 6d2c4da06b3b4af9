"""A checkpoint that was written, looked at and put back: what it holds, whether it is whole, whether it fits the run.

state.json is sealed (sealed_json.py) and has the SHA-256 of each shard; only the shards that it lists are read. One of
an earlier version, without the seal, is read with its shards' hashes checked.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime import distributed, sealed_json
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.watch import PeerLeft, exchange
from inpo_fast.training.optim import Average


@dataclass(frozen=True)
class State:
    """step: optimizer steps done. seconds: spent training so far. dropped: unusable pairs met, by all processes.
    loss_scale: value and good steps of fp16's. numbers: the optimizer's state that is not a tensor, by parameter.
    lowered: sizes that memory made a process halve, the smallest of all processes: they decide how results are rounded.
    """

    step: int
    seconds: float
    dropped: list[str]
    loss_scale: tuple[float, int] | None = None
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    lowered: dict[str, int] = field(default_factory=dict)


class Damaged(Exception):
    """A checkpoint that is not what was written, or cannot be put back: the one before it may be."""


class Misfit(UserError):
    """A whole checkpoint that this run cannot go on from: its settings are at fault, and an older one would not do."""


def found(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]  # not a user's step-0050-kept
    return sorted(complete, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def verify(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Damaged, with the file's name, unless every file is what was written. Of several processes each reads a part."""
    _, files = read_state(folder)
    try:
        for name in sorted(files)[rank::world]:
            if sha256_of(folder / name) != files[name]:
                raise Damaged(f"{folder / name} is damaged (its SHA-256 is not the one in state.json)")
    except OSError as problem:
        raise Damaged(f"{folder} is damaged ({type(problem).__name__}: {problem})") from problem


def read_state(folder: Path) -> tuple[State, dict[str, str]]:
    """What state.json says, and the SHA-256 of each shard by its name. Damaged where it is not what was written, or of
    another step than the folder's name."""
    try:
        content, _ = sealed_json.loads((folder / "state.json").read_bytes())
        files = content.pop("files")
        if not (isinstance(files, dict) and files and all(_is_shard(*item) for item in files.items())):
            raise ValueError("it lists no shards with their SHA-256")
        state = State(**_of_today(content))
        _check_state(state)
        if state.step != step_of(folder):
            raise ValueError(f"it is of step {state.step}")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise Damaged(f"{folder / 'state.json'} is damaged ({type(problem).__name__}: {problem})") from problem
    return state, files


def _of_today(state: dict) -> dict:
    """Until 0.1 only the VAE's size was kept."""
    size = state.pop("vae_batch", None)
    return state | ({"lowered": {"data.vae_batch": size}} if size else {})


def _is_shard(name: object, sha256: object) -> bool:
    is_name = isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
    return is_name and isinstance(sha256, str) and len(sha256) == 64


def _check_state(state: State) -> None:
    """ValueError of values that no run writes: state.json had no seal once."""
    is_count = lambda x, least=0: type(x) is int and x >= least  # noqa: E731
    is_number = lambda x: type(x) in (int, float) and math.isfinite(x)  # noqa: E731
    scale, numbers = state.loss_scale, state.numbers
    good = {
        "step": is_count(state.step),
        "seconds": is_number(state.seconds) and state.seconds >= 0,
        "dropped": isinstance(state.dropped, list) and all(isinstance(x, str) for x in state.dropped),
        "loss_scale": scale is None
        or (isinstance(scale, list | tuple) and len(scale) == 2 and is_number(scale[0]) and is_count(scale[1])),
        "numbers": isinstance(numbers, dict)
        and all(isinstance(own, dict) and all(map(is_number, own.values())) for own in numbers.values()),
        "lowered": isinstance(state.lowered, dict) and all(is_count(size, 1) for size in state.lowered.values()),
    }
    wrong = [f.name for f in fields(state) if not good[f.name]]
    if wrong:
        raise ValueError(f"{wrong[0]} is {str(getattr(state, wrong[0]))[:80]}")


@torch.no_grad()
def load(folder: Path, weights: MasterWeights, optimizer: torch.optim.Optimizer, average: Average | None) -> State:
    """Puts one checkpoint back, in place; all processes call it.

    Where the average is nothing but the newest weights after this step (Average.weight is 1), it becomes those,
    whatever was saved of one. Damaged, on all processes, when it cannot be put back; Misfit when it is of another run.
    """
    state = None
    with _agreed(folder):
        state, files = read_state(folder)
        reader = _reader(folder, files)
        known = reader.read_metadata().state_dict_metadata
        shapes = {name: (tuple(x.size), x.properties.dtype) for name, x in known.items()}
        anew = average is not None and average.weight(state.step - 1) == 1
        _check_fits(folder, shapes, weights, with_average=average is not None and not anew)
        # on the host first: a part is told as one of the whole only there, and a failure leaves the run as it was
        saved = _targets(shapes, weights)
    with _agreed(folder):
        with exchange("checkpoint"):
            dcp.load(parts_of(saved, weights), storage_reader=reader, no_dist=not dist.is_initialized())
        for number, (name, master) in enumerate(zip(weights.names, weights.masters, strict=True)):
            if not master.numel():
                continue
            master.copy_(saved[f"policy/{name}"])
            if average is not None:
                average.mean[number].copy_(saved[f"{'policy' if anew else 'average'}/{name}"])
            prefix = f"optimizer/{name}/"
            own = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            own = {key: _place(key, value, optimizer, master) for key, value in own.items()}
            optimizer.state[master] = dict(state.numbers.get(name, {})) | own
        weights.refresh()
    return state


@contextlib.contextmanager
def _agreed(folder: Path) -> Iterator[None]:
    """What goes wrong inside on one process goes wrong on all of them: Misfit or Damaged."""
    problem = told = None
    try:
        yield
    except PeerLeft:
        raise
    except Misfit as raised:
        problem, told = raised, (True, str(raised))
    except Damaged as raised:
        problem, told = raised, (False, str(raised))
    except (CheckpointException, Exception) as raised:  # what is forged or foreign makes the libraries raise anything
        problem, told = raised, (False, f"{folder} cannot be loaded ({reason_of(raised)})")
    found = [each for each in distributed.gather(told) if each is not None]
    if found:
        is_misfit, text = max(found)
        raise (Misfit if is_misfit else Damaged)(text) from problem


def _reader(folder: Path, names: Iterable[str]) -> HuggingFaceStorageReader:
    """Of these shards alone, whatever else lies there."""
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = SimpleNamespace(ls=lambda path: [str(folder / name) for name in sorted(names)])
    return reader


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, on the CPU: policy/NAME, average/NAME, optimizer/NAME/PART."""
    reader = _reader(folder, read_state(folder)[1])
    known = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in known.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def parts_of(tensors: dict[str, torch.Tensor], weights: MasterWeights) -> dict[str, torch.Tensor]:
    """Of partitioned weights: what is a part of a parameter told as that, so that others can cut it otherwise."""
    if weights.partition is None:
        return tensors
    mesh = init_device_mesh("cpu", (weights.partition.world,))
    triples = zip(weights.names, weights.masters, weights.working, strict=True)
    of = {name: (master, working) for name, master, working in triples}
    out = {}
    for key, tensor in tensors.items():
        name = key.split("/")[1]
        master, working = of[name]
        if tensor.ndim and tensor.shape == master.shape:
            if not len(tensor):
                continue  # this process has no row of it
            stride = torch.empty(working.shape, device="meta").stride()
            tensor = DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False, shape=working.shape, stride=stride)
        out[key] = tensor
    return out


def _targets(shapes: dict[str, tuple], weights: MasterWeights) -> dict[str, torch.Tensor]:
    """Host memory for each saved tensor: of partitioned weights, this process's part of what has their shapes."""
    pairs = dict(zip(weights.names, zip(weights.masters, weights.working, strict=True), strict=True))
    out = {}
    for key, (shape, dtype) in shapes.items():
        master, working = pairs[key.split("/")[1]]
        out[key] = torch.empty(master.shape if shape == tuple(working.shape) else shape, dtype=dtype)
    return out


def _check_fits(folder: Path, shapes: dict[str, tuple], weights: MasterWeights, with_average: bool) -> None:
    for kind in ("policy", "average") if with_average else ("policy",):
        want = {f"{kind}/{name}": tuple(p.shape) for name, p in zip(weights.names, weights.working, strict=True)}
        saved = {key: shape for key, (shape, _) in shapes.items() if key.startswith(f"{kind}/")}
        for key in sorted({**want, **saved}):
            if want.get(key) != saved.get(key):
                raise Misfit(
                    f"{folder}: checkpoint cannot be loaded (it was saved with other trained parameters: {key} is "
                    f"{saved.get(key)} there and {want.get(key)} in this run); give the model and settings that it was "
                    "trained with, or start anew with another --output"
                )


def _place(key: str, value: torch.Tensor, optimizer: torch.optim.Optimizer, master: torch.Tensor) -> torch.Tensor:
    """Where the optimizer keeps a piece of state: AdamW's step count is on the CPU unless it is fused."""
    if key == "step" and not optimizer.defaults.get("fused"):
        return value
    if value.shape == master.shape and not getattr(optimizer, "state_in_order", False):
        return torch.empty_like(master, dtype=value.dtype).copy_(value)  # laid out as the parameter is
    return value.to(master.device)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_of(problem: BaseException) -> str:
    """One line: what went wrong on the process where it did."""
    if isinstance(problem, CheckpointException):
        rank, (cause, _) = next(iter(problem.failures.items()))
        more = f" on process {rank}" if distributed.rank_and_world()[1] > 1 else ""
        return f"{reason_of(cause)}{more}"
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
