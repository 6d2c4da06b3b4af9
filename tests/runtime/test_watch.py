"""Who keeps the others waiting, by the numbers that processes leave in a store: watches of three, in one process."""

import os
import socket
import time

import pytest
import torch.distributed as dist

from inpo_fast.runtime import watch
from inpo_fast.runtime.watch import PeerLeft, Watch, exchange, progress

PATIENCE = 0.5
HERE = f"{socket.gethostname()}, pid {os.getpid()})"


@pytest.fixture
def watches(monkeypatch):
    """Three processes; what each would end with is in `said`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out = []
    for rank in range(3):
        own = dist.PrefixStore("watch", dist.TCPStore("127.0.0.1", store.port, is_master=False))
        one = Watch(own, rank, 3, PATIENCE, leave=lambda text, status, rank=rank: said.append((rank, text, status)))
        one.interval = 0.05
        out.append(one)
    said: list[tuple[int, str, int]] = []
    for one in out:
        one.said = said
    yield out
    for one in out:
        one._over.set()
    del store


def wait_until(happened, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happened()


def accused(watches, waiting: list[int], beating: list[int]) -> str:
    """Some processes wait in an exchange, some have threads that still run; what the first that waits says."""
    for rank in waiting:
        watches[rank].enter("gradients")
        watches[rank]._beat()
    for rank in beating:
        watches[rank].begin()
    first = watches[waiting[0]]
    assert wait_until(lambda: any(rank == waiting[0] for rank, _, _ in first.said))
    return next(text for rank, text, _ in first.said if rank == waiting[0])


@pytest.mark.parametrize(
    ("waiting", "beating", "culprits"),
    [
        ([0, 1], [0, 1], [2]),  # stopped before it came
        ([0, 1, 2], [0, 1], [2]),  # stopped while it was there
        ([0, 1], [0, 1, 2], [2]),  # computes, and does nothing
        ([0], [0], [1, 2]),
        ([1, 2], [1, 2], [0]),
    ],
)
def test_who_does_not_come_is_named(watches, waiting, beating, culprits):
    said = accused(watches, waiting, beating)
    assert all((f"process {rank} ({HERE}" in said) == (rank in culprits) for rank in range(3)), said
    assert "set-up, gradients: process " in said and "(train.patience_minutes=0.00833333); look at that" in said


def test_who_waits_for_somebody_else_is_not_accused(watches):
    """The first is a step ahead, the second waits in the step before for the third, which is stopped."""
    watches[0].enter("gradients")
    watches[0].leave_exchange()
    watches[1].enter("gradients")
    said = accused(watches, [0], [0, 1])
    assert f"process 2 ({HERE}" in said and f"process 1 ({HERE}" not in said


def test_who_makes_progress_is_left_alone(watches, monkeypatch):
    """For many times the patience; when it stands still, it is named."""
    watches[0].enter("pictures")
    watches[0].begin()
    watches[2].begin()
    watches[1].enter("pictures")
    watches[1].begin()
    monkeypatch.setattr(watch, "CURRENT", watches[2])
    end = time.monotonic() + 5 * PATIENCE
    while time.monotonic() < end:
        progress()
        time.sleep(0.05)
    assert watches[0].said == []
    assert wait_until(lambda: watches[0].said) and "process 2 (" in watches[0].said[0][1]


def test_a_store_whose_process_is_gone(watches):
    """Whoever waits then ends too, and says who it was."""
    watches[1].enter("gradients")
    watches[1].store = type("Gone", (), {"set": _gone, "check": _gone})()
    watches[1].begin()
    assert wait_until(lambda: watches[1].said)
    assert watches[1].said[0][1].startswith("inpo_fast.train: set-up, gradients: process 0 has left; continue with")


def _gone(*_):
    raise dist.DistNetworkError("Connection reset by peer")


def test_a_broken_connection_is_told_as_what_it_is(watches, monkeypatch):
    """By the reason that the other left behind; other errors stay as they are."""
    watches[1].farewell(holds_store=False, problem=ValueError("a disk is full"))
    monkeypatch.setattr(watch, "CURRENT", watches[0])
    with (
        pytest.raises(PeerLeft, match=r"^process 1 \(\S+, pid \d+\) has left: a disk is full$") as told,
        exchange("sum"),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9")
    assert told.value.status == 2
    with pytest.raises(RuntimeError, match="shapes differ"), exchange("gradients"):
        raise RuntimeError("shapes differ")


def test_who_holds_the_store_leaves_last(watches, monkeypatch):
    monkeypatch.setattr(watch, "FAREWELL", 0.5)
    begun = time.monotonic()
    watches[0].farewell(holds_store=True, problem=None)
    assert 0.4 < time.monotonic() - begun < 3
    for rank in (1, 2):
        watches[rank].farewell(holds_store=False, problem=None)
    begun = time.monotonic()
    watches[0].farewell(holds_store=True, problem=None)
    assert time.monotonic() - begun < 0.3
