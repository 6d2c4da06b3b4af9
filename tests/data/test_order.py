"""draws and order against their definitions: keyed, stateless, stable; an epoch is a permutation on any number of
processes.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from inpo_fast.data.order import Order, describe, make_order, pair_index, permuted, step_positions
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError

quick = settings(max_examples=40, deadline=None, database=None, phases=[Phase.explicit, Phase.generate])
seeds = st.integers(0, 2**63)


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    return [pair_index(epoch * size + i, size, seed) for i in range(size)]


@quick
@given(size=st.integers(1, 500), seed=seeds, epoch=st.integers(0, 9))
def test_every_epoch_visits_each_pair_once(size, seed, epoch):
    assert sorted(epoch_order(size, seed, epoch)) == list(range(size))


@quick
@given(size=st.integers(1, 500), key=st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=3))
def test_permuted_is_a_bijection_for_any_key(size, key):
    assert sorted(permuted(i, size, tuple(key)) for i in range(size)) == list(range(size))


@quick
@given(size=st.integers(16, 500), seed=seeds)
def test_order_differs_by_epoch_and_by_seed(size, seed):
    first = epoch_order(size, seed, 0)
    assert first == epoch_order(size, seed, 0)
    assert first != epoch_order(size, seed, 1)
    assert first != epoch_order(size, seed + 1, 0)
    assert first != list(range(size))


def test_order_has_no_favourites():
    """1000 epochs of 20 pairs (an odd number of bits): each pair stands at each place 50 times on average, standard
    deviation 6.9.
    """
    orders = [epoch_order(20, 0, epoch) for epoch in range(1000)]
    for place in range(20):
        count = Counter(order[place] for order in orders)
        assert min(count[i] for i in range(20)) > 50 - 5 * 6.9
        assert max(count.values()) < 50 + 5 * 6.9


def test_neighbours_do_not_stay_together():
    """Of 399 neighbours in the order hardly any are neighbours in the data: 2 expected, a mere shift would have 398."""
    order = epoch_order(400, 3, 0)
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 10


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_out_the_positions_of_a_step(world):
    shares = [step_positions(3, 8, rank, world) for rank in range(world)]
    assert sorted(position for share in shares for position in share) == list(range(24, 32))
    assert {len(share) for share in shares} == {8 // world}


@quick
@given(pairs=st.integers(1, 40), world=st.integers(1, 9), steps=st.integers(1, 6))
def test_steps_of_all_ranks_tile_the_positions(pairs, world, steps):
    taken = [p for step in range(steps) for rank in range(world) for p in step_positions(step, pairs, rank, world)]
    assert sorted(taken) == list(range(pairs * steps))


def test_hash_key_is_pinned():
    """The same on every machine and in every version: a change here changes every run ever made."""
    assert keyed_rng.hash_key("order", 7, 0) == 2078977217076736728
    assert keyed_rng.hash_key() == 6510301506637419378
    assert keyed_rng.integer(0, 999, "t", 3) == 679
    assert keyed_rng.uniform("flip", 0, 1, 0) == 0.18849335196573946


def test_keys_that_look_alike_differ():
    numbers = [(1, 23), (12, 3), (123,), (1, 2, 3), (3, 2, 1), ("1", 23), (1, "23"), ()]
    texts = [("ab", "c"), ("a", "bc"), ("abc",), ("astr:bc",)]
    keys = [*numbers, *texts]
    assert len({keyed_rng.hash_key(*key) for key in keys}) == len(keys)


def test_hash_key_has_63_bits():
    values = [keyed_rng.hash_key("bits", i) for i in range(2000)]
    assert all(0 <= value < 2**63 for value in values)
    for bit in range(63):
        assert 800 < sum(value >> bit & 1 for value in values) < 1200  # 1000 expected, standard deviation 22


@pytest.mark.parametrize(("low", "high"), [(0, 9), (100, 105), (7, 7), (-2, 2)])
def test_integer_is_uniform_with_both_ends(low, high):
    n, size = 20_000, high - low + 1
    count = Counter(keyed_rng.integer(low, high, "integer", i) for i in range(n))
    assert set(count) == set(range(low, high + 1))
    chi_square = sum((c - n / size) ** 2 / (n / size) for c in count.values())
    assert chi_square <= 3.5 * max(1, size - 1)  # p < 1e-3 for these sizes


def test_uniform_fills_the_unit_interval():
    values = torch.tensor([keyed_rng.uniform("uniform", i) for i in range(20_000)], dtype=torch.float64)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert torch.allclose(torch.histc(values, 10, 0, 1), torch.full((10,), 2000.0, dtype=torch.float64), atol=200)


def test_normal_depends_on_the_key_alone():
    torch.manual_seed(0)
    first = keyed_rng.normal((3, 5), "eta", 4)
    expected_next = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(first, keyed_rng.normal((3, 5), "eta", 4))
    torch.manual_seed(0)
    keyed_rng.normal((3, 5), "eta", 5)
    assert torch.equal(torch.rand(1), expected_next)  # torch's own generator is neither read nor moved
    assert not torch.equal(first, keyed_rng.normal((3, 5), "eta", 5))
    assert first.dtype == torch.float32
    large = keyed_rng.normal((100_000,), "eta", 6)
    assert abs(large.mean()) < 0.02
    assert abs(large.std() - 1) < 0.02


def test_normals_are_the_single_draws_stacked():
    keys = [("vae", 0, 1), ("vae", 1, 0), ("eta", 0, 1)]
    together = keyed_rng.normals((2, 3), keys)
    assert together.shape == (3, 2, 3)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, keyed_rng.normal((2, 3), *key))


# ---- the order by blocks -------------------------------------------------------------------------

sizes_of_blocks = st.lists(st.integers(1, 12), min_size=1, max_size=40)
some_empty = st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any)  # as a filter may leave them


def by_blocks(sizes: list[int], blocks_per_run: int, seed: int = 0) -> Order:
    return Order(sum(sizes), seed, np.cumsum(sizes), blocks_per_run)


def epoch_of(order: Order, epoch: int) -> list[int]:
    return [order.index(epoch * order.size + i) for i in range(order.size)]


def blocks_of(order: Order, indices: list[int]) -> list[int]:
    return np.searchsorted(order.blocks, indices, "right").tolist()


@quick
@given(sizes=sizes_of_blocks | some_empty, run=st.integers(1, 50), seed=seeds, epoch=st.integers(0, 9))
def test_every_epoch_by_blocks_visits_each_pair_once(sizes, run, seed, epoch):
    assert sorted(epoch_of(by_blocks(sizes, run, seed), epoch)) == list(range(sum(sizes)))


@quick
@given(sizes=sizes_of_blocks, run=st.integers(1, 50), seed=seeds, asked=st.lists(st.integers(0, 2000), max_size=30))
def test_index_has_no_memory(sizes, run, seed, asked):
    """Asked in any order, of one object or of a fresh one each: the same."""
    order = by_blocks(sizes, run, seed)
    assert [order.index(p) for p in asked] == [by_blocks(sizes, run, seed).index(p) for p in asked]


@quick
@given(sizes=sizes_of_blocks, run=st.integers(1, 9), seed=seeds)
def test_reading_needs_two_runs_of_blocks_in_memory(sizes, run, seed):
    """Each block's pairs lie within one run, and a run has at most blocks_per_run blocks, its pairs together."""
    order = by_blocks(sizes, run, seed)
    blocks = blocks_of(order, epoch_of(order, 0))
    first, last = {}, {}
    for position, block in enumerate(blocks):
        first.setdefault(block, position)
        last[block] = position
    open_now = [sum(first[b] <= position <= last[b] for b in first) for position in range(len(blocks))]
    assert max(open_now) <= run
    runs = -(-len(sizes) // run)
    lengths = np.diff([(i * len(sizes)) // runs for i in range(runs + 1)])
    assert max(lengths) <= run and max(lengths) - min(lengths) <= 1
    begin = 0
    seen = list(dict.fromkeys(blocks))
    for length in lengths:  # the next run begins only when this one's pairs are all used up
        own, seen = set(seen[:length]), seen[length:]
        end = begin + sum(sizes[b] for b in own)
        assert set(blocks[begin:end]) == own
        begin = end


def test_order_by_blocks_differs_by_epoch_and_by_seed_in_blocks_and_in_rows():
    order = by_blocks([10] * 30, 3)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert first != second != epoch_of(order, 2)
    assert first != epoch_of(by_blocks([10] * 30, 3, seed=1), 0)
    groups = [[frozenset(blocks_of(order, epoch[i : i + 30])) for i in range(0, 300, 30)] for epoch in (first, second)]
    assert all(len(g) == 3 for epoch in groups for g in epoch)
    assert len(set(groups[0]) & set(groups[1])) < 3  # other blocks come together
    one = by_blocks([40], 1)
    assert epoch_of(one, 0) != epoch_of(one, 1) != list(range(40))  # of a single block the rows still move


def test_order_by_blocks_has_no_favourites():
    """1200 epochs of 12 pairs: each stands at each place 100 times on average, standard deviation 9.6."""
    order = by_blocks([3, 3, 3, 3], 2)
    count = Counter((place, index) for e in range(1200) for place, index in enumerate(epoch_of(order, e)))
    assert len(count) == 144
    assert min(count.values()) > 100 - 5 * 9.6 and max(count.values()) < 100 + 5 * 9.6


def test_neighbours_within_a_run_do_not_stay_together():
    order = epoch_of(by_blocks([100] * 4, 4), 0)
    assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 10
    blocks = blocks_of(by_blocks([100] * 4, 4), order)
    assert 60 < sum(a == b for a, b in pairwise(blocks)) < 140  # 99 expected: the four are mixed


PINNED = (
    [8, 9, 4, 7, 5, 3, 6, 11, 12, 10, 14, 13, 1, 0, 2],
    [10, 12, 14, 13, 11, 1, 6, 5, 7, 0, 2, 4, 3, 9, 8],
)


def test_order_by_blocks_is_pinned():
    """A change here changes every run ever made by blocks."""
    order = by_blocks([3, 1, 4, 2, 5], 2, seed=7)
    assert epoch_of(order, 0) == PINNED[0]
    assert epoch_of(order, 3) == PINNED[1]


class Facts:
    """What an order looks at."""

    ties = 0

    def __init__(self, pairs: int, blocks: int | None, size: int):
        self.pairs, self.bytes = pairs, size
        self.blocks = None if blocks is None else np.linspace(0, pairs, blocks + 1).astype(np.int64)[1:]

    def __len__(self) -> int:
        return self.pairs


MIB = 2**20
# pairs, blocks, bytes, data.shuffle -> blocks per run; None: the full order
CHOICES = [
    ((851_293, 960, 300 * 2**30, "auto"), 4),  # Pick-a-Pic: 320 MiB a block
    ((100_000, 100, 600 * MIB, "auto"), 9),  # small pictures: 8192 pairs
    ((100_000, 1000, 20 * 2**30, "auto"), 50),  # 20 MiB a block: 1 GiB
    ((3_000, 3, 1024 * MIB, "auto"), 3),  # all of them
    ((10_000, 10, 256 * MIB, "auto"), None),
    ((10_000, 10, 257 * MIB, "auto"), 9),
    ((10_000, 10, 10 * MIB, "blocks"), 9),
    ((851_293, 960, 300 * 2**30, "full"), None),
    ((10_000, None, 0, "auto"), None),
]


@pytest.mark.parametrize(("asked", "expected"), CHOICES)
def test_choice_of_the_order(asked, expected):
    pairs, blocks, size, shuffle = asked
    order = make_order(Facts(pairs, blocks, size), shuffle, seed=3)
    if expected is None:
        assert order.blocks is None
        assert describe(order) == {"shuffle": "full"}
        assert [order.index(p) for p in (0, 1, pairs)] == [pair_index(p, pairs, 3) for p in (0, 1, pairs)]
    else:
        assert describe(order) == {"shuffle": "blocks", "blocks": blocks, "blocks_per_run": expected}
        assert {order.index(p) for p in (0, pairs - 1)} <= set(range(pairs))


def test_source_that_says_nothing_of_blocks_gets_the_full_order():
    assert make_order(list(range(10)), "auto", 0).blocks is None
    with pytest.raises(UserError, match=r"data\.shuffle=blocks: any pair of this source can be read alone; take full"):
        make_order(Facts(10, None, 0), "blocks", 0)
