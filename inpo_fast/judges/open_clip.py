"""OpenCLIP's tensor names and transformers' CLIPModel: the same network, the books kept differently.

OpenCLIP keeps q, k and v in one matrix and multiplies by its projections from the right; its image tower is called
`visual`. HPS v2.0 and v2.1 are published so (`xswu/HPSv2`, ViT-H/14). The text tower's other direction is
`inpo_fast.models.files.original_keys.open_clip_tensors`.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError

ENDS = {
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.proj": "visual_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
LAYER |= {"attn.out_proj": "self_attn.out_proj"}
TRANSPOSED = ("text_projection", "visual.proj")  # x W there, W x here
DERIVED = ("attn_mask",)  # a buffer of old versions
HEADS = 16  # of both towers of ViT-H/14; shapes do not tell


def clip_model(state: dict[str, torch.Tensor], heads: tuple[int, int] = (HEADS, HEADS)) -> CLIPModel:
    """A CLIPModel with these OpenCLIP weights, fp32. Sizes are read off the tensors; activation gelu, as in ViT-H.

    heads: of attention, image tower and text tower. ValueError for tensors that do not make such a model.
    """
    converted = {}
    for name, x in state.items():
        if name not in DERIVED:
            converted |= converted_tensor(name, x.float())
    missing = [name for name in ENDS if ENDS[name] not in converted]
    if missing:
        raise ValueError(f"no tensor {missing[0]}")
    with torch.device("meta"):
        model = CLIPModel(clip_config(state, heads))
    # transformers makes the position numbers when a model is built, and meta has no numbers
    own = {name for name, _ in model.named_parameters()}
    if differ := sorted(own ^ converted.keys()):
        raise ValueError(f"tensor {differ[0]} is missing or unknown")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if wrong := [name for name, shape in shapes.items() if shape != tuple(converted[name].shape)]:
        raise ValueError(f"{wrong[0]} is {tuple(converted[wrong[0]].shape)}, expected {shapes[wrong[0]]}")
    model = CLIPModel(model.config)
    model.load_state_dict(converted, strict=False)
    return model


def converted_tensor(name: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One OpenCLIP tensor under its transformers name or names. ValueError for an unknown one."""
    if name in ENDS:
        return {ENDS[name]: x.T.contiguous() if name in TRANSPOSED else x}
    found = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    found = found or re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(attn\.in_proj)_(weight|bias)", name)
    if found is None:
        raise ValueError(f"unknown tensor {name}")
    visual, number, part, kind = found.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
    if part == "attn.in_proj":
        return {f"{layer}self_attn.{q}_proj.{kind}": y.contiguous() for q, y in zip("qkv", x.chunk(3), strict=True)}
    if part not in LAYER:
        raise ValueError(f"unknown tensor {name}")
    return {f"{layer}{LAYER[part]}.{kind}": x}


def clip_config(state: dict[str, torch.Tensor], heads: tuple[int, int]) -> CLIPConfig:
    def layers(prefix: str) -> int:
        return len({n for n in state if re.fullmatch(rf"{prefix}transformer\.resblocks\.\d+\.ln_1\.weight", n)})

    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    words, text_width = state["token_embedding.weight"].shape
    joint = state["visual.proj"].shape[1]
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": layers(r"visual\."),
            "num_attention_heads": heads[0],
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_act": "gelu",
            "projection_dim": joint,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": layers(""),
            "num_attention_heads": heads[1],
            "vocab_size": words,
            "max_position_embeddings": len(state["positional_embedding"]),
            "hidden_act": "gelu",
            "projection_dim": joint,
            # the end of text has the highest number in OpenCLIP's vocabulary, and it stops at the first one
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": words - 1,
        },
        projection_dim=joint,
    )


def read_state(path: Path, judge: str) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or a .pt/.pth file, of which only tensors and plain values are read: nothing in it is
    ever run. UserError when it cannot be."""
    if not path.is_file():
        raise UserError(f"judge {judge}: no such file: {path}")
    if git_lfs.is_pointer(path):
        raise UserError(f"judge {judge}: {path} {git_lfs.WHAT}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as problem:
        raise UserError(f"judge {judge}: {path} cannot be read ({problem}); download it again") from problem
    except Exception as problem:  # pickle: whatever its parser meets in damaged or foreign bytes
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        line = f" ({line})" if "weights_only" not in line else ""  # torch advises there to let the pickle run code
        raise UserError(
            f"judge {judge}: {path} is damaged or holds more than tensors{line}; take the published file, or save "
            "its tensors as .safetensors where you trust it"
        ) from problem
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"judge {judge}: {path} holds no table of tensors")
    return {name.removeprefix("module."): x for name, x in state.items()}
