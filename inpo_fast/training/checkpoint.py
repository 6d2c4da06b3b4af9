"""Checkpoints: complete, atomic, sharded, written in the background, without pickle.

A checkpoint is a folder checkpoints/step-NNNN: the trained weights (fp32 masters; of LoRA the adapter's), the
optimizer's state and the averaged weights in safetensors shards, one or more a process, and state.json with the SHA-256
of each. torch.distributed.checkpoint writes and reads the shards, so any number of processes can load what any other
number saved. Everything is written aside, fsynced, hashed and renamed: a folder under its final name is whole. There is
no RNG state: everything random is a function of seed and position.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import Hang, UserError
from inpo_fast.runtime.watch import PeerLeft, exchange
from inpo_fast.training.optim import Average

# it notes each tensor and, where writing fails, a traceback over our one line
logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True
# one process without torch.distributed is not a mistake
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")
FILE_BYTES = 2**31


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
    """A checkpoint that is not what was written."""


class Checkpoints:
    """The checkpoints of a run. One is written at a time, while the training goes on."""

    def __init__(self, folder: Path, *, keep: int, milestones: int = 0, patience: float = 1800):
        """keep: how many of the newest stay. milestones: those of every so many steps stay as well; 0: none.
        patience: seconds that the writing of one may take."""
        self.patience = patience
        self.folder, self.keep, self.milestones = folder, keep, milestones
        self.rank, self.world = distributed.rank_and_world()
        # messages of the background thread must not meet those of the training
        several = dist.is_initialized() and self.world > 1
        with exchange("a group for checkpoints"):
            self.group = dist.new_group(backend="gloo", timeout=distributed.NEVER) if several else None
        self._writing: Future | None = None
        self._path: Path | None = None

    def save(
        self,
        state: State,
        weights: MasterWeights,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        wait: bool = False,
    ) -> Path:
        """Copies everything to the host and begins to write folder/step-NNNN; all processes call it.

        UserError when the one before could not be written. wait: come back when this one is on the disk.
        """
        self.wait()
        self._path = final = self.folder / f"step-{state.step:04d}"
        tensors, numbers = _collect(weights, optimizer, average)
        owners = _owners(tensors, self.world if weights.partition is None else 1)
        files = _files(tensors, owners)
        if weights.partition is None:
            tensors = {name: tensor for name, tensor in tensors.items() if owners[name] == self.rank}
        state = replace(state, numbers={k: v for part in distributed.gather(numbers) for k, v in part.items()})
        aside = self.folder / f".tmp-{final.name}"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        distributed.barrier()
        self._writing = dcp.async_save(
            _parts(_to_host(tensors), weights),
            storage_writer=_Writer(str(aside), files, lambda: self._commit(aside, final, state)),
            process_group=self.group,
            async_stager=_AlreadyOnHost(),
            no_dist=self.group is None,
        )
        if wait:
            self.wait()
        return final

    def wait(self) -> None:
        """Until what is being written is on the disk. UserError when it cannot be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                with exchange("checkpoint"):
                    writing.result(1.2 * self.patience + 1)  # until then watch.py has named a process that hangs
            except TimeoutError as problem:
                raise Hang(
                    f"{self._path}: not written within {self.patience:.0f} s (train.patience_minutes): a process hangs "
                    "or the disk is too slow; earlier checkpoints are intact: continue with --resume"
                ) from problem
            except PeerLeft:
                raise
            except (CheckpointException, OSError, RuntimeError) as problem:
                self._refuse(problem)

    def check(self) -> None:
        """UserError as soon as it is known that the checkpoint under way could not be written. Waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def end(self) -> None:
        """When the run ends early: lets one process finish what it writes, or clean up after it."""
        if self.group is None:
            with contextlib.suppress(UserError):  # the run ends for another reason, which is the one to be told
                self.wait()

    def _refuse(self, problem: BaseException) -> None:
        if self.rank == 0:
            shutil.rmtree(self.folder / f".tmp-{self._path.name}", ignore_errors=True)
        raise UserError(
            f"{self._path}: checkpoint could not be written ({_reason(problem)}); earlier checkpoints are intact: free "
            "some space and continue with --resume"
        ) from problem

    def _commit(self, aside: Path, final: Path, state: State) -> None:
        """On process 0, when the shards of all processes are on the disk."""
        files = {path.name: _sha256(path) for path in sorted(aside.glob("*.safetensors"))}
        content = asdict(state) | {"files": files}
        (aside / "state.json").write_text(json.dumps(content, indent=1))
        _sync(aside / "state.json")
        _sync(aside)
        if final.exists():
            final.rename(self.folder / f".tmp-old-{final.name}")
        aside.rename(final)
        _sync(self.folder)
        for left in self.folder.glob(".tmp-*"):  # the one replaced, and what a killed run left
            shutil.rmtree(left, ignore_errors=True)
        # a damaged one that the run has fallen back from may stand further on: it must not push out what is good
        saved = [path for path in found(self.folder) if step_of(path) <= state.step]
        for old in saved[: -self.keep]:
            if not (self.milestones and step_of(old) % self.milestones == 0):
                shutil.rmtree(old)

    def load_newest(
        self,
        weights: MasterWeights,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        warn: Callable[[str], None],
    ) -> State | None:
        """Puts the newest whole checkpoint back, in place; None where there is none at all. All processes call it.

        A damaged one is left where it is, with a warning, and the one before it is taken. UserError when all are
        damaged, or one does not fit the run.
        """
        problems = []
        for folder in reversed(found(self.folder)):
            try:
                verify(folder, self.rank, self.world)
                problem = None
            except Damaged as damage:
                problem = str(damage)
            told = [p for p in distributed.gather(problem) if p]
            if not told:
                for each in problems:
                    warn(f"{each}; continuing from {folder.name}")
                return load(folder, weights, optimizer, average)
            problems.append(told[0])
        if problems:
            raise UserError(f"no checkpoint can be loaded: {'; '.join(problems)}. Start again with --overwrite")
        return None


def found(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    complete = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]  # not a user's step-0050-kept
    return sorted(complete, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def verify(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Damaged, with the file's name, unless every file is what was written. Of several processes each reads a part."""
    try:
        files = json.loads((folder / "state.json").read_text(encoding="utf-8"))["files"]
        for name in sorted(files)[rank::world]:
            if _sha256(folder / name) != files[name]:
                raise Damaged(f"{folder / name} is damaged (its SHA-256 is not the one in state.json)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Damaged(f"{folder} is damaged ({type(problem).__name__}: {problem})") from problem


@torch.no_grad()
def load(folder: Path, weights: MasterWeights, optimizer: torch.optim.Optimizer, average: Average | None) -> State:
    """Puts one checkpoint back, in place; all processes call it.

    UserError when it does not fit the run or is damaged.
    """
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state = State(**_of_today({key: value for key, value in content.items() if key != "files"}))
        reader = HuggingFaceStorageReader(str(folder))
        known = reader.read_metadata().state_dict_metadata
        shapes = {name: (tuple(x.size), x.properties.dtype) for name, x in known.items()}
        _check_fits(shapes, weights, average)
        # on the host first: a part is told as one of the whole only there, and a failure leaves the run as it was
        read = _targets(shapes, weights)
        with exchange("checkpoint"):
            dcp.load(_parts(read, weights), storage_reader=reader, no_dist=not dist.is_initialized())
        for number, (name, master) in enumerate(zip(weights.names, weights.masters, strict=True)):
            if not master.numel():
                continue
            master.copy_(read[f"policy/{name}"])
            if average is not None:
                average.mean[number].copy_(read[f"average/{name}"])
            prefix = f"optimizer/{name}/"
            own = {key.removeprefix(prefix): value for key, value in read.items() if key.startswith(prefix)}
            own = {key: _place(key, value, optimizer, master) for key, value in own.items()}
            optimizer.state[master] = dict(state.numbers.get(name, {})) | own
        weights.refresh()
    except PeerLeft:
        raise
    except (CheckpointException, Exception) as problem:  # what is forged or foreign makes the libraries raise anything
        raise UserError(
            f"{folder}: checkpoint cannot be loaded ({_reason(problem)}); remove this folder to continue from the one "
            "before it"
        ) from problem
    return state


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, on the CPU: policy/NAME, average/NAME, optimizer/NAME/PART."""
    reader = HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in known.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _collect(
    weights: MasterWeights, optimizer: torch.optim.Optimizer, average: Average | None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Everything of this process that is to be saved, under its name, and what is not a tensor."""
    tensors, numbers = {}, {}
    for number, (name, master) in enumerate(zip(weights.names, weights.masters, strict=True)):
        tensors[f"policy/{name}"] = master.detach()
        if average is not None:
            tensors[f"average/{name}"] = average.mean[number]
        for key, value in optimizer.state.get(master, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _owners(tensors: dict[str, torch.Tensor], world: int) -> dict[str, int]:
    """Where all processes hold everything each writes a part: the largest tensor first, to whom has the least."""
    totals, owners = [0] * world, {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        owners[name] = totals.index(min(totals))
        totals[owners[name]] += tensors[name].nbytes
    return owners


def _files(tensors: dict[str, torch.Tensor], owners: dict[str, int]) -> dict[str, int]:
    """Which of its owner's files (1, 2, …) a tensor goes to: a file is put together in memory before it is written."""
    sizes, out = {}, {}
    for name, tensor in tensors.items():
        sizes[owners[name]] = sizes.get(owners[name], 0) + tensor.nbytes
        out[name] = 1 + sizes[owners[name]] // FILE_BYTES
    return out


def _to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that no update touches any more, dense in memory."""
    return {name: torch.empty(x.shape, dtype=x.dtype).copy_(x) for name, x in tensors.items()}


def _parts(tensors: dict[str, torch.Tensor], weights: MasterWeights) -> dict[str, torch.Tensor]:
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


class _Writer(HuggingFaceStorageWriter):
    """Calls `commit` on the first process when the shards of all of them are on the disk."""

    def __init__(self, path: str, files: dict[str, int], commit: Callable[[], None]):
        super().__init__(path, files, save_distributed=True)
        self.commit = commit

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        self.commit()


class _AlreadyOnHost:
    """torch.distributed.checkpoint's stager for tensors that are copies already."""

    should_synchronize_after_execute = False

    def stage(self, state_dict):
        return state_dict

    def close(self) -> None:
        pass


def _of_today(state: dict) -> dict:
    """Until 0.1 only the VAE's size was kept."""
    size = state.pop("vae_batch", None)
    return state | ({"lowered": {"data.vae_batch": size}} if size else {})


def _targets(shapes: dict[str, tuple], weights: MasterWeights) -> dict[str, torch.Tensor]:
    """Host memory for each saved tensor: of partitioned weights, this process's part of what has their shapes."""
    pairs = dict(zip(weights.names, zip(weights.masters, weights.working, strict=True), strict=True))
    out = {}
    for key, (shape, dtype) in shapes.items():
        master, working = pairs[key.split("/")[1]]
        out[key] = torch.empty(master.shape if shape == tuple(working.shape) else shape, dtype=dtype)
    return out


def _check_fits(shapes: dict[str, tuple], weights: MasterWeights, average: Average | None) -> None:
    for kind in ("policy",) if average is None else ("policy", "average"):
        want = {f"{kind}/{name}": tuple(p.shape) for name, p in zip(weights.names, weights.working, strict=True)}
        saved = {key: shape for key, (shape, _) in shapes.items() if key.startswith(f"{kind}/")}
        for key in sorted({**want, **saved}):
            if want.get(key) != saved.get(key):
                raise KeyError(
                    f"it was saved with other trained parameters: {key} is {saved.get(key)} there and "
                    f"{want.get(key)} in this run"
                )


def _place(key: str, value: torch.Tensor, optimizer: torch.optim.Optimizer, master: torch.Tensor) -> torch.Tensor:
    """Where the optimizer keeps a piece of state: AdamW's step count is on the CPU unless it is fused."""
    if key == "step" and not optimizer.defaults.get("fused"):
        return value
    if value.shape == master.shape and not getattr(optimizer, "state_in_order", False):
        return torch.empty_like(master, dtype=value.dtype).copy_(value)  # laid out as the parameter is
    return value.to(master.device)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(problem: BaseException) -> str:
    """One line: what went wrong on the process where it did."""
    if isinstance(problem, CheckpointException):
        rank, (cause, _) = next(iter(problem.failures.items()))
        more = f" on process {rank}" if distributed.rank_and_world()[1] > 1 else ""
        return f"{_reason(cause)}{more}"
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
