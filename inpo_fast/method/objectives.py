"""The method family: from per-image errors to a loss. No model, no data.

Notation of the paper: for each image e = mean (tau - eps_theta)^2, r = mean (tau - eps_ref)^2 over its
elements, tau the noise estimate that made x_t. All vectors are (B,), one entry a pair; a mean over
elements and the factor 0.5 are what beta = 2000 / 5000 are calibrated to.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from inpo_kernels.errors import errors
from inpo_kernels.inpo_loss import Objective, inpo_loss

Method = Literal["inpo", "smpo", "dpo", "kto", "sft"]
SIDES = {"inpo": 2, "smpo": 2, "dpo": 2, "kto": 2, "sft": 1}  # winner and loser, or the winner only
INVERTING = ("inpo", "smpo")  # the others noise x_0 with a Gaussian draw
PAIRWISE = ("inpo", "smpo", "dpo")  # the loss compares the two images of a pair
GAMMA = 10.0


@dataclass(frozen=True)
class Timesteps:
    """Uniform t in min..max. The paper trains all; training only the last 900, 800 … loses little (S9)."""

    min: int = 0
    max: int = 999
    per_pair: int = 1
    """How many of them a pair is trained at in its step, evenly spaced around min..max from a drawn one; the loss is
    their mean. On grids with global levels one climb of the inversion serves all. train.micro_batch counts a pair at
    one timestep."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised (Eq. 18)."""

    beta: float = 2000.0
    """Strength of the pull to the reference. Paper: 2000 (SD1.5), 5000 (SDXL)."""
    tau_norm: Literal["none", "rms", "orthogonal"] = "none"
    """none: the paper. rms: tau / rms(tau) for each image, x_t rebuilt from it; labelled `inpo-rms`. orthogonal: the
    same after tau's part along x_0 was taken away, as noise has none; labelled `inpo-orthogonal`."""
    winner_preserving: float | None = None
    """mu of Diffusion-SDPO (arXiv 2511.03317) in [0, 1]: scales the loser's gradient so that the winner's
    error falls to first order. None: off."""
    timesteps: Timesteps = field(default_factory=Timesteps)
    label_smoothing: float = 0.0
    """In 0..0.5: how probable it is that a pair's label is the wrong way round (cDPO). Label y becomes
    (1 - s) y + s (1 - y), also where y is soft already."""
    gamma: float = GAMMA
    """Of method smpo: its logit is (2 y - 1) gamma times that of inpo, y the pair's soft label. Published code: 10."""


def target(x_t: torch.Tensor, x_0: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """tau = (x_t - a_t x_0) / s_t, which equals (x_0(t) - x_0) / sigma_t + delta_t of Eq. 18.

    x_t, x_0: (B, C, H, W); a_t, s_t: (B,).
    """
    return (x_t - _wide(a_t) * x_0) / _wide(s_t)


def noised(x_0: torch.Tensor, tau: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor) -> torch.Tensor:
    """x_t = a_t x_0 + s_t tau: the inverse of `target`."""
    return _wide(a_t) * x_0 + _wide(s_t) * tau


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each image, (B,)."""
    return x.square().mean((1, 2, 3)).sqrt()


def normalise(tau: torch.Tensor, x_0: torch.Tensor | None = None) -> torch.Tensor:
    """tau_norm: rms; with x_0, orthogonal. (B, C, H, W) both.

    Explicit inversion gives smooth images a smaller tau than grainy ones, and winners are smoother: without this the
    loss pays for under-predicting noise. It also leaves some of x_0 in tau, more of it where the model would not have
    drawn the image (docs/study.md has both, measured).
    """
    if x_0 is not None:
        along = (tau * x_0).sum((1, 2, 3)) / x_0.square().sum((1, 2, 3)).clamp_min(torch.finfo(x_0.dtype).tiny)
        tau = tau - _wide(along) * x_0
    return tau / _wide(rms(tau))


def logit(e_w: torch.Tensor, e_l: torch.Tensor, r_w: torch.Tensor, r_l: torch.Tensor, beta: float) -> torch.Tensor:
    """Eq. 18's argument of log sigmoid: -0.5 beta [(e_w - e_l) - (r_w - r_l)], (B,). Exactly 0 if e == r."""
    return -0.5 * beta * ((e_w - e_l) - (r_w - r_l))


def preference_loss(logit: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
    """-log sigmoid(logit) of each pair, (B,): InPO Eq. 18, Diffusion-DPO (arXiv 2311.12908) Eq. 14.

    label (B,): the probability that the winner is the better one; then the mean over both orders (cDPO, Eq. 3 of
    Mitchell's note on DPO with noisy labels, 2023).
    """
    loss = -F.logsigmoid(logit)
    return loss if label is None else label * loss - (1 - label) * F.logsigmoid(-logit)


def smoothed(label: torch.Tensor, smoothing: float) -> torch.Tensor:
    """objective.label_smoothing: the probability that the winner is the better one if a share of labels is swapped."""
    return (1 - smoothing) * label + smoothing * (1 - label)


def smoothed_preference_loss(logit: torch.Tensor, label: torch.Tensor, gamma: float) -> torch.Tensor:
    """SmPO-Diffusion (arXiv 2506.02698) Eq. 9 with alpha = gamma label: -log sigmoid((2 label - 1) gamma logit), (B,).

    Goes to ln 2 with no gradient as the label nears 1/2, where cDPO pulls the logit back to 0.
    """
    return -F.logsigmoid((2 * label - 1) * gamma * logit)


def utility_loss(gain: torch.Tensor, good: torch.Tensor, beta: float) -> torch.Tensor:
    """1 - U(sign beta gain) of each image, U the sigmoid, the utility that Diffusion-KTO (arXiv 2404.04465, Eq. 8)
    found best. gain: (r - e) less the reference point. good: the probability that the image is a good one (sign +1);
    the expectation over it.
    """
    return good * torch.sigmoid(-beta * gain) + (1 - good) * torch.sigmoid(beta * gain)


def pair_utility_loss(e: torch.Tensor, r: torch.Tensor, point: torch.Tensor, label: torch.Tensor, beta: float):
    """Diffusion-KTO's loss of pairs, (B,): the mean of their two images', the winner good with probability `label`,
    the loser with 1 - label. e, r: (2B,), winners first; point: scalar, `reference_point`, without gradient."""
    loss = utility_loss((r - e) - point, torch.cat([label, 1 - label]), beta)
    return loss.view(2, -1).mean(0)


def loser_gate(residual_w: torch.Tensor, residual_l: torch.Tensor, mu: float) -> torch.Tensor:
    """Diffusion-SDPO's lambda in [0, 1] for each pair, (B,), detached.

    With gA, gB the output-space gradients of e_w and e_l (both 2 residual / numel), a step along
    -(gA - lambda gB) lowers e_w by at least mu |gA|^2 to first order iff lambda gA.gB <= (1 - mu) |gA|^2.
    Where gA.gB <= 0 the loser cannot hurt the winner: lambda = 1.
    """
    own = residual_w.detach().square().sum((1, 2, 3))
    cross = (residual_w.detach() * residual_l.detach()).sum((1, 2, 3))
    safe = (1 - mu) * own / cross.clamp_min(torch.finfo(cross.dtype).tiny)
    return torch.where(cross > 0, safe.clamp(0, 1), torch.ones_like(safe))


def gate_gradient(e_l: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """e_l in value (bit for bit, so that the step-0 logit stays 0), gate * its gradient."""
    still = e_l.detach()
    return still + gate * (e_l - still)


def evaluate(
    method: Method,
    config: ObjectiveConfig,
    pred: torch.Tensor,
    ref: torch.Tensor,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    a_t: torch.Tensor,
    s_t: torch.Tensor,
    weight: torch.Tensor,
    label: torch.Tensor | None = None,
    fused: bool = True,
    point: torch.Tensor | None = None,
) -> Objective:
    """Loss, metrics and the gradient of sum(weight * loss) in pred's space; go on with `pred.backward(dpred)`.

    pred, ref, x_t, x_0: (S B, C, H, W), S sides, winners first; a_t, s_t (S B,); weight (B,), fp32; label (B,), the
    probability that the winner is the better one (1 without it; sft does not look at it). point: kto's reference point.
    fused: one kernel for everything where there is one (inpo, dpo); otherwise (smpo, kto, sft) errors, the functions of
    this file and autograd. The logit is Eq. 18's for all pairwise methods and kto, without smpo's factor, so that
    margins compare. For `sft` the loss is the winner's error and the logit minus that.
    """
    label = torch.ones_like(weight) if label is None else label
    if config.label_smoothing:
        label = smoothed(label, config.label_smoothing)
    if fused and method in ("inpo", "dpo"):
        mu = config.winner_preserving
        return inpo_loss(pred, ref, x_t, x_0, a_t, s_t, beta=config.beta, mu=mu, weight=weight, label=label)
    pred, ref, x_t, x_0 = (x.detach().contiguous() for x in (pred, ref, x_t, x_0))
    pred.requires_grad_()
    e, r = errors(pred, ref, x_t, x_0, a_t, s_t)
    tau = target(x_t, x_0, a_t, s_t)
    gate, residual = torch.ones_like(weight), pred.detach() - tau
    cross = (residual * residual.roll(len(weight), 0)).mean((1, 2, 3))
    if method == "sft":
        loss, logits = e, -e
    else:
        (e_w, e_l), (r_w, r_l) = e.chunk(2), r.chunk(2)
        if config.winner_preserving is not None:
            gate = loser_gate(*residual.chunk(2), config.winner_preserving)
            e_l = gate_gradient(e_l, gate)
        logits = logit(e_w, e_l, r_w, r_l, config.beta)
        if method == "smpo":
            loss = smoothed_preference_loss(logits, label, config.gamma)
        elif method == "kto":
            loss = pair_utility_loss(e, r, torch.zeros_like(weight[0]) if point is None else point, label, config.beta)
        else:
            loss = preference_loss(logits, label)
    (dpred,) = torch.autograd.grad((weight * loss).sum(), pred)
    with torch.no_grad():
        products = [(x * y).mean((1, 2, 3)) for x, y in ((tau, tau), (ref, ref), (pred, ref), (tau, ref))]
        image = torch.stack([e, r, *products, cross], 1)
    return Objective(loss.detach(), logits.detach(), gate, image, dpred)


def uses_inversion(method: Method, inversion) -> bool:
    return method in INVERTING and inversion.estimator != "random"


def label(method: Method, objective: ObjectiveConfig, inversion) -> str:
    """The honest name of what is trained: a paper's method only where nothing deviates from it."""
    name = "dpo" if method == "inpo" and inversion.estimator == "random" else method
    if uses_inversion(method, inversion):
        own = {"inpo": "ddim", "smpo": "renoise"}[method]
        name += "" if objective.tau_norm == "none" else f"-{objective.tau_norm}"
        name += "" if inversion.estimator == own else f"-{inversion.estimator}"
        if inversion.estimator != "ddim" and inversion.refinements != 1:
            name += f"-k{inversion.refinements}"
        name += "" if inversion.model == "policy" else "-ref-frozen" if inversion.frozen else "-ref"
        name += "" if inversion.grid == "exact" else f"-{inversion.grid}"
        name += "" if inversion.evaluate_at == "source" else "-target"
        name += "" if inversion.guidance == 0 else f"-w{inversion.guidance:g}"
        name += "" if inversion.eta == 0 else f"-eta{inversion.eta:g}"
        name += "-fp8" if inversion.fp8 else ""
    elif method == "smpo":
        name += "-random"
    if method == "smpo" and objective.gamma != GAMMA:
        name += f"-gamma{objective.gamma:g}"
    if objective.label_smoothing and method != "sft":
        name += f"-ls{objective.label_smoothing:g}"
    return name + ("-wp" if objective.winner_preserving is not None and method in PAIRWISE else "")


def _wide(per_image: torch.Tensor) -> torch.Tensor:
    return per_image[:, None, None, None]
