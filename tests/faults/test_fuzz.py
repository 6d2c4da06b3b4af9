"""150 damaged files for every reader: a result or a UserError of one line. A minute of each with `-m slow`; longer:
tests/faults/fuzz.py."""

import logging

import pytest
from faults.fuzz import READERS, fuzz


@pytest.mark.parametrize("most", [150, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(reader, most, caplog):
    caplog.set_level(logging.CRITICAL)
    ends, findings = fuzz(reader, seconds=60, most=most)
    assert not findings, "\n".join(findings[:3])
    assert ends.total() >= 15, ends
    # some are refused and some read; but a sweep makes again what is damaged, damaged votes do not count, hashes let
    # nothing pass, and a few dozen configurations, each slow to parse, may all be wrong
    assert len(ends) >= (1 if reader in ("shards", "checkpoint", "checkpoint-state", "config", "votes") else 2), ends
