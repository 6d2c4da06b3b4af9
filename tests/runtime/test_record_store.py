"""A folder of records against what was put in: bit for bit, or not at all when a file, the disk or a process fails."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from inpo_fast.runtime import record_store
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import RecordStore, digest

IDENTITY = {"holds": "numbers", "steps": 3, "latent": (4, 2)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "deep" / "cache"


def started(folder: Path, identity: dict = IDENTITY) -> RecordStore:
    out = RecordStore(folder, identity)
    out.start()
    return out


def records(count: int, seed: int = 0) -> tuple[list[str], dict[str, torch.Tensor]]:
    """One fp32 latent and three bf16 answers a record, 4 x 2 numbers each."""
    draw = torch.Generator().manual_seed(seed)
    parts = {"x_0": torch.randn(count, 1, 4, 2, generator=draw)}
    parts["answers"] = torch.randn(count, 3, 4, 2, generator=draw).bfloat16()
    return [digest(f"{seed}:{i}".encode()) for i in range(count)], parts


def all_there(store: RecordStore, keys: list[str], parts: dict[str, torch.Tensor]) -> bool:
    found = {name: store.read(name, keys) for name in parts}
    return all(torch.equal(torch.stack(found[name]), value) for name, value in parts.items())


@pytest.mark.parametrize("count", [1, 3, 2 * record_store.ROWS + 1])
def test_what_is_read_is_what_was_written(folder, count):
    """In any order and number of entries, by the process that wrote it and by the next; 256 rows a file at most."""
    store, (keys, parts) = started(folder), records(count)
    store.write(keys, parts)
    for other in (store, RecordStore(folder, IDENTITY)):
        assert len(other) == count and all_there(other, keys, parts)
        pick = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
        first = [i % 4 for i in pick]
        for i, own, got in zip(pick, first, other.read("answers", [keys[i] for i in pick], first), strict=True):
            assert torch.equal(got, parts["answers"][i, :own])
    rows = [len(load_file(path)["x_0"]) for path in folder.glob("*.safetensors")]
    assert sum(rows) == count and max(rows) <= record_store.ROWS and len(rows) == -(-count // record_store.ROWS)
    assert store.read("x_0", ["0" * 32, keys[0]])[0] is None


def test_many_may_write_into_one_folder(folder):
    """Each sees its own and what was there when it opened; the same records written twice are one."""
    first, second = started(folder), started(folder)
    (keys, parts), (more, others) = records(3), records(2, seed=1)
    first.write(keys, parts)
    second.write(keys, parts)
    second.write(more, others)
    assert more[0] not in first and len(first) == 3 and len(second) == 5
    third = RecordStore(folder, IDENTITY)
    assert len(third) == 5 and all_there(third, keys, parts) and all_there(third, more, others)


def truncated(path: Path, size: int) -> None:
    os.truncate(path, size)


def with_bit_flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def rewritten(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(path)
    change(tensors, metadata)
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata)


DAMAGE = {
    "empty": lambda path: truncated(path, 0),
    "inside the length": lambda path: truncated(path, 5),
    "inside the header": lambda path: truncated(path, 60),
    "one byte short": lambda path: truncated(path, path.stat().st_size - 1),
    "length": lambda path: with_bit_flipped(path, 6),
    "header": lambda path: with_bit_flipped(path, 9),
    "value": lambda path: with_bit_flipped(path, path.stat().st_size - 3),
    "no keys": lambda path: rewritten(path, lambda tensors, metadata: metadata.clear()),
    "a key less": lambda path: rewritten(path, lambda _, metadata: metadata.update(keys=metadata["keys"][:-33])),
    "no checksum": lambda path: rewritten(path, lambda tensors, _: [tensors.pop(n) for n in list(tensors) if "." in n]),
    "no values": lambda path: rewritten(path, lambda tensors, _: [tensors.pop(n) for n in ("x_0", "answers")]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


# keys are read at the opening only
BOTH = [
    (when, d)
    for when in ("before it is opened", "while it is open")
    for d in DAMAGE
    if when[0] == "b" or "key" not in d
]


@pytest.mark.parametrize(("when", "damage"), BOTH)
def test_a_damaged_file_costs_its_records_only(folder, when, damage, caplog):
    """It is named once, its records are absent, those of other files stay, and they can be written again."""
    (keys, parts), (more, others) = records(3), records(2, seed=1)
    store = started(folder)
    store.write(keys, parts)
    (bad,) = folder.glob("*.safetensors")
    store.write(more, others)
    DAMAGE[damage](bad)
    if when == "before it is opened":
        store = RecordStore(folder, IDENTITY)
    for _ in range(2):
        for name, value in parts.items():
            for row, found in enumerate(store.read(name, keys)):
                assert found is None or torch.equal(found, value[row])  # the flipped bit is in one part only
    assert all_there(store, more, others)
    assert [record.args[0] for record in caplog.records] == [bad] and not set(keys) & set(store.places)
    if damage != "a folder":
        store.write(keys, parts)
        assert all_there(store, keys, parts) and all_there(RecordStore(folder, IDENTITY), keys, parts)


def test_every_bit_counts(folder, caplog):
    """Wherever a bit of the file flips, no record changes: it is absent or as it was."""
    keys, parts = records(2)
    started(folder).write(keys, parts)
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole)
        with_bit_flipped(path, at)
        store = RecordStore(folder, IDENTITY)
        for name, value in parts.items():
            for row, found in enumerate(store.read(name, keys)):
                assert found is None or (torch.equal(found, value[row]) and found.dtype == value.dtype), at


def test_a_full_disk_is_refused_and_leaves_no_half_file(folder, monkeypatch):
    store, (keys, parts) = started(folder), records(300)
    store.write(keys[:2], {name: value[:2] for name, value in parts.items()})
    before = sorted(folder.iterdir())

    def full(kind):
        def save(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise kind(errno.ENOSPC, "No space left on device")

        return save

    for kind in (OSError, SafetensorError):
        monkeypatch.setattr(record_store, "save_file", full(kind))
        with pytest.raises(
            UserError, match=r"cache: 256 records could not be written \(.*No space left.*\); .*--resume"
        ):
            store.write(keys, parts)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a real refusal by the kernel
    try:
        with pytest.raises(UserError, match="could not be written"):
            store.write(keys, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(folder.iterdir()) == before and len(store) == 2 and keys[2] not in store
    store.write(keys, parts)
    assert all_there(store, keys, parts)


KILLED = """
import os, signal, sys
from pathlib import Path
from test_record_store import records, started
store = started(Path(sys.argv[1]))
store.write(*records(2))
Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
store.write(*records(3, seed=1))
"""


def test_kill_9_while_writing_leaves_what_was_there(folder, caplog):
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment).returncode == -9
    aside = [path for path in folder.iterdir() if path.name.startswith(".tmp-")]
    store = RecordStore(folder, IDENTITY)
    assert len(aside) == 1 and len(store) == 2 and all_there(store, *records(2)) and not caplog.records
    store.start()
    assert aside[0].exists()  # it might be another process's, still being written
    os.utime(aside[0], (0, 0))
    store.start()
    assert not aside[0].exists() and len(list(folder.iterdir())) == 2


def test_a_folder_serves_one_identity(folder):
    """Whatever entry differs is named with both values; a key of one identity is none of another."""
    started(folder)
    assert json.loads((folder / "manifest.json").read_text())["latent"] == [4, 2]
    for other, words in (
        ({**IDENTITY, "steps": 5}, "steps is 3 there, 5 here"),
        ({**IDENTITY, "latent": (4, 3)}, r"latent is \[4, 2\] there, \[4, 3\] here"),
        ({**IDENTITY, "tau_norm": "rms"}, "tau_norm is None there, rms here"),
        ({"holds": "numbers", "steps": 4}, r"steps is 3 there, 4 here; latent is \[4, 2\] there, None here"),
    ):
        with pytest.raises(UserError, match=f"cache was made for something else .{words}.; name another folder"):
            RecordStore(folder, other)
        assert RecordStore(folder / "other", other).key(b"a", b"b") != RecordStore(folder, IDENTITY).key(b"a", b"b")
    assert RecordStore(folder, IDENTITY).key(b"a", b"b") != RecordStore(folder, IDENTITY).key(b"ab", b"")


def test_a_folder_that_became_another_ones_is_refused_at_the_start(folder):
    mine = RecordStore(folder, IDENTITY)
    started(folder, {**IDENTITY, "steps": 5})
    with pytest.raises(UserError, match="steps is 5 there, 3 here"):
        mine.start()


def test_folders_that_cannot_serve(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things and no manifest\.json; name a new"):
        RecordStore(tmp_path, IDENTITY)
    with pytest.raises(UserError, match="holds other things"):
        RecordStore(tmp_path / "notes.txt", IDENTITY)
    with pytest.raises(UserError, match="cannot be written"):
        started(tmp_path / "notes.txt" / "below")
    for content in ("", "[1, 2]", "3", '"text"', "{"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
            RecordStore(tmp_path, IDENTITY)


def test_hidden_files_are_no_other_things(tmp_path):
    """What a file system or a killed writer left there does not make the folder somebody else's."""
    (tmp_path / ".DS_Store").write_text("x")
    started(tmp_path)
    assert (tmp_path / record_store.MANIFEST).exists()


def test_damage_found_while_opening_is_said_once_a_run(folder, monkeypatch, caplog):
    """Every process opens the folder; damage that one meets while it reads is told by that one."""
    store, (keys, parts) = started(folder), records(2)
    store.write(keys, parts)
    (path,) = folder.glob("*.safetensors")
    whole = path.read_bytes()
    monkeypatch.setenv("RANK", "1")
    path.write_bytes(whole[:-9])
    assert not len(RecordStore(folder, IDENTITY)) and not caplog.text
    path.write_bytes(whole)
    store = RecordStore(folder, IDENTITY)
    path.write_bytes(whole[:-9])
    store.read(next(iter(parts)), keys)
    assert "is damaged" in caplog.text
