"""Processes that meet once a step: threads with a store each stand in for them. What one was asked reaches all."""

import os
import signal
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from inpo_fast.runtime import preemption
from inpo_fast.runtime.errors import Hang
from inpo_fast.runtime.preemption import Preempted, Preemption


@pytest.fixture
def processes():
    """Three processes of one start."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = []
    for rank in range(3):
        one = Preemption(timedelta(seconds=1))
        one.rank, one.world = rank, 3
        one._store = dist.PrefixStore("meetings", dist.TCPStore("127.0.0.1", store.port, is_master=False))
        one._store.set(f"name/{rank}", f"process {rank} (machine, pid {rank})")
        out.append(one)
    yield out
    del store


def together(processes, stopped) -> list:
    """What each says of the meeting: the exception, or None."""
    results = [None] * len(processes)

    def go(number, process):
        try:
            process.agree(7, stopped.get(number))
        except (Preempted, Hang) as problem:
            results[number] = problem

    threads = [threading.Thread(target=go, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_go_on_until_one_was_asked(processes):
    for _ in range(3):
        assert together(processes, {}) == [None] * 3
    results = together(processes, {1: "SIGUSR1"})
    assert [str(r) for r in results] == ["SIGUSR1 to process 1"] * 3
    assert all(isinstance(r, Preempted) for r in results)


def test_two_are_missing_and_are_named(processes):
    (result,) = together(processes[1:2], {})
    assert isinstance(result, Hang)
    assert (
        "step 7: process 0 (machine, pid 0), process 2 (machine, pid 2) did not finish within 1 s of process 1"
        in str(result)
    )


def test_who_was_asked_to_stop_does_not_wait_long_for_the_dead(processes, monkeypatch):
    monkeypatch.setattr(preemption, "GRACE", 0.2)
    processes[0].patience = 1000
    processes[0].asked = "SIGTERM"
    (result,) = together(processes[:1], {0: "SIGTERM"})
    assert isinstance(result, Hang)


def test_signals_are_answered_inside_only():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    alone = Preemption()
    with alone:
        alone.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1"):
            alone.check()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    with pytest.raises(Preempted):
        alone.agree(1, "SIGTERM")
    alone.agree(1)
