"""The loop where numbers or memory run short: fp16's loss scale, a full GPU; both leave an exact run."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_runs import metrics, policy, save_recipe, train_in

from inpo_fast import train
from inpo_fast.optim import LossScale
from inpo_fast.refusal import Refusal


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
    monkeypatch.setattr(train, "LossScale", lambda: LossScale(value=2.0**20))
    first = run("fp16", "--models.precision=fp16", "--train.steps=12")
    lines = metrics(first)
    scales = [line["loss_scale"] for line in lines]
    left_out = [line["grad_norm"] is None for line in lines]  # not finite
    assert left_out[0] and not left_out[-1] and scales[0] == 2.0**20
    for before, after, skipped in zip(scales, scales[1:], left_out, strict=False):
        assert after == (before / 2 if skipped else before)
    start = dict(UNet2DConditionModel.from_pretrained(world / "model" / "unet").named_parameters())
    first_good = left_out.index(False)
    moved = policy(first, 12)["conv_out.weight"]
    assert first_good > 2 and not torch.equal(moved, start["conv_out.weight"])

    again = run("fp16-again", "--models.precision=fp16", "--train.steps=12", "--train.checkpoint_every=6")
    removed = again / "checkpoints" / "step-0012"
    for file in removed.iterdir():
        file.unlink()
    removed.rmdir()
    again = run("fp16-again", "--models.precision=fp16", "--train.steps=12", "--train.checkpoint_every=6", "--resume")
    assert [line["loss_scale"] for line in metrics(again)] == scales
    resumed = policy(again, 12)
    for name, value in policy(first, 12).items():
        assert torch.equal(resumed[name], value)


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


def test_a_gpu_that_holds_not_one_pair_is_refused(run, monkeypatch):
    def full(self, x, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    with pytest.raises(Refusal, match=r"out of memory at inversion\.batch=1; take models\.gradient_checkpointing"):
        run("none")
