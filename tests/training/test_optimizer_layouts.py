"""Every optimizer with every way that parameters lie in memory: fast path, precision, adapters, and continued."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_runs import metrics, same_bits, save_recipe, train_in
from tiny_world import one_level, tiny_pipeline

from inpo_fast.config.run import OptimConfig
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.training.checkpoint import Checkpoints, State, load
from inpo_fast.training.optim import make_optimizer

KINDS = ("adamw", "adamw-bf16", "adamw-8bit", "adafactor")
CPU = torch.device("cpu")
CASES = [
    pytest.param(kind, precision, rank, marks=() if (precision, rank) == ("bf16", 0) else pytest.mark.slow)
    for kind in KINDS
    for precision in ("fp32", "bf16", "fp16")
    for rank in (0, 4)
]


@pytest.fixture(scope="module")
def pipeline():
    return one_level(tiny_pipeline(), width=24)  # some of its tensors are large enough for 8-bit moments


def opened(pipeline, fast: str, precision: str, rank: int) -> Models:
    config = ModelsConfig(base="x", fast=fast, precision=precision)
    pipeline = type(pipeline)(**{**pipeline.components, "unet": copied(pipeline.unet)})
    return Models(pipeline, CPU, replace(config, lora=replace(config.lora, rank=rank)))


def copied(unet):
    other = type(unet).from_config(unet.config)
    other.load_state_dict(unet.state_dict())
    return other


def step(models: Models, optimizer, number: int) -> None:
    """With a gradient that is a function of the step and the parameter, element by element."""
    models.weights.zero()
    for i, total in enumerate(models.weights.sums):
        noise = torch.Generator().manual_seed(1000 * number + i)
        total.copy_(torch.randn(total.shape, generator=noise))
    models.weights.reduce()
    optimizer.step()
    models.weights.refresh()


def values(models: Models) -> dict[str, torch.Tensor]:
    return {
        name: master.detach().clone() for name, master in zip(models.weights.names, models.weights.masters, strict=True)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "precision", "rank"), CASES)
def test_every_optimizer_with_every_layout(pipeline, kind, precision, rank, tmp_path):
    """Two steps, and one that was saved and continued: the same bits, with the layout that the model has; and with
    models.fast=fused those of models.fast=off (adamw-bf16 numbers its random bits as elements lie in memory)."""
    ends = {}
    for fast in ("off", "fused"):
        models = opened(pipeline, fast, precision, rank)
        layout = [master.stride() for master in models.weights.masters]
        optimizer = make_optimizer(models.parameters(), OptimConfig(kind=kind, lr=1e-2), seed=1)
        step(models, optimizer, 0)
        place = Checkpoints(tmp_path / fast, keep=1).save(State(1, 0.0, []), models.weights, optimizer, None, wait=True)
        step(models, optimizer, 1)
        end = ends[fast] = values(models)
        assert [master.stride() for master in models.weights.masters] == layout
        for master, working in zip(models.weights.masters, models.weights.working, strict=True):
            assert master.stride() == working.stride() and torch.equal(master.to(working.dtype), working)
        again = opened(pipeline, fast, precision, rank)
        optimizer = make_optimizer(again.parameters(), OptimConfig(kind=kind, lr=1e-2), seed=1)
        load(place, again.weights, optimizer, None)
        step(again, optimizer, 1)
        assert all(torch.equal(end[name], value) for name, value in values(again).items())
    assert not rank or ends["off"].keys() == ends["fused"].keys()
    if kind != "adamw-bf16" and not rank:  # an adapter begins at random
        for name, value in ends["off"].items():
            torch.testing.assert_close(ends["fused"][name], value, rtol=1e-6, atol=1e-7)
    if not rank and precision != "fp32":
        assert any(not master.is_contiguous() for master in models.weights.masters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["adamw-8bit", pytest.param("adamw-bf16", marks=pytest.mark.slow)])
def test_a_run_with_narrow_moments_and_fused_modules(tmp_path, kind):
    """The trainer itself, continued."""
    save_recipe(tmp_path, train={"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 9})
    words = (f"--optim.kind={kind}", "--models.fast=fused", "--models.precision=bf16")
    whole = train_in(tmp_path, "whole", *words)
    assert len(metrics(whole)) == 2
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-0002")
    assert same_bits(train_in(tmp_path, "cut", *words, "--resume"), whole, 2)
