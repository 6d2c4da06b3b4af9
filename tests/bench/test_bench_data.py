"""bench.step.data_scale on sets of 300 pairs: every source it makes can be opened, and both ways read what they say."""

import pytest

from bench.step import data_scale


@pytest.mark.parametrize("source", data_scale.SOURCES)
def test_measures_every_source(source, tmp_path, monkeypatch):
    monkeypatch.setattr(data_scale, "SHARD", 100)
    path = data_scale.MAKE[source](tmp_path, 300)
    found = data_scale.measure(source, str(path))
    assert found["order"] == "full" and found["rate"] > 0 and found["seconds"] > 0
    assert found["reading"] >= found["opened"]
