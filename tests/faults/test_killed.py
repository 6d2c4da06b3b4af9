"""kill -9 of a run, of one of its processes, a process that hangs, and being asked to stop: nothing is lost.

A run that was killed and continued, however often, ends with the bits of one that was left alone. A run of one process
is forked from one that has the imports done; what torchrun starts begins anew.
"""

import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults.conftest import STEPS
from tiny_runs import ENVIRONMENT, Forked, finished, metric, same_bits, start, torchrun, train_in

from inpo_fast.runtime.signals import TRY_AGAIN

AGENT = ("--standalone", "--max-restarts=2")


def start_agent(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(happened, process: subprocess.Popen | Forked, seconds: float = 120) -> bool:
    """Until it happened (True) or the process has ended."""
    deadline = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def workers(agent: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    of = {}
    for pid in children:
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        if found:
            of[int(found[1])] = int(pid)
    return [of[rank] for rank in sorted(of)]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments(world, whole, kills):
    """Every third time while a checkpoint is being written. The long variant trains until it was killed 30 times."""
    steps = STEPS if kills == 3 else 60
    expected = whole if kills == 3 else train_in(world, f"alone-{kills}", f"--train.steps={steps}")
    draw, name = random.Random(kills), f"killed-{kills}"
    words = (name, f"--train.steps={steps}", "--train.keep_checkpoints=2", "--resume")
    folder, killed, saving = world / name, 0, 0
    while killed < kills:
        process = start(world, *words)
        before = steps_done(folder)
        assert wait_for(lambda before=before: steps_done(folder) != before, process), process.complaints.read_text()
        if killed % 3 == 2:
            there = wait_for(lambda: list(folder.glob("checkpoints/.tmp-*")), process)
            saving += there
        else:
            time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
        if (folder / "model").exists():
            break
    assert killed >= 3 and saving >= 1
    train_in(world, *words)
    assert same_bits(folder, expected, steps)
    assert metric(folder, "step") == list(range(1, steps + 1))
    assert metric(folder, "loss") == metric(expected, "loss")
    assert {p.name for p in folder.glob("checkpoints/*")} == {f"step-{s:04d}" for s in (steps - 1, steps)}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed_and_torchrun_continues_by_itself(world, rank):
    options = (f"--train.steps={STEPS}", "--train.keep_checkpoints=9")
    expected = finished(torchrun(2, world, "two", *options, "--overwrite"))
    assert expected.returncode == 0, expected.stderr
    folder = world / f"one-killed-{rank}"
    agent = start_agent(torchrun(2, world, folder.name, *options, options=AGENT))
    assert wait_for(lambda: (folder / "checkpoints" / "step-0002").exists(), agent)
    victim = workers(agent)[rank]
    subprocess.run(["kill", "-9", str(victim)], check=True)
    _, problems = agent.communicate(timeout=240)
    assert agent.returncode == 0, problems
    assert same_bits(folder, world / "two", STEPS)
    assert metric(folder, "step") == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_process_that_hangs_is_named(world):
    folder = world / "hung"
    agent = start_agent(
        torchrun(
            2, world, "hung", "--train.steps=500", "--train.patience_minutes=0.05", "--train.checkpoint_every=1000"
        )
    )
    assert wait_for(lambda: steps_done(folder) >= 1, agent)
    hung = workers(agent)[1]
    subprocess.run(["kill", "-STOP", str(hung)], check=True)
    try:
        for line in agent.stderr:
            if "did not finish" in line:
                break
        else:
            raise AssertionError("nobody was named")
    finally:
        subprocess.run(["kill", "-9", str(hung)], check=True)
    assert re.search(rf"step \d+: process 1 \(\S+, pid {hung}\) did not finish within \d+ s of process 0", line), line
    assert "--resume" in line
    agent.communicate(timeout=60)
    assert agent.returncode != 0


def test_asked_to_stop_it_saves_and_says_so(world, whole):
    folder = world / "preempted"
    process = start(world, "preempted", f"--train.steps={STEPS}", "--train.checkpoint_every=100")
    assert wait_for(lambda: steps_done(folder) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == TRY_AGAIN
    assert (
        process.complaints.read_text().strip().splitlines()[-1]
        == "inpo_fast.train: stopped by SIGTERM; continue with --resume"
    )
    done = steps_done(folder)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{done:04d}"]
    train_in(world, "preempted", f"--train.steps={STEPS}", "--train.checkpoint_every=100", "--resume")
    assert same_bits(folder, whole, STEPS)


@pytest.mark.slow
def test_one_of_two_processes_is_asked_and_both_leave(world):
    """SIGUSR1 to the second process alone; the cluster's next start continues."""
    folder = world / "preempted-2"
    agent = start_agent(torchrun(2, world, folder.name, "--train.steps=500", "--train.checkpoint_every=1000"))
    assert wait_for(lambda: steps_done(folder) >= 2, agent)
    subprocess.run(["kill", "-USR1", str(workers(agent)[1])], check=True)
    _, problems = agent.communicate(timeout=120)
    assert "stopped by SIGUSR1 to process 1; continue with --resume" in problems
    assert f"exitcode  : {TRY_AGAIN}" in problems
    (saved,) = (folder / "checkpoints").iterdir()
    assert saved.name == f"step-{steps_done(folder):04d}"
