"""A method's loss of some pairs, its metrics and its gradient. No model, no data.

losses.py has the formulas, methods.py which of them a method takes.
"""

import torch
from inpo_kernels.errors import errors
from inpo_kernels.inpo_loss import Objective, inpo_loss

from inpo_fast.method.config import ObjectiveConfig
from inpo_fast.method.losses import gate_gradient, logit, loser_gate, smoothed
from inpo_fast.method.methods import Terms, method_of
from inpo_fast.method.noise_path import target


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
    fused: one kernel for everything where the method has one (inpo, dpo); otherwise errors, losses.py and autograd.
    The logit is Eq. 18's for all pairwise methods and kto, without smpo's factor, so that margins compare. For `sft`
    the loss is the winner's error and the logit minus that. UserError for a method that there is not.
    """
    how = method_of(method)
    label = torch.ones_like(weight) if label is None else label
    if config.label_smoothing:
        label = smoothed(label, config.label_smoothing)
    if fused and how.fused:
        mu = config.winner_preserving
        return inpo_loss(pred, ref, x_t, x_0, a_t, s_t, beta=config.beta, mu=mu, weight=weight, label=label)
    pred, ref, x_t, x_0 = (x.detach().contiguous() for x in (pred, ref, x_t, x_0))
    pred.requires_grad_()
    e, r = errors(pred, ref, x_t, x_0, a_t, s_t)
    tau = target(x_t, x_0, a_t, s_t)
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
        products = [(x * y).mean((1, 2, 3)) for x, y in ((tau, tau), (ref, ref), (pred, ref), (tau, ref))]
        image = torch.stack([e, r, *products, cross], 1)
    return Objective(loss.detach(), logits.detach(), gate, image, dpred)
