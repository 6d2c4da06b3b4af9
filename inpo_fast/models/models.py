"""A pipeline becomes a policy, a frozen reference, a VAE and text encoders. loading.py opens the pipeline; what depends
on the model family is asked of its denoiser (denoiser.py)."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.denoiser import Conditioning, Text
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.fast.fast_unet import resolve
from inpo_fast.models.lora import Lora, add_adapter, zero_factors
from inpo_fast.models.master_weights import MasterWeights
from inpo_fast.models.peak_memory import encoding_bytes
from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime.memory import PROMPTS, fits, largest_batch, sizes_of
from inpo_fast.runtime.transfer import to_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Who = Literal["policy", "reference"]
TEXT_BATCH = {"cpu": 8, "cuda": 32}  # prompts that are encoded at once


def vae_dtype(config: ModelsConfig) -> torch.dtype:
    """SDXL's own VAE overflows in fp16: there it runs in fp32 unless another VAE was named."""
    return torch.float32 if config.precision == "fp16" and not config.vae else DTYPES[config.precision]


class Models:
    """The policy (trained) and everything frozen around it."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device,
        config: ModelsConfig | None = None,
        partition: Zero1Partition | None = None,
    ):
        """partition: each process keeps only its part of the fp32 masters (and so of the optimizer's state)."""
        config = ModelsConfig() if config is None else config
        self.pipeline, self.device, self.config = pipeline, device, config
        self.dtype, self.vae_dtype = DTYPES[config.precision], vae_dtype(config)
        self.denoiser = denoiser_of(pipeline)
        self.init_lora: Lora | None = getattr(pipeline, "init_lora", None)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        base = self.denoiser.module(pipeline)
        # eval() throughout: these networks have no dropout, and policy and reference must run the same kernels
        if config.lora.rank:
            self.reference = self.policy = base.to(device, self.dtype)
            self.adapters = add_adapter(self.policy, config.lora)
            masters = None
        else:
            base.to(device)  # first: copying and rounding there is quick
            masters = dict(base.named_parameters()) if self.dtype != torch.float32 else None
            self.policy = copy.deepcopy(base).to(device, self.dtype).requires_grad_(True)
            # Its parameters keep requires_grad, though nothing ever asks for their gradient: torch's linear layers look
            # at that flag to choose between mm and bmm, and the two round differently (SDXL's proj_in, in bf16).
            self.reference = copy.deepcopy(self.policy)
            self.denoiser.put(pipeline, self.reference)
            del base  # what is needed of it is among the masters
            self.adapters = []
        self.fast = resolve(config.fast, device)
        for network in {id(network): network for network in (self.policy, self.reference)}.values():
            self.denoiser.make_fast(network, self.fast, config.attention, config.cuda_graphs)
        # only now, as they lie in memory as the weights do
        self.zeros = zero_factors(self.adapters) if self.fast == "compiled" else None
        self._without_adapters = False
        trained = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        self.weights = MasterWeights(trained, masters, partition)
        if config.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.vae = pipeline.vae.to(device, self.vae_dtype)
        self.at_once = sizes_of(pipeline)  # what memory made smaller
        self._vae_batch: dict[int, int] = {}
        self.encoders = self.denoiser.encoders(pipeline)
        for encoder in self.encoders:
            encoder.to(device, self.dtype)
        self.noise_path = self.denoiser.noise_path(pipeline)
        self.downscale = self.denoiser.downscale(self.vae.config)
        self.resolution = self.denoiser.native_side * self.downscale

    def training_side(self, resolution: int | None) -> int:
        """As Denoiser.training_side."""
        return self.denoiser.training_side(resolution, self.vae.config)

    def latent_shape(self, pixels: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square picture with an edge of `pixels`."""
        return self.denoiser.latent_shape(pixels // self.downscale)

    @property
    def micro_conditioning(self) -> Literal["image", "published"] | None:
        """Which size and crop of a picture condition the network; None: it takes none."""
        return self.config.micro_conditioning if self.denoiser.takes_sizes else None

    def sizes(self, views: Sequence[tuple], side: int) -> torch.Tensor | None:
        """Micro-conditioning (M, k) of M pictures with an edge of `side` latents, on the device; None: it takes none.

        views: (original height, width), (crop top, left) of each.
        """
        if self.micro_conditioning is None:
            return None
        published = self.micro_conditioning == "published"
        return to_device(self.denoiser.sizes(views, side * self.downscale, published), self.device)

    def conditioning(self, text: Text, row: torch.Tensor, sizes: torch.Tensor | None) -> Conditioning:
        return Conditioning(self.denoiser, text, row, sizes)

    def vae_batch(self, pixels: int) -> int:
        """Images of this edge that are encoded at once, where the configuration does not say it (memory.py)."""
        if pixels not in self._vae_batch:
            with torch.device("meta"):
                vae = type(self.vae).from_config(self.vae.config)
            torch.nn.Module.to(vae, self.vae_dtype)
            self._vae_batch[pixels] = largest_batch(encoding_bytes(vae, pixels), self.device.type)
        return self._vae_batch[pixels]

    def predict(self, who: Who, x: torch.Tensor, time: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The model output for x (B, C, H, W) of any float dtype, conditioned on time (B,), in its own dtype: what
        `noise_path.output` names."""
        with self._base_only() if who == "reference" and self.adapters else nullcontext():
            return self.denoiser.predict(self.network(who), x.to(self.dtype), time, arguments)

    @contextmanager
    def inverting(self, who: Who, fp8: bool = False):
        """A context for predictions that only move the inversion: they need not round as those of the loss do. Without
        adapters to its end where the reference inverts: a step that is refined by a gradient goes backwards through
        the prediction, and gradient checkpointing computes it again then."""
        base_only = self._base_only() if who == "reference" and self.adapters else nullcontext()
        with base_only, self.denoiser.inverting(self.network(who), fp8):
            yield

    def network(self, who: Who) -> torch.nn.Module:
        return self.policy if who == "policy" else self.reference

    @contextmanager
    def _base_only(self):
        """The adapters are off. Compiled, they stay in the graph and add zeros: another graph would round otherwise."""
        if self._without_adapters:  # within another such block
            yield
            return
        self._without_adapters = True
        if self.zeros is not None:
            trained = [factor.weight for factor, _ in self.zeros]
            for factor, zero in self.zeros:
                factor.weight = zero
        else:
            for layer in self.adapters:
                layer.enable_adapters(False)
        try:
            yield
        finally:
            if self.zeros is not None:
                for (factor, _), weight in zip(self.zeros, trained, strict=True):
                    factor.weight = weight
            else:
                for layer in self.adapters:
                    layer.enable_adapters(True)
            self._without_adapters = False

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] to latents (B, C, h, w) as the network knows them. noise: standard normal like
        the latents for a posterior sample, None for its mean."""
        return self.denoiser.encode_images(self.vae, pixels.to(self.vae_dtype), noise)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Embeddings of (unique) prompts: the numbers of the pipeline's own `encode_prompt`, which would wait for the
        device.

        In batches of one size, the last one filled up: SDXL's encoders keep all their layers' outputs, 9 GiB for 1024
        prompts, and a prompt's bits are not to depend on how many came with it.
        """
        return self.at_once.fitting(lambda: self._encode_prompts(prompts))

    def _encode_prompts(self, prompts: Sequence[str]) -> Text:
        size, texts = self.at_once.of(PROMPTS, TEXT_BATCH.get(self.device.type, TEXT_BATCH["cuda"])), []
        for lo in range(0, len(prompts), size):
            part = list(prompts[lo : lo + size])
            filled = [*part, *part[:1] * (size - len(part))]
            with fits(PROMPTS, size):
                texts.append(self.denoiser.encode(self.pipeline, filled, self.device)[: len(part)])
        return Text.cat(texts)

    @torch.no_grad()
    def encode_empty(self) -> Text:
        """The unconditional embedding that the model's pipeline guides away from, (1, L, C)."""
        empty = self.encode_prompts([""])
        return empty.zeros_like() if self.denoiser.zeros_for_empty(self.pipeline) else empty

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer of this process updates: fp32 masters."""
        return [master for master in self.weights.masters if master.numel()]  # a partition leaves small ones empty
