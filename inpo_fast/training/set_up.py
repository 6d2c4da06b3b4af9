"""A run before its first step: everything is checked and opened, and the newest checkpoint put back."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from inpo_fast.caches.latent_cache import LatentCache, open_latent_cache
from inpo_fast.caches.trajectory_cache import TrajectoryCache, open_trajectory_cache
from inpo_fast.comparison.run_evaluation import open_inputs
from inpo_fast.config import RunConfig, split_batch, variant_of
from inpo_fast.data.loader import open_data
from inpo_fast.data.pair import Source
from inpo_fast.method.inversion import check_inversion
from inpo_fast.method.objectives import check_objective, objective_notes
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import replaced_run
from inpo_fast.training.checkpoint import Checkpoints
from inpo_fast.training.online import Online, open_online
from inpo_fast.training.optim import Average, LossScale, make_optimizer
from inpo_fast.training.run_folder import RunFolder
from inpo_fast.training.run_inputs import check_held_out, fingerprints
from inpo_fast.training.step_batch import StepConfig
from inpo_fast.training.validation import check_validation, open_held_out

log = logging.getLogger("inpo_fast")


@dataclass(kw_only=True)
class Run:
    """Everything that lives from the first step to the last."""

    config: RunConfig
    folder: RunFolder
    models: Models
    source: Source
    optimizer: torch.optim.Optimizer
    average: Average | None
    loss_scale: LossScale | None  # of fp16
    rank: int
    world: int
    checkpoints: Checkpoints
    online: Online | None = None
    trajectory_cache: TrajectoryCache | None = None
    latent_cache: LatentCache | None = None
    notes: tuple[str, ...] = ()  # to be said before the first step
    done: int = 0  # optimizer steps
    former_steps: tuple[int, ...] = ()  # what train.steps was before, of a run that got another length
    saved: int = -1  # of them, how many the newest checkpoint of this start has
    seconds: float = 0.0
    dropped: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        return variant_of(self.config)

    @property
    def resolution(self) -> int:
        return self.config.data.resolution or self.models.resolution

    @property
    def step_config(self) -> StepConfig:
        """As configured, with the sizes that fit."""
        caches = {"trajectory_cache": self.trajectory_cache, "latent_cache": self.latent_cache}
        return StepConfig.of(self.config, **caches).lowered(self.models.at_once.lowered)


def prepare(config: RunConfig, rank: int, world: int, device: torch.device) -> Run:
    """Checks and opens everything, cheap things first. Nothing is written before all of it has been accepted."""
    split_batch(config.train, world)
    folder = RunFolder(Path(config.output), config)
    if rank == 0:
        folder.check()
    source = open_data(config.data)
    if config.evaluate.prompts:
        open_inputs(config.evaluate, device)
    held_out = check_validation(config)
    if config.overwrite and rank == 0:
        for key, pairs in (("data.source", source), ("observe.held_out", held_out)):
            replaced_run.check_pictures(folder.path, key, pairs)
    online = open_online(config, device)
    models = _open_models(config, rank, world, device)
    trajectory_cache, notes = open_trajectory_cache(models, config.inversion, config.objective, config.data), []
    if trajectory_cache is not None:
        notes += trajectory_cache.notes(config.train.steps, config.train.pairs_per_step, len(source), world)
    latent_cache = open_latent_cache(
        models, config.data, source, config.data.resolution or models.resolution, config.seed
    )
    notes += objective_notes(config.objective, models.noise_path)
    if blocks := models.denoiser.compiled_blocks(models.policy):
        notes.append(f"models.fast=compiled: the first step compiles {blocks} kinds of blocks and takes longer")
    masters, averages = models.weights.masters, config.optim.average != "none"
    run = Run(
        config=config,
        folder=folder,
        models=models,
        source=source,
        optimizer=make_optimizer(models.parameters(), config.optim, config.seed),
        average=Average(masters, config.optim, config.train.steps) if averages else None,
        loss_scale=LossScale() if config.models.precision == "fp16" else None,
        rank=rank,
        world=world,
        checkpoints=_open_checkpoints(folder, config),
        online=online,
        trajectory_cache=trajectory_cache,
        latent_cache=latent_cache,
        notes=tuple(notes),
    )
    distributed.barrier()
    if config.resume:
        _load_checkpoint(run)
    _check_inputs(run)
    _start_folders(run)
    distributed.barrier()
    return run


def _open_models(config: RunConfig, rank: int, world: int, device: torch.device) -> Models:
    torch.manual_seed(config.seed)  # nothing depends on it; it pins what a library might draw
    partition = Zero1Partition(rank, world) if config.train.shard_states and world > 1 else None
    models = Models(open_pipeline(config.models), device, config.models, partition)
    check_inversion(config.inversion, models.noise_path)
    check_objective(config.objective, models.noise_path)
    models.training_side(config.data.resolution)
    return models


def _open_checkpoints(folder: RunFolder, config: RunConfig) -> Checkpoints:
    return Checkpoints(
        folder.checkpoints,
        keep=config.train.keep_checkpoints,
        milestones=config.train.milestone_every,
        patience=60 * config.train.patience_minutes,
        written=folder.has_checkpoint,
    )


def _load_checkpoint(run: Run) -> None:
    warn = log.warning if run.rank == 0 else log.debug
    state = run.checkpoints.load_newest(run.models.weights, run.optimizer, run.average, warn)
    if state is None:
        return
    run.done = run.saved = state.step
    run.seconds, run.dropped = state.seconds, tuple(state.dropped)
    run.models.at_once.lowered |= state.lowered
    run.notes += tuple(f"{key} is at most {size}, which fitted before" for key, size in state.lowered.items())
    if run.loss_scale is not None and state.loss_scale:
        run.loss_scale.value, run.loss_scale.good = state.loss_scale


def _check_inputs(run: Run) -> None:
    """One process looks; all of them refuse."""
    problem = None
    if run.rank == 0:
        judge = run.online.judge if run.online is not None else None
        try:
            held_out = None if run.config.observe.held_out is None else open_held_out(run.config)
            inputs = fingerprints(run.config, run.source, held_out, judge)
            check_held_out(inputs)
            run.folder.accept_inputs(inputs, run.done)
            run.notes = (*run.folder.notes, *run.notes)
        except UserError as raised:
            problem = raised
        except OSError as raised:
            problem = UserError(f"data.source: {raised.filename or ''} cannot be read ({raised.strerror or raised})")
    told, run.former_steps = distributed.gather((problem and str(problem), run.folder.former_steps))[0]
    if told:
        raise UserError(told) from problem


def _start_folders(run: Run) -> None:
    if run.trajectory_cache is not None:
        run.trajectory_cache.store.start()
    if run.rank == 0:  # takes the lock: only now may anything be removed
        run.folder.start(run.done, list(run.dropped), run.source, run.models, run.variant, run.world)
        if run.online is not None:
            run.online.forget_after(run.done)
