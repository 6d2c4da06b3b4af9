"""What a model or a source of pairs is, in 32 hexadecimal digits: so that a cache is never used for another one."""

import hashlib
import json

import fsspec
import torch

from inpo_fast.runtime.errors import UserError

ENDS = 64 * 1024  # bytes of a file's beginning and end that are looked at; parquet's index stands at the end


def fingerprint(module: torch.nn.Module) -> str:
    """Of a module's weights, and its settings where they are diffusers'; adapters left out: LoRA's reference is its
    base."""
    settings = getattr(module, "config", None)
    # transformers' settings name their library's version, and its encoders differ in their weights if in anything
    own = {k: v for k, v in settings.items() if not k.startswith("_")} if hasattr(settings, "items") else {}
    out = hashlib.blake2b(json.dumps(own, sort_keys=True, default=str).encode(), digest_size=16)
    tensors = {name.replace(".base_layer", ""): x for name, x in module.state_dict().items() if ".lora_" not in name}
    for name, x in sorted(tensors.items()):
        out.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        out.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return out.hexdigest()


def source_fingerprint(path: str) -> str:
    """Of a file or folder of pairs, local or any fsspec URL: names, sizes, the listing, both ends of each data file."""
    out = hashlib.blake2b(digest_size=16)
    try:
        system, root = fsspec.core.url_to_fs(path)
        files = sorted(system.find(root)) if system.isdir(root) else [root]
        for name in files:
            size = system.size(name)
            out.update(f"{name.removeprefix(root)} {size}\n".encode())
            if name.endswith((".parquet", ".jsonl", ".json", ".tar")):
                with system.open(name, "rb") as file:
                    out.update(file.read(ENDS))
                    file.seek(max(0, size - ENDS))
                    out.update(file.read(ENDS))
    except (OSError, ImportError, ValueError) as problem:
        raise UserError(f"data.source: {path} cannot be read ({problem})") from problem
    return out.hexdigest()
