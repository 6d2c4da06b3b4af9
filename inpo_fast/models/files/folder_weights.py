"""Which weight files of a diffusers folder are opened: published folders hold them in several formats and precisions.

Full precision goes before the variants, .safetensors before .bin, and files that are there before Git LFS pointers to
files that are not (`git lfs pull --include` fetches some). Names: diffusers' docs, "Load pipelines", variants and
sharded checkpoints.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from inpo_fast.models.files.safetensors_header import read_header
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError

WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<a>[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<b>\w+))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<c>\w+))?\.json)?"
)
VARIANTS = ("fp32", "non_ema", "bf16", "fp16")  # in the order of preference; others after them
NARROW = ("fp16", "bf16")
OTHER_FORMATS = {".msgpack": "Flax", ".onnx": "ONNX", ".pb": "ONNX", ".h5": "TensorFlow", ".gguf": "GGUF"}
OTHER_FORMATS |= {".xml": "OpenVINO", ".ckpt": "pickled"}


@dataclass(frozen=True)
class WeightFiles:
    """variant: as diffusers calls it, None for the plain files. names: of the files, their index included."""

    variant: str | None
    safetensors: bool
    names: tuple[str, ...]

    def options(self) -> dict:
        """For `from_pretrained`."""
        return {"variant": self.variant, "use_safetensors": self.safetensors}


def choose_files(key: str, place: str, names: Iterable[str], pointers: Iterable[str] = ()) -> WeightFiles:
    """Out of the names in the folder of a part. UserError where none is there, or pointers alone."""
    names, pointers = list(names), set(pointers)
    groups: dict[tuple[str | None, bool], list[str]] = {}
    for name in names:
        if found := WEIGHTS.fullmatch(name):
            variant = found["a"] or found["b"] or found["c"]
            groups.setdefault((variant, found["format"] == "safetensors"), []).append(name)
    whole = {group: some for group, some in groups.items() if not pointers & set(some)}
    if not groups:
        others = sorted({what for name in names for end, what in OTHER_FORMATS.items() if name.endswith(end)})
        only = f"only {' and '.join(others)} weights" if others else "no weights"
        raise UserError(f"{key}: {place} holds {only}; its .safetensors (or .bin) files are needed")
    if not whole:
        raise UserError(f"{key}: {Path(place) / sorted(pointers)[0]} {git_lfs.WHAT}")

    def cost(group: tuple[str | None, bool]) -> tuple:
        variant, safe = group
        known = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
        return (variant is not None, known if variant else 0, not safe, variant or "")

    best = min(whole, key=cost)
    return WeightFiles(*best, tuple(sorted(whole[best])))


def choose_in_folder(key: str, folder: Path) -> WeightFiles:
    """In a folder on this machine, whose chosen files are looked at: cut off, pointers, other formats."""
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {folder}; the model is not whole, download it again")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = choose_files(key, str(folder), names, [path.name for path in git_lfs.pointers_below(folder)])
    for name in weights.names:
        if name.endswith(".safetensors"):
            read_header(key, folder / name)
        elif not (folder / name).stat().st_size:
            raise UserError(f"{key}: {folder / name} is empty; download it again")
    return weights
