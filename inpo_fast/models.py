"""A diffusers folder or hub id becomes a policy, a frozen reference, a VAE and text encoders."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging

from inpo_fast.refusal import Refusal
from inpo_fast.schedule import Schedule


@dataclass(frozen=True)
class ModelsConfig:
    """Which model is aligned. fp32; policy and reference start from the same weights."""

    base: str = ""
    """A Stable Diffusion 1.x / 2.x-base or XL folder in diffusers layout, or a hub id."""


@dataclass(frozen=True)
class Text:
    """Embeddings of unique prompts. hidden: (U, L, C); pooled: (U, D), SDXL only."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about each image of a window.

    row: (M,) int64 into text; time_ids: (M, 6) of SDXL (original height, width, crop top, left, target height,
    width), else None.
    """

    text: Text
    row: torch.Tensor
    time_ids: torch.Tensor | None = None

    def arguments(self, images: torch.Tensor) -> dict:
        """Keyword arguments of the UNet for the given images (B,) of the window."""
        rows = self.row[images]
        out = {"encoder_hidden_states": self.text.hidden[rows]}
        if self.text.pooled is not None:
            out["added_cond_kwargs"] = {"text_embeds": self.text.pooled[rows], "time_ids": self.time_ids[images]}
        return out


def load_pipeline(base: str) -> DiffusionPipeline:
    """The stock pipeline of a model, fp32, without safety checker. Refusal when it cannot be opened."""
    if not base:
        raise Refusal("models.base is empty; give a diffusers folder or a hub id")
    if os.path.sep in base and not base.count(os.path.sep) == 1 and not os.path.isdir(base):
        raise Refusal(f"models.base: no such folder: {base}")
    options = {} if not os.path.isdir(base) else {"local_files_only": True}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            base, dtype=torch.float32, safety_checker=None, requires_safety_checker=False, **options
        )
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise Refusal(f"models.base: cannot open {base!r} as a diffusers model ({reason})") from problem
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        raise Refusal(
            f"models.base: {base} is a {type(pipeline).__name__}; only models with a UNet2DConditionModel "
            "(Stable Diffusion 1.x, 2.x, XL) can be aligned"
        )
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise Refusal(f"models.base: {base} predicts {kind!r}; only epsilon models can be aligned")
    return pipeline


class Models:
    """The policy (trained) and everything frozen around it."""

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device):
        self.pipeline = pipeline.to(device)
        self.device = device
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.reference = pipeline.unet
        # eval() throughout: these UNets have no dropout, and policy and reference must run the same kernels
        self.policy = copy.deepcopy(pipeline.unet).requires_grad_(True)
        self.vae = pipeline.vae
        self.schedule = Schedule.of(pipeline.scheduler)
        self.is_xl = self.reference.config.addition_embed_type == "text_time"
        self.resolution = self.reference.config.sample_size * pipeline.vae_scale_factor

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w). noise: standard normal like the latents
        for a posterior sample, None for its mean."""
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Embeddings of (unique) prompts, by the pipeline's own method."""
        out = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Text(out[0], out[2]) if self.is_xl else Text(out[0])

    @torch.no_grad()
    def encode_empty(self) -> Text:
        """The unconditional embedding that the model's pipeline guides away from, (1, L, C)."""
        empty = self.encode_prompts([""])
        if self.is_xl and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return Text(torch.zeros_like(empty.hidden), torch.zeros_like(empty.pooled))
        return empty

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.policy.parameters())


def quiet_libraries() -> None:
    """Their progress bars and notices would tear ours."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
