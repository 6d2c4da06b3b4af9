"""What is in a source of pairs, read and decoded as the trainer would (`python -m inpo_fast.validate`): counts, broken
and doubled images, sizes, how sure the labels are, and whether it is fit to train on.
"""

import hashlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field

from rich.console import Console
from rich.table import Table

from inpo_fast.data.config import DataConfig
from inpo_fast.data.images import decode
from inpo_fast.data.labels import undecided_of
from inpo_fast.data.order import make_order
from inpo_fast.data.pair import BadPair, Pair, Source
from inpo_fast.runtime.masking import masked

SAMPLES = 8  # pairs on the contact sheet
AHEAD = 64  # pairs that are read before they are looked at: bounds the memory
SHOWN = 20  # broken pairs that are named


@dataclass
class Findings:
    """Of the pairs that were looked at; `pairs`, `ties` and what filters did are of the whole source."""

    source: str
    pairs: int  # that pass the filters
    ties: int
    unlabelled: int = 0
    unclear_labels: int = 0  # numbers that are no two shares that add up to 1
    unclear_example: str = ""
    left_out: dict[str, int] = field(default_factory=dict)  # by a filter: reason -> pairs
    weighted: int = 0  # pairs whose weight a filter changed
    looked_at: int = 0
    broken: list[str] = field(default_factory=list)
    same_image: int = 0  # both sides of a pair are the same bytes
    repeated_images: int = 0  # images that occurred before, in any pair
    prompts: int = 0  # different ones
    empty_prompts: int = 0
    most_used_prompt: tuple[str, int] = ("", 0)
    sizes: dict[str, int] = field(default_factory=dict)  # "width x height" -> images
    smaller_than: int = 0  # images whose short side is below the training resolution: they are enlarged
    labels: dict[str, int] = field(default_factory=dict)  # how sure, in tenths -> pairs
    weight: float = 0.0  # mean
    bytes_per_pair: float = 0.0
    pairs_per_second: float = 0.0  # read and decoded, with `workers` threads
    workers: int = 0
    problems: list[str] = field(default_factory=list)  # why it is not fit


def examine(
    source: Source, name: str, config: DataConfig, *, resolution: int, limit: int | None, advance=lambda: None
) -> tuple[Findings, list[Pair]]:
    """All pairs, or `limit` of them in the trainer's own order; and a few for the contact sheet."""
    total = len(source)
    left = undecided_of(source)
    found = Findings(name, total, *astuple(left), workers=max(1, config.workers))
    found.left_out, found.weighted = getattr(source, "left_out", {}), getattr(source, "reweighted", 0)
    seen: set[bytes] = set()
    prompts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    samples: list[Pair] = []
    size, weight, begun = 0, 0.0, time.perf_counter()
    order = make_order(source, config.shuffle, 0)  # with a limit: what a run would meet first
    indices = range(total) if limit is None or limit >= total else (order.index(i) for i in range(limit))
    with ThreadPoolExecutor(found.workers) as pool:
        for pair in _bounded(pool, lambda index: _read(source, index, config.max_pixels), indices):
            advance()
            found.looked_at += 1
            if isinstance(pair, str):
                found.broken.append(pair)
                continue
            record, dimensions, digests = pair
            found.same_image += digests[0] == digests[1]
            found.repeated_images += sum(digest in seen for digest in set(digests))
            seen.update(digests)
            prompts[record.prompt] += 1
            found.empty_prompts += not record.prompt.strip()
            for width, height in dimensions:
                sizes[f"{width} x {height}"] += 1
                found.smaller_than += min(width, height) < resolution
            labels[f"{int(record.label * 10) / 10:.1f}"] += 1
            weight += record.weight
            size += len(record.winner) + len(record.loser)
            if len(samples) < SAMPLES:
                samples.append(record)
    good = found.looked_at - len(found.broken)
    found.prompts, found.most_used_prompt = len(prompts), max(prompts.items(), key=lambda x: x[1], default=("", 0))
    found.sizes, found.labels = dict(sizes.most_common()), dict(sorted(labels.items()))
    found.weight, found.bytes_per_pair = weight / max(1, good), size / max(1, good)
    found.pairs_per_second = found.looked_at / (time.perf_counter() - begun)
    found.problems = problems(found, config)
    return found, samples


def problems(found: Findings, config: DataConfig) -> list[str]:
    """What makes a source unfit: the trainer would stop, or learn from nothing."""
    out = []
    good = found.looked_at - len(found.broken)
    if not good:
        out.append(f"none of the {found.looked_at} pairs that were looked at is usable")
    elif len(found.broken) > max(1, config.bad_pair_limit * found.looked_at):
        out.append(
            f"{len(found.broken)} of {found.looked_at} pairs are broken, more than data.bad_pair_limit="
            f"{config.bad_pair_limit:g}: the trainer would stop"
        )
    if good and found.same_image > 0.01 * good:
        out.append(f"{found.same_image} pairs show the same image twice: nothing can be learned from them")
    if good and found.weight == 0:
        out.append("every pair has weight 0")
    return out


def _read(source: Source, index: int, max_pixels: int):
    """(pair, ((width, height), …), digests), or what is wrong with the pair."""
    try:
        pair = source.read(index)
    except BadPair as problem:
        return str(problem)
    try:
        dimensions = tuple(decode(image, max_pixels).size for image in (pair.winner, pair.loser))
    except BadPair as problem:
        return f"{pair.id}: {problem}"
    return pair, dimensions, tuple(hashlib.blake2b(x, digest_size=16).digest() for x in (pair.winner, pair.loser))


def _bounded(pool: ThreadPoolExecutor, function, items):
    """pool.map that holds at most AHEAD results."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == AHEAD:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def show(found: Findings, console: Console, pairs_per_step: int) -> None:
    table = Table(title=masked(found.source), title_justify="left", box=None, pad_edge=False, show_header=False)
    for column in ("", ""):
        table.add_column(column)
    share = found.ties / max(1, found.pairs + found.ties)
    good = found.looked_at - len(found.broken)
    rows = [
        ("pairs", f"{found.pairs:,} ({found.ties:,} ties left out, {share:.1%})"),
        *((("without a label", f"{found.unlabelled:,}"),) if found.unlabelled else ()),
        *((("labels that are none", f"{found.unclear_labels:,}"),) if found.unclear_labels else ()),
        *((f"left out: {reason}", f"{n:,}") for reason, n in found.left_out.items()),
        *((("weighted by filters", f"{found.weighted:,}"),) if found.weighted else ()),
        ("looked at", f"{found.looked_at:,}"),
        ("broken", f"{len(found.broken):,}"),
        ("prompts", f"{found.prompts:,} different; the most used one {found.most_used_prompt[1]:,} times"),
        ("empty prompts", f"{found.empty_prompts:,}"),
        ("same image on both sides", f"{found.same_image:,} pairs"),
        ("images seen before", f"{found.repeated_images:,}"),
        ("sizes", ", ".join(f"{name}: {n:,}" for name, n in list(found.sizes.items())[:5])),
        ("smaller than the resolution", f"{found.smaller_than:,} images (they are enlarged)"),
        ("how sure the labels are", ", ".join(f"{name}: {n:,}" for name, n in found.labels.items())),
        ("mean weight", f"{found.weight:.3g}"),
        ("size", f"{found.bytes_per_pair / 1024:.1f} KiB a pair, {found.bytes_per_pair * found.pairs / 2**30:.2f} GiB"),
        ("reading and decoding", f"{found.pairs_per_second:.1f} pairs/s with {found.workers} threads"),
        (
            "a run on it",
            f"an epoch is {found.pairs / pairs_per_step:.1f} steps of {pairs_per_step}; a step's pairs are read in "
            f"{pairs_per_step / found.pairs_per_second:.1f} s",
        ),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)
    if found.unclear_labels:
        what = f"no two shares that add up to 1: {found.unclear_example}"
        console.print(what, markup=False, highlight=False, soft_wrap=True)
    for what in found.broken[:SHOWN]:
        console.print(f"broken: {what}", markup=False, highlight=False, soft_wrap=True)
    if len(found.broken) > SHOWN:
        console.print(f"and {len(found.broken) - SHOWN} more")
    for problem in found.problems:
        console.print(f"NOT FIT: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if not found.problems:
        part = "" if found.looked_at == found.pairs else f", by {found.looked_at:,} of its pairs"
        console.print(f"fit to train on{part}: {good:,} good pairs seen", highlight=False)
