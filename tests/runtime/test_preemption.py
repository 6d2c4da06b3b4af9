"""Processes that meet once a step: threads with a store each stand in for them. What one was asked reaches all."""

import os
import signal
import threading

import pytest
import torch.distributed as dist

from inpo_fast.runtime import signals
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.runtime.signals import SIGNALS, Signals, Stopped, exit_status


@pytest.fixture
def processes():
    """Three processes of one start."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = []
    for rank in range(3):
        one = Preemption()
        one.rank, one.world = rank, 3
        one._store = dist.PrefixStore("meetings", dist.TCPStore("127.0.0.1", store.port, is_master=False))
        out.append(one)
    yield out
    del store


def together(processes, stopped) -> list:
    """What each says of the meeting: the exception, or None."""
    results = [None] * len(processes)

    def go(number, process):
        try:
            process.agree(7, stopped.get(number))
        except Preempted as problem:
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


def test_signals_are_answered_inside_only():
    before = [signal.getsignal(number) for number in SIGNALS]
    alone = Preemption()
    with alone:
        alone.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1"):
            alone.check()
        with pytest.raises(Preempted):
            alone.agree(1, "SIGTERM")
        raised = alone._signals
        raised.asked = None  # as if nobody had
    assert [signal.getsignal(number) for number in SIGNALS] == before and signals.CURRENT is None
    alone.agree(1)


def test_what_nobody_answered_is_raised_when_the_loop_is_left():
    with Signals("here", "again"):
        with pytest.raises(Stopped) as told, Preemption():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked() == "SIGTERM"
        assert told.value.by == "SIGTERM" and exit_status(told.value.by) == 75
        with Preemption():  # told once
            pass


def test_outside_the_loop_it_is_raised_at_once_and_only_once():
    with Signals("here", "again") as here:
        with pytest.raises(Stopped, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # while the way out is cleaned up
        assert here.asked == "SIGINT" and exit_status("SIGINT to process 1") == 130
