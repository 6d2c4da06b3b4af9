"""Fills data.cache: a run's latents and text embeddings, before the run (`python -m inpo_fast.cache`).

Shards are written whole or not at all, so an interrupted filling goes on where it stopped.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from inpo_fast.caches.encode import encode_views
from inpo_fast.caches.latent_cache import LatentCache, content_of
from inpo_fast.data.loader import DataConfig, Item, PairLoader, open_data, side_keys
from inpo_fast.data.order import make_order
from inpo_fast.data.pair import BadPair, Source
from inpo_fast.models.models import Models
from inpo_fast.runtime import distributed
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.memory import GIB, TooLarge
from inpo_fast.runtime.record_store import ROWS

BESIDE = 640  # bytes of a record beside its tensors, at most: key, checksums, what an item says (id, prompt, sizes)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One filling process group a folder. UserError while another is at it; a killed one leaves no lock behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as problem:
        why = "is a file" if folder.exists() and not folder.is_dir() else f"cannot be written ({problem.strerror})"
        raise UserError(f"data.cache={folder} {why}; name a folder") from problem
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise UserError(
                f"{folder} is being filled by another process; wait for it or name another one"
            ) from problem
        yield


def check_room(latents: LatentCache, missing: int, record: int, prompts: int, text: int, console: Console) -> None:
    """Prints the need and the room; UserError where it does not fit. record, text: bytes of a pair and of a prompt."""
    need = missing * (record + BESIDE) + prompts * (text + BESIDE)
    free = shutil.disk_usage(latents.folder).free
    what = (
        f"data.cache: at most {need / GIB:.3g} GiB for {missing:,} pairs and {prompts:,} prompts "
        f"({len(latents.latent_store):,} and {len(latents.text_store):,} there), {free / GIB:.3g} GiB free on the disk "
        f"of {latents.folder}"
    )
    console.print(what, highlight=False, markup=False, soft_wrap=True)
    if need > free:
        raise UserError(f"{what}; take another disk or fewer train.steps")


def different_prompts(source: Source) -> int:
    return len({hash(record["prompt"]) for record in source.facts(())})


def fill(
    config: DataConfig, models: Models, rank: int, world: int, console: Console, *, seed: int, pairs: int
) -> LatentCache:
    """Everything that is not there yet of a run's first `pairs` positions. Every rank takes every world-th shard."""
    source = open_data(config)
    resolution = models.training_side(config.resolution)
    latents = LatentCache(Path(config.cache), models, config, source, resolution, seed)
    if rank == 0:
        latents.start()
        latents.check_pairs(source, make_order(source, config.shuffle, seed))
    distributed.barrier()
    groups = [range(lo, min(lo + ROWS, pairs)) for lo in range(0, pairs, ROWS)]
    todo = [[p for p in group if not latents.has(p)] for group in groups]
    shape = (2, *models.latent_shape(resolution))
    if rank == 0:
        missing = sum(map(len, todo))
        prompts = max(0, different_prompts(source) + 1 - len(latents.text_store)) if missing else 0  # and the empty one
        empty = models.encode_empty()
        text = sum(x.nbytes for x in empty.tensors.values())
        check_room(latents, missing, 4 * prod(shape), min(missing, prompts), text, console)
    loader = PairLoader(source, config, resolution=resolution, seed=seed, rank=rank, world=world)
    count = TextColumn("{task.completed}/{task.total} pairs")
    columns = (TextColumn("cache"), BarColumn(), count, TimeRemainingColumn())
    mine = [positions for positions in todo[rank::world] if positions]
    with Progress(*columns, console=console, disable=rank != 0) as bar, ThreadPoolExecutor(config.workers) as pool:
        task = bar.add_task("", total=sum(map(len, mine)))
        for positions in mine:
            loaded = list(pool.map(lambda p: _load(loader, p), positions))
            found = [(position, item) for position, (item, _) in zip(positions, loaded, strict=True)]
            good = [item for item, _ in loaded if isinstance(item, Item)]
            x_0 = torch.zeros(len(found), *shape)
            if good:
                keys = side_keys(good, seed, 2)
                views = [view for item in good for view in (item.winner, item.loser)]
                try:
                    encoded = torch.cat(encode_views(views, keys, models, config.vae_sample, latents.vae_batch))
                except TooLarge as problem:  # not halved here: all latents of a folder are rounded alike
                    less = f"{problem.key}={problem.size // 2}" if problem.size > 1 else "a smaller data.resolution"
                    raise UserError(
                        f"out of memory at {problem.key}={problem.size}; take {less}, for the training too, and an "
                        "empty folder as data.cache"
                    ) from None
                here = torch.tensor([isinstance(item, Item) for _, item in found])
                x_0[here] = encoded.unflatten(0, (len(good), 2)).cpu()
                if new := latents.unknown_prompts([item.prompt for item in good]):
                    latents.add_prompts(new, models.encode_prompts(new))
            contents = [content for _, content in loaded]
            latents.add(found, contents, x_0)  # last: a group whose latents are there has its prompts too
            bar.update(task, advance=len(positions))
    distributed.barrier()
    return latents


def _load(loader: PairLoader, position: int) -> tuple[Item | str, list[str]]:
    """The pair as the run sees it, or what is wrong with it, and what it was made from."""
    pair = None
    try:
        pair = loader.stored(position)
        return loader.viewed(position, pair), content_of(pair)
    except BadPair as problem:
        return str(problem), content_of(pair)
