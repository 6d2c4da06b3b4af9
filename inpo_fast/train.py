"""Align a diffusion model with preference pairs.

    torchrun --nproc-per-node 8 -m inpo_fast.train --config configs/sd15.yaml [--group.key=value …]

Writes the run's folder: checkpoints, the model, its card, the evaluation, a report. Interrupted, --resume goes on.
"""

import errno
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from inpo_fast.runtime.errors import UserError, run_command


def main() -> None:
    from inpo_fast.config import parse

    config = parse("python -m inpo_fast.train")

    import torch
    from rich.console import Console
    from rich.logging import RichHandler

    from inpo_fast.comparison.run_evaluation import evaluate, forget
    from inpo_fast.cost.plan import make_plan, show
    from inpo_fast.handover.output_model import reference_in_words
    from inpo_fast.models.loading import quiet_libraries
    from inpo_fast.report.start import started_from
    from inpo_fast.runtime import distributed, lock, watch
    from inpo_fast.runtime.preemption import Preempted
    from inpo_fast.runtime.signals import exit_status
    from inpo_fast.training.loop import finish, train
    from inpo_fast.training.replaced_run import way_back
    from inpo_fast.training.set_up import prepare

    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)])
    quiet_libraries()
    if config.train.threads:
        most = max(64, 4 * (os.cpu_count() or 1))  # OpenMP ends the process where the system gives no more threads
        if config.train.threads > most:
            raise UserError(
                f"train.threads={config.train.threads}: at most {most} on this machine's {os.cpu_count()} CPUs"
            )
        torch.set_num_threads(config.train.threads)
    rank, world, device = distributed.start(config.train.patience_minutes)
    console, run = Console(), None
    try:
        if any(distributed.gather(lock.is_restart_of(Path(config.output)))):
            config = replace(config, resume=True, overwrite=False)  # torchrun --max-restarts: the same command again
        if config.dry_run:
            if rank == 0:
                show(config, make_plan(config, config.plan.gpus or world), console)
            return
        run = prepare(config, rank, world, device)
        train(run, console)
        watch.at("model")
        policy = finish(run)
        watch.at("evaluation")
        evaluation = None
        if config.evaluate.prompts:
            start = started_from({"init": config.models.init, "reference": reference_in_words(config.models)})
            evaluation = evaluate(run.models.pipeline, policy, config.evaluate, run.variant, run.folder.path, start)
        if rank == 0:
            write_results(run, evaluation, console)
        watch.at("report")
        distributed.barrier("end")
        forget(run.folder.path)
    except Preempted as asked:
        if rank == 0:
            kept = way_back(Path(config.output))
            again = f"continue with --resume{f' ({kept})' if kept else ''}"
            print(f"inpo_fast.train: stopped by {asked}; {again}", file=sys.stderr, flush=True)
        sys.exit(exit_status(asked.by))
    except OSError as problem:  # of metrics, pictures, TensorBoard; checkpoints and models say more themselves
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise full_disk(problem, Path(config.output)) from problem
    finally:
        if run is not None:
            run.checkpoints.end()
            run.folder.release()
        distributed.stop()


def write_results(run, evaluation, console) -> None:
    """Model card, evaluation and report of a finished run, and where they are. evaluation: None where this start made
    none; what an earlier one found of the same model stays, with its report."""
    from inpo_fast.handover.model_card import write_cards
    from inpo_fast.report.results import verdict
    from inpo_fast.report.write import report_of_finished

    folder = run.folder.path
    if evaluation is not None:
        evaluation.write(folder)
    write_cards(folder)
    report = report_of_finished(folder, evaluation)
    lines = ["", f"Model:  {folder / 'model'} (opens with diffusers)"]
    if run.models.adapters:
        names = ", ".join(path.name for path in sorted((folder / "lora").glob("*.safetensors")))
        lines.append(f"LoRA:   {folder / 'lora'} ({names})")
    if evaluation is not None:
        lines.append(verdict(evaluation.result))
    console.print("\n".join([*lines, f"Report: {report}"]), highlight=False, markup=False, soft_wrap=True)


def full_disk(problem: OSError, output: Path) -> UserError:
    saved = any((output / "checkpoints").glob("step-*"))
    more = "continue with --resume: the last checkpoint is complete" if saved else "start again: no checkpoint is there"
    return UserError(f"{problem.filename or output}: {problem.strerror}; free some space and {more}")


if __name__ == "__main__":
    run_command("inpo_fast.train", main, "continue with --resume")
