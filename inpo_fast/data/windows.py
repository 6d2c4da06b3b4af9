"""The pairs of one optimizer step on this rank, decoded ahead of time in a background thread."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from inpo_fast import draws
from inpo_fast.data.images import View, decode, make_view
from inpo_fast.data.order import pair_index, window_positions
from inpo_fast.data.sources import BadPair, Format, Source
from inpo_fast.refusal import Refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Where the preference pairs come from and how an image becomes a training view."""

    source: str = ""
    """A parquet file or folder in the Pick-a-Pic v2 schema, or a folder with metadata.jsonl."""
    format: Format = "auto"
    """auto: a folder with metadata.jsonl is read as such, anything else as parquet."""
    resolution: int | None = None
    """Pixels per side. None: the model's own (UNet sample size times the VAE's factor)."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut out after the short side was resized."""
    flip: bool = True
    """Mirror each image with probability 1/2; the two images of a pair independently (as published)."""
    prompt_dropout: float = 0.0
    """Share of prompts replaced by the empty one. The published script: 0.2; the paper does not mention it."""
    vae_sample: bool = True
    """Draw latents from the VAE's posterior (as published), or take its mean."""
    max_pixels: int = 50_000_000
    """A larger image is dropped with its pair (decompression bombs)."""
    bad_pair_limit: float = 0.001
    """Stop when more than this share of the pairs read so far had to be dropped (never before the second)."""
    workers: int = 2
    """Threads that decode images."""
    cache: str | None = None
    """Folder of latents and text embeddings that `python -m inpo_fast.cache` made for this very configuration."""


@dataclass(frozen=True)
class Item:
    """One pair, ready for the VAE and the text encoder."""

    position: int
    id: str
    prompt: str
    winner: View
    loser: View
    label: float = 1.0
    weight: float = 1.0
    x_0: torch.Tensor | None = None  # (2, C, h, w) latents from a cache; the views then have no pixels


class Ready(Protocol):
    """Pairs that need not be decoded."""

    def item(self, position: int) -> Item | None:
        """The pair at a position, None where it is not known. BadPair where it was found broken."""
        ...


class Windows:
    """Iterates over steps and yields each step's usable pairs of this rank; the next step is read meanwhile."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        resolution: int,
        seed: int,
        rank: int,
        world: int,
        ready: Ready | None = None,
    ):
        self.source, self.config, self.resolution, self.ready = source, config, resolution, ready
        self.seed, self.rank, self.world = seed, rank, world
        self.seen = 0
        self.dropped: list[str] = []

    def steps(self, first: int, last: int, pairs_per_step: int) -> Iterator[list[Item]]:
        """Windows of steps first .. last - 1."""
        with ThreadPoolExecutor(max(1, self.config.workers)) as pool:
            ahead = self._submit(pool, first, pairs_per_step) if first < last else []
            for step in range(first, last):
                current = ahead
                ahead = self._submit(pool, step + 1, pairs_per_step) if step + 1 < last else []
                yield self._collect(current)

    def _submit(self, pool: ThreadPoolExecutor, step: int, pairs_per_step: int) -> list["Future[Item]"]:
        positions = window_positions(step, pairs_per_step, self.rank, self.world)
        return [pool.submit(self.load, position) for position in positions]

    def load(self, position: int) -> Item:
        """The pair at a position. BadPair with its id if any part of it is unusable."""
        if self.ready is not None and (item := self.ready.item(position)) is not None:
            return item
        index = pair_index(position, len(self.source), self.seed)
        key = (self.seed, position)
        pair = self.source.read(index)
        try:
            winner, loser = (self._view(image, (*key, side)) for side, image in enumerate((pair.winner, pair.loser)))
        except BadPair as problem:
            raise BadPair(f"{pair.id}: {problem}") from problem
        dropout = draws.uniform("prompt", *key) < self.config.prompt_dropout
        prompt = "" if dropout else pair.prompt
        return Item(position, pair.id, prompt, winner, loser, pair.label, pair.weight)

    def _view(self, encoded: bytes, key: draws.Key) -> View:
        return make_view(
            decode(encoded, self.config.max_pixels),
            self.resolution,
            flip=self.config.flip and draws.uniform("flip", *key) < 0.5,
            crop=self.config.crop,
            draw=(draws.uniform("top", *key), draws.uniform("left", *key)),
        )

    def _collect(self, futures: list["Future[Item]"]) -> list[Item]:
        items = []
        for future in futures:
            self.seen += 1
            try:
                items.append(future.result())
            except BadPair as problem:
                self.dropped.append(str(problem))
                log.warning("dropped pair %s", problem)
        allowed = max(1, self.config.bad_pair_limit * self.seen)
        if len(self.dropped) > allowed:
            raise Refusal(
                f"{len(self.dropped)} of {self.seen} pairs are unusable, more than data.bad_pair_limit="
                f"{self.config.bad_pair_limit:g}; last: {self.dropped[-1]}. Mend the data or raise the limit"
            )
        return items
