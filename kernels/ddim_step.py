"""The inversion update x <- p x + q eps for samples that stand at different levels, in place.

InPO (arXiv 2503.18454) Eq. 15: p = a' / a, q = s' - s a' / a, one of each per sample. A sample with p = 1,
q = 0 stays bit for bit. No gradient: the inversion runs without one.
Shapes: x (B, C, H, W) fp32, contiguous; eps (B, C, H, W) any floating dtype, contiguous; p, q (B,) fp32.
Reads x and eps, writes x.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


def ddim_step_reference(x: torch.Tensor, eps: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The definition, in x's dtype (float64 stays float64)."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return p.to(x.dtype).view(shape) * x + q.to(x.dtype).view(shape) * eps.to(x.dtype)


@triton.jit
def _step(p_x, p_eps, p_p, p_q, n, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    o = i_b * n + o_n
    p, q = tl.load(p_p + i_b), tl.load(p_q + i_b)
    x = tl.load(p_x + o, mask=m_n, other=0.0)
    eps = tl.load(p_eps + o, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_x + o, p * x + q * eps, mask=m_n)


@torch.library.custom_op("inpo::ddim_step", mutates_args=("x",))
def _ddim_step(x: torch.Tensor, eps: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> None:
    if len(x):
        n = x[0].numel()
        p, q = p.contiguous(), q.contiguous()  # columns of a plan are strided
        _step[(len(x), triton.cdiv(n, BLOCK))](x, eps, p, q, n, BLOCK=BLOCK)


@_ddim_step.register_fake
def _(x, eps, p, q):
    return None


def ddim_step_(x: torch.Tensor, eps: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """x <- p x + q eps in place, returns x: the kernel on CUDA, the reference elsewhere.

    ValueError on wrong shapes, dtypes, devices, strides.
    """
    if eps.shape != x.shape or eps.device != x.device:
        raise ValueError(f"eps is {tuple(eps.shape)} on {eps.device}, x {tuple(x.shape)} on {x.device}")
    for name, c in (("p", p), ("q", q)):
        if c.shape != x.shape[:1] or c.device != x.device:
            raise ValueError(f"{name} is {tuple(c.shape)} on {c.device}, expected ({len(x)},) on {x.device}")
    if not x.is_cuda:
        return x.copy_(ddim_step_reference(x, eps, p, q))
    if x.dtype != torch.float32 or p.dtype != torch.float32 or q.dtype != torch.float32:
        raise ValueError(f"x, p and q must be float32, got {x.dtype}, {p.dtype}, {q.dtype}")
    if not (x.is_contiguous() and eps.is_contiguous()):
        raise ValueError("x and eps must be contiguous; call .contiguous() on them")
    _ddim_step(x, eps, p, q)
    return x
