"""Stable Diffusion 1.5 and XL with seeded random weights: the exact shapes, without a network.

For timings, memory, tests and dry runs. The numbers are those of the published configurations
(stable-diffusion-v1-5, stable-diffusion-xl-base-1.0). The tokenizer knows single letters only: prompts become longer
token sequences than with the real one, padded to the same 77.
"""

import contextlib

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

from inpo_fast.models.config import Architecture

PUBLISHED: dict[str, Architecture] = {  # the hub ids of the shipped recipes: their shapes need no network
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
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
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_unet(name: Architecture) -> UNet2DConditionModel:
    """On the current default device and in the current default dtype."""
    return UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **UNETS[name])


def make_vae(name: Architecture) -> AutoencoderKL:
    return AutoencoderKL(sample_size=8 * UNETS[name]["sample_size"], scaling_factor=VAE_SCALING[name], **VAE)


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


def random_pipeline(
    name: Architecture,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | None = None,
) -> DiffusionPipeline:
    """The whole pipeline, on `device`, None: the current default device, the CPU. Drawn there: what takes a CPU half a
    minute is a moment of a GPU. Each kind of device has its own numbers for a seed. fp32 weights are drawn as such;
    `dtype` is what they are drawn in."""
    tokenizer, before = make_tokenizer(), torch.get_default_dtype()
    touched = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=touched), device or contextlib.nullcontext():
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            unet, vae = make_unet(name), make_vae(name)
            text_encoder = CLIPTextModel(text_config(tokenizer, CLIP_L))
            second = CLIPTextModelWithProjection(text_config(tokenizer, OPENCLIP_G)) if name == "sdxl" else None
        finally:
            torch.set_default_dtype(before)
    common = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    common["scheduler"] = DDIMScheduler(**SCHEDULE)
    if name == "sdxl":
        return StableDiffusionXLPipeline(
            **common, text_encoder_2=second, tokenizer_2=make_tokenizer(), add_watermarker=False
        )
    return StableDiffusionPipeline(
        **common, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False
    )
