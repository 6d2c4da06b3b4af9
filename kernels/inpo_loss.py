"""The whole objective of B preference pairs and its gradient, without an autograd graph: two launches, no sync.

    tau = (x_t - a x_0) / s                            e = mean (pred - tau)^2      r = mean (ref - tau)^2
    logit = -beta/2 [(e_w - e_l) - (r_w - r_l)]        InPO (arXiv 2503.18454) Eq. 18
    loss  = -y log sigmoid(logit) - (1 - y) log sigmoid(-logit)
    dpred = d (sum weight loss) / d pred

With velocity pred and ref are velocities, v = a eps - s x_0 (arXiv 2202.00512), and tau stands for that of the path,
a tau - s x_0 = (a x_t - x_0) / s as a^2 + s^2 = 1: the errors are 1 / a^2 times those of the noise that they mean.
y is 1 for a sure label. mu scales the loser's gradient as Diffusion-SDPO does (arXiv 2511.03317):
lambda = clamp((1 - mu) |g_w|^2 / g_w.g_l, 0, 1) where g_w.g_l > 0, else 1, g = pred - tau; value and logit unchanged.
Images are (2B, C, H, W), the winners first and the losers in the same order after them; NCHW or channels_last.
pred, ref of one floating dtype, x_t, x_0 of any; a, s (2B,), weight, label (B,) fp32.
Reads four tensors, then three of them again, and writes dpred; tau is never stored. fp32 sums in a fixed order: the
same bits on every run, and logit == 0 exactly where pred == ref.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from inpo_kernels.layout import plane_strides

BLOCK = 2048
# Means over the elements of each image, columns of Objective.image
COLUMNS = ("error", "reference_error", "tau_square", "reference_square", "pred_reference", "tau_reference", "cross")


class Objective(NamedTuple):
    """loss, logit, gate (B,); image (2B, 7) with COLUMNS, all fp32 (float64 from float64); dpred as pred."""

    loss: torch.Tensor
    logit: torch.Tensor
    gate: torch.Tensor
    image: torch.Tensor
    dpred: torch.Tensor


def inpo_loss_reference(
    pred, ref, x_t, x_0, a, s, weight, label, beta: float, mu: float | None = None, velocity: bool = False
) -> Objective:
    """The definition, in at least fp32 (float64 stays float64)."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    over, shape = (1, 2, 3), (-1, 1, 1, 1)
    y, v, x_t, x_0, a, s, weight, label = (x.to(wide) for x in (pred, ref, x_t, x_0, a, s, weight, label))
    tau = (a.view(shape) * x_t - x_0 if velocity else x_t - a.view(shape) * x_0) / s.view(shape)
    g = y - tau
    e, r = g.square().mean(over), (v - tau).square().mean(over)
    cross = (g * g.roll(len(weight), 0)).mean(over) if mu is not None else torch.zeros_like(e)
    columns = (e, r, tau.square().mean(over), v.square().mean(over), (y * v).mean(over), (tau * v).mean(over), cross)
    (e_w, e_l), (r_w, r_l) = e.chunk(2), r.chunk(2)
    logit = -0.5 * beta * ((e_w - e_l) - (r_w - r_l))
    loss = -label * torch.nn.functional.logsigmoid(logit) - (1 - label) * torch.nn.functional.logsigmoid(-logit)
    gate = torch.ones_like(e_w)
    if mu is not None:
        both = cross[: len(weight)]
        safe = (1 - mu) * e_w / both.clamp_min(torch.finfo(wide).tiny)
        gate = torch.where(both > 0, safe.clamp(0, 1), gate)
    slope = 0.5 * beta * weight * (label * torch.sigmoid(-logit) - (1 - label) * torch.sigmoid(logit))
    per_image = torch.cat([slope, -slope * gate]).view(shape)
    return Objective(
        loss, logit, gate, torch.stack(columns, 1), (per_image * 2 * g / pred.shape[1:].numel()).to(pred.dtype)
    )


@triton.jit
def _target(p_xt, p_x0, p_a, p_s, i_b, o_c, o_p, m_n, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p, VELOCITY: tl.constexpr):
    x_t = tl.load(p_xt + i_b * xt_b + o_c * xt_c + o_p * xt_p, mask=m_n, other=0.0).to(tl.float32)
    x_0 = tl.load(p_x0 + i_b * x0_b + o_c * x0_c + o_p * x0_p, mask=m_n, other=0.0).to(tl.float32)
    if VELOCITY:
        target = (tl.load(p_a + i_b) * x_t - x_0) / tl.load(p_s + i_b)
    else:
        target = (x_t - tl.load(p_a + i_b) * x_0) / tl.load(p_s + i_b)
    return target


@triton.jit
def _sums(
    p_pred, p_ref, p_xt, p_x0, p_a, p_s, p_image, pairs, pixels, n,
    pred_b, pred_c, pred_p, ref_b, ref_c, ref_p, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p,
    GATE: tl.constexpr, VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_e = tl.zeros([BLOCK], tl.float32)
    b_r = tl.zeros([BLOCK], tl.float32)
    b_tt = tl.zeros([BLOCK], tl.float32)
    b_vv = tl.zeros([BLOCK], tl.float32)
    b_yv = tl.zeros([BLOCK], tl.float32)
    b_tv = tl.zeros([BLOCK], tl.float32)
    b_x = tl.zeros([BLOCK], tl.float32)
    for lo in range(0, n, BLOCK):
        o_n = lo + tl.arange(0, BLOCK)
        m_n = o_n < n
        o_c, o_p = o_n // pixels, o_n % pixels
        tau = _target(p_xt, p_x0, p_a, p_s, i_b, o_c, o_p, m_n, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p, VELOCITY)
        y = tl.load(p_pred + i_b * pred_b + o_c * pred_c + o_p * pred_p, mask=m_n, other=0.0).to(tl.float32)
        v = tl.load(p_ref + i_b * ref_b + o_c * ref_c + o_p * ref_p, mask=m_n, other=0.0).to(tl.float32)
        # masked lanes hold zeros everywhere: they add nothing
        b_e += (y - tau) * (y - tau)
        b_r += (v - tau) * (v - tau)
        b_tt += tau * tau
        b_vv += v * v
        b_yv += y * v
        b_tv += tau * v
        if GATE:
            i_o = (i_b + pairs) % (2 * pairs)  # the pair's other side
            tau_o = _target(p_xt, p_x0, p_a, p_s, i_o, o_c, o_p, m_n, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p, VELOCITY)
            y_o = tl.load(p_pred + i_o * pred_b + o_c * pred_c + o_p * pred_p, mask=m_n, other=0.0).to(tl.float32)
            b_x += (y - tau) * (y_o - tau_o)
    p_row = p_image + i_b * 7
    tl.store(p_row, tl.sum(b_e, 0) / n)
    tl.store(p_row + 1, tl.sum(b_r, 0) / n)
    tl.store(p_row + 2, tl.sum(b_tt, 0) / n)
    tl.store(p_row + 3, tl.sum(b_vv, 0) / n)
    tl.store(p_row + 4, tl.sum(b_yv, 0) / n)
    tl.store(p_row + 5, tl.sum(b_tv, 0) / n)
    tl.store(p_row + 6, tl.sum(b_x, 0) / n)


@triton.jit
def _softplus_of_minus(z):
    """log(1 + exp(-z)). log1p is not in triton.language: log(u) x / (u - 1) with u = 1 + x restores what u lost."""
    x = tl.exp(-tl.abs(z))
    u = 1.0 + x
    return tl.maximum(-z, 0.0) + tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _gradient(
    p_pred, p_xt, p_x0, p_a, p_s, p_image, p_weight, p_label, p_loss, p_logit, p_gate, p_dpred,
    beta, mu, pairs, pixels, n,
    pred_b, pred_c, pred_p, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p, d_b, d_c, d_p,
    GATE: tl.constexpr, VELOCITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    o_c, o_p = o_n // pixels, o_n % pixels

    i_w = i_b % pairs
    p_w, p_l = p_image + i_w * 7, p_image + (i_w + pairs) * 7
    e_w = tl.load(p_w)
    z = -0.5 * beta * ((e_w - tl.load(p_l)) - (tl.load(p_w + 1) - tl.load(p_l + 1)))
    label = tl.load(p_label + i_w)
    sure = tl.exp(-tl.abs(z))
    larger, smaller = 1.0 / (1.0 + sure), sure / (1.0 + sure)  # sigmoid of |z| and of -|z|, without overflow
    doubt, belief = tl.where(z >= 0, smaller, larger), tl.where(z >= 0, larger, smaller)
    slope = 0.5 * beta * tl.load(p_weight + i_w) * (label * doubt - (1.0 - label) * belief)
    gate = 1.0
    if GATE:
        cross = tl.load(p_w + 6)
        safe = (1.0 - mu) * e_w / tl.where(cross > 0, cross, 1.0)
        gate = tl.where(cross > 0, tl.minimum(tl.maximum(safe, 0.0), 1.0), 1.0)
    if (i_b < pairs) & (tl.program_id(1) == 0):
        tl.store(p_loss + i_w, label * _softplus_of_minus(z) + (1.0 - label) * _softplus_of_minus(-z))
        tl.store(p_logit + i_w, z)
        tl.store(p_gate + i_w, gate)
    per_image = tl.where(i_b < pairs, slope, -slope * gate)

    tau = _target(p_xt, p_x0, p_a, p_s, i_b, o_c, o_p, m_n, xt_b, xt_c, xt_p, x0_b, x0_c, x0_p, VELOCITY)
    y = tl.load(p_pred + i_b * pred_b + o_c * pred_c + o_p * pred_p, mask=m_n, other=0.0).to(tl.float32)
    dpred = per_image * 2.0 * (y - tau) / n
    tl.store(p_dpred + i_b * d_b + o_c * d_c + o_p * d_p, dpred.to(p_dpred.dtype.element_ty), mask=m_n)


@torch.library.custom_op("inpo::inpo_loss", mutates_args=())
def _inpo_loss(
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    label: torch.Tensor,
    beta: float,
    mu: float | None = None,
    velocity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, s, weight, label = a.contiguous(), s.contiguous(), weight.contiguous(), label.contiguous()
    pairs = len(weight)
    loss, logit, gate = torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)
    image, dpred = weight.new_empty(2 * pairs, len(COLUMNS)), torch.empty_like(pred)
    if pred.numel():
        n, pixels = pred[0].numel(), pred.shape[2] * pred.shape[3]
        o_pred, o_ref = plane_strides("pred", pred), plane_strides("ref", ref)
        o_xt, o_x0 = plane_strides("x_t", x_t), plane_strides("x_0", x_0)
        _sums[(2 * pairs,)](
            pred, ref, x_t, x_0, a, s, image, pairs, pixels, n, *o_pred, *o_ref, *o_xt, *o_x0,
            GATE=mu is not None, VELOCITY=velocity, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        _gradient[(2 * pairs, triton.cdiv(n, BLOCK))](
            pred, x_t, x_0, a, s, image, weight, label, loss, logit, gate, dpred, beta, mu or 0.0, pairs, pixels, n,
            *o_pred, *o_xt, *o_x0, *plane_strides("dpred", dpred), GATE=mu is not None, VELOCITY=velocity, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
    return loss, logit, gate, image, dpred


@_inpo_loss.register_fake
def _(pred, ref, x_t, x_0, a, s, weight, label, beta, mu=None, velocity=False):
    vector = torch.empty_like(weight, memory_format=torch.contiguous_format)
    image = weight.new_empty(len(pred), len(COLUMNS))
    return vector, torch.empty_like(vector), torch.empty_like(vector), image, torch.empty_like(pred)


def inpo_loss(
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a: torch.Tensor,
    s: torch.Tensor,
    *,
    beta: float,
    mu: float | None = None,
    weight: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    velocity: bool = False,
) -> Objective:
    """Loss, metrics and dpred: the kernel on CUDA, the reference elsewhere. Go on with `pred.backward(dpred)`.

    weight (B,): of each pair's loss in what is differentiated, 1 without it (1/N makes the gradient a mean);
    label (B,): probability that the winner is the better one, 1 without it. Neither weight nor gate changes `loss`.
    velocity: pred and ref are a v-model's outputs, and the errors theirs; a may be 0 then.
    ValueError on wrong shapes, dtypes, devices, strides.
    """
    pred, ref = pred.detach(), ref.detach()
    if pred.ndim != 4 or len(pred) % 2:
        raise ValueError(f"pred is {tuple(pred.shape)}, expected (2B, C, H, W): B winners, then their losers")
    for name, x in (("ref", ref), ("x_t", x_t), ("x_0", x_0)):
        if x.shape != pred.shape or x.device != pred.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, pred {tuple(pred.shape)} on {pred.device}")
    if ref.dtype != pred.dtype:
        raise ValueError(
            f"ref is {ref.dtype}, pred {pred.dtype}: they must share a dtype, or their errors differ by it"
        )
    weight = torch.ones_like(a[: len(pred) // 2]) if weight is None else weight
    label = torch.ones_like(weight) if label is None else label
    for name, v, n in (("a", a, len(pred)), ("s", s, len(pred)), ("weight", weight, len(pred) // 2),
                       ("label", label, len(pred) // 2)):  # fmt: skip
        if v.shape != (n,) or v.device != pred.device:
            raise ValueError(f"{name} is {tuple(v.shape)} on {v.device}, expected ({n},) on {pred.device}")
    if mu is not None and not 0 <= mu <= 1:
        raise ValueError(f"mu is {mu}, expected a number from 0 to 1, or None for no gate")
    if not pred.is_cuda:
        return inpo_loss_reference(pred, ref, x_t, x_0, a, s, weight, label, beta, mu, velocity)
    for name, v in (("a", a), ("s", s), ("weight", weight), ("label", label)):
        if v.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {v.dtype}")
    for name, x in (("pred", pred), ("ref", ref), ("x_t", x_t), ("x_0", x_0)):
        plane_strides(name, x)
    return Objective(*_inpo_loss(pred, ref, x_t, x_0, a, s, weight, label, beta, mu, velocity))
