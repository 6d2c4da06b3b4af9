"""Prompts to pictures with diffusers' own pipeline.

A picture's initial noise depends on its key only, whatever the model or the batch: models are compared on the same.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline

from inpo_fast.models.families import denoiser_of
from inpo_fast.models.loading import load_pipeline, load_vae, open_network
from inpo_fast.models.peak_memory import one_by_one
from inpo_fast.runtime import keyed_rng, watch
from inpo_fast.runtime.memory import PICTURES, fits, sizes_of
from inpo_fast.runtime.progress import picture_progress


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    keys: Sequence[keyed_rng.Key],
    *,
    steps: int,
    guidance: float,
    batch: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> list[np.ndarray]:
    """One (H, W, 3) uint8 picture for each prompt.

    keys: one each; equal keys give equal initial noise, whatever the model or the batch.
    advance: called with the number of pictures after each batch (for a progress bar).

    The VAE decodes one picture at a time: 16 of SDXL's would take 24 GiB in bf16, 48 in fp32, and one is little work
    beside the network's. Where memory does not suffice, the batch is halved, for this pipeline once and for all.
    """
    denoiser = denoiser_of(pipeline)
    network, shape = denoiser.module(pipeline), denoiser.latent_shape(denoiser.native_side)
    pipeline.set_progress_bar_config(disable=True)
    pictures, sizes = [], sizes_of(pipeline)

    def some() -> np.ndarray:
        size = min(sizes.of(PICTURES, batch), len(prompts) - len(pictures))
        part = slice(len(pictures), len(pictures) + size)
        noise = keyed_rng.normals(shape, list(keys[part]))
        with fits(PICTURES, size), _decoding(pipeline.vae):
            return pipeline(
                list(prompts[part]),
                latents=denoiser.pipeline_latents(noise.to(network.device, network.dtype)),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="np",
            ).images

    while len(pictures) < len(prompts):
        images = sizes.fitting(some)
        pictures += [np.round(image * 255).astype(np.uint8) for image in images]
        advance(len(images))
        watch.progress()
    return pictures


@contextmanager
def _decoding(vae: torch.nn.Module):
    """One picture at a time, in the VAE's own dtype: beside an fp16 UNet it may be fp32 (models.py), and a pipeline
    that raised SDXL's from fp16 to fp32 does not lower it again where it fails."""
    dtype, first = vae.dtype, vae.post_quant_conv or vae.decoder
    hook = first.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(vae.dtype), *inputs[1:]))
    try:
        with one_by_one(vae):
            yield
    finally:
        hook.remove()
        if vae.dtype != dtype:
            vae.to(dtype)


def open_base(
    key: str, place: str, dtype: torch.dtype, single_file_config: str | None, vae_key: str, vae: str | None
) -> DiffusionPipeline:
    """The pipeline that models are compared in. key, vae_key: the settings that named it and another VAE."""
    pipeline = load_pipeline(place, dtype, single_file_config, key=key)
    if vae:
        pipeline.vae = load_vae(vae, pipeline, key=vae_key).to(dtype)
    return pipeline


def use_deterministic_sampler(pipeline: DiffusionPipeline) -> None:
    """In the place of the pipeline's own: for DDPM-type models DDIM."""
    pipeline.scheduler = denoiser_of(pipeline).sampler(pipeline)


@contextmanager
def drawing_with(pipeline: DiffusionPipeline, network: torch.nn.Module):
    """Within the block the pipeline draws with this network and the deterministic sampler."""
    denoiser, scheduler = denoiser_of(pipeline), pipeline.scheduler
    own = denoiser.module(pipeline)
    try:
        denoiser.put(pipeline, network)
        use_deterministic_sampler(pipeline)
        yield pipeline
    finally:
        denoiser.put(pipeline, own)
        pipeline.scheduler = scheduler


def draw_both(
    pipeline: DiffusionPipeline, network: torch.nn.Module, prompts: Sequence[str], keys: Sequence[keyed_rng.Key], **how
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The pictures of the pipeline's own network and of another, from the same noise. how: as in `draw`."""
    use_deterministic_sampler(pipeline)
    with picture_progress(2 * len(prompts), "draw") as advance:
        before = draw(pipeline, prompts, keys, advance=lambda n: advance(n, "base"), **how)
        with drawing_with(pipeline, network):
            return before, draw(pipeline, prompts, keys, advance=lambda n: advance(n, "aligned"), **how)


@contextmanager
def scaled_eps(pipeline: DiffusionPipeline, scale: float):
    """Within the block the network's prediction is multiplied by `scale` (the negative control of an evaluation)."""

    def multiply(_module, _inputs, output):
        output[0].mul_(scale)
        return output

    handle = denoiser_of(pipeline).module(pipeline).register_forward_hook(multiply)
    try:
        yield pipeline
    finally:
        handle.remove()


@contextmanager
def aligned(pipeline: DiffusionPipeline, model: str):
    """Within the block the pipeline draws with another model: a LoRA, or anything whose network fits."""
    denoiser = denoiser_of(pipeline)
    own = denoiser.module(pipeline)
    denoiser.put(pipeline, open_network("--model", model, pipeline))
    try:
        yield pipeline
    finally:
        denoiser.put(pipeline, own)
