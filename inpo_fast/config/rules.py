"""What a configuration may not be: everything that can be refused before a model is loaded."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from inpo_fast.config.run import RunConfig
from inpo_fast.method.config import ObjectiveConfig
from inpo_fast.method.methods import METHODS, method_of
from inpo_fast.runtime.errors import UserError


def check(config: RunConfig) -> None:
    """UserError that names the first key that cannot be."""
    _check_nulls(config)
    rules = [
        (config.train.steps >= 1, "train.steps", config.train.steps, "at least 1"),
        (config.train.pairs_per_step >= 1, "train.pairs_per_step", config.train.pairs_per_step, "at least 1"),
        (config.train.micro_batch >= 1, "train.micro_batch", config.train.micro_batch, "at least 1"),
        (config.train.checkpoint_every >= 1, "train.checkpoint_every", config.train.checkpoint_every, "at least 1"),
        (config.observe.images_every >= 0, "observe.images_every", config.observe.images_every, "not negative"),
        (config.observe.images >= 1, "observe.images", config.observe.images, "at least 1"),
        (config.observe.held_out_every >= 1, "observe.held_out_every", config.observe.held_out_every, "at least 1"),
        (config.observe.held_out_pairs >= 1, "observe.held_out_pairs", config.observe.held_out_pairs, "at least 1"),
        (config.observe.fine_inversion >= 0, "observe.fine_inversion", config.observe.fine_inversion, "not negative"),
        (config.plan.memory > 0, "plan.memory", config.plan.memory, "positive"),
        (config.plan.tflops > 0, "plan.tflops", config.plan.tflops, "positive"),
        (config.models.lora.rank >= 0, "models.lora.rank", config.models.lora.rank, "not negative"),
        (config.train.keep_checkpoints >= 1, "train.keep_checkpoints", config.train.keep_checkpoints, "at least 1"),
        (config.train.milestone_every >= 0, "train.milestone_every", config.train.milestone_every, "not negative"),
        (config.train.patience_minutes > 0, "train.patience_minutes", config.train.patience_minutes, "positive"),
        (config.inversion.steps >= 1, "inversion.steps", config.inversion.steps, "at least 1"),
        (config.inversion.batch >= 1, "inversion.batch", config.inversion.batch, "at least 1"),
        (config.inversion.eta >= 0, "inversion.eta", config.inversion.eta, "not negative"),
        (config.optim.lr > 0, "optim.lr", config.optim.lr, "positive"),
        (all(0 <= b < 1 for b in config.optim.betas), "optim.betas", config.optim.betas, "in 0..1, 1 excluded"),
        (config.optim.eps >= 0, "optim.eps", config.optim.eps, "not negative"),
        (config.optim.weight_decay >= 0, "optim.weight_decay", config.optim.weight_decay, "not negative"),
        (config.optim.warmup_steps >= 0, "optim.warmup_steps", config.optim.warmup_steps, "not negative"),
        (config.optim.clip > 0, "optim.clip", config.optim.clip, "positive"),
        (0 < config.optim.ema_decay < 1, "optim.ema_decay", config.optim.ema_decay, "between 0 and 1"),
        (config.objective.beta > 0, "objective.beta", config.objective.beta, "positive"),
        (0 <= config.data.prompt_dropout <= 1, "data.prompt_dropout", config.data.prompt_dropout, "in 0..1"),
        (config.data.bad_pair_limit >= 0, "data.bad_pair_limit", config.data.bad_pair_limit, "not negative"),
        (config.data.filters.min_side >= 0, "data.filters.min_side", config.data.filters.min_side, "not negative"),
        (config.data.prefetch_mb >= 0, "data.prefetch_mb", config.data.prefetch_mb, "not negative"),
        (config.online.every >= 0, "online.every", config.online.every, "not negative"),
        (config.online.start >= 0, "online.start", config.online.start, "not negative"),
        (0 < config.online.mix <= 1, "online.mix", config.online.mix, "in 0..1, 0 excluded"),
        (config.online.candidates >= 2, "online.candidates", config.online.candidates, "at least 2"),
        (config.online.sampler_steps >= 1, "online.sampler_steps", config.online.sampler_steps, "at least 1"),
        (config.online.guidance >= 0, "online.guidance", config.online.guidance, "not negative"),
        (config.online.batch >= 1, "online.batch", config.online.batch, "at least 1"),
    ]
    optional = (
        ("train.threads", config.train.threads),
        ("data.resolution", config.data.resolution),
        ("data.vae_batch", config.data.vae_batch),
        ("data.cache_mb", config.data.cache_mb),
    )
    for key, value in optional:
        rules.append((value is None or value >= 1, key, value, "at least 1, or null"))
    rules += [
        (config.inversion.refinements >= 1, "inversion.refinements", config.inversion.refinements, "at least 1"),
        (config.objective.gamma > 0, "objective.gamma", config.objective.gamma, "positive"),
        (
            0 <= config.objective.label_smoothing < 0.5,
            "objective.label_smoothing",
            config.objective.label_smoothing,
            "in 0..0.5, 0.5 excluded",
        ),
    ]
    mu = config.objective.winner_preserving
    rules.append((mu is None or 0 <= mu <= 1, "objective.winner_preserving", mu, "in 0..1, or null"))
    span = config.objective.timesteps
    rules.append((0 <= span.min <= span.max <= 999, "objective.timesteps", f"{span.min}..{span.max}", "within 0..999"))
    most = span.max - span.min + 1
    limits = f"in 1..{most}, the number of different ones"
    rules.append((1 <= span.per_pair <= most, "objective.timesteps.per_pair", span.per_pair, limits))
    for good, key, value, need in rules:
        if not good:
            raise UserError(f"{key}={value}: must be {need}")
    if config.inversion.fp8 and config.models.fast == "off":
        raise UserError("inversion.fp8=true needs models.fast=fused or compiled")
    if config.models.cuda_graphs and config.models.fast != "compiled":
        raise UserError("models.cuda_graphs=true needs models.fast=compiled")
    if config.train.milestone_every % config.train.checkpoint_every:
        raise UserError(
            f"train.milestone_every={config.train.milestone_every} is not a multiple of train.checkpoint_every="
            f"{config.train.checkpoint_every}: most of these steps have no checkpoint"
        )
    if config.train.shard_states and config.optim.kind in ("adamw-8bit", "adafactor"):
        raise UserError(
            f"train.shard_states=true: the state of optim.kind={config.optim.kind} cannot be cut into rows; take adamw "
            "or adamw-bf16"
        )
    _check_method(config)
    _check_online(config)
    if config.data.cache and config.inversion.cache:
        raise UserError("data.cache and inversion.cache: the trajectories hold the latents too; give one of them")
    _check_cache(config)


def _check_nulls(config, prefix: str = "") -> None:
    """jsonargparse takes null for anything: here only where the field says so."""
    kinds = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _check_nulls(value, f"{prefix}{f.name}.")
        elif value is None and type(None) not in get_args(kinds[f.name]):
            raise UserError(f"{prefix}{f.name} is null; give it a value, or leave the line out for the default")


def _check_method(config: RunConfig) -> None:
    """Settings that the method or the estimator has no use for would be believed to be in the result."""
    method, objective, how = method_of(config.method), config.objective, config.inversion
    refined = how.estimator not in ("ddim", "random")
    for key, reason in method.refuses.items():
        if getattr(objective, key) != getattr(ObjectiveConfig, key):
            raise UserError(f"objective.{key} {reason}")
    if not method.uses_gamma and objective.gamma != ObjectiveConfig.gamma:
        users = " or ".join(name for name, other in METHODS.items() if other.uses_gamma)
        raise UserError(
            f"objective.gamma={objective.gamma:g} is of method={users}; for method={config.method} change "
            "objective.beta"
        )
    if refined and not method.inverts:
        inverting = " or ".join(name for name, other in METHODS.items() if other.inverts)
        raise UserError(
            f"inversion.estimator={how.estimator}: method={config.method} has no inversion; take {inverting}"
        )
    if not refined and how.refinements != 1:
        raise UserError(
            f"inversion.refinements={how.refinements}: inversion.estimator={how.estimator} refines nothing; take "
            "renoise, fixed-point or gradient"
        )
    if how.refine_at != "target" and not (refined and how.evaluate_at == "source"):
        why = "has no refinements" if not refined else f"with evaluate_at={how.evaluate_at} is in nobody's code"
        raise UserError(f"inversion.refine_at={how.refine_at}: estimator={how.estimator} {why}; leave it out")
    if how.grid == "diffusers-0.22" and how.eta:
        raise UserError(
            f"inversion.eta={how.eta:g} with grid=diffusers-0.22: the published script adds the noise of the next "
            "step there, and has none for t > 901; take grid=diffusers-0.20, or eta=0"
        )
    if refined and how.eta:
        raise UserError(f"inversion.estimator={how.estimator} solves a step without noise; take inversion.eta=0")
    if how.estimator == "gradient" and config.models.fast != "off":
        raise UserError("inversion.estimator=gradient goes through the UNet backwards; take models.fast=off")


def _check_online(config: RunConfig) -> None:
    how = config.online
    if not how.every:
        if how.judge is not None:
            raise UserError(f"online.judge={how.judge} has nothing to judge; give online.every, the steps of a round")
        return
    if how.judge is None:
        raise UserError("online.every needs online.judge: who says which of the drawn pictures is better")
    if how.start >= config.train.steps:
        raise UserError(f"online.start={how.start}: the run ends before it, after train.steps={config.train.steps}")
    if how.judge == config.evaluate.outside_judge:
        raise UserError(
            f"online.judge={how.judge} is evaluate.outside_judge too, which no reward may come from; name another"
        )
    if config.inversion.cache is not None:
        raise UserError(
            "inversion.cache with online.every: pictures that are drawn anew are never met again; take null"
        )


def _check_cache(config: RunConfig) -> None:
    how, where = config.inversion, f"inversion.cache={config.inversion.cache}"
    if how.cache is None:
        if how.frozen:
            raise UserError("inversion.frozen=true needs inversion.cache, the folder of what is frozen")
        return
    rules = [
        (method_of(config.method).inverts, f"method={config.method}", "has no inversion; take method=inpo"),
        (how.estimator != "random", f"inversion.estimator={how.estimator}", "has no inversion; take ddim"),
        (how.estimator == "ddim", f"inversion.estimator={how.estimator}", "takes more evaluations a level; take ddim"),
        (how.model == "reference", f"inversion.model={how.model}", "follows the trained weights; take reference"),
        (how.eta == 0, f"inversion.eta={how.eta:g}", "draws noise for each seed; take 0"),
        (how.guidance in (0.0, 1.0), f"inversion.guidance={how.guidance:g}", "mixes two outputs; take 0 or 1"),
    ]
    if how.frozen and (several := config.objective.timesteps.per_pair) > 1:
        raise UserError(
            f"inversion.frozen=true keeps one t of a pair, and objective.timesteps.per_pair={several}; take 1"
        )
    for good, key, reason in rules:
        if not good:
            raise UserError(f"{where} keeps the reference's outputs along its trajectories, and {key} {reason}")
    if not how.cache:
        raise UserError("inversion.cache is empty; name a folder, or null for none")
    if config.output is not None and Path(how.cache).resolve() == Path(config.output).resolve():
        raise UserError(f"{where} is the run's own output folder; name another one")
