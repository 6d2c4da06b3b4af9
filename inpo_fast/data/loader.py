"""The pairs of one optimizer step on this rank, decoded ahead of time in background threads."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Protocol

import torch

from inpo_fast.data.balance import fair_shares
from inpo_fast.data.config import DataConfig
from inpo_fast.data.filters import filtered
from inpo_fast.data.images import View, decode, make_view
from inpo_fast.data.labels import check_undecided, undecided_of
from inpo_fast.data.order import FULL_BYTES, make_order, step_positions
from inpo_fast.data.pair import BadPair, Pair, Source
from inpo_fast.data.relabelled import RelabelledSource
from inpo_fast.data.sources import open_source
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)


def open_data(config: DataConfig) -> Source:
    """The pairs that a run trains on. UserError where there are none."""
    source = open_source(config.source, config.format, images=config.images, cache_mb=config.cache_mb)
    rows = len(source) + sum(astuple(undecided_of(source))[:3])
    if config.labels is not None:
        source = RelabelledSource(source, config.labels, config.labels_as)
    check_undecided(source, rows, config.bad_pair_limit)
    return filtered(source, config.filters)


@dataclass(frozen=True)
class Item:
    """One pair, ready for the VAE and the text encoder. position: its global sample index, counted over all steps and
    processes."""

    position: int
    id: str
    prompt: str
    winner: View
    loser: View
    label: float = 1.0
    weight: float = 1.0
    x_0: torch.Tensor | None = None  # (2, C, h, w) latents from a cache; the views then have no pixels


class CachedItems(Protocol):
    """Pairs that need not be decoded."""

    def item(self, position: int) -> Item | None:
        """The pair at a position, None where it is not known. BadPair where it was found broken."""
        ...


class OnlinePairs(Protocol):
    """Pairs of the policy's own pictures that take the place of stored ones for a while."""

    def pair(self, position: int) -> Pair | None:
        """None where the stored pair stays."""
        ...


class PairLoader:
    """Iterates over steps and yields each step's usable pairs of this rank; what comes next is read meanwhile."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        resolution: int,
        seed: int,
        rank: int,
        world: int,
        cached: CachedItems | None = None,
        costs: Callable[[Sequence[int]], Sequence[int]] | None = None,
        online: OnlinePairs | None = None,
    ):
        """costs: what pairs at given positions will take; where it is given, processes get shares of equal cost."""
        self.costs, self.online = costs, online
        self.source, self.config, self.resolution, self.cached = source, config, resolution, cached
        self.seed, self.rank, self.world = seed, rank, world
        self.order = make_order(source, config.shuffle, seed)
        if self.order.blocks is None and getattr(source, "bytes", 0) > FULL_BYTES and config.cache_mb is None:
            warn_once(
                log,
                "data.shuffle=full: a row group is read for nearly every pair; take blocks, or keep all of them with "
                "data.cache_mb=%d",
                1.1 * source.bytes / 2**20,
            )
        # two RGB views a pair; below the number of threads some would have nothing to do
        self.prefetch = max(1, config.workers, config.prefetch_mb * 2**20 // (6 * resolution**2))
        self.seen = 0
        self.dropped: list[str] = []

    def steps(self, first: int, last: int, pairs_per_step: int) -> Iterator[list[Item]]:
        """The pairs of steps first .. last - 1.

        In memory: those of the step that is being filled and, decoded or under way, at most `prefetch` pairs beyond it.
        """
        positions = (p for step in range(first, last) for p in self._share(step, pairs_per_step))
        ahead: deque[Future[Item]] = deque()
        pool = ThreadPoolExecutor(max(1, self.config.workers))

        def fill() -> None:
            while len(ahead) < self.prefetch and (position := next(positions, None)) is not None:
                ahead.append(pool.submit(self.load, position))

        try:
            for step in range(first, last):
                items = []
                for _ in self._share(step, pairs_per_step):
                    fill()
                    items += self._take(ahead.popleft())
                fill()
                self._stop_if_too_many()
                yield items
        finally:
            pool.shutdown(cancel_futures=True)

    def _share(self, step: int, pairs_per_step: int) -> Sequence[int]:
        """The positions of a step that this process reads."""
        if self.costs is None or self.world == 1:
            return step_positions(step, pairs_per_step, self.rank, self.world)
        whole = step_positions(step, pairs_per_step, 0, 1)
        return [whole[index] for index in fair_shares(self.costs(whole), self.world)[self.rank]]

    def load(self, position: int) -> Item:
        """The pair at a position. BadPair with its id if any part of it is unusable."""
        pair = None if self.online is None else self.online.pair(position)
        if pair is None and self.cached is not None and (item := self.cached.item(position)) is not None:
            return item
        return self.viewed(position, pair or self.stored(position))

    def stored(self, position: int) -> Pair:
        """The pair of the source at a position. BadPair where it cannot be read."""
        return self.source.read(self.order.index(position))

    def viewed(self, position: int, pair: Pair) -> Item:
        """Decoded and cut as the run sees it at a position. BadPair with its id."""
        key = (self.seed, position)
        try:
            winner, loser = (self._view(image, (*key, side)) for side, image in enumerate((pair.winner, pair.loser)))
        except BadPair as problem:
            raise BadPair(f"{pair.id}: {problem}") from problem
        dropout = keyed_rng.uniform("prompt", *key) < self.config.prompt_dropout
        prompt = "" if dropout else pair.prompt
        return Item(position, pair.id, prompt, winner, loser, pair.label, pair.weight)

    def prompt(self, position: int) -> str:
        """Of the stored pair at a position. BadPair where it cannot be read."""
        return self.stored(position).prompt

    def _view(self, encoded: bytes, key: keyed_rng.Key) -> View:
        return make_view(
            decode(encoded, self.config.max_pixels),
            self.resolution,
            flip=self.config.flip and keyed_rng.uniform("flip", *key) < 0.5,
            crop=self.config.crop,
            draw=(keyed_rng.uniform("top", *key), keyed_rng.uniform("left", *key)),
        )

    def _take(self, future: "Future[Item]") -> list[Item]:
        """The pair, or nothing if it is a bad one."""
        self.seen += 1
        try:
            return [future.result()]
        except BadPair as problem:
            self.dropped.append(str(problem))
            log.warning("dropped pair %s", problem)
            return []

    def _stop_if_too_many(self) -> None:
        allowed = max(1, self.config.bad_pair_limit * self.seen)
        if len(self.dropped) > allowed:
            raise UserError(
                f"{len(self.dropped)} of {self.seen} pairs are unusable, more than data.bad_pair_limit="
                f"{self.config.bad_pair_limit:g}; last: {self.dropped[-1]}. Mend the data or raise the limit"
            )


def side_keys(items: list[Item], seed: int, sides: int) -> list[keyed_rng.Key]:
    """What is drawn for each image is drawn from this: (seed, global sample index, side)."""
    return [(seed, item.position, side) for item in items for side in range(sides)]
