"""Views of images to latents, in batches of one size."""

import numpy as np
import torch

from inpo_fast.data.images import View
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng, watch
from inpo_fast.runtime.memory import fits
from inpo_fast.runtime.transfer import to_device


@torch.no_grad()
def encode_views(
    views: list[View], keys: list[keyed_rng.Key], models: Models, vae_sample: bool, batch: int | None = None
) -> list[torch.Tensor]:
    """Latents of the views, fp32 on the device, in batches (B, C, h, w). batch: None for models.vae_batch.

    The VAE always sees a batch of one size, the last one filled up: kernels are chosen by size, so an image would
    otherwise be rounded by how many came with it, and a cache of latents would not hold the bits of a run without it.
    TooLarge where not even the VAE fits.
    """
    if not views:
        return []
    latents, chunk = [], batch or models.vae_batch(views[0].pixels.shape[0])
    for lo in range(0, len(views), chunk):
        part = views[lo : lo + chunk]
        filled = [*range(lo, lo + len(part)), *[lo] * (chunk - len(part))]
        pixels = torch.from_numpy(np.stack([views[i].pixels for i in filled]))
        shape = models.latent_shape(pixels.shape[1])
        noise = keyed_rng.normals(shape, [("vae", *keys[i]) for i in filled]) if vae_sample else None
        with fits("data.vae_batch", chunk):
            pixels = to_device(pixels, models.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            encoded = models.encode_images(pixels, None if noise is None else to_device(noise, models.device))
        latents.append(encoded[: len(part)])
        watch.progress()
    return latents
