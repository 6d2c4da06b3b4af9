"""Per-image errors of policy and reference against the inversion target, in one pass.

    tau = (x_t - a x_0) / s        a = sqrt(abar), s = sqrt(1 - abar), one of each per image
    e   = mean (pred - tau)^2      r = mean (ref - tau)^2      over C, H, W

With velocity pred and ref are velocities (arXiv 2202.00512), tau is (a x_t - x_0) / s (inpo_loss.py).
InPO (arXiv 2503.18454) Eq. 18; tau is never stored. pred gets a gradient, nothing else does.
Shapes: pred, ref, x_t, x_0 (B, C, H, W) of one floating dtype, contiguous; a, s (B,) fp32. e, r (B,) fp32.
Reads four tensors forward and three backward, writes one backward. fp32 sums in a fixed order: the same
bits on every run, and e == r exactly where pred == ref.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


def errors_reference(
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    velocity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in at least fp32 (float64 stays float64). Differentiable in pred."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    pred, ref, x_t, x_0 = (x.to(wide) for x in (pred, ref, x_t, x_0))
    shape = (-1,) + (1,) * (pred.ndim - 1)
    a, s = a.to(wide).view(shape), s.to(wide).view(shape)
    tau = (a * x_t - x_0 if velocity else x_t - a * x_0) / s
    over = tuple(range(1, pred.ndim))
    return (pred - tau).square().mean(over), (ref - tau).square().mean(over)


@triton.jit
def _fwd(p_pred, p_ref, p_xt, p_x0, p_a, p_s, p_e, p_r, n, VELOCITY: tl.constexpr, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    a, s = tl.load(p_a + i_b), tl.load(p_s + i_b)
    b_e = tl.zeros([BLOCK], tl.float32)
    b_r = tl.zeros([BLOCK], tl.float32)
    for lo in range(0, n, BLOCK):
        o_n = lo + tl.arange(0, BLOCK)
        m_n = o_n < n
        o = i_b * n + o_n
        x_t = tl.load(p_xt + o, mask=m_n, other=0.0).to(tl.float32)
        x_0 = tl.load(p_x0 + o, mask=m_n, other=0.0).to(tl.float32)
        if VELOCITY:
            tau = (a * x_t - x_0) / s
        else:
            tau = (x_t - a * x_0) / s
        d_e = tl.load(p_pred + o, mask=m_n, other=0.0).to(tl.float32) - tau
        d_r = tl.load(p_ref + o, mask=m_n, other=0.0).to(tl.float32) - tau
        b_e += tl.where(m_n, d_e * d_e, 0.0)
        b_r += tl.where(m_n, d_r * d_r, 0.0)
    tl.store(p_e + i_b, tl.sum(b_e, 0) / n)
    tl.store(p_r + i_b, tl.sum(b_r, 0) / n)


@triton.jit
def _bwd(p_pred, p_xt, p_x0, p_a, p_s, p_de, p_dpred, n, VELOCITY: tl.constexpr, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    o = i_b * n + o_n
    a, s = tl.load(p_a + i_b), tl.load(p_s + i_b)
    x_t = tl.load(p_xt + o, mask=m_n, other=0.0).to(tl.float32)
    x_0 = tl.load(p_x0 + o, mask=m_n, other=0.0).to(tl.float32)
    pred = tl.load(p_pred + o, mask=m_n, other=0.0).to(tl.float32)
    if VELOCITY:
        dpred = tl.load(p_de + i_b) * 2.0 * (pred - (a * x_t - x_0) / s) / n
    else:
        dpred = tl.load(p_de + i_b) * 2.0 * (pred - (x_t - a * x_0) / s) / n
    tl.store(p_dpred + o, dpred.to(p_dpred.dtype.element_ty), mask=m_n)


@torch.library.custom_op("inpo::errors", mutates_args=())
def _errors(
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    velocity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    a, s = a.contiguous(), s.contiguous()
    e, r = torch.empty_like(a), torch.empty_like(a)
    if len(pred):
        _fwd[(len(pred),)](pred, ref, x_t, x_0, a, s, e, r, pred[0].numel(), VELOCITY=velocity, BLOCK=BLOCK)
    return e, r


@_errors.register_fake
def _(pred, ref, x_t, x_0, a, s, velocity=False):
    return torch.empty_like(a), torch.empty_like(a)


@torch.library.custom_op("inpo::errors_backward", mutates_args=())
def _errors_backward(
    pred: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    de: torch.Tensor,
    velocity: bool = False,
) -> torch.Tensor:
    dpred = torch.empty_like(pred)
    if len(pred):
        n = pred[0].numel()
        a, s, de = a.contiguous(), s.contiguous(), de.contiguous()
        grid = (len(pred), triton.cdiv(n, BLOCK))
        _bwd[grid](pred, x_t, x_0, a, s, de, dpred, n, VELOCITY=velocity, BLOCK=BLOCK)
    return dpred


@_errors_backward.register_fake
def _(pred, x_t, x_0, a, s, de, velocity=False):
    return torch.empty_like(pred)


def _setup(ctx, inputs, output):
    pred, _, x_t, x_0, a, s, ctx.velocity = inputs
    ctx.save_for_backward(pred, x_t, x_0, a, s)


def _backward(ctx, de, dr):
    return _errors_backward(*ctx.saved_tensors, de, ctx.velocity), None, None, None, None, None, None


_errors.register_autograd(_backward, setup_context=_setup)


def errors(
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    velocity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e, r (B,): the kernel on CUDA, the reference elsewhere. ValueError on wrong shapes, dtypes, devices, strides."""
    for name, x in (("ref", ref), ("x_t", x_t), ("x_0", x_0)):
        if x.shape != pred.shape or x.device != pred.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, pred {tuple(pred.shape)} on {pred.device}")
    for name, x in (("a", a), ("s", s)):
        if x.shape != pred.shape[:1] or x.device != pred.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, expected ({len(pred)},) on {pred.device}")
    if not pred.is_cuda:
        return errors_reference(pred, ref, x_t, x_0, a, s, velocity)
    if a.dtype != torch.float32 or s.dtype != torch.float32:
        raise ValueError(f"a and s must be float32, got {a.dtype} and {s.dtype}")
    if not all(x.is_contiguous() for x in (pred, ref, x_t, x_0)):
        raise ValueError("pred, ref, x_t and x_0 must be contiguous; call .contiguous() on them")
    return _errors(pred, ref, x_t, x_0, a, s, velocity)
