"""x_0 -> x_t of all images of a step at all their timesteps: Gaussian noise, inversion, or inversions on disk."""

from functools import partial

import torch

from inpo_fast.method.config import InversionConfig
from inpo_fast.method.inversion import Predict, check_inversion, invert, occupancy, trajectory_serves_all
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.method.noise_path import noised
from inpo_fast.models.denoiser import Conditioning
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.memory import fits
from inpo_fast.runtime.preemption import Preemption
from inpo_fast.runtime.transfer import to_device
from inpo_fast.training.metrics import MetricAccumulator
from inpo_fast.training.step_batch import StepBatch, StepConfig, uses_inversion


@torch.no_grad()
def noisy_latents(
    batch: StepBatch,
    models: Models,
    config: StepConfig,
    metrics: MetricAccumulator | None = None,
    preemption: Preemption | None = None,
) -> tuple[torch.Tensor, int]:
    """x_t of every image at each of its timesteps, (K, N, S, C, H, W) in fp32, and the UNet evaluations of images.

    TooLarge where inversion.batch of them do not fit."""
    if not uses_inversion(config):
        return gaussian_latents(batch), 0
    check_inversion(config.inversion, models.noise_path)
    size = min(config.inversion.batch, len(batch.eta_keys))
    with fits("inversion.batch", size), models.inverting(config.inversion.model, config.inversion.fp8):
        if batch.cached is not None:
            return cached_latents(batch, models, config.inversion, preemption)
        return inverted_latents(batch, models, config.inversion, metrics, preemption)


def gaussian_latents(batch: StepBatch) -> torch.Tensor:
    """Diffusion-DPO's: the same noise for both sides of a pair."""
    flat, sides, found = batch.x_0.flatten(0, 1), batch.x_0.shape[1], []
    for keys, a, s in zip(batch.gaussian_keys, batch.a, batch.s, strict=True):
        noise = keyed_rng.normals(flat.shape[1:], keys).repeat_interleave(sides, 0)
        found.append(noised(flat, to_device(noise, flat.device), a.flatten(), s.flatten()))
    return torch.stack(found).unflatten(1, batch.x_0.shape[:2])


def inverted_latents(
    batch: StepBatch,
    models: Models,
    how: InversionConfig,
    metrics: MetricAccumulator | None = None,
    preemption: Preemption | None = None,
) -> tuple[torch.Tensor, int]:
    """By the inversion (Eq. 14-16): one trajectory for all timesteps of an image where that can be, else one each."""
    shape, schedule_of = batch.x_0.shape, _schedule_of(models, how)
    found, evaluations = [], 0
    for t in [batch.t] if trajectory_serves_all(how, models.noise_path) else batch.t.split(1):
        each = len(t)
        trajectory = schedule_of(t.T.repeat_interleave(shape[1], 0).flatten())  # (N * S * each,)
        if metrics is not None:
            steps = trajectory.evaluations.view(-1, each).amax(1)
            metrics.add("slot_utilisation", occupancy(steps, how.batch))
        x_t, spent = invert(
            _predictor(batch.unconditional, models, how, preemption),
            batch.x_0.flatten(0, 1),
            trajectory,
            batch=how.batch,
            width=_width(batch, models, how),
            conditional=_predictor(batch.conditional, models, how, preemption),
            guidance=how.guidance,
            noise_keys=batch.eta_keys,
            estimator=how.estimator,
            refinements=how.refinements,
            each=each,
        )
        found.append(x_t.view(*shape[:2], each, *shape[2:]).movedim(2, 0))
        evaluations += spent
    return torch.cat(found), evaluations


def cached_latents(
    batch: StepBatch, models: Models, how: InversionConfig, preemption: Preemption | None = None
) -> tuple[torch.Tensor, int]:
    """From inversion.cache; what is not there is inverted and written."""
    eps = _predictor(batch.conditional if how.guidance == 1.0 else batch.unconditional, models, how, preemption)
    shape, schedule_of, width = batch.x_0.shape, _schedule_of(models, how), _width(batch, models, how)
    found, evaluations = [], 0
    for t in batch.t:
        t = t.repeat_interleave(shape[1])
        x_t, spent = batch.cached.x_t(eps, batch.x_0.flatten(0, 1), t, schedule_of, how.batch, width)
        found.append(x_t.unflatten(0, shape[:2]))
        evaluations += spent
    return torch.stack(found), evaluations


def _schedule_of(models: Models, how: InversionConfig):
    """The inversion schedule as a function of t."""
    return partial(
        inversion_schedule,
        models.noise_path,
        steps=how.steps,
        grid=how.grid,
        evaluate_at=how.evaluate_at,
        eta=how.eta,
        refine_at=how.refine_at,
    )


def _predictor(
    conditioning: Conditioning, models: Models, how: InversionConfig, preemption: Preemption | None
) -> Predict:
    """The model that inverts, with a conditioning of the batch's images."""
    shares = models.denoiser.shares_text(models.network(how.model))

    def eps(x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if preemption is not None:
            preemption.check()
        return models.predict(how.model, x, time, conditioning.arguments(rows, shares))

    return eps


def _width(batch: StepBatch, models: Models, how: InversionConfig) -> int | None:
    """The size of every UNet call where it has to be one."""
    images = batch.slots or len(batch.eta_keys)
    return min(how.batch, images) if models.denoiser.wants_fixed_batch(models.network(how.model)) else None
