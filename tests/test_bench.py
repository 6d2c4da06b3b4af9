"""The step benchmark held against its own rule: it compares gradients first, and times nothing when they differ."""

import json
import sys

import pytest
import torch
from tiny_world import save_pairs, save_tiny_model, tiny_pipeline, tiny_xl

from bench import report, train_step
from bench.naive import lockstep_step, naive_step
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Windows
from inpo_fast.models import Models, ModelsConfig


@pytest.fixture
def command(tmp_path, monkeypatch):
    model, pairs = save_tiny_model(tmp_path / "model"), save_pairs(tmp_path / "pairs.parquet")
    fixed = ["--model", model, "--source", pairs, "--pairs", "4", "--micro-batch", "2", "--threads", "1"]

    def command(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["bench.train_step", *fixed, *more])
        train_step.main()

    return command


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_it_prints_rates_and_ratios_and_keeps_them(command, capsys, tmp_path, precision):
    command(
        "--contenders=naive,lockstep,plain,fused", "--lockstep-batch=3", "--repeats=2",
        f"--precision={precision}", "--results", str(tmp_path / "results"),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("gradient of") == 3 and out.count("pairs/s") == 2 * 4 and out.count("x naive") == 2 * 3
    assert "encode" in out and "backward" in out
    lines = [json.loads(x) for path in (tmp_path / "results").iterdir() for x in path.read_text().splitlines()]
    assert [x["provider"] for x in lines[4:]] == ["naive", "lockstep", "plain", "fused"]  # one set a turn
    assert {x["pairs"] for x in lines} == {4} and lines[-1]["repeats"] == 2
    assert lines[-1]["pairs_s_range"][0] <= lines[-1]["pairs_s"] <= lines[-1]["pairs_s_range"][1]
    table = report.steps_table(lines)
    assert table.count("\n") == 5 and f"**{lines[-1]['ratio']:.2f}x**" in table


def test_it_refuses_to_time_a_wrong_gradient(command, capsys, monkeypatch):
    half = lambda items, models, **how: naive_step(items[: len(items) // 2], models, **how)  # noqa: E731
    monkeypatch.setattr(train_step, "naive_step", half)
    with pytest.raises(SystemExit, match="gradients differ"):
        command("--repeats=1")
    assert "pairs/s" not in capsys.readouterr().out


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_lockstep_is_the_naive_loop(tmp_path, pipeline):
    """Whatever the batch; fp32, ten chained evaluations, sums in another order."""
    models = Models(pipeline(), torch.device("cpu"), ModelsConfig(base="x"))
    train_step.move_policy(models)
    source = open_source(save_pairs(tmp_path / "pairs.parquet"))
    items = next(Windows(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 5))
    how = {"beta": 500.0, "inversion_steps": 10, "seed": 0}

    def gradient(step, **more) -> torch.Tensor:
        models.weights.zero()
        step(items, models, **how, **more)
        return torch.cat([g.reshape(-1) for g in models.weights.gradients])

    wanted = gradient(naive_step)
    for batch in (2, 5):
        assert (gradient(lockstep_step, batch=batch) - wanted).norm() < 1e-3 * wanted.norm()


def test_a_twin_has_the_same_parameters():
    """Not copies: what one writes the other computes with, and gradients meet in one place."""
    models = Models(tiny_pipeline(), torch.device("cpu"), ModelsConfig(base="x", precision="bf16"))
    other = train_step.twin(models.policy)
    assert all(a is b for a, b in zip(other.parameters(), models.policy.parameters(), strict=True))
    naive = train_step._naive_models(models)
    for p, master in zip(naive.policy.parameters(), models.weights.masters, strict=True):
        assert p.grad is master.grad and torch.equal(p, master) and p is not master
