"""Inversion solvers: a step that solves the sampler's own equation, instead of taking the output at its source level.

DDIM sampling goes from level s' down to s with the output at s'. Undoing that exactly asks for the x' with

    x' = p x + q eps(x', s')                          r(x') = x' - p x - q eps(x', s')

The explicit step puts eps(x, s) there. From it, k refinements (supplement S3 of arXiv 2503.18454: delta_t by
fixed-point iteration of Eq. 13, or by gradient descent on its residual):

    fixed-point   x' <- p x + q eps(x', s'), k times
    renoise       the same iteration; the step then takes the mean of all k + 1 outputs (ReNoise, arXiv 2403.14602;
                  k = 1 in SmPO-Diffusion, arXiv 2506.02698)
    gradient      x' <- x' - rate * d(|r|^2 / 2) / dx', k times, through the UNet

With inversion.steps=1 it is one equation between the image and t. Ours: solving it for every step of the trajectory, so
that all grids work; rate = 1, where a step leaves out of r what a fixed-point iteration leaves, to first order, and
equal weights of the outputs. The first output is conditioned on s, as its samples are at s, the others on s': with
k = 1 renoise is Heun's method for the sampler's equation d(x / a) = eps d(s / a), of second order; the others are of
first order. SmPO's published script conditions both outputs on the time that its scheduler walks at: with the diffusers
0.20 that it pins that is s (refine_at: source), from 0.22 on s' (evaluate_at: target).
"""

from collections.abc import Callable
from typing import Literal

import torch

from inpo_fast.method.noise_path import per_image

Solver = Literal["renoise", "fixed-point", "gradient"]
PredictThere = Callable[[torch.Tensor], torch.Tensor]  # the output at x' (B, C, H, W), conditioned on its level


def evaluations_a_step(estimator: str, refinements: int) -> int:
    """UNet evaluations of one step of one image. A backward pass to the input counts as one more."""
    return {"ddim": 1, "random": 0, "gradient": 1 + 2 * refinements}.get(estimator, 1 + refinements)


def solve_step(
    solver: Solver,
    predict: PredictThere,
    x: torch.Tensor,
    first: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    refinements: int,
    rate: float = 1.0,
) -> torch.Tensor:
    """The output (B, C, H, W), in x's dtype, with which p x + q output is the solved step.

    x (B, C, H, W): at the level it comes from; first: the output there, of the explicit step; p, q (B,), q not 0.
    """
    p, q = per_image(p), per_image(q)
    start, outputs = p * x, [first.to(x.dtype)]
    if solver == "gradient":
        there = start + q * outputs[0]
        for _ in range(refinements):
            there = there - rate * _slope(predict, there, start, q)
        return (there - start) / q
    for _ in range(refinements):
        outputs.append(predict(start + q * outputs[-1]).to(x.dtype))
    return sum(outputs) / len(outputs) if solver == "renoise" else outputs[-1]


def _slope(predict: PredictThere, there: torch.Tensor, start: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """d(|r|^2 / 2) / dx' of each sample."""
    with torch.enable_grad():
        there = there.detach().requires_grad_()
        residual = there - start - q * predict(there).to(there.dtype)
        (slope,) = torch.autograd.grad(0.5 * residual.square().sum(), there)
    return slope
