"""Attention inside a fast UNet: a back end that can be chosen, and keys and values that all images share.

A back end serves policy, reference and inversion alike, with and without a gradient: another one in one of them would
round otherwise, and the step-0 logit would not be 0.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from inpo_fast.models.config import AttentionBackend
from inpo_fast.runtime.errors import UserError

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# (major compute capability, size of a head) -> back end, from `python -m bench.kernels.attention`. Empty until
# that was run on a GPU: torch chooses.
FASTEST: dict[tuple[int, int], str] = {}


def use(unet: torch.nn.Module, backend: AttentionBackend, device: torch.device) -> None:
    """Puts the processor into every attention of a UNet. UserError where the back end cannot run."""
    if backend in _KERNELS and device.type != "cuda":
        raise UserError(f"models.attention={backend} runs on a GPU only; take auto or torch")
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as problem:
            raise UserError(
                f"models.attention=xformers: {problem}; pip install 'inpo-fast[xformers]', or take auto"
            ) from problem
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    for module in unet.modules():
        if isinstance(module, Attention) and is_plain(module):
            size = module.inner_dim // module.heads
            chosen = FASTEST.get((major, size), "torch") if backend == "auto" else backend
            module.set_processor(Processor(chosen))


def is_plain(attention: Attention) -> bool:
    """Neither norms nor rescaling nor a mask's bias around the product: SD1.x, 2.x and XL."""
    return (
        type(attention.processor) is AttnProcessor2_0
        and attention.group_norm is None
        and attention.spatial_norm is None
        and not attention.norm_cross
        and getattr(attention, "norm_q", None) is None
        and getattr(attention, "norm_k", None) is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and attention.to_out[1].p == 0.0
    )


class Processor:
    """hidden_states (B, L, C); encoder_hidden_states (B, T, D), or (1, T, D): the same text for all images, whose keys
    and values are computed once and not B times."""

    def __init__(self, backend: str):
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        if attention_mask is not None:
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        # with one text all images' queries stand in one long row: the same products
        images = len(text)
        query, key, value = (
            x.reshape(images, -1, attn.heads, x.shape[-1] // attn.heads)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        out = attend(query, key, value, self.backend).reshape(*hidden_states.shape[:2], -1)
        return attn.to_out[0](out)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, all (B, L, heads, d)."""
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    if backend == "torch":
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    with sdpa_kernel(_KERNELS[backend]):
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
