"""The table of model families, and that the rooms above ask a family and not its network's configuration."""

import re
from pathlib import Path
from typing import get_args

import diffusers
import pytest
import torch
from tiny_world import tiny_pipeline, tiny_xl

import inpo_fast
from inpo_fast.models.config import Architecture, LoraSettings
from inpo_fast.models.denoiser import Text
from inpo_fast.models.families import ARCHITECTURES, FAMILIES, PIPELINES, PUBLISHED, denoiser_in, denoiser_of
from inpo_fast.models.models import Models
from inpo_fast.models.random_weights import random_pipeline

ROOT = Path(inpo_fast.__file__).parent
MAKE = {"sd": tiny_pipeline, "xl": tiny_xl}
ASKS = re.compile(
    r"\bis_xl\b|addition_embed_type|\bsample_size\b|\bin_channels\b|cross_attention_dim|added_cond_kwargs|time_ids"
    r"|force_zeros_for_empty_prompt|\btext_encoder_2\b|\.unet\b|UNet2DConditionModel"
)


def test_nothing_outside_asks_what_a_model_is():
    """models/ is the family's own room, and pocket/ makes a model."""
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("models", "pocket")]
    assert len(files) > 50 and ASKS.search("if models.is_xl:")
    lines = [(path.name, line.strip()) for path in files for line in path.read_text().splitlines() if ASKS.search(line)]
    assert lines == []


@pytest.mark.parametrize("name", PIPELINES)
def test_the_table_names_pipelines_of_diffusers(name):
    modules, _ = getattr(diffusers, name)._get_signature_keys(getattr(diffusers, name))
    assert PIPELINES[name].part in modules
    assert hasattr(diffusers, PIPELINES[name].network_class)


def test_what_the_settings_name_is_a_familys():
    assert set(ARCHITECTURES) == set(get_args(Architecture)) == set(PUBLISHED.values())
    assert LoraSettings().targets in {family.lora_targets for family in FAMILIES}


@pytest.mark.parametrize("kind", MAKE)
def test_a_family_is_told_from_pipeline_network_and_folder(kind, tmp_path):
    pipeline = MAKE[kind]()
    pipeline.save_pretrained(tmp_path)
    for denoiser in (denoiser_of(pipeline), denoiser_of(pipeline.unet), denoiser_in(tmp_path)):
        assert denoiser.is_xl == (kind == "xl") and denoiser.native_side == 8
    assert denoiser.module(pipeline) is pipeline.unet
    denoiser.put(pipeline, other := denoiser.build(denoiser.config))
    assert pipeline.unet is other and denoiser_in(tmp_path / "unet") is None


@pytest.mark.parametrize("kind", MAKE)
def test_slots_agree_with_the_network(kind):
    """Shapes and arguments that the slots promise are what the network takes and gives, real and on the meta device."""
    models = Models(MAKE[kind](), torch.device("cpu"))
    denoiser, text = models.denoiser, models.encode_prompts(["a", "b"])
    assert tuple(text.tensors) == denoiser.text_names and text.hidden.shape[-1] == denoiser.text_width
    pixels = torch.zeros(2, 3, models.resolution, models.resolution)
    latents = models.encode_images(pixels, None)
    assert tuple(latents.shape[1:]) == models.latent_shape(models.resolution)
    sizes = models.sizes([((48, 32), (8, 0)), ((32, 32), (0, 0))], latents.shape[-1])
    conditioning = models.conditioning(text, torch.tensor([0, 1]), sizes)
    with torch.no_grad():
        output = models.predict("policy", latents, torch.tensor([5, 900]), conditioning.arguments(torch.tensor([0, 1])))
    assert output.shape == latents.shape
    assert denoiser.takes_sizes == (sizes is not None) == (kind == "xl")
    on_meta = denoiser.build(denoiser.config).to("meta")
    assert denoiser.meta_pass(on_meta, 8, text.hidden.shape[1]).shape == (1, *denoiser.latent_shape(8))


def test_texts_are_cut_and_joined_by_name():
    text = Text(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0).view(3, 1))
    again = Text.cat([text[:1], text[1:]])
    assert all(torch.equal(again.tensors[name], x) for name, x in text.tensors.items())
    assert not text.zeros_like().pooled.any() and tuple(Text(text.hidden).tensors) == ("hidden",)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_random_pipeline_is_one_of_the_table(name):
    with torch.device("meta"):
        pipeline = random_pipeline(name)
    assert type(pipeline).__name__ in PIPELINES
    assert [type(e).__name__ for e in denoiser_of(pipeline).encoders(pipeline)] == [
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ][: 1 + (name == "sdxl")]
