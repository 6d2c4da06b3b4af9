"""What a configuration may not be: everything that can be refused before a model is loaded."""

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from inpo_fast.config.limits import check_limits
from inpo_fast.config.run import RunConfig, flat, to_dict
from inpo_fast.method.config import ObjectiveConfig
from inpo_fast.method.methods import METHODS, method_of
from inpo_fast.runtime.errors import UserError

OUTPUTS = ("output", "inversion.cache", "data.cache")
MAY_BE_EMPTY = ("models.base", "data.source")  # in the configuration; refused where they are needed


def check(config: RunConfig) -> None:
    """UserError that names the first key that cannot be."""
    _check_nulls(config)
    check_limits(flat(to_dict(config)))
    span = config.objective.timesteps
    if span.min > span.max:
        raise UserError(f"objective.timesteps={span.min}..{span.max}: must be within 0..999, min no more than max")
    if span.per_pair > (most := span.max - span.min + 1):
        raise UserError(
            f"objective.timesteps.per_pair={span.per_pair}: must be in 1..{most}, the number of different ones"
        )
    _check_words(flat(to_dict(config)))
    _check_outputs(flat(to_dict(config)))
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


def _check_outputs(settings: dict[str, object]) -> None:
    """What a run writes lies on this machine: as a path `s3://bucket/run` would be a folder `s3:` here."""
    for key in OUTPUTS:
        value = settings[key]
        if isinstance(value, str) and os.path.realpath(value) == "/":
            raise UserError(f"{key}={value} is the root of all folders; name one of its own")
        if isinstance(value, str) and re.match(r"[a-z][a-z0-9+.-]+:/", value):
            raise UserError(
                f"{key}={value} is an address, and what is written lies on this machine; name a folder here"
            )


def _check_words(settings: dict[str, object]) -> None:
    """Names and places that are given, but empty: nothing could be found there, or all of the current folder."""
    for key, value in settings.items():
        empty = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        empty = [one for one in empty if not one.strip() and not (one == "" and key in MAY_BE_EMPTY)]
        if empty:
            raise UserError(f"{key} is empty; give it a value, or leave the line out for the default")


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
    if config.output is not None and Path(how.cache).resolve() == Path(config.output).resolve():
        raise UserError(f"{where} is the run's own output folder; name another one")
