"""GEGLU: y = h gelu(g), where x = [h, g] along the last dimension, forward and backward.

Shazeer, arXiv 2002.05202, Eq. 6; gelu with the exact erf, as in diffusers' GEGLU.
Shapes: x (..., 2 D) contiguous, any floating dtype; y (..., D). x gets a gradient.
Forward reads 2 D and writes D per row; backward reads 3 D and writes 2 D. fp32 arithmetic.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.layout import exact_block

TILE = 2048


def geglu_reference(x: torch.Tensor) -> torch.Tensor:
    """The definition in at least fp32 (float64 stays float64), rounded once, to x's dtype, at the end."""
    h, g = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (h * torch.nn.functional.gelu(g)).to(x.dtype)


@triton.jit
def normal_cdf(g):
    """Phi(g) in fp32: gelu(g) = g Phi(g)."""
    return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))


@triton.jit
def _fwd(p_x, p_y, rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o = o_r[:, None] * (2 * D) + o_d[None, :]
    h = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    g = tl.load(p_x + o + D, mask=m, other=0.0).to(tl.float32)
    y = h * (g * normal_cdf(g))
    tl.store(p_y + o_r[:, None] * D + o_d[None, :], y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _bwd(p_x, p_dy, p_dx, rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o = o_r[:, None] * (2 * D) + o_d[None, :]
    h = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    g = tl.load(p_x + o + D, mask=m, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + o_r[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    cdf = normal_cdf(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(p_dx + o, (dy * (g * cdf)).to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_dx + o + D, (dy * h * (cdf + g * density)).to(p_dx.dtype.element_ty), mask=m)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block_d = exact_block(width, least=64, most=512)
    block_r = max(TILE // block_d, 1)
    return (triton.cdiv(rows, block_r), triton.cdiv(width, block_d)), {"BLOCK_R": block_r, "BLOCK_D": block_d}


@torch.library.custom_op("inpo::geglu", mutates_args=())
def _geglu(x: torch.Tensor) -> torch.Tensor:
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    if y.numel():
        grid, blocks = _tiles(y.numel() // width, width)
        _fwd[grid](x, y, y.numel() // width, width, **blocks)
    return y


@_geglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("inpo::geglu_backward", mutates_args=())
def _geglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = torch.empty_like(x)
    if x.numel():
        width = x.shape[-1] // 2
        grid, blocks = _tiles(x.numel() // (2 * width), width)
        _bwd[grid](x, dy.contiguous(), dx, x.numel() // (2 * width), width, **blocks)
    return dx


@_geglu_backward.register_fake
def _(dy, x):
    return torch.empty_like(x)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _geglu_backward(dy, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """y (..., D) of x (..., 2 D): the op on CUDA and meta tensors, the reference elsewhere.

    ValueError on wrong shapes, strides.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x is {tuple(x.shape)}, its last dimension must be even: hidden and gate")
    if not (x.is_cuda or x.is_meta):
        return geglu_reference(x)
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous (strides {x.stride()}); call .contiguous() on it")
    return _geglu(x)
