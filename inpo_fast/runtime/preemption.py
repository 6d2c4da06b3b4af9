"""Being asked to stop, and all processes agreeing on it.

SIGTERM and SIGUSR1 (what clusters send before they take the machine away) let the running micro-batch finish; then all
processes leave the step together, which has changed nothing yet, a checkpoint of the steps done is saved, and the
program ends with EXIT_CODE. Once a step, before they exchange gradients, the processes meet on the host: that is where
one that was asked takes the others along, and where one that hangs is noticed and named.
"""

import os
import signal
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import Hang

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 20  # seconds that a process which was asked to stop waits for the others; torchrun kills after 30


class Preempted(Exception):
    """This process or another was asked to stop; `by` says which and how."""

    def __init__(self, by: str):
        super().__init__(by)
        self.by = by


class Preemption:
    """A context: while it is entered, the signals are answered by stopping between two batches."""

    def __init__(self, patience: timedelta = timedelta(minutes=30)):
        """patience: how long the first process at a meeting waits for the last one."""
        self.patience = patience.total_seconds()
        self.rank, self.world = distributed.rank_and_world()
        self.asked: str | None = None
        self._meetings = 0
        self._before: dict[int, object] = {}
        self._store = None
        if self.world > 1 and dist.is_initialized():
            self._store = dist.PrefixStore("inpo_fast/meetings", _get_default_store())
            self._store.set(f"name/{self.rank}", f"process {self.rank} ({socket.gethostname()}, pid {os.getpid()})")

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._answer) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _answer(self, number: int, _frame) -> None:
        self.asked = signal.Signals(number).name

    def check(self) -> None:
        """Between two batches: Preempted if this process was asked to stop."""
        if self.asked:
            raise Preempted(self.asked)

    def agree(self, step: int, stopped: str | None = None) -> None:
        """At the end of a step (its number is for the message): Preempted on all processes if any of them was asked to
        stop (`stopped`: this one was, by that). Hang as of `meet`."""
        if by := self.meet(step, stopped):
            raise Preempted(by)

    def meet(self, step: int, stopped: str | None = None) -> str:
        """All processes come here, before they exchange anything. What one of them was asked by, else "".

        Hang that names the processes that did not come within the patience.
        """
        if self._store is None:
            return stopped or ""
        self._meetings += 1
        here = f"{self._meetings}"
        self._store.set(f"{here}/came/{self.rank}", "1")
        if stopped:
            self._store.set(f"{here}/by", f"{stopped} to process {self.rank}")
        if self._store.add(f"{here}/count", 1) == self.world:
            by = self._store.get(f"{here}/by") if self._store.check([f"{here}/by"]) else b""
            self._store.set(f"{here}/all", by)
        self._wait_for(here, step)
        return self._store.get(f"{here}/all").decode()

    def _wait_for(self, here: str, step: int) -> None:
        begun, asked_at, pause = time.monotonic(), None, 0.001
        while not self._store.check([f"{here}/all"]):
            now = time.monotonic()
            if self.asked and asked_at is None:
                asked_at = now
            if now - begun > self.patience or (asked_at and now - asked_at > GRACE):
                away = [rank for rank in range(self.world) if not self._store.check([f"{here}/came/{rank}"])]
                names = ", ".join(self._store.get(f"name/{rank}").decode() for rank in away)
                raise Hang(
                    f"step {step}: {names} did not finish within {now - begun:.0f} s of process {self.rank} "
                    f"(train.patience_minutes={self.patience / 60:g}); look at that machine, continue with --resume"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
