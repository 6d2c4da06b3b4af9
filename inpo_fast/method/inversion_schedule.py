"""Noise levels and the climb from a clean image to level t. Pure tensors on the CPU, no model.

A level is an index into `abar` (alphas_cumprod); `CLEAN` = -1 is the image itself, where abar = 1.
Coefficients are computed in float64 from the fp32 schedule and rounded once to fp32: in bf16,
abar[0] == abar[1] == 1 and the target divides by zero.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Grid = Literal["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"]
EvaluateAt = Literal["source", "target"]
CLEAN = -1


@dataclass(frozen=True)
class Schedule:
    """abar: (T,) fp32, decreasing. first_abar: what diffusers' inverse scheduler takes for the clean image."""

    abar: torch.Tensor
    first_abar: float = 1.0
    steps_offset: int = 1

    @staticmethod
    def of(scheduler) -> "Schedule":
        """The schedule of a diffusers scheduler with `alphas_cumprod`."""
        abar = scheduler.alphas_cumprod.float().cpu()
        first = 1.0 if scheduler.config.get("set_alpha_to_one", True) else float(abar[0])
        return Schedule(abar, first, int(scheduler.config.get("steps_offset", 0)))

    @property
    def T(self) -> int:
        return len(self.abar)

    def a_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), fp32, same shape as t."""
        abar = self.abar.double()[t]
        return abar.sqrt().float(), (1 - abar).sqrt().float()


@dataclass(frozen=True)
class InversionTrajectory:
    """How each of M samples gets from x_0 to x_t: x <- p x + q eps(x, time) (+ sigma noise), K steps at most.

    All (M, K) but `evaluations` (M,): how many of its K columns a sample uses. Columns beyond are p = 1, q = 0.
    """

    p: torch.Tensor
    q: torch.Tensor
    sigma: torch.Tensor
    times: torch.Tensor
    evaluations: torch.Tensor
    levels: torch.Tensor  # (M, K + 1): the levels visited, from CLEAN to the last; for tests and tracing


def snap(t: torch.Tensor, steps: int, T: int) -> torch.Tensor:
    """The global level at or above t: t -> the levels T/n, 2T/n, ... T (less one)."""
    return -(-(t + 1) * steps // T) * T // steps - 1


def systematic_timesteps(first: torch.Tensor, low: int, high: int, count: int) -> torch.Tensor:
    """(count, N) int64: the given timesteps (N,) and count - 1 more of each, at equal distances round from high to low.

    Where the first is uniform on low..high each of the others is too, and together they are in as many equal parts of
    the range (systematic sampling): their mean of a function of t is unbiased, and varies less than that of as many
    independent ones where the function is smooth.
    """
    width = high - low + 1
    return low + (first - low + torch.arange(count)[:, None] * width // count) % width


def plan(
    schedule: Schedule,
    t: torch.Tensor,
    *,
    steps: int,
    grid: Grid = "exact",
    evaluate_at: EvaluateAt = "source",
    eta: float = 0.0,
    predicts_v: bool = False,
) -> InversionTrajectory:
    """The climb of each sample to its own level.

    t: (M,) int64 in 0..T-1. Eq. 14-16 of the paper; grids as in the configuration's documentation.
    predicts_v: the model answers v = a eps - s x_0 (arXiv 2202.00512); eps = a v + s x is folded into p and q.
    ValueError for a t out of range, or steps outside 1..T.
    """
    T = schedule.T
    if not 1 <= steps <= T:
        raise ValueError(f"inversion steps must be in 1..{T}, got {steps}")
    if t.dtype != torch.int64 or t.ndim != 1 or (len(t) and not (int(t.min()) >= 0 and int(t.max()) < T)):
        raise ValueError(f"t must be int64 (M,) in 0..{T - 1}, got {t.dtype} {tuple(t.shape)}")
    levels, evaluations, first_time = _levels(t, steps, grid, T, schedule.steps_offset)

    # abar with the clean image appended, so that index -1 (CLEAN) finds it
    clean = schedule.first_abar if grid.startswith("diffusers") else 1.0
    abar = torch.cat([schedule.abar.double(), torch.tensor([clean], dtype=torch.float64)])[levels]
    source, target = abar[:, :-1], abar[:, 1:]
    p = (target / source).sqrt()
    q = (1 - target).sqrt() - (1 - source).sqrt() * p
    sigma = ((1 - source) / (1 - target).clamp_min(1e-12) * (1 - target / source)).clamp_min(0).sqrt()
    told = levels[:, :-1] if evaluate_at == "source" else levels[:, 1:]
    times = torch.where(told == CLEAN, first_time, told)

    if predicts_v:
        p, q = p + q * (1 - source).sqrt(), q * source.sqrt()
    beyond = torch.arange(p.shape[1]) >= evaluations[:, None]
    return InversionTrajectory(
        p=p.masked_fill(beyond, 1.0).float(),
        q=q.masked_fill(beyond, 0.0).float(),
        sigma=(eta * sigma).masked_fill(beyond, 0.0).float(),
        times=times,
        evaluations=evaluations,
        levels=levels,
    )


def shares_prefix(schedule: Schedule, *, steps: int, grid: Grid, evaluate_at: EvaluateAt) -> bool:
    """Whether the climb to any t is the beginning of the climb to the highest one, but for where its last step lands.

    Then the UNet is asked the same things on the way to every t, and the answers along the highest climb serve all.
    Found out by planning every climb: with a last step that is told its own t (exact, target) it does not hold.
    """
    climb = plan(schedule, torch.arange(schedule.T), steps=steps, grid=grid, evaluate_at=evaluate_at)
    column = torch.arange(climb.p.shape[1])
    asked = column < climb.evaluations[:, None]
    moved = column < climb.evaluations[:, None] - 1
    same_step = (climb.p == climb.p[-1]) & (climb.q == climb.q[-1])
    longest = climb.evaluations <= climb.evaluations[-1]
    return bool(longest.all() and (climb.times == climb.times[-1])[asked].all() and same_step[moved].all())


def _levels(t: torch.Tensor, steps: int, grid: Grid, T: int, offset: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Levels (M, K + 1) starting at CLEAN, evaluations (M,), and the time the UNet is told for CLEAN."""
    k = torch.arange(steps + 1)
    if grid == "spread":
        # n levels of the sample's own, round(t k / n), halves up; always n evaluations
        levels = (2 * t[:, None] * k + steps) // (2 * steps)
        levels[:, 0] = CLEAN
        return levels, torch.full_like(t, steps), 0
    if grid in ("exact", "snap"):
        # the global levels T/n, 2T/n, ... (less one, because the clean image is number 0) below t, then t itself
        if grid == "snap":
            t = snap(t, steps, T)
        levels = torch.minimum(k * T // steps - 1, t[:, None])
        return levels, (levels[:, :-1] < t[:, None]).sum(1), 0
    # The published script: walk scheduler.timesteps while they are < t; each step goes T // n up in
    # diffusers 0.20 and comes from T // n below in >= 0.22. It never lands on t.
    stride = T // steps
    marks = torch.arange(steps) * stride + offset
    if grid == "diffusers-0.20":
        walked = marks - stride  # -99, 1, ... 801
        levels = torch.cat([torch.tensor([CLEAN]), marks])
        first_time = int(walked[0])
    elif grid == "diffusers-0.22":
        walked = marks  # 1, 101, ... 901
        levels = torch.cat([torch.tensor([CLEAN]), marks])
        first_time = 0
    else:
        raise ValueError(f"unknown inversion grid {grid!r}; one of exact, spread, snap, diffusers-0.20, diffusers-0.22")
    return levels.expand(len(t), -1), (walked < t[:, None]).sum(1), first_time
