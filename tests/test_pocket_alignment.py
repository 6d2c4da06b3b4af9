"""The shipped pocket model's alignment held against its controls: rms(tau) at every t, wrong labels."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from inpo_fast import objectives as obj
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Windows
from inpo_fast.inversion import InversionConfig
from inpo_fast.models import Models, load_pipeline
from inpo_fast.objectives import ObjectiveConfig
from inpo_fast.pocket import ASSETS
from inpo_fast.step import Recipe, make_window, noise_window


def tau_rms(evaluate_at: str, steps: int = 10) -> dict[int, float]:
    models = Models(load_pipeline(str(ASSETS / "model")), torch.device("cpu"))
    windows = Windows(open_source(str(ASSETS / "pairs.parquet")), DataConfig(), resolution=32, seed=0, rank=0, world=1)
    items = next(windows.steps(0, 1, 16))
    recipe = Recipe("inpo", ObjectiveConfig(), InversionConfig(steps=steps, evaluate_at=evaluate_at), 16, False, 0)
    window = make_window(items, models, recipe, models.encode_empty())
    out = {}
    for t in (20, 100, 300, 600, 999):
        window.t = torch.full_like(window.t, t)
        x_t, _ = noise_window(window, models, recipe)
        a, s = models.schedule.a_s(window.t.repeat_interleave(2))
        out[t] = obj.rms(obj.target(x_t.flatten(0, 1), window.x_0.flatten(0, 1), a, s)).mean().item()
    return out


def test_tau_has_the_size_of_noise_at_every_t():
    """The source convention lands on t with a latent as noisy as t asks for; the scheduler's convention does not."""
    source, target = tau_rms("source"), tau_rms("target")
    assert all(0.9 < value < 1.1 for value in source.values()), source
    assert min(target.values()) < 0.75, target


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
