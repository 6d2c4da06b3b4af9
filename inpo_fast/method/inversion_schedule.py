"""Which steps take each sample from its clean image to its own level. Pure tensors on the CPU, no model.

noise_path.py has the levels and what a step between two of them is.
"""

from dataclasses import dataclass

import torch

from inpo_fast.method.config import EvaluateAt, Grid
from inpo_fast.method.noise_path import NoisePath


@dataclass(frozen=True)
class InversionTrajectory:
    """How each of M samples gets from x_0 to x_t: x <- p x + q output(x, time) (+ sigma noise), K steps at most.

    All (M, K) but `evaluations` (M,): how many of its K columns a sample uses. Columns beyond are p = 1, q = 0.
    """

    p: torch.Tensor
    q: torch.Tensor
    sigma: torch.Tensor
    times: torch.Tensor  # what conditions the network
    evaluations: torch.Tensor
    levels: torch.Tensor  # (M, K + 1): visited, from the clean image to the last; for tests and tracing
    target_times: torch.Tensor  # what conditions it when a solver evaluates again, at the end of the step


def inversion_schedule(
    path: NoisePath,
    t: torch.Tensor,
    *,
    steps: int,
    grid: Grid = "exact",
    evaluate_at: EvaluateAt = "source",
    eta: float = 0.0,
    refine_at: EvaluateAt = "target",
) -> InversionTrajectory:
    """The trajectory of each sample to its own level.

    t: (M,) levels of the path. Eq. 14-16 of the paper; grids as in the configuration's documentation. ValueError for a
    t or a number of steps that the path does not have.
    """
    levels, evaluations, times = path.visited_levels(t, steps, grid)
    p, q, sigma = path.step_coefficients(levels, grid)
    beyond = torch.arange(p.shape[1]) >= evaluations[:, None]
    return InversionTrajectory(
        p=p.masked_fill(beyond, 1.0).float(),
        q=q.masked_fill(beyond, 0.0).float(),
        sigma=(eta * sigma).masked_fill(beyond, 0.0).float(),
        times=(times[:, :-1] if evaluate_at == "source" else times[:, 1:]).clone(),
        evaluations=evaluations,
        levels=levels,
        target_times=times[:, 1:] if refine_at == "target" else times[:, :-1],
    )


def shares_prefix(path: NoisePath, *, steps: int, grid: Grid, evaluate_at: EvaluateAt) -> bool:
    """Whether the trajectory to any t is the beginning of the one to the highest t, but for where its last step lands.

    Then the network gets the same inputs on the way to every t, and its outputs along the highest trajectory serve all.
    Found out by comparing all trajectories: it does not hold where the last step is conditioned on t (exact, target).
    """
    every = inversion_schedule(path, path.all_levels(steps), steps=steps, grid=grid, evaluate_at=evaluate_at)
    column = torch.arange(every.p.shape[1])
    evaluated = column < every.evaluations[:, None]
    moved = column < every.evaluations[:, None] - 1
    same_step = (every.p == every.p[-1]) & (every.q == every.q[-1])
    longest = every.evaluations <= every.evaluations[-1]
    return bool(longest.all() and (every.times == every.times[-1])[evaluated].all() and same_step[moved].all())
