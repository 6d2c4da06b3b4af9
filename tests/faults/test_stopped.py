"""A process that is stopped (SIGSTOP) anywhere in a run: the others end in one line that names it, within the patience.

Two processes of one start, forked with the imports done; one of them stops itself at a moment of its life.
"""

import os
import re
import signal
import socket
import sys
import time

import pytest
from tiny_runs import Forked, free_port, run_training, save_recipe

from inpo_fast.pocket.scenes import split_scenes

PATIENCE = 2.4  # seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("\n".join(scene.caption for scene in split_scenes()[1][:2]))
    save_recipe(
        folder,
        train={"micro_batch": 1, "steps": 3, "checkpoint_every": 2, "patience_minutes": PATIENCE / 60},
        evaluate={"prompts": str(folder / "prompts.txt"), "seeds": 1, "sampler_steps": 2, "batch": 2},
        observe={"images_every": 2, "images": 2},
    )
    return folder


def moments() -> dict:
    """Of a run's life: what is called then, and the how manyeth call of it."""
    from inpo_fast.comparison import drawing
    from inpo_fast.models.master_weights import MasterWeights
    from inpo_fast.runtime.preemption import Preemption
    from inpo_fast.training import checkpoint, loop, set_up, step, validation
    from inpo_fast.training.metrics import MetricAccumulator

    return {
        "opening the model": (set_up, "_open_models", 1),
        "set-up, before they meet": (set_up, "_open_checkpoints", 1),
        "before the meeting": (Preemption, "meet", 2),
        "between meeting and sums": (MetricAccumulator, "reduce", 2),
        "between two sums": (MasterWeights, "reduce", 2),
        "backward": (step, "add_metrics", 3),
        "after the sums": (loop, "_update", 2),
        "a checkpoint, before it": (checkpoint, "_collect", 1),
        "a checkpoint, while it is written": (checkpoint._Writer, "write_data", 1),
        "the last checkpoint, while it is written": (checkpoint._Writer, "write_data", 2),
        "pictures of a step": (validation, "draw", 1),
        "the model": (loop, "detach_policy", 1),
        "evaluation": (drawing, "_decoding", 4),
    }


def run_and_stop(moment: str, *words: str) -> None:
    """The trainer's command; the process stops itself at the moment."""
    if moment:
        owner, name, number = moments()[moment]
        plain, calls = getattr(owner, name), []

        def stopping(*args, **how):
            calls.append(name)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGSTOP)
            return plain(*args, **how)

        setattr(owner, name, stopping)
    run_training(*words)


def stop_one(world, moment: str, victim: int) -> tuple[int, str, int, float]:
    """Exit status and complaints of the other, the pid of who was stopped, seconds until the other had ended."""
    name = re.sub(r"\W+", "-", f"{moment}-{victim}")
    words = ["--config", str(world / "tiny.yaml"), "--output", str(world / name)]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    processes = [
        Forked(world / f"{name}-{r}", run_and_stop, moment if r == victim else "", *words, RANK=f"{r}", **meeting)
        for r in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while state(processes[victim].pid) != "T":
            assert processes[victim].poll() is None, processes[victim].complaints.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        begun = time.monotonic()
        status = processes[1 - victim].wait(timeout=60)
        return status, processes[1 - victim].complaints.read_text(), processes[victim].pid, time.monotonic() - begun
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


QUICK = {"between meeting and sums": (1,)}
ALL = [
    pytest.param(moment, victim, marks=() if victim in QUICK.get(moment, ()) else pytest.mark.slow)
    for moment in moments()
    for victim in (1, 0)
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("moment", "victim"), ALL)
def test_a_stopped_process_is_named(world, moment, victim):
    """Also the first one, which holds the store: where torchrun holds it, the others can still read names."""
    status, said, pid, seconds = stop_one(world, moment, victim)
    (line,) = [x for x in said.splitlines() if "warning" not in x.lower()]
    assert re.fullmatch(
        rf"inpo_fast\.train: .*: process {victim} \(\S+, pid {pid}\) did not come within \d+ s of process "
        rf"{1 - victim} \(train\.patience_minutes=0\.04\); look at that machine, continue with --resume",
        line,
    ), said
    assert status == 2 and seconds < 3 * PATIENCE + 3


def run_and_wait(seconds: float, moves: bool, *words: str) -> None:
    """The trainer; before its second meeting this process is busy for so long, and perhaps gets somewhere."""
    from inpo_fast.runtime import watch
    from inpo_fast.runtime.preemption import Preemption

    plain, calls = Preemption.meet, []

    def waiting(self, *args):
        calls.append(1)
        end = time.monotonic() + (seconds if len(calls) == 2 else 0)
        while time.monotonic() < end:
            time.sleep(0.1)
            if moves:
                watch.progress()
        return plain(self, *args)

    Preemption.meet = waiting
    run_training(*words)


@pytest.mark.parametrize("moves", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_long_work_is_told_from_a_hang(world, moves):
    """A process that works for three times the patience is waited for as long as it gets somewhere; one that hangs,
    though its threads live, is named."""
    name = f"long-{moves}"
    words = ["--config", str(world / "tiny.yaml"), "--output", str(world / name), "--observe.images_every=0"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    first = Forked(world / f"{name}-0", run_and_stop, "", *words, RANK="0", **meeting)
    busy = Forked(world / f"{name}-1", run_and_wait, 3 * PATIENCE if moves else 600, moves, *words, RANK="1", **meeting)
    try:
        status = first.wait(timeout=90)
        said = first.complaints.read_text()
        if moves:
            assert status == busy.wait(timeout=60) == 0, said
        else:
            assert status == 2 and f"process 1 ({socket.gethostname()}, pid {busy.pid}) did not come" in said, said
    finally:
        if busy.poll() is None:
            busy.send_signal(signal.SIGKILL)
            busy.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_one_never_starts(world, rank):
    """Where torchrun is not there to say so."""
    words = ["--config", str(world / "tiny.yaml"), "--output", str(world / "alone")]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    process = Forked(world / f"alone-{rank}", run_impatiently, *words, RANK=f"{rank}", **meeting)
    assert process.wait(timeout=60) == 2
    (line,) = process.complaints.read_text().splitlines()[-1:]
    whom = "process 0" if rank else "the other processes"
    assert line.startswith(f"inpo_fast.train: process {rank} of 2 did not meet {whom} at 127.0.0.1:"), line


def run_impatiently(*words: str) -> None:
    from inpo_fast.runtime import distributed

    distributed.JOIN = 0.05
    run_training(*words)
