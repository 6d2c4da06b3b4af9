"""The traps that made others' trainers slow or wrong, one test each.

Elsewhere: strides at every convolution (test_fast_unet); weights changed in place are seen by compiled blocks, whose
gradients are held to float64 (test_compiled_blocks); waits of the host (test_syncs); the schedule in bf16
(test_inversion_schedule).
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_world import one_level, save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch


def test_policy_and_reference_take_the_same_matrix_product():
    """For a strided input F.linear calls mm where the weight wants a gradient and bmm where not, even without grad;
    1280 wide, as SDXL's proj_in, the two round differently in bf16, and step 0's logit is not 0 any more."""
    models = Models(tiny_xl(), torch.device("cpu"), ModelsConfig(precision="bf16"))
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(n, 1280, 4, 4, generator=generator).bfloat16() for n in (2, 80))
    tokens = image.permute(0, 2, 3, 1).reshape(2, 16, 1280)  # a view, as diffusers makes it
    weight = weight.flatten()[: 1280 * 1280].view(1280, 1280)
    flags = [next(unet.parameters()).requires_grad for unet in (models.policy, models.reference)]
    with torch.no_grad():
        policy, reference = (F.linear(tokens, weight.clone().requires_grad_(flag), weight[0]) for flag in flags)
    assert torch.equal(policy, reference)
    assert all(p.requires_grad for p in models.reference.parameters())


@pytest.mark.parametrize("fast", ["off", "fused", pytest.param("compiled", marks=pytest.mark.slow)])
def test_micro_batches_add_up(traced, tmp_path, fast):
    """Four accumulated micro-steps, one of four times the size, and pairs inverted and trained one by one at their own
    t give one gradient: sums in another order through five chained evaluations, 1e-4."""
    models = Models(one_level(tiny_pipeline()), torch.device("cpu"), ModelsConfig(base="x", fast=fast))
    with torch.no_grad():
        for i, p in enumerate(models.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.add_(0.05 * p.std().nan_to_num() * noise)
    source = open_source(save_pairs(tmp_path / "pairs.parquet"))
    items = next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 8))
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=500.0),
        inversion=InversionConfig(steps=5, batch=16),
        micro_batch=8,
        vae_sample=True,
        seed=0,
    )
    empty = models.encode_empty()

    def gradient(parts: list[list], micro_batch: int, batch: int) -> torch.Tensor:
        how = replace(step_config, micro_batch=micro_batch, inversion=replace(step_config.inversion, batch=batch))
        total = 0.0
        for part in parts:
            train_step(make_step_batch(part, models, how, empty), models, how, len(part), math.inf)
            total = total + torch.cat([g.reshape(-1) for g in models.weights.gradients]) * len(part) / len(items)
        return total

    whole = gradient([items], 8, 16)
    for parts, micro_batch, batch in (([items], 2, 16), ([items], 2, 3), ([[item] for item in items], 1, 1)):
        assert (gradient(parts, micro_batch, batch) - whole).norm() < 1e-4 * whole.norm()


def test_what_is_recomputed_has_no_adapter_either(tmp_path):
    """A step of the inversion that is refined by a gradient goes backwards through the reference, an adapter switched
    off; gradient checkpointing computes it again then, when it could be on again."""
    source = open_source(save_pairs(tmp_path / "pairs.parquet", rows=6))
    items = next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 2))
    found = []
    for checkpointing in (False, True):
        settings = ModelsConfig(base="x", lora=LoraSettings(2), gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        models = Models(one_level(tiny_pipeline()), torch.device("cpu"), settings)
        with torch.no_grad():  # an adapter that does something
            for p in models.parameters():
                p.add_(0.1)
        models.weights.refresh()
        step_config = StepConfig(
            method="inpo",
            objective=ObjectiveConfig(beta=500.0),
            inversion=InversionConfig(steps=3, batch=4, model="reference", estimator="gradient"),
            micro_batch=2,
            vae_sample=True,
            seed=0,
        )
        batch = make_step_batch(items, models, step_config, models.encode_empty())
        found.append(noisy_latents(batch, models, step_config)[0])
    assert torch.equal(*found)
