"""150 damaged files for every reader: a result or a UserError of one line. Longer: tests/faults/fuzz.py."""

import logging

import pytest
from faults.fuzz import READERS, fuzz

EXECUTIONS = {"config": 25}  # each takes a tenth of a second to parse; all others 150


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(reader, caplog):
    caplog.set_level(logging.CRITICAL)
    ends, findings = fuzz(reader, seconds=60, most=EXECUTIONS.get(reader, 150))
    assert not findings, "\n".join(findings[:3])
    assert ends.total() >= 15, ends
    # some are refused and some read; but a sweep makes again what is damaged, damaged votes do not count, hashes let
    # nothing pass, and a few dozen configurations, each slow to parse, may all be wrong
    assert len(ends) >= (1 if reader in ("shards", "checkpoint", "checkpoint-state", "config", "votes") else 2), ends
