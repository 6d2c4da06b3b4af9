"""A method's loss of some pairs, its metrics and its gradient. No model, no data.

losses.py has the formulas, methods.py which of them a method takes.
"""

import torch
from inpo_kernels.errors import errors
from inpo_kernels.inpo_loss import Objective, inpo_loss

from inpo_fast.method.config import ObjectiveConfig
from inpo_fast.method.losses import gate_gradient, logit, loser_gate, smoothed
from inpo_fast.method.methods import Terms, method_of
from inpo_fast.method.noise_path import NoisePath, target, velocity_target
from inpo_fast.runtime.errors import UserError

NO_IMAGE = 1e-3  # a_t below which x_t holds nothing of the image; schedulers write 0 or 2^-12 for zero terminal SNR


def check_objective(config: ObjectiveConfig, path: NoisePath) -> None:
    """UserError where the model has no such error."""
    if config.error_space == "velocity" and path.output != "v":
        raise UserError(
            f"objective.error_space=velocity is for models that predict v, this one predicts {path.output}; take noise"
        )


def objective_notes(config: ObjectiveConfig, path: NoisePath) -> list[str]:
    """What has to be said of an objective before the first step."""
    a, _ = path.a_s(path.possible_timesteps(config.timesteps))
    if path.output == "v" and config.error_space == "noise" and float(a.min()) < NO_IMAGE:
        return [
            "warning: this base has zero terminal SNR: at its noisiest timestep the error of the noise is 0 whatever "
            "the model says, and those near it hardly count (objective.error_space=noise weighs an error of v by "
            "abar_t); objective.error_space=velocity trains them too"
        ]
    return []


@torch.enable_grad()  # of a leaf of its own: validation calls it where gradients are off
def evaluate(
    method: str,
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
    With config.error_space = velocity pred and ref are a v-model's outputs, and errors and gradient are in v.
    fused: one kernel for everything where the method has one (inpo, dpo); otherwise errors, losses.py and autograd.
    The logit is Eq. 18's for all pairwise methods and kto, without smpo's factor, so that margins compare. For `sft`
    the loss is the winner's error and the logit minus that. UserError for a method that there is not.
    """
    how = method_of(method)
    label = torch.ones_like(weight) if label is None else label
    if config.label_smoothing:
        label = smoothed(label, config.label_smoothing)
    velocity = config.error_space == "velocity"
    if fused and how.fused:
        options = {"beta": config.beta, "mu": config.winner_preserving, "velocity": velocity}
        return inpo_loss(pred, ref, x_t, x_0, a_t, s_t, weight=weight, label=label, **options)
    pred, ref, x_t, x_0 = (x.detach().contiguous() for x in (pred, ref, x_t, x_0))
    pred.requires_grad_()
    e, r = errors(pred, ref, x_t, x_0, a_t, s_t, velocity)
    tau = (velocity_target if velocity else target)(x_t, x_0, a_t, s_t)
    gate, residual = torch.ones_like(weight), pred.detach() - tau
    cross = (residual * residual.roll(len(weight), 0)).mean((1, 2, 3))
    if how.sides == 1:
        logits = -e
    else:
        (e_w, e_l), (r_w, r_l) = e.chunk(2), r.chunk(2)
        if config.winner_preserving is not None:
            gate = loser_gate(*residual.chunk(2), config.winner_preserving)
            e_l = gate_gradient(e_l, gate)
        logits = logit(e_w, e_l, r_w, r_l, config.beta)
    loss = how.loss(Terms(e, r, logits, label, torch.zeros_like(weight[0]) if point is None else point), config)
    (dpred,) = torch.autograd.grad((weight * loss).sum(), pred)
    with torch.no_grad():
        image = torch.cat([torch.stack([e, r], 1), _means(tau, pred, ref), cross[:, None]], 1)
    return Objective(loss.detach(), logits.detach(), gate, image, dpred)


def noise_means(
    pred: torch.Tensor, ref: torch.Tensor, x_t: torch.Tensor, x_0: torch.Tensor, a_t: torch.Tensor, s_t: torch.Tensor
) -> torch.Tensor:
    """(S B, 4): the columns tau_square to tau_reference of `Objective.image`, of predicted noise (S B, C, H, W)."""
    return _means(target(x_t, x_0, a_t, s_t), pred, ref)


def _means(tau: torch.Tensor, pred: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    products = ((tau, tau), (ref, ref), (pred, ref), (tau, ref))
    return torch.stack([(x * y).mean((1, 2, 3)) for x, y in products], 1)
