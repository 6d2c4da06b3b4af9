"""Which pair stands at which position: a stateless permutation of each epoch.

The state of the data is one integer, the number of pairs consumed; it means the same on any number
of processes. A pair found broken leaves its position empty and shifts nothing.
"""

from inpo_fast import draws

ROUNDS = 6


def pair_index(position: int, size: int, seed: int) -> int:
    """Index in 0..size-1 of the pair at `position` 0, 1, 2, … (each epoch visits every pair once)."""
    epoch, within = divmod(position, size)
    return permuted(within, size, ("order", seed, epoch))


def permuted(i: int, size: int, key: draws.Key) -> int:
    """A bijection of 0..size-1 chosen by the key: a balanced Feistel network, walked until inside the range."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (draws.hash_key(*key, number, right) & mask)
        i = left << half | right
        if i < size:
            return i


def window_positions(step: int, pairs_per_step: int, rank: int, world: int) -> range:
    """The positions of an optimizer step that belong to this rank: every world-th, so that ranks get equal work."""
    start = step * pairs_per_step
    return range(start + rank, start + pairs_per_step, world)
