"""The main settings together: a few runs that have most of their values; in the long variant every pair of values
(covering_array.py)."""

import pytest

pytest.importorskip("covertable")
from faults.covering_array import factors, prepare, rows, tried


@pytest.mark.parametrize(("strength", "runs"), [(1, 4), pytest.param(2, None, marks=pytest.mark.slow)])
def test_settings_together(tmp_path, strength, runs):
    prepare(tmp_path)
    known = factors(tmp_path)
    found = [tried(row, known, tmp_path) for row in rows(known, strength)[:runs]]
    wrong = [result for result in found if result != "worked" and not result.startswith("refused: ")]
    assert not wrong, wrong
    assert "worked" in found
