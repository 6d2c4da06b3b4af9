"""Which model is aligned, and in what numbers it computes: the settings, which need none of the model's libraries."""

from dataclasses import dataclass, field
from typing import Literal

Architecture = Literal["sd15", "sdxl"]
Fast = Literal["off", "fused", "compiled", "auto"]
AttentionBackend = Literal["auto", "torch", "flash", "cudnn", "efficient", "xformers"]


Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (arXiv 2106.09685) instead of full fine-tuning; the reference is the adapter switched off."""

    rank: int = 0
    """0: full fine-tuning."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank. None: alpha = rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get one; "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2" are further choices."""


@dataclass(frozen=True)
class ModelsConfig:
    """Which model is aligned, and in what numbers it computes."""

    base: str = ""
    """A Stable Diffusion 1.x, 2.x or XL folder in diffusers layout, a single .safetensors file, or a hub id
    (docs/bases.md)."""
    random: Architecture | None = None
    """Instead of base: the exact architecture with seeded random weights, for timings, tests and dry runs."""
    init: str | None = None
    """A model whose UNet policy and reference start from, e.g. one fine-tuned on the winners; the rest is base's. Or a
    LoRA of base (file or folder, any program's names), which is merged into both; with models.lora a new one is trained
    on top of it. The reference is this start, not base, so the loss begins at ln 2. To train an earlier run further
    against its own reference: --resume with more train.steps."""
    vae: str | None = None
    """Another VAE: a folder, a hub id (e.g. the fp16-safe one of SDXL) or a single .safetensors file, which has the
    base's configuration and scaling factor."""
    single_file_config: str | None = None
    """For a base that is a single file: a diffusers folder with its configuration and tokenizer. None: fetched from
    the hub."""
    precision: Precision = "fp32"
    """What the UNets compute in. bf16 and fp16 keep fp32 masters, gradient sums, schedule and losses."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    fast: Fast = "off"
    """fused: channels_last and our kernels inside the UNets. compiled: the same under torch.compile, block by block,
    one graph for policy, reference and inversion; the first step compiles. off: diffusers as it is. auto: fused on a
    GPU, off elsewhere. off stays the default until the others were measured on a GPU."""
    attention: AttentionBackend = "auto"
    """The attention kernel of a fused UNet. auto: by size of the heads, from a measured table; torch where it has no
    entry."""
    cuda_graphs: bool = False
    """With fast=compiled: the inversion's evaluation is compiled as a whole and replayed as a CUDA graph, in calls of
    one size (small models and batches)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    micro_conditioning: Literal["image", "published"] = "image"
    """SDXL: the image's true size and crop, or the published script's constant (resolution, no crop)."""
