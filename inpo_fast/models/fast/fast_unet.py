"""Makes diffusers' UNet2DConditionModel fast in place; `undo` makes it plain again.

fused: channels_last from the first convolution to the last, and the hot parts of diffusers' modules on our kernels:
GroupNorm + SiLU with the time embedding added inside, LayerNorm with the residual, GEGLU, 1x1 convolutions as matrix
products, attention with a chosen back end. compiled: the same, with its blocks under torch.compile
(compiled_blocks.py). The parameters stay the module's own: what is saved, trained or adapted does not change. What a
module does that this file does not know, it leaves alone.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from inpo_kernels.geglu import geglu
from inpo_kernels.group_norm_silu import group_norm_silu
from inpo_kernels.layer_norm import layer_norm
from inpo_kernels.linear_geglu import linear_geglu
from torch import nn

from inpo_fast.models.config import AttentionBackend, Fast
from inpo_fast.models.fast import attention
from inpo_fast.models.fast.compiled_blocks import blockwise, evaluate
from inpo_fast.models.fast.fp8 import Fp8Weights, eligible
from inpo_fast.runtime.errors import UserError

METHODS = ("forward", "_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")  # what is put in place
INDEXABLE = 2**31 - 1  # elements that torch's channels_last upsampling can address (pytorch issue 141831)


class Mode:
    """What the fused modules of one UNet look at while they run."""

    def __init__(self, graphs: bool = False):
        self.graphs = graphs
        self.cuts = False  # within an evaluation without gradient on compiled blocks
        self.inversion = False  # nothing here is compared with the policy's prediction: other rounding is allowed
        self.fp8: Fp8Weights | None = None  # within an inversion that wants it
        self.narrow: Fp8Weights | None = None  # its weights, kept for the next one
        self.compiled: Callable | None = None  # the inversion's evaluation as a CUDA graph

    def __deepcopy__(self, memo) -> "Mode":
        return Mode(self.graphs)  # another UNet's: neither its code nor its weights


def resolve(how: Fast, device: torch.device) -> Fast:
    """auto: fused on a GPU, off elsewhere, where the kernels' references would only cost."""
    return how if how != "auto" else "fused" if device.type == "cuda" else "off"


def make_fast(
    unet: UNet2DConditionModel, how: Fast, backend: AttentionBackend = "auto", cuda_graphs: bool = False
) -> None:
    """In place; before parameters are copied or optimized, because their layout in memory changes."""
    if how == "off":
        return
    unet.to(memory_format=torch.channels_last)
    attention.use(unet, backend, unet.device)
    unet.fast_mode = Mode(graphs=cuda_graphs and how == "compiled")
    for module in unet.modules():
        for name, function in _replacements(module).items():
            function = blockwise(function) if how == "compiled" and function in COMPILED else function
            setattr(module, name, types.MethodType(function, module))
            module.fast_mode = unet.fast_mode
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            for layer in block.modules():
                if eligible(layer):
                    layer.fast_mode = unet.fast_mode
                    layer.forward = types.MethodType(_linear, layer)
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        unet.conv_norm_out.forward = types.MethodType(_norm_silu, unet.conv_norm_out)
        unet.conv_act.forward = types.MethodType(lambda self, x: x, unet.conv_act)
    if how == "compiled":
        unet.forward = types.MethodType(_forward, unet)


def undo(unet: UNet2DConditionModel) -> None:
    """Takes back what `make_fast` put in; the weights stay in channels_last."""
    for module in unet.modules():
        for name in (*METHODS, "fast_mode", "narrow"):
            module.__dict__.pop(name, None)
        if isinstance(getattr(module, "processor", None), attention.Processor):
            module.set_processor(attention.AttnProcessor2_0())


def is_fast(unet: UNet2DConditionModel) -> bool:
    return hasattr(unet, "fast_mode")


def compiled_blocks(unet: UNet2DConditionModel) -> int:
    """How many different blocks the first evaluations compile (a block that meets images of two sizes: twice); 0 where
    none is compiled."""
    found = set()
    for module in unet.modules():
        for method in map(module.__dict__.get, METHODS):
            if (function := getattr(method, "__wrapped__", None)) in COMPILED:
                found.add((function, tuple((name, p.shape) for name, p in module.named_parameters())))
    return len(found)


def wants_fixed_batch(unet: UNet2DConditionModel) -> bool:
    """A CUDA graph is captured for one batch size."""
    return is_fast(unet) and unet.fast_mode.graphs


@contextmanager
def inverting(unet: UNet2DConditionModel, fp8: bool = False) -> Iterator[None]:
    """Within the block predictions need not round as the policy's and the reference's do: projection and GEGLU are one
    kernel, and with fp8 the transformers' linear layers keep 4 bits of the weights that are there now."""
    mode = getattr(unet, "fast_mode", None)
    if mode is None:
        if fp8:
            raise UserError("inversion.fp8 needs models.fast=fused or compiled")
        yield
        return
    mode.inversion = True
    if fp8:
        if mode.narrow is None:
            layers = (module for module in unet.modules() if "fast_mode" in module.__dict__ and eligible(module))
            mode.narrow = Fp8Weights(layers)
        mode.narrow.refresh()
        mode.fp8 = mode.narrow
    try:
        yield
    finally:
        mode.inversion, mode.fp8 = False, None


def _forward(self: UNet2DConditionModel, *args, **kwargs):
    mode = self.fast_mode
    if not (mode.graphs and mode.inversion) or torch.is_grad_enabled():
        return evaluate(self, type(self).forward, *args, **kwargs)
    if mode.compiled is None:
        # no freezing: the weights are the graph's inputs, and what the optimizer writes into them is seen
        mode.compiled = torch.compile(
            types.MethodType(type(self).forward, self),
            fullgraph=True,  # a break would be slow in silence
            dynamic=False,
            mode="reduce-overhead",
        )
    out = mode.compiled(*args, **kwargs)
    out.sample = out.sample.clone()  # the graph writes the next output to the same place
    return out


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    narrow = self.fast_mode.fp8
    if narrow is None or torch.is_grad_enabled():
        return F.linear(x, self.weight, self.bias)
    return narrow.linear(self, x)


def _replacements(module: nn.Module) -> dict[str, Callable]:
    if isinstance(module, ResnetBlock2D) and _is_plain(module):
        return {"forward": _resnet}
    if isinstance(module, Transformer2DModel) and module.is_input_continuous and isinstance(module.norm, nn.GroupNorm):
        return {"_operate_on_continuous_inputs": _enter, "_get_output_for_continuous_inputs": _leave}
    if isinstance(module, BasicTransformerBlock) and _is_pre_norm(module):
        return {"forward": _block}
    if isinstance(module, GEGLU):
        return {"forward": _geglu}
    if isinstance(module, Upsample2D) and module.interpolate and module.use_conv and module.name == "conv":
        return {"forward": _upsample} if not module.use_conv_transpose and module.norm is None else {}
    return {}


def _is_plain(resnet: ResnetBlock2D) -> bool:
    return (
        resnet.time_embedding_norm == "default"
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and resnet.upsample is None
        and resnet.downsample is None
        and resnet.output_scale_factor == 1.0
        and resnet.dropout.p == 0.0
        and not resnet.skip_time_act
    )


def _is_pre_norm(block: BasicTransformerBlock) -> bool:
    norms = (block.norm1, block.norm2, block.norm3)
    return (
        block.norm_type == "layer_norm"
        and all(isinstance(norm, nn.LayerNorm) and norm.weight is not None for norm in norms)
        and block.pos_embed is None
        and not block.only_cross_attention
        and block._chunk_size is None
    )


def _norm(norm: nn.GroupNorm, x: torch.Tensor, silu: bool, temb: torch.Tensor | None = None) -> torch.Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, temb)


def _norm_silu(self: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return _norm(self, x, silu=True)


def _resnet(self: ResnetBlock2D, input_tensor: torch.Tensor, temb: torch.Tensor | None = None, *_, **__):
    h = self.conv1(_norm(self.norm1, input_tensor, silu=True))
    added = None if self.time_emb_proj is None else self.time_emb_proj(F.silu(temb))
    h = self.conv2(_norm(self.norm2, h, silu=True, temb=added))
    return h + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


def _enter(self: Transformer2DModel, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(N, C, H, W) to (N, H W, C): in channels_last no copy."""
    tokens = _norm(self.norm, hidden_states, silu=False).permute(0, 2, 3, 1).flatten(1, 2)
    tokens = _pointwise(self.proj_in, tokens)
    return tokens, tokens.shape[-1]


def _leave(self: Transformer2DModel, hidden_states, residual, batch_size, height, width, inner_dim) -> torch.Tensor:
    tokens = _pointwise(self.proj_out, hidden_states)
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2) + residual


def _pointwise(layer: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """A linear layer, or a 1x1 convolution (plain or with an adapter around it), on (N, L, C)."""
    if type(layer) is nn.Conv2d:
        return F.linear(tokens, layer.weight.flatten(1), layer.bias)
    if isinstance(getattr(layer, "base_layer", layer), nn.Conv2d):
        image = tokens.transpose(1, 2).unsqueeze(3)  # L x 1 pixels: what a 1x1 convolution does not mind
        return layer(image).squeeze(3).transpose(1, 2).contiguous()
    return layer(tokens)


def _block(
    self: BasicTransformerBlock,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    timestep=None,
    cross_attention_kwargs: dict | None = None,
    class_labels=None,
    added_cond_kwargs=None,
) -> torch.Tensor:
    more = cross_attention_kwargs or {}
    normed, x = _layer_norm(self.norm1, hidden_states)
    out = self.attn1(normed, attention_mask=attention_mask, **more)
    normed, x = _layer_norm(self.norm2, out, x)
    out = self.attn2(normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **more)
    normed, x = _layer_norm(self.norm3, out, x)
    return self.ff(normed) + x


def _layer_norm(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor | None = None):
    return layer_norm(x.contiguous(), norm.weight, norm.bias, norm.eps, residual)


def _geglu(self: GEGLU, hidden_states: torch.Tensor, *_, **__) -> torch.Tensor:
    # policy and reference must round alike, so the single kernel, which has no gradient, is the inversion's alone
    if not torch.is_grad_enabled() and type(self.proj) is nn.Linear:  # asked first: compiled for inversion and loss
        mode = self.fast_mode
        if mode.inversion and mode.fp8 is None:
            return linear_geglu(hidden_states, self.proj.weight, self.proj.bias)
    return geglu(self.proj(hidden_states))


def _upsample(self: Upsample2D, hidden_states: torch.Tensor, output_size=None, *_, **__) -> torch.Tensor:
    """diffusers copies to NCHW from 64 images on; here a batch that torch cannot address is cut into parts."""
    how = {"size": output_size} if output_size is not None else {"scale_factor": 2.0}
    per_image = hidden_states[0].numel() * 4 if output_size is None else self.channels * output_size[0] * output_size[1]
    parts = hidden_states.split(max(1, INDEXABLE // per_image))
    large = [F.interpolate(part, mode="nearest", **how) for part in parts]
    return self.conv(large[0] if len(large) == 1 else torch.cat(large))


# Convolutions alone (in, out, down, up) have nothing to gain from a compiler.
COMPILED = (_resnet, _enter, _leave, _block)
