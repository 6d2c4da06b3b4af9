"""diffusers' tensor names in the words of the original checkpoints: CompVis' latent-diffusion (SD 1.x, 2.x) and
Stability's generative-models (SDXL), which ComfyUI, A1111 and `from_single_file` read.

The networks are the same, the books are kept differently. diffusers groups layers by resolution; the original UNet
counts every residual layer and every resampling in one row, so block b begins at 1 + b (layers + 1) where all blocks
have as many. The original VAE decoder counts its blocks from the finest, its attention is a 1x1 convolution. OpenCLIP
keeps q, k and v in one matrix and multiplies by its projection from the right.

A tensor that has no original name raises KeyError(name).
"""

import re

import torch

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PART = re.compile(
    r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_name(name: str, config) -> str:
    """Of a tensor or module of UNet2DConditionModel. config: a mapping with its layers_per_block, up_block_types."""
    if (end := _renamed(name, UNET_ENDS)) is not None:
        return end
    side, block, kind, index, rest = _parts(name)
    if kind == "resnets" and (rest := _renamed(rest, UNET_RESNET)) is None:
        raise KeyError(name)
    if side == "mid_block":  # resnet, attention, resnet
        return f"middle_block.{2 * index + (kind == 'attentions')}.{rest}"
    per_block = config["layers_per_block"]
    per_block = [per_block] * len(config["up_block_types"]) if isinstance(per_block, int) else list(per_block)
    per_block = per_block if side == "down_blocks" else per_block[::-1]
    layers, row = per_block[block], sum(per_block[:block]) + block
    if kind == "downsamplers":
        return f"input_blocks.{1 + row + layers}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":  # comes after the attention, where there is one
        has_attention = "CrossAttn" in config["up_block_types"][block]
        return f"output_blocks.{row + layers}.{1 + has_attention}.{rest}"
    number, first = (1 + row + index, "input_blocks") if side == "down_blocks" else (row + index, "output_blocks")
    return f"{first}.{number}.{int(kind == 'attentions')}.{rest}"


def vae_tensors(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """All of AutoencoderKL."""
    out = {}
    for name, x in state.items():
        theirs = _vae_name(name, config)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", theirs)
        out[theirs] = x[:, :, None, None] if is_projection else x
    return out


def _vae_name(name: str, config) -> str:
    half, _, own = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return name
    if (end := _renamed(own, VAE_ENDS)) is not None:
        return f"{half}.{end}"
    side, block, kind, index, rest = _parts(own)
    if (
        kind in ("resnets", "attentions")
        and (rest := _renamed(rest, VAE_RESNET if kind == "resnets" else VAE_ATTENTION)) is None
    ):
        raise KeyError(name)
    if side == "mid_block":
        return f"{half}.mid.{'block' if kind == 'resnets' else 'attn'}_{index + 1}.{rest}"
    if side == "up_blocks":
        block = len(config.block_out_channels) - 1 - block
    where = {"resnets": f"block.{index}", "downsamplers": "downsample", "upsamplers": "upsample"}[kind]
    return f"{half}.{side.removesuffix('_blocks')}.{block}.{where}.{rest}"


def clip_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of CLIPTextModel: the original is the transformers model itself, of the time when its names began with
    text_model."""
    own = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in state.items()}
    for name in own:
        if not re.match(r"text_model\.(embeddings|encoder|final_layer_norm)\.", name):
            raise KeyError(name.removeprefix("text_model."))
    return own


def open_clip_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of CLIPTextModel(WithProjection), as OpenCLIP's text tower."""
    state = {name.removeprefix("text_model."): x for name, x in state.items()}
    out = {}
    for name, x in state.items():
        if name in OPEN_CLIP_ENDS:
            out[OPEN_CLIP_ENDS[name]] = x
        elif name == "text_projection.weight":  # W x there, x W here
            out["text_projection"] = x.T.contiguous()
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            layer, rest = f"transformer.resblocks.{found[1]}.", found[2]
            if fused := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
                if fused[1] == "q":
                    qkv = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                    out[f"{layer}attn.in_proj_{fused[2]}"] = torch.cat(qkv)
            elif (rest := _renamed(rest, OPEN_CLIP_LAYER)) is not None:
                out[layer + rest] = x
            else:
                raise KeyError(name)
        else:
            raise KeyError(name)
    return out


def _renamed(name: str, names: dict[str, str]) -> str | None:
    """The name with its beginning replaced, if that is one of `names`."""
    for ours, theirs in names.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return None


def _parts(name: str) -> tuple[str, int, str, int, str]:
    """down_blocks.2.resnets.1.conv1.weight -> ("down_blocks", 2, "resnets", 1, "conv1.weight")."""
    found = PART.fullmatch(name)
    if found is None:
        raise KeyError(name)
    side, block, kind, index, rest = found.groups()
    return side, int(block or 0), kind, int(index), rest
