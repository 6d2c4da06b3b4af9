"""A run that goes on with another length, or another end of its schedule: only where every step done so far, and every
average of its weights, is what it would have been if that had been asked for at first."""

from dataclasses import replace
from pathlib import Path

from inpo_fast.config import RunConfig
from inpo_fast.config.run import OptimConfig
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.optim import average_weight, lr_at

KEYS = ("train.steps", "optim.decay", "optim.average", "optim.ema_decay")  # may differ under --resume, by check_length


def check_length(config: RunConfig, old: dict, done: int, folder: Path) -> None:
    """UserError, with the way out, where the steps done so far would have been others under `config`.

    old: the run's settings before, keys joined by dots. done: the steps of its newest checkpoint. folder: the run's.
    """
    before, optim = old.get("train.steps"), _optim(config.optim, old)
    if type(before) is not int or before < 1:
        raise UserError(f"--resume: {folder / 'config.yaml'} says train.steps={str(before)[:80]}; it is damaged")
    steps, now = config.train.steps, config.optim
    if steps < done:
        raise UserError(
            f"--resume: train.steps={steps}, but the run in {folder} has done {done} steps already; take {done} or more"
        )
    if (before, optim) == (steps, now):
        return
    values = {f"optim.{key}": (value, vars(optim)[key]) for key, value in vars(now).items()}
    differ = [(key, *pair) for key, pair in {"train.steps": (steps, before), **values}.items() if pair[0] != pair[1]]
    told = [f"{key} is {new} but the run in {folder} has {former}" for key, new, former in differ]
    what = f"--resume: {'; '.join(told)}"
    anew = f"start a new run from its model (models.init={folder / 'model'}, which is then the reference too)"
    if any(lr_at(step, before, optim) != lr_at(step, steps, now) for step in range(done)):
        kind = now.decay if optim.decay == "constant" else optim.decay
        raise UserError(
            f"{what}; with optim.decay={kind} the learning rates of the {done} steps done would have been others; keep "
            f"train.steps={before} and optim.decay={optim.decay}, or {anew}"
        )
    if not _same_average(before, optim, steps, now, done):
        raise UserError(
            f"{what}; with optim.average={now.average} the average over the {done} steps done would have been another; "
            "give optim.average=none, "
            + (f"or train.steps={2 * (done - 1)} or more, " if now.average == "last-half" else "")
            + f"or {anew}"
        )
    _check_round(config, before, folder)


def _optim(now: OptimConfig, old: dict) -> OptimConfig:
    """The optimizer's settings of before; every key but these is the same, or the run is refused for that."""
    known = {key.removeprefix("optim."): old.get(key) for key in KEYS if key.startswith("optim.")}
    if known["decay"] not in ("constant", "linear", "cosine") or known["average"] not in ("none", "last-half", "ema"):
        raise UserError("--resume: config.yaml of the run says a decay or an average that there is not; it is damaged")
    if type(known["ema_decay"]) is not float:
        raise UserError(f"--resume: config.yaml says optim.ema_decay={str(known['ema_decay'])[:80]}; it is damaged")
    return replace(now, **known)


def _same_average(before: int, then: OptimConfig, steps: int, now: OptimConfig, done: int) -> bool:
    """Whether the averaged weights after `done` steps can be known. Where they are nothing but the newest weights
    (Average.weight is 1) it does not matter what was averaged before."""
    if now.average == "none" or not done or average_weight(done - 1, steps, now) == 1:
        return True
    return then.average == now.average and all(
        average_weight(step, before, then) == average_weight(step, steps, now) for step in range(done)
    )


def _check_round(config: RunConfig, before: int, folder: Path) -> None:
    """Of online training: a round that the shorter of the two lengths cuts off must not have been drawn yet."""
    how, cut = config.online, min(before, config.train.steps)
    if before == config.train.steps or not how.every or cut <= how.start or (cut - how.start) % how.every == 0:
        return
    first = cut - (cut - how.start) % how.every
    if (folder / "online" / f"{first:06d}").exists():
        raise UserError(
            f"--resume: train.steps is {config.train.steps} but the run in {folder} has {before}; its round of "
            f"online.every={how.every} from step {first} on was drawn for that; keep train.steps={before}, or start a "
            "new run"
        )
