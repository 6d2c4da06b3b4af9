"""Writes one .safetensors file: tensors, and the metadata that programs look for in it.

Metadata follow Stability's model specification (modelspec.*), and for LoRAs the names of sd-scripts (ss_*, sshs_*)
that user interfaces sort and filter by.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from inpo_fast.models.denoiser import Denoiser
from inpo_fast.runtime.files import whole

HASH = "0" * 64  # stands for the SHA-256 of the tensors' bytes until they are written


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Written aside, synced and renamed. Every HASH in the metadata becomes the SHA-256 of all bytes behind the header,
    as sd-scripts and the model specification count it. OSError or SafetensorError where it cannot be written."""
    with whole(path) as aside:
        save_file({name: x.contiguous() for name, x in tensors.items()}, aside, {"format": "pt", **metadata})
        if any(HASH in value for value in metadata.values()):
            _fill_hash(aside)


def _fill_hash(path: Path) -> None:
    """The header keeps its length, so that nothing has to be written twice."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # from here on: the tensors
        file.seek(8)
        file.write(header.replace(HASH.encode(), digest.encode()))


@dataclass(frozen=True)
class About:
    """What is written into a file; None: not known. side: pixels of the pictures that the model draws. prediction:
    epsilon or v, as NoisePath.output. base: the model that it was trained from, which a LoRA
    goes on top of: a hub id, or the name of a folder or file."""

    denoiser: Denoiser
    title: str
    side: int | None = None
    prediction: str | None = None
    base: str | None = None


def modelspec(about: About, lora: bool = False) -> dict[str, str]:
    """The model specification's fields."""
    fields = {
        "sai_model_spec": "1.0.1",
        **about.denoiser.modelspec(about.prediction, lora),
        "title": about.title,
        "date": datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat(),
        "hash_sha256": f"0x{HASH}",
        "description": f"aligned with preference pairs by inpo-fast {version('inpo-fast')}",
    }
    if about.side:
        fields["resolution"] = f"{about.side}x{about.side}"
    if about.prediction is not None:
        fields["prediction_type"] = about.prediction
    if about.base:
        fields["merged_from"] = about.base
    return {f"modelspec.{name}": value for name, value in fields.items()}


def kohya_metadata(about: About, rank: int) -> dict[str, str]:
    """sd-scripts' fields of a LoRA whose alpha is its rank, and the model specification's."""
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_output_name": re.sub(r"[^\w.-]+", "-", about.title),
        **about.denoiser.kohya_fields(),
        "sshs_model_hash": HASH,
    }
    if about.base:
        fields["ss_sd_model_name"] = about.base
    return fields | modelspec(about, lora=True)
