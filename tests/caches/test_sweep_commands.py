"""The command line with inversion.cache: what it writes, says, resumes and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sweep_runs import STEP, save_world
from tiny_runs import metrics, policy, save_recipe, train_in

from inpo_fast import profile as profile_command
from inpo_fast.caches import trajectory_cache
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import RecordStore


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


def command_in(folder: Path, world: Path):
    save_recipe(
        folder,
        models={"base": str(world / "sd")},
        data={"source": str(world / "pairs.parquet"), "vae_sample": False},
        inversion={"steps": 2, "batch": 1, "model": "reference", "cache": str(folder / "cache")},
        train={"checkpoint_every": 1, "keep_checkpoints": 9},
    )
    return lambda name, *extra: train_in(folder, name, *extra)


@pytest.fixture
def command(world, tmp_path):
    return command_in(tmp_path, world)


@pytest.fixture(scope="module")
def cut(world, tmp_path_factory):
    """A folder with a whole run, and one that ended after step 2 and left the cache `second`."""
    folder = tmp_path_factory.mktemp("cut")
    command = command_in(folder, world)
    command("whole")
    for path in command("cut", f"--inversion.cache={folder / 'second'}").glob("checkpoints/step-000[34]"):
        shutil.rmtree(path)
    return folder


def each(folder: Path, name: str) -> list[float]:
    return [line[name] for line in metrics(folder)]


def equal(one: Path, two: Path) -> bool:
    ours, theirs = policy(one, 4), policy(two, 4)
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_commands(command, tmp_path, capsys):
    """Uncached, cold, warm; a second seed; the manifest names the variant and the terminal the disk."""
    plain = command("plain", "--inversion.cache=null")
    assert not (tmp_path / "cache").exists() and "trajectories_hit" not in (plain / "metrics.jsonl").read_text()
    capsys.readouterr()
    cold, warm = command("cold"), command("warm", "--objective.beta=5")
    said, there = (
        " ".join(capsys.readouterr().out.split()),
        len(RecordStore(tmp_path / "cache", json.loads((tmp_path / "cache" / "manifest.json").read_text()))),
    )
    for words in ("0 there", f"{there} there"):  # at most all views of seven pairs: 28
        assert f"(28 images x 3,129 bytes, {words}), " in said and "GiB free on the disk of " in said
    assert equal(plain, cold) and not equal(plain, warm)
    assert each(warm, "trajectories_hit") == 4 * [1] and each(warm, "unet_evaluations") == 4 * [STEP]
    assert each(command("seed", "--seed=1", "--train.steps=1"), "trajectories_hit")[0] > 0
    assert json.loads((cold / "manifest.json").read_text())["variant"] == "inpo-ref"
    frozen = command("frozen", "--inversion.frozen=true", f"--inversion.cache={tmp_path / 'other'}", "--train.steps=1")
    assert json.loads((frozen / "manifest.json").read_text())["variant"] == "inpo-ref-frozen"
    assert "inpo-ref-frozen" in (frozen / "model" / "README.md").read_text()


@pytest.mark.parametrize("cache", ["same", pytest.param("other", marks=pytest.mark.slow), "null"])
def test_resume(command, cut, tmp_path, cache):
    """From step 2, with the cache it had, an empty one or none: the same bits. frozen may not change."""
    for name in ("cut", "second"):
        shutil.copytree(cut / name, tmp_path / name)
    assert max(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()) == "step-0002"
    folder = {"same": tmp_path / "second", "other": tmp_path / "third", "null": "null"}[cache]
    with pytest.raises(UserError, match=r"--resume: inversion\.frozen is True but"):
        command("cut", "--resume", "--inversion.frozen=true")
    assert equal(command("cut", "--resume", f"--inversion.cache={folder}"), cut / "whole")


@pytest.mark.slow
def test_two_processes_share_a_folder(command, tmp_path):
    """Both write into it at once; a run of one process finds all of it."""
    words = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "two"), "--optim.lr=1e-4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "inpo_fast.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *words], env=environment, check=True, capture_output=True, timeout=240)
    warm = command("one", "--optim.lr=1e-4")
    assert each(warm, "trajectories_hit") == 4 * [1]
    # the mean over ranks is that over pairs; gradients are summed in another order
    assert each(tmp_path / "two", "loss") == pytest.approx(each(warm, "loss"), rel=1e-3)
    assert each(tmp_path / "two", "trajectories_hit")[0] == 0


REFUSED = [
    (["--inversion.model=policy"], "inversion.model=policy follows the trained weights; take reference"),
    (["--inversion.eta=0.1"], "inversion.eta=0.1 draws noise for each seed; take 0"),
    (["--inversion.guidance=7.5"], "inversion.guidance=7.5 mixes two outputs; take 0 or 1"),
    (["--inversion.estimator=random"], "inversion.estimator=random has no inversion; take ddim"),
    (["--method=dpo"], "method=dpo has no inversion; take method=inpo"),
    (["--method=sft"], "method=sft has no inversion"),
    (["--inversion.grid=spread"], "these grids can be cached: exact (source), snap (source), snap (target), diff"),
    (["--inversion.frozen=true", "--inversion.cache=null"], "inversion.frozen=true needs inversion.cache"),
    (["--inversion.cache="], "inversion.cache is empty; give it a value"),
    (["--inversion.cache={output}"], "is the run's own output folder"),
    (["--inversion.cache={output}/../refused/"], "is the run's own output folder"),
]


@pytest.mark.parametrize(("extra", "words"), REFUSED)
def test_what_cannot_be_cached_is_refused_and_nothing_is_written(command, tmp_path, extra, words):
    with pytest.raises(UserError) as refusal:
        command("refused", *(word.format(output=tmp_path / "refused") for word in extra))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "refused").exists() and not (tmp_path / "cache").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GiB free on the disk of .*; take another disk"):
        command("refused")
    assert not (tmp_path / "refused").exists() and not (tmp_path / "cache").exists()


def test_the_profile_knows_no_cache(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["profile", "--dry-run", "--inversion.model=reference", "--inversion.cache=x"])
    with pytest.raises(UserError, match=r"inversion\.cache: the profile knows uncached steps only"):
        profile_command.main()
