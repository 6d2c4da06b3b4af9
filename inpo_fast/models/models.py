"""A pipeline becomes a policy, a frozen reference, a VAE and text encoders. loading.py opens the pipeline."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.fast.fast_unet import inverting, make_fast, resolve
from inpo_fast.models.lora import Lora
from inpo_fast.models.master_weights import Weights
from inpo_fast.models.peak_memory import encoding_bytes
from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime.memory import largest_batch
from inpo_fast.runtime.transfer import to_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Who = Literal["policy", "reference"]
TEXT_BATCH = {"cpu": 8, "cuda": 32}  # prompts that are encoded at once


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

    def arguments(self, images: torch.Tensor, shared: bool = False) -> dict:
        """Keyword arguments of the UNet for the given images (B,) of the window.

        shared: where all images have one text, give its hidden states once, (1, L, C). A fast UNet understands that.
        """
        rows = self.row[images]
        shared = shared and len(self.text.hidden) == 1
        out = {"encoder_hidden_states": self.text.hidden if shared else self.text.hidden[rows]}
        if self.text.pooled is not None:
            out["added_cond_kwargs"] = {"text_embeds": self.text.pooled[rows], "time_ids": self.time_ids[images]}
        return out


class Models:
    """The policy (trained) and everything frozen around it."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device,
        config: ModelsConfig | None = None,
        split: Zero1Partition | None = None,
    ):
        """split: each process keeps only its part of the fp32 masters (and so of the optimizer's state)."""
        config = ModelsConfig() if config is None else config
        self.pipeline, self.device, self.config = pipeline, device, config
        self.dtype = DTYPES[config.precision]
        self.init_lora: Lora | None = getattr(pipeline, "init_lora", None)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        # eval() throughout: these UNets have no dropout, and policy and reference must run the same kernels
        if config.lora.rank:
            self.reference = self.policy = pipeline.unet.to(device, self.dtype)
            self.adapters = add_adapter(self.policy, config.lora)
            masters = None
        else:
            pipeline.unet.to(device)  # first: copying and rounding there is quick
            masters = dict(pipeline.unet.named_parameters()) if self.dtype != torch.float32 else None
            self.policy = copy.deepcopy(pipeline.unet).to(device, self.dtype).requires_grad_(True)
            # Its parameters keep requires_grad, though nothing ever asks for their gradient: torch's linear layers look
            # at that flag to choose between mm and bmm, and the two round differently (SDXL's proj_in, in bf16).
            pipeline.unet = self.reference = copy.deepcopy(self.policy)
            self.adapters = []
        how = resolve(config.fast, device)
        for unet in {id(unet): unet for unet in (self.policy, self.reference)}.values():
            make_fast(unet, how, config.attention, config.cuda_graphs)
        # only now, as they lie in memory as the weights do
        self.zeros = zero_factors(self.adapters) if how == "compiled" else None
        trained = [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]
        self.weights = Weights(trained, masters, split)
        if config.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.vae = pipeline.vae.to(device, self.vae_dtype)
        self._vae_batch: dict[int, int] = {}
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).to(device, self.dtype)
        # as DDIM has the noise levels: with zero terminal SNR some samplers' classes keep a little signal at the last
        self.noise_path = DDPMPath.of(DDIMScheduler.from_config(pipeline.scheduler.config))
        self.is_xl = self.reference.config.addition_embed_type == "text_time"
        self.resolution = self.reference.config.sample_size * pipeline.vae_scale_factor

    @property
    def vae_dtype(self) -> torch.dtype:
        """SDXL's own VAE overflows in fp16: there it runs in fp32 unless another VAE was named."""
        return torch.float32 if self.dtype == torch.float16 and not self.config.vae else self.dtype

    def vae_batch(self, pixels: int) -> int:
        """Images of this edge that are encoded at once, where the configuration does not say it (memory.py)."""
        if pixels not in self._vae_batch:
            with torch.device("meta"):
                vae = type(self.vae).from_config(self.vae.config)
            torch.nn.Module.to(vae, self.vae_dtype)
            self._vae_batch[pixels] = largest_batch(encoding_bytes(vae, pixels), self.device.type)
        return self._vae_batch[pixels]

    def predict(self, who: Who, x: torch.Tensor, time: torch.Tensor, arguments: dict) -> torch.Tensor:
        """A UNet's output for x (B, C, H, W) of any float dtype, conditioned on time (B,), in its own dtype: what
        `noise_path.output` names."""
        if who == "reference" and self.adapters:
            with self._base_only():
                return self.reference(x.to(self.dtype), time, **arguments).sample
        return self.unet(who)(x.to(self.dtype), time, **arguments).sample

    def inverting(self, who: Who, fp8: bool = False):
        """A context for predictions that only move the inversion: they need not round as those of the loss do."""
        return inverting(self.unet(who), fp8)

    def unet(self, who: Who) -> UNet2DConditionModel:
        return self.policy if who == "policy" else self.reference

    @contextmanager
    def _base_only(self):
        """The adapters are off. Compiled, they stay in the graph and add zeros: another graph would round otherwise."""
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

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w). noise: standard normal like the latents
        for a posterior sample, None for its mean."""
        posterior = self.vae.encode(pixels.to(self.vae_dtype)).latent_dist
        mean = posterior.mean.float()
        latents = mean if noise is None else mean + posterior.std.float() * noise.to(mean)
        return scaled(latents, self.vae.config)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """Embeddings of (unique) prompts: the numbers of the pipeline's own `encode_prompt`, which would wait for the
        device.

        In batches of one size, the last one filled up: SDXL's encoders keep all their layers' answers, 9 GiB for 1024
        prompts, and a prompt's bits are not to depend on how many came with it.
        """
        size, texts = TEXT_BATCH.get(self.device.type, TEXT_BATCH["cuda"]), []
        for lo in range(0, len(prompts), size):
            part = list(prompts[lo : lo + size])
            text = self._encode([*part, *part[:1] * (size - len(part))])
            texts.append(Text(text.hidden[: len(part)], None if text.pooled is None else text.pooled[: len(part)]))
        hidden = torch.cat([text.hidden for text in texts])
        return Text(hidden, torch.cat([text.pooled for text in texts]) if self.is_xl else None)

    def _encode(self, prompts: list[str]) -> Text:
        encoders, ids, masks = [], [], []
        for part in ("", "_2") if self.is_xl else ("",):
            tokenizer = getattr(self.pipeline, f"tokenizer{part}")
            encoders.append(getattr(self.pipeline, f"text_encoder{part}"))
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            masked = getattr(encoders[-1].config, "use_attention_mask", False)
            ids.append(to_device(tokens.input_ids, self.device))
            masks.append(to_device(tokens.attention_mask, self.device) if masked else None)
        return encode_tokens(encoders, ids, masks)

    @torch.no_grad()
    def encode_empty(self) -> Text:
        """The unconditional embedding that the model's pipeline guides away from, (1, L, C)."""
        empty = self.encode_prompts([""])
        if self.is_xl and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            return Text(torch.zeros_like(empty.hidden), torch.zeros_like(empty.pooled))
        return empty

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer of this process updates: fp32 masters."""
        return [master for master in self.weights.masters if master.numel()]  # a split leaves small ones empty


def encode_tokens(
    encoders: Sequence[torch.nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> Text:
    """ids, masks: (B, L) of each encoder. Two encoders are SDXL's: the layer before the last, and what the second one
    pools."""
    if len(encoders) == 1:
        return Text(encoders[0](ids[0], attention_mask=masks[0])[0])
    hidden, pooled = [], None
    for encoder, own, mask in zip(encoders, ids, masks, strict=True):
        out = encoder(own, attention_mask=mask, output_hidden_states=True)
        pooled = out[0]
        hidden.append(out.hidden_states[-2])
        del out  # all layers: not beside the next encoder's
    return Text(torch.cat(hidden, -1), pooled)


def scaled(latents: torch.Tensor, vae) -> torch.Tensor:
    """What the VAE encoded, (B, C, h, w), as the UNet knows it: diffusers' pipelines undo exactly this before decoding.

    vae: its configuration. latents_mean and latents_std are SDXL's pipeline's (loading.py refuses them elsewhere).
    """
    if vae.get("latents_mean") is None or vae.get("latents_std") is None:
        return latents * vae.scaling_factor
    mean, std = (latents.new_tensor(values)[None, :, None, None] for values in (vae.latents_mean, vae.latents_std))
    return (latents - mean) * vae.scaling_factor / std


def add_adapter(unet: UNet2DConditionModel, settings: LoraSettings) -> list:
    """Adds trainable adapters in place; returns the layers that have one."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    alpha = settings.rank if settings.alpha is None else settings.alpha
    unet.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(settings.targets), init_lora_weights=True)
    )
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def zero_factors(adapters: list) -> list[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """The last layer of each adapter, and a weight of zeros for it: with it in place the model is its base."""
    last = [factor for layer in adapters for factor in layer.lora_B.values()]
    return [(factor, torch.nn.Parameter(torch.zeros_like(factor.weight))) for factor in last]
