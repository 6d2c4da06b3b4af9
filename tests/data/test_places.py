"""Where files are found: folders, patterns and fsspec URLs; what cannot be opened says what to install or check."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.data.places import find
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

TABLE = pa.table(
    {
        "caption": ["one", "two", "three"],
        "jpg_0": pa.array([b"a", b"c", b"e"]),
        "jpg_1": pa.array([b"b", b"d", b"f"]),
        "label_0": [1.0, 0.0, 0.7],
        "label_1": [0.0, 1.0, 0.3],
    }
)
FILES = ("data/train-0.parquet", "data/train-1.parquet", "data/deep/test-0.parquet", "notes.txt")


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    for name in FILES:
        with fs.open(f"/bucket/set/{name}", "wb") as file:
            pq.write_table(TABLE, file, row_group_size=2)
    yield fs
    fs.rm("/bucket", recursive=True)


def make(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, tmp_path / name, row_group_size=2)
    return str(tmp_path)


def names(files) -> list[str]:
    return [file.name for file in files]


def test_folder_file_and_pattern_here_and_behind_a_url(tmp_path, memory):
    for root in (make(tmp_path), "memory://bucket/set", f"file://{tmp_path}"):
        assert [n.removeprefix("data/") for n in names(find(root, (".parquet",)))] == [
            "deep/test-0.parquet",
            "train-0.parquet",
            "train-1.parquet",
        ]
        assert names(find(f"{root}/data/train-1.parquet", (".tar",))) == ["train-1.parquet"]
        if not root.startswith("file"):
            assert names(find(f"{root}/data/train-*.parquet", (".parquet",))) == ["train-0.parquet", "train-1.parquet"]
        assert find(f"{root}/nowhere", (".parquet",)) is None


def test_pairs_behind_a_url_are_those_here(tmp_path, memory):
    here, there = open_source(f"{make(tmp_path)}/data"), open_source("memory://bucket/set/data")
    assert len(here) == len(there) == 9
    assert [here.read(i) for i in range(9)] == [there.read(i) for i in range(9)]
    assert there.read(2).label == 0.7 and there.read(2).id == "deep/test-0.parquet:1:0"


def test_remote_file_is_read_in_parts(tmp_path, memory, monkeypatch):
    """Opening never reads the images: with them damaged it still succeeds, and one pair reads one row group."""
    source = open_source("memory://bucket/set/data/train-0.parquet")
    reads = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda s, g, **k: reads.append((g, k["columns"])) or whole(s, g, **k)
    )
    assert source.read(2).prompt == "three" and source.read(2).winner == b"e"
    assert reads == [(1, ["caption", "jpg_0", "jpg_1"])]
    opened = []
    plain = type(memory).open
    monkeypatch.setattr(type(memory), "open", lambda s, p, m="rb", **k: opened.append(k) or plain(s, p, m, **k))
    open_source("memory://bucket/set/data/train-0.parquet")
    assert opened == [{"cache_type": "none"}]  # read-ahead would fetch the images between the labels
    assert reads[1:] == [(0, ["label_0", "label_1"]), (1, ["label_0", "label_1"])]


REFUSALS = {
    "protocol": ("abc://bucket/set", r"unknown protocol abc://; install the fsspec package.*s3fs for s3://"),
    "package": ("dropbox://set", r"pip install inpo-fast\[data\]"),
    "nothing there": ("memory://bucket/nowhere", r"no such file or folder: memory://bucket/nowhere; give"),
    "no parquet": ("memory://bucket/set/notes", r"no such file or folder|holds neither"),
    "listing": ("memory://bucket/set/metadata.jsonl", r"no such file"),
    "hub id without protocol": ("yuvalkirstain/pickapic_v2", r"no such file.*hf://datasets/NAME"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_remedy(memory, name):
    source, message = REFUSALS[name]
    with pytest.raises(UserError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_file_system_that_fails_is_refused_in_one_line(memory, monkeypatch):
    def fail(*_a, **_k):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(memory), "find", fail)
    with pytest.raises(UserError, match=r"memory://bucket/set cannot be listed \(no route\); check name, network"):
        open_source("memory://bucket/set")


def test_remote_file_that_is_cut_off_is_refused(memory):
    content = memory.cat_file("/bucket/set/data/train-0.parquet")
    memory.pipe("/bucket/set/data/train-0.parquet", content[:-20])
    with pytest.raises(UserError, match=r"train-0\.parquet: not a readable parquet file .*download it again"):
        open_source("memory://bucket/set/data")


def test_listings_are_read_here_only():
    for format in ("folder", "hpd"):
        with pytest.raises(UserError, match=f"a {format} source is read from this machine's disk; copy it there"):
            open_source("memory://bucket/set", format)


def test_files_of_several_splits_are_mentioned(tmp_path, caplog):
    open_source(make(tmp_path))
    assert "data.source has files of test and train, and all are used; a pattern chooses" in caplog.text
    caplog.clear()
    open_source(f"{tmp_path}/data/train-*.parquet")
    assert not caplog.text
