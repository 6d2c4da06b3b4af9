"""Checkpoints: complete, atomic, sharded, written in the background, without pickle.

A checkpoint is a folder checkpoints/step-NNNN: the trained weights (fp32 masters; of LoRA the adapter's), the
optimizer's state and the averaged weights in safetensors shards, one or more a process, and state.json with the SHA-256
of each. torch.distributed.checkpoint writes and reads the shards, so any number of processes can load what any other
number saved. Everything is written aside, fsynced, hashed and renamed: a folder under its final name is whole. There is
no RNG state: everything random is a function of seed and position.
"""

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.runtime import distributed, sealed_json
from inpo_fast.runtime.errors import Hang, UserError
from inpo_fast.runtime.watch import PeerLeft, exchange
from inpo_fast.training.optim import Average
from inpo_fast.training.saved_checkpoint import (
    Damaged,
    State,
    found,
    load,
    parts_of,
    reason_of,
    sha256_of,
    step_of,
    verify,
)

# it notes each tensor and, where writing fails, a traceback over our one line
logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True
# one process without torch.distributed is not a mistake
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")
FILE_BYTES = 2**31


class Checkpoints:
    """The checkpoints of a run. One is written at a time, while the training goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        milestones: int = 0,
        patience: float = 1800,
        written: Callable[[], None] = lambda: None,
    ):
        """keep: how many of the newest stay. milestones: those of every so many steps stay as well; 0: none.
        patience: seconds that the writing of one may take. written: called on process 0 when one that was due is on
        the disk."""
        self.patience, self.written = patience, written
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
        scheduled: bool = True,
    ) -> Path:
        """Copies everything to the host and begins to write folder/step-NNNN; all processes call it.

        UserError when the one before could not be written. wait: come back when this one is on the disk. scheduled:
        False for that of a run that is asked to stop, of which `written` is not told.
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
            parts_of(_to_host(tensors), weights),
            storage_writer=_Writer(str(aside), files, lambda: self._commit(aside, final, state, scheduled)),
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
            f"{self._path}: checkpoint could not be written ({reason_of(problem)}); earlier checkpoints are intact: "
            "free some space and continue with --resume"
        ) from problem

    def _commit(self, aside: Path, final: Path, state: State, scheduled: bool) -> None:
        """On process 0, when the shards of all processes are on the disk."""
        files = {path.name: sha256_of(path) for path in sorted(aside.glob("*.safetensors"))}
        content = asdict(state) | {"files": files}
        (aside / "state.json").write_text(sealed_json.dumps(content))
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
        if scheduled:
            self.written()

    def load_newest(
        self,
        weights: MasterWeights,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        warn: Callable[[str], None],
    ) -> State | None:
        """Puts the newest whole checkpoint back, in place; None where there is none at all. All processes call it.

        One that is damaged, or cannot be put back, is left where it is, with a warning, and the one before it is taken.
        UserError when none is left, and Misfit when a whole one is of other settings: an older one is no remedy there.
        """
        problems = []
        for folder in reversed(found(self.folder)):
            try:
                verify(folder, self.rank, self.world)
                problem = None
            except Damaged as damage:
                problem = str(damage)
            told = [p for p in distributed.gather(problem) if p]
            try:
                if not told:
                    state = load(folder, weights, optimizer, average)
                    for each in problems:
                        warn(f"{each}; continuing from {folder.name}")
                    return state
            except Damaged as damage:
                told = [str(damage)]
            problems.append(told[0])
        if problems:
            raise UserError(f"no checkpoint can be loaded: {'; '.join(problems)}. Start again with --overwrite")
        return None


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
