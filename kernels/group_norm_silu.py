"""GroupNorm, with SiLU and a time embedding if wanted, on channels_last images, forward and backward.

    u = x + temb[:, :, None, None]      z = (u - mean_g) rstd_g w + b      y = silu(z) or z

GroupNorm: Wu and He, arXiv 1803.08494; mean and variance over H, W and the C / G channels of a group. In diffusers'
ResnetBlock2D the embedding is added between conv and norm: here it costs no pass over memory.
Shapes: x, y (N, C, H, W) channels_last, any floating dtype; w, b (C,); temb (N, C). mean, rstd (N, G) fp32.
x, w, b and temb get gradients. Forward reads x twice and writes y; backward reads x and dy twice and writes dx.
Statistics: every program sums (x - first row) per channel over its rows, and the partial means and squared
deviations are merged by Chan's formula, so a large mean cancels nothing. fp32 sums in a fixed order. In channels_last
a group is 20 to 160 bytes wide: programs read full rows of channels and groups are formed from partial sums.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.layout import exact_block, is_channels_last, power_of_two

TILE = 4096  # elements a program holds at once
WARPS_BACKWARD = 8  # with 4 a thread needs over 200 registers
PROGRAMS_PER_IMAGE = 64  # at most, along the pixels: how many partial sums a group merges


def group_norm_silu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    temb: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition in at least fp32 (float64 stays float64), rounded once, to x's dtype, at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.to(wide)
    if temb is not None:
        u = u + temb.to(wide)[:, :, None, None]
    z = torch.nn.functional.group_norm(u, groups, weight.to(wide), bias.to(wide), eps)
    return (torch.nn.functional.silu(z) if silu else z).to(x.dtype)


@triton.jit
def _sums(p_x, p_mean, p_m2, pixels, C, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of each channel over ROWS pixels of an image."""
    i_n, i_k, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first = i_k * ROWS
    count = tl.minimum(pixels - first, ROWS).to(tl.float32)
    p_image = p_x + i_n * pixels * C
    shift = tl.load(p_image + first * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_s = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_q = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for lo in range(0, ROWS, BLOCK_P):
        o_p = first + lo + tl.arange(0, BLOCK_P)
        m = (o_p < pixels)[:, None] & m_c[None, :]
        x = tl.load(p_image + o_p[:, None] * C + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        x = tl.where(m, x - shift[None, :], 0.0)
        b_s += x
        b_q += x * x
    s = tl.sum(b_s, 0)
    o = (i_n * tl.num_programs(1) + i_k) * C + o_c
    tl.store(p_mean + o, shift + s / count, mask=m_c)
    tl.store(p_m2 + o, tl.sum(b_q, 0) - s * s / count, mask=m_c)


@triton.jit
def _merge(
    p_mean, p_m2, p_temb, p_group_mean, p_rstd, pixels, C, chunks, eps,
    TEMB: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The partial sums of one group of one image -> its mean and rstd."""
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_w = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    m_w = o_w < WIDTH
    m = (o_k < chunks)[:, None] & m_w[None, :]
    o = (i_n * chunks + o_k)[:, None] * C + (i_g * WIDTH + o_w)[None, :]
    mean = tl.load(p_mean + o, mask=m, other=0.0)
    if TEMB:
        mean += tl.load(p_temb + i_n * C + i_g * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)[None, :]
    count = tl.where(m, tl.minimum(pixels - o_k * ROWS, ROWS).to(tl.float32)[:, None], 0.0)
    size = pixels * WIDTH
    group_mean = tl.sum(tl.sum(count * mean, 1), 0) / size
    off = tl.where(m, mean - group_mean, 0.0)
    m2 = tl.load(p_m2 + o, mask=m, other=0.0) + count * off * off
    variance = tl.sum(tl.sum(m2, 1), 0) / size
    i = i_n * tl.num_programs(1) + i_g
    tl.store(p_group_mean + i, group_mean)
    tl.store(p_rstd + i, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _per_channel(p_w, p_b, p_temb, p_mean, p_rstd, o_image, o_g, o_c, m_c, TEMB: tl.constexpr):
    """x_hat = (x - mean) rstd and z = x_hat w + bias of each channel: the embedding only moves the mean."""
    mean = tl.load(p_mean + o_g, mask=m_c, other=0.0)
    if TEMB:
        mean -= tl.load(p_temb + o_image + o_c, mask=m_c, other=0.0).to(tl.float32)
    rstd = tl.load(p_rstd + o_g, mask=m_c, other=0.0)
    w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(p_b + o_c, mask=m_c, other=0.0).to(tl.float32)
    return mean, rstd, w, bias


@triton.jit
def _apply(
    p_x, p_w, p_b, p_temb, p_mean, p_rstd, p_y, pixels, C, groups,
    SILU: tl.constexpr, TEMB: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n, i_k, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_g = i_n * groups + o_c // WIDTH
    mean, rstd, w, bias = _per_channel(p_w, p_b, p_temb, p_mean, p_rstd, i_n * C, o_g, o_c, m_c, TEMB)
    scale = rstd * w
    for lo in range(0, ROWS, BLOCK_P):
        o_p = i_k * ROWS + lo + tl.arange(0, BLOCK_P)
        m = (o_p < pixels)[:, None] & m_c[None, :]
        o = i_n * pixels * C + o_p[:, None] * C + o_c[None, :]
        z = (tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        tl.store(p_y + o, z.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _normalised_and_dz(p_x, p_dy, o, m, mean, rstd, w, bias, SILU: tl.constexpr):
    x_hat = (tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    dz = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
    if SILU:
        z = x_hat * w[None, :] + bias[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return x_hat, dz


@triton.jit
def _sums_backward(
    p_x, p_dy, p_w, p_b, p_temb, p_mean, p_rstd, p_dz, p_dzx, p_xhat, pixels, C, groups,
    SILU: tl.constexpr, TEMB: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz x_hat and x_hat of each channel over ROWS pixels of an image."""
    i_n, i_k, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_g = i_n * groups + o_c // WIDTH
    mean, rstd, w, bias = _per_channel(p_w, p_b, p_temb, p_mean, p_rstd, i_n * C, o_g, o_c, m_c, TEMB)
    b_dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_dzx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_xhat = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for lo in range(0, ROWS, BLOCK_P):
        o_p = i_k * ROWS + lo + tl.arange(0, BLOCK_P)
        m = (o_p < pixels)[:, None] & m_c[None, :]
        o = i_n * pixels * C + o_p[:, None] * C + o_c[None, :]
        x_hat, dz = _normalised_and_dz(p_x, p_dy, o, m, mean, rstd, w, bias, SILU)
        b_dz += dz  # zero where masked: dy is
        b_dzx += dz * x_hat
        if TEMB:
            b_xhat += tl.where(m, x_hat, 0.0)
    o = (i_n * tl.num_programs(1) + i_k) * C + o_c
    tl.store(p_dz + o, tl.sum(b_dz, 0), mask=m_c)
    tl.store(p_dzx + o, tl.sum(b_dzx, 0), mask=m_c)
    if TEMB:
        tl.store(p_xhat + o, tl.sum(b_xhat, 0), mask=m_c)


@triton.jit
def _merge_backward(
    p_dz, p_dzx, p_xhat, p_w, p_rstd, p_channel_dz, p_channel_dzx, p_group_dz, p_group_dzx, p_dtemb, pixels, C, chunks,
    TEMB: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One group of one image: sums per channel (for dw, db), means per group (for dx), and dtemb = sum of dx."""
    i_n, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_w = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_W)
    m_w = o_w < WIDTH
    m = (o_k < chunks)[:, None] & m_w[None, :]
    o = (i_n * chunks + o_k)[:, None] * C + (i_g * WIDTH + o_w)[None, :]
    o_c = i_n * C + i_g * WIDTH + o_w
    dz, dzx = tl.sum(tl.load(p_dz + o, mask=m, other=0.0), 0), tl.sum(tl.load(p_dzx + o, mask=m, other=0.0), 0)
    tl.store(p_channel_dz + o_c, dz, mask=m_w)
    tl.store(p_channel_dzx + o_c, dzx, mask=m_w)
    w = tl.load(p_w + i_g * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)
    size = pixels * WIDTH
    group_dz, group_dzx = tl.sum(w * dz, 0) / size, tl.sum(w * dzx, 0) / size
    i = i_n * tl.num_programs(1) + i_g
    tl.store(p_group_dz + i, group_dz)
    tl.store(p_group_dzx + i, group_dzx)
    if TEMB:
        x_hat = tl.sum(tl.load(p_xhat + o, mask=m, other=0.0), 0)
        dtemb = tl.load(p_rstd + i) * (w * dz - pixels * group_dz - x_hat * group_dzx)
        tl.store(p_dtemb + o_c, dtemb.to(p_dtemb.dtype.element_ty), mask=m_w)


@triton.jit
def _apply_backward(
    p_x, p_dy, p_w, p_b, p_temb, p_mean, p_rstd, p_group_dz, p_group_dzx, p_dx, pixels, C, groups,
    SILU: tl.constexpr, TEMB: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n, i_k, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_g = i_n * groups + o_c // WIDTH
    mean, rstd, w, bias = _per_channel(p_w, p_b, p_temb, p_mean, p_rstd, i_n * C, o_g, o_c, m_c, TEMB)
    group_dz = tl.load(p_group_dz + o_g, mask=m_c, other=0.0)
    group_dzx = tl.load(p_group_dzx + o_g, mask=m_c, other=0.0)
    for lo in range(0, ROWS, BLOCK_P):
        o_p = i_k * ROWS + lo + tl.arange(0, BLOCK_P)
        m = (o_p < pixels)[:, None] & m_c[None, :]
        o = i_n * pixels * C + o_p[:, None] * C + o_c[None, :]
        x_hat, dz = _normalised_and_dz(p_x, p_dy, o, m, mean, rstd, w, bias, SILU)
        dx = rstd[None, :] * (w[None, :] * dz - group_dz[None, :] - x_hat * group_dzx[None, :])
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)


def _tiles(x: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid over (images, rows of pixels, blocks of channels) and its block sizes."""
    n, channels, height, width = x.shape
    block_c = exact_block(channels, least=32, most=256)
    block_p = max(TILE // block_c, 1)
    pixels = height * width
    block_p = min(block_p, power_of_two(pixels))
    rows = block_p * max(2, triton.cdiv(triton.cdiv(pixels, block_p), PROGRAMS_PER_IMAGE))
    blocks = {"ROWS": rows, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return (n, triton.cdiv(pixels, rows), triton.cdiv(channels, block_c)), blocks


@torch.library.custom_op("inpo::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
    temb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x)
    mean = torch.empty(len(x), groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        n, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
        grid, blocks = _tiles(x)
        weight, bias, temb = weight.contiguous(), bias.contiguous(), None if temb is None else temb.contiguous()
        p_temb, kind = (x if temb is None else temb), {"TEMB": temb is not None, "WIDTH": channels // groups}
        partial_mean = torch.empty(n, grid[1], channels, dtype=torch.float32, device=x.device)
        partial_m2 = torch.empty_like(partial_mean)
        merge = {"BLOCK_K": power_of_two(grid[1]), "BLOCK_W": power_of_two(channels // groups)}
        _sums[grid](x, partial_mean, partial_m2, pixels, channels, **blocks)
        _merge[(n, groups)](
            partial_mean, partial_m2, p_temb, mean, rstd, pixels, channels, grid[1], eps,
            **kind, **merge, ROWS=blocks["ROWS"],
        )  # fmt: skip
        _apply[grid](x, weight, bias, p_temb, mean, rstd, y, pixels, channels, groups, SILU=silu, **kind, **blocks)
    return y, mean, rstd


@_group_norm_silu.register_fake
def _(x, weight, bias, groups, eps, silu, temb=None):
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)  # not len(x): a compiler's batch may be any
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("inpo::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    temb: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight, dbias, dtemb (empty without temb)."""
    dx = torch.empty_like(x)
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb, memory_format=torch.contiguous_format)
    n, channels, pixels = len(x), x.shape[1], x.shape[2] * x.shape[3]
    if not x.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(bias), dtemb.zero_()
    dy = dy.contiguous(memory_format=torch.channels_last)
    weight, bias, temb = weight.contiguous(), bias.contiguous(), None if temb is None else temb.contiguous()
    groups = mean.shape[1]
    grid, blocks = _tiles(x)
    p_temb, kind = (x if temb is None else temb), {"TEMB": temb is not None, "WIDTH": channels // groups}
    merge = {"BLOCK_K": power_of_two(grid[1]), "BLOCK_W": power_of_two(channels // groups)}
    partial = [torch.empty(n, grid[1], channels, dtype=torch.float32, device=x.device) for _ in range(2)]
    partial.append(torch.empty_like(partial[0]) if temb is not None else partial[0])
    channel_dz, channel_dzx = (torch.empty(n, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    group_dz, group_dzx = torch.empty_like(mean), torch.empty_like(mean)
    _sums_backward[grid](
        x, dy, weight, bias, p_temb, mean, rstd, *partial, pixels, channels, groups,
        SILU=silu, **kind, **blocks, num_warps=WARPS_BACKWARD,
    )  # fmt: skip
    _merge_backward[(n, groups)](
        *partial, weight, rstd, channel_dz, channel_dzx, group_dz, group_dzx, dtemb, pixels, channels, grid[1],
        **kind, **merge,
    )  # fmt: skip
    _apply_backward[grid](
        x, dy, weight, bias, p_temb, mean, rstd, group_dz, group_dzx, dx, pixels, channels, groups,
        SILU=silu, **kind, **blocks, num_warps=WARPS_BACKWARD,
    )  # fmt: skip
    return dx, channel_dzx.sum(0).to(weight.dtype), channel_dz.sum(0).to(bias.dtype), dtemb


@_group_norm_silu_backward.register_fake
def _(dy, x, weight, bias, mean, rstd, silu, temb=None):
    dtemb = x.new_empty(0) if temb is None else torch.empty_like(temb, memory_format=torch.contiguous_format)
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dtemb


def _setup(ctx, inputs, output):
    x, weight, bias, _, _, ctx.silu, temb = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, temb)


def _backward(ctx, dy, _mean, _rstd):
    x, weight, bias, mean, rstd, temb = ctx.saved_tensors
    dx, dweight, dbias, dtemb = _group_norm_silu_backward(dy, x, weight, bias, mean, rstd, ctx.silu, temb)
    return dx, dweight, dbias, None, None, None, None if temb is None else dtemb


_group_norm_silu.register_autograd(_backward, setup_context=_setup)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    temb: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (N, C, H, W): the op on CUDA and meta tensors, the reference elsewhere.

    ValueError on wrong shapes, dtypes, devices, strides.
    """
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x is {tuple(x.shape)}, expected (N, C, H, W) with C divisible by groups = {groups}")
    for name, v, shape in (("weight", weight, x.shape[1:2]), ("bias", bias, x.shape[1:2]), ("temb", temb, x.shape[:2])):
        if v is not None and (v.shape != shape or v.device != x.device):
            raise ValueError(f"{name} is {tuple(v.shape)} on {v.device}, expected {tuple(shape)} on {x.device}")
    if not (x.is_cuda or x.is_meta):
        return group_norm_silu_reference(x, weight, bias, groups, eps, silu, temb)
    if x.shape[1:].numel() >= 2**31:
        raise ValueError(f"an image of x {tuple(x.shape)} has 2^31 elements or more: kernels count in int32 there")
    if not is_channels_last(x):
        raise ValueError("x must be channels_last; call .contiguous(memory_format=torch.channels_last) on it")
    return _group_norm_silu(x, weight, bias, groups, eps, silu, temb)[0]
