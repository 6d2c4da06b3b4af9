"""How well an inversion is undone by sampling: no training, the base model, images of the preference pairs.

x_0 is inverted to x_t, then sampled back by DDIM with the same (empty) prompt: down the levels of a much finer grid, so
that the error is the inversion's own, whatever levels it took. Grids that do not land on t are conditioned on t all
the same, as the loss is.
"""

import time

import numpy as np
import torch

from bench.results import provenance
from bench.study.cells import Cell, Study, config_of, settings_of
from inpo_fast.data.loader import PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.inversion import invert
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.method.losses import rms
from inpo_fast.method.noise_path import NoisePath, per_image, target
from inpo_fast.models.loading import open_pipeline, quiet_libraries
from inpo_fast.models.models import Models
from inpo_fast.training.step_batch import StepConfig, make_step_batch

TIMES, PAIRS, FINE = (100, 300, 500, 700, 900), 6, 40


def run_cell(study: Study, cell: Cell, seed: int) -> dict:
    """points: rms(sampled - x_0) / rms(x_0) of each image, mean over TIMES; by_t: of each t, over images; tau_rms."""
    quiet_libraries()
    torch.set_num_threads(1)
    config, begun = config_of(study, cell, seed), time.perf_counter()
    how, device = config.inversion, torch.device("cpu")
    models = Models(open_pipeline(config.models), device, config.models)
    loader = PairLoader(
        open_source(config.data.source), config.data, resolution=models.resolution, seed=config.seed, rank=0, world=1
    )
    step_config = StepConfig(
        method="dpo",
        objective=ObjectiveConfig(),
        inversion=InversionConfig(),
        micro_batch=PAIRS,
        vae_sample=False,
        seed=config.seed,
    )
    step_batch = make_step_batch(next(loader.steps(0, 1, PAIRS)), models, step_config, models.encode_empty())
    x_0, spent, errors, sizes = step_batch.x_0.flatten(0, 1), 0, {}, {}

    def eps(x, time, rows):
        return models.predict("reference", x, time, step_batch.unconditional.arguments(rows))

    path, grid = models.noise_path, {"steps": how.steps, "grid": how.grid, "evaluate_at": how.evaluate_at}
    for t in TIMES:
        there = torch.full((len(x_0),), t)
        there = path.snap(there, how.steps) if how.grid == "snap" else there
        trajectory = inversion_schedule(path, there, eta=how.eta, **grid)
        x_t, evaluations = invert(eps, x_0, trajectory, batch=64, estimator=how.estimator, refinements=how.refinements)
        spent += evaluations
        a, s = path.a_s(there)
        sizes[t] = rms(target(x_t, x_0, a, s)).mean().item()
        errors[t] = (rms(sample(eps, x_t, there, path) - x_0) / rms(x_0)).numpy()
    return {
        "settings": settings_of(config),
        "seed": seed,
        "points": np.mean(list(errors.values()), axis=0).tolist(),
        "by_t": {str(t): float(e.mean()) for t, e in errors.items()},
        "tau_rms": sizes,
        "evaluations_an_image": spent / len(x_0) / len(TIMES),
        "seconds": time.perf_counter() - begun,
        **provenance(),
    }


@torch.no_grad()
def sample(eps, x_t: torch.Tensor, t: torch.Tensor, path: NoisePath) -> torch.Tensor:
    """DDIM from level t (M,) to the clean image, FINE steps of the sample's own."""
    levels, x = inversion_schedule(path, t, steps=min(FINE, int(t.min()) + 1), grid="spread").levels, x_t
    rows = torch.arange(len(x))
    for k in range(levels.shape[1] - 1, 0, -1):
        a, s, down_a, down_s = map(per_image, (*path.a_s(levels[:, k]), *path.a_s(levels[:, k - 1])))
        noise = eps(x, path.network_time(levels[:, k]), rows)
        x = down_a * (x - s * noise) / a + down_s * noise
    return x
