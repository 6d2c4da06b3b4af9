"""draws and order against their definitions: keyed, stateless, stable; an epoch is a permutation on any number of
processes.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from inpo_fast import draws
from inpo_fast.data.order import pair_index, permuted, window_positions

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
    shares = [window_positions(3, 8, rank, world) for rank in range(world)]
    assert sorted(position for share in shares for position in share) == list(range(24, 32))
    assert {len(share) for share in shares} == {8 // world}


@quick
@given(pairs=st.integers(1, 40), world=st.integers(1, 9), steps=st.integers(1, 6))
def test_steps_of_all_ranks_tile_the_positions(pairs, world, steps):
    taken = [p for step in range(steps) for rank in range(world) for p in window_positions(step, pairs, rank, world)]
    assert sorted(taken) == list(range(pairs * steps))


def test_hash_key_is_pinned():
    """The same on every machine and in every version: a change here changes every run ever made."""
    assert draws.hash_key("order", 7, 0) == 2078977217076736728
    assert draws.hash_key() == 6510301506637419378
    assert draws.integer(0, 999, "t", 3) == 679
    assert draws.uniform("flip", 0, 1, 0) == 0.18849335196573946


def test_keys_that_look_alike_differ():
    numbers = [(1, 23), (12, 3), (123,), (1, 2, 3), (3, 2, 1), ("1", 23), (1, "23"), ()]
    texts = [("ab", "c"), ("a", "bc"), ("abc",), ("astr:bc",)]
    keys = [*numbers, *texts]
    assert len({draws.hash_key(*key) for key in keys}) == len(keys)


def test_hash_key_has_63_bits():
    values = [draws.hash_key("bits", i) for i in range(2000)]
    assert all(0 <= value < 2**63 for value in values)
    for bit in range(63):
        assert 800 < sum(value >> bit & 1 for value in values) < 1200  # 1000 expected, standard deviation 22


@pytest.mark.parametrize(("low", "high"), [(0, 9), (100, 105), (7, 7), (-2, 2)])
def test_integer_is_uniform_with_both_ends(low, high):
    n, size = 20_000, high - low + 1
    count = Counter(draws.integer(low, high, "integer", i) for i in range(n))
    assert set(count) == set(range(low, high + 1))
    chi_square = sum((c - n / size) ** 2 / (n / size) for c in count.values())
    assert chi_square <= 3.5 * max(1, size - 1)  # p < 1e-3 for these sizes


def test_uniform_fills_the_unit_interval():
    values = torch.tensor([draws.uniform("uniform", i) for i in range(20_000)], dtype=torch.float64)
    assert 0 <= values.min() < 0.001
    assert 0.999 < values.max() < 1
    assert torch.allclose(torch.histc(values, 10, 0, 1), torch.full((10,), 2000.0, dtype=torch.float64), atol=200)


def test_normal_depends_on_the_key_alone():
    torch.manual_seed(0)
    first = draws.normal((3, 5), "eta", 4)
    expected_next = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(first, draws.normal((3, 5), "eta", 4))
    torch.manual_seed(0)
    draws.normal((3, 5), "eta", 5)
    assert torch.equal(torch.rand(1), expected_next)  # torch's own generator is neither read nor moved
    assert not torch.equal(first, draws.normal((3, 5), "eta", 5))
    assert first.dtype == torch.float32
    large = draws.normal((100_000,), "eta", 6)
    assert abs(large.mean()) < 0.02
    assert abs(large.std() - 1) < 0.02


def test_normals_are_the_single_draws_stacked():
    keys = [("vae", 0, 1), ("vae", 1, 0), ("eta", 0, 1)]
    together = draws.normals((2, 3), keys)
    assert together.shape == (3, 2, 3)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, draws.normal((2, 3), *key))
