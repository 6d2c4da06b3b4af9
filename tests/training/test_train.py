"""The command line held against its promises: outputs, methods, and refusals that leave nothing behind."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_runs import run_command, save_recipe, train_in

from inpo_fast.runtime.errors import UserError
from inpo_fast.training import saved_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_recipe(folder, optim={"average": "last-half"})
    return folder


@pytest.fixture(scope="module")
def whole(world):
    """An uninterrupted run of one process."""
    return train_in(world, "whole", curves=True)


def weights(out: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return saved_checkpoint.read(out / "checkpoints" / f"step-{step:04d}")


def test_outputs_have_their_fixed_names_and_diffusers_opens_the_model(whole):
    assert {p.name for p in whole.iterdir()} >= {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "report.html",
    }
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and lines[0]["margin"] == 0
    assert lines[-1]["margin"] != 0
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["variant"] == "inpo" and manifest["data"] | {"source": 0} == {
        "source": 0,
        "pairs": 42,
        "ties_left_out": 6,
        "left_out_by_filters": {},
        "weighted_by_filters": 0,
        "order": {"shuffle": "full"},
        "dropped": [],
    }
    assert "Curve of Loss" in (whole / "report.html").read_text()
    pipeline = StableDiffusionPipeline.from_pretrained(whole / "model", safety_checker=None)
    average = {k.removeprefix("average/"): v for k, v in weights(whole).items() if k.startswith("average/")}
    for name, parameter in pipeline.unet.named_parameters():
        assert torch.equal(parameter, average[name])  # the output model is the averaged one
    policy = {k.removeprefix("policy/"): v for k, v in weights(whole).items() if k.startswith("policy/")}
    base = StableDiffusionPipeline.from_pretrained(whole.parent / "model", safety_checker=None).unet.state_dict()
    moved = "conv_out.weight"
    assert not torch.equal(average[moved], policy[moved]) and not torch.equal(average[moved], base[moved])
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-0002", "step-0004"]


@pytest.mark.parametrize("method", ["dpo", "kto", "smpo"])
def test_other_methods_run(world, method):
    extra = ["--inversion.estimator=renoise"] if method == "smpo" else []
    out = train_in(world, method, f"--method={method}", "--train.steps=2", *extra)
    assert json.loads((out / "manifest.json").read_text())["variant"] == method


def test_sft_then_inpo(world):
    """The recipe of docs/methods.md: the second run's policy and reference are the first one's model."""
    first = train_in(world, "sft", "--method=sft", "--train.steps=2")
    second = train_in(world, "sft-inpo", f"--models.init={first / 'model'}", "--train.steps=2")
    assert [json.loads((run / "manifest.json").read_text())["variant"] for run in (first, second)] == ["sft", "inpo"]
    start = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6) and start["winner_delta"] == 0  # one model, twice
    unets = [
        StableDiffusionPipeline.from_pretrained(run / "model", safety_checker=None).unet for run in (first, second)
    ]
    base = StableDiffusionPipeline.from_pretrained(world / "model", safety_checker=None).unet
    sft, both, own = (unet.conv_out.weight for unet in (*unets, base))
    assert 0 < (both - sft).norm() < (both - own).norm() and (sft - own).norm() > 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--train.pairs_per_step=5"], ["micro_batch=2", "divisor"]),
        (["--data.source=nowhere.parquet"], ["data.source", "nowhere.parquet"]),
        (["--models.base=./no/such/model"], ["models.base", "no such folder"]),
        (["--optim.learning_rate=1"], ["optim.learning_rate", "did you mean"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(world, extra, words):
    with pytest.raises(UserError) as refusal:
        train_in(world, "refused", *extra)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value) and not (world / "refused").exists()


def test_a_taken_folder_is_refused_and_left_alone(world, whole):
    before = (whole / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"--resume.*--overwrite"):
        train_in(world, "whole")
    with pytest.raises(UserError, match=r"optim\.lr"):
        train_in(world, "whole", "--resume", "--optim.lr=1")
    assert (whole / "manifest.json").read_bytes() == before


def test_refusal_is_one_line_and_a_non_zero_exit(capsys):
    with pytest.raises(SystemExit) as end:
        run_command("inpo_fast.train", "--optim.lrr=1")
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "inpo_fast.train: unknown key 'optim.lrr'; did you mean 'optim.lr'? (--help lists all)"
    ]


def test_a_loss_that_is_not_finite_stops_with_step_and_pairs(world, monkeypatch):
    from inpo_fast.models.models import Models

    encode, calls = Models.encode_images, []

    def poisoned(self, pixels, noise):
        latents = encode(self, pixels, noise)
        calls.append(1)
        if len(calls) == 2:  # second step, second pair's winner
            latents[2] = float("nan")
        return latents

    monkeypatch.setattr(Models, "encode_images", poisoned)
    with pytest.raises(UserError, match=r"step 1: .*not finite \(pairs pairs.parquet:\d+:\d+\)"):
        train_in(world, "nan")
    assert not (world / "nan" / "model").exists()
