"""A .safetensors file by its header: names, shapes and numbers' formats of its tensors, read without the tensors.

The header is JSON behind its length in eight bytes (safetensors' README, "Format"). Names are given without what
wrappers put before them: `state_dict.` (a trainer's checkpoint), `module.` (DistributedDataParallel) and `_orig_mod.`
(torch.compile).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json

LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
WRAPPERS = ("state_dict.", "module.", "_orig_mod.")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
OTHER_FORMATS = {  # first bytes -> what such a file is
    b"{": "is JSON, not weights: give the folder that it lies in",
    b"<": "is a web page (HTML or XML), not a model: the download gave an error page; download it again",
    b"GGUF": "is a GGUF file, whose weights are quantized; take the model's .safetensors file",
    b"PK\x03\x04": "is a PyTorch pickle, which could run code when opened; take the model's .safetensors file, or save "
    "it as one",
    b"\x80": "is a pickle, which could run code when opened; take the model's .safetensors file, or save it as one",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file: the name it has there, its format ("F16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsFile:
    """tensors: by name without wrappers. metadata: texts that were saved with them."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def starting(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def formats(self, names: Iterable[str] | None = None) -> set[str]:
        return {self.tensors[name].dtype for name in (self.tensors if names is None else names)}

    def read(self, name: str) -> torch.Tensor:
        return self._opened.get_tensor(self.tensors[name].name)

    @cached_property
    def _opened(self):
        return safe_open(self.path, "pt")


def read_header(key: str, path: str | Path) -> SafetensorsFile:
    """UserError, which begins with the setting `key`, of what is missing, cut off, or no safetensors file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{key}: no such file: {path}")
    if git_lfs.is_pointer(path):
        raise UserError(f"{key}: {path} {git_lfs.WHAT}")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            for beginning, what in OTHER_FORMATS.items():
                if start.startswith(beginning) and not (len(beginning) == 1 and start[3:] == bytes(5)):
                    raise UserError(f"{key}: {path} {what}")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(LONGEST_HEADER, size):
                raise UserError(f"{key}: {path} is not a .safetensors file, or only its beginning ({size} bytes)")
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        stored = [StoredTensor(name, x["dtype"], tuple(x["shape"])) for name, x in header.items()]
        needed = 8 + length + max((x["data_offsets"][1] for x in header.values()), default=0)
    except OSError as problem:
        raise UserError(f"{key}: {path} cannot be read ({problem.strerror or problem})") from problem
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{key}: {path} is not a .safetensors file (its header is no list of tensors)") from problem
    if size < needed:
        raise UserError(
            f"{key}: {path} is cut off: {size:,} of {needed:,} bytes are there; the download was interrupted, start it "
            "again"
        )
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as problem:  # what the library checks beyond: overlaps, unknown formats
        raise UserError(f"{key}: {path} is damaged ({str(problem).splitlines()[0]}); download it again") from problem
    tensors: dict[str, StoredTensor] = {}
    for each in stored:
        plain = plain_name(each.name)
        if plain not in tensors or each.name == plain:
            tensors[plain] = each
    return SafetensorsFile(path, tensors, {str(k): str(v) for k, v in metadata.items()})


def plain_name(name: str) -> str:
    """Without wrappers: `_orig_mod.` goes wherever it stands, the others at the beginning."""
    name = name.replace("_orig_mod.", "")
    while name.startswith(WRAPPERS):
        name = name[len(next(w for w in WRAPPERS if name.startswith(w))) :]
    return name
