"""What can be wrong with a run's folder: full, read-only, damaged, taken by another run; and a clock that jumps."""

import errno
import os
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.conftest import STEPS
from tiny_runs import metric, same_bits, start, train_in

from inpo_fast.runtime import lock
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import whole as whole_file
from inpo_fast.runtime.files import write_bytes
from inpo_fast.train import full_disk
from inpo_fast.training.metrics import MetricsFile


def test_disk_full(world, whole, disk):
    """Room for one checkpoint, not for two: it stops with the first one intact, and continues where there is room."""
    size = sum(f.stat().st_size for f in (whole / "checkpoints" / "step-0001").iterdir())
    place = disk(f"size={int(1.6 * size)}")
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        train_in(world, str(place / "run"), f"--train.steps={STEPS}")
    (complete,) = (place / "run" / "checkpoints").iterdir()
    shutil.copytree(place / "run", world / "moved")
    train_in(world, "moved", f"--train.steps={STEPS}", "--resume")
    assert same_bits(world / "moved", whole, STEPS) and complete.name == "step-0001"


def test_the_newest_checkpoint_is_damaged(world, whole, caplog):
    folder = world / "damaged"
    shutil.copytree(whole, folder)
    (shard,) = (folder / "checkpoints" / f"step-{STEPS:04d}").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4  # one bit of a weight: it would load without complaint
    shard.write_bytes(content)
    train_in(world, "damaged", f"--train.steps={STEPS}", "--resume")
    (warning,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert f"step-{STEPS:04d}" in warning and f"continuing from step-{STEPS - 1:04d}" in warning
    assert same_bits(folder, whole, STEPS)


def test_read_only_output_is_refused_before_anything_is_loaded(world, disk, monkeypatch):
    from inpo_fast.training import set_up

    place = disk("ro")
    monkeypatch.setattr(set_up, "open_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"--output .* cannot be written \(Read-only file system\)"):
        train_in(world, str(place / "run"))


def test_two_runs_in_one_folder(world, tmp_path):
    """The second is refused and told who the first is; when the first is killed the folder is free."""
    first = start(world, "shared", "--train.steps=500")
    deadline = time.monotonic() + 120
    while not (world / "shared" / "metrics.jsonl").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    before = (world / "shared" / "config.yaml").read_bytes()
    for how in ("--resume", "--overwrite"):
        with pytest.raises(UserError, match=rf"another run is writing there \(pid {first.pid} on "):
            train_in(world, "shared", "--train.steps=500", how)
    assert (world / "shared" / "config.yaml").read_bytes() == before
    first.send_signal(signal.SIGKILL)
    first.wait()
    lock.check(world / "shared")


def test_the_lock_of_one_start(tmp_path, monkeypatch):
    handle = lock.take(tmp_path)
    with pytest.raises(UserError, match="another run"):
        lock.take(tmp_path)
    os.close(handle)
    lock.check(tmp_path)
    # torchrun starts the same command again: only a run of the same torchrun is continued without --resume
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    os.close(lock.take(tmp_path))
    assert not lock.is_restart_of(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not lock.is_restart_of(tmp_path)  # it ended before it had begun: what is there is another run
    handle = lock.take(tmp_path)
    lock.note_launch(handle)
    os.close(handle)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not lock.is_restart_of(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert lock.is_restart_of(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert not lock.is_restart_of(tmp_path)
    (tmp_path / lock.NAME).write_text("[")
    assert not lock.is_restart_of(tmp_path)


def test_a_clock_that_jumps(world, whole, monkeypatch):
    """Hours forward and back between any two looks at it: the same bits, and no time that is negative."""
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200 * (-1) ** next(jumps))
    folder = train_in(world, "clock", f"--train.steps={STEPS}")
    assert same_bits(folder, whole, STEPS)
    assert all(0 < seconds < 600 for seconds in metric(folder, "seconds"))


def test_metrics_are_not_lost_by_a_kill_while_a_resumed_run_cuts_them(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(f'{{"step": {step}, "loss": 1}}\n' for step in (1, 2, 3)) + '{"step": 4, "lo'
    path.write_text(lines)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        MetricsFile(path, keep_steps=2)
    assert path.read_text() == lines
    MetricsFile(path, keep_steps=2).close()
    assert path.read_text() == lines[: lines.index('{"step": 3')]


FOREIGN = [b"3", b"null", b'"a string"', b"[1, 2]", b"true", b"{}", b'{"loss": 1}', b'{"step": NaN}', b'{"step": "3"}']
FOREIGN += [b'{"step": 1.5}', b'{"step": true}', b'{"step": null}', b'{"step": -1}', b"[" * 100_000, b"9" * 10_000]
FOREIGN += [
    b"\xff\xfe\xfa",
    b'{"step": 1, "note": "\xe9"}',
    b"caf\xc3\xa9",
    b"\x00" * 64,
    b"# a comment",
    b'{"step": 1',
]


def test_foreign_lines_of_metrics_are_dropped_and_counted(tmp_path):
    """Anything may have been added to metrics.jsonl; our own lines stay, to the byte."""
    path = tmp_path / "metrics.jsonl"
    own = [f'{{"step": {step}, "loss": {step / 7}, "note": null}}'.encode() for step in (1, 2, 3)]
    for number, line in enumerate(FOREIGN):
        path.write_bytes(b"\n".join([line, own[0], line, own[1], own[2], line]))
        file = MetricsFile(path, keep_steps=2)
        file.close()
        assert path.read_bytes() == own[0] + b"\n" + own[1] + b"\n", line
        assert file.foreign == (3 if number < 13 else 2), line  # what is no JSON may be our own last line, cut short


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "crlf"])
def test_metrics_that_an_editor_saved_again(tmp_path, encoding):
    path, lines = tmp_path / "metrics.jsonl", ['{"step": 1, "loss": 1}', '{"step": 2, "loss": 2}', '{"step": 3}']
    text = "\n".join([*lines, ""])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes(text.replace("\n", "\r\n").encode() if encoding == "crlf" else (mark + text).encode(encoding))
    file = MetricsFile(path, keep_steps=2)
    file.close()
    assert path.read_text() == "\n".join([*lines[:2], ""]) and file.foreign == 0


def test_metrics_that_are_a_folder_are_refused_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read \(Is a directory\)"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_the_remedy_of_a_full_disk_is_true(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "a")
    assert "no checkpoint is there" in str(full_disk(full, tmp_path))
    (tmp_path / "checkpoints" / "step-0002").mkdir(parents=True)
    assert "continue with --resume" in str(full_disk(full, tmp_path))


def test_what_could_not_be_written_is_named(disk):
    place = disk("size=4k")
    for work in (lambda: write_bytes(place / "a.png", bytes(100_000)), lambda: _table(place / "a.parquet")):
        with pytest.raises(OSError) as told:
            work()
        assert told.value.filename.startswith(str(place / "a.")) and told.value.errno == errno.ENOSPC
        assert not list(place.iterdir())


def _table(path):
    with whole_file(path) as aside:
        pq.write_table(pa.table({"a": np.random.default_rng(0).random(20_000)}), aside)
