"""How much noise the run's inversion leaves in x_t, against a fine inversion of the same images: once, on a few.

rms(tau) alone says nothing of it: along the exact path it is below 1 too, the more so the smoother a picture is.
"""

from dataclasses import replace

import torch

from inpo_fast.config import RunConfig
from inpo_fast.data.loader import Item
from inpo_fast.method.config import InversionConfig
from inpo_fast.method.inversion import evaluations_of
from inpo_fast.method.losses import rms
from inpo_fast.method.noise_path import NoisePath, target
from inpo_fast.method.solvers import evaluations_a_step
from inpo_fast.models.denoiser import Text
from inpo_fast.models.models import Models
from inpo_fast.runtime import distributed
from inpo_fast.runtime.memory import fits
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step_batch import StepConfig, make_step_batch, uses_inversion

SHARE = 0.01  # of a run's UNet evaluations that may be spent on it
IMAGES = 8  # of a process, at most
NAMES = ("noise_ratio", "noise_ratio_evaluations")


def fine_steps(config: RunConfig, step_config: StepConfig, models: Models) -> int:
    """n of the fine inversion, or 0: none was asked for, or x_t is made or rescaled without it."""
    wanted = uses_inversion(step_config) and config.objective.tau_norm == "none"
    return min(config.observe.fine_inversion, len(models.noise_path.all_levels(1))) if wanted else 0


def affordable_images(config: RunConfig, step_config: StepConfig, models: Models, world: int) -> int:
    """How many images of each process are inverted finely: an even number, two of a pair; 0 in a run too short."""
    fine, path = fine_steps(config, step_config, models), models.noise_path
    if not fine:
        return 0
    how, t = step_config.inversion, path.possible_timesteps(step_config.objective.timesteps)[:1]
    own, exact = (_evaluations(how, path, t), _evaluations(_fine(fine, how), path, t))
    images = 2 * config.train.pairs_per_step
    run = config.train.steps * images * (own + 2)  # and reference and policy
    each = own + exact
    if models.denoiser.wants_fixed_batch(models.network(how.model)):
        slots = min(how.batch, images // world)  # of every call, however few are looked at
        return min(IMAGES, slots) // 2 * 2 if SHARE * run >= world * slots * (fine + own) else 0
    return int(min(IMAGES, images // world, SHARE * run // (world * each))) // 2 * 2


@torch.no_grad()
def noise_ratio(
    items: list[Item], images: int, config: RunConfig, step_config: StepConfig, models: Models, empty: Text
) -> dict[str, float]:
    """NAMES: the mean of rms(tau) / rms(tau of the fine inversion) over images of all processes, and what it cost.

    items: of the first step on this process. images: `affordable_images`. Empty where nothing could be compared. All
    processes call it, before the first update; nothing of the run is touched.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=models.device)
    if items and images:
        how = replace(step_config.inversion, cache=None, frozen=False)
        once = replace(step_config.objective, timesteps=replace(step_config.objective.timesteps, per_pair=1))
        own = replace(step_config, inversion=how, objective=once, trajectory_cache=None)
        fine = replace(own, inversion=_fine(fine_steps(config, step_config, models), how))
        batch = make_step_batch(items[: images // 2], models, own, empty)
        batch.slots = len(items) * batch.x_0.shape[1]
        x_0, a, s = batch.x_0.flatten(0, 1), batch.a[0].flatten(), batch.s[0].flatten()
        sizes = []
        for each in (own, fine):
            with fits("inversion.batch", each.inversion.batch):
                x_t, spent = noisy_latents(batch, models, each)
            sizes.append(rms(target(x_t[0].flatten(0, 1), x_0, a, s)).double())
            sums[2] += spent
        ratio = sizes[0] / sizes[1]
        found = ratio.isfinite()
        sums[0] += ratio[found].sum()
        sums[1] += found.sum()
    distributed.sum_([sums])
    total, count, spent = sums.tolist()
    return dict(zip(NAMES, (total / count, spent), strict=True)) if count else {}


def _evaluations(how: InversionConfig, path: NoisePath, t: torch.Tensor) -> float:
    """Of an image's inversion to one of its possible timesteps t (1, L), on average."""
    both = 1 if how.guidance in (0.0, 1.0) else 2
    each = evaluations_a_step(how.estimator, how.refinements) * both
    return each * float(evaluations_of(how, path, t).double().mean())


def _fine(steps: int, like: InversionConfig) -> InversionConfig:
    """The exact path (Eq. 15) with so many levels, by the model and with the prompt of `like`."""
    return InversionConfig(steps=steps, model=like.model, guidance=like.guidance, batch=like.batch)
