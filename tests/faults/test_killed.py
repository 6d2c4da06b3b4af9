"""kill -9 of a run, of one of its processes, a process that hangs, and being asked to stop: nothing is lost.

A run that was killed and continued, however often, ends with the bits of one that was left alone. A run of one process
is forked from one that has the imports done; what torchrun starts begins anew.
"""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults.conftest import STEPS
from tiny_runs import (
    ENVIRONMENT,
    Forked,
    finished,
    free_port,
    metric,
    run_training,
    same_bits,
    save_recipe,
    start,
    torchrun,
    train_in,
)

from inpo_fast.pocket.scenes import split_scenes
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


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """A recipe with a whole life: set-up, steps with pictures, saves, the model, an evaluation, a report."""
    folder = tmp_path_factory.mktemp("lives")
    (folder / "prompts.txt").write_text("\n".join(scene.caption for scene in split_scenes()[1][:3]))
    evaluate = {"prompts": str(folder / "prompts.txt"), "seeds": 1, "sampler_steps": 2, "batch": 1}
    train = {"micro_batch": 1, "checkpoint_every": 1, "keep_checkpoints": 2, "steps": 5, "patience_minutes": 0.2}
    save_recipe(folder, train=train, evaluate=evaluate, observe={"images_every": 2, "images": 2})
    return folder


def begin(world: Path, name: str, number: int, processes: int) -> list[Forked]:
    """All processes of one start, which goes on with what is there."""
    words = ["--config", str(world / "tiny.yaml"), "--output", str(world / name), "--resume"]
    if processes == 1:
        return [Forked(world / f"{name}-{number}", run_training, *words)]
    meeting = {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(world / f"{name}-{number}-{rank}", run_training, *words, RANK=f"{rank}", LOCAL_RANK="0", **meeting)
        for rank in range(processes)
    ]


@pytest.mark.parametrize(
    ("processes", "kills"),
    [(1, 3), pytest.param(1, 30, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.slow)],
)
def test_killed_anywhere_in_a_life(lives, processes, kills):
    """kill -9 at moments drawn over a whole life; of two processes one or both, and the other ends by itself in one
    line. What comes in the end is what a run that was left alone has."""
    draw, name = random.Random(10 * kills + processes), f"killed-{processes}-{kills}"
    running = begin(lives, f"alone-{name}", 0, processes)
    began = time.monotonic()  # the first process that is forked waits for the imports
    for process in running:
        assert process.wait() == 0, process.complaints.read_text()
    life, out, alone = time.monotonic() - began, lives / name, lives / f"alone-{name}"
    killed = number = 0
    while killed < kills:
        number += 1
        running = begin(lives, name, number, processes)
        time.sleep(draw.uniform(0.05, life))
        # before they have joined, one waits for the other as long as for one that is started late
        one = processes > 1 and draw.random() < 0.5 and out.exists()
        victims = [draw.choice(running)] if one else running
        before = [process.poll() for process in victims]
        for process in victims:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in running:
            assert process.wait(timeout=60) in ((-signal.SIGKILL, 0) if process in victims else (0, 2))
            said = process.complaints.read_text()
            assert "Traceback" not in said and sum("inpo_fast" in line for line in said.splitlines()) <= 1, said
        killed += before != [0] * len(victims)
        if (out / "report.html").exists():  # a life is over: what it left is compared, and the next one begins
            same_life(out, alone, lives, name, number, processes)
            shutil.rmtree(out)
    same_life(out, alone, lives, name, number, processes)


def same_life(out: Path, alone: Path, world: Path, name: str, number: int, processes: int) -> None:
    for process in begin(world, name, number + 1000, processes):
        assert process.wait() == 0, process.complaints.read_text()
    assert same_bits(out, alone, 5) and metric(out, "step") == [1, 2, 3, 4, 5]
    assert metric(out, "loss") == metric(alone, "loss")
    files = [path.relative_to(alone) for path in alone.rglob("*") if path.suffix in (".safetensors", ".png")]
    for path in (path for path in files if path.parts[0] != "checkpoints"):  # compared above
        assert (out / path).read_bytes() == (alone / path).read_bytes(), path
    assert (out / "evaluation.json").read_text() == (alone / "evaluation.json").read_text()
    assert (out / "report.html").exists() and not list(out.rglob(".tmp*")) and not (out / ".evaluation").exists()


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
