"""What a model is, in 32 hexadecimal digits: so that a cache is never used for another one."""

import hashlib
import json

import torch


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
