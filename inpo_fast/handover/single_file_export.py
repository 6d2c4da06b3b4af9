"""A diffusers folder or a LoRA as one .safetensors file with its metadata (`python -m inpo_fast.export`).

The names inside are the family's to say: models/unet.py `single_file`, `kohya_name`.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError

from inpo_fast.models.denoiser import Denoiser
from inpo_fast.models.families import PARTS, denoiser_in, denoiser_of
from inpo_fast.models.files.lora_files import read_lora, read_lora_alone
from inpo_fast.models.files.safetensors_metadata import About, kohya_metadata, modelspec, write_tensors
from inpo_fast.models.loading import load_pipeline
from inpo_fast.models.lora import kohya_tensors
from inpo_fast.models.lora import tensors as diffusers_tensors
from inpo_fast.report.start import public_name
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json


def export_model(folder: Path, output: Path, dtype: torch.dtype) -> int:
    """Writes the model of a diffusers folder; the number of its tensors."""
    if not folder.is_dir():
        raise UserError(f"--model: no such folder: {folder}")
    pipeline = load_pipeline(str(folder), dtype, key="--model")
    denoiser = denoiser_of(pipeline)
    tensors = denoiser.single_file(pipeline)
    metadata = modelspec(about_model(folder, denoiser, output.stem)) | provenance(folder)
    save(convert(tensors, dtype), metadata, output)
    return len(tensors)


def export_lora(path: Path, output: Path, dtype: torch.dtype, format: str, model: Path | None) -> int:
    """Writes a LoRA's file or folder in the names of `format`; the number of its tensors. model: as lora_tensors."""
    tensors, metadata = lora_tensors(path, format, model, output.stem)
    if metadata:  # a LoRA in diffusers' names has none, like the one that a run leaves
        metadata |= provenance(path if path.is_dir() else path.parent)
    save(convert(tensors, dtype), metadata, output)
    return len(tensors)


def lora_tensors(
    path: Path, format: str, model: Path | None, title: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata. model: the folder it belongs to; without one, and with none beside the LoRA as in a run's
    folder, the layout is read off the LoRA's own names."""
    folder = model or (path if path.is_dir() else path.parent).resolve().parent / "model"
    denoiser = denoiser_in(folder)
    if model is not None and denoiser is None:
        raise UserError(f"--model: {model} is no folder of a model: it holds no {' or '.join(PARTS)}/config.json")
    if denoiser is not None:
        with torch.device("meta"):
            lora = read_lora("--lora", path, denoiser.build(denoiser.config))
    else:
        folder = None
        lora, denoiser = read_lora_alone("--lora", path, layout=format == "kohya")
    if format == "diffusers":
        return diffusers_tensors(lora, f"{denoiser.part}."), {}
    about = about_model(folder, denoiser, title or path.stem)
    try:
        return kohya_tensors(lora, denoiser, format == "kohya-diffusers"), kohya_metadata(about, lora.rank)
    except KeyError as problem:
        raise UserError(
            f"--lora: the layer {problem.args[0]} has no name in the original UNet; take --format kohya-diffusers"
        ) from problem


def about_model(folder: Path | None, denoiser: Denoiser, title: str) -> About:
    """What a diffusers folder, and the run that it may belong to, say of a model."""
    known: dict = {}
    for name, path in (("scheduler", "scheduler/scheduler_config.json"), ("vae", "vae/config.json")):
        if folder is not None and (folder / path).is_file():
            known[name] = parse_json((folder / path).read_text(encoding="utf-8"))
    kind = known.get("scheduler", {}).get("prediction_type", "epsilon") if "scheduler" in known else None
    side = denoiser.native_side
    if "vae" in known and side:
        side *= denoiser.downscale(known["vae"])
    model = {} if folder is None else _manifest(folder).get("model", {})
    return About(
        denoiser,
        title,
        side if "vae" in known else None,
        None if kind is None else "v" if kind == "v_prediction" else "epsilon",
        public_name(model) if model.get("base") else None,
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
        manifest = parse_json((folder.resolve().parent / "manifest.json").read_text(encoding="utf-8"))
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
