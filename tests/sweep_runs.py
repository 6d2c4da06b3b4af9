"""Runs of a few steps with inversion.cache or without it, and what they computed."""

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from tiny_world import one_level, save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.caches.trajectory_cache import TrajectoryCache, open_trajectory_cache
from inpo_fast.config.run import OptimConfig
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.training.optim import make_optimizer
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

HOW = InversionConfig(steps=3, model="reference", batch=1)
FROZEN = replace(HOW, frozen=True, batch=64)
DATA = DataConfig(vae_sample=False, vae_batch=8)  # what fits is not counted for each model anew
OBJECTIVE = ObjectiveConfig(beta=500.0)
PAIRS, STEPS = 4, 2
STEP = 2 * 2 * PAIRS  # evaluations of a step without inversion: reference and policy, two images a pair


def save_world(folder: Path) -> Path:
    """Both kinds of model and seven pairs."""
    for name, pipeline in (("sd", tiny_pipeline()), ("xl", tiny_xl())):
        one_level(pipeline).save_pretrained(folder / name)
    save_pairs(folder / "pairs.parquet", rows=8)
    return folder


@lru_cache
def _opened(settings: ModelsConfig):
    pipeline = open_pipeline(settings)
    return pipeline, pipeline.unet


def models_of(world, base: str = "sd", precision: str = "fp32", rank: int = 0, fast: str = "off") -> Models:
    """With a copy of the UNet of their own in a pipeline that is opened once: nothing else of it is trained."""
    settings = ModelsConfig(base=str(world / base), precision=precision, lora=LoraSettings(rank))
    pipeline, unet = _opened(settings)
    pipeline.unet = copy.deepcopy(unet)
    torch.manual_seed(0)  # an adapter starts from random numbers
    return Models(pipeline, torch.device("cpu"), replace(settings, fast=fast))


def loader(world, seed: int, data: DataConfig, first: int, last: int):
    source = open_source(str(world / "pairs.parquet"))
    return PairLoader(source, data, resolution=32, seed=seed, rank=0, world=1).steps(first, last, PAIRS)


def recipe_of(models, cache, how=HOW, objective=OBJECTIVE, data=DATA, seed=0, micro_batch=2) -> StepConfig:
    """cache: a folder or None."""
    how = replace(how, cache=None if cache is None else str(cache))
    trajectories = open_trajectory_cache(models, how, objective, data)
    if trajectories is not None:
        trajectories.store.start()
    return StepConfig(
        method="inpo",
        objective=objective,
        inversion=how,
        micro_batch=micro_batch,
        vae_sample=data.vae_sample,
        vae_batch=data.vae_batch,
        seed=seed,
        trajectory_cache=trajectories,
    )


@dataclass
class Outcome:
    weights: list[torch.Tensor]
    values: list[dict[str, float]]  # of each step
    logits: list[torch.Tensor]
    cache: TrajectoryCache | None

    def each(self, name: str) -> list[float]:
        return [values[name] for values in self.values]


def run(
    world, cache=None, *, steps=STEPS, first=0, lr=1e-3, base="sd", precision="fp32", rank=0, fast="off", **options
) -> Outcome:
    """What inpo_fast.train does from step `first` on."""
    models = models_of(world, base, precision, rank, fast)
    step_config = recipe_of(models, cache, **options)
    optimizer = make_optimizer(models.parameters(), OptimConfig(lr=lr))
    values, logits = [], []
    for items in loader(world, step_config.seed, options.get("data", DATA), first, first + steps):
        step_batch = make_step_batch(items, models, step_config, models.encode_empty())
        accumulator, own = train_step(step_batch, models, step_config, PAIRS, 1.0)
        optimizer.step()
        models.weights.refresh()
        values.append(accumulator.values())
        logits.append(own)
    return Outcome([w.detach().clone() for w in models.weights.masters], values, logits, step_config.trajectory_cache)


def same(one: Outcome, two: Outcome) -> bool:
    """Weights and every metric but the cost, to the last bit."""
    cost = ("unet_evaluations", "trajectories_hit", "slot_utilisation")
    metrics = [[{k: v for k, v in values.items() if k not in cost} for values in o.values] for o in (one, two)]
    return all(torch.equal(a, b) for a, b in zip(one.weights, two.weights, strict=True)) and metrics[0] == metrics[1]
