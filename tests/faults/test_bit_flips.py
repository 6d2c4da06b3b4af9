"""Bits of what --resume reads, flipped one by one: some of each file, all of them where it is slow."""

import pytest
from faults.bit_flips import FILES, flips

# odd: each bit of a byte has its turn
EVERY = {"state": 17, "shard": 81, "manifest": 41, "config": 797, "metrics": 17}


@pytest.mark.parametrize("file", FILES)
def test_spread_over_the_file(file):
    found = list(flips(file, EVERY[file]))
    assert [bit for bit, noticed in found if not noticed] == []
    assert len(found) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_all(file):
    assert [bit for bit, noticed in flips(file) if not noticed] == []
