"""Being asked to stop while it trains, and all processes agreeing on it.

A signal (signals.py) lets the running micro-batch finish; then all processes leave the step together, which has changed
nothing yet, a checkpoint of the steps done is saved, and the program ends. Once a step, before they exchange gradients,
the processes meet on the host: that is where one that was asked takes the others along. Who does not come is named by
watch.py.
"""

import contextlib
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from inpo_fast.runtime import distributed, signals, watch
from inpo_fast.runtime.signals import Signals
from inpo_fast.runtime.watch import exchange


class Preempted(Exception):
    """This process or another was asked to stop; `by` says which and how."""

    def __init__(self, by: str):
        super().__init__(by)
        self.by = by


class Preemption:
    """A context: while it is entered, the signals are answered by stopping between two batches."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.rank_and_world()
        self._meetings = 0
        self._signals: Signals | None = None
        self._entered = contextlib.ExitStack()
        self._store = None
        if self.world > 1 and dist.is_initialized():
            self._store = dist.PrefixStore("inpo_fast/meetings", _get_default_store())

    def __enter__(self) -> "Preemption":
        self._signals = signals.CURRENT
        if self._signals is None:  # not started as a command
            self._signals = self._entered.enter_context(Signals("inpo_fast.train", "continue with --resume"))
        self._entered.enter_context(self._signals.politely())
        return self

    def __exit__(self, *problem) -> bool | None:
        return self._entered.__exit__(*problem)

    @property
    def asked(self) -> str | None:
        """By which signal this process was asked to stop."""
        return None if self._signals is None else self._signals.asked

    def check(self) -> None:
        """Between two batches: Preempted if this process was asked to stop."""
        watch.progress()
        if self.asked:
            raise Preempted(self.asked)

    def agree(self, step: int, stopped: str | None = None) -> None:
        """At the end of a step (its number is for the message): Preempted on all processes if any of them was asked to
        stop (`stopped`: this one was, by that)."""
        if by := self.meet(step, stopped):
            raise Preempted(by)

    def meet(self, step: int, stopped: str | None = None) -> str:
        """All processes come here, before they exchange anything. What one of them was asked by, else ""."""
        if self._store is None:
            return stopped or ""
        watch.at(f"step {step}")
        self._meetings += 1
        here, pause = f"{self._meetings}", 0.001
        with exchange("meeting"):
            if stopped:
                self._store.set(f"{here}/by", f"{stopped} to process {self.rank}")
            if self._store.add(f"{here}/count", 1) == self.world:
                by = self._store.get(f"{here}/by") if self._store.check([f"{here}/by"]) else b""
                self._store.set(f"{here}/all", by)
            while not self._store.check([f"{here}/all"]):
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            return self._store.get(f"{here}/all").decode()
