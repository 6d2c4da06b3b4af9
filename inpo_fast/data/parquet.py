"""Pairs in parquet files of the Pick-a-Pic v2 schema, read one row group at a time.

Needs caption, jpg_0, jpg_1 (encoded bytes), label_0, label_1 (shares that add up to 1; 0.5/0.5 is a tie); takes a
`weight` where there is one; reads no other column. Opening reads the labels only, a few bytes a pair. Source:
yuvalkirstain/pickapic_v2, whose training split has the counts below.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.data import labels, parquet_identity
from inpo_fast.data.block_cache import BlockCache
from inpo_fast.data.order import FULL_BYTES, blocks_per_run
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.places import File
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)

CONTENT = ("caption", "jpg_0", "jpg_1")
NEEDED = (*CONTENT, "label_0", "label_1")
TRAIN_ROWS, TRAIN_PAIRS = 959_040, 851_293  # Pick-a-Pic v2, train
LARGE_GROUP = 2**31  # bytes of a row group that is worth a warning
OPENERS = 8  # shards whose labels are read at a time: a remote one is mostly waiting

# every column of Pick-a-Pic v2
PICKAPIC_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


@dataclass
class _Group:
    """The pairs of a row group: rows (n,), side and label of each, weight if there is such a column; encoded bytes; the
    first label that is none."""

    number: int
    rows: np.ndarray
    side: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None
    bytes: int
    example: str


class ParquetSource:
    """A block is a row group, less its ties. cache_bytes: of decoded row groups; None: two runs of the block order."""

    def __init__(self, shards: Sequence[File], cache_bytes: int | None = None):
        self.shards = list(shards)
        with ThreadPoolExecutor(OPENERS) as pool:
            read = list(pool.map(_read_labels, self.shards))
        found = [(shard, group) for shard, groups in enumerate(read) for group in groups]
        rows, self.undecided = sum(len(group.side) for _, group in found), labels.Undecided()
        for shard, group in found:  # only now are all rows counted
            decided = group.side >= 0
            self._count(self.shards[shard], group)
            group.rows, group.side, group.label = (v[decided] for v in (group.rows, group.side, group.label))
            group.weight = None if group.weight is None else group.weight[decided]
        found = [(shard, group) for shard, group in found if len(group.rows)]
        self._place = np.array([(shard, group.number) for shard, group in found], np.int32).reshape(-1, 2)
        self.blocks = np.cumsum([len(group.rows) for _, group in found], dtype=np.int64)
        self._row = _joined([group.rows for _, group in found], np.int32)
        self._side = _joined([group.side for _, group in found], np.int8)
        self._label = _joined([group.label for _, group in found], np.float64)
        if (self._label == 1).all():
            self._label = None  # as in the published data: nothing to keep
        self._weight = None
        if any(group.weight is not None for _, group in found):
            parts = [np.ones(len(group.rows)) if group.weight is None else group.weight for _, group in found]
            self._weight = _joined(parts, np.float64)
        self.ties = self.undecided.ties
        self._block_bytes = np.array([group.bytes for _, group in found], np.int64)
        self.bytes = int(self._block_bytes.sum())
        if cache_bytes is None:  # counted in blocks: how large one is in memory is known when it is there
            small = self.bytes <= FULL_BYTES or not len(self)
            room = len(self.blocks) if small else 2 * blocks_per_run(len(self), len(self.blocks), self.bytes)
            self.cache = BlockCache(self._load, lambda _table: 1, lambda _block: 1, room)
        else:
            guess = self._block_bytes
            self.cache = BlockCache(self._load, lambda table: table.nbytes, lambda b: int(guess[b]), cache_bytes)
        self._notice(rows)

    def _count(self, shard: File, group: _Group) -> None:
        """Of a row group, the rows that make no pair."""
        left = [int((group.side == kind).sum()) for kind in (labels.TIE, labels.UNLABELLED, labels.UNCLEAR)]
        example = f"{group.example} ({shard})" if group.example else ""
        self.undecided = self.undecided.joined(labels.Undecided(*left, example))

    def _notice(self, rows: int) -> None:
        if rows == TRAIN_ROWS:
            verdict = "as published" if len(self) == TRAIN_PAIRS else f"published are {TRAIN_PAIRS:,} pairs: look at it"
            warn_once(log, "Pick-a-Pic v2, train: %s rows, %s ties, %s pairs (%s)", rows, self.ties, len(self), verdict)
        splits = sorted({split for f in self.shards for split in ("train", "validation", "test") if _is_of(f, split)})
        if "train" in splits and len(splits) > 1:
            warn_once(
                log,
                "data.source has files of %s, and all are used; a pattern chooses, such as FOLDER/train-*.parquet",
                " and ".join(splits),
            )
        if len(self) and self._block_bytes.max() > LARGE_GROUP:
            largest = self.shards[self._place[self._block_bytes.argmax(), 0]]
            warn_once(
                log,
                "%s has a row group of %.1f GiB, and several are in memory at a time; write the file again with "
                "row_group_size=1000",
                largest,
                self._block_bytes.max() / 2**30,
            )

    def __len__(self) -> int:
        return len(self._row)

    def identity(self) -> dict[str, str]:
        return parquet_identity.identity(self.shards, _Shard, _read_group)

    def _load(self, block: int) -> pa.Table:
        shard, group = (int(v) for v in self._place[block])
        with _Shard(self.shards[shard]) as file:
            return _read_group(file, self.shards[shard], group, list(CONTENT))

    def id(self, index: int) -> str:
        """Of a pair, without reading it."""
        shard, group = (int(v) for v in self._place[int(np.searchsorted(self.blocks, index, "right"))])
        return f"{self.shards[shard].name}:{group}:{int(self._row[index])}"

    def read(self, index: int) -> Pair:
        block = int(np.searchsorted(self.blocks, index, "right"))
        table, row, side = self.cache.get(block), int(self._row[index]), int(self._side[index])
        name = self.id(index)
        try:
            caption, *images = (table[c][row].as_py() for c in CONTENT)
        except UnicodeDecodeError as problem:
            raise BadPair(f"{name}: caption is not UTF-8") from problem
        if not isinstance(caption, str) or not all(images):
            raise BadPair(f"{name}: caption or image missing")
        label = 1.0 if self._label is None else float(self._label[index])
        weight = 1.0 if self._weight is None else float(self._weight[index])
        return Pair(name, caption, images[side], images[1 - side], label, weight)

    def facts(self, fields: Sequence[str]) -> Iterator[dict]:
        """Of each pair in turn: its prompt and the named columns; images are not read.

        UserError for a missing column.
        """
        columns = ["caption", *fields]
        for shard, file in enumerate(self.shards):
            with _Shard(file) as opened:
                missing = [name for name in fields if name not in opened.schema_arrow.names]
                if missing:
                    raise UserError(f"data.filters: {file} has no column {', '.join(missing)}")
                for block in np.flatnonzero(self._place[:, 0] == shard):
                    table = _read_group(opened, file, int(self._place[block, 1]), columns)
                    values = {"prompt": table["caption"], **{name: table[name] for name in fields}}
                    first = int(self.blocks[block - 1]) if block else 0
                    for row in self._row[first : int(self.blocks[block])]:
                        record = {name: _said(column[int(row)]) for name, column in values.items()}
                        yield record | {"prompt": record["prompt"] or ""}


def _said(value: pa.Scalar):
    """A caption that is no UTF-8 makes a broken pair when it is read; a filter sees an empty one."""
    try:
        said = value.as_py()
    except UnicodeDecodeError:
        return ""
    return said


class _Shard:
    """`with` an open ParquetFile; closes what lies below it too."""

    def __init__(self, file: File):
        self.file = file

    def __enter__(self) -> pq.ParquetFile:
        try:
            self.raw = self.file.path if self.file.fs is None else self.file.open(in_order=False)
            self.parquet = pq.ParquetFile(self.raw, pre_buffer=True)  # a column of a row group is one read
        except Exception as problem:  # a remote file system raises what its library raises
            raise _unreadable(self.file, "not a readable parquet file", problem) from problem
        return self.parquet

    def __exit__(self, *_exception) -> None:
        self.parquet.close()
        if self.file.fs is not None:
            self.raw.close()


def _read_labels(shard: File) -> list[_Group]:
    with _Shard(shard) as file:
        _check_columns(shard, file.schema_arrow)
        weighted = "weight" in file.schema_arrow.names
        meta = file.metadata
        columns = [i for i in range(meta.num_columns) if meta.schema.column(i).path in CONTENT]
        groups = []
        for number in range(meta.num_row_groups):
            table = _read_group(file, shard, number, ["label_0", "label_1", *(["weight"] if weighted else [])])
            given = [_floats(table, c) for c in ("label_0", "label_1")]
            side, label = labels.decide(*given)
            example = ""
            if len(unclear := np.flatnonzero(side == labels.UNCLEAR)):
                values = (f"label_{i} {column[unclear[0]]:g}" for i, column in enumerate(given))
                example = f"{', '.join(values)} in row {unclear[0]} of row group {number}"
            weight = _weights(table, shard, number) if weighted else None
            bytes = sum(meta.row_group(number).column(i).total_uncompressed_size for i in columns)
            groups.append(_Group(number, np.arange(len(side), dtype=np.int32), side, label, weight, bytes, example))
    return groups


def _check_columns(shard: File, schema: pa.Schema) -> None:
    missing = [c for c in NEEDED if c not in schema.names]
    if missing:
        raise UserError(
            f"{shard}: no column {', '.join(missing)}; the Pick-a-Pic v2 schema needs {', '.join(NEEDED)} and it has "
            f"{', '.join(schema.names)}"
        )
    for column in ("jpg_0", "jpg_1"):
        kind = schema.field(column).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"{shard}: column {column} is {kind}, expected binary (the bytes of an image file)")
    kind = schema.field("caption").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise UserError(f"{shard}: column caption is {kind}, expected text")
    numbers = {"label_0": "1 better, 0 worse, 0.5 tie", "label_1": "1 better, 0 worse, 0.5 tie"}
    if "weight" in schema.names:
        numbers["weight"] = "0 or more"
    for column, meaning in numbers.items():
        kind = schema.field(column).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise UserError(f"{shard}: column {column} is {kind}, expected numbers ({meaning})")


def _read_group(file: pq.ParquetFile, shard: File, group: int, columns: list[str]) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except Exception as problem:
        raise _unreadable(shard, f"row group {group} cannot be read", problem) from problem


def _unreadable(shard: File, what: str, problem: Exception) -> UserError:
    if shard.is_lfs_pointer():
        return UserError(f"{shard} {git_lfs.WHAT}")
    line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return UserError(f"{shard}: {what} ({line}); download it again or remove it")


def _floats(table: pa.Table, column: str) -> np.ndarray:
    return table[column].to_numpy().astype(np.float64)


def _weights(table: pa.Table, shard: File, group: int) -> np.ndarray:
    """Null counts as 1, as in a file without the column."""
    given = _floats(table, "weight")
    weight = np.where(np.asarray(table["weight"].is_null()), 1.0, given)
    wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(wrong):
        raise UserError(
            f"{shard}: row {wrong[0]} of row group {group} has weight {weight[wrong[0]]}; expected a finite number, "
            "not negative"
        )
    return weight


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _is_of(file: File, split: str) -> bool:
    return file.name.split("/")[-1].startswith(f"{split}-")
