"""One optimizer step: invert -> reference -> policy -> loss -> backward -> update. The page of the method.

What it works on, a batch of pairs, and everything random is made in step_batch.py; x_t in noisy_latents.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from inpo_kernels.inpo_loss import COLUMNS, Objective

from inpo_fast.method import objectives as obj
from inpo_fast.method.losses import normalise, rms
from inpo_fast.method.methods import method_of
from inpo_fast.method.noise_path import noised, target
from inpo_fast.method.reference_point import reference_point
from inpo_fast.models.models import Models
from inpo_fast.runtime.memory import fits
from inpo_fast.runtime.phases import phase
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.runtime.transfer import to_device
from inpo_fast.training.metrics import BUCKETS, MetricAccumulator
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step_batch import StepBatch, StepConfig, uses_inversion


def train_step(
    batch: StepBatch | None,
    models: Models,
    config: StepConfig,
    pairs_per_step: int,
    clip: float,
    loss_scale: float = 1.0,
    preemption: Preemption | None = None,
    step: int = 0,
) -> tuple[MetricAccumulator, torch.Tensor]:
    """Leaves the clipped mean gradient over the step's usable pairs (of all processes) in the masters' `.grad`.

    batch: None when this rank has no usable pair.
    loss_scale: what the gradient is multiplied with on its way through fp16; divided out again at the end.
    TooLarge when a batch does not fit: lower what it names and call again, with the same result.
    preemption: is asked between two batches; Preempted on all processes where one of them was asked to stop.
    Returns the metrics, summed over processes, and the logits of this rank's pairs (N,), still on the device (for
    `sft`, minus the winner's error).
    """
    weights = models.weights
    weights.zero()
    metrics = MetricAccumulator(models.device)
    preemption, stopped = preemption or Preemption(), None
    logits = torch.zeros(0, device=models.device)
    try:
        x_t = None if batch is None else _noisy_latents(batch, models, config, metrics, preemption)
        point = _reference_point(batch, x_t, models, config, metrics)
        if batch is not None:
            logits = _add_gradients(batch, x_t, point, models, config, metrics, loss_scale / pairs_per_step, preemption)
    except Preempted as asked:
        stopped = asked.by
    preemption.agree(step, stopped)
    metrics.reduce()
    gradients = weights.reduce()
    usable = metrics.count("loss")
    torch._foreach_mul_(gradients, pairs_per_step / loss_scale / usable.clamp_min(1))  # the mean over usable pairs
    metrics.put("grad_norm", weights.clip(clip))
    return metrics, logits


def _noisy_latents(
    batch: StepBatch, models: Models, config: StepConfig, metrics: MetricAccumulator, preemption: Preemption
) -> torch.Tensor:
    with phase("invert"):
        x_t, evaluations = noisy_latents(batch, models, config, metrics, preemption)
    metrics.add("unet_evaluations", evaluations, total=True)
    if batch.cached is not None:
        metrics.add("trajectories_hit", batch.cached.hits.to(models.device))
    return x_t


def _reference_point(
    batch: StepBatch | None,
    x_t: torch.Tensor | None,
    models: Models,
    config: StepConfig,
    metrics: MetricAccumulator,
) -> torch.Tensor | None:
    """What kto needs of the whole step before the first gradient; None for the other methods. All processes call it.

    It takes the errors of all images: one more forward pass of policy and reference, for which the result depends
    neither on the micro-batch nor on the processes. Nothing stops on the way, as the others wait for this one's part.
    """
    if not method_of(config.method).reference_point:
        return None
    if batch is None:
        return reference_point([], models.device)
    if batch.reference_point is None:  # else: the step is repeated with smaller batches
        for_errors, gains = replace(config, method="dpo"), []  # the fused kernel
        for k, pairs in micro_batches(batch, config):
            with torch.no_grad(), fits("train.micro_batch", min(config.micro_batch, len(batch.items))):
                image = micro_step(batch, x_t, k, pairs, models, for_errors).objective.image
            e, r = image[:, COLUMNS.index("error")], image[:, COLUMNS.index("reference_error")]
            gains.append(((r - e).view(2, -1), batch.weight[pairs]))
            metrics.add("unet_evaluations", 2 * len(e), total=True)
        batch.reference_point = reference_point(gains, models.device)
    metrics.add("reference_point", batch.reference_point)
    return batch.reference_point


def _add_gradients(
    batch: StepBatch,
    x_t: torch.Tensor,
    point: torch.Tensor | None,
    models: Models,
    config: StepConfig,
    metrics: MetricAccumulator,
    weight: float,
    preemption: Preemption,
) -> torch.Tensor:
    """Adds the gradient of this process's pairs up; their logits (N,), the mean over their timesteps."""
    logits = []
    for k, pairs in micro_batches(batch, config):
        preemption.check()
        with fits("train.micro_batch", min(config.micro_batch, len(batch.items))):
            found = micro_step(batch, x_t, k, pairs, models, config, weight, point)
            add_metrics(metrics, found, config)
            with phase("backward"):
                found.prediction.backward(found.objective.dpred)
        logits.append(found.objective.logit)
    return torch.cat(logits).view(batch.t.shape).mean(0)


def micro_batches(batch: StepBatch, config: StepConfig) -> Iterator[tuple[int, slice]]:
    """Timestep by timestep: which of the K, and a slice of the pairs."""
    pairs = len(batch.items)
    for k in range(len(batch.t)):
        for lo in range(0, pairs, config.micro_batch):
            yield k, slice(lo, min(lo + config.micro_batch, pairs))


@dataclass(frozen=True)
class MicroStep:
    """B pairs at one timestep each. prediction: the policy's (S B, C, H, W), winners first, with its graph, in whose
    space objective.dpred is: noise, or v with objective.error_space. tau_rms: (S B,), before objective.tau_norm.
    bucket: (B,), of the timesteps. evaluations: of images, by reference and policy.
    """

    prediction: torch.Tensor
    objective: Objective
    tau_rms: torch.Tensor
    bucket: torch.Tensor
    sides: int
    evaluations: int


def micro_step(
    batch: StepBatch,
    x_t: torch.Tensor,
    k: int,
    pairs: slice,
    models: Models,
    config: StepConfig,
    weight: float = 1.0,
    point: torch.Tensor | None = None,
) -> MicroStep:
    """The policy's prediction for some pairs of the batch at their timestep k, and the objective at it.

    x_t: (K, N, S, C, H, W). weight: of each pair's loss in the gradient, times the pair's own. point: kto's.
    """
    sides = batch.x_0.shape[1]
    images = torch.arange(len(batch.items) * sides, device=models.device).view(-1, sides)
    # winners first, losers second; slices, as an index from the host would have to wait for the device
    images, x_0, x_t, time, a_t, s_t = (
        v[pairs].transpose(0, 1).flatten(0, 1)
        for v in (images, batch.x_0, x_t[k], batch.times[k], batch.a[k], batch.s[k])
    )
    amplitude = None
    norm = config.objective.tau_norm
    if norm != "none" and uses_inversion(config):
        tau = target(x_t, x_0, a_t, s_t)
        amplitude = rms(tau)
        x_t = noised(x_0, normalise(tau, x_0 if norm == "orthogonal" else None), a_t, s_t)

    as_noise = partial(models.noise_path.noise_from_output, x=x_t, a=a_t, s=s_t)
    velocity = config.objective.error_space == "velocity"
    in_space = (lambda output: output) if velocity else as_noise
    arguments = batch.conditional.arguments(images)
    with torch.no_grad(), phase("reference"):
        if batch.cached is None:
            output, predicted = models.predict("reference", x_t, time, arguments), len(images)
        else:
            numbers = torch.arange(len(batch.items) * sides).view(-1, sides)[pairs].T.flatten()  # images, on the CPU
            output, predicted = batch.cached.reference(
                numbers,
                lambda part: models.predict(
                    "reference", x_t[part], time[part], batch.conditional.arguments(images[part])
                ),
            )
    with phase("forward"):
        policy_output = models.predict("policy", x_t, time, arguments)
        prediction = in_space(policy_output)
    if batch.cached is not None:  # lies as the cache has it, and sums over an image are rounded in the order of memory
        alike = torch.empty_strided(
            policy_output.shape, policy_output.stride(), dtype=output.dtype, device=output.device
        )
        output = alike.copy_(output)
    with torch.no_grad():
        reference = in_space(output)

    objective = obj.evaluate(
        config.method,
        config.objective,
        prediction,
        reference,
        x_t,
        x_0,
        a_t,
        s_t,
        weight * batch.weight[pairs],
        batch.label[pairs],
        fused=config.fused_loss,
        point=point,
    )
    if velocity:  # what is observed of the noise stays that of the noise
        with torch.no_grad():
            means = obj.noise_means(as_noise(prediction), as_noise(reference), x_t, x_0, a_t, s_t)
        image = torch.cat([objective.image[:, :2], means, objective.image[:, 6:]], 1)
        objective = objective._replace(image=image)
    if amplitude is None:
        amplitude = objective.image[:, COLUMNS.index("tau_square")].sqrt()
    return MicroStep(
        prediction=prediction,
        objective=objective,
        tau_rms=amplitude,
        bucket=to_device(models.noise_path.part(batch.t[k, pairs], BUCKETS), models.device),
        sides=sides,
        evaluations=predicted + len(images),
    )


def add_metrics(metrics: MetricAccumulator, found: MicroStep, config: StepConfig) -> None:
    objective = found.objective
    if config.objective.winner_preserving is not None and found.sides == 2:
        metrics.add("loser_gate", objective.gate)
    metrics.add_micro_batch(
        loss=objective.loss,
        logit=objective.logit,
        image=objective.image,
        tau_rms=found.tau_rms,
        bucket=found.bucket,
        sides=found.sides,
        contrast=found.sides == 2,
    )
    metrics.add("unet_evaluations", found.evaluations, total=True)  # of reference and policy, forward
