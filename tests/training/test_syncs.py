"""Nothing in a step makes the host wait for the device, but the one read of the metrics.

On the meta device nothing has a value: whatever reads one fails, and every copy between host and device is seen. The
parts that look whether a tensor is on a GPU take meta for one, so that the kernels' own path is walked (their fake
implementations). `-m gpu` asks CUDA itself.
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny_world import one_level, save_pairs, tiny_pipeline, tiny_xl
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

INVERSION = InversionConfig(steps=2, batch=3)  # batches that are not full
STEP_CONFIG = StepConfig(
    method="inpo", objective=ObjectiveConfig(beta=500.0), inversion=INVERSION, micro_batch=2, vae_sample=True, seed=0
)
PARTS = replace(STEP_CONFIG, micro_batch=1)
KINDS = {
    "dpo": replace(STEP_CONFIG, method="dpo"),
    "sft": replace(STEP_CONFIG, method="sft"),
    "kto": replace(STEP_CONFIG, method="kto"),
    "smpo, renoise": replace(STEP_CONFIG, method="smpo", inversion=replace(INVERSION, estimator="renoise")),
    "inpo, guided, noisy, rms, winner preserving": replace(
        PARTS,
        inversion=replace(INVERSION, guidance=5.0, eta=0.1),
        objective=ObjectiveConfig(tau_norm="rms", winner_preserving=0.9),
    ),
}


class Copies(TorchDispatchMode):
    """Counts copies between host and device for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            blocking = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.device.type != target.device.type and blocking and source.numel() > 1:
                self.waiting.append(f"{name} {tuple(source.shape)} {source.dtype}")
        if name == "convolution" and any(x.is_contiguous(memory_format=torch.channels_last) for x in args[:2]):
            return out.contiguous(memory_format=torch.channels_last)  # as on a GPU; meta answers in NCHW
        return out


@pytest.fixture
def meta_is_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    source = open_source(save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet"))
    return next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 2))


def one_step(models: Models, items: list, step_config: StepConfig, optimizer):
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    metrics, _ = train_step(step_batch, models, step_config, len(items), clip=math.inf)
    optimizer.step()
    models.weights.refresh()
    return metrics


@pytest.mark.parametrize(
    ("step_config", "pipeline", "config"),
    [
        *((step_config, lambda: one_level(tiny_pipeline()), ModelsConfig()) for step_config in KINDS.values()),
        (PARTS, lambda: one_level(tiny_xl()), ModelsConfig(precision="bf16", fast="fused")),
        (STEP_CONFIG, lambda: one_level(tiny_pipeline()), ModelsConfig(precision="bf16", lora=LoraSettings(4))),
    ],
    ids=[*KINDS, "sdxl bf16 fused", "bf16 lora"],
)
def test_a_step_waits_for_nothing(meta_is_cuda, items, step_config, pipeline, config):
    models = Models(pipeline(), torch.device("meta"), config)
    optimizer = torch.optim.SGD(models.parameters())
    with Copies() as copies:
        metrics = one_step(models, items, step_config, optimizer)
    assert copies.waiting == []
    with pytest.raises(NotImplementedError, match="meta"):  # the one read, left to the caller
        metrics.values()


def test_the_count_sees_a_wait(meta_is_cuda):
    with Copies() as copies:
        torch.zeros(3).to("meta")
        torch.zeros(3, device="meta").copy_(torch.zeros(3))
        torch.zeros(3).to("meta", non_blocking=True)
    assert len(copies.waiting) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("step_config", KINDS.values(), ids=KINDS)
def test_cuda_sees_no_wait(items, step_config):
    models = Models(tiny_pipeline(), torch.device("cuda"), ModelsConfig(precision="bf16", fast="fused"))
    optimizer = torch.optim.AdamW(models.parameters(), fused=True)
    one_step(models, items, step_config, optimizer)  # allocations and library handles of a first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(models, items, step_config, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
