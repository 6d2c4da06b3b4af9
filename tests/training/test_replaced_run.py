"""--overwrite: what no run wrote stays, and the earlier run is there until its successor has a checkpoint."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import metrics, same_bits, save_recipe, start, train_in
from tiny_world import save_pairs

from inpo_fast.config import RunConfig
from inpo_fast.pocket.pairs import png
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import loop, replaced_run

MANIFEST = '{"variant": "inpo", "config_sha256": "0", "data": {}, "model": {}}'


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def good(world):
    return train_in(world, "good", "--train.steps=2")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, but for the lock."""
    paths = (p for p in folder.rglob("*") if p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def a_run(folder: Path, word: str = "old") -> Path:
    """A folder with every name that a run writes, and things of somebody else beside and among them."""
    for name in ("checkpoints/step-0004", "model/unet", "lora", "tensorboard", "images", "online/000000", "wandb/x"):
        (folder / name).mkdir(parents=True)
        (folder / name / "000001.png").write_text(word)
    for name in replaced_run.FILES:
        (folder / name).write_text(word)
    (folder / "manifest.json").write_text(MANIFEST)
    return folder


def add_foreign(folder: Path) -> dict[str, str]:
    mine = ("notes.txt", "checkpoints/step-0050-kept/x", "images/mine.png", "model/merged.ckpt", "lora/000001.png")
    for name in mine:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return dict.fromkeys(mine, "mine")


@pytest.mark.parametrize("name", ["images/holiday.png", "model/model_index.json", "config.yaml", "manifest.json"])
def test_a_folder_without_a_run_is_refused(world, tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"--overwrite: .*run holds {Path(name).parts[0]} and no manifest\.json of"):
        train_in(world, str(tmp_path / "run"), "--overwrite")
    assert tree(tmp_path)[f"run/{name}"] == b'{"mine": 1}' and len(list((tmp_path / "run").iterdir())) == 1


def test_an_empty_folder_and_one_with_other_things_are_free(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train_in(world, str(tmp_path / "run"), "--overwrite", "--train.steps=1")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine" and not (tmp_path / "run" / ".replaced").exists()


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("models.base", "model"),
        ("models.base", "link"),
        ("models.base", "parts"),
        ("models.init", "model/unet"),
        ("models.init", "lora"),
        ("models.vae", "model"),
        ("models.single_file_config", "model"),
        ("data.source", "online"),
        ("data.source", "online/*/*.parquet"),
        ("data.source", "."),
        ("data.source", ".."),
        ("data.source", "file"),
        ("data.images", "images"),
        ("data.labels", "wandb/x/000001.png"),
        ("data.cache", "checkpoints"),
        ("data.filters.block_list", "images/000001.png"),
        ("inversion.cache", "tensorboard"),
        ("evaluate.prompts", "images/000001.png"),
        ("evaluate.seen_prompts", "images/000001.png"),
        ("evaluate.judge", "scores"),
        ("evaluate.judges", "scores"),
        ("online.judge", "scores"),
        ("observe.prompts", "model/unet/000001.png"),
        ("observe.held_out", "online"),
    ],
)
def test_what_the_new_run_reads_is_not_replaced(tmp_path, key, place):
    """Every setting that names a place, links followed, patterns and a judge's kind looked through."""
    folder = a_run(tmp_path / "runs" / "x")
    (folder / "online" / "000000" / "0.parquet").write_text("")
    (tmp_path / "link").symlink_to(folder / "model")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "unet").symlink_to(folder / "model" / "unet")
    value = {
        "link": str(tmp_path / "link"),
        "parts": str(tmp_path / "parts"),
        "scores": f"scores:{folder / 'images' / '000001.png'}",
        "file": f"file://{folder / 'online'}",
    }.get(place, str(folder / place))
    before = tree(folder)
    values = {key: [value] if key == "evaluate.judges" else value}
    with pytest.raises(UserError, match=rf"--overwrite: {key}=.* lies in what would be replaced") as said:
        replaced_run.check(folder, with_values(values))
    assert "\n" not in str(said.value) and tree(folder) == before
    (tmp_path / "elsewhere").mkdir()
    replaced_run.check(folder, with_values({key: str(tmp_path / "elsewhere")}))


@pytest.mark.parametrize("key", ["data.source", "observe.held_out"])
def test_pictures_that_a_listing_names_are_not_replaced(world, good, tmp_path, key):
    """In the run's own folder, of a listing that lies outside, under a link too; others beside them do not count."""
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / "images").mkdir()
    (tmp_path / "run" / "mine").mkdir()
    for name in ("images/a.png", "mine/b.png"):
        (tmp_path / "run" / name).write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lists = tmp_path / "list.json", tmp_path / "free.json"
    for listing, names in zip(lists, (["run/mine/b.png", "link/images/a.png"], ["run/mine/b.png"] * 2), strict=True):
        records = [{"prompt": "a circle", "path1": "run/mine/b.png", "path2": name} for name in names]
        listing.write_text(json.dumps(records))
    before = tree(tmp_path / "run")
    told = rf"--overwrite: {key} lists .*run/images/a\.png, which lies in what", "models.base: no such folder"
    for listing, words in zip(lists, told, strict=True):
        pairs = (f"--{key}={listing}", "--models.base=nowhere/at/all")  # what is looked for next
        with pytest.raises(UserError, match=words):
            train_in(world, str(tmp_path / "run"), "--overwrite", *pairs)
    assert tree(tmp_path / "run") == before


def with_values(values: dict) -> RunConfig:
    config = RunConfig()
    for key, value in values.items():
        groups = key.split(".")
        held = [config]
        for name in groups[:-1]:
            held.append(getattr(held[-1], name))
        value = replace(held[-1], **{groups[-1]: value})
        for parent, name in zip(held[-2::-1], groups[-2::-1], strict=True):
            value = replace(parent, **{name: value})
        config = value
    return config


def kill_at(monkeypatch, number: int, work) -> bool:
    """Runs it until its n-th change of the disk, and nothing after; whether it was killed."""
    count = iter(range(10**6))

    def counted(real):
        def change(*args, **kwargs):
            if next(count) >= number:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        patch.setattr(Path, "rmdir", counted(Path.rmdir))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False


def begin(folder: Path) -> None:
    """What a run writes before its first checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(MANIFEST)
    (folder / "config.yaml").write_text("new")
    (folder / "metrics.jsonl").write_text("new")


def test_killed_at_every_moment_the_earlier_run_comes_back(tmp_path, monkeypatch):
    """While it is put aside, afterwards, and while it is brought back; what is somebody's is never lost."""
    whole = a_run(tmp_path / "whole")
    add_foreign(whole)
    before, number, killed = tree(whole), 0, 0
    while True:
        folder = tmp_path / f"run-{number}"
        shutil.copytree(whole, folder)
        was_killed = kill_at(monkeypatch, number, lambda folder=folder: replaced_run.set_aside(folder))
        if not was_killed:
            break
        assert replaced_run.there(folder) or replaced_run.is_kept(folder)
        if replaced_run.is_kept(folder):
            replaced_run.restore(folder)
        assert tree(folder) == before, number
        number, killed = number + 1, killed + 1
    begin(folder)
    assert replaced_run.successor_began(folder)
    (folder / "images").mkdir()
    (folder / "images" / "000001.png").write_text("new")
    for again in range(99):
        copy = tmp_path / f"back-{again}"
        shutil.copytree(folder, copy)
        if not kill_at(monkeypatch, again, lambda copy=copy: replaced_run.restore(copy)):
            assert tree(copy) == before
            break
        replaced_run.restore(copy)
        killed += 1
        assert {name: content for name, content in tree(copy).items() if ".tmp-" not in name} == before, again
    assert killed > 25


def test_killed_at_every_moment_while_the_earlier_run_goes(tmp_path, monkeypatch):
    """It is gone in the end, the new one is whole, and what is somebody's is where it was."""
    whole = a_run(tmp_path / "whole")
    foreign = add_foreign(whole)
    replaced_run.set_aside(whole)
    begin(whole)
    (whole / "checkpoints" / "step-0001").mkdir(parents=True)
    for number in range(99):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(whole, folder)
        was_killed = kill_at(monkeypatch, number, lambda folder=folder: replaced_run.forget(folder))
        replaced_run.forget(folder)
        assert (folder / "config.yaml").read_text() == "new" and (folder / "checkpoints" / "step-0001").is_dir()
        assert {name: (folder / name).read_text() for name in foreign} == foreign
        assert not (folder / ".replaced").exists() and not list(folder.glob(".tmp-*"))
        assert not (folder / "checkpoints" / "step-0004").exists() and not (folder / "model" / "unet").exists()
        if not was_killed:
            break
    assert number > 5


def test_replaced_twice_nothing_is_there_twice(tmp_path):
    """A successor that did not get to a checkpoint that was due is dropped for the next one, also with that of an
    interruption, and the run that both replace stays."""
    folder = a_run(tmp_path / "run")
    for _ in range(2):
        replaced_run.set_aside(folder)
        begin(folder)
    assert (folder / ".replaced" / "config.yaml").read_text() == "old"
    (folder / "checkpoints" / "step-0001").mkdir(parents=True)
    replaced_run.set_aside(folder)
    assert (folder / ".replaced" / "config.yaml").read_text() == "old"
    assert (folder / ".replaced" / "model").exists() and replaced_run.there(folder) == []


def test_two_things_of_one_name_both_stay(tmp_path):
    folder = a_run(tmp_path / "run")
    (folder / "images" / "mine.png").write_text("first")
    replaced_run.set_aside(folder)
    (folder / "images").mkdir()
    (folder / "images" / "mine.png").write_text("second")
    replaced_run.forget(folder)
    assert sorted(p.read_text() for p in (folder / "images").iterdir()) == ["first", "second"]


def killed_before_its_first_checkpoint(world: Path, name: str) -> None:
    process = start(world, name, "--train.steps=500", "--train.checkpoint_every=1000", "--overwrite", "--seed=1")
    deadline = time.monotonic() + 120
    while not ((world / name / ".replaced/manifest.json").exists() and (world / name / "metrics.jsonl").exists()):
        assert process.poll() is None and time.monotonic() < deadline, process.complaints.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_that_is_killed_before_its_first_checkpoint_has_replaced_nothing(world, good, capsys):
    """kill -9 in its first steps; a start without a word brings the earlier run back, --resume goes on with the new
    one, and --overwrite begins anew. With the new one's first checkpoint the earlier one goes."""
    shutil.copytree(good, world / "again")
    (world / "again" / "checkpoints" / "step-0050-kept").mkdir()
    before = tree(world / "again")
    killed_before_its_first_checkpoint(world, "again")
    shutil.copytree(world / "again", world / "begun")
    with pytest.raises(UserError, match=r"already holds a run .*is back, as the new one had no checkpoint; .*--resume"):
        train_in(world, "again", "--train.steps=2")
    assert tree(world / "again") == before

    shutil.rmtree(world / "again")
    (world / "begun").rename(world / "again")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"seed is 0 but the run in .* has 1"):
        train_in(world, "again", "--train.steps=2", "--resume")
    assert (world / "again" / ".replaced" / "model").is_dir()
    train_in(world, "again", "--train.steps=2", "--seed=1", "--resume")
    said = " ".join(capsys.readouterr().out.split())
    assert "has no checkpoint to continue from; starting at step 0" in said and ".replaced has the run that" in said
    assert not (world / "again" / ".replaced").exists() and (world / "again/checkpoints/step-0050-kept").is_dir()
    assert len(metrics(world / "again")) == 2 and not same_bits(world / "again", good, 2)

    train_in(world, "again", "--train.steps=2", "--overwrite")
    assert same_bits(world / "again", good, 2)
    assert not [p for p in (world / "again").iterdir() if p.name.startswith((".replaced", ".tmp"))]


def test_a_run_that_is_stopped_before_a_checkpoint_that_was_due_has_replaced_nothing(
    world, good, capsys, monkeypatch, tmp_path
):
    """SIGTERM writes a checkpoint, with which --resume goes on; the earlier run stays until one that was due."""
    run, train_step = tmp_path / "run", loop.train_step
    shutil.copytree(good, run)
    before, words = tree(run), ("--train.steps=3", "--train.checkpoint_every=9", "--seed=1")

    def stopped(*where: str) -> str:
        steps = iter(range(9))

        def asked(*args):
            if next(steps) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*args)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(loop, "train_step", asked)
            train_in(world, str(run), *words, *where)
        return " ".join(capsys.readouterr().err.split())

    said = stopped("--overwrite")
    assert "continue with --resume (" in said and f"remove {run / 'checkpoints'} and start without --resume)" in said
    shutil.copytree(run, tmp_path / "other")
    with pytest.raises(UserError, match=r"already holds a run .*\.replaced still has the run .*; continue it with"):
        train_in(world, str(run), *words)
    assert tree(run / ".replaced") == before
    assert "still has the run" in stopped("--resume") and tree(run / ".replaced") == before  # and once more
    train_in(world, str(run), *words, "--resume")
    assert not (run / ".replaced").exists() and len(metrics(run)) == 3

    shutil.rmtree(tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="the one that was to be replaced is back"):
        train_in(world, str(tmp_path / "other"), *words)
    assert tree(tmp_path / "other") == before


def test_resume_where_there_is_nothing(world, capsys):
    """Clusters requeue with --resume from the first time on."""
    for name in ("absent", "empty"):
        if name == "empty":
            (world / name).mkdir()
        train_in(world, name, "--train.steps=1", "--resume")
        said = " ".join(capsys.readouterr().out.split())
        assert f"--resume: {world / name} has no checkpoint to continue from; starting at step 0" in said
    shutil.rmtree(world / "absent" / "checkpoints")
    with pytest.raises(UserError, match=r"absent is finished and its checkpoints are gone; .*--overwrite"):
        train_in(world, "absent", "--train.steps=1", "--resume")


def test_pictures_of_somebody_else_stay(world, tmp_path):
    """The trainer clears pictures of steps past its checkpoint, and no others."""
    (world / "prompts.txt").write_text("a red circle\n")
    pairs = save_pairs(tmp_path / "held-out.parquet", rows=8)
    words = ("--observe.images_every=1", f"--observe.prompts={world / 'prompts.txt'}", f"--observe.held_out={pairs}")
    run = train_in(world, "pictures", "--train.steps=1", "--evaluate.sampler_steps=1", *words)
    (run / "images" / "mine.png").write_text("mine")
    (run / "images" / "000009.png").write_text("of a step past the checkpoint")
    train_in(world, "pictures", "--train.steps=1", "--evaluate.sampler_steps=1", *words, "--resume")
    assert sorted(p.name for p in (run / "images").iterdir()) == ["000001.png", "mine.png"]
