"""A trained model or LoRA as the single file that ComfyUI, A1111 and diffusers' `from_single_file` read.

    python -m inpo_fast.export --model runs/sd15/model --output aligned.safetensors [--dtype fp16]
    python -m inpo_fast.export --lora runs/sd15-lora/lora --output aligned-lora.safetensors [--format kohya]

A model's file holds UNet, VAE and text encoders under the names of the original checkpoints (original_keys.py). A LoRA
in any program's names is written in kohya's or diffusers', alpha / rank inside, for readers that know no alpha.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from inpo_fast.models.files.diffusers_folder import hub_id
from inpo_fast.models.files.lora_files import read_lora, read_lora_alone
from inpo_fast.models.files.original_keys import clip_tensors, open_clip_tensors, unet_name, vae_tensors
from inpo_fast.models.files.safetensors_metadata import About, kohya_metadata, write_tensors
from inpo_fast.models.lora import kohya_tensors
from inpo_fast.models.lora import tensors as diffusers_tensors
from inpo_fast.runtime.errors import UserError

FORMATS = ("kohya", "kohya-diffusers", "diffusers")
FORMAT_HELP = (
    "names of a LoRA: kohya (default; ComfyUI, A1111, Forge, InvokeAI, sd-scripts, OneTrainer); kohya-diffusers, the "
    "same with diffusers' layers (ai-toolkit; InvokeAI and OneTrainer for an XL with other blocks); diffusers"
)
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def single_file(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of a Stable Diffusion 1.x, 2.x or XL pipeline under its original name.

    UserError of another layout.
    """
    config = pipeline.unet.config
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    is_xl = config.addition_embed_type == "text_time"
    supported = (
        {*config.down_block_types, *config.up_block_types} <= BLOCKS
        and config.addition_embed_type in (None, "text_time")
        and isinstance(pipeline.vae, AutoencoderKL)
        and all(isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) for encoder in encoders[: 1 + is_xl])
        and (encoders[1] is not None) == is_xl
    )
    if not supported:
        raise UserError(
            f"not a supported layout: {type(pipeline).__name__} with {', '.join(config.down_block_types)} and "
            f"{', '.join(type(e).__name__ for e in encoders)}; Stable Diffusion 1.x, 2.x and XL can be exported"
        )
    first, second = encoders
    try:
        parts = {
            "model.diffusion_model": {unet_name(name, config): x for name, x in pipeline.unet.state_dict().items()},
            "first_stage_model": vae_tensors(pipeline.vae.state_dict(), pipeline.vae.config),
        }
        if is_xl:
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
    if scheduler.get("prediction_type") == "v_prediction" and (is_xl or zero_snr):
        out["v_pred"] = torch.empty(0)
        if zero_snr:
            out["ztsnr"] = torch.empty(0)
    return out


def lora_tensors(
    path: Path, format: str, model: Path | None, title: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. model: the folder it belongs to; without one, and with none beside the LoRA as in a run's
    folder, the layout is read off the LoRA's own names."""
    file = (model or (path if path.is_dir() else path.parent).resolve().parent / "model") / "unet" / "config.json"
    if model is not None and not file.is_file():
        raise UserError(f"--model: no such file: {file}")
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        with torch.device("meta"):
            lora = read_lora("--lora", path, UNet2DConditionModel.from_config(config))
    else:
        lora, config = read_lora_alone("--lora", path, layout=format == "kohya")
    if format == "diffusers":
        return diffusers_tensors(lora, "unet."), {}
    about = about_model(file.parents[1] if file.is_file() else None, config, title or path.stem)
    try:
        return kohya_tensors(lora, config, format == "kohya-diffusers"), kohya_metadata(about, lora.rank)
    except KeyError as problem:
        raise UserError(
            f"--lora: the layer {problem.args[0]} has no name in the original UNet; take --format kohya-diffusers"
        ) from problem


def about_model(folder: Path | None, config: Mapping, title: str) -> About:
    """What a diffusers folder, and the run that it may belong to, say of a model. config: of its UNet."""
    known: dict = {}
    for name, path in (("scheduler", "scheduler/scheduler_config.json"), ("vae", "vae/config.json")):
        if folder is not None and (folder / path).is_file():
            known[name] = json.loads((folder / path).read_text(encoding="utf-8"))
    kind = known.get("scheduler", {}).get("prediction_type", "epsilon") if "scheduler" in known else None
    side = config.get("sample_size")
    if "vae" in known and side:  # each level of the VAE but the last halves
        side = (side if isinstance(side, int) else max(side)) * 2 ** (len(known["vae"]["block_out_channels"]) - 1)
    base = None if folder is None else _manifest(folder).get("model", {}).get("base")
    return About(
        config,
        title,
        side if "vae" in known else None,
        None if kind is None else "v" if kind == "v_prediction" else "epsilon",
        hub_id(base) if base else None,
    )


def provenance(folder: Path) -> dict[str, str]:
    """What is known of the model: its place, and from the manifest of the run that it lies in the recipe's hash."""
    folder = folder.resolve()
    out = {"inpo_fast.source": f"{folder.parent.name}/{folder.name}", "inpo_fast.version": version("inpo-fast")}
    manifest = _manifest(folder)
    return out | {f"inpo_fast.{key}": manifest[key] for key in ("variant", "config_sha256") if key in manifest}


def _manifest(folder: Path) -> dict:
    """Of the run whose folder this lies in; empty where there is none."""
    try:
        manifest = json.loads((folder.resolve().parent / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str], output: Path) -> None:
    """Written aside and renamed."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, metadata, output)
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"--output {output} cannot be written ({problem}); free some space or name another"
        ) from problem


def convert(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out = {name: x if name.endswith(".alpha") else x.to(dtype) for name, x in tensors.items()}
    for name, x in out.items():
        if not x.isfinite().all():
            raise UserError(f"{name} has values that are not finite in {dtype}; take --dtype bf16 or fp32")
    return out
