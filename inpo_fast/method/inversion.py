"""x_0 -> x_t for all images of an optimizer step at once, in slots.

Inside one optimizer step the weights do not change, so inverting the whole window first, in large batches of mixed
timesteps, is the same computation as inverting one pair at a time. Every UNet evaluation advances the samples that
have the most steps left, each by its own step: no slot of a batch waits for the slowest of its neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast.method.inversion_schedule import EvaluateAt, Grid, InversionTrajectory, Schedule, plan, shares_prefix
from inpo_fast.method.solvers import evaluations_a_step, refine
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.transfer import to_device

# eps(x, time, rows): noise prediction for samples x (B, C, H, W) told time (B,), with the conditioning of
# the window's rows (B,) int64.
Eps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

UNDER_NOISED = 0.9  # rms(tau): below it the inversion leaves the latents too clean


@dataclass(frozen=True)
class InversionConfig:
    """How x_t is found from x_0 (paper section 4.2, Eq. 14-16)."""

    steps: int = 10
    """n, the number of global levels. Paper: 10 is the trade-off, 30 the best quality."""
    grid: Grid = "exact"
    """exact: global levels, the last step lands on t. spread: n levels round(t k / n) of each sample's own.
    snap: t itself is moved to a global level. diffusers-0.20 / -0.22: the published script's two behaviours."""
    evaluate_at: EvaluateAt = "source"
    """Which time the UNet is told: the level it is at (Eq. 15), or the one it goes to (diffusers >= 0.22)."""
    model: Literal["policy", "reference"] = "policy"
    """Who inverts. The paper: the current policy. reference is a variant and labelled so."""
    guidance: float = 0.0
    """w_inv: 0 empty prompt (the paper), 1 conditional, else classifier-free guidance (two evaluations)."""
    eta: float = 0.0
    """Noise added per step, eta * sigma_ddim. The paper: none; the published script: 0.1."""
    estimator: Literal["ddim", "renoise", "fixed-point", "gradient", "random"] = "ddim"
    """How delta_t is estimated (S3): DDIM inversion; steps refined by ReNoise's average (method smpo), by fixed-point
    iteration, or by gradient descent on the residual; i.i.d. Gaussian noise (= Diffusion-DPO's choice)."""
    refinements: int = 1
    """Of each step, with renoise, fixed-point and gradient: that many more UNet evaluations (gradient: twice)."""
    fp8: bool = False
    """Linear layers of the inversion in fp8 (needs models.fast). x_t moves a little: a variant and labelled so."""
    batch: int = 64
    """Images per UNet evaluation. No effect on the result beyond rounding."""
    cache: str | None = None
    """Folder of trajectories; needs model=reference. Those in it are not computed, the others are added. No effect on
    the result beyond rounding. Runs that differ in seed (with data.vae_sample=false), beta, lr … share it."""
    frozen: bool = False
    """The cache also keeps x_t and the reference's prediction: t is then a function of the pair, the same in every
    epoch and for every seed. A variant and labelled so; only the policy's step is left of a cached run."""


def fill_slots(evaluations: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """The samples (<= batch,) int64 that each UNet evaluation of a window advances by one step, longest first.

    evaluations: (M,) how many steps each sample takes. The number of calls is the least possible one (`slots`).
    """
    left = evaluations.clone()
    calls, width = slots(evaluations, batch)
    out = []
    for _ in range(calls):
        first = torch.argsort(left, descending=True, stable=True)[:width]
        chosen = first[left[first] > 0]
        left[chosen] -= 1
        out.append(chosen)
    return out


def slots(evaluations: torch.Tensor, batch: int) -> tuple[int, int]:
    """How many calls a window needs, and how many samples the widest of them advances.

    No order can do with fewer calls than the longest sample has steps, nor than all steps fill batches; longest first
    needs no more (McNaughton 1959, for steps of unit length). The work is spread evenly over the calls, instead of
    ending with one that is almost empty.
    """
    if not len(evaluations):
        return 0, batch
    total = int(evaluations.sum())
    calls = max(int(evaluations.max()), -(-total // batch))
    return calls, -(-total // calls) if calls else batch


def check_estimator(how: InversionConfig, predicts_v: bool) -> None:
    """UserError where a refined step would be of a model that predicts v."""
    if predicts_v and how.estimator not in ("ddim", "random"):
        raise UserError(
            f"inversion.estimator={how.estimator} is for models that predict noise, this one predicts v; take ddim"
        )


def trajectory_serves_all(how: InversionConfig, schedule: Schedule) -> bool:
    """Whether one climb of an image serves all its timesteps."""
    return how.estimator == "ddim" and shares_prefix(
        schedule, steps=how.steps, grid=how.grid, evaluate_at=how.evaluate_at
    )


def evaluations_of(how: InversionConfig, schedule: Schedule, t: torch.Tensor) -> torch.Tensor:
    """(N,): steps of the climbs that N images need for their K timesteps, t (K, N)."""
    climb = plan(schedule, t.flatten(), steps=how.steps, grid=how.grid, evaluate_at=how.evaluate_at)
    each = climb.evaluations.view_as(t)
    return each.amax(0) if trajectory_serves_all(how, schedule) else each.sum(0)


def utilisation(evaluations: torch.Tensor, batch: int) -> float:
    """Share of a window's slots, calls times width, that hold a sample."""
    calls, width = slots(evaluations, batch)
    return int(evaluations.sum()) / (calls * width) if calls else 1.0


@torch.no_grad()
def invert(
    eps: Eps,
    x_0: torch.Tensor,
    climb: InversionTrajectory,
    *,
    batch: int,
    width: int | None = None,
    conditional: Eps | None = None,
    guidance: float = 0.0,
    noise_keys: list[int] | None = None,
    estimator: str = "ddim",
    refinements: int = 1,
    each: int = 1,
) -> tuple[torch.Tensor, int]:
    """All samples of a window to their own level.

    guidance 0 asks eps (the empty prompt), 1 asks conditional, anything else both.
    x_0: (M, C, H, W), any float dtype; the climb's coefficients are applied in fp32 (float64 stays float64).
    width: every call has so many samples, at least min(batch, M); empty slots ask about sample 0 and move nobody.
    noise_keys: (M,) 63-bit keys of the per-step noise, required when the climb has sigma > 0.
    estimator, refinements: as of InversionConfig but random; any but ddim needs a climb whose p and q take eps (not v)
    and no sigma.
    each: so many successive rows of the climb (each * M) are of one sample, which climbs once, as far as the furthest
    of them; the others leave on the way. Needs global levels (schedule.has_global_levels), and ddim.
    Returns x_t (each * M, C, H, W) in fp32 or float64, and the number of image evaluations spent.
    """
    noisy = bool(climb.sigma.any())
    if noisy and noise_keys is None:
        raise ValueError("inversion with eta > 0 needs noise_keys, one for each sample")
    if each > 1 and estimator != "ddim":
        raise ValueError(f"a step of {estimator} is solved for where it goes: climbs cannot be shared (each={each})")
    both = guidance not in (0.0, 1.0)
    first = conditional if guidance == 1.0 else eps
    device = x_0.device
    wide = torch.float64 if x_0.dtype == torch.float64 else torch.float32
    # latents may be channels_last
    x = x_0.to(wide, copy=True, memory_format=torch.contiguous_format).repeat_interleave(each, 0)

    # the whole window's bookkeeping on the CPU, then one upload of each column: no evaluation waits for the host
    left = climb.evaluations.view(-1, each)
    furthest = torch.arange(len(left)) * each + left.argmax(1)  # the row that asks for its sample's
    calls = fill_slots(left.amax(1), batch)
    moved = torch.cat(calls) if calls else torch.zeros(0, dtype=torch.int64)
    spent = len(moved) * (2 if both else 1) * evaluations_a_step(estimator, refinements)
    step = _times_seen(moved)
    if width is not None:
        sizes = [width] * len(calls)
        at = torch.cat([i * width + torch.arange(len(call)) for i, call in enumerate(calls)]) if calls else moved
        fill = lambda column, empty: torch.full((sum(sizes),), empty).index_copy(0, at, column)  # noqa: E731
        moved, step = fill(moved, -1), fill(step, 0)
    else:
        sizes = [len(call) for call in calls]
    sample = moved.clamp_min(0)
    asks = furthest[sample]
    columns = [asks, sample, climb.times[asks, step]]
    for k in range(each):
        rows = sample * each + k
        at = (rows, step)  # p = 1 and q = 0 leave those alone that are there
        columns += [torch.where(moved < 0, -1, rows), climb.p[at].to(wide), climb.q[at].to(wide)]
        if estimator != "ddim":
            columns.append(climb.levels[rows, step + 1])
        elif noisy:
            columns += [climb.sigma[at].to(wide), torch.tensor(noise_keys)[sample], step]
    for part in zip(*(to_device(column, device).split(sizes) for column in columns), strict=True):
        here, who, time = part[:3]
        asked = x[here], time, who
        if estimator != "ddim":
            target, p, q, goal = part[3:]
            ask = partial(_guided, first, conditional if both else None, guidance)
            answer = partial(_at, ask, goal, who)
            ddim_step_(x, refine(estimator, answer, asked[0], ask(*asked), p, q, refinements), p, q, rows=target)
            continue
        found = first(*asked)
        options = {"conditional": conditional(*asked), "guidance": guidance} if both else {}
        own = len(part[3:]) // each
        for k in range(each):
            target, p, q, *noise = part[3 + k * own : 3 + (k + 1) * own]
            noise = dict(zip(("sigma", "keys", "steps"), noise, strict=False))
            ddim_step_(x, found, p, q, rows=target, **options, **noise)
    return x, spent


def _guided(eps: Eps, conditional: Eps | None, guidance: float, x: torch.Tensor, time, rows) -> torch.Tensor:
    """The answer, of both models if there are two, in x's dtype."""
    answer = eps(x, time, rows).to(x.dtype)
    return answer if conditional is None else answer + guidance * (conditional(x, time, rows).to(x.dtype) - answer)


def _at(eps: Eps, time: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return eps(x, time, rows)


def _times_seen(rows: torch.Tensor) -> torch.Tensor:
    """How often each entry of rows (N,) stood there before."""
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    out = torch.empty_like(rows)
    out[order] = torch.arange(len(rows)) - starts
    return out
