"""Ctrl-C and SIGTERM in every command, at every stage of a run, and once more: one line, nothing half written.

Commands run in processes of their own, forked with the imports done; each sends itself the signal at a moment of its
work. `test_at_any_moment` (slow) starts real ones, whose imports can be hit too, and does so at random moments.
"""

import html
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ENVIRONMENT, Forked, finished, free_port, run_command, run_training, save_recipe, train_in

from inpo_fast.pocket.scenes import split_scenes
from inpo_fast.report.results import verdict
from inpo_fast.runtime.signals import INTERRUPTED, TRY_AGAIN

CAPTIONS = [scene.caption for scene in split_scenes()[1][:3]]
STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TRY_AGAIN, signal.SIGUSR1: TRY_AGAIN}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    save_recipe(
        folder,
        train={"micro_batch": 1, "steps": 3, "checkpoint_every": 2},
        evaluate={"prompts": str(folder / "prompts.txt"), "seeds": 1, "sampler_steps": 2, "batch": 2},
        observe={"images_every": 1, "images": 2},
    )
    return folder


@pytest.fixture(scope="module")
def whole(world):
    return train_in(world, "whole")


def signalled(number: int, place: str, count: int, run, *words: str) -> None:
    """run(*words); at the count-th call of `place`, module:name or module:class.name, this process gets the signal."""
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for each in outer:
        owner = getattr(owner, each)
    plain, calls = getattr(owner, name), []

    def hit(*args, **how):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return plain(*args, **how)

    setattr(owner, name, hit)
    run(*words)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def left_behind(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".tmp*")]


COMMANDS = {
    "evaluate": ("inpo_fast.comparison.drawing:_decoding", 2, "the same command goes on"),
    "evaluate-several": ("inpo_fast.comparison.drawing:_decoding", 2, "the same command goes on"),
    "sample": ("inpo_fast.comparison.drawing:_decoding", 2, "start it again"),
    "cache": ("inpo_fast.caches.precompute:encode_views", 1, "the same command goes on"),
    "relabel": ("inpo_fast.judges.relabelling:score_part", 1, "the same command goes on"),
    "validate": ("inpo_fast.data.examine:_read", 3, "start it again"),
    "export": ("inpo_fast.handover.single_file_export:convert", 1, "start it again"),
    "profile": ("inpo_fast.cost.profiling:train_step", 2, "start it again"),
    "model_card": ("inpo_fast.handover.model_card:card", 1, "start it again"),
    "vote": ("inpo_fast.comparison.votes:cases_of_source", 1, "the same command goes on"),
}


def words_of(command: str, world: Path, out: Path, run: Path) -> list[str]:
    base, source, config = f"--base={world / 'model'}", f"--source={world / 'pairs.parquet'}", f"{world / 'tiny.yaml'}"
    ours, sheet = f"--model={run / 'model'}", f"--output={out / 'sheet.png'}"
    return {
        "evaluate": [ours, base, f"--output={out}", "--config", config],
        "evaluate-several": [f"--model=a={run / 'model'}", ours, base, f"--output={out}", "--config", config],
        "sample": [ours, base, sheet, "--batch=1", "--steps=2", f"--prompt={CAPTIONS[0]}"],
        "cache": ["--config", config, f"--data.cache={out}"],
        "relabel": [source, "--judge=pocket-rules", f"--output={out / 'labels.parquet'}"],
        "validate": [source, "--resolution=32", f"--sheet={out / 'sheet.png'}"],
        "export": [ours, f"--output={out / 'one.safetensors'}"],
        "profile": ["--config", config, f"--json={out / 'profile.json'}", "--windows=1"],
        "model_card": [str(run)],
        "vote": [source, f"--output={out / 'votes.parquet'}", "--port=0"],
    }[command]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_one_line(world, whole, tmp_path, command, number):
    place, count, again = COMMANDS[command]
    module = f"inpo_fast.{command.partition('-')[0]}"
    out = tmp_path / "out"
    out.mkdir()
    words = words_of(command, world, out, whole)
    process = Forked(tmp_path / "log", signalled, number, place, count, run_command, module, *words)
    assert process.wait() == STATUS[number], process.complaints.read_text()
    said = process.complaints.read_text()
    name = signal.Signals(number).name
    assert re.fullmatch(rf"(python -m )?{module}: stopped by {name}; {again}\n", said), said
    assert left_behind(out) == left_behind(whole) == []


def test_a_finished_run_that_is_resumed_without_an_evaluation_keeps_the_one_it_has(world, whole, tmp_path):
    """Of this very model: its report with the pictures, or where that is gone one with its verdict."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    names = ("evaluation.json", "samples.png", "report.html")
    before = {name: (run / name).read_bytes() for name in names}
    words = (str(run), "--resume", "--evaluate.prompts=None", f"--observe.prompts={world / 'prompts.txt'}")
    train_in(world, *words)
    assert {name: (run / name).read_bytes() for name in names} == before
    (run / "report.html").unlink()
    train_in(world, *words)
    report = (run / "report.html").read_text()
    assert verdict(json.loads(before["evaluation.json"])) in html.unescape(report) and "Not evaluated" not in report
    train_in(world, *words, "--train.steps=4")
    assert "Not evaluated" in (run / "report.html").read_text() and not (run / "samples.png").exists()


STAGES = {
    "pictures of a step": ("inpo_fast.training.validation:Validation.draw_strip", 2),
    "set-up": ("inpo_fast.training.set_up:_open_models", 1),
    "a step": ("inpo_fast.training.step:add_metrics", 6),
    "while it saves": ("inpo_fast.training.checkpoint:_collect", 1),
    "the last save": ("inpo_fast.training.checkpoint:_collect", 2),
    "the model": ("inpo_fast.training.run_folder:write_folder", 1),
    "evaluation": ("inpo_fast.comparison.drawing:_decoding", 7),
    "judging": ("inpo_fast.judges.cache:ScoreCache.score", 2),
    "report": ("inpo_fast.report.write:page", 1),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_stopped_and_continued(world, whole, stage):
    """At any stage of its life: with SIGTERM exit status 75, with Ctrl-C 130; continued, it ends as one that was left
    alone, and makes nothing twice."""
    number = signal.SIGINT if stage in ("a step", "evaluation", "report") else signal.SIGTERM
    out = world / f"stopped-{stage.replace(' ', '-')}"
    words = ["--config", str(world / "tiny.yaml"), "--output", str(out)]
    process = Forked(out, signalled, number, *STAGES[stage], run_training, *words)
    assert process.wait() == STATUS[number], process.complaints.read_text()
    *noted, line = process.complaints.read_text().strip().splitlines()
    assert line == f"inpo_fast.train: stopped by {signal.Signals(number).name}; continue with --resume"
    assert [x for x in noted if x] == ["stopping after this step, with a checkpoint; Ctrl-C again leaves at once"] * (
        stage == "a step"
    )
    assert left_behind(out) == []
    kept = {path: path.stat().st_mtime_ns for path in out.rglob(".evaluation/pictures/*/*.png")}
    if stage == "pictures of a step":
        assert [path.name for path in out.glob("images/*")] == ["000001.png"]
    assert len(kept) == {"evaluation": 5, "judging": 9, "report": 9}.get(stage, 0)  # drawn two at a time, of three
    seen = Forked(out, watching_pictures, *words, "--resume")
    assert seen.wait() == 0, seen.complaints.read_text()
    assert int(seen.said.read_text().split("drawn:")[1].split()[0]) == 9 - len(kept)
    for name in (
        "images/000001.png",
        "images/000002.png",
        "images/000003.png",
        "evaluation.json",
        "model/unet/diffusion_pytorch_model.safetensors",
    ):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / ".evaluation").exists()


def watching_pictures(*words: str) -> None:
    """The trainer; at its end says how many pictures it drew."""
    from inpo_fast.comparison import run_evaluation

    plain, drawn = run_evaluation.draw, []

    def counting(base, prompts, *args, **how):
        drawn.extend(prompts)
        return plain(base, prompts, *args, **how)

    run_evaluation.draw = counting
    run_training(*words)
    print("drawn:", len(drawn))


def test_a_second_ctrl_c_leaves_at_once(world):
    """While the first one waits for a micro-batch that does not end, in C code that hears of no handler."""
    out = world / "twice"
    words = ["--config", str(world / "tiny.yaml"), "--output", str(out)]
    process = Forked(out, stuck, *words)
    try:
        while not (out / "stuck").exists():
            assert process.poll() is None, process.complaints.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == INTERRUPTED
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.complaints.read_text().strip().splitlines() == [
        "stopping after this step, with a checkpoint; Ctrl-C again leaves at once",
        "inpo_fast.train: left at once; continue with --resume",
    ]


def stuck(*words: str) -> None:
    """The trainer; its second step waits in C, with handlers that Python cannot run."""
    from inpo_fast.training import step

    plain, calls = step.add_metrics, []

    def waiting(*args):
        calls.append(1)
        if len(calls) == 5:
            Path(words[-1], "stuck").touch()
            signal.pthread_sigmask(signal.SIG_BLOCK, [])
            lock_forever()
        return plain(*args)

    step.add_metrics = waiting
    run_training(*words)


def lock_forever() -> None:
    import ctypes

    ctypes.CDLL(None).pause()  # comes back after a signal, and waits again
    lock_forever()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victims", [(0, 1), (0,), (1,)])
def test_two_processes_leave_together(world, victims, rounds):
    """The first one holds the store and leaves last; who was not asked is taken along."""
    draw = random.Random(rounds)
    for number in range(rounds):
        out = world / f"two-{len(victims)}-{victims[0]}-{rounds}-{number}"
        words = ["--config", str(world / "tiny.yaml"), "--output", str(out), "--train.steps=500"]
        words += ["--train.checkpoint_every=100"]
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
        both = [Forked(world / f"{out.name}-{r}", run_training, *words, RANK=f"{r}", **meeting) for r in range(2)]
        while not steps_done(out):
            assert both[0].poll() is both[1].poll() is None, [p.complaints.read_text() for p in both]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        for victim in victims:
            both[victim].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=60) for process in both] == [TRY_AGAIN, TRY_AGAIN], [
            p.complaints.read_text() for p in both
        ]
        line = both[0].complaints.read_text()
        assert re.fullmatch(r"inpo_fast\.train: stopped by SIGTERM to process [01]; continue with --resume\n", line)
        assert both[1].complaints.read_text() == ""


@pytest.mark.parametrize("stage", ["set-up", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_one_of_two_is_stopped_where_nothing_waits_to_be_saved(world, stage):
    out = world / f"one-of-two-{stage}"
    words = ["--config", str(world / "tiny.yaml"), "--output", str(out)]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    place = STAGES[stage] if stage == "set-up" else (STAGES[stage][0], 5)
    other = Forked(world / f"{out.name}-0", run_training, *words, RANK="0", **meeting)
    one = Forked(world / f"{out.name}-1", signalled, signal.SIGTERM, *place, run_training, *words, RANK="1", **meeting)
    assert [one.wait(timeout=60), other.wait(timeout=60)] == [TRY_AGAIN, TRY_AGAIN], other.complaints.read_text()
    assert one.complaints.read_text() == ""
    assert re.fullmatch(
        r"inpo_fast\.train: stopped by SIGTERM to process 1 \(\S+, pid \d+\); continue with --resume\n",
        other.complaints.read_text(),
    )


@pytest.mark.slow
def test_at_any_moment(world):
    """A real start, imports and all. Before Python has read our first lines its own answer to a signal counts: that is
    the first tenth of a second."""
    draw, out = random.Random(0), world / "any-moment"
    line = [sys.executable, "-m", "inpo_fast.train", "--config", str(world / "tiny.yaml"), "--output", str(out)]
    for _ in range(12):
        process = subprocess.Popen([*line, "--resume"], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
        time.sleep(draw.uniform(0.3, 12))
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done
            break
        assert process.returncode == STATUS[number], said
        assert said.strip().splitlines()[-1].endswith("; continue with --resume") and "Traceback" not in said, said
        assert not out.exists() or left_behind(out) == []
    assert finished([*line, "--resume"]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_under_torchrun(world, presses):
    """To the terminal's whole process group; torchrun hands it on, whose own traceback is not ours."""
    out = world / f"torchrun-{presses}"
    words = ["--config", str(world / "tiny.yaml"), "--output", str(out), "--train.steps=5000"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    agent = subprocess.Popen(
        [*line, "inpo_fast.train", *words], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    while not steps_done(out):
        assert agent.poll() is None
        time.sleep(0.05)
    for _ in range(presses):
        os.killpg(agent.pid, signal.SIGINT)
        time.sleep(0.02)
    _, said = agent.communicate(timeout=60)
    ours = [line for line in said.splitlines() if line.startswith("inpo_fast")]
    assert len(ours) <= 1 and all(re.search(r"(stopped by SIGINT|left at once).*--resume$", line) for line in ours)
    assert not re.search(r'File ".*inpo_fast', said) and agent.returncode != 0
    if presses == 1:
        assert len(list((out / "checkpoints").glob("step-*"))) >= 1 and len(ours) == 1
