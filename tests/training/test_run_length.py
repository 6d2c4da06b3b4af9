"""--resume with another train.steps: the bits of a run that was asked for it at first, or a refusal by name."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import finished, metrics, same_bits, save_recipe, torchrun, train_in
from tiny_world import save_pairs

from inpo_fast.config import OnlineConfig, RunConfig, flat, to_dict
from inpo_fast.config.run import OptimConfig
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.run_length import check_length

CLOCK = ("seconds", "pairs_per_second")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    held_out = {"held_out": save_pairs(folder / "held-out.parquet", rows=8), "held_out_every": 3, "held_out_pairs": 4}
    pictures = {"images_every": 5, "images": 2, "prompts": str(folder / "prompts.txt")}
    evaluate = {"sampler_steps": 2, "guidance": 1.0}
    save_recipe(folder, optim={"average": "ema"}, observe=held_out | pictures, evaluate=evaluate)
    return folder


@pytest.fixture(scope="module")
def six(world):
    return train_in(world, "six", "--train.steps=6")


def computed(run: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics(run)]


def assert_same(run: Path, expected: Path, steps: int = 6) -> None:
    """Weights, optimizer state, averages, metrics, pictures, and the model."""
    assert same_bits(run, expected, steps)
    assert computed(run) == computed(expected)
    assert {p.name: p.read_bytes() for p in (run / "images").iterdir()} == {
        p.name: p.read_bytes() for p in (expected / "images").iterdir()
    }
    one, other = (load_file(x / "model/unet/diffusion_pytorch_model.safetensors") for x in (run, expected))
    assert all(torch.equal(one[name], other[name]) for name in other)


def interrupted(world: Path, name: str, whole: Path, step: int) -> Path:
    """A run as it is when it is killed after the checkpoint of a step and before the next one."""
    shutil.copytree(whole, world / name)
    for path in (world / name / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(world / name / "model")
    return world / name


def test_a_finished_run_is_made_longer(world, six):
    """Twice, and the first time it had a look at its last step that a longer run has not."""
    run = train_in(world, "longer", "--train.steps=2")
    assert "held_out_margin" in computed(run)[1] and (run / "images" / "000002.png").exists()
    train_in(world, "longer", "--train.steps=4", "--resume")
    assert "held_out_margin" not in computed(run)[1] and "held_out_margin" in computed(run)[3]
    train_in(world, "longer", "--train.steps=6", "--resume")
    assert_same(run, six)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["former_steps"] == [2, 4] and manifest["continued_from_step"] == 4


@pytest.mark.parametrize("at", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_an_interrupted_run_is_made_shorter_than_planned(world, six, at):
    """Also to the very step that it was interrupted after, which was not looked at as the last one."""
    if not (world / "ten").exists():
        train_in(world, "ten", "--train.steps=10", "--train.keep_checkpoints=9")
    run = interrupted(world, f"shorter-{at}", world / "ten", at)
    train_in(world, run.name, "--train.steps=6", "--resume")
    assert_same(run, six)
    with pytest.raises(UserError, match=r"train\.steps=4, but the run in .* has done 6 steps already; take 6 or more"):
        train_in(world, run.name, "--train.steps=4", "--resume")


@pytest.mark.slow
def test_an_average_that_had_not_begun_is_no_obstacle(world):
    """A mean over the last half of 6 steps cannot become one over the last half of 8, but one of 10, or 7."""
    half = "--optim.average=last-half"
    run = train_in(world, "half", "--train.steps=6", half)
    with pytest.raises(UserError, match=r"train\.steps is 8 .* 6; with optim\.average=last-half .*steps=10 or more"):
        train_in(world, "half", "--train.steps=8", half, "--resume")
    for steps in (7, 12):
        train_in(world, "half", f"--train.steps={steps}", half, "--resume")
        assert_same(run, train_in(world, f"half-{steps}", f"--train.steps={steps}", half), steps)


@pytest.mark.slow
def test_none_then_an_average_that_has_not_begun(world):
    expected = train_in(world, "then-half-whole", "--train.steps=4", "--optim.average=last-half")
    run = train_in(world, "then-half", "--train.steps=2", "--optim.average=none")
    train_in(world, "then-half", "--train.steps=4", "--optim.average=last-half", "--resume")
    assert_same(run, expected, 4)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_that_has_begun_is_refused_by_name(world, decay):
    words = (f"--optim.decay={decay}", "--optim.warmup_steps=2")
    run = train_in(world, decay, "--train.steps=4", *words)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"optim\.decay={decay} .*keep train\.steps=4 .*models\.init=.*/model") as said:
        train_in(world, decay, "--train.steps=6", *words, "--resume")
    assert "\n" not in str(said.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} | {
        run / ".lock": before[run / ".lock"]
    } == before
    if decay == "linear":  # while it warms up, nothing depends on it
        other = interrupted(world, "warm", run, 2)
        train_in(world, "warm", "--train.steps=6", *words, "--resume")
        assert_same(other, train_in(world, "linear-6", "--train.steps=6", *words))


LENGTHS = [  # steps, decay and average of before; done; the same now; a refusal's words, or None
    ((4, "constant", "none"), 4, (9, "constant", "none"), None),
    ((4, "constant", "ema"), 4, (9, "constant", "ema"), None),
    ((4, "constant", "none"), 4, (3, "constant", "none"), "train.steps=3, but the run .* has done 4 steps already"),
    ((9, "linear", "none"), 2, (20, "linear", "none"), None),  # it warms up for two steps
    ((9, "linear", "none"), 2, (20, "cosine", "none"), None),
    (
        (9, "linear", "none"),
        4,
        (20, "linear", "none"),
        "with optim.decay=linear the learning rates of the",
    ),
    (
        (9, "constant", "none"),
        4,
        (9, "cosine", "none"),
        "optim.decay is cosine .* keep train.steps=9 .*models.init",
    ),
    ((6, "constant", "last-half"), 6, (8, "constant", "last-half"), "train.steps is 8 .*steps=10 or more"),
    ((6, "constant", "last-half"), 6, (10, "constant", "last-half"), None),
    ((6, "constant", "last-half"), 6, (7, "constant", "last-half"), None),
    ((6, "constant", "last-half"), 6, (8, "constant", "none"), None),
    ((6, "constant", "none"), 6, (8, "constant", "ema"), "optim.average is ema but the run .* has none"),
    ((9, "cosine", "last-half"), 0, (20, "linear", "ema"), None),
]


@pytest.mark.parametrize(("before", "done", "now", "words"), LENGTHS)
def test_what_is_accepted(tmp_path, before, done, now, words):
    old, config = (settings(*values) for values in (before, now))
    if words is None:
        check_length(config, flat(to_dict(old)), done, tmp_path)
        return
    with pytest.raises(UserError, match=words) as said:
        check_length(config, flat(to_dict(old)), done, tmp_path)
    assert "\n" not in str(said.value)


def settings(steps: int, decay: str, average: str) -> RunConfig:
    config = replace(RunConfig(), optim=OptimConfig(decay=decay, average=average, warmup_steps=2))
    return replace(config, train=replace(config.train, steps=steps))


@pytest.mark.parametrize(("before", "now", "refused"), [(6, 9, True), (9, 6, True), (4, 9, False), (8, 12, False)])
def test_a_round_of_online_pairs_is_not_cut(tmp_path, before, now, refused):
    """Rounds of four steps; the second one was drawn for as many of its steps as the run was to have."""
    (tmp_path / "online" / "000004").mkdir(parents=True)
    old, config = (
        replace(settings(steps, "constant", "none"), online=OnlineConfig(every=4)) for steps in (before, now)
    )
    with pytest.raises(UserError, match=r"its round of online.every=4 from step 4 on") if refused else nullcontext():
        check_length(config, flat(to_dict(old)), 6 if now > before and before > 5 else 4, tmp_path)


def test_what_a_finished_run_left_is_kept_until_it_is_replaced(world, monkeypatch):
    """The old model with its evaluation, or the new one without: never numbers of another model."""
    from inpo_fast.training import run_folder

    run = train_in(world, "kept", "--train.steps=2")
    (run / "evaluation.json").write_text('{"variant": "inpo"}')
    (run / "model" / "converted.ckpt").write_text("mine")
    old = (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def killed(*_):
        assert (run / "evaluation.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_folder", killed)
        train_in(world, "kept", "--train.steps=4", "--resume")
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == old
    train_in(world, "kept", "--train.steps=4", "--resume")
    assert (run / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != old
    assert not (run / "evaluation.json").exists() and (run / "model" / "converted.ckpt").read_text() == "mine"
    assert not list(run.glob(".tmp-*"))


@pytest.mark.slow
def test_longer_on_two_processes(world):
    words = ("--train.pairs_per_step=8", "--train.shard_states=true")
    for name, steps, more in (("two-6", 6, ()), ("two", 3, ()), ("two", 6, ("--resume",))):
        done = finished(torchrun(2, world, name, f"--train.steps={steps}", *words, *more))
        assert done.returncode == 0, done.stderr
    assert_same(world / "two", world / "two-6")
