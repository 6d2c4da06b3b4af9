"""AdamW with its moments in bf16, stochastically rounded, and the bf16 working copy written in the same pass.

    p <- (1 - lr wd) p      m <- m + (1 - b1) (g - m)      v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^k) m / (sqrt(v / (1 - b2^k)) + eps)

Loshchilov and Hutter, arXiv 1711.05101, in the order of torch.optim.AdamW; g is the gradient times `scale`, a number on
the device, so that clipping costs neither a sync nor a pass. The update uses m and v before they are rounded.
bf16 keeps 8 bits: v changes by 0.1 % a step and would stand still if it were rounded to nearest. Rounded up with the
probability of the part cut off, it is right in the mean (Gupta et al., arXiv 1502.02551). The bits are a function of
(seed, step, tensor, element): a resumed run goes on bit for bit.
Lists of T alike tensors, dense: params fp32, grads any floating dtype, m and v bf16, copies bf16 (or empty).
Memory: 4 bytes of state per parameter, where fp32 moments take 8. Reads 4 + |g| + 4, writes 4 + 4 (+ 2) bytes.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.normal import MASK, philox_reference
from inpo_kernels.tensor_lists import BLOCK, TYPES, check, table


def round_reference(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x (fp32) to bf16, up or down as 16 random bits (int64) decide; what is not finite is kept."""
    word = x.float().contiguous().view(torch.int32).to(torch.int64) & MASK
    rounded = (word + bits) & 0xFFFF0000
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x.float()).to(torch.bfloat16)


def adamw_reference(params, grads, m, v, *, lr, betas, eps, weight_decay, step, seed, scale=None):
    """New params, m and v as lists. Arithmetic in at least fp32; fp64 params give the exact update, and the moments
    before they are rounded come back in params' dtype instead of bf16."""
    out = ([], [], [])
    for i, (p, g, m_i, v_i) in enumerate(zip(params, grads, m, v, strict=True)):
        g, m_i, v_i = g.to(p.dtype), m_i.to(p.dtype), v_i.to(p.dtype)
        g = g if scale is None else g * scale.to(p.dtype)
        m_i = m_i + (1 - betas[0]) * (g - m_i)
        v_i = betas[1] * v_i + (1 - betas[1]) * g * g
        p = p * (1 - lr * weight_decay)
        p = p - lr / (1 - betas[0] ** step) * m_i / ((v_i / (1 - betas[1] ** step)).sqrt() + eps)
        if p.dtype == torch.float32:
            # elements are numbered as they lie in memory
            flat = torch.arange(p.numel(), device=p.device).as_strided(p.shape, p.stride())
            counter = (flat, torch.full_like(flat, i), torch.full_like(flat, step), torch.zeros_like(flat))
            bits = philox_reference(torch.tensor(seed, device=p.device), counter)[0]
            m_i, v_i = round_reference(m_i, bits & 0xFFFF), round_reference(v_i, bits >> 16)
        for new, values in zip((p, m_i, v_i), out, strict=True):
            values.append(new)
    return out


@triton.jit
def _round(x, bits):
    """fp32 to bf16 by adding 16 random bits below its last place; what is not finite would overflow and is kept."""
    word = x.to(tl.int32, bitcast=True)
    rounded = ((word + bits) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x).to(tl.bfloat16)


@triton.jit
def _load(p, o, n, FULL: tl.constexpr):
    if FULL:  # without a mask loads and stores are 16 bytes wide
        x = tl.load(p + o)
    else:
        x = tl.load(p + o, mask=o < n, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(p, x, o, n, FULL: tl.constexpr):
    if FULL:
        tl.store(p + o, x)
    else:
        tl.store(p + o, x, mask=o < n)


@triton.jit
def _update(
    p_p, p_g, p_m, p_v, p_c, p_scale, o, n, i_t,
    decay, rise_1, beta_2, rise_2, rate, correction_2, eps, step, seed, COPY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    g = _load(p_g, o, n, FULL) * tl.load(p_scale)
    m, v, p = _load(p_m, o, n, FULL), _load(p_v, o, n, FULL), _load(p_p, o, n, FULL)
    m = m + rise_1 * (g - m)
    v = beta_2 * v + rise_2 * g * g
    p = p * decay
    p = p - rate * m / (tl.sqrt(v / correction_2) + eps)
    _store(p_p, p, o, n, FULL)
    low = (o & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    bits, _, _, _ = tl.philox(seed, low, i_t.to(tl.uint32) + zero, step.to(tl.uint32) + zero, zero)
    _store(p_m, _round(m, (bits & 0xFFFF).to(tl.int32)), o, n, FULL)
    _store(p_v, _round(v, (bits >> 16).to(tl.int32)), o, n, FULL)
    if COPY:
        _store(p_c, p.to(tl.bfloat16), o, n, FULL)


@triton.jit(do_not_specialize=["step", "seed"])
def _adamw_kernel(
    p_params, p_grads, p_ms, p_vs, p_copies, p_sizes, p_tensor, p_block, p_scale,
    decay, rise_1, beta_2, rise_2, rate, correction_2, eps, step, seed,
    GRAD: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_t = tl.load(p_tensor + i)
    start, n = tl.load(p_block + i) * BLOCK, tl.load(p_sizes + i_t)
    o = start + tl.arange(0, BLOCK)
    p_p = tl.load(p_params + i_t).to(tl.pointer_type(tl.float32))
    p_g = tl.load(p_grads + i_t).to(tl.pointer_type(GRAD))
    p_m = tl.load(p_ms + i_t).to(tl.pointer_type(tl.bfloat16))
    p_v = tl.load(p_vs + i_t).to(tl.pointer_type(tl.bfloat16))
    p_c = tl.load(p_copies + i_t).to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        p_p, p_g = tl.multiple_of(p_p, 16), tl.multiple_of(p_g, 16)
        p_m, p_v, p_c = tl.multiple_of(p_m, 16), tl.multiple_of(p_v, 16), tl.multiple_of(p_c, 16)
    if start + BLOCK <= n:
        _update(
            p_p, p_g, p_m, p_v, p_c, p_scale, o, n, i_t,
            decay, rise_1, beta_2, rise_2, rate, correction_2, eps, step, seed, COPY, True,
        )  # fmt: skip
    else:
        _update(
            p_p, p_g, p_m, p_v, p_c, p_scale, o, n, i_t,
            decay, rise_1, beta_2, rise_2, rate, correction_2, eps, step, seed, COPY, False,
        )  # fmt: skip


@torch.library.custom_op("inpo::adamw", mutates_args=("params", "m", "v", "copies"))
def _adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    m: list[torch.Tensor],
    v: list[torch.Tensor],
    copies: list[torch.Tensor],
    scale: torch.Tensor,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
) -> None:
    if not params or not sum(x.numel() for x in params):
        return
    t = table(params, grads, m, v, *([copies] if copies else []))
    addresses = t.addresses if copies else [*t.addresses, t.addresses[0]]
    _adamw_kernel[(len(t.block),)](
        *addresses, t.sizes, t.tensor, t.block, scale,
        1 - lr * weight_decay, 1 - beta_1, beta_2, 1 - beta_2, lr / (1 - beta_1**step), 1 - beta_2**step, eps,
        step, seed, GRAD=TYPES[grads[0].dtype], COPY=bool(copies), ALIGNED=t.aligned, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@_adamw.register_fake
def _(params, grads, m, v, copies, scale, lr, beta_1, beta_2, eps, weight_decay, step, seed):
    return None


@torch.no_grad()
def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    m: list[torch.Tensor],
    v: list[torch.Tensor],
    copies: list[torch.Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    seed: int,
    scale: torch.Tensor | None = None,
) -> None:
    """One update in place of params, m, v and copies: the kernel on CUDA, the reference elsewhere.

    step counts from 1. scale: a tensor of one fp32 number on the same device. seed: any 63-bit integer.
    ValueError on lists that do not fit, wrong dtypes, a step below 1.
    """
    params, grads, m, v, copies = list(params), list(grads), list(m), list(v), list(copies)
    check({"params": params, "grads": grads, "m": m, "v": v} | ({"copies": copies} if copies else {}))
    wanted = {"params": (params, torch.float32), "m": (m, torch.bfloat16), "v": (v, torch.bfloat16)}
    for name, (tensors, dtype) in (wanted | {"copies": (copies, torch.bfloat16)}).items():
        if tensors and tensors[0].dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensors[0].dtype}")
    if step < 1:
        raise ValueError(f"step is {step}: it counts from 1")
    if not params:
        return
    if scale is None:
        scale = torch.ones((), device=params[0].device)
    elif scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != params[0].device:
        raise ValueError(
            f"scale is {tuple(scale.shape)} {scale.dtype} on {scale.device}: one fp32 number on the device"
        )
    if params[0].is_cuda:
        _adamw(params, grads, m, v, copies, scale, lr, *betas, eps, weight_decay, step, seed)
        return
    new = adamw_reference(
        params, grads, m, v, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step, seed=seed, scale=scale
    )
    for old, values in zip((params, m, v), new, strict=True):
        torch._foreach_copy_(old, values)
    if copies:
        torch._foreach_copy_(copies, params)
