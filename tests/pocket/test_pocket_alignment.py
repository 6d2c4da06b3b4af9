"""The shipped pocket model's alignment held against its controls: rms(tau) at every t, wrong labels."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method import losses
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.noise_path import target
from inpo_fast.models.loading import load_pipeline
from inpo_fast.models.models import Models
from inpo_fast.pocket import ASSETS
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step_batch import StepConfig, make_step_batch


def tau_rms(models: Models, steps: int, levels=(99, 300, 999)) -> list[float]:
    """Mean rms(tau) of the shipped pairs at some levels, uncorrected."""
    loader = PairLoader(
        open_source(str(ASSETS / "pairs.parquet")), DataConfig(), resolution=32, seed=0, rank=0, world=1
    )
    items = next(loader.steps(0, 1, 4))
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(),
        inversion=InversionConfig(steps=steps),
        micro_batch=4,
        vae_sample=True,
        seed=0,
    )
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    out = []
    for t in levels:
        step_batch.t = torch.full_like(step_batch.t, t)
        (x_t,), _ = noisy_latents(step_batch, models, step_config)
        a, s = models.noise_path.a_s(step_batch.t[0].repeat_interleave(2))
        out.append(losses.rms(target(x_t.flatten(0, 1), step_batch.x_0.flatten(0, 1), a, s)).mean().item())
    return out


def test_tau_nears_the_size_of_noise_as_the_grid_gets_finer():
    """The first evaluation sees a clean image, on which a good model predicts little noise: an explicit step from
    there lands under-noised at every t, and only a finer grid (or tau_norm) repairs it. LOG.md has the argument."""
    torch.set_num_threads(1)
    models = Models(load_pipeline(str(ASSETS / "model")), torch.device("cpu"))
    coarse, fine, finest = (tau_rms(models, steps) for steps in (5, 20, 80))
    for a, b, c in zip(coarse, fine, finest, strict=True):
        assert a < b < c < 1.05
    assert finest[-1] > 0.8


def align(tmp_path, name: str, edit) -> dict:
    """A full pocket run on edited labels; its evaluation.json."""
    table = pq.read_table(ASSETS / "pairs.parquet")
    labels = edit(np.stack([table["label_0"].to_numpy(), table["label_1"].to_numpy()], 1))
    for i, column in enumerate(("label_0", "label_1")):
        table = table.set_column(table.schema.get_field_index(column), column, pa.array(labels[:, i]))
    pq.write_table(table, tmp_path / f"{name}.parquet")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "inpo_fast.train",
        "--config",
        "configs/pocket.yaml",
        "--output",
        str(tmp_path / name),
        f"--data.source={tmp_path / name}.parquet",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((tmp_path / name / "evaluation.json").read_text())


@pytest.mark.slow
def test_reversed_labels_make_it_worse(tmp_path):
    assert align(tmp_path, "reversed", lambda labels: labels[:, ::-1])["win_rate_high"] < 0.5


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(tmp_path):
    def shuffle(labels):
        swap = np.random.default_rng(0).random(len(labels)) < 0.5
        return np.where(swap[:, None], labels[:, ::-1], labels)

    result = align(tmp_path, "shuffled", shuffle)
    assert result["win_rate_low"] <= 0.5 <= result["win_rate_high"], result["total"]
