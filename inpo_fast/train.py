"""Align a diffusion model with preference pairs.

    torchrun --nproc-per-node 8 -m inpo_fast.train --config configs/sd15.yaml [--group.key=value …]

The loop: the only file that knows time. What a step does is in step.py.
"""

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler

from inpo_fast import checkpoint, distributed
from inpo_fast.config import RunConfig, parse, split_batch
from inpo_fast.data.sources import Source, open_source
from inpo_fast.data.windows import Windows
from inpo_fast.evaluate import evaluate, open_inputs, verdict
from inpo_fast.files import write_text
from inpo_fast.metrics import MetricsFile
from inpo_fast.models import Models, load_pipeline, quiet_libraries
from inpo_fast.objectives import label
from inpo_fast.optim import Average, lr_at, make_optimizer
from inpo_fast.progress import StepProgress
from inpo_fast.refusal import Refusal, run_or_refuse
from inpo_fast.run_folder import RunFolder
from inpo_fast.step import Recipe, make_window, train_step
from inpo_fast.trackers import Tracker
from inpo_fast.watch import Watch

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
    rank: int
    world: int
    done: int = 0  # optimizer steps
    seconds: float = 0.0
    dropped: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        return label(self.config.method, self.config.objective, self.config.inversion)


def prepare(config: RunConfig, rank: int, world: int, device: torch.device) -> Run:
    """Checks and opens everything, cheap things first. Nothing is written before all of it has been accepted."""
    split_batch(config.train, world)
    folder = RunFolder(Path(config.output), config)
    if rank == 0:
        folder.check()
    source = open_source(config.data.source, config.data.format)
    if config.evaluate.prompts:
        open_inputs(config.evaluate, device)
    torch.manual_seed(config.seed)  # nothing depends on it; it pins what a library might draw
    models = Models(load_pipeline(config.models.base), device)
    optimizer = make_optimizer(models.parameters(), config.optim)
    average = None if config.optim.average == "none" else Average(models.parameters(), config.optim, config.train.steps)
    run = Run(config, folder, models, source, optimizer, average, rank, world)
    distributed.barrier()
    if config.resume and (saved := checkpoint.found(folder.checkpoints)):
        state = checkpoint.load(saved[-1], models.policy, optimizer, average)
        run.done, run.seconds, run.dropped = state.step, state.seconds, tuple(state.dropped)
    if rank == 0:
        folder.start(run.done, source, models, run.variant, world)
    distributed.barrier()
    return run


def train(run: Run, console: Console) -> None:
    config, models = run.config, run.models
    recipe = Recipe(
        config.method, config.objective, config.inversion, config.train.micro_batch, config.data.vae_sample, config.seed
    )
    resolution = config.data.resolution or models.resolution
    windows = Windows(run.source, config.data, resolution=resolution, seed=config.seed, rank=run.rank, world=run.world)
    empty = models.encode_empty()
    steps = config.train.steps
    with contextlib.ExitStack() as closing:
        file = tracker = None
        if run.rank == 0:
            file = closing.enter_context(contextlib.closing(MetricsFile(run.folder.metrics, run.done)))
            tracker = closing.enter_context(contextlib.closing(Tracker(run.folder.path / "tensorboard", run.done)))
        progress = closing.enter_context(StepProgress(console, steps, run.done, run.variant, shown=run.rank == 0))
        watch = Watch(expects_noise=config.objective.tau_norm == "none")
        begun = time.perf_counter()
        for step, items in enumerate(windows.steps(run.done, steps, config.train.pairs_per_step), run.done):
            # ---- the single training step -------------------------------------------------------
            lr = lr_at(step, steps, config.optim)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            window = make_window(items, models, recipe, empty) if items else None
            tally, logits = train_step(window, models, recipe, config.train.pairs_per_step, config.optim.clip)
            values = tally.values()  # the step's one copy to the host
            _stop_if_not_finite(values, logits, items, step)
            if "loss" not in values:
                raise Refusal(f"step {step}: none of its {config.train.pairs_per_step} pairs is usable; mend the data")
            run.optimizer.step()
            if run.average is not None:
                run.average.update(step)
            # --------------------------------------------------------------------------------------
            now = time.perf_counter()
            taken, begun = now - begun, now
            run.done, run.seconds = step + 1, run.seconds + taken
            values |= {"lr": lr, "pairs_per_second": config.train.pairs_per_step / taken, "seconds": taken}
            if file is not None:
                file.write(run.done, values)
                tracker.write(run.done, values)
            progress.step(values)
            for warning in watch.step(values):
                progress.say(f"warning: {warning}")
            if run.done % config.train.checkpoint_every == 0 or run.done == steps:
                dropped = sorted({*run.dropped, *(d for part in distributed.gather(windows.dropped) for d in part)})
                if run.rank == 0:
                    state = checkpoint.State(run.done, run.seconds, dropped)
                    checkpoint.save(
                        run.folder.checkpoints,
                        state,
                        models.policy,
                        run.optimizer,
                        run.average,
                        keep=config.train.keep_checkpoints,
                    )
                    run.folder.record_dropped(dropped)
                distributed.barrier()


def _stop_if_not_finite(values: dict[str, float], logits: torch.Tensor, items: list, step: int) -> None:
    if all(math.isfinite(values.get(name, 0.0)) for name in ("loss", "grad_norm")):
        return
    finite = torch.isfinite(logits).tolist()
    culprits = [item.id for item, good in zip(items, finite, strict=True) if not good]
    where = f"pairs {', '.join(culprits[:8])}" if culprits else "no pair of this process alone"
    raise Refusal(
        f"step {step}: loss {values.get('loss')} or gradient norm {values['grad_norm']} is not finite ({where}); the "
        "weights were not updated: look at these pairs, or lower optim.lr, and continue with --resume"
    )


@torch.no_grad()
def finish(run: Run) -> torch.nn.Module:
    """The output model: the averaged weights if there are any. Written as a diffusers folder."""
    policy = run.models.policy
    if run.average is not None:
        for parameter, mean in zip(run.models.parameters(), run.average.mean, strict=True):
            parameter.copy_(mean)
    if run.rank == 0:
        run.folder.save_model(run.models.pipeline, policy)
    return policy


def main() -> None:
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)])
    quiet_libraries()
    config = parse("python -m inpo_fast.train")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    rank, world, device = distributed.start()
    console = Console()
    try:
        run = prepare(config, rank, world, device)
        train(run, console)
        policy = finish(run)
        if config.evaluate.prompts:
            evaluation = evaluate(run.models.pipeline, policy, config.evaluate, run.variant)
            if rank == 0:
                write_text(run.folder.path / "evaluation.json", json.dumps(evaluation.result, indent=1))
        else:
            evaluation = None
        if rank == 0:
            from inpo_fast.report.write import write_report

            report = write_report(run.folder.path, evaluation)
            console.print(
                f"\nModel:  {run.folder.path / 'model'} (opens with diffusers)", highlight=False, markup=False
            )
            if evaluation is not None:
                console.print(verdict(evaluation.result), highlight=False, markup=False, soft_wrap=True)
            console.print(f"Report: {report}", highlight=False, markup=False, soft_wrap=True)
        distributed.barrier()
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_or_refuse("inpo_fast.train", main)
