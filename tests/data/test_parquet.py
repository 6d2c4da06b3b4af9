"""Parquet at scale: each row group decoded once an epoch, memory bounded, weights, warnings and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.data import parquet
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.order import make_order
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

KB = 1024


def save(path: Path, rows: int, group: int, size: int = 8, **columns) -> str:
    """Images of `size` random bytes, other ones for each row."""
    import random

    noise = random.Random(0)
    standard = {
        "caption": [f"caption {i}" for i in range(rows)],
        "jpg_0": pa.array([noise.randbytes(size) for _ in range(rows)]),
        "jpg_1": pa.array([noise.randbytes(size) for _ in range(rows)]),
        "label_0": [1.0] * rows,
        "label_1": [0.0] * rows,
    }
    pq.write_table(pa.table(standard | columns), path, row_group_size=group)
    return str(path)


@pytest.mark.parametrize(("threads", "again"), [(1, 0), (4, 8)])
def test_each_row_group_is_decoded_once_an_epoch_in_the_order_by_blocks(tmp_path, monkeypatch, threads, again):
    """64 groups of 25 pairs, runs of 5. A thread may sleep through a run of such small pairs and ask for an old one."""
    monkeypatch.setattr("inpo_fast.data.order.FULL_BYTES", 0)
    monkeypatch.setattr(parquet, "FULL_BYTES", 0)
    monkeypatch.setattr("inpo_fast.data.order.RUN_PAIRS", 125)
    source = open_source(save(tmp_path / "a.parquet", 1600, 25, size=KB))
    order = make_order(source, "auto", 0)
    assert order.blocks_per_run == 5
    held = []

    def read(position: int) -> None:
        source.read(order.index(position))
        held.append(len(source.cache.blocks))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(1600)))
    assert 64 <= source.cache.loads <= 64 + again
    assert 5 <= max(held) <= 10


def test_cache_size_changes_memory_and_not_the_pairs(tmp_path):
    path = save(tmp_path / "a.parquet", 200, 10, size=KB)
    large, small = open_source(path), open_source(path, cache_mb=0.04)
    assert [large.read(i) for i in range(0, 200, 7)] == [small.read(i) for i in range(0, 200, 7)]
    assert len(large.cache.blocks) == 20 and len(small.cache.blocks) <= 2
    config = [DataConfig(cache_mb=mb, shuffle=s) for s in ("auto", "blocks") for mb in (None, 1)]
    orders = [PairLoader(large, c, resolution=8, seed=0, rank=0, world=1).order for c in config]
    assert [o.index(5) for o in orders[:2]] == [orders[0].index(5)] * 2
    assert [o.index(5) for o in orders[2:]] == [orders[2].index(5)] * 2


def test_index_is_small(tmp_path):
    """Hard labels: five bytes a pair, and nothing that grows with the images."""
    source = open_source(save(tmp_path / "a.parquet", 5000, 100, size=200))
    arrays = [v for v in vars(source).values() if hasattr(v, "nbytes")]
    assert sum(a.nbytes for a in arrays) <= 5000 * 5 + 50 * 24
    assert source._label is None and source._weight is None
    assert len(source.cache.blocks) == 0


def test_published_counts_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "TRAIN_ROWS", 12)
    monkeypatch.setattr(parquet, "TRAIN_PAIRS", 11)
    save(tmp_path / "a.parquet", 12, 5, label_0=[0.5] + [1.0] * 11, label_1=[0.5] + [0.0] * 11)
    open_source(str(tmp_path / "a.parquet"))
    assert "Pick-a-Pic v2, train: 12 rows, 1 ties, 11 pairs (as published)" in caplog.text
    open_source(save(tmp_path / "b.parquet", 12, 5))
    assert "12 rows, 0 ties, 12 pairs (published are 11 pairs: look at it)" in caplog.text
    caplog.clear()
    open_source(save(tmp_path / "c.parquet", 13, 5))
    assert not caplog.text
    monkeypatch.setenv("RANK", "1")  # every process counts, one says it
    open_source(str(tmp_path / "a.parquet"))
    assert not caplog.text
    assert (959_040, 851_293) == (959_040, 959_040 - 107_747)


def test_large_row_group_is_mentioned(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "LARGE_GROUP", 25 * KB)
    open_source(save(tmp_path / "a.parquet", 40, 4, size=KB))
    assert not caplog.text
    open_source(save(tmp_path / "b.parquet", 40, 20, size=KB))
    assert "b.parquet has a row group of" in caplog.text and "row_group_size=1000" in caplog.text


def broken_later(tmp_path: Path) -> str:
    path = save(tmp_path / "d.parquet", 9, 3, size=KB)
    meta = pq.ParquetFile(path).metadata.row_group(1).column(1)  # jpg_0, which opening does not read
    start = meta.dictionary_page_offset or meta.data_page_offset
    content = Path(path).read_bytes()
    Path(path).write_bytes(
        content[:start] + bytes(meta.total_compressed_size) + content[start + 3 :][meta.total_compressed_size - 3 :]
    )
    return path


def test_damaged_row_group_is_refused_when_it_is_read_and_the_others_are_not(tmp_path):
    source = open_source(broken_later(tmp_path))
    assert source.read(0).prompt == "caption 0" and source.read(8).prompt == "caption 8"
    with pytest.raises(
        UserError, match=r"d\.parquet: row group 1 cannot be read \(.*\); download it again or remove it"
    ):
        source.read(4)


def test_file_that_is_gone_is_refused(tmp_path):
    source = open_source(save(tmp_path / "a.parquet", 9, 3))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file \(.*No such file"):
        source.read(0)


REFUSALS = {
    "negative weight": ({"weight": [1.0, 2.0, -1.0, 1.0]}, r"row 0 of row group 1 has weight -1\.0; expected a finite"),
    "endless weight": ({"weight": [1.0, float("inf"), 1.0, 1.0]}, r"row 1 of row group 0 has weight inf"),
    "weight of text": ({"weight": ["1"] * 4}, r"column weight is string, expected numbers \(0 or more\)"),
    "caption of numbers": ({"caption": [1, 2, 3, 4]}, r"column caption is int64, expected text"),
    "labels of text": ({"label_0": ["1", "0", "1", "1"]}, r"column label_0 is string, expected numbers"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_place(tmp_path, name):
    columns, message = REFUSALS[name]
    with pytest.raises(UserError, match=message):
        open_source(save(tmp_path / "a.parquet", 4, 2, **columns))


def test_shards_of_mixed_label_types_are_refused_by_name(tmp_path):
    save(tmp_path / "a.parquet", 4, 2)
    save(tmp_path / "b.parquet", 4, 2, label_1=["0"] * 4)
    with pytest.raises(UserError, match=r"b\.parquet: column label_1 is string"):
        open_source(str(tmp_path))


def test_weights_of_one_shard_do_not_touch_the_other(tmp_path):
    save(tmp_path / "a.parquet", 4, 2)
    save(tmp_path / "b.parquet", 4, 2, weight=pa.array([0.0, None, 2.5, 3.0]), label_0=[0.9] * 4, label_1=[0.1] * 4)
    source = open_source(str(tmp_path))
    assert [source.read(i).weight for i in range(8)] == [1, 1, 1, 1, 0, 1, 2.5, 3]
    assert [source.read(i).label for i in range(8)] == [1] * 4 + [0.9] * 4
