"""One run from its first step to its last: the training loop. What a step does is in step.py."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console

from inpo_fast.config import to_dict
from inpo_fast.data.loader import PairLoader
from inpo_fast.handover.output_model import detach_policy, output_pipeline, whole_masters
from inpo_fast.models.models import Text
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.preemption import Preempted, Preemption
from inpo_fast.runtime.progress import StepProgress
from inpo_fast.runtime.watch import exchange
from inpo_fast.training.fine_inversion import NAMES, affordable_images, fine_steps, noise_ratio
from inpo_fast.training.health_checks import HealthChecks
from inpo_fast.training.metrics import MetricAccumulator, MetricsFile
from inpo_fast.training.optim import lr_at
from inpo_fast.training.saved_checkpoint import State
from inpo_fast.training.set_up import Run
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepBatch, inversion_costs, make_step_batch, uses_inversion
from inpo_fast.training.trackers import Tracker
from inpo_fast.training.validation import Validation

T = TypeVar("T")


def train(run: Run, console: Console) -> None:
    config, models, steps = run.config, run.models, run.config.train.steps
    with contextlib.ExitStack() as closing:
        # ---- set-up ------------------------------------------------------------------------------
        output = closing.enter_context(_open_output(run, console))
        preemption = closing.enter_context(Preemption())
        empty = models.encode_empty()
        batches = _Batches(run, empty, preemption, output)
        validation = Validation(config, models, empty, run.folder.path, run.done)
        _mend_last_looks(run, validation, preemption, output)
        _note_other_comparison(run, output)
        health_checks = HealthChecks.after(run.folder.metrics, run.done)
        validation.draw(run.done, output.tracker, preemption)  # what it was stopped at
        begun = time.perf_counter()
        for step in range(run.done, steps):
            # ---- the single training step --------------------------------------------------------
            lr = _set_lr(run, step)
            try:
                batch, online_values = batches.take(step)
                compared = _compare_inversion(run, batch, empty, output) if step == 0 else {}
                metrics, logits = _train_step(run, batch, step, preemption, output)
            except Preempted:
                if run.saved != run.done:
                    _save(run, batches.dropped, preemption, wait=True, scheduled=False)
                raise
            batches.prepare(step + 1)  # sent to the device while it still computes this step
            with exchange("its result"):
                values = metrics.values()  # the step's one copy to the host: waits for the device
            _update(run, values, logits, batch, step)
            # ---- what it took, and what happens once in a while ----------------------------------
            now = time.perf_counter()
            taken, begun = now - begun, now
            run.done, run.seconds = step + 1, run.seconds + taken
            values |= compared | {"lr": lr, "pairs_per_second": config.train.pairs_per_step / taken, "seconds": taken}
            if online_values:
                values |= online_values
                values["unet_evaluations"] += online_values["online_evaluations"]
            values |= _fitting(
                run, output, lambda: validation.step(run.done, output.tracker, run.step_config, preemption)
            )
            output.write(run.done, values)
            for warning in health_checks.step(run.done, values):
                output.say(f"warning: {warning}")
            run.checkpoints.check()
            if run.done % config.train.checkpoint_every == 0 or run.done == steps:
                _save(run, batches.dropped, preemption, wait=run.done == steps)
        if run.rank == 0:
            health_checks.write(run.folder.path / "warnings.json")
        for line in health_checks.summary():
            output.say(f"warning, at the end: {line}")
        preemption.agree(steps, preemption.asked)  # asked during the last save: everything is on the disk


def _mend_last_looks(run: Run, validation: Validation, preemption: Preemption, output: "_Output") -> None:
    """Of a run that got another length: what is shown of the last step alone is undone at the one that was to be the
    last, and made up for at the one that is it now."""
    lacks = False
    if run.rank == 0:
        for step in run.former_steps:
            if step <= run.done and step != run.config.train.steps:
                output.file.rewrite(step, partial(validation.forget_last_look, step))
        if run.former_steps and run.done == run.config.train.steps:
            lacks = validation.lacks_last_look(run.done, output.file.values(run.done))
    if any(distributed.gather(lacks)):
        values = _fitting(run, output, lambda: validation.step(run.done, output.tracker, run.step_config, preemption))
        if run.rank == 0:
            output.file.rewrite(run.done, lambda old: old | values)


def _note_other_comparison(run: Run, output: "_Output") -> None:
    """Of a run that got another length: whether the inversion was compared before its first step went by the length it
    had then, the one metric that is not as if the run had been asked for this length at first."""
    if run.rank != 0 or not run.former_steps or not run.done:
        return
    is_there = NAMES[0] in output.file.values(1)
    if is_there != bool(affordable_images(run.config, run.step_config, run.models, run.world)):
        has, other = ("has a", "none") if is_there else ("has no", "one")
        output.say(
            f"inversion: step 1 {has} noise_ratio, where a run of train.steps={run.config.train.steps} from its start "
            f"on has {other}: it is measured before the first step, for a share of the run as it was then"
        )


def _compare_inversion(run: Run, batch: StepBatch | None, empty: Text, output: "_Output") -> dict[str, float]:
    """How much noise the run's inversion leaves, against a fine one of a few images: metrics of the first step."""
    config, models = run.config, run.models
    images = affordable_images(config, run.step_config, models, run.world)
    if not images:
        return {}
    items = [] if batch is None else batch.items
    found = _fitting(run, output, lambda: noise_ratio(items, images, config, run.step_config, models, empty))
    if found:
        output.say(
            f"inversion: noise_ratio {found['noise_ratio']:.2f}, rms(tau) relative to n = "
            f"{fine_steps(config, run.step_config, models)} on the exact path ({images * run.world} images, "
            f"{found['noise_ratio_evaluations']:,.0f} UNet evaluations, once)"
        )
    return found


@dataclass(frozen=True)
class _Output:
    """Where a run says how it goes: the progress line, on process 0 metrics.jsonl and trackers too."""

    progress: StepProgress
    file: MetricsFile | None = None
    tracker: Tracker | None = None

    def say(self, text: str) -> None:
        self.progress.say(text)

    def write(self, done: int, values: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(done, values)
            self.tracker.write(done, values)
        self.progress.step(values)


@contextlib.contextmanager
def _open_output(run: Run, console: Console) -> Iterator[_Output]:
    with contextlib.ExitStack() as closing:
        file = tracker = None
        if run.rank == 0:
            file = closing.enter_context(contextlib.closing(MetricsFile(run.folder.metrics, run.done)))
            place, wandb = run.folder.path / "tensorboard", run.config.observe.wandb
            tracker = closing.enter_context(contextlib.closing(Tracker(place, run.done, wandb, to_dict(run.config))))
        steps, shown = run.config.train.steps, run.rank == 0
        progress = closing.enter_context(StepProgress(console, steps, run.done, run.variant, shown=shown))
        for note in run.notes:
            progress.say(note)
        if file is not None and file.foreign:
            progress.say(f"warning: {run.folder.metrics}: {file.foreign} lines that no run wrote were dropped")
        yield _Output(progress, file, tracker)


class _Batches:
    """The steps' batches in turn. One is made ahead, but not where a new round of online training waits for the weights
    that its pairs are drawn by."""

    def __init__(self, run: Run, empty: Text, preemption: Preemption, output: _Output):
        self.run, self.empty, self.preemption, self.output = run, empty, preemption, output
        config, step_config = run.config, run.step_config
        balanced = uses_inversion(step_config) and run.trajectory_cache is None  # cached trajectories cost nothing
        self.loader = PairLoader(
            run.source,
            config.data,
            resolution=run.resolution,
            seed=config.seed,
            rank=run.rank,
            world=run.world,
            cached=run.latent_cache,
            costs=partial(inversion_costs, config=step_config, models=run.models) if balanced else None,
            online=run.online,
        )
        parts = [(run.done, config.train.steps)] if run.online is None else run.online.segments(run.done)
        pairs = config.train.pairs_per_step
        self._items = (items for part in parts for items in self.loader.steps(*part, pairs))
        self._ahead: list[StepBatch | None] = []  # none or one

    @property
    def dropped(self) -> list[str]:
        """The unusable pairs met so far by this process."""
        return self.loader.dropped

    def take(self, step: int) -> tuple[StepBatch | None, dict[str, float]]:
        """The step's batch, None where no pair of this process is usable, and metrics of a round that begins."""
        online_values: dict[str, float] = {}
        if not self._ahead:
            online, progress = self.run.online, self.output.progress
            if online is not None:
                online_values = online.begin(step, self.run.models, self.loader.prompt, self.preemption, progress.draw)
            self._make()
        return self._ahead.pop(), online_values

    def prepare(self, step: int) -> None:
        if self.run.online is None or not self.run.online.begins(step):
            self._make()

    def _make(self) -> None:
        run, items = self.run, next(self._items, [])
        make = lambda: make_step_batch(items, run.models, run.step_config, self.empty)  # noqa: E731
        self._ahead.append(_fitting(run, self.output, make) if items else None)


def _fitting(run: Run, output: _Output, work: Callable[[], T]) -> T:
    """work(), which asks for run.step_config: again with smaller sizes where memory does not suffice."""
    return run.models.at_once.fitting(work, lambda text: output.say(f"warning: {text}"))


def _set_lr(run: Run, step: int) -> float:
    lr = lr_at(step, run.config.train.steps, run.config.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _train_step(
    run: Run, batch: StepBatch | None, step: int, preemption: Preemption, output: _Output
) -> tuple[MetricAccumulator, torch.Tensor]:
    """Nothing is reduced before all of it fitted: the step is repeated with the same result."""
    scale = run.loss_scale.value if run.loss_scale else 1.0
    pairs, clip = run.config.train.pairs_per_step, run.config.optim.clip
    work = lambda: train_step(batch, run.models, run.step_config, pairs, clip, scale, preemption, step)  # noqa: E731
    return _fitting(run, output, work)


def _update(run: Run, values: dict[str, float], logits: torch.Tensor, batch: StepBatch | None, step: int) -> None:
    """The optimizer's, unless the gradient overflowed fp16. UserError where the numbers forbid to go on."""
    overflow = run.loss_scale is not None and not math.isfinite(values["grad_norm"])
    if run.loss_scale:
        values["loss_scale"] = run.loss_scale.value
        run.loss_scale.update(not overflow)
    if not (overflow and math.isfinite(values.get("loss", 0.0))):
        _stop_if_not_finite(values, logits, batch, step)
    if "loss" not in values:
        raise UserError(f"step {step}: none of its {run.config.train.pairs_per_step} pairs is usable; mend the data")
    if not overflow:
        run.optimizer.step()
        run.models.weights.refresh()
    if run.average is not None:
        run.average.update(step)


def _save(run: Run, dropped: list[str], preemption: Preemption, wait: bool, scheduled: bool = True) -> None:
    """A checkpoint of the steps done, written while the training goes on. All processes call it."""
    preemption.meet(run.done)
    found = distributed.gather((dropped, run.models.at_once.lowered), "what was dropped")
    dropped = sorted({*run.dropped, *(d for part, _ in found for d in part)})
    keys = sorted({key for _, sizes in found for key in sizes})
    lowered = {key: min(sizes[key] for _, sizes in found if key in sizes) for key in keys}
    scale = (run.loss_scale.value, run.loss_scale.good) if run.loss_scale else None
    state = State(run.done, run.seconds, dropped, scale, lowered=lowered)
    run.checkpoints.save(state, run.models.weights, run.optimizer, run.average, wait=wait, scheduled=scheduled)
    run.saved = run.done
    if run.rank == 0:
        run.folder.record_dropped(dropped)


def _stop_if_not_finite(values: dict[str, float], logits: torch.Tensor, batch: StepBatch | None, step: int) -> None:
    if all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm")):
        return
    finite = torch.isfinite(logits).tolist()
    items = [] if batch is None else batch.items
    culprits = [item.id for item, good in zip(items, finite, strict=True) if not good]
    where = f"pairs {', '.join(culprits[:8])}" if culprits else "no pair of this process alone"
    raise UserError(
        f"step {step}: loss {values.get('loss')} or gradient norm {values['grad_norm']} is not finite ({where}); the "
        "weights were not updated: look at these pairs, or lower optim.lr, and continue with --resume"
    )


@torch.no_grad()
def finish(run: Run) -> torch.nn.Module:
    """Writes the output model, the averaged weights if there are any, as a diffusers folder; of LoRA also the adapter.

    Returns its network in the working precision; afterwards models.pipeline holds the untouched base.
    """
    models, weights = run.models, run.models.weights
    if run.average is not None:
        torch._foreach_copy_(weights.masters, run.average.mean)
        weights.refresh()
    masters = whole_masters(models, keep=run.rank == 0)
    if run.rank == 0:
        untouched = run.folder.unchanged_parts()
        run.folder.save_model(output_pipeline(models, masters), untouched, step=run.done)
        if models.adapters:
            run.folder.save_adapter(models, masters)
    return detach_policy(models)
