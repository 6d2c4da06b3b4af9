"""A trained model or LoRA as the single file that ComfyUI, A1111 and diffusers' `from_single_file` read.

    python -m inpo_fast.export --model runs/sd15/model --output aligned.safetensors [--dtype fp16]
    python -m inpo_fast.export --lora runs/sd15-lora/lora --output aligned-lora.safetensors [--format kohya]

A model's file holds UNet, VAE and text encoders under the names of the original checkpoints (original_keys.py). A
LoRA's: kohya's names with their alpha, or diffusers' with the scale folded in, for readers that know no alpha.
"""

import argparse
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from inpo_fast.architectures import UNETS
from inpo_fast.loading import load_pipeline, quiet_libraries
from inpo_fast.models import DTYPES
from inpo_fast.original_keys import clip_tensors, open_clip_tensors, unet_name, vae_tensors
from inpo_fast.refusal import Refusal, run_or_refuse

BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


def single_file(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of a Stable Diffusion 1.x, 2.x or XL pipeline under its original name. Refusal of another layout."""
    config = pipeline.unet.config
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    is_xl = config.addition_embed_type == "text_time"
    supported = (
        isinstance(config.layers_per_block, int)
        and {*config.down_block_types, *config.up_block_types} <= BLOCKS
        and config.addition_embed_type in (None, "text_time")
        and isinstance(pipeline.vae, AutoencoderKL)
        and all(isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) for encoder in encoders[: 1 + is_xl])
        and (encoders[1] is not None) == is_xl
    )
    if not supported:
        raise Refusal(
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
        raise Refusal(f"not a supported layout: {problem.args[0]} has no name in the original checkpoints") from problem
    out = {f"{prefix}.{name}": x for prefix, part in parts.items() for name, x in part.items()}
    scheduler = pipeline.scheduler.config
    if is_xl and scheduler.get("prediction_type") == "v_prediction":  # how ComfyUI and A1111 learn it of an SDXL file
        out["v_pred"] = torch.empty(0)
        if scheduler.get("rescale_betas_zero_snr"):
            out["ztsnr"] = torch.empty(0)
    return out


def load_adapter(path: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """module -> A (rank, in), B (out, rank) of the UNet, and alpha: the adapter adds alpha / rank * B A."""
    file = path / LORA_WEIGHT_NAME_SAFE if path.is_dir() else path
    if not file.is_file():
        raise Refusal(f"--lora: no such file: {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as problem:
        raise Refusal(f"--lora: {file} cannot be read ({problem})") from problem
    adapter = {}
    for name, x in tensors.items():
        found = re.fullmatch(r"unet\.(.+)\.lora_(A|B)\.weight", name)
        if found is None or (up := f"unet.{found[1]}.lora_B.weight") not in tensors:
            raise Refusal(f"--lora: {file} is not a UNet's LoRA in diffusers' layout (it holds {name})")
        if found[2] == "A":
            adapter[found[1]] = (x, tensors[up])
    ranks = {len(down) for down, _ in adapter.values()}
    if len(ranks) != 1 or metadata.get("unet.alpha_pattern") or metadata.get("unet.use_rslora"):
        raise Refusal(f"--lora: {file} is empty or scales its layers differently; only one rank and one alpha can be")
    return adapter, float(metadata.get("unet.lora_alpha", *ranks))  # diffusers: without a word, alpha is the rank


def lora_file(path: Path, format: str, model: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. model: the folder it belongs to, needed only where nothing else tells SD from SDXL."""
    adapter, alpha = load_adapter(path)
    rank = len(next(iter(adapter.values()))[0])
    out = {}
    if format == "diffusers":
        for module, (down, up) in adapter.items():
            out |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up * (alpha / rank)}
        return out, {}
    config = _unet_config(path, adapter, model)
    is_xl = config.get("addition_embed_type") == "text_time"
    for module, (down, up) in adapter.items():
        # kohya trains SD 1.x and 2.x on diffusers' UNet, and SDXL on the original one
        name = "lora_unet_" + (unet_name(module, config) if is_xl else module).replace(".", "_")
        out |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    # A1111 takes a LoRA for one of SD 1.x unless it is told otherwise
    if is_xl:
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    elif any(name.endswith("attn2.to_k") and down.shape[1] == 1024 for name, (down, _) in adapter.items()):
        metadata["ss_v2"] = "True"
    return out, metadata


def _unet_config(path: Path, adapter: dict, model: Path | None) -> dict:
    """Of the named model, of the merged model that a run leaves beside its LoRA, or guessed from the layers."""
    beside = (path if path.is_dir() else path.parent).resolve().parent / "model"
    file = (model or beside) / "unet" / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    if model is not None:
        raise Refusal(f"--model: no such file: {file}")
    if any(name.startswith("down_blocks.0.attentions.") for name in adapter):  # SDXL has none at full resolution
        return UNETS["sd15"]
    if any(".transformer_blocks.1." in name for name in adapter):  # one a layer in SD 1.x and 2.x
        return UNETS["sdxl"] | {"layers_per_block": 2}
    raise Refusal(f"--lora: {path} does not show whether it belongs to SD or SDXL; name the folder with --model")


def provenance(folder: Path) -> dict[str, str]:
    """What is known of the model: its place, and from the manifest of the run that it lies in the recipe's hash."""
    folder = folder.resolve()
    out = {"inpo_fast.source": f"{folder.parent.name}/{folder.name}", "inpo_fast.version": version("inpo-fast")}
    try:
        manifest = json.loads((folder.parent / "manifest.json").read_text())
        return out | {f"inpo_fast.{key}": manifest[key] for key in ("variant", "config_sha256")}
    except (OSError, ValueError, KeyError, TypeError):
        return out


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str], output: Path) -> None:
    """Written aside and renamed."""
    aside = output.with_name(f".tmp-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in tensors.items()}, aside, {"format": "pt", **metadata})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(output)
    except (OSError, SafetensorError) as problem:
        aside.unlink(missing_ok=True)
        raise Refusal(f"--output {output} cannot be written ({problem}); free some space or name another") from problem


def convert(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out = {name: x if name.endswith(".alpha") else x.to(dtype) for name, x in tensors.items()}
    for name, x in out.items():
        if not x.isfinite().all():
            raise Refusal(f"{name} has values that are not finite in {dtype}; take --dtype bf16 or fp32")
    return out


def main() -> None:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m inpo_fast.export", description=about, allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="a diffusers folder; with --lora the one that it belongs to")
    parser.add_argument("--lora", type=Path, help="a LoRA that a run saved: its folder or file")
    parser.add_argument("--output", type=Path, required=True, help="FILE.safetensors")
    parser.add_argument("--format", choices=("kohya", "diffusers"), default="kohya", help="of a LoRA (default: kohya)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp16 for a model, fp32 for a LoRA")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    own = parser.parse_args()
    if own.model is None and own.lora is None:
        raise Refusal("nothing to export; name a diffusers folder with --model or a LoRA with --lora")
    if own.output.suffix != ".safetensors":
        raise Refusal(f"--output {own.output}: must end with .safetensors")
    if own.output.exists() and not own.overwrite:
        raise Refusal(f"--output {own.output} exists; replace it with --overwrite, or name another")
    quiet_libraries()
    dtype = DTYPES[own.dtype or ("fp16" if own.lora is None else "fp32")]
    if own.lora is not None:
        tensors, metadata = lora_file(own.lora, own.format, own.model)
        folder = own.lora if own.lora.is_dir() else own.lora.parent
    else:
        if not own.model.is_dir():
            raise Refusal(f"--model: no such folder: {own.model}")
        try:
            tensors, metadata = single_file(load_pipeline(str(own.model), dtype)), {}
        except Refusal as problem:
            raise Refusal(str(problem).replace("models.base", "--model", 1)) from problem
        folder = own.model
    save(convert(tensors, dtype), metadata | provenance(folder), own.output)
    print(f"{own.output}: {len(tensors)} tensors, {dtype}, {own.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_or_refuse("python -m inpo_fast.export", main)
