"""x_0 -> x_t for all images of an optimizer step at once, in batch slots.

Inside one optimizer step the weights do not change, so inverting all pairs first, in large batches of mixed
timesteps, is the same computation as inverting one pair at a time. Every UNet evaluation advances the samples that
have the most steps left, each by its own step: no slot of a batch waits for the slowest of its neighbours.
"""

from collections.abc import Callable
from functools import partial

import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast.method.config import InversionConfig
from inpo_fast.method.inversion_schedule import InversionTrajectory, inversion_schedule, shares_prefix
from inpo_fast.method.noise_path import NoisePath
from inpo_fast.method.solvers import evaluations_a_step, solve_step
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.transfer import to_device

# predict(x, time, rows): the model output for samples x (B, C, H, W) conditioned on time (B,), with the text of
# the rows (B,) int64 of the step's images.
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def fill_batch_slots(evaluations: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """The samples (<= batch,) int64 that each UNet evaluation of a step advances, longest trajectory first.

    evaluations: (M,) how many steps each sample takes. The number of calls is the least possible one (`batch_slots`).
    """
    left = evaluations.clone()
    calls, width = batch_slots(evaluations, batch)
    out = []
    for _ in range(calls):
        first = torch.argsort(left, descending=True, stable=True)[:width]
        chosen = first[left[first] > 0]
        left[chosen] -= 1
        out.append(chosen)
    return out


def batch_slots(evaluations: torch.Tensor, batch: int) -> tuple[int, int]:
    """How many UNet calls all samples (M,) need, and the slots of a call: samples that the widest of them advances.

    No order can do with fewer calls than the longest sample has steps, nor than all steps fill batches; longest first
    needs no more (McNaughton 1959, for steps of unit length). The work is spread evenly over the calls, instead of
    ending with one that is almost empty.
    """
    if not len(evaluations):
        return 0, batch
    total = int(evaluations.sum())
    calls = max(int(evaluations.max()), -(-total // batch))
    return calls, -(-total // calls) if calls else batch


def occupancy(evaluations: torch.Tensor, batch: int) -> float:
    """Share of the batch slots, calls times width, that hold a sample."""
    calls, width = batch_slots(evaluations, batch)
    return int(evaluations.sum()) / (calls * width) if calls else 1.0


def check_inversion(how: InversionConfig, path: NoisePath) -> None:
    """UserError where the model's noise path has no such grid, or no step that a solver could solve."""
    if how.grid not in path.grids:
        raise UserError(f"inversion.grid={how.grid} is not of this model; take one of {', '.join(path.grids)}")
    try:
        path.check(path.all_levels(1), how.steps)
    except ValueError as problem:
        raise UserError(
            f"inversion.steps={how.steps}: this model has no grid of so many steps ({problem})"
        ) from problem
    if how.estimator not in ("ddim", "random") and not path.implicit_steps:
        raise UserError(
            f"inversion.estimator={how.estimator} is for models that predict noise, this one predicts {path.output}; "
            "take ddim"
        )


def trajectory_serves_all(how: InversionConfig, path: NoisePath) -> bool:
    """Whether one trajectory of an image serves all its timesteps."""
    return how.estimator == "ddim" and shares_prefix(path, steps=how.steps, grid=how.grid, evaluate_at=how.evaluate_at)


def evaluations_of(how: InversionConfig, path: NoisePath, t: torch.Tensor) -> torch.Tensor:
    """(N,): steps of the trajectories that N images need for their K timesteps, t (K, N)."""
    found = inversion_schedule(path, t.flatten(), steps=how.steps, grid=how.grid, evaluate_at=how.evaluate_at)
    each = found.evaluations.view_as(t)
    return each.amax(0) if trajectory_serves_all(how, path) else each.sum(0)


@torch.no_grad()
def invert(
    predict: Predict,
    x_0: torch.Tensor,
    trajectory: InversionTrajectory,
    *,
    batch: int,
    width: int | None = None,
    conditional: Predict | None = None,
    guidance: float = 0.0,
    noise_keys: list[int] | None = None,
    estimator: str = "ddim",
    refinements: int = 1,
    each: int = 1,
) -> tuple[torch.Tensor, int]:
    """All samples of a step to their own level.

    guidance 0 evaluates predict (the empty prompt), 1 conditional, anything else both.
    x_0: (M, C, H, W), any float dtype; the trajectory's coefficients are applied in fp32 (float64 stays float64).
    width: every call has so many samples, at least min(batch, M); empty slots evaluate sample 0 and move nobody.
    noise_keys: (M,) 63-bit keys of the per-step noise, required when the trajectory has sigma > 0.
    estimator, refinements: as of InversionConfig but random; any but ddim needs a path with implicit_steps and a
    trajectory without sigma.
    each: so many successive rows of the trajectory (each * M) are of one sample, which takes one way, as far as the
    furthest of them; the others leave it before. Needs inversion_schedule.shares_prefix, and ddim.
    Returns x_t (each * M, C, H, W) in fp32 or float64, and the number of image evaluations spent.
    """
    noisy = bool(trajectory.sigma.any())
    if noisy and noise_keys is None:
        raise ValueError("inversion with eta > 0 needs noise_keys, one for each sample")
    if each > 1 and estimator != "ddim":
        raise ValueError(f"a step of {estimator} is solved for where it goes: no trajectory is shared (each={each})")
    both = guidance not in (0.0, 1.0)
    first = conditional if guidance == 1.0 else predict
    device = x_0.device
    wide = torch.float64 if x_0.dtype == torch.float64 else torch.float32
    # latents may be channels_last
    x = x_0.to(wide, copy=True, memory_format=torch.contiguous_format).repeat_interleave(each, 0)

    # all bookkeeping on the CPU, then one upload of each column: no evaluation waits for the host
    left = trajectory.evaluations.view(-1, each)
    furthest = torch.arange(len(left)) * each + left.argmax(1)  # the row whose trajectory its sample follows
    calls = fill_batch_slots(left.amax(1), batch)
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
    longest = furthest[sample]
    columns = [longest, sample, trajectory.times[longest, step]]
    for k in range(each):
        rows = sample * each + k
        at = (rows, step)  # p = 1 and q = 0 leave those alone that are there
        columns += [torch.where(moved < 0, -1, rows), trajectory.p[at].to(wide), trajectory.q[at].to(wide)]
        if estimator != "ddim":
            columns.append(trajectory.target_times[at])
        elif noisy:
            columns += [trajectory.sigma[at].to(wide), torch.tensor(noise_keys)[sample], step]
    for part in zip(*(to_device(column, device).split(sizes) for column in columns), strict=True):
        here, who, time = part[:3]
        inputs = x[here], time, who
        if estimator != "ddim":
            target, p, q, target_time = part[3:]
            guided = partial(_guided, first, conditional if both else None, guidance)
            there = partial(_at, guided, target_time, who)
            output = solve_step(estimator, there, inputs[0], guided(*inputs), p, q, refinements)
            ddim_step_(x, output, p, q, rows=target)
            continue
        output = first(*inputs)
        options = {"conditional": conditional(*inputs), "guidance": guidance} if both else {}
        own = len(part[3:]) // each
        for k in range(each):
            target, p, q, *noise = part[3 + k * own : 3 + (k + 1) * own]
            noise = dict(zip(("sigma", "keys", "steps"), noise, strict=False))
            ddim_step_(x, output, p, q, rows=target, **options, **noise)
    return x, spent


def _guided(
    predict: Predict, conditional: Predict | None, guidance: float, x: torch.Tensor, time, rows
) -> torch.Tensor:
    """The output, of both models if there are two, in x's dtype."""
    output = predict(x, time, rows).to(x.dtype)
    return output if conditional is None else output + guidance * (conditional(x, time, rows).to(x.dtype) - output)


def _at(predict: Predict, time: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return predict(x, time, rows)


def _times_seen(rows: torch.Tensor) -> torch.Tensor:
    """How often each entry of rows (N,) stood there before."""
    order = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    out = torch.empty_like(rows)
    out[order] = torch.arange(len(rows)) - starts
    return out
