"""The main settings, every value of each in a run; in the long variant every pair of values (covering_array.py)."""

import pytest

pytest.importorskip("covertable")
from faults.covering_array import factors, prepare, rows, tried


@pytest.mark.parametrize("strength", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_settings_together(tmp_path, strength):
    prepare(tmp_path)
    known = factors(tmp_path)
    found = [tried(row, known, tmp_path) for row in rows(known, strength)]
    wrong = [result for result in found if result != "worked" and not result.startswith("refused: ")]
    assert not wrong, wrong
    assert found.count("worked") >= 0.9 * len(found), found
