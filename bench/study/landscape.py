"""The training loss along two lines through the base's weights, and how far minibatch gradients agree at the base.

A point of a line is theta_0 + alpha d. There the policy has these weights and inverts with them, as in training, and
the reference keeps theta_0; the loss is the trainer's own, of one window of pairs at fixed timesteps, the same at every
point and in every cell: the pairs that follow those that d was trained on.

    update    d = theta - theta_0 of a run of the cell's own settings, but with inversion.guidance=0: the same d in
              cells that differ by the guidance alone
    random    Gaussian noise with the update's norms: each filter of a tensor (all that belongs to one output channel or
              feature) is scaled to the norm of the update's filter, a vector (bias, scale of a norm) as a whole. In the
              manner of Li et al. (arXiv 1712.09913), who take the norms of theta instead

Unlike the training's gradient, the loss along a line also has what x_t does when the weights move.
"""

import json
import math
import tempfile
import time

import torch

from bench.results import provenance
from bench.study.cells import Cell, Study, config_of, settings_of
from bench.study.train import trained
from inpo_fast.config import RunConfig
from inpo_fast.data.loader import Item, PairLoader, open_data
from inpo_fast.models.loading import open_pipeline, quiet_libraries
from inpo_fast.models.models import Models, Text
from inpo_fast.runtime import keyed_rng
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import micro_step, train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

ALPHAS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
PAIRS = 64  # of the window that the loss is the mean of
BATCHES, BATCH = 16, 16  # minibatches whose gradients are compared, pairs of each; none has a pair of another


def run_cell(study: Study, cell: Cell, seed: int) -> dict:
    """losses: of each direction (alphas, pairs); cosines: (BATCHES, BATCHES) between minibatch gradients."""
    quiet_libraries()
    torch.set_num_threads(1)
    config, begun = config_of(study, cell, seed), time.perf_counter()
    models = Models(open_pipeline(config.models), torch.device("cpu"), config.models)
    step_config, empty = StepConfig.of(config), models.encode_empty()
    first = config.train.steps * config.train.pairs_per_step
    items = load(config, models, first, PAIRS + BATCHES * BATCH)
    names, start = models.weights.names, [master.detach().clone() for master in models.weights.masters]
    update = update_of(study, cell, seed, dict(zip(names, start, strict=True)))
    directions = {"update": update, "random": random_like(update, seed)}
    losses = {
        name: loss_along(items[:PAIRS], [d[n] for n in names], start, models, step_config, empty)
        for name, d in directions.items()
    }
    move(models, start, start, 0.0)
    batches = [items[PAIRS + b * BATCH : PAIRS + (b + 1) * BATCH] for b in range(BATCHES)]
    return {
        "settings": settings_of(config),
        "seed": seed,
        "alphas": list(ALPHAS),
        "losses": {name: values.tolist() for name, values in losses.items()},
        "cosines": cosines(batches, models, step_config, empty).tolist(),
        "norm": math.sqrt(sum(d.square().sum().item() for d in update.values())),
        "seconds": time.perf_counter() - begun,
        **provenance(),
    }


def load(config: RunConfig, models: Models, first: int, count: int) -> list[Item]:
    """The pairs at `count` positions of the training's own order."""
    resolution = config.data.resolution or models.resolution
    loader = PairLoader(open_data(config.data), config.data, resolution=resolution, seed=config.seed, rank=0, world=1)
    return [loader.load(position) for position in range(first, first + count)]


Direction = dict[str, torch.Tensor]
_updates: dict[str, Direction] = {}  # of this process


def update_of(study: Study, cell: Cell, seed: int, start: Direction) -> Direction:
    """What the run without guidance adds to the weights it starts from."""
    plain = Cell(cell.name, tuple((dict(cell.settings) | {"inversion.guidance": "0"}).items()))
    key = json.dumps([settings_of(config_of(study, plain, seed)), seed], sort_keys=True)
    if key not in _updates:
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            unet = trained(config_of(study, plain, seed, f"{folder}/run")).unet
        _updates[key] = {name: p.detach() - start[name] for name, p in unet.named_parameters()}
    return _updates[key]


def random_like(update: Direction, seed: int) -> Direction:
    """Gaussian noise, each filter of which has the norm of the update's filter."""
    out = {}
    for name, u in update.items():
        noise = keyed_rng.normal(u.shape, "landscape", seed, name)
        rows = (len(u), -1) if u.ndim > 1 else (1, -1)
        wanted, own = u.reshape(rows).norm(dim=1, keepdim=True), noise.reshape(rows).norm(dim=1, keepdim=True)
        out[name] = (noise.reshape(rows) * (wanted / own)).reshape(u.shape)
    return out


@torch.no_grad()
def move(models: Models, start: list[torch.Tensor], direction: list[torch.Tensor], alpha: float) -> None:
    """The policy goes to start + alpha direction."""
    for master, zero, d in zip(models.weights.masters, start, direction, strict=True):
        master.copy_(zero + alpha * d)
    models.weights.refresh()


@torch.no_grad()
def loss_along(
    items: list[Item],
    direction: list[torch.Tensor],
    start: list[torch.Tensor],
    models: Models,
    step_config: StepConfig,
    empty: Text,
) -> torch.Tensor:
    """(len(ALPHAS), pairs): what a training step would report of each pair."""
    step_batch, rows = make_step_batch(items, models, step_config, empty), []
    for alpha in ALPHAS:
        move(models, start, direction, alpha)
        x_t, _ = noisy_latents(step_batch, models, step_config)
        parts = [
            slice(lo, min(lo + step_config.micro_batch, len(items)))
            for lo in range(0, len(items), step_config.micro_batch)
        ]
        found = [micro_step(step_batch, x_t, 0, pairs, models, step_config).objective.loss for pairs in parts]
        rows.append(torch.cat(found))
    return torch.stack(rows)


def cosines(batches: list[list[Item]], models: Models, step_config: StepConfig, empty: Text) -> torch.Tensor:
    """(B, B) between the whole gradients of the batches' mean losses, unclipped, at the policy's weights."""
    rows = []
    for items in batches:
        step_batch = make_step_batch(items, models, step_config, empty)
        train_step(step_batch, models, step_config, len(items), math.inf)
        gradient = torch.cat([g.flatten() for g in models.weights.gradients])
        rows.append(gradient / gradient.norm())
    unit = torch.stack(rows)
    return unit @ unit.T
