"""Which pair stands at which position: a stateless permutation of each epoch.

The state of the data is one integer, the number of pairs consumed; it means the same on any number of processes. A
pair found broken leaves its position empty and shifts nothing. There are two orders:

full    every pair may follow every other one: a Feistel permutation of the epoch's pairs.
blocks  for pairs that are read in blocks (row groups). The blocks are permuted and cut into runs of several; each
        run's pairs are permuted among themselves. Whoever reads in this order needs one run's blocks in memory, two
        where one run ends and the next begins.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from inpo_fast.data.config import Shuffle
from inpo_fast.data.pair import Source
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError

ROUNDS = 6
FULL_BYTES = 256 * 2**20  # auto: a source of blocks up to this size is read into memory whole
RUN_PAIRS = 8192  # a run holds as many pairs, a few optimizer steps',
RUN_BYTES = 2**30  # unless they are larger than this,
RUN_BLOCKS = 4  # and never fewer blocks


@dataclass(frozen=True)
class Order:
    """size: pairs of an epoch. blocks: (B,) where each block of neighbouring indices ends, None: the full order."""

    size: int
    seed: int
    blocks: np.ndarray | None = None
    blocks_per_run: int = 1

    def __post_init__(self):
        # numbers of each epoch's blocks and where they end in it, where its runs do: looked up, not part of the state
        object.__setattr__(self, "_epoch", lru_cache(maxsize=4)(self._lay_out))

    def index(self, position: int) -> int:
        """Index in 0..size-1 of the pair at `position` 0, 1, 2, … (each epoch visits every pair once).

        O(log blocks), after O(blocks) for the first position of an epoch that is asked for.
        """
        if self.blocks is None:
            return pair_index(position, self.size, self.seed)
        epoch, within = divmod(position, self.size)
        blocks, ends, run_ends = self._epoch(epoch)
        run = int(np.searchsorted(run_ends, within, "right"))
        begin, end = (int(run_ends[run - 1]) if run else 0), int(run_ends[run])
        within = begin + permuted(within - begin, end - begin, ("rows", self.seed, epoch, run))
        place = int(np.searchsorted(ends, within, "right"))
        return int(self.blocks[blocks[place]]) - int(ends[place]) + within  # both are ends of the same block

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(self.blocks)
        blocks = np.array([permuted(i, count, ("blocks", self.seed, epoch)) for i in range(count)])
        ends = np.cumsum(np.diff(self.blocks, prepend=0)[blocks])
        runs = -(-count // self.blocks_per_run)  # of equal length, give or take a block
        return blocks, ends, ends[[(run + 1) * count // runs - 1 for run in range(runs)]]


def make_order(source: Source, shuffle: Shuffle, seed: int) -> Order:
    """What data.shuffle asks for. It depends on the source's own facts, never on cache, workers or processes."""
    blocks = getattr(source, "blocks", None)
    if shuffle == "blocks" and blocks is None:
        raise UserError("data.shuffle=blocks: any pair of this source can be read alone; take full, or auto")
    whole = blocks is None or (shuffle == "auto" and source.bytes <= FULL_BYTES)
    if shuffle == "full" or whole:
        return Order(len(source), seed)
    return Order(len(source), seed, blocks, blocks_per_run(len(source), len(blocks), source.bytes))


def blocks_per_run(pairs: int, blocks: int, bytes: int) -> int:
    """How many blocks are mixed at a time."""
    wanted = -(-RUN_PAIRS * blocks // pairs)
    fits = RUN_BYTES * blocks // max(1, bytes)
    return min(blocks, max(RUN_BLOCKS, min(wanted, fits)))


def describe(order: Order) -> dict[str, str | int]:
    """For a run's manifest."""
    if order.blocks is None:
        return {"shuffle": "full"}
    return {"shuffle": "blocks", "blocks": len(order.blocks), "blocks_per_run": order.blocks_per_run}


def pair_index(position: int, size: int, seed: int) -> int:
    """Index in 0..size-1 of the pair at `position` in the full order."""
    epoch, within = divmod(position, size)
    return permuted(within, size, ("order", seed, epoch))


def permuted(i: int, size: int, key: keyed_rng.Key) -> int:
    """A bijection of 0..size-1 chosen by the key: a balanced Feistel network, walked until inside the range."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (keyed_rng.hash_key(*key, number, right) & mask)
        i = left << half | right
        if i < size:
            return i


def step_positions(step: int, pairs_per_step: int, rank: int, world: int) -> range:
    """The positions of an optimizer step that belong to this rank: every world-th, so that ranks get equal work."""
    start = step * pairs_per_step
    return range(start + rank, start + pairs_per_step, world)
