"""bench.study.landscape: points of the lines against the trainer's own step there, the random direction's norms,
curvature and the gradients' agreement against their formulas."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from test_study import Inline

from bench.study import landscape, table, train
from bench.study.cells import Cell, Study, config_of
from bench.study.run import run, write
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

SMALL = {"train.steps": "1", "train.pairs_per_step": "2", "train.micro_batch": "2", "optim.warmup_steps": "0"}
SMALL |= {"optim.average": "none", "optim.lr": "3e-4", "inversion.steps": "2"}


def test_points_of_the_lines_are_the_trainers_own_losses(tmp_path, monkeypatch):
    """At alpha = 0 ln 2 whatever inverts; at alpha = 1 what a step on the trained model reports of the same pairs, its
    own inversion in it; gradients are those at the base, and the pairs those that the run did not come to."""
    monkeypatch.setattr(landscape, "ALPHAS", (-1.0, 0.0, 1.0))
    for name, value in {"PAIRS": 3, "BATCHES": 3, "BATCH": 2}.items():
        monkeypatch.setattr(landscape, name, value)
    monkeypatch.setattr(landscape, "_updates", {})
    runs, plain = [], train.trained
    monkeypatch.setattr(landscape, "trained", lambda config: runs.append((config, plain(config))) or runs[-1][1])
    cells = tuple(Cell(f"w={w}", (*SMALL.items(), ("inversion.guidance", w))) for w in ("0", "1"))
    tiny = Study("tiny", cells, kind="landscape")
    made = run(tiny, tmp_path, 1, show=str, pool=Inline)
    assert len(made) == 2 and len(runs) == 1 and runs[0][0].inversion.guidance == 0  # one update for both

    for cell, result in zip(cells, made, strict=True):
        losses = {name: np.array(values) for name, values in result["losses"].items()}
        assert all(values.shape == (3, 3) for values in losses.values())
        assert all(values[1] == pytest.approx(math.log(2), abs=1e-7) for values in losses.values())
        config = config_of(tiny, cell, 0)
        models = Models(open_pipeline(config.models), torch.device("cpu"), config.models)
        step_config = StepConfig(
            method=config.method,
            objective=config.objective,
            inversion=config.inversion,
            micro_batch=3,
            vae_sample=config.data.vae_sample,
            seed=config.seed,
        )
        items, empty = landscape.load(config, models, 2, 9), models.encode_empty()
        assert [item.position for item in items] == list(range(2, 11))
        some = landscape.cosines([items[3:5], items[5:7], items[7:]], models, step_config, empty)
        assert np.array(result["cosines"]) == pytest.approx(some.numpy(), abs=1e-4)
        same = landscape.cosines([items[3:5], items[3:5]], models, step_config, empty)
        assert same.numpy() == pytest.approx(np.ones((2, 2)), abs=1e-5) and abs(some[0, 1]) < 0.9
        models.policy.load_state_dict(runs[0][1].unet.state_dict())
        metrics, _ = train_step(make_step_batch(items[:3], models, step_config, empty), models, step_config, 3, 1.0)
        expected = metrics.values()["loss"]  # theta_0 + (theta - theta_0) is theta but for fp32's rounding
        assert losses["update"][2].mean() == pytest.approx(expected, abs=3e-5) and abs(expected - math.log(2)) > 1e-2
        assert np.abs(losses["random"][2] - losses["update"][2]).max() > 1e-4
    ends = [np.array(result["losses"]["update"])[2] for result in made]
    assert np.abs(ends[0] - ends[1]).max() > 1e-5  # each cell inverts in its own way

    text = write(tmp_path / "tiny", made, tiny, "tiny")
    header, _, *rows = text.strip().splitlines()
    assert len(rows) == 4 and all(row.count("|") == header.count("|") for row in rows)
    assert "alpha = -1" in header and f"{ends[0].mean():.4f}" in rows[0] and rows[1].startswith("| w=0 | 1 | random")
    assert (tmp_path / "tiny" / "plot.svg").read_text().count("<svg") == 1


def test_a_random_direction_has_the_updates_norm_in_each_filter():
    update = {"conv": torch.randn(4, 3, 3, 3), "bias": torch.randn(5), "linear": torch.randn(6, 2)}
    update["conv"][1] = 0  # a filter that did not move stays
    one, other = (landscape.random_like(update, seed) for seed in (0, 1))
    for name, u in update.items():
        wanted = u.flatten(1).norm(dim=1) if u.ndim > 1 else u.norm()
        found = one[name].flatten(1).norm(dim=1) if u.ndim > 1 else one[name].norm()
        assert torch.allclose(found, wanted) and one[name].shape == u.shape
        assert not torch.allclose(one[name], other[name]) and not torch.allclose(one[name].abs(), u.abs())


def test_curvature_is_the_second_derivative_of_a_parabola():
    alphas, bend = np.array(landscape.ALPHAS), np.array([0.5, -3.0])
    losses = 0.7 - 0.2 * alphas[:, None] + bend / 2 * alphas[:, None] ** 2
    assert table.curvature(alphas, losses) == pytest.approx(bend)


def test_agreement_is_the_mean_over_pairs_of_minibatches_and_its_jackknife():
    rows = np.random.default_rng(0).normal(size=(7, 30)) + 0.5
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T

    def mean(some):
        return np.mean([cosines[i, j] for i, j in combinations(some, 2)])

    without = [mean([i for i in range(7) if i != left]) for left in range(7)]
    error = np.sqrt(6 / 7 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert table.agreement(cosines) == pytest.approx((mean(range(7)), error))
