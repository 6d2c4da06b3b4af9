"""Which process this is, and sums over all of them. One process works without torch.distributed."""

import os
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from inpo_fast.runtime import watch
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.watch import Watch, exchange

# of torch's own: longer than anything that is waited for. Who keeps the others waiting is found by watch.py
NEVER = timedelta(days=7)
JOIN = 10.0  # minutes that a process waits at least for the others to start
BUCKET = 64 * 2**20  # elements per reduction


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(patience_minutes: float = 30) -> tuple[int, int, torch.device]:
    """(rank, world size, device) under torchrun or alone; joins the process group when there are several.

    patience_minutes: how long the others wait in an exchange for a process that makes no progress (watch.py)."""
    rank, world = rank_and_world()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # gloo beside NCCL: checkpoints and messages between hosts do not go through the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=max(JOIN, 2 * patience_minutes))
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
            name = _round(store, rank, world, timeout)
        except dist.DistError as problem:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            missed = f"process 0 at {where}" if rank else f"the other processes at {where}"
            raise UserError(
                f"process {rank} of {world} did not meet {missed} within {timeout} ({type(problem).__name__}); "
                "start all of them, and look at what they said"
            ) from problem
        own = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        watch.CURRENT = Watch(dist.PrefixStore(f"{name}/watch", own), rank, world, 60 * patience_minutes)
        if not _agent_holds_store():
            watch.CURRENT.names[0] = own.get(f"{name}/watch/name/0").decode()  # later it may be too late to ask
        watch.CURRENT.begin()
        with exchange("joining"):
            dist.init_process_group(
                backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world, timeout=NEVER
            )
    return rank, world, device


def _round(store: dist.Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name that the processes of this start have in common, and no earlier start.

    torchrun --max-restarts keeps one store for all attempts (seen in torch 2.13), and its restart count differs between
    machines; addresses of processes that died would be met there. Everyone leaves a nonce; the first process answers
    each nonce with the name, an old one in vain, until all have said that they know it.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"inpo_fast/nonce/{rank}", own)
        store.wait([f"inpo_fast/answer/{own}"], timeout)
        name = store.get(f"inpo_fast/answer/{own}").decode()
        store.set(f"inpo_fast/{name}/{rank}", "here")
        return name
    missing = set(range(1, world))
    while missing:
        if time.monotonic() > deadline:
            raise UserError(
                f"processes {', '.join(map(str, sorted(missing)))} of {world} did not start within {timeout}"
            )
        for other in sorted(missing):
            if store.check([f"inpo_fast/nonce/{other}"]):
                store.set(f"inpo_fast/answer/{store.get(f'inpo_fast/nonce/{other}').decode()}", own)
            if store.check([f"inpo_fast/{own}/{other}"]):
                missing.discard(other)
        time.sleep(0.01)
    return own


def stop() -> None:
    """Leaves the group. Called in a `finally`: where a problem ends this process, the others are told."""
    problem, here = sys.exc_info()[1], watch.CURRENT
    if here is not None:
        watch.CURRENT = None
        here.farewell(holds_store=here.rank == 0 and not _agent_holds_store(), problem=problem)
    if dist.is_initialized() and problem is None:  # else it would wait for messages that never come
        dist.destroy_process_group()


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def barrier(what: str = "barrier") -> None:
    if dist.is_initialized():
        with exchange(what):
            dist.barrier()


@torch.no_grad()
def sum_(tensors: Sequence[torch.Tensor], what: str = "sum") -> None:
    """Adds the tensors of one dtype up over all processes, in place, in a few large messages."""
    if not dist.is_initialized():
        return
    bucket: list[torch.Tensor] = []
    with exchange(what):
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            if i + 1 == len(tensors) or sum(t.numel() for t in bucket) >= BUCKET:
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view_as(t))
                bucket = []


def gather(value: object, what: str = "gather") -> list:
    """The value of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    out = [None] * dist.get_world_size()
    with exchange(what):
        dist.all_gather_object(out, value)
    return out
