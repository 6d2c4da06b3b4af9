"""What a model is, in 32 hexadecimal digits: so that a cache is never used for another one."""

import hashlib
import json

import torch

# of transformers' settings, what decides beside the weights: their others name versions, or come with a new version
ENCODER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "max_position_embeddings")
# by their tokens two tokenizers of one vocabulary are told apart: merges, case, white space
PROBES = (
    "a photograph of an astronaut riding a horse",
    "Größe  naïveté\t№42 ½ 東京, e.g. snake_case!",
    "\U0001f600 é É",
)


def fingerprint(module: torch.nn.Module) -> str:
    """Of a module's weights and settings; adapters left out: LoRA's reference is its base."""
    settings = getattr(module, "config", None)
    if hasattr(settings, "items"):  # diffusers'
        own = {k: v for k, v in settings.items() if not k.startswith("_")}
    else:
        parts = {"": settings} | {k: getattr(settings, k, None) for k in ("text_config", "vision_config")}
        own = {f"{p}.{k}": getattr(s, k) for p, s in parts.items() for k in ENCODER_SETTINGS if hasattr(s, k)}
    out = hashlib.blake2b(json.dumps(own, sort_keys=True, default=str).encode(), digest_size=16)
    tensors = {name.replace(".base_layer", ""): x for name, x in module.state_dict().items() if ".lora_" not in name}
    for name, x in sorted(tensors.items()):
        out.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        out.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return out.hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """Of a transformers tokenizer: what tokens prompts become. Its vocabulary, special tokens, length, and probes."""
    out = hashlib.blake2b(digest_size=16)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = [tokenizer(text, truncation=True)["input_ids"] for text in PROBES]
    facts = [sorted(tokenizer.get_vocab().items()), special, tokenizer.model_max_length, ids]
    out.update(json.dumps(facts, sort_keys=True).encode())
    return out.hexdigest()


def tokenizer_fingerprints(pipeline) -> list[str]:
    """Of a diffusers pipeline's tokenizers."""
    names = sorted(name for name in pipeline.config if name.startswith("tokenizer"))
    found = (getattr(pipeline, name) for name in names)
    return [tokenizer_fingerprint(tokenizer) for tokenizer in found if tokenizer is not None]
