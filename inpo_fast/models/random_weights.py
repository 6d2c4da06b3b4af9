"""A published architecture with seeded random weights (models.random): for timings, memory, tests and dry runs."""

import contextlib

import torch
from diffusers import DiffusionPipeline

from inpo_fast.models.config import Architecture
from inpo_fast.models.families import ARCHITECTURES


def random_pipeline(
    name: Architecture,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | None = None,
) -> DiffusionPipeline:
    """The whole pipeline, on `device`, None: the current default device, the CPU. Drawn there: what takes a CPU half a
    minute is a moment of a GPU. Each kind of device has its own numbers for a seed. fp32 weights are drawn as such;
    `dtype` is what they are drawn in."""
    family, before = ARCHITECTURES[name], torch.get_default_dtype()
    touched = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=touched), device or contextlib.nullcontext():
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            network, vae = family.make_network(name), family.make_vae(name)
            encoders = family.make_encoders(name)
        finally:
            torch.set_default_dtype(before)
    return family.assemble(network, vae, encoders)
