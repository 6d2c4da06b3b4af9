"""Latents and text embeddings of a run, before it: the VAE and the text encoders then need not run while training.

    torchrun --nproc-per-node 8 -m inpo_fast.cache --config configs/sd15.yaml --data.cache CACHE [--group.key=value …]
    torchrun --nproc-per-node 8 -m inpo_fast.train --config configs/sd15.yaml --data.cache CACHE

Makes what this very configuration will draw in its train.steps x train.pairs_per_step positions. Interrupted, it goes
on where it stopped; shards are written whole or not at all.
"""

import contextlib
from pathlib import Path

from inpo_fast.runtime.errors import UserError, run_command
from inpo_fast.runtime.outputs import check_folder


def main() -> None:
    from inpo_fast.config import parse

    config = parse("python -m inpo_fast.cache")
    if not config.data.cache:
        raise UserError("data.cache names no folder; give --data.cache FOLDER")
    check_folder("data.cache", Path(config.data.cache))
    from rich.console import Console

    from inpo_fast.caches.precompute import alone, fill
    from inpo_fast.models.loading import open_pipeline, quiet_libraries
    from inpo_fast.models.models import Models
    from inpo_fast.runtime import distributed

    quiet_libraries()
    rank, world, device = distributed.start(config.train.patience_minutes)
    console = Console()
    folder = Path(config.data.cache)
    try:
        with alone(folder) if rank == 0 else contextlib.nullcontext():
            models = Models(open_pipeline(config.models), device, config.models)
            pairs = config.train.steps * config.train.pairs_per_step
            latents = fill(config.data, models, rank, world, console, seed=config.seed, pairs=pairs)
        if rank == 0:
            pairs, prompts = (len(store) for store in latents.reopened())  # what the others wrote, too
            there = f"{pairs:,} pairs and {prompts:,} prompts"
            console.print(f"{there} in {folder}", highlight=False, markup=False)
    finally:
        distributed.stop()


if __name__ == "__main__":
    run_command("python -m inpo_fast.cache", main, "the same command goes on")
