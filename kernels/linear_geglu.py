"""GEGLU with its projection in one matrix product: y = h gelu(g), [h, g] = x W^T + b. No gradient.

Shazeer, arXiv 2002.05202, Eq. 6. For the passes without autograd (inversion, reference): the 2 D wide product is never
written, which saves 3 D elements of traffic per row. Each program multiplies one block of x with the two blocks of W
that belong together and applies the gate to its fp32 sums.
Shapes: x (..., K), weight (2 D, K), bias (2 D,), one floating dtype, contiguous; y (..., D).
"""

import os
from math import prod

import torch
import triton
import triton.language as tl
from inpo_kernels.geglu import geglu_reference, normal_cdf
from torch.utils.flop_counter import register_flop_formula

# Triton's interpreter multiplies bf16 by its bit patterns: there the operands are widened first
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def linear_geglu_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The definition in at least fp32 (float64 stays float64), rounded once, to x's dtype, at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return geglu_reference(torch.nn.functional.linear(x.to(wide), weight.to(wide), bias.to(wide))).to(x.dtype)


@triton.jit
def _fwd(
    p_x, p_w, p_b, p_y, M, D, K,
    EVEN_K: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # programs that follow each other share rows of x and columns of W: GROUP blocks of rows are walked column by column
    i, n_m, n_d = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D)
    first = i // (GROUP * n_d) * GROUP
    high = tl.minimum(n_m - first, GROUP)
    i_m, i_d = first + i % (GROUP * n_d) % high, i % (GROUP * n_d) // high
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < M, o_d < D
    o_k = tl.arange(0, BLOCK_K)
    # rows and columns past the end are read again from the start and never stored: no mask inside the loop
    p_x += tl.where(m_m, o_m, 0)[:, None] * K + o_k[None, :]
    p_h = p_w + tl.where(m_d, o_d, 0)[None, :] * K + o_k[:, None]
    p_g = p_h + tl.cast(D, tl.int64) * K  # a plain .to() does not compile where D is 1, a constant
    b_h = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_g = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for lo in range(0, K, BLOCK_K):
        if EVEN_K:
            x, h, g = tl.load(p_x + lo), tl.load(p_h + lo), tl.load(p_g + lo)
        else:
            m_k = o_k < K - lo
            x = tl.load(p_x + lo, mask=m_k[None, :], other=0.0)
            h = tl.load(p_h + lo, mask=m_k[:, None], other=0.0)
            g = tl.load(p_g + lo, mask=m_k[:, None], other=0.0)
        if WIDEN:
            x, h, g = x.to(tl.float32), h.to(tl.float32), g.to(tl.float32)
        b_h = tl.dot(x, h, b_h, input_precision="ieee")
        b_g = tl.dot(x, g, b_g, input_precision="ieee")
    b_h += tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_g += tl.load(p_b + D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    y = b_h * (b_g * normal_cdf(b_g))
    tl.store(p_y + o_m[:, None] * D + o_d[None, :], y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])


def _blocks(x: torch.Tensor) -> dict[str, int]:
    if x.dtype == torch.float32:  # no tensor cores: exactness only
        return {"BLOCK_M": 32, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_D": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@torch.library.custom_op("inpo::linear_geglu", mutates_args=())
def _linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    depth, width = x.shape[-1], len(weight) // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        rows, blocks = y.numel() // width, _blocks(x)
        grid = (triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(width, blocks["BLOCK_D"]),)
        even = depth % blocks["BLOCK_K"] == 0
        _fwd[grid](
            x, weight, bias, y, rows, width, depth, EVEN_K=even, WIDEN=INTERPRETED or x.dtype == torch.float32, GROUP=8,
            **blocks,
        )  # fmt: skip
    return y


@_linear_geglu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


@register_flop_formula(torch.ops.inpo.linear_geglu)
def _flop(x_shape, weight_shape, bias_shape, out_shape=None) -> int:
    return 2 * prod(x_shape) * weight_shape[0]  # torch's own counter then sees the product inside


def linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y (..., D): the op on CUDA and meta tensors, the reference elsewhere.

    ValueError on wrong shapes, dtypes, devices, strides, and where a gradient would be asked for.
    """
    if weight.ndim != 2 or len(weight) % 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected (2 D, K) with x (..., K), x is {tuple(x.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, expected ({len(weight)},)")
    for name, v in (("weight", weight), ("bias", bias)):
        if v.dtype != x.dtype or v.device != x.device:
            raise ValueError(f"{name} is {v.dtype} on {v.device}, x {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, weight, bias)):
        raise ValueError("linear_geglu has no gradient: call it under torch.no_grad(), or linear and geglu instead")
    if not (x.is_cuda or x.is_meta):
        return linear_geglu_reference(x, weight, bias)
    for name, v in (("x", x), ("weight", weight), ("bias", bias)):
        if not v.is_contiguous():
            raise ValueError(f"{name} must be contiguous (strides {v.stride()}); call .contiguous() on it")
    return _linear_geglu(x, weight, bias)
