"""Files that are whole or absent, also where the process is asked to stop while it writes."""

import os

import pytest

from inpo_fast.runtime import files


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch, problem):
    path = tmp_path / "report.html"
    files.write_text(path, "old")

    def stopped(handle):
        raise problem

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(problem if isinstance(problem, type) else OSError):
        files.write_text(path, "new")
    with pytest.raises(problem if isinstance(problem, type) else OSError), files.whole(path) as aside:
        aside.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "old"
