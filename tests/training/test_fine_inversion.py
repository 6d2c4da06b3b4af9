"""How much noise an inversion leaves, against a fine one: the number, what it costs, when it is made; and that looking
changes no bit of a run."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_world import one_level, save_pairs, tiny_pipeline

from inpo_fast.config import parse
from inpo_fast.method.losses import rms
from inpo_fast.method.noise_path import target
from inpo_fast.training import fine_inversion, loop
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.set_up import prepare
from inpo_fast.training.step_batch import make_step_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    one_level(tiny_pipeline()).save_pretrained(folder / "base")
    save_pairs(folder / "pairs.parquet")
    return folder


def prepared(world, output, *more):
    words = [f"--models.base={world / 'base'}", f"--data.source={world / 'pairs.parquet'}", f"--output={output}"]
    words += ["--train.pairs_per_step=4", "--train.micro_batch=4", "--inversion.steps=2", "--train.steps=2"]
    return prepare(parse("test", [*words, "--optim.lr=1e-3", *more]), 0, 1, torch.device("cpu"))


def trained(world, output, *more):
    run = prepared(world, output, *more)
    try:
        with (output / "said").open("w") as said:
            loop.train(run, Console(file=said, width=400))
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return run, rows, (output / "said").read_text()
    finally:
        run.checkpoints.end()
        run.folder.release()


def test_it_is_the_ratio_of_two_inversions(world, tmp_path, monkeypatch):
    """Of the first images of the first step, both by the base; counted, said, in no other step."""
    monkeypatch.setattr(fine_inversion, "SHARE", 5.0)  # the run is tiny
    run, rows, said = trained(world, tmp_path / "run", "--observe.fine_inversion=20")
    models, config = run.models, run.step_config
    models.policy.load_state_dict(models.reference.state_dict())
    items = next(
        iter(loop.PairLoader(run.source, run.config.data, resolution=32, seed=0, rank=0, world=1).steps(0, 1, 4))
    )
    batch = make_step_batch(items, models, config, models.encode_empty())
    sizes, spent = [], 0
    for steps in (2, 20):
        x_t, evaluations = noisy_latents(
            batch, models, replace(config, inversion=replace(config.inversion, steps=steps))
        )
        tau = target(x_t[0].flatten(0, 1), batch.x_0.flatten(0, 1), batch.a[0].flatten(), batch.s[0].flatten())
        sizes.append(rms(tau))
        spent += evaluations
    assert rows[0]["noise_ratio"] == pytest.approx(float((sizes[0] / sizes[1]).mean()), rel=1e-4)
    assert rows[0]["noise_ratio_evaluations"] == spent and "noise_ratio" not in rows[1]
    assert f"noise_ratio {rows[0]['noise_ratio']:.2f}" in said and f"{spent} UNet evaluations, once" in said


def test_looking_changes_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_inversion, "SHARE", 5.0)
    _, rows, _ = trained(world, tmp_path / "with", "--observe.fine_inversion=20")
    _, plain, said = trained(world, tmp_path / "without", "--observe.fine_inversion=0")
    timing = ("seconds", "pairs_per_second", *fine_inversion.NAMES)
    for one, other in zip(rows, plain, strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    assert "noise_ratio" not in said and not set(fine_inversion.NAMES) & set(plain[0])


@pytest.mark.parametrize(
    "more",
    [
        ["--method=dpo"],
        ["--method=sft"],
        ["--method=kto"],
        ["--objective.tau_norm=rms"],
        ["--observe.fine_inversion=0"],
    ],
    ids=str,
)
def test_not_where_x_t_needs_no_inversion_or_is_rescaled(world, tmp_path, monkeypatch, more):
    monkeypatch.setattr(fine_inversion, "SHARE", 50.0)
    run = prepared(world, tmp_path / "run", *more)
    assert fine_inversion.affordable_images(run.config, run.step_config, run.models, 1) == 0
    run.folder.release()


def test_it_costs_one_percent_at_most(world, tmp_path):
    """8 images of a process at most; fewer, and none, where a run is short."""
    run = prepared(world, tmp_path / "run", "--observe.fine_inversion=200")
    run.folder.release()
    found = {}
    for steps in (2, 40, 80, 400, 100_000):
        config = replace(run.config, train=replace(run.config.train, steps=steps, pairs_per_step=64))
        found[steps] = fine_inversion.affordable_images(config, run.step_config, run.models, 1)
        total = steps * 128 * (1.5 + 2)
        assert found[steps] * (100.5 + 1.5) <= 0.01 * total * 1.01
    assert found[2] == 0 and found[80] == 2 and found[100_000] == fine_inversion.IMAGES
    assert all(images % 2 == 0 for images in found.values())
    split = fine_inversion.affordable_images(config, run.step_config, run.models, 128)
    assert split == 0  # one image each is no pair


def test_it_is_said_where_another_length_would_have_made_it_or_not(world, tmp_path, monkeypatch):
    """It is made before the first step, for a share of the run as long as that is then."""
    monkeypatch.setattr(fine_inversion, "SHARE", 0.2)
    words = ("--observe.fine_inversion=20", "--optim.average=none")
    _, rows, _ = trained(world, tmp_path / "run", *words)
    assert "noise_ratio" not in rows[0]
    _, rows, said = trained(world, tmp_path / "run", *words, "--train.steps=6", "--resume")
    line = "inversion: step 1 has no noise_ratio, where a run of train.steps=6 from its start on has one"
    assert said.count(line) == 1 and "noise_ratio" not in rows[0]
    _, _, said = trained(world, tmp_path / "whole", *words, "--train.steps=6")
    assert "has one" not in said


def test_a_coarse_inversion_is_warned_of_to_the_end(world, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_inversion, "SHARE", 5.0)
    monkeypatch.setattr(loop, "noise_ratio", lambda *a: {"noise_ratio": 0.4, "noise_ratio_evaluations": 12.0})
    _, _, said = trained(world, tmp_path / "run")
    first, last = (line for line in said.splitlines() if line.startswith("warning"))
    assert "60 % less noise than by a fine inversion" in first and "inversion.grid=spread" in first
    assert last.startswith("warning, at the end: before the first step x_t held") and last.endswith("measured once")
    written = json.loads((tmp_path / "run" / "warnings.json").read_text())
    assert written["said"] == [last.removeprefix("warning, at the end: ")] and math.isfinite(written["steps"])
