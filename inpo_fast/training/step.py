"""One optimizer step: invert -> reference -> policy -> loss -> backward -> update. The page of the method.

What it works on, a window of pairs, and everything random is made in step_batch.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from inpo_kernels.inpo_loss import COLUMNS, Objective

from inpo_fast.method import objectives as obj
from inpo_fast.method.inversion import Predict, check_inversion, invert, occupancy, trajectory_serves_all
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.method.losses import normalise, rms
from inpo_fast.method.methods import method_of
from inpo_fast.method.noise_path import noised, target
from inpo_fast.method.reference_point import reference_point
from inpo_fast.models.fast.fast_unet import is_fast, wants_fixed_batch
from inpo_fast.models.models import Conditioning, Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.memory import fits
from inpo_fast.runtime.phases import phase
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.runtime.transfer import to_device
from inpo_fast.training.metrics import BUCKETS, MetricAccumulator
from inpo_fast.training.step_batch import StepBatch, StepConfig, uses_inversion


def noise_window(
    window: StepBatch,
    models: Models,
    recipe: StepConfig,
    tally: MetricAccumulator | None = None,
    preemption: Preemption | None = None,
) -> tuple[torch.Tensor, int]:
    """x_t of every image of the window (N, S, C, H, W) in fp32, at its own timestep alone, and the UNet evaluations
    spent on images."""
    (x_t,), spent = noise_moments((window,), models, recipe, tally, preemption)
    return x_t, spent


@torch.no_grad()
def noise_moments(
    moments: Sequence[StepBatch],
    models: Models,
    recipe: StepConfig,
    tally: MetricAccumulator | None = None,
    preemption: Preemption | None = None,
) -> tuple[list[torch.Tensor], int]:
    """x_t of each of a window's moments, (N, S, C, H, W) in fp32, and the UNet evaluations spent on images."""
    window = moments[0]
    shape = window.x_0.shape
    flat = window.x_0.flatten(0, 1)
    if not uses_inversion(recipe):
        return [_noised(moment, flat).unflatten(0, shape[:2]) for moment in moments], 0
    how = recipe.inversion
    check_inversion(how, models.noise_path)
    if len(moments) > 1 and (window.held is not None or not trajectory_serves_all(how, models.noise_path)):
        found = [noise_moments((moment,), models, recipe, tally, preemption) for moment in moments]
        return [x_t for (x_t,), _ in found], sum(spent for _, spent in found)

    shares = is_fast(models.unet(how.model))

    def eps_with(conditioning: Conditioning) -> Predict:
        def eps(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            if preemption is not None:
                preemption.check()
            return models.predict(how.model, x, time, conditioning.arguments(rows, shares))

        return eps

    schedule_of = partial(
        inversion_schedule,
        models.noise_path,
        steps=how.steps,
        grid=how.grid,
        evaluate_at=how.evaluate_at,
        eta=how.eta,
    )
    each = len(moments)
    t = torch.stack([moment.t for moment in moments], 1).repeat_interleave(shape[1], 0).flatten()  # (N * S * each,)
    width = min(how.batch, len(flat)) if wants_fixed_batch(models.unet(how.model)) else None
    with models.inverting(how.model, how.fp8):
        if window.held is not None:
            eps = eps_with(window.conditional if how.guidance == 1.0 else window.unconditional)
            x_t, spent = window.held.noise(eps, flat, t, schedule_of, how.batch, width)
            return [x_t.unflatten(0, shape[:2])], spent
        trajectory = schedule_of(t)
        if tally is not None:
            tally.add("slot_utilisation", occupancy(trajectory.evaluations.view(-1, each).amax(1), how.batch))
        x_t, spent = invert(
            eps_with(window.unconditional),
            flat,
            trajectory,
            batch=how.batch,
            width=width,
            conditional=eps_with(window.conditional),
            guidance=how.guidance,
            noise_keys=[keyed_rng.hash_key("eta", *key) for key in window.keys],
            estimator=how.estimator,
            refinements=how.refinements,
            each=each,
        )
    return list(x_t.view(*shape[:2], each, *shape[2:]).unbind(2)), spent


def _noised(moment: StepBatch, flat: torch.Tensor) -> torch.Tensor:
    """Diffusion-DPO: the same noise for both sides of a pair."""
    number = (moment.number,) if moment.number else ()  # of the further timesteps; the first's keys never had one
    noise = keyed_rng.normals(flat.shape[1:], [("noise", *key[:2], *number) for key in moment.keys])
    return noised(flat, to_device(noise, flat.device), moment.a.flatten(), moment.s.flatten())


def train_step(
    window: StepBatch | None,
    models: Models,
    recipe: StepConfig,
    pairs_per_step: int,
    clip: float,
    loss_scale: float = 1.0,
    preemption: Preemption | None = None,
    step: int = 0,
) -> tuple[MetricAccumulator, torch.Tensor]:
    """Leaves the clipped mean gradient over the step's usable pairs (of all processes) in the masters' `.grad`.

    loss_scale: what the gradient is multiplied with on its way through fp16; divided out again at the end.
    TooLarge when a batch does not fit: lower what it names and call again, with the same result.
    preemption: is asked between two batches; Preempted on all processes where one of them was asked to stop.
    window: None when this rank has no usable pair. Returns the metrics, summed over processes, and the logits
    of this rank's pairs (N,), still on the device (for `sft`, minus the winner's error).
    """
    weights = models.weights
    weights.zero()
    tally = MetricAccumulator(models.device)
    preemption, stopped = preemption or Preemption(), None
    logits = torch.zeros(0, device=models.device)
    try:
        if window is None and method_of(recipe.method).reference_point:
            reference_point([], models.device)  # the other processes wait for everybody's part
        if window is not None:
            logits = _own_gradients(window, models, recipe, tally, loss_scale / pairs_per_step, preemption)
    except Preempted as asked:
        stopped = asked.by
    preemption.agree(step, stopped)
    tally.reduce()
    gradients = weights.reduce()
    usable = tally.count("loss")
    torch._foreach_mul_(gradients, pairs_per_step / loss_scale / usable.clamp_min(1))  # the mean over usable pairs
    tally.put("grad_norm", weights.clip(clip))
    return tally, logits


def _own_gradients(
    window: StepBatch,
    models: Models,
    recipe: StepConfig,
    tally: MetricAccumulator,
    weight: float,
    preemption: Preemption,
) -> torch.Tensor:
    """Adds the gradient of this process's pairs up; their logits (N,), the mean over their timesteps."""
    with fits("inversion.batch", recipe.inversion.batch), phase("invert"):
        x_t, spent = noise_moments(window.moments, models, recipe, tally, preemption)
    tally.add("unet_evaluations", spent, total=True)
    if window.held is not None:
        tally.add("trajectories_hit", window.held.hits.to(models.device))
    if method_of(recipe.method).reference_point and window.point is None:
        window.point = _first_pass(window, x_t, models, recipe, tally)
    if window.point is not None:
        tally.add("reference_point", window.point)
    logits = []
    for moment, own in zip(window.moments, x_t, strict=True):
        found = []
        for pairs in _micro_batches(moment, recipe):
            preemption.check()
            with fits("train.micro_batch", min(recipe.micro_batch, len(window.items))):
                prediction, objective = micro_step(moment, own, pairs, models, recipe, tally, weight, window.point)
                with phase("backward"):
                    prediction.backward(objective.dpred)
            found.append(objective.logit)
        logits.append(torch.cat(found))
    return torch.stack(logits).mean(0)


def _micro_batches(window: StepBatch, recipe: StepConfig) -> Iterator[slice]:
    pairs = len(window.items)
    for lo in range(0, pairs, recipe.micro_batch):
        yield slice(lo, min(lo + recipe.micro_batch, pairs))


def _first_pass(
    window: StepBatch, x_t: Sequence[torch.Tensor], models: Models, recipe: StepConfig, tally: MetricAccumulator
) -> torch.Tensor:
    """kto's reference point of the step. It takes the errors of all images before the first gradient: one more forward
    pass of policy and reference, for which the result depends neither on the micro-batch nor on the processes.

    Nothing stops on the way, as other processes wait for this one's part.
    """
    plain, gains = replace(recipe, method="dpo"), []  # the fused kernel, for its errors
    for moment, own in zip(window.moments, x_t, strict=True):
        for pairs in _micro_batches(moment, recipe):
            with torch.no_grad(), fits("train.micro_batch", min(recipe.micro_batch, len(window.items))):
                _, found = micro_step(moment, own, pairs, models, plain, MetricAccumulator(models.device))
            e, r = found.image[:, COLUMNS.index("error")], found.image[:, COLUMNS.index("reference_error")]
            gains.append(((r - e).view(2, -1), window.weight[pairs]))
            tally.add("unet_evaluations", 2 * len(e), total=True)
    return reference_point(gains, models.device)


def micro_step(
    window: StepBatch,
    x_t: torch.Tensor,
    pairs: slice,
    models: Models,
    recipe: StepConfig,
    tally: MetricAccumulator,
    weight: float = 1.0,
    point: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Objective]:
    """The policy's prediction, with its graph, for some pairs of the window, and the objective at it.

    weight: of each pair's loss in the gradient, times the pair's own. point: kto's. Metrics go into the tally.
    """
    sides = window.x_0.shape[1]
    images = torch.arange(len(window.items) * sides, device=models.device).view(-1, sides)
    # winners first, losers second; slices, as an index from the host would have to wait for the device
    images, x_0, x_t, time, a_t, s_t = (
        v[pairs].transpose(0, 1).flatten(0, 1) for v in (images, window.x_0, x_t, window.times, window.a, window.s)
    )
    amplitude = None
    norm = recipe.objective.tau_norm
    if norm != "none" and uses_inversion(recipe):
        tau = target(x_t, x_0, a_t, s_t)
        amplitude = rms(tau)
        x_t = noised(x_0, normalise(tau, x_0 if norm == "orthogonal" else None), a_t, s_t)

    arguments = window.conditional.arguments(images)
    with torch.no_grad(), phase("reference"):
        if recipe.inversion.frozen:
            numbers = torch.arange(len(window.items) * sides).view(-1, sides)[pairs].T.flatten()  # images, on the CPU
            answer, asked = window.held.reference(
                numbers,
                lambda part: models.predict(
                    "reference", x_t[part], time[part], window.conditional.arguments(images[part])
                ),
            )
        else:
            answer, asked = models.predict("reference", x_t, time, arguments), len(images)
        reference = models.noise_path.noise_from_output(answer, x_t, a_t, s_t)
    with phase("forward"):
        prediction = models.noise_path.noise_from_output(models.predict("policy", x_t, time, arguments), x_t, a_t, s_t)

    found = obj.evaluate(
        recipe.method,
        recipe.objective,
        prediction,
        reference,
        x_t,
        x_0,
        a_t,
        s_t,
        weight * window.weight[pairs],
        window.label[pairs],
        fused=recipe.fused_loss,
        point=point,
    )
    if recipe.objective.winner_preserving is not None and sides == 2:
        tally.add("loser_gate", found.gate)
    tally.observe(
        loss=found.loss,
        logit=found.logit,
        image=found.image,
        tau_rms=found.image[:, COLUMNS.index("tau_square")].sqrt() if amplitude is None else amplitude,
        bucket=to_device(models.noise_path.part(window.t[pairs], BUCKETS), models.device),
        sides=sides,
        contrast=sides == 2,
    )
    tally.add("unet_evaluations", asked + len(images), total=True)  # reference and policy, forward
    return prediction, found
