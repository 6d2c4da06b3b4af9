"""LayerNorm over the last dimension, the residual added before it if wanted, forward and backward.

    u = x + residual (rounded to x's dtype)      y = (u - mean) rstd w + b      returns y and u

Ba et al., arXiv 1607.06450. In diffusers' BasicTransformerBlock every sublayer's output is added to the stream and
normalised for the next: one launch, and one pass over memory less than the two operations.
Shapes: x, residual (..., D) contiguous, one floating dtype; w, b (D,). x, residual, w and b get gradients.
A program holds a whole row: mean and variance are two exact passes over registers. fp32 sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.layout import power_of_two

TILE = 4096
PROGRAMS_BACKWARD = 1024  # each sums dw and db over its share of the rows


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: y and u. At least fp32 inside (float64 stays float64), rounded to x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x if residual is None else (x.to(wide) + residual.to(wide)).to(x.dtype)
    y = torch.nn.functional.layer_norm(u.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), u


@triton.jit
def _fwd(
    p_x, p_r, p_w, p_b, p_y, p_u, p_mean, p_rstd, rows, D, eps,
    RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r, m_d = o_r < rows, o_d < D
    m = m_r[:, None] & m_d[None, :]
    o = o_r[:, None] * D + o_d[None, :]
    u = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    if RESIDUAL:
        u += tl.load(p_r + o, mask=m, other=0.0).to(tl.float32)
        rounded = u.to(p_u.dtype.element_ty)
        tl.store(p_u + o, rounded, mask=m)
        u = rounded.to(tl.float32)  # backward reads it back: the same numbers in both
    mean = tl.sum(u, 1) / D
    off = tl.where(m, u - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / D + eps)
    w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b = tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    y = off * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + o_r, mean, mask=m_r)
    tl.store(p_rstd + o_r, rstd, mask=m_r)


@triton.jit
def _bwd(
    p_dy, p_du, p_u, p_w, p_mean, p_rstd, p_dx, p_dw, p_db, rows, D, share,
    RESIDUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_k = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for lo in range(0, share, BLOCK_R):
        o_r = i_k * share + lo + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        m = m_r[:, None] & m_d[None, :]
        o = o_r[:, None] * D + o_d[None, :]
        mean, rstd = tl.load(p_mean + o_r, mask=m_r, other=0.0), tl.load(p_rstd + o_r, mask=m_r, other=0.0)
        x_hat = tl.where(m, tl.load(p_u + o, mask=m, other=0.0).to(tl.float32) - mean[:, None], 0.0) * rstd[:, None]
        dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        b_dw += dy * x_hat
        b_db += dy
        dz = dy * w[None, :]
        dx = rstd[:, None] * (dz - (tl.sum(dz, 1) / D)[:, None] - x_hat * (tl.sum(dz * x_hat, 1) / D)[:, None])
        if RESIDUAL:
            dx += tl.load(p_du + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_dw + i_k * D + o_d, tl.sum(b_dw, 0), mask=m_d)
    tl.store(p_db + i_k * D + o_d, tl.sum(b_db, 0), mask=m_d)


def _tiles(width: int) -> dict[str, int]:
    block_d = power_of_two(width)
    return {"BLOCK_R": max(TILE // block_d, 1), "BLOCK_D": block_d, "num_warps": 8 if block_d > 1024 else 4}


@torch.library.custom_op("inpo::layer_norm", mutates_args=())
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, u (empty without a residual: it is x), mean, rstd (rows,)."""
    y, width = torch.empty_like(x), x.shape[-1]
    u = x.new_empty(0) if residual is None else torch.empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        rows, blocks = x.numel() // width, _tiles(width)
        _fwd[(triton.cdiv(rows, blocks["BLOCK_R"]),)](
            x, x if residual is None else residual, weight.contiguous(), bias.contiguous(), y, u, mean, rstd,
            rows, width, eps, RESIDUAL=residual is not None, **blocks,
        )  # fmt: skip
    return y, u, mean, rstd


@_layer_norm.register_fake
def _(x, weight, bias, eps, residual=None):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return (
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(x),
        mean,
        torch.empty_like(mean),
    )


@torch.library.custom_op("inpo::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: torch.Tensor,
    du: torch.Tensor | None,
    u: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (also the residual's), dweight, dbias. du: what reaches u from elsewhere."""
    dx, width = torch.empty_like(u), u.shape[-1]
    if not u.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    rows, blocks = u.numel() // width, _tiles(width)
    share = triton.cdiv(triton.cdiv(rows, blocks["BLOCK_R"]), PROGRAMS_BACKWARD) * blocks["BLOCK_R"]
    programs = triton.cdiv(rows, share)
    dw, db = (torch.empty(programs, width, dtype=torch.float32, device=u.device) for _ in range(2))
    dy = dy.contiguous()
    _bwd[(programs,)](
        dy, dy if du is None else du.contiguous(), u, weight.contiguous(), mean, rstd, dx, dw, db, rows, width, share,
        RESIDUAL=du is not None, **(blocks | {"num_warps": 8}),  # with 4 a thread needs about 200 registers
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype)


@_layer_norm_backward.register_fake
def _(dy, du, u, weight, mean, rstd):
    return torch.empty_like(u), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, weight, _, _, residual = inputs
    _, u, mean, rstd = output
    ctx.residual = residual is not None
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.residual else (u,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u if ctx.residual else x, weight, mean, rstd)


def _backward(ctx, dy, du, _mean, _rstd):
    u, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy  # only u was used further on
    dx, dweight, dbias = _layer_norm_backward(dy, du if ctx.residual else None, u, weight, mean, rstd)
    return dx, dweight, dbias, None, dx if ctx.residual else None


_layer_norm.register_autograd(_backward, setup_context=_setup)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and u = x + residual (x itself without one): the op on CUDA and meta tensors, the reference elsewhere.

    ValueError on wrong shapes, dtypes, devices, strides.
    """
    for name, v in (("weight", weight), ("bias", bias)):
        if v.shape != x.shape[-1:] or v.device != x.device:
            raise ValueError(f"{name} is {tuple(v.shape)} on {v.device}, expected {tuple(x.shape[-1:])} on {x.device}")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, "
            f"x {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if not (x.is_cuda or x.is_meta):
        return layer_norm_reference(x, weight, bias, eps, residual)
    for name, v in (("x", x), ("residual", residual)):
        if v is not None and not v.is_contiguous():
            raise ValueError(f"{name} must be contiguous (strides {v.stride()}); call .contiguous() on it")
    if x.shape[-1] > 8192:
        raise ValueError(f"rows of {x.shape[-1]} are too long for one program: 8192 at most")
    y, u, _, _ = _layer_norm(x, weight, bias, eps, residual)
    return y, x if residual is None else u
