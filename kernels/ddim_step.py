"""The inversion update x <- p x + q eps + sigma z for samples that stand at different levels, in place.

InPO (arXiv 2503.18454) Eq. 15: p = a' / a, q = s' - s a' / a, one of each per sample; sigma = 0 there (DDIM,
arXiv 2010.02502 Eq. 12 with eta > 0 otherwise, z standard normal). A sample with p = 1, q = 0 stays bit for bit.
With classifier-free guidance (arXiv 2207.12598) eps is eps_u + w (eps_c - eps_u), combined here in fp32.
No gradient: the inversion runs without one.
Shapes: x (M, C, H, W) fp32; eps, conditional (B, C, H, W) any floating dtype; p, q, sigma (B,) fp32;
rows (B,) int64, the row of x that each sample of eps moves (-1: none, distinct otherwise); keys, steps (B,) int64.
Any tensor may be NCHW or channels_last. Reads x and eps (and conditional), writes x.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.layout import plane_strides
from inpo_kernels.normal import normal, normal_reference

BLOCK = 1024


def ddim_step_reference(
    x: torch.Tensor,
    eps: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    conditional: torch.Tensor | None = None,
    guidance: float = 0.0,
    sigma: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, a new tensor in x's dtype (float64 stays float64)."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    eps = eps.to(x.dtype)
    if conditional is not None:
        eps = eps + guidance * (conditional.to(x.dtype) - eps)
    moved = p.to(x.dtype).view(shape) * (x if rows is None else x[rows]) + q.to(x.dtype).view(shape) * eps
    if sigma is not None:
        moved = moved + sigma.to(x.dtype).view(shape) * normal_reference(keys, steps, x.shape[1:], x.dtype)
    if rows is None:
        return moved
    return x.index_copy(0, rows[rows >= 0], moved[rows >= 0])


@triton.jit
def _step(
    p_x, p_eps, p_cond, p_p, p_q, p_rows, p_sigma, p_keys, p_steps,
    guidance, pixels, n, x_b, x_c, x_p, eps_b, eps_c, eps_p, cond_b, cond_c, cond_p,
    GUIDED: tl.constexpr, SLOTS: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    row = i_b
    if SLOTS:
        row = tl.load(p_rows + i_b)
        m_n = o_n < tl.where(row >= 0, n, 0)
    p, q = tl.load(p_p + i_b), tl.load(p_q + i_b)
    channel, pixel = o_n // pixels, o_n % pixels
    o_x = row * x_b + channel * x_c + pixel * x_p
    x = tl.load(p_x + o_x, mask=m_n, other=0.0)
    eps = tl.load(p_eps + i_b * eps_b + channel * eps_c + pixel * eps_p, mask=m_n, other=0.0).to(tl.float32)
    if GUIDED:
        o_cond = i_b * cond_b + channel * cond_c + pixel * cond_p
        eps += guidance * (tl.load(p_cond + o_cond, mask=m_n, other=0.0).to(tl.float32) - eps)
    x = p * x + q * eps
    if NOISY:
        # numbered by (channel, row, column), whatever the layout in memory is
        x += tl.load(p_sigma + i_b) * normal(tl.load(p_keys + i_b), tl.load(p_steps + i_b).to(tl.int32), o_n)
    tl.store(p_x + o_x, x, mask=m_n)


@torch.library.custom_op("inpo::ddim_step", mutates_args=("x",))
def _ddim_step(
    x: torch.Tensor,
    eps: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    rows: torch.Tensor | None = None,
    conditional: torch.Tensor | None = None,
    guidance: float = 0.0,
    sigma: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> None:
    if not len(eps) or not x[0].numel():
        return
    vector = lambda v: p if v is None else v.contiguous()  # noqa: E731  columns of a plan are strided
    p, q = p.contiguous(), q.contiguous()
    second = eps if conditional is None else conditional
    n = x[0].numel()
    _step[(len(eps), triton.cdiv(n, BLOCK))](
        x, eps, second, p, q, vector(rows), vector(sigma), vector(keys), vector(steps),
        guidance, x.shape[2] * x.shape[3], n,
        *plane_strides("x", x), *plane_strides("eps", eps), *plane_strides("conditional", second),
        GUIDED=conditional is not None, SLOTS=rows is not None, NOISY=sigma is not None, BLOCK=BLOCK,
    )  # fmt: skip


@_ddim_step.register_fake
def _(x, eps, p, q, rows=None, conditional=None, guidance=0.0, sigma=None, keys=None, steps=None):
    return None


def ddim_step_(
    x: torch.Tensor,
    eps: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    conditional: torch.Tensor | None = None,
    guidance: float = 0.0,
    sigma: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """x <- p x + q eps (+ sigma z) in place, returns x: the kernel on CUDA, the reference elsewhere.

    rows: which row of x each sample moves, -1 for none; without it sample i moves row i. conditional, guidance:
    eps becomes eps + guidance (conditional - eps). sigma with keys and steps: noise drawn as a function of them.
    ValueError on wrong shapes, dtypes, devices, strides.
    """
    if eps.shape[1:] != x.shape[1:] or eps.device != x.device or (rows is None and len(eps) != len(x)):
        raise ValueError(f"eps is {tuple(eps.shape)} on {eps.device}, x {tuple(x.shape)} on {x.device}")
    if conditional is not None and (conditional.shape != eps.shape or conditional.device != x.device):
        raise ValueError(f"conditional is {tuple(conditional.shape)} on {conditional.device}, eps {tuple(eps.shape)}")
    if (sigma is None) != (keys is None) or (sigma is None) != (steps is None):
        raise ValueError("sigma, keys and steps belong together: give all three or none")
    integers = (("rows", rows), ("keys", keys), ("steps", steps))
    for name, c in (("p", p), ("q", q), ("sigma", sigma), *integers):
        if c is not None and (c.shape != eps.shape[:1] or c.device != x.device):
            raise ValueError(f"{name} is {tuple(c.shape)} on {c.device}, expected ({len(eps)},) on {x.device}")
    for name, c in integers:
        if c is not None and c.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {c.dtype}")
    if not x.is_cuda:
        if rows is None:
            rows = torch.arange(len(eps))
        used = torch.nonzero(rows >= 0)[:, 0]  # only these are computed and written: a step's batch has many more
        part = lambda v: None if v is None else v[used]  # noqa: E731
        moved = ddim_step_reference(
            x[rows[used]], eps[used], p[used], q[used], conditional=part(conditional), guidance=guidance,
            sigma=part(sigma), keys=part(keys), steps=part(steps),
        )  # fmt: skip
        return x.index_copy_(0, rows[used], moved)
    for name, c in (("x", x), ("p", p), ("q", q), ("sigma", sigma)):
        if c is not None and c.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {c.dtype}")
    _ddim_step(x, eps, p, q, rows, conditional, guidance, sigma, keys, steps)
    return x
