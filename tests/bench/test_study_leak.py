"""bench.study.leak: its pull against the trainer's own loss with scaled predictions, its faults, its table."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.study import leak
from bench.study.cells import config_of
from bench.study.presets import PRESETS
from bench.study.run import write
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import micro_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

LEAK = PRESETS["leak"]


@pytest.fixture(scope="module")
def models():
    config = config_of(LEAK, LEAK.cells[0], 0)
    return Models(open_pipeline(config.models), torch.device("cpu"), config.models)


@pytest.mark.parametrize("number", [0, 1, 2, 3], ids=["none", "rms", "orthogonal", "Gaussian noise"])
def test_pull_is_the_slope_of_the_trainers_loss(models, monkeypatch, number):
    """dloss/dk of the policy's prediction times 1 + k, by a central difference; x_t is found before, as the step does:
    with the policy that inverts scaled too it would be another question."""
    monkeypatch.setattr(leak, "PAIRS", 4)
    config = config_of(LEAK, LEAK.cells[number], 0)
    items = leak.stored(config, config.data.source, models)
    found = leak.amplitudes(items, models, config)
    step_config = StepConfig(
        method="inpo",
        objective=config.objective,
        inversion=config.inversion,
        micro_batch=4,
        vae_sample=False,
        seed=config.seed,
    )
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    x_t, _ = noisy_latents(step_batch, models, step_config)
    scale = 1.0

    def scaled(_module, _inputs, out):
        return replace(out, sample=out.sample * scale) if hasattr(out, "sample") else (out[0] * scale, *out[1:])

    handle = models.policy.register_forward_hook(scaled)
    losses = []
    try:
        for k in (1e-3, -1e-3):
            scale = 1 + k
            losses.append(micro_step(step_batch, x_t, 0, slice(0, 4), models, step_config).objective.loss)
    finally:
        handle.remove()
    slope = ((losses[0] - losses[1]) / 2e-3).double().numpy()
    wanted = config.objective.beta / 2 * (found["c"][:, 0] - found["c"][:, 1])
    np.testing.assert_allclose(slope, wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())
    row = leak._row("some", "stored", found, np.array([1, 1, -1, 0]))
    mine = (found["c"][:, 1] - found["c"][:, 0]) / found["energy"].mean()
    assert row["count"] == 3 and row["pull"][0] == pytest.approx((mine[0] + mine[1] - mine[2]) / 3)
    assert row["pull"][1] <= row["pull"][0] <= row["pull"][2]
    swapped = found["rms"][[0, 1, 2]].copy()
    swapped[2] = swapped[2, ::-1]
    assert row["tau"]["rms"] == pytest.approx(swapped.mean(0))


def test_tau_that_is_noise_has_neither_image_nor_neighbours(models, monkeypatch):
    config = config_of(LEAK, LEAK.cells[0], 0)
    monkeypatch.setattr(leak, "PAIRS", 24)
    items = leak.photographs(leak.FAULTS["noisy"], models.resolution)
    plain = leak.amplitudes(items, models, config)
    noise = replace(config, inversion=replace(config.inversion, estimator="random"))
    random = leak.amplitudes(items, models, noise)
    for name in ("with x_0", "with its neighbour"):  # 24 means over 256 elements: 0.05 is four standard errors
        assert np.abs(random[name][:, 0].mean()) < 0.05 < np.abs(plain[name][:, 0].mean())
    assert random["rms"].mean() == pytest.approx(1, abs=0.02)


def test_faults_are_on_the_second_picture(models, monkeypatch):
    monkeypatch.setattr(leak, "PAIRS", 8)
    for name, damage in leak.FAULTS.items():
        items = leak.photographs(damage, models.resolution)
        first, second = (
            np.stack([view.pixels for view in views]).astype(float)
            for views in zip(*((item.winner, item.loser) for item in items), strict=True)
        )
        assert first.shape[1:] == (models.resolution, models.resolution, 3) and np.abs(first - second).mean() > 0.5, (
            name
        )
        rough = [np.abs(np.diff(pictures, axis=2)).mean() for pictures in (first, second)]
        if name in ("noisy", "blurred"):
            assert (rough[1] > rough[0]) == (name == "noisy")


def test_table_and_picture(tmp_path):
    row = {"pairs": "some", "label": "x", "count": 3, "pull": [0.01, -0.02, 0.03], "tau": {"rms": [0.5, 0.6]}}
    results = [{"cell": name, "seed": 0, "rows": [row, row]} for name in ("a", "b")]
    text = write(tmp_path, results, LEAK, "leak")
    assert text.count("+0.0100 [-0.0200, +0.0300]") == 4 and "0.500 / 0.600" in text and "pull, b" in text
    assert "<svg" in (tmp_path / "plot.svg").read_text()
