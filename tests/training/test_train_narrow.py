"""The loop where numbers or memory run short: fp16's loss scale, a full GPU; both leave an exact run."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_runs import metrics, policy, same_bits, save_recipe, train_in
from tiny_world import save_pairs

from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import loop, set_up
from inpo_fast.training.optim import LossScale


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_recipe(folder, objective={"beta": 50.0}, train={"micro_batch": 4}, optim={"lr": 1e-4})
    return folder


@pytest.fixture
def run(world):
    return lambda name, *extra: train_in(world, name, *extra)


def test_fp16_leaves_out_what_overflows_and_resumes_its_scale(run, world, monkeypatch):
    """A scale that is far too large: updates are left out and it is halved until the gradient is finite."""
    monkeypatch.setattr(set_up, "LossScale", lambda: LossScale(value=2.0**20))
    options = ("--models.precision=fp16", "--train.steps=8", "--train.keep_checkpoints=9")
    first = run("fp16", *options)
    lines = metrics(first)
    scales = [line["loss_scale"] for line in lines]
    left_out = [line["grad_norm"] is None for line in lines]  # not finite
    assert left_out[0] and not left_out[-1] and scales[0] == 2.0**20
    for before, after, skipped in zip(scales, scales[1:], left_out, strict=False):
        assert after == (before / 2 if skipped else before)
    start = dict(UNet2DConditionModel.from_pretrained(world / "model" / "unet").named_parameters())
    first_good = left_out.index(False)
    moved = policy(first, 8)["conv_out.weight"]
    assert first_good > 2 and not torch.equal(moved, start["conv_out.weight"])

    shutil.copytree(first, world / "fp16-again")
    for step in range(4, 9, 2):
        shutil.rmtree(world / "fp16-again" / "checkpoints" / f"step-{step:04d}")
    again = run("fp16-again", *options, "--resume")
    assert [line["loss_scale"] for line in metrics(again)] == scales and same_bits(again, first, 8)


def test_a_full_gpu_halves_the_batches_and_changes_nothing(run, monkeypatch, capsys):
    whole = run("whole")
    forward = UNet2DConditionModel.forward

    def crowded(self, x, *args, **kwargs):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", crowded)
    small = run("small")
    said = capsys.readouterr().out
    for line in ("inversion.batch is now 4", "inversion.batch is now 2", "train.micro_batch is now 1"):
        assert said.count(line) == 1, said
    halved = policy(small, 4)
    for name, value in policy(whole, 4).items():
        torch.testing.assert_close(halved[name], value, rtol=1e-3, atol=2e-5)


def crowd_the_vae(patch, limit: int) -> list[int]:
    """More than `limit` images do not fit; gives what was asked."""
    encode, asked = AutoencoderKL.encode, []

    def crowded(self, x, *args, **kwargs):
        if x.device.type == "meta":  # the count that the size comes from
            return encode(self, x, *args, **kwargs)
        asked.append(len(x))
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, x, *args, **kwargs)

    patch.setattr(AutoencoderKL, "encode", crowded)
    return asked


def test_a_vae_that_does_not_fit_takes_fewer_images_and_keeps_to_that(run, world, monkeypatch, capsys):
    """Halved in the window of the first step. The size stands in the checkpoints, so a resume has the same bits though
    by then there is room. From 16, which rounds otherwise than 8 and less on a CPU."""
    plain = run("roomy", "--data.vae_batch=16")
    with monkeypatch.context() as patch:
        crowd_the_vae(patch, 2)
        whole = run("crowded", "--data.vae_batch=16")
    said = capsys.readouterr().out
    for size in (8, 4, 2):
        assert said.count(f"warning: out of memory; data.vae_batch is now {size} on this process") == 1
    assert not same_bits(whole, plain, 4)
    roomy = policy(plain, 4)
    for name, value in policy(whole, 4).items():
        torch.testing.assert_close(value, roomy[name], rtol=1e-3, atol=2e-5)
    assert json.loads((whole / "checkpoints" / "step-0002" / "state.json").read_text())["lowered"] == {
        "data.vae_batch": 2
    }
    shutil.copytree(whole, world / "cut")
    shutil.rmtree(world / "cut" / "checkpoints" / "step-0004")
    with monkeypatch.context() as patch:
        asked = crowd_the_vae(patch, 99)
        resumed = run("cut", "--data.vae_batch=16", "--resume")
    assert set(asked) == {2} and same_bits(whole, resumed, 4)
    assert "out of memory" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        asked = crowd_the_vae(patch, 99)
        run("given", "--data.vae_batch=2", "--train.steps=2")
    assert set(asked) == {2} and same_bits(whole, world / "given", 2)
    shutil.rmtree(world / "cut" / "checkpoints" / "step-0004")
    with monkeypatch.context() as patch:
        asked = crowd_the_vae(patch, 99)
        run("cut", "--data.vae_batch=1", "--resume")
    assert set(asked) == {1}  # a smaller one that is asked for counts


def test_a_window_made_ahead_may_not_fit_either(run, monkeypatch, capsys):
    """The next step's pairs are encoded beside this one: none of them is lost."""
    encode, calls = Models.encode_images, []

    def crowded(self, x, noise):
        calls.append(len(x))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, x, noise)

    monkeypatch.setattr(Models, "encode_images", crowded)
    found = metrics(run("ahead"))
    assert calls[:4] == [8, 8, 4, 4] and len(found) == 4
    assert "data.vae_batch is now 4" in capsys.readouterr().out


def test_held_out_pairs_are_looked_at_with_less(run, world, monkeypatch, capsys):
    """Only there: the training's own batches are no larger than 2."""
    save_pairs(world / "held.parquet", rows=24)
    look = ["--train.micro_batch=4", "--inversion.batch=2", "--train.steps=2"]
    look += [f"--observe.held_out={world / 'held.parquet'}", "--observe.held_out_pairs=4"]
    plain = metrics(run("looks", *look))
    forward = UNet2DConditionModel.forward

    def crowded(self, x, *args, **kwargs):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, *args, **kwargs)

    held, found = loop.Validation.held_out_metrics, []

    def looking(self, recipe):
        found.append(recipe.micro_batch)
        with monkeypatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "forward", crowded)
            return held(self, recipe)

    monkeypatch.setattr(loop.Validation, "held_out_metrics", looking)
    looked = metrics(run("looks-crowded", *look))
    said = capsys.readouterr().out
    assert found == [4, 4, 4] and said.count("held-out pairs now come in batches of 2") == 1
    assert "train.micro_batch" not in said  # what is trained on needs more, and fitted
    for name in ("held_out_margin", "held_out_winner_delta"):
        assert looked[-1][name] == pytest.approx(plain[-1][name], rel=1e-2, abs=1e-4)


def test_a_gpu_that_holds_not_one_image_is_refused(run, monkeypatch):
    crowd_the_vae(monkeypatch, 0)
    with pytest.raises(UserError, match=r"out of memory at data\.vae_batch=1; take models\.gradient_checkpointing"):
        run("no-image")


def test_a_gpu_that_holds_not_one_pair_is_refused(run, monkeypatch):
    def full(self, x, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    with pytest.raises(UserError, match=r"out of memory at inversion\.batch=1; take models\.gradient_checkpointing"):
        run("none")
