"""Align a diffusion model with preference pairs.

    torchrun --nproc-per-node 8 -m inpo_fast.train --config configs/sd15.yaml [--group.key=value …]

The loop: the only file that knows time. What a step does is in step.py.
"""

import errno
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from inpo_fast.config import parse
from inpo_fast.runtime.errors import run_command


def main() -> None:
    config = parse("python -m inpo_fast.train")

    import torch
    from rich.console import Console
    from rich.logging import RichHandler

    from inpo_fast.comparison.evaluation import evaluate, verdict
    from inpo_fast.cost.plan import make_plan, show
    from inpo_fast.handover.model_card import write_cards
    from inpo_fast.models.loading import quiet_libraries
    from inpo_fast.runtime import distributed, lock
    from inpo_fast.runtime.errors import Hang, UserError
    from inpo_fast.runtime.files import write_text
    from inpo_fast.runtime.preemption import EXIT_CODE, Preempted
    from inpo_fast.training.loop import finish, train
    from inpo_fast.training.set_up import prepare

    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)])
    quiet_libraries()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    # longer than the patience: a process that hangs is named where they meet, not by what exchanges the gradients
    rank, world, device = distributed.start(max(10.0, 2 * config.train.patience_minutes))
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
        policy = finish(run)
        if config.evaluate.prompts:
            evaluation = evaluate(run.models.pipeline, policy, config.evaluate, run.variant)
            if rank == 0:
                write_text(run.folder.path / "evaluation.json", json.dumps(evaluation.result, indent=1))
        else:
            evaluation = None
        if rank == 0:
            from inpo_fast.report.write import write_report

            write_cards(run.folder.path)
            report = write_report(run.folder.path, evaluation)
            console.print(
                f"\nModel:  {run.folder.path / 'model'} (opens with diffusers)", highlight=False, markup=False
            )
            if run.models.adapters:
                names = ", ".join(path.name for path in sorted((run.folder.path / "lora").glob("*.safetensors")))
                console.print(
                    f"LoRA:   {run.folder.path / 'lora'} ({names})", highlight=False, markup=False, soft_wrap=True
                )
            if evaluation is not None:
                console.print(verdict(evaluation.result), highlight=False, markup=False, soft_wrap=True)
            console.print(f"Report: {report}", highlight=False, markup=False, soft_wrap=True)
        distributed.barrier()
    except Preempted as asked:
        if rank == 0:
            print(f"inpo_fast.train: stopped by {asked}; continue with --resume", file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except OSError as problem:  # of metrics, pictures, TensorBoard; checkpoints and models say more themselves
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"{problem.filename or config.output}: {problem.strerror}; free some space and continue with --resume: "
            "the last checkpoint is complete"
        ) from problem
    finally:
        if run is not None:
            run.checkpoints.end()
            run.folder.release()
        if not isinstance(sys.exc_info()[1], Hang):  # leaving the group would wait for the process that hangs
            distributed.stop()


if __name__ == "__main__":
    run_command("inpo_fast.train", main)
