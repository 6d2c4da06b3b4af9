"""What a run shows while it trains, against runs without it and sums by hand; trackers against what reaches them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_world import one_level, pair_table, save_pairs, tiny_pipeline

from inpo_fast import train as train_command
from inpo_fast.comparison.picture_store import read_picture
from inpo_fast.config import parse
from inpo_fast.report import plots
from inpo_fast.report.write import write_report
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.metrics import BUCKETS, MetricAccumulator
from inpo_fast.training.set_up import prepare
from inpo_fast.training.step_batch import StepConfig
from inpo_fast.training.trackers import Tracker
from inpo_fast.training.validation import Validation, prompts_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    one_level(tiny_pipeline()).save_pretrained(folder / "model")
    save_pairs(folder / "pairs.parquet", 24)
    other = pair_table(48).slice(24)
    turned = other.set_column(11, "label_0", other["label_1"]).set_column(12, "label_1", other["label_0"])
    assert other.schema.names[11:13] == ["label_0", "label_1"]
    pq.write_table(other, folder / "held.parquet")
    pq.write_table(turned, folder / "turned.parquet")
    (folder / "p.txt").write_text(
        "\n".join(f"a small red circle on a {c} background" for c in ("blue", "green", "white"))
    )
    return folder


def arguments(world, output, *more):
    return [
        f"--models.base={world / 'model'}", f"--data.source={world / 'pairs.parquet'}", f"--output={output}",
        "--train.steps=3", "--train.pairs_per_step=4", "--train.micro_batch=2", "--inversion.steps=2",
        "--objective.beta=100", "--optim.lr=1e-3", "--evaluate.sampler_steps=2", *more,
    ]  # fmt: skip


def run(world, output, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["train", *arguments(world, output, *more)])
    train_command.main()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


LOOK = ["--observe.images_every=2", "--observe.images=2"]


def test_looking_changes_nothing_and_is_all_there(world, tmp_path, monkeypatch, capsys):
    look = [*LOOK, f"--observe.prompts={world / 'p.txt'}", f"--observe.held_out={world / 'held.parquet'}"]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")
        plain = run(world, tmp_path / "plain", patch)
    seen = run(world, tmp_path / "seen", monkeypatch, *look, "--observe.held_out_every=2", "--observe.held_out_pairs=6")
    for before, after in zip(plain, seen, strict=True):
        computed = {k: v for k, v in before.items() if k not in ("seconds", "pairs_per_second")}
        assert computed == {k: after[k] for k in computed}  # bit for bit
    assert ["held_out_margin" in row for row in seen] == [True, True, True]  # first, every second, last
    assert seen[0]["held_out_margin"] != seen[2]["held_out_margin"]
    strips = sorted((tmp_path / "seen/images").glob("*.png"))
    assert [path.name for path in strips] == ["000002.png", "000003.png"]
    early, late = map(read_picture, strips)
    assert early.shape == (32, 64, 3) and (early != late).any()
    events = b"".join(path.read_bytes() for path in (tmp_path / "seen/tensorboard").iterdir())
    assert b"held out/implicit_accuracy" in events and b"images/fixed prompts" in events
    page = (tmp_path / "seen/report.html").read_text()
    assert "Pictures while training" in page and "step 3</figcaption>" in page and "Error on held-out pairs" in page
    assert "Winners' error by noise level" in page or "Winners&#39; error by noise level" in page
    capsys.readouterr()


def observer(world, tmp_path, held="held.parquet"):
    # no flip, no draw of the VAE: both sides of a pair are then treated alike
    plain = ["--data.flip=false", "--data.vae_sample=false", "--observe.held_out_pairs=6"]
    config = parse("p", arguments(world, tmp_path / "o", f"--observe.held_out={world / held}", *plain))
    opened = prepare(config, 0, 1, torch.device("cpu"))
    step_config = StepConfig.of(config)
    return Validation(config, opened.models, opened.models.encode_empty(), tmp_path / "o", 0), opened, step_config


def test_held_out_metrics_are_those_of_the_pairs(world, tmp_path):
    """At the reference everything is 0; turned labels turn the margin once the weights move."""
    values = {}
    for held in ("held.parquet", "turned.parquet"):
        looking, opened, step_config = observer(world, tmp_path / held, held)
        start = looking.held_out_metrics(step_config)
        assert start["held_out_implicit_accuracy"] == 0.5 and start["held_out_margin"] == 0
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in opened.models.policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        values[held] = looking.held_out_metrics(step_config)
        assert values[held] == looking.held_out_metrics(step_config)  # the same every time
        parts = [values[held].get(f"held_out_winner_delta_t{b}") for b in range(BUCKETS)]
        assert min(p for p in parts if p is not None) <= values[held]["held_out_winner_delta"]
        assert values[held]["held_out_winner_delta"] <= max(p for p in parts if p is not None)
    held, turned = values["held.parquet"], values["turned.parquet"]
    assert held["held_out_margin"] == pytest.approx(-turned["held_out_margin"], rel=1e-3) and held["held_out_margin"]
    assert held["held_out_winner_delta"] == pytest.approx(turned["held_out_loser_delta"], rel=1e-3)


@pytest.mark.parametrize("method", ["smpo", "dpo", "kto", "sft"])
def test_held_out_pairs_of_every_method(world, tmp_path, method):
    """Nothing of them is trained on: gradients are off, also where the loss has no kernel of its own."""
    looking, opened, step_config = observer(world, tmp_path / method, "held.parquet")
    before, graphs = [p.clone() for p in opened.models.weights.masters], set()
    opened.models.policy.register_forward_hook(lambda module, args, out: graphs.add(out[0].requires_grad))
    found = looking.held_out_metrics(replace(step_config, method=method))
    assert graphs == {False}
    assert found["held_out_winner_delta"] == 0 and (method == "sft") == ("held_out_margin" not in found)
    assert all(p.equal(own) for p, own in zip(opened.models.weights.masters, before, strict=True))


def test_deltas_by_level_are_means_over_their_pairs():
    metrics, bucket = MetricAccumulator(torch.device("cpu")), torch.tensor([0, 0, 2, 4])
    image = torch.zeros(8, 7)
    image[:, 3] = 1  # energy
    image[:, 0] = torch.tensor([1.0, 3, 5, 7, 20, 40, 60, 80])
    ones = torch.ones(4)
    metrics.add_micro_batch(
        loss=ones, logit=ones, image=image, tau_rms=torch.ones(8), bucket=bucket, sides=2, contrast=True
    )
    values = metrics.values()
    assert [values.get(f"winner_delta_t{b}") for b in range(5)] == [2, None, 5, None, 7]
    assert [values.get(f"loser_delta_t{b}") for b in range(5)] == [30, None, 60, None, 80]


def test_refusals(world, tmp_path):
    with pytest.raises(UserError, match="needs prompts"):
        prompts_of(parse("p", arguments(world, tmp_path, *LOOK)))
    config = parse("p", arguments(world, tmp_path, f"--observe.held_out={world / 'pairs.parquet'}"))
    with pytest.raises(UserError, match=r"held_out is data\.source"):
        prepare(config, 0, 1, torch.device("cpu"))


def test_strips_of_a_damaged_run_are_left_out(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000001.png").write_bytes(b"cut")
    assert "Pictures while training" not in write_report(tmp_path, None).read_text()


class Wandb:
    """Stands in for the package."""

    def __init__(self):
        self.inits, self.logs, self.finished = [], [], 0

    def init(self, **how):
        self.inits.append(how | {"words": list(sys.argv)})  # the package keeps the command line
        return self

    def log(self, values, step):
        self.logs.append((step, values))

    def finish(self):
        self.finished += 1

    class Image:
        def __init__(self, pixels):
            self.pixels = pixels


def test_wandb_gets_metrics_and_pictures_and_goes_on(tmp_path, monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    first = Tracker(tmp_path / "tensorboard", 0, "project", {"seed": 3})
    first.picture(1, np.zeros((4, 4, 3), np.uint8))
    first.write(1, {"loss": 0.5, "held_out_margin": 1.0})
    first.close()
    Tracker(tmp_path / "tensorboard", 1, "project").close()
    Tracker(tmp_path / "tensorboard", 0, "project").close()
    ids = [how["id"] for how in stand_in.inits]
    assert ids[0] == ids[1] != ids[2] and stand_in.inits[0]["config"] == {"seed": 3} and stand_in.finished == 3
    assert stand_in.logs[1] == (1, {"loss/loss": 0.5, "held out/margin": 1.0})
    assert stand_in.logs[0][1]["images/fixed prompts"].pixels.shape == (4, 4, 3)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install inpo-fast\[trackers\]"):
        Tracker(tmp_path / "tensorboard", 0, "project")


def test_wandb_gets_no_secret_of_an_address(tmp_path, monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    words = ["train", "--data.source=https://me:hunter2hunter2@host/p.parquet?token=4711"]
    monkeypatch.setattr(sys, "argv", words)
    config = {"data": {"source": words[1].partition("=")[2]}}
    Tracker(tmp_path / "tensorboard", 0, "project", config).close()
    (how,) = stand_in.inits
    assert how["config"]["data"]["source"] == "https://***@host/p.parquet?token=***" and how["words"][0] == "train"
    assert how["words"][1] == "--data.source=https://***@host/p.parquet?token=***" and sys.argv is words


def test_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    source = "https://me:hunter2hunter2@host/p.parquet"
    monkeypatch.setattr(sys, "argv", ["train", f"--data.source={source}"])
    tracker = Tracker(tmp_path / "tensorboard", 0, "project", {"seed": 3, "source": source})
    tracker.picture(1, np.zeros((4, 4, 3), np.uint8))
    tracker.write(1, {"loss": 0.5})
    tracker.close()
    assert list(Path(tmp_path).glob("wandb/offline-run-*/*.wandb"))
    assert not [p for p in Path(tmp_path).rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]
