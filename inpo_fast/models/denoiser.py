"""What a model family is: the slots that everything above models/ asks, and the only things it asks of a network.

A Denoiser is a family at one configuration of its network; it holds no weights. unet.py fills the slots for Stable
Diffusion 1.x, 2.x and XL and is the file to copy for another family; families.py has the table of families.

What diffusers' other families need, and the slot that carries it (checked on paper, none is written):

- another name of the network (`transformer`): `part`. Latents of 16 or 32 channels at 1/8 or 1/32: `latent_shape`,
  `downscale`. A shift, statistics of each channel (Qwen-Image's configuration, klein's batch norm), a VAE that takes
  frames: `encode_images`, which is given the VAE itself.
- latents as packed tokens with positions (FLUX, klein, Qwen-Image) or lists (Z-Image): `predict` packs and unpacks;
  everywhere else they are (B, C, h, w). A pipeline that wants its noise packed: `pipeline_latents`.
- an output with a minus sign (Lumina2, Z-Image): `predict` turns it round. The time that conditions the network (s,
  1 - s, 1000 s, a scale of the model's own) is the path's: `noise_path`.
- text masks, prompts of any length: one more field of Text, padded to one length, which caches and batches carry by
  name (`text_names`), `arguments` gives it to the network or cuts by it. Two or three encoders, an instruction before
  the prompt: `encoders`, `encode`. Zeros in the place of "": `zeros_for_empty`.
- embedded guidance (FLUX.1-dev): a constant in `arguments`.
- LoRA layers (add_*_proj, to_qkv_mlp_proj …): `lora_targets`; names in files: `kohya_name`, `single_file`.

Not behind a slot yet: opening (loading.py, files/alignable.py and files/model_files.py know this family's parts alone)
and what counts a VAE (peak_memory.py and cost/flops.py call AutoencoderKL).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn

from inpo_fast.method.noise_path import NoisePath
from inpo_fast.models.config import AttentionBackend, Fast
from inpo_fast.runtime.errors import UserError


@dataclass(frozen=True)
class Text:
    """Embeddings of U prompts, each tensor with one row a prompt. hidden: (U, L, C); pooled: (U, D), where the network
    takes it."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: x for name, x in named.items() if x is not None}

    def __getitem__(self, rows: slice) -> "Text":
        return Text(**{name: x[rows] for name, x in self.tensors.items()})

    @classmethod
    def cat(cls, texts: Sequence["Text"]) -> "Text":
        return cls(**{name: torch.cat([text.tensors[name] for text in texts]) for name in texts[0].tensors})

    def zeros_like(self) -> "Text":
        return Text(**{name: torch.zeros_like(x) for name, x in self.tensors.items()})


@dataclass(frozen=True)
class Conditioning:
    """What the network is conditioned on beside the time, for each image of a step batch.

    row: (M,) int64 into text. sizes: (M, k) micro-conditioning, None for a network that takes none.
    """

    denoiser: "Denoiser"
    text: Text
    row: torch.Tensor
    sizes: torch.Tensor | None = None

    def arguments(self, images: torch.Tensor, shared: bool = False) -> dict:
        """Keyword arguments of the network for the given images (B,) of the batch; shared: Denoiser.arguments."""
        sizes = None if self.sizes is None else self.sizes[images]
        return self.denoiser.arguments(self.text, self.row[images], sizes, shared)


class Denoiser(ABC):
    """A model family at one configuration of its network, a mapping with diffusers' keys (some may be missing where
    only a file's names are known)."""

    part: ClassVar[str]  # the network's attribute in a pipeline, and its folder
    network_class: ClassVar[str]  # its class in diffusers
    lora_targets: ClassVar[tuple[str, ...]]  # layers that get an adapter; the default of models.lora.targets
    published: ClassVar[dict[str, str]]  # hub ids of the shipped recipes -> architecture, whose shapes need no network
    architectures: ClassVar[tuple[str, ...]]  # what models.random may name

    def __init__(self, config: Mapping):
        self.config = config

    def module(self, pipeline) -> nn.Module:
        return getattr(pipeline, self.part)

    def put(self, pipeline, module: nn.Module) -> None:
        setattr(pipeline, self.part, module)

    # ---- the network ------------------------------------------------------------------------------------------------
    @staticmethod
    @abstractmethod
    def build(config: Mapping) -> nn.Module:
        """The network of a configuration, on the current default device."""

    @abstractmethod
    def predict(self, module: nn.Module, x: torch.Tensor, time: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The model output (B, C, h, w) for x (B, C, h, w), conditioned on time (B,) and on `arguments`."""

    @abstractmethod
    def noise_path(self, pipeline) -> NoisePath:
        """What x, time and output are there: of the pipeline's own scheduler."""

    @abstractmethod
    def sampler(self, pipeline):
        """What pictures are drawn with to compare models: deterministic, at the pipeline's noise levels."""

    # ---- latents ----------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def native_side(self) -> int | None:
        """Edge, in latents, of the pictures that the model was made for; None where the configuration is silent."""

    @abstractmethod
    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, h, w) of one square picture whose edge is `side` latents."""

    @staticmethod
    @abstractmethod
    def downscale(vae: Mapping) -> int:
        """Pixels along the edge of one latent. vae: the VAE's configuration."""

    def training_side(self, resolution: int | None, vae: Mapping) -> int:
        """Pixels along the edge of the pictures that are trained on; None: the model's own. UserError of a resolution
        that is no whole number of latents, whose edge the VAE would cut off."""
        factor = self.downscale(vae)
        if resolution is None:
            return self.native_side * factor
        if resolution % factor or resolution < 2 * factor:
            near = max(2, round(resolution / factor)) * factor
            raise UserError(
                f"data.resolution={resolution}: must be a multiple of {factor}, the pixels of one latent, and at least "
                f"{2 * factor}; take {near}"
            )
        return resolution

    @abstractmethod
    def encode_images(self, vae: nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1], in the VAE's dtype, to fp32 latents (B, C, h, w) as the network knows them: a
        pipeline undoes exactly this. noise: standard normal like the latents for a posterior sample, None for its mean.
        """

    def pipeline_latents(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise (B, C, h, w) as the family's pipeline takes it for `latents`."""
        return noise

    # ---- conditioning -----------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def text_names(self) -> tuple[str, ...]:
        """The fields of Text that the network takes."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Numbers of one token's hidden state."""

    @abstractmethod
    def encoders(self, pipeline) -> list[nn.Module]:
        """The pipeline's text encoders, in the order in which `encode_tokens` takes them."""

    @abstractmethod
    def encode(self, pipeline, prompts: Sequence[str], device: torch.device) -> Text:
        """One batch of prompts: the numbers of the pipeline's own `encode_prompt`, without waiting for the device."""

    @staticmethod
    @abstractmethod
    def encode_tokens(
        encoders: Sequence[nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> Text:
        """ids, masks: (B, L) for each encoder."""

    @abstractmethod
    def zeros_for_empty(self, pipeline) -> bool:
        """Whether the pipeline guides away from zeros, not from the encoding of ""."""

    @property
    @abstractmethod
    def takes_sizes(self) -> bool:
        """Whether a picture's size and crop condition the network (models.micro_conditioning)."""

    @abstractmethod
    def sizes(self, views: Sequence[tuple], pixels: int, published: bool) -> torch.Tensor:
        """Micro-conditioning (M, k) in fp32 on the CPU, of M square pictures with an edge of `pixels`.

        views: (original height, width), (crop top, left) of each. published: the published script's constant instead.
        """

    @abstractmethod
    def arguments(self, text: Text, rows: torch.Tensor, sizes: torch.Tensor | None, shared: bool = False) -> dict:
        """Keyword arguments of the network for B images. rows: (B,) into text; sizes: (B, k).

        shared: where all images have one text, its hidden states may be given once, (1, L, C) (`shares_text`).
        """

    # ---- the fast path ----------------------------------------------------------------------------------------------
    @staticmethod
    @abstractmethod
    def make_fast(module: nn.Module, how: Fast, backend: AttentionBackend = "auto", cuda_graphs: bool = False) -> None:
        """models.fast in place, before parameters are copied or optimized."""

    @staticmethod
    @abstractmethod
    def inverting(module: nn.Module, fp8: bool = False) -> AbstractContextManager:
        """Within the block predictions only move the inversion: they need not round as those of the loss do."""

    @staticmethod
    @abstractmethod
    def shares_text(module: nn.Module) -> bool:
        """Whether this module understands a text that is given once for all images."""

    @staticmethod
    @abstractmethod
    def wants_fixed_batch(module: nn.Module) -> bool:
        """Whether the inversion's batches must have one size (a CUDA graph)."""

    @staticmethod
    @abstractmethod
    def compiled_blocks(module: nn.Module) -> int:
        """How many different blocks the first evaluations compile, 0 where none is."""

    # ---- cost, on the meta device -----------------------------------------------------------------------------------
    @abstractmethod
    def meta_pass(self, module: nn.Module, side: int, tokens: int) -> torch.Tensor:
        """One image through a module on the meta device, in its own dtype: the model output (1, C, side, side)."""

    @abstractmethod
    def forward_bytes(self, module: nn.Module, side: int, tokens: int) -> int:
        """Estimated memory of one image in a pass without gradient, on the meta device."""

    @staticmethod
    @abstractmethod
    def blocks(module: nn.Module) -> list[nn.Module]:
        """The blocks that gradient checkpointing recomputes, and models.fast=compiled keeps, one at a time."""

    # ---- files ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def single_file(self, pipeline) -> dict[str, torch.Tensor]:
        """Every tensor of the pipeline under its original name. UserError of a layout that has none."""

    @abstractmethod
    def kohya_name(self, layer: str, diffusers_layers: bool = False) -> str:
        """kohya's name of the network's layer. KeyError where the original network has none for it.

        diffusers_layers: named after diffusers' layer in any case.
        """

    @abstractmethod
    def modelspec(self, prediction: str | None, lora: bool) -> dict[str, str]:
        """Fields of Stability's model specification that depend on the family."""

    @abstractmethod
    def kohya_fields(self) -> dict[str, str]:
        """Fields of sd-scripts' metadata that depend on the family."""

    # ---- random weights ---------------------------------------------------------------------------------------------
    @staticmethod
    @abstractmethod
    def make_network(architecture: str) -> nn.Module:
        """On the current default device and in the current default dtype, as the next two."""

    @staticmethod
    @abstractmethod
    def make_vae(architecture: str) -> nn.Module: ...

    @staticmethod
    @abstractmethod
    def make_encoders(architecture: str) -> list[nn.Module]: ...

    @staticmethod
    @abstractmethod
    def text_configs(architecture: str) -> list:
        """Configurations of the text encoders."""

    @staticmethod
    @abstractmethod
    def meta_encoders(configs: Sequence) -> list[nn.Module]:
        """Text encoders of these configurations for counts on the meta device."""

    @staticmethod
    @abstractmethod
    def assemble(network: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]):
        """The pipeline of these parts, with a tokenizer and the published noise schedule."""
