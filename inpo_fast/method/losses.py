"""From per-image errors to a loss, and what may be done to the target first. Pure functions of tensors.

Notation of the paper: for each image e = mean (tau - eps_theta)^2, r = mean (tau - eps_ref)^2 over its
elements, tau the noise estimate that made x_t. All vectors are (B,), one entry a pair; a mean over
elements and the factor 0.5 are what beta = 2000 / 5000 are calibrated to.
"""

import torch
import torch.nn.functional as F

from inpo_fast.method.noise_path import per_image


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
        tau = tau - per_image(along) * x_0
    return tau / per_image(rms(tau))


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
