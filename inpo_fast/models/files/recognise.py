"""What a model is, told from names alone: the tensors' names of a file, or the classes that a folder's JSON names.

Only Stable Diffusion 1.x, 2.x, XL and their relatives by shape are aligned; whatever else is given in their place is
called by its name before anything large is read or fetched. The names are public: those of the original code bases, of
diffusers (`loaders/single_file_utils.py` tells files apart by the same marks) and of the UIs' own formats (ComfyUI's
`model_detection.py` and `supported_models.py`).
"""

import re
from pathlib import Path

from inpo_fast.models.files.safetensors_header import FLOATS, SafetensorsFile
from inpo_fast.runtime.files import json_or_none

# ---- files: the first line that is found among the names says what the file is -------------------------------------
ADAPTERS = (  # they belong beside a model
    (r"lora_down\.|lora_up\.|[._]lora_[ABab]\.|[._]lora\.(down|up)\.|lora_linear_layer|\.lora_mid\.", "a LoRA"),
    (r"\.hada_w1_|\.hada_w2_", "a LoRA of the kind LoHa"),
    (r"\.lokr_w[12]", "a LoRA of the kind LoKr"),
    (r"\.oft_(blocks|diag|R)|\.boft_", "an OFT adapter"),
    (r"dora_scale|lora_magnitude_vector", "a LoRA of the kind DoRA"),
    (r"^lora_(unet|te\d?|transformer)_", "a LoRA"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"^control_model\.|controlnet_cond_embedding|^input_hint_block\.|(^|\.)zero_convs\.|^control_add_embedding",
     "a ControlNet"),
    (r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv)", "a T2I-Adapter"),
    (r"motion_modules\.|temporal_transformer", "an AnimateDiff motion module"),
    (r"^(emb_params|string_to_param\b|clip_[lg])$", "a textual inversion (embedding)"),
    (r"position_net\.|\.fuser\.", "a GLIGEN model"),
)  # fmt: skip
FAMILIES = (  # tensor names -> a family with another network
    (r"(^|\.)joint_blocks\.\d+\.(context|x)_block\.", "Stable Diffusion 3"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma"),
    (r"(^|\.)(double|single)_stream_modulation(_img|_txt)?\.lin\.", "FLUX.2"),
    (r"(^|\.)double_blocks\.\d+\.(img_attn|img_mod)", "FLUX or a relative"),
    (r"(^|\.)single_transformer_blocks\.\d+\.", "FLUX or a relative (diffusers' names)"),
    (r"(^|\.)double_stream_blocks\.", "HiDream"),
    (r"(^|\.)individual_token_refiner\.|(^|\.)txt_in\.individual", "HunyuanVideo"),
    (r"(^|\.)double_layers\.\d+\.attn\.w1q", "AuraFlow"),
    (r"(^|\.)txt_in\.text_norm|(^|\.)transformer_blocks\.\d+\.img_mod\.", "Qwen-Image"),
    (r"(^|\.)cap_embedder\.|(^|\.)all_x_embedder\.|(^|\.)layers\.\d+\.adaLN_modulation\.", "Lumina 2 or Z-Image"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.(kv|q)_linear\.|(^|\.)y_embedder\.y_embedding$", "PixArt or Sana"),
    (r"(^|\.)caption_(norm|projection)\.", "PixArt or Sana (diffusers' names)"),
    (r"(^|\.)clip_(txt|img)_mapper\.|\.channelwise\.\d+\.weight", "Stable Cascade (Würstchen)"),
    (r"(^|\.)head\.modulation$|(^|\.)vace_blocks\.|(^|\.)blocks\.\d+\.cross_attn\.norm_k", "Wan"),
    (r"(^|\.)patchify_proj\.|(^|\.)av_ca_", "LTX-Video"),
    (r"(^|\.)attn\.qkv_x\.", "Mochi"),
    (r"^net\.(x_embedder|blocks)\.", "Cosmos"),
    (r"(^|\.)(time_stack|time_mixer|time_mix_blocks|temporal_res_block)\b", "Stable Video Diffusion"),
    (r"^(encoder_hid_proj|model\.encoder_hid_proj)\.|add_embedding\.(image_|text_)", "Kandinsky or DeepFloyd"),
    (r"(^|\.)mlp_t5\.|(^|\.)text_embedding_padding", "HunyuanDiT"),
    (r"^(prior|decoder)\.transformer_blocks\.|^(prior_model)\.", "an unCLIP prior"),
    (r"^edm_(mean|std)$", "Playground v2.5 (SDXL's shape with EDM's noise levels)"),
    (r"^edm_vpred\.", "CosXL or a relative (SDXL's shape with EDM's noise levels)"),
)  # fmt: skip
QUANTIZED = (
    (r"\.absmax$|quant_map|quant_state|bitsandbytes__", "weights quantized by bitsandbytes"),
    (r"(^|\.)scaled_fp8$|\.scale_(weight|input)$|\.weight_scale(_inv)?$|\.comfy_quant$", "scaled fp8 weights"),
    (r"\.(qweight|qzeros|wscales|svd_up|smooth)$", "quantized weights (GPTQ, AWQ, SVDQuant)"),
)
PARTS = (  # parts of a model, and networks that are none
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|down_blocks|up_blocks|mid_block|conv_in|conv_out)"
     r"(\.|$)|^(first_stage_model|vae)\.", "a VAE"),
    (r"^(taesd_)?(decoder|encoder)\.\d+\.(conv\.\d+\.)?weight$", "a TAESD (tiny autoencoder)"),
    (r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)", "a T5 text encoder"),
    (r"(^|\.)vision_model\.|(^|\.)visual\.", "a CLIP model with an image encoder"),
    (r"(^|\.)text_model\.|(^|\.)transformer\.resblocks\.|^(cond_stage_model|conditioner)\.", "a CLIP text encoder"),
    (r"^encoder\.layers\.\d+\.self_attn\.q_proj|^embeddings\.(token|position)_embedding", "a CLIP text encoder"),
    (r"(^|\.)layers\.\d+\.self_attn\.q_proj|^model\.embed_tokens", "a language model"),
    (r"^(model\.\d+\.(sub\.\d+\.|RDB)|body\.\d+\.rdb\d|RRDB|conv_first\.|model\.\d+\.weight$|layers\.\d+\.residual_group)",
     "an image upscaler"),
)  # fmt: skip

# ---- folders: classes that JSON files name --------------------------------------------------------------------------
CLASSES = (  # beginnings of classes of pipelines and models -> what they belong to
    ("StableDiffusion3", "Stable Diffusion 3"),
    ("SD3", "Stable Diffusion 3"),
    ("Flux2", "FLUX.2"),
    ("Flux3", "FLUX.3"),
    ("Flux", "FLUX"),
    ("Chroma", "Chroma"),
    ("LatentConsistencyModel", "a latent consistency model (LCM)"),
    ("StableUnCLIP", "an unCLIP model, which is told an image embedding"),
    ("StableDiffusionUpscale", "an upscaler, which is given a small picture"),
    ("StableDiffusionLatentUpscale", "an upscaler, which is given a small picture"),
    ("StableDiffusionInstructPix2Pix", "InstructPix2Pix, which is given a picture to edit"),
    ("StableDiffusionXLInstructPix2Pix", "InstructPix2Pix, which is given a picture to edit"),
    ("StableDiffusionDepth2Img", "a depth-to-image model"),
    ("StableDiffusionImageVariation", "an image-variation model, which is told an image embedding"),
    ("StableDiffusionControlNet", "a pipeline with a ControlNet"),
    ("StableDiffusionXLControlNet", "a pipeline with a ControlNet"),
    ("StableDiffusionAdapter", "a pipeline with a T2I-Adapter"),
    ("StableVideoDiffusion", "Stable Video Diffusion"),
    ("StableCascade", "Stable Cascade"),
    ("Wuerstchen", "Würstchen"),
    ("AltDiffusion", "AltDiffusion (another text encoder)"),
    ("Kolors", "Kolors (another text encoder)"),
    ("Kandinsky", "Kandinsky"),
    ("KandinskyV22", "Kandinsky"),
    ("IF", "DeepFloyd IF, which works on pixels"),
    ("UnCLIP", "unCLIP"),
    ("PixArt", "PixArt"),
    ("Sana", "Sana"),
    ("AuraFlow", "AuraFlow"),
    ("HunyuanDiT", "HunyuanDiT"),
    ("HunyuanVideo", "HunyuanVideo"),
    ("HunyuanImage", "HunyuanImage"),
    ("HiDream", "HiDream"),
    ("Lumina", "Lumina"),
    ("ZImage", "Z-Image"),
    ("QwenImage", "Qwen-Image"),
    ("Wan", "Wan"),
    ("LTX", "LTX-Video"),
    ("CogView", "CogView"),
    ("CogVideo", "CogVideoX"),
    ("Mochi", "Mochi"),
    ("Cosmos", "Cosmos"),
    ("OmniGen", "OmniGen"),
    ("Bria", "Bria"),
    ("AnimateDiff", "AnimateDiff"),
    ("LDM", "a latent diffusion model without classifier-free text conditioning of Stable Diffusion's kind"),
    ("DDPM", "an unconditional DDPM"),
    ("DDIM", "an unconditional DDPM"),
    ("DiT", "DiT"),
    ("Marigold", "Marigold, which is given a picture"),
    ("ControlNet", "a ControlNet"),
    ("T2IAdapter", "a T2I-Adapter"),
    ("MotionAdapter", "an AnimateDiff motion module"),
    ("AutoencoderTiny", "a tiny autoencoder (TAESD)"),
    ("AutoencoderKL", "a VAE"),
    ("Autoencoder", "a VAE of another kind"),
    ("AsymmetricAutoencoder", "a VAE of another kind"),
    ("VQModel", "a VAE of another kind"),
    ("CLIPText", "a CLIP text encoder"),
    ("CLIPVision", "a CLIP image encoder"),
    ("CLIPModel", "a CLIP model"),
    ("T5Encoder", "a T5 text encoder"),
    ("UNet2DConditionModel", "a UNet alone"),
    ("UNet2DModel", "a UNet without text conditioning"),
)  # fmt: skip
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
UNET = re.compile(
    r"^(model\.diffusion_model\.|diffusion_model\.|unet\.)?(input_blocks\.0\.0\.weight|conv_in\.weight)$|"
    r"^model_ema\.diffusion_modelinput_blocks00weight$",
    re.MULTILINE,
)


def family_of_class(name: str) -> str | None:
    """What a class of diffusers or transformers belongs to; None if it is not in the table."""
    found = [what for beginning, what in CLASSES if name.startswith(beginning)]
    lengths = [len(beginning) for beginning, _ in CLASSES if name.startswith(beginning)]
    return found[lengths.index(max(lengths))] if found else None


def other_than_a_unet(file: SafetensorsFile) -> str | None:
    """What a file is that holds no UNet of Stable Diffusion, or more than that; None where it holds one.

    The tensors' own shapes are looked at by those who load them.
    """
    names = "\n".join(file.tensors)
    for table in (ADAPTERS, FAMILIES):
        for pattern, what in table:
            if re.search(pattern, names, re.MULTILINE):
                return what
    if (odd := quantized(file)) is not None:
        return odd
    if UNET.search(names):
        return None
    for pattern, what in PARTS:
        if re.search(pattern, names, re.MULTILINE):
            return what
    widths = {stored.shape[-1] for stored in file.tensors.values() if stored.shape}
    if 0 < len(file.tensors) <= 4 and widths <= {768, 1024, 1280}:
        return "a textual inversion (embedding)"
    if not file.tensors:
        return "an empty file, without any tensor"
    return f"something else (its first tensor is {next(iter(file.tensors))})"


def quantized(file: SafetensorsFile) -> str | None:
    """How the weights are packed, where they cannot be read as they are."""
    names = "\n".join(file.tensors)
    for pattern, what in QUANTIZED:
        if re.search(pattern, names, re.MULTILINE):
            return what
    packed = {s.dtype for n, s in file.tensors.items() if len(s.shape) > 1 and n.endswith("weight")} - set(FLOATS)
    return f"quantized weights ({', '.join(sorted(packed))})" if packed else None


def folder_without_index(folder: Path) -> str:
    """What a folder is that holds no model_index.json, and what to give in its place."""
    if any((folder / name).is_file() for name in LORA_FILES):
        return "is the folder of a LoRA; name the model that it belongs to"
    if (config := json_or_none(folder / "config.json")) is not None:
        classes = [config.get("_class_name"), *(config.get("architectures") or [])]
        kinds = [what for name in classes if isinstance(name, str) and (what := family_of_class(name))]
        named = kinds[0] if kinds else f"one part of a model ({next(filter(None, classes), 'no class is named')})"
        return f"is the folder of {named}; name the folder above it, with model_index.json"
    if (folder / "model" / "model_index.json").is_file():
        return f"is the folder of a run; its model is {folder / 'model'}"
    snapshots = sorted((folder / "snapshots").glob("*/model_index.json"))
    if snapshots:
        return f"is a model in the hub's cache; give {snapshots[-1].parent}, or the model's hub id"
    if any(folder.glob("learned_embeds.*")):
        return "is the folder of a textual inversion (embedding)"
    if (folder / "pytorch_lora_weights.bin").is_file():
        return "is the folder of a LoRA as a pickle, which could run code when opened; save it as .safetensors"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return f"holds no model_index.json; to open a single file give its own path, such as {folder / files[0]}"
    if (folder / "unet").is_dir():
        return (
            "holds no model_index.json, though a unet/: a UNet alone goes to models.init or --model; if it should be a "
            "whole model, download it again"
        )
    return "holds no model_index.json: it is no diffusers folder"
