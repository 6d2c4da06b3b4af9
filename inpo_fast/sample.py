"""Prompts to pictures with the stock diffusers pipeline; the noise of a picture depends on its key only."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from inpo_fast import draws


@torch.inference_mode()
def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    keys: Sequence[draws.Key],
    *,
    steps: int,
    guidance: float,
    batch: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> list[np.ndarray]:
    """One (H, W, 3) uint8 picture for each prompt.

    keys: one each; equal keys give equal initial noise, whatever the model or the batch.
    advance: called with the number of pictures after each batch (for a progress bar).
    """
    unet = pipeline.unet
    side = unet.config.sample_size
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for lo in range(0, len(prompts), batch):
        noise = draws.normals((unet.config.in_channels, side, side), list(keys[lo : lo + batch]))
        images = pipeline(
            list(prompts[lo : lo + batch]),
            latents=noise.to(unet.device, unet.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).images
        pictures += [np.round(image * 255).astype(np.uint8) for image in images]
        advance(len(images))
    return pictures


def use_ddim(pipeline: DiffusionPipeline) -> None:
    """Swap in the deterministic DDIM sampler with the model's own noise schedule."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


@contextmanager
def scaled_eps(pipeline: DiffusionPipeline, scale: float):
    """Within the block the UNet's prediction is multiplied by `scale` (the control row of an evaluation)."""

    def multiply(_module, _inputs, output):
        output[0].mul_(scale)
        return output

    handle = pipeline.unet.register_forward_hook(multiply)
    try:
        yield pipeline
    finally:
        handle.remove()
