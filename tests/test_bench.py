"""The step benchmark held against its own rule: it compares gradients first, and times nothing when they differ."""

import sys

import pytest
from tiny_world import save_pairs, save_tiny_model

from bench import train_step


@pytest.fixture
def command(tmp_path, monkeypatch):
    model, pairs = save_tiny_model(tmp_path / "model"), save_pairs(tmp_path / "pairs.parquet")
    words = [
        "--base",
        model,
        "--source",
        pairs,
        "--pairs",
        "4",
        "--micro-batch",
        "2",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.train_step", *words])


def test_it_prints_both_rates_and_the_ratio(command, capsys):
    train_step.main()
    out = capsys.readouterr().out
    assert "relative difference" in out and out.count("pairs/s") == 2 and "ratio" in out


def test_it_refuses_to_time_a_wrong_gradient(command, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "naive_step", lambda items, models, **how: _half(items, models, how))
    with pytest.raises(SystemExit, match="gradients differ"):
        train_step.main()
    assert "pairs/s" not in capsys.readouterr().out


def _half(items, models, how):
    from bench.naive import naive_step

    return naive_step(items[: len(items) // 2], models, **how)
