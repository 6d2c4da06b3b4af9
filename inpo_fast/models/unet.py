"""UNets of Stable Diffusion 1.x, 2.x, XL and their relatives by shape: the family's slots (denoiser.py says what each
is), and its shapes with seeded random weights, which need no network.

SDXL's network is conditioned on a second encoder's pooled state and six sizes (original height, width, crop top, left,
target height, width) beside the time and the hidden states; nothing outside of models/ asks which one it is.

The numbers are those of the published configurations (stable-diffusion-v1-5, stable-diffusion-xl-base-1.0). The
tokenizer knows single letters only: prompts become longer token sequences than with the real one, padded to the same
77.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.models.config import Architecture
from inpo_fast.models.denoiser import Denoiser, Text
from inpo_fast.models.fast import fast_unet
from inpo_fast.models.files.original_keys import clip_tensors, open_clip_tensors, unet_name, vae_tensors
from inpo_fast.models.meta_device import counting
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.transfer import to_device

UNETS = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' name for the number of heads
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_SCALING = {"sd15": 0.18215, "sdxl": 0.13025}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}  # with original names
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, shape: dict) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )


class UNet(Denoiser):
    part = "unet"
    network_class = "UNet2DConditionModel"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    published: ClassVar = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    }
    architectures = tuple(UNETS)

    @property
    def is_xl(self) -> bool:
        return self.config.get("addition_embed_type") == "text_time"

    @property
    def kind(self) -> str:
        """sd1, sd2 or xl."""
        return "xl" if self.is_xl else "sd2" if self.config.get("cross_attention_dim") == 1024 else "sd1"

    # ---- the network ------------------------------------------------------------------------------------------------
    @staticmethod
    def build(config: Mapping) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(config)

    def predict(self, module: torch.nn.Module, x: torch.Tensor, time: torch.Tensor, arguments: dict) -> torch.Tensor:
        return module(x, time, **arguments).sample

    def noise_path(self, pipeline: DiffusionPipeline) -> DDPMPath:
        # as DDIM has the noise levels: with zero terminal SNR some samplers' classes keep a little signal at the last
        return DDPMPath.of(DDIMScheduler.from_config(pipeline.scheduler.config))

    def sampler(self, pipeline: DiffusionPipeline) -> DDIMScheduler:
        return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

    # ---- latents ----------------------------------------------------------------------------------------------------
    @property
    def native_side(self) -> int | None:
        size = self.config.get("sample_size")
        return max(size) if isinstance(size, list | tuple) else size

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        return self.config["in_channels"], side, side

    @staticmethod
    def downscale(vae: Mapping) -> int:
        return 2 ** (len(vae["block_out_channels"]) - 1)  # each level but the last halves

    def encode_images(self, vae: torch.nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        posterior = vae.encode(pixels).latent_dist
        mean = posterior.mean.float()
        latents = mean if noise is None else mean + posterior.std.float() * noise.to(mean)
        return self.scaled(latents, vae.config)

    @staticmethod
    def scaled(latents: torch.Tensor, vae: Mapping) -> torch.Tensor:
        """latents_mean and latents_std are SDXL's pipeline's (alignable.py refuses them elsewhere)."""
        if vae.get("latents_mean") is None or vae.get("latents_std") is None:
            return latents * vae["scaling_factor"]
        mean, std = (latents.new_tensor(vae[name])[None, :, None, None] for name in ("latents_mean", "latents_std"))
        return (latents - mean) * vae["scaling_factor"] / std

    # ---- conditioning -----------------------------------------------------------------------------------------------
    @property
    def text_names(self) -> tuple[str, ...]:
        return ("hidden", "pooled") if self.is_xl else ("hidden",)

    @property
    def text_width(self) -> int:
        return self.config["cross_attention_dim"]

    @property
    def _suffixes(self) -> tuple[str, ...]:
        """Of the names of text encoders and tokenizers."""
        return ("", "_2") if self.is_xl else ("",)

    def encoders(self, pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
        return [getattr(pipeline, f"text_encoder{suffix}") for suffix in self._suffixes]

    def encode(self, pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device) -> Text:
        encoders, ids, masks = self.encoders(pipeline), [], []
        for encoder, suffix in zip(encoders, self._suffixes, strict=True):
            tokenizer = getattr(pipeline, f"tokenizer{suffix}")
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            masked = getattr(encoder.config, "use_attention_mask", False)
            ids.append(to_device(tokens.input_ids, device))
            masks.append(to_device(tokens.attention_mask, device) if masked else None)
        return self.encode_tokens(encoders, ids, masks)

    @staticmethod
    def encode_tokens(
        encoders: Sequence[torch.nn.Module], ids: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> Text:
        """Two encoders are SDXL's: the layer before the last, and what the second one pools."""
        if len(encoders) == 1:
            return Text(encoders[0](ids[0], attention_mask=masks[0])[0])
        hidden, pooled = [], None
        for encoder, own, mask in zip(encoders, ids, masks, strict=True):
            out = encoder(own, attention_mask=mask, output_hidden_states=True)
            pooled = out[0]
            hidden.append(out.hidden_states[-2])
            del out  # all layers: not beside the next encoder's
        return Text(torch.cat(hidden, -1), pooled)

    def zeros_for_empty(self, pipeline: DiffusionPipeline) -> bool:
        return bool(pipeline.config.get("force_zeros_for_empty_prompt"))  # a setting of SDXL's pipeline

    @property
    def takes_sizes(self) -> bool:
        return self.is_xl

    def sizes(self, views: Sequence[tuple], pixels: int, published: bool) -> torch.Tensor:
        target = (pixels, pixels)
        own = [(*target, 0, 0) if published else (*original, *crop) for original, crop in views]
        return torch.tensor([(*sizes, *target) for sizes in own]).float()

    def arguments(self, text: Text, rows: torch.Tensor, sizes: torch.Tensor | None, shared: bool = False) -> dict:
        shared = shared and len(text.hidden) == 1
        out = {"encoder_hidden_states": text.hidden if shared else text.hidden[rows]}
        if text.pooled is not None:
            out["added_cond_kwargs"] = {"text_embeds": text.pooled[rows], "time_ids": sizes}
        return out

    # ---- the fast path ----------------------------------------------------------------------------------------------
    make_fast = staticmethod(fast_unet.make_fast)
    inverting = staticmethod(fast_unet.inverting)
    shares_text = staticmethod(fast_unet.is_fast)
    wants_fixed_batch = staticmethod(fast_unet.wants_fixed_batch)
    compiled_blocks = staticmethod(fast_unet.compiled_blocks)

    # ---- cost, on the meta device -----------------------------------------------------------------------------------
    def meta_pass(self, module: torch.nn.Module, side: int, tokens: int) -> torch.Tensor:
        config, dtype = self.config, module.dtype
        sample = torch.empty(1, *self.latent_shape(side), dtype=dtype, device="meta")
        text = torch.empty(1, tokens, self.text_width, dtype=dtype, device="meta")
        more = {}
        if self.is_xl:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            more["added_cond_kwargs"] = {
                "text_embeds": torch.empty(1, pooled, dtype=dtype, device="meta"),
                "time_ids": torch.empty(1, 6, dtype=dtype, device="meta"),
            }
        time = torch.empty(1, dtype=torch.int64, device="meta")
        return module(sample, time, text, **more).sample

    def forward_bytes(self, module: torch.nn.Module, side: int, tokens: int) -> int:
        """All skip connections, and three tensors of the size of the largest that a layer reads or writes."""
        largest, skips, handles = 0, 0, []

        def look(_module, inputs, output):
            nonlocal largest
            sizes = [x.numel() for x in (*inputs, output) if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes)

        def skip(_module, _inputs, output):
            nonlocal skips
            skips += sum(x.numel() for x in output[1])

        for layer in module.modules():
            if not list(layer.children()):
                handles.append(layer.register_forward_hook(look))
        for block in module.down_blocks:
            handles.append(block.register_forward_hook(skip))
        with torch.no_grad(), counting():
            self.meta_pass(module, side, tokens)
        for handle in handles:
            handle.remove()
        return (skips + 3 * largest) * module.dtype.itemsize

    @staticmethod
    def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
        return [m for m in module.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]

    # ---- files ------------------------------------------------------------------------------------------------------
    def single_file(self, pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
        """As ComfyUI, A1111 and diffusers' `from_single_file` read it."""
        config = self.config
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        supported = (
            {*config["down_block_types"], *config["up_block_types"]} <= BLOCKS
            and config["addition_embed_type"] in (None, "text_time")
            and isinstance(pipeline.vae, AutoencoderKL)
            and all(isinstance(e, CLIPTextModel | CLIPTextModelWithProjection) for e in encoders[: 1 + self.is_xl])
            and (encoders[1] is not None) == self.is_xl
        )
        if not supported:
            raise UserError(
                f"not a supported layout: {type(pipeline).__name__} with {', '.join(config['down_block_types'])} and "
                f"{', '.join(type(e).__name__ for e in encoders)}; Stable Diffusion 1.x, 2.x and XL can be exported"
            )
        first, second = encoders
        unet = pipeline.unet.state_dict()
        try:
            parts = {
                "model.diffusion_model": {unet_name(name, config): x for name, x in unet.items()},
                "first_stage_model": vae_tensors(pipeline.vae.state_dict(), pipeline.vae.config),
            }
            if self.is_xl:
                parts["conditioner.embedders.0.transformer"] = clip_tensors(first.state_dict())
                parts["conditioner.embedders.1.model"] = open_clip_tensors(second.state_dict())
            elif first.config.hidden_act == "quick_gelu":  # OpenAI's CLIP: 1.x
                parts["cond_stage_model.transformer"] = clip_tensors(first.state_dict())
            else:  # OpenCLIP: 2.x
                parts["cond_stage_model.model"] = open_clip_tensors(first.state_dict())
        except KeyError as problem:
            raise UserError(
                f"not a supported layout: {problem.args[0]} has no name in the original checkpoints"
            ) from problem
        out = {f"{prefix}.{name}": x for prefix, part in parts.items() for name, x in part.items()}
        scheduler = pipeline.scheduler.config
        zero_snr = scheduler.get("rescale_betas_zero_snr")
        # how ComfyUI learns it of an SDXL file, and models.base here of any
        if scheduler.get("prediction_type") == "v_prediction" and (self.is_xl or zero_snr):
            out["v_pred"] = torch.empty(0)
            if zero_snr:
                out["ztsnr"] = torch.empty(0)
        return out

    def kohya_name(self, layer: str, diffusers_layers: bool = False) -> str:
        """XL's layers are named as in the original UNet, those of 1.x and 2.x as in diffusers, as sd-scripts trains
        them. ai-toolkit wants XL's as in diffusers too, and so do InvokeAI and OneTrainer for XLs with other blocks
        than SDXL's."""
        own = unet_name(layer, self.config) if self.is_xl and not diffusers_layers else layer
        return "lora_unet_" + own.replace(".", "_")

    def modelspec(self, prediction: str | None, lora: bool) -> dict[str, str]:
        architecture = {
            "sd1": "stable-diffusion-v1",
            "sd2": "stable-diffusion-v2-768-v" if prediction == "v" else "stable-diffusion-v2-512",
            "xl": "stable-diffusion-xl-v1-base",
        }[self.kind]
        original = "https://github.com/Stability-AI/generative-models"
        return {
            "architecture": f"{architecture}/lora" if lora else architecture,
            "implementation": "diffusers" if lora and not self.is_xl else original,
        }

    def kohya_fields(self) -> dict[str, str]:
        base = {"sd1": "sd_v1", "sd2": "sd_v2", "xl": "sdxl_base_v1-0"}[self.kind]
        return {"ss_base_model_version": base, "ss_v2": str(self.kind == "sd2")}

    # ---- random weights ---------------------------------------------------------------------------------------------
    @staticmethod
    def make_network(architecture: Architecture) -> UNet2DConditionModel:
        return UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **UNETS[architecture])

    @staticmethod
    def make_vae(architecture: Architecture) -> AutoencoderKL:
        side = 8 * UNETS[architecture]["sample_size"]
        return AutoencoderKL(sample_size=side, scaling_factor=VAE_SCALING[architecture], **VAE)

    @staticmethod
    def make_encoders(architecture: Architecture) -> list[torch.nn.Module]:
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        return [kind(config) for kind, config in zip(kinds, UNet.text_configs(architecture), strict=False)]

    @staticmethod
    def text_configs(architecture: Architecture) -> list[CLIPTextConfig]:
        tokenizer = make_tokenizer()
        return [text_config(tokenizer, shape) for shape in (CLIP_L, OPENCLIP_G)[: 1 + (architecture == "sdxl")]]

    @staticmethod
    def meta_encoders(configs: Sequence[CLIPTextConfig]) -> list[torch.nn.Module]:
        return [CLIPTextModel(config) for config in configs]

    @staticmethod
    def assemble(
        network: UNet2DConditionModel, vae: AutoencoderKL, encoders: Sequence[torch.nn.Module]
    ) -> DiffusionPipeline:
        common = {"vae": vae, "text_encoder": encoders[0], "tokenizer": make_tokenizer(), "unet": network}
        common["scheduler"] = DDIMScheduler(**SCHEDULE)
        if UNet(network.config).is_xl:
            return StableDiffusionXLPipeline(
                **common, text_encoder_2=encoders[1], tokenizer_2=make_tokenizer(), add_watermarker=False
            )
        return StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
        )
