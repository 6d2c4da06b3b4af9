"""Loading, encoding and one step of SD- and SDXL-layout models held against the diffusers pipelines themselves."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import save_pairs, save_tiny_model, tiny_pipeline, tiny_xl

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.loading import load_pipeline
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

STEP_CONFIG = StepConfig(
    method="inpo",
    objective=ObjectiveConfig(),
    inversion=InversionConfig(steps=3),
    micro_batch=2,
    vae_sample=True,
    seed=0,
)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    tiny_xl().save_pretrained(folder / "model")
    loader = PairLoader(
        open_source(save_pairs(folder / "pairs.parquet")),
        DataConfig(flip=False),
        resolution=32,
        seed=0,
        rank=0,
        world=1,
    )
    return Models(load_pipeline(str(folder / "model")), torch.device("cpu")), next(loader.steps(0, 1, 4))


def test_xl_trains_from_exactly_ln_2(xl):
    models, items = xl
    step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
    metrics, logits = train_step(step_batch, models, STEP_CONFIG, len(items), clip=math.inf)
    assert models.denoiser.is_xl and torch.equal(logits, torch.zeros(4))
    assert metrics.values()["grad_norm"] > 0


def test_xl_is_told_the_true_size_and_crop(xl):
    models, items = xl
    views = [replace(items[0].winner, original=(48, 32), crop=(8, 0)), items[0].loser]
    step_batch = make_step_batch([replace(items[0], winner=views[0])], models, STEP_CONFIG, models.encode_empty())
    assert step_batch.conditional.sizes.tolist() == [[48, 32, 8, 0, 32, 32], [32, 32, 0, 0, 32, 32]]


def test_xl_conditioning_equals_the_pipelines(xl):
    """The pipeline's own denoising call, intercepted, against ours for the same prompt."""
    models, items = xl
    seen = {}

    def record(_module, args, kwargs):
        seen.update(kwargs)

    handle = models.reference.register_forward_pre_hook(record, with_kwargs=True)
    models.pipeline.set_progress_bar_config(disable=True)
    models.pipeline(
        items[0].prompt, num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=32, width=32
    )
    handle.remove()
    step_batch = make_step_batch(items[:1], models, STEP_CONFIG, models.encode_empty())
    ours = step_batch.conditional.arguments(torch.tensor([0]))
    torch.testing.assert_close(ours["encoder_hidden_states"], seen["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(ours["added_cond_kwargs"][name], seen["added_cond_kwargs"][name].float())


def test_latents_are_the_vaes_scaled_mean_or_sample(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vae.register_to_config(scaling_factor=0.5)
    models = Models(pipeline, torch.device("cpu"))
    x = torch.randn(2, 3, 32, 32)
    posterior = models.vae.encode(x).latent_dist
    assert torch.equal(models.encode_images(x, None), posterior.mean * 0.5)
    noise = torch.randn_like(posterior.mean)
    assert torch.equal(models.encode_images(x, noise), (posterior.mean + posterior.std * noise) * 0.5)


def test_policy_and_reference_are_two_models_with_equal_weights(tmp_path):
    models = Models(load_pipeline(save_tiny_model(tmp_path)), torch.device("cpu"))
    # the flag stays: torch chooses matrix products by it (test_traps.py); nobody asks for these gradients
    assert all(p.requires_grad for p in models.reference.parameters())
    assert all(p.requires_grad for p in models.policy.parameters())
    for p, r in zip(models.parameters(), models.reference.parameters(), strict=True):
        assert torch.equal(p, r) and p.data_ptr() != r.data_ptr()


def test_models_that_cannot_be_aligned_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_pipeline(str(tmp_path / "a" / "b"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        load_pipeline(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"models\.base is empty"):
        load_pipeline("")
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")
    pipeline.save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match="predicts 'sample'"):
        load_pipeline(str(tmp_path / "x"))
