"""The profile: counts and floors against figures known from elsewhere, and measured phases on a tiny model."""

import json
import sys

import pytest
import torch
from test_plan import recipe
from tiny_world import save_pairs, save_tiny_model

from inpo_fast import profile
from inpo_fast.phases import NAMES, Stopwatch, phase
from inpo_fast.plan import make_plan
from inpo_fast.refusal import Refusal

# TFLOP of one image and of one pair, GPU-hours at 790 TFLOP/s for 400 x 1024 pairs: counted with another tool
KNOWN = {
    "sd15": {"conv 3x3": 0.400, "linear": 0.233, "attention": 0.126, "conv 1x1": 0.044, "pair": 17.6, "floor": 2.53},
    "sdxl": {"conv 3x3": 1.556, "linear": 4.354, "attention": 0.784, "conv 1x1": 0.067, "pair": 138.7, "floor": 20.0},
}


@pytest.mark.parametrize("name", KNOWN)
def test_floors(name):
    """VAE and text in the loop, the published landing grid (5.48 evaluations)."""
    config = recipe(name, "--inversion.grid=diffusers-0.22")
    result = profile.summary(config, make_plan(config, 1), 790.0, 2.0, None)
    known = KNOWN[name]
    by_class = {kind: known[kind] for kind in ("conv 3x3", "linear", "attention", "conv 1x1")}
    assert result["forward_tflop_by_class"] == pytest.approx(by_class, rel=0.01, abs=5e-4)
    assert result["inversion_evaluations"] == pytest.approx(5.48, abs=0.005)
    assert result["pair_tflop"] == pytest.approx(known["pair"], rel=0.01)
    assert result["floor_gpu_hours"] == pytest.approx(known["floor"], rel=0.01)
    assert result["cost_at_floor"] == pytest.approx(2 * result["floor_gpu_hours"])
    assert result["paper_gpu_hours"] == (57.6 if name == "sd15" else None)
    assert sum(row["tflop_per_pair"] for row in result["phases"].values()) == pytest.approx(result["pair_tflop"])
    assert list(result["phases"]) == list(NAMES) and result["gpu_hours_recipe"] is None


@pytest.fixture
def command(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "model")

    def run(*words: str) -> dict:
        arguments = [
            "--models.base=" + base,
            "--train.pairs_per_step=4",
            "--train.micro_batch=2",
            "--inversion.steps=3",
        ]
        arguments += ["--json", str(tmp_path / "out.json"), "--windows", "2", "--ceiling", "0.05", *words]
        monkeypatch.setattr(sys, "argv", ["profile", *arguments])
        profile.main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.parametrize("source", ["random pictures", "parquet"])
def test_measured_phases(command, tmp_path, source):
    words = ["--data.source=" + save_pairs(tmp_path / "pairs.parquet")] if source == "parquet" else []
    result = command(*words, "--trace", str(tmp_path / "trace.json"))
    phases = result["phases"]
    assert result["pairs_measured"] == 8 and result["device"] == "cpu"
    assert all(phases[name]["s_per_pair"] > 0 for name in NAMES if name != "data")
    share = sum(row["share_of_time"] for row in phases.values())
    assert 0.7 < share <= 1.0  # the rest: gathering, clipping, metrics
    for name in ("encode", "invert", "reference", "forward", "backward"):
        row = phases[name]
        assert row["tflops"] == pytest.approx(row["tflop_per_pair"] / row["s_per_pair"])
        assert row["share_of_ceiling"] == pytest.approx(row["floor_s_per_pair"] / row["s_per_pair"])
    hours = result["recipe_pairs"] / result["pairs_per_second"] / 3600
    assert result["gpu_hours_recipe"] == pytest.approx(hours)
    events = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert set(NAMES) <= events


def test_dry_run_loads_and_measures_nothing(command, monkeypatch):
    monkeypatch.setattr(profile, "measure", None)  # calling it would fail
    assert command("--dry-run")["gpu_hours_recipe"] is None
    with pytest.raises(Refusal, match="must be positive"):
        command("--windows", "0")


def test_stopwatch():
    """Nested and repeated phases add up; outside of its block nothing is timed."""
    watch = Stopwatch(torch.device("cpu"))
    with phase("data"):
        pass
    with watch.running():
        for _ in range(3):
            with phase("invert"), phase("encode"):
                pass
        with pytest.raises(KeyError), phase("backward"):
            raise KeyError
    with phase("optimizer"):
        pass
    assert {name: len(spans) for name, spans in watch.spans.items()} == {"invert": 3, "encode": 3, "backward": 1}
    seconds = watch.seconds()
    assert seconds["invert"] >= seconds["encode"] >= 0 and watch.seconds() == {}
