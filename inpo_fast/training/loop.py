"""Align a diffusion model with preference pairs.

    torchrun --nproc-per-node 8 -m inpo_fast.train --config configs/sd15.yaml [--group.key=value …]

The loop: the only file that knows time. What a step does is in step.py.
"""

import contextlib
import logging
import math
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from inpo_fast.caches.latent_cache import LatentCache, open_latent_cache
from inpo_fast.caches.trajectory_cache import TrajectoryCache, open_trajectory_cache
from inpo_fast.comparison.evaluation import open_inputs
from inpo_fast.config import RunConfig, split_batch, to_dict, variant_of
from inpo_fast.data.loader import Item, PairLoader, open_data
from inpo_fast.data.pair import Source
from inpo_fast.handover.output_model import detach_policy, output_pipeline, whole_masters
from inpo_fast.method.inversion import check_inversion
from inpo_fast.models.fast.fast_unet import compiled_blocks
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.memory import with_less
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.runtime.progress import StepProgress
from inpo_fast.training.checkpoint import Checkpoints, State
from inpo_fast.training.health_checks import HealthChecks
from inpo_fast.training.metrics import MetricAccumulator, MetricsFile
from inpo_fast.training.online import Online, open_online
from inpo_fast.training.optim import Average, LossScale, lr_at, make_optimizer
from inpo_fast.training.run_folder import RunFolder
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepBatch, StepConfig, inversion_costs, make_step_batch, uses_inversion
from inpo_fast.training.trackers import Tracker
from inpo_fast.training.validation import Validation, check_validation

log = logging.getLogger("inpo_fast")


@dataclass
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
    trajectories: TrajectoryCache | None = None
    latents: LatentCache | None = None
    notes: tuple[str, ...] = ()  # to be said before the first step
    done: int = 0  # optimizer steps
    saved: int = -1  # of them, how many the newest checkpoint of this start has
    seconds: float = 0.0
    dropped: tuple[str, ...] = ()
    vae_batch: int | None = None  # after memory did not suffice

    @property
    def variant(self) -> str:
        return variant_of(self.config)


def prepare(config: RunConfig, rank: int, world: int, device: torch.device) -> Run:
    """Checks and opens everything, cheap things first. Nothing is written before all of it has been accepted."""
    split_batch(config.train, world)
    folder = RunFolder(Path(config.output), config)
    if rank == 0:
        folder.check()
    source = open_data(config.data)
    if config.evaluate.prompts:
        open_inputs(config.evaluate, device)
    check_validation(config)
    online = open_online(config, device)
    torch.manual_seed(config.seed)  # nothing depends on it; it pins what a library might draw
    split = Zero1Partition(rank, world) if config.train.shard_states and world > 1 else None
    models = Models(open_pipeline(config.models), device, config.models, split)
    check_inversion(config.inversion, models.noise_path)
    trajectories, notes = open_trajectory_cache(models, config.inversion, config.objective, config.data), ()
    if trajectories is not None:
        notes = trajectories.notes(config.train.steps, config.train.pairs_per_step, len(source), world)
    if blocks := compiled_blocks(models.policy):
        notes = (*notes, f"models.fast=compiled: the first step compiles {blocks} kinds of blocks and takes longer")
    optimizer = make_optimizer(models.parameters(), config.optim, config.seed)
    average = (
        None if config.optim.average == "none" else Average(models.weights.masters, config.optim, config.train.steps)
    )
    loss_scale = LossScale() if config.models.precision == "fp16" else None
    latents = open_latent_cache(models, config.data, config.data.resolution or models.resolution, config.seed)
    keep, milestones = config.train.keep_checkpoints, config.train.milestone_every
    patience = 60 * config.train.patience_minutes
    checkpoints = Checkpoints(folder.checkpoints, keep=keep, milestones=milestones, patience=patience)
    opened = (config, folder, models, source, optimizer, average, loss_scale, rank, world, checkpoints)
    run = Run(*opened, online, trajectories, latents, tuple(notes))
    distributed.barrier()
    warn = log.warning if rank == 0 else log.debug
    if config.resume and (state := checkpoints.load_newest(models.weights, optimizer, average, warn)):
        run.done, run.saved, run.seconds, run.dropped = state.step, state.step, state.seconds, tuple(state.dropped)
        run.vae_batch = state.vae_batch
        if loss_scale is not None and state.loss_scale:
            loss_scale.value, loss_scale.good = state.loss_scale
    if trajectories is not None:
        trajectories.shards.start()
    if rank == 0:
        folder.start(run.done, source, models, run.variant, world)  # takes the lock: only now may anything be removed
        if online is not None:
            online.forget_after(run.done)
    distributed.barrier()
    return run


def train(run: Run, console: Console) -> None:
    config, models = run.config, run.models
    vae_batch = min(filter(None, (run.vae_batch, config.data.vae_batch)), default=None)
    recipe = StepConfig.of(config, trajectories=run.trajectories, latents=run.latents, vae_batch=vae_batch)
    balanced = uses_inversion(recipe) and run.trajectories is None  # cached trajectories cost nothing
    resolution = config.data.resolution or models.resolution
    windows = PairLoader(
        run.source,
        config.data,
        resolution=resolution,
        seed=config.seed,
        rank=run.rank,
        world=run.world,
        ready=run.latents,
        costs=partial(inversion_costs, recipe=recipe, models=models) if balanced else None,
        drawn=run.online,
    )
    empty = models.encode_empty()
    steps = config.train.steps
    with contextlib.ExitStack() as closing:
        file = tracker = None
        if run.rank == 0:
            file = closing.enter_context(contextlib.closing(MetricsFile(run.folder.metrics, run.done)))
            tracker = Tracker(run.folder.path / "tensorboard", run.done, config.observe.wandb, to_dict(config))
            closing.callback(tracker.close)
        progress = closing.enter_context(StepProgress(console, steps, run.done, run.variant, shown=run.rank == 0))
        preemption = closing.enter_context(Preemption(timedelta(minutes=config.train.patience_minutes)))
        for note in run.notes:
            progress.say(note)
        observer = Validation(config, models, empty, run.folder.path, run.done)
        watch = HealthChecks(expects_noise=config.objective.tau_norm == "none")
        online = run.online
        parts = [(run.done, steps)] if online is None else online.segments(run.done)
        reader = (items for part in parts for items in windows.steps(*part, config.train.pairs_per_step))

        def lower(key: str, size: int) -> None:
            nonlocal recipe
            recipe = _lowered(recipe, key, size)
            if key == "data.vae_batch":
                run.vae_batch = size
            progress.say(f"warning: out of memory; {key} is now {size} on this process")

        def next_window() -> tuple[list[Item], StepBatch | None]:
            items = next(reader, [])
            if not items:
                return items, None
            return items, with_less(lambda: make_step_batch(items, models, recipe, empty), lower)

        begun, ahead = time.perf_counter(), None
        for step in range(run.done, steps):
            # ---- the single training step -------------------------------------------------------
            drawn: dict[str, float] = {}
            lr = lr_at(step, steps, config.optim)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            try:
                if ahead is None:
                    if online is not None:
                        drawn = online.begin(step, models, windows.prompt, preemption, progress.draw)
                    ahead = next_window()
                items, window = ahead
                # nothing is reduced before all of it fitted: the step is repeated with the same result
                tally, logits = with_less(lambda: _step(run, window, recipe, step, preemption), lower)  # noqa: B023
            except Preempted:
                if run.saved != run.done:
                    _save(run, windows, preemption, wait=True)
                raise
            # sent to the device while it still computes this step; a new round waits for the weights it is drawn by
            ahead = None if online is not None and online.begins(step + 1) else next_window()
            values = tally.values()  # the step's one copy to the host: waits for the device
            overflow = run.loss_scale is not None and not math.isfinite(values["grad_norm"])
            if run.loss_scale:
                values["loss_scale"] = run.loss_scale.value
                run.loss_scale.update(not overflow)
            if not (overflow and math.isfinite(values.get("loss", 0.0))):
                _stop_if_not_finite(values, logits, items, step)
            if "loss" not in values:
                raise UserError(
                    f"step {step}: none of its {config.train.pairs_per_step} pairs is usable; mend the data"
                )
            if not overflow:
                run.optimizer.step()
                models.weights.refresh()
            if run.average is not None:
                run.average.update(step)
            # --------------------------------------------------------------------------------------
            now = time.perf_counter()
            taken, begun = now - begun, now
            run.done, run.seconds = step + 1, run.seconds + taken
            values |= {"lr": lr, "pairs_per_second": config.train.pairs_per_step / taken, "seconds": taken}
            if drawn:
                values |= drawn
                values["unet_evaluations"] += drawn["online_evaluations"]
            values |= with_less(lambda: observer.step(run.done, tracker, recipe), lower)
            if file is not None:
                file.write(run.done, values)
                tracker.write(run.done, values)
            progress.step(values)
            for warning in watch.step(values):
                progress.say(f"warning: {warning}")
            run.checkpoints.check()
            if run.done % config.train.checkpoint_every == 0 or run.done == steps:
                _save(run, windows, preemption, wait=run.done == steps)
        preemption.agree(steps, preemption.asked)  # asked during the last save: everything is on the disk


def _save(run: Run, windows: PairLoader, preemption: Preemption, wait: bool) -> None:
    """A checkpoint of the steps done, written while the training goes on. All processes call it."""
    preemption.meet(run.done)
    found = distributed.gather((windows.dropped, run.vae_batch))
    dropped = sorted({*run.dropped, *(d for part, _ in found for d in part)})
    vae_batch = min((size for _, size in found if size), default=None)
    scale = (run.loss_scale.value, run.loss_scale.good) if run.loss_scale else None
    state = State(run.done, run.seconds, dropped, scale, vae_batch=vae_batch)
    run.checkpoints.save(state, run.models.weights, run.optimizer, run.average, wait=wait)
    run.saved = run.done
    if run.rank == 0:
        run.folder.record_dropped(dropped)


def _step(
    run: Run, window: StepBatch | None, recipe: StepConfig, step: int, preemption: Preemption
) -> tuple[MetricAccumulator, torch.Tensor]:
    scale = run.loss_scale.value if run.loss_scale else 1.0
    pairs, clip = run.config.train.pairs_per_step, run.config.optim.clip
    return train_step(window, run.models, recipe, pairs, clip, scale, preemption, step)


def _lowered(recipe: StepConfig, key: str, size: int) -> StepConfig:
    if key == "inversion.batch":
        return replace(recipe, inversion=replace(recipe.inversion, batch=size))
    return replace(recipe, **{key.partition(".")[2]: size})  # train.micro_batch, data.vae_batch


def _stop_if_not_finite(values: dict[str, float], logits: torch.Tensor, items: list, step: int) -> None:
    if all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm")):
        return
    finite = torch.isfinite(logits).tolist()
    culprits = [item.id for item, good in zip(items, finite, strict=True) if not good]
    where = f"pairs {', '.join(culprits[:8])}" if culprits else "no pair of this process alone"
    raise UserError(
        f"step {step}: loss {values.get('loss')} or gradient norm {values['grad_norm']} is not finite ({where}); the "
        "weights were not updated: look at these pairs, or lower optim.lr, and continue with --resume"
    )


@torch.no_grad()
def finish(run: Run) -> torch.nn.Module:
    """Writes the output model, the averaged weights if there are any, as a diffusers folder; of LoRA also the adapter.

    Returns its UNet in the working precision; afterwards models.pipeline holds the untouched base.
    """
    models, weights = run.models, run.models.weights
    if run.average is not None:
        torch._foreach_copy_(weights.masters, run.average.mean)
        weights.refresh()
    masters = whole_masters(models, keep=run.rank == 0)
    if run.rank == 0:
        run.folder.save_model(output_pipeline(models, masters))
        if models.adapters:
            run.folder.save_adapter(models, masters)
    return detach_policy(models)
