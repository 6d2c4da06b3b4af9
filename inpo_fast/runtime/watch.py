"""Which process keeps the others waiting.

All processes go through the same exchanges in the same order: sums of gradients, meetings, checkpoints. Each counts
those it has come to, and how much it has done between them (`progress`: a micro-batch, a picture, a batch of the VAE).
A thread of each leaves these numbers in the store at intervals. Where an exchange has lasted longer than the patience,
it looks at the numbers of the others, and the process ends in one line that names who is behind: a process that is
stopped (its numbers stand still), or one that computes and has done nothing within the patience. A process that
works long while the others wait is left alone as long as it makes progress; what makes none on the way (compiling,
opening a model, writing the report) has the patience.

The device is never waited for: an exchange on a GPU returns at once, so the step's one wait for the device is an
exchange too, and one that hangs there is behind.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from inpo_fast.runtime import signals
from inpo_fast.runtime.errors import Hang, UserError

HANGS = 2  # exit status
GRACE = 20.0  # the patience of a process that was asked to stop; torchrun kills after 30
FAREWELL = 5.0  # seconds that the process with the store waits for the others before it leaves
PATIENCE_KEY = "train.patience_minutes"


class PeerLeft(UserError):
    """Another process has ended, and this one cannot go on without it. `status`: to end with."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


@dataclass
class _Seen:
    """What is known of another process: its last numbers, and when each changed."""

    beat: str = ""
    beat_at: float = 0.0
    state: tuple[str, ...] = ("0", "0", "0")  # exchanges come to, exchanges done, progress
    state_at: float = 0.0


class Watch:
    """Of the main thread of this process. store: a connection of its own, as another may be blocked by who waits."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        patience: float,
        leave: Callable[[str, int], object] = signals.say_and_leave,
    ):
        """patience: seconds. leave: ends this process with a line and an exit status."""
        self.store, self.rank, self.world, self.patience, self.leave = store, rank, world, patience, leave
        self.interval = min(10.0, max(0.1, patience / 20))
        self.come = self.done = self.ticks = self._beats = 0
        self.where, self._what, self._since, self._deep = "set-up", "", 0.0, 0
        self._known: dict[int, _Seen] = {}
        self._heard, self._gone = time.monotonic(), False
        self._over = threading.Event()
        self.names = {rank: f"process {rank} ({socket.gethostname()}, pid {os.getpid()})"}
        store.set(f"name/{rank}", self.names[rank])
        self._beat()

    def begin(self) -> None:
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def enter(self, what: str) -> None:
        self._deep += 1
        if self._deep == 1:
            self._what, self._since = what, time.monotonic()
            self.come += 1

    def leave_exchange(self) -> None:
        self._deep -= 1
        if self._deep == 0:
            self.done += 1

    @property
    def _waits(self) -> bool:
        return self.come > self.done

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Leaves this process's numbers in the store, reads those of the others. A store whose process is stopped
        answers nothing, so this thread decides nothing."""
        beaten = looked = 0.0
        while not self._over.wait(min(0.5, self.interval)):
            try:
                now = time.monotonic()
                if now - beaten >= self.interval:
                    self._beat()
                    beaten = now
                if self._waits and now - self._since > min(1.0, self.interval):
                    if self.store.check(["left"]):
                        self._follow()
                    if now - looked >= self.interval:
                        self._look(now)
                        looked = now
                else:
                    self._known = {}  # what was seen in another wait tells nothing of this one
                self._heard = time.monotonic()
            except RuntimeError:  # the store is gone, and with it the process that held it
                self._gone = True
                return

    def _judge(self) -> None:
        while not self._over.wait(min(0.5, self.interval)):
            now = time.monotonic()
            waiting = now - self._since if self._waits else 0.0
            if culprits := self.late(now):
                self._order(culprits)
                self.leave(self.accusation(culprits, waiting), HANGS)
            if self._gone and waiting > 2.0 and not self._over.is_set():
                asked = signals.asked()
                said = f"stopped by {asked}" if asked else f"{self.at}: {self.name(0)} has left"
                self.leave(_line(said), signals.exit_status(asked) if asked else HANGS)

    def _beat(self) -> None:
        self._beats += 1
        self.store.set(f"beat/{self.rank}", f"{self._beats} {self.come} {self.done} {self.ticks}")

    def _look(self, now: float) -> None:
        known = self._known
        for rank in range(self.world):
            if rank not in self.names and self.store.check([f"name/{rank}"]):
                self.names[rank] = self.store.get(f"name/{rank}").decode()
        there = [rank for rank in self.names if rank != self.rank and self.store.check([f"beat/{rank}"])]
        values = self.store.multi_get([f"beat/{rank}" for rank in there]) if there else []
        for rank in set(range(self.world)) - {self.rank, *there}:
            known.setdefault(rank, _Seen(beat_at=now, state_at=now))
        for rank, value in zip(there, values, strict=True):
            beat, *state = value.decode().split()
            seen = known.setdefault(rank, _Seen())
            if beat != seen.beat:
                seen.beat, seen.beat_at = beat, now
            if tuple(state) != seen.state or not seen.state_at:
                seen.state, seen.state_at = tuple(state), now

    def late(self, now: float) -> list[int]:
        """Who keeps this process waiting for longer than the patience; empty where nobody does, or nobody knows."""
        patience = self.patience if not signals.asked() else min(self.patience, GRACE)
        if not self._waits or now - self._since <= patience:
            return []
        if now - self._heard > patience / 2 + 2 * self.interval and not self._gone:
            return [0]  # it holds the store, or its machine does
        still = {r: s for r, s in list(self._known.items()) if now - s.state_at > patience - 3 * self.interval}
        stopped = [r for r, s in still.items() if now - s.beat_at > patience / 2 and int(s.state[0]) <= self.come]
        computing = [r for r, s in still.items() if int(s.state[0]) < self.come and s.state[0] == s.state[1]]
        return sorted(stopped or computing)

    @property
    def at(self) -> str:
        return f"{self.where}, {self._what}" if self._what else self.where

    def accusation(self, culprits: list[int], waited: float) -> str:
        names = ", ".join(self.name(rank) for rank in culprits)
        return _line(
            f"{self.at}: {names} did not come within {waited:.0f} s of process {self.rank} "
            f"({PATIENCE_KEY}={self.patience / 60:g})",
            f"look at that machine, {_again()}",
        )

    def name(self, rank: int) -> str:
        return self.names.get(rank, f"process {rank}")

    def _order(self, away: list[int]) -> None:
        """The first of those that are left speaks at once; the others give torchrun time to end them."""
        if self.rank != min(set(range(self.world)) - set(away)):
            time.sleep(2.0)

    # ---- leaving -----------------------------------------------------------------------------------------------------

    def farewell(self, holds_store: bool, problem: BaseException | None) -> None:
        """This process needs the others no more. They do not wait for it where a problem ends it early; the one that
        holds the store stays until all have left, FAREWELL seconds at most."""
        self._over.set()
        try:
            if problem is not None and not isinstance(problem, SystemExit):  # SystemExit: all of them end
                by = getattr(problem, "by", None)
                status = signals.exit_status(by) if by else getattr(problem, "status", HANGS)
                said = f"stopped by {by}" if by else " ".join(str(problem).split())[:300] or type(problem).__name__
                if not self.store.check(["left"]):
                    self.store.set("left", f"{self.rank} {status} {said}")
            self.store.set(f"bye/{self.rank}", "1")
            if holds_store:
                others = [f"bye/{rank}" for rank in range(self.world) if rank != self.rank]
                deadline = time.monotonic() + FAREWELL
                while not self.store.check(others) and time.monotonic() < deadline:
                    time.sleep(0.02)
        except RuntimeError:  # it is gone already
            pass

    def _follow(self) -> None:
        """Ends this process, which waits, as another one that has left with a problem."""
        rank, status, said = self.who_left()
        if rank == self.rank:
            return
        self._over.set()
        self.store.set(f"bye/{self.rank}", "1")
        self._order([rank])
        self.leave(f"{_program()}: {said}", status)

    def who_left(self) -> tuple[int, int, str]:
        """Of the process that left first: its number, what to end with, and what to say of it."""
        rank, status, said = self.store.get("left").decode().split(" ", 2)
        who = self.store.get(f"name/{rank}").decode()
        text = f"{said} to {who}; {_again()}" if said.startswith("stopped by ") else f"{who} has left: {said}"
        return int(rank), int(status), text


def _program() -> str:
    return signals.CURRENT.program if signals.CURRENT else "inpo_fast.train"


def _line(text: str, more: str | None = None) -> str:
    return f"{_program()}: {text}; {_again() if more is None else more}"


def _again() -> str:
    return signals.CURRENT.again if signals.CURRENT else "continue with --resume"


CURRENT: Watch | None = None


@contextmanager
def exchange(what: str) -> Iterator[None]:
    """What is done inside needs all processes. Where one of them has ended, PeerLeft instead of the library's error."""
    here = CURRENT
    if here is None:
        yield
        return
    here.enter(what)
    try:
        yield
    except (torch.OutOfMemoryError, Hang):
        raise
    except RuntimeError as problem:
        raise _peer_left(here, problem) from problem
    finally:
        here.leave_exchange()


def _peer_left(here: Watch, problem: RuntimeError) -> Exception:
    """A connection that broke: who it was. The problem itself where it is another one."""
    text = " ".join(str(problem).split())
    broken = ("onnection", "ocket", "peer", "recvValue", "store", "imed out", "roken pipe")
    if isinstance(problem, UserError) or not (isinstance(problem, dist.DistError) or any(x in text for x in broken)):
        return problem
    asked = signals.asked()
    deadline = time.monotonic() + 2.0
    try:
        while not here.store.check(["left"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if here.store.check(["left"]):
            _, status, text = here.who_left()
            return PeerLeft(text, status)
    except RuntimeError:
        pass
    status = signals.exit_status(asked) if asked else HANGS
    return PeerLeft(f"{here.at}: another process has ended ({text[:120]}); {_again()}", status)


def progress() -> None:
    """A piece of work is done, on which the others may be waiting."""
    if CURRENT is not None:
        CURRENT.ticks += 1


def at(where: str) -> None:
    """What the exchanges from here on belong to, for the line that names who is behind."""
    if CURRENT is not None:
        CURRENT.where = where
