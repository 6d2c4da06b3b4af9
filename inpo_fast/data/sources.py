"""Where preference pairs come from. Every source is a sequence of `Pair`s; ties are left out of it.

parquet   Pick-a-Pic v2's schema: one file or a folder of *.parquet with caption, jpg_0, jpg_1 (encoded
          bytes), label_0, label_1 (1/0, 0/1; 0.5/0.5 is a tie). Row groups are read when needed.
folder    metadata.jsonl beside the images, one object a line: `prompt` (or `caption`) and either
          `image_0`, `image_1`, `label` (0 or 1: the better one; 0.5: a tie), or `chosen`, `rejected`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from inpo_fast.refusal import Refusal

Format = Literal["auto", "parquet", "folder"]


@dataclass(frozen=True)
class Pair:
    """A preference: `winner` and `loser` are encoded images (PNG, JPEG, WebP …).

    label: how sure it is that the winner is the better one, 0.5 to 1. weight: of the pair in the loss.
    """

    id: str
    prompt: str
    winner: bytes
    loser: bytes
    label: float = 1.0
    weight: float = 1.0


class BadPair(Exception):
    """This pair cannot be used; it is dropped as a unit."""


class Source(Protocol):
    ties: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pair:
        """The pair at index 0..len-1. BadPair if its record cannot be used."""
        ...


def open_source(path: str, format: Format = "auto") -> Source:
    """A parquet file, a folder of parquet files, or a folder with metadata.jsonl. Refusal if it is none."""
    place = Path(path).expanduser()
    if not place.exists():
        raise Refusal(
            f"data.source: no such file or folder: {path}; give a .parquet file, a folder of them, or a "
            "folder with metadata.jsonl"
        )
    if format == "folder" or (format == "auto" and (place / "metadata.jsonl").exists()):
        source: Source = FolderSource(place)
    else:
        shards = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
        if not shards:
            raise Refusal(f"data.source: {path} holds neither metadata.jsonl nor *.parquet")
        source = ParquetSource(shards)
    if len(source) == 0:
        raise Refusal(
            f"data.source: {path} has no usable pair ({source.ties} ties); preference training needs pairs "
            "with a better and a worse image"
        )
    return source


class ParquetSource:
    COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")

    def __init__(self, shards: Sequence[Path]):
        self.shards = list(shards)
        self.ties = 0
        index = []  # rows (shard, row group, row in group, winning side)
        for number, shard in enumerate(self.shards):
            file = _open_parquet(shard)
            missing = [c for c in self.COLUMNS if c not in file.schema_arrow.names]
            if missing:
                raise Refusal(
                    f"{shard}: no column {', '.join(missing)}; the Pick-a-Pic v2 schema needs "
                    f"{', '.join(self.COLUMNS)} and it has {', '.join(file.schema_arrow.names)}"
                )
            for column in ("jpg_0", "jpg_1"):
                kind = file.schema_arrow.field(column).type
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise Refusal(f"{shard}: column {column} is {kind}, expected binary (the bytes of an image file)")
            for group in range(file.num_row_groups):
                labels = _read_group(file, shard, group, ["label_0", "label_1"])
                first, second = (_labels(labels, c, shard) for c in ("label_0", "label_1"))
                decided = ((first == 1) & (second == 0)) | ((first == 0) & (second == 1))
                self.ties += int((~decided).sum())
                rows = np.flatnonzero(decided)
                side = (second[rows] > first[rows]).astype(np.int64)
                place = np.tile([number, group], (len(rows), 1))
                index.append(np.column_stack([place, rows, side]))
        self.index = np.concatenate(index) if index else np.zeros((0, 4), np.int64)
        self._group = lru_cache(maxsize=8)(self._load_group)

    def __len__(self) -> int:
        return len(self.index)

    def _load_group(self, shard: int, group: int) -> pa.Table:
        path = self.shards[shard]
        return _read_group(_open_parquet(path), path, group, ["caption", "jpg_0", "jpg_1"])

    def read(self, index: int) -> Pair:
        shard, group, row, side = (int(v) for v in self.index[index])
        table = self._group(shard, group)
        name = f"{self.shards[shard].name}:{group}:{row}"
        try:
            caption, *images = (table[c][row].as_py() for c in ("caption", "jpg_0", "jpg_1"))
        except UnicodeDecodeError as problem:
            raise BadPair(f"{name}: caption is not UTF-8") from problem
        if not isinstance(caption, str) or not all(images):
            raise BadPair(f"{name}: caption or image missing")
        return Pair(name, caption, images[side], images[1 - side])


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise Refusal(
            f"{path}: not a readable parquet file ({_first_line(problem)}); download it again or remove it"
        ) from problem


def _read_group(file: pq.ParquetFile, path: Path, group: int, columns: list[str]) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise Refusal(
            f"{path}: row group {group} cannot be read ({_first_line(problem)}); download it again or remove it"
        ) from problem


def _labels(table: pa.Table, column: str, path: Path) -> np.ndarray:
    kind = table[column].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise Refusal(f"{path}: column {column} is {kind}, expected numbers (1 better, 0 worse, 0.5 tie)")
    return table[column].to_numpy().astype(np.float64)


class FolderSource:
    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.ties = 0
        self.records: list[tuple[int, str, str, str]] = []  # line number, prompt, winner, loser
        listing = folder / "metadata.jsonl"
        if not listing.is_file():
            raise Refusal(f"{folder}: no metadata.jsonl in this folder")
        with listing.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._add(f"{listing}:{number}", number, line)

    def _add(self, where: str, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError as problem:  # JSONDecodeError or UnicodeDecodeError
            raise Refusal(f"{where}: not JSON in UTF-8 ({problem})") from problem
        prompt = record.get("prompt", record.get("caption")) if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise Refusal(f"{where}: no text under `prompt` or `caption`")
        if "chosen" in record and "rejected" in record:
            winner, loser = record["chosen"], record["rejected"]
        elif {"image_0", "image_1", "label"} <= record.keys():
            if record["label"] not in (0, 1, 0.5):
                raise Refusal(f"{where}: label {record['label']!r}; expected 0 or 1 (the better image) or 0.5 (tie)")
            if record["label"] == 0.5:
                self.ties += 1
                return
            images = (record["image_0"], record["image_1"])
            winner, loser = images[int(record["label"])], images[1 - int(record["label"])]
        else:
            raise Refusal(f"{where}: needs image_0, image_1 and label, or chosen and rejected; has {sorted(record)}")
        self.records.append((number, prompt, str(winner), str(loser)))

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Pair:
        number, prompt, winner, loser = self.records[index]
        id = f"metadata.jsonl:{number}"
        return Pair(id, prompt, self._bytes(id, winner), self._bytes(id, loser))

    def _bytes(self, id: str, name: str) -> bytes:
        try:
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder):
                raise BadPair(f"{id}: {name}: outside {self.folder}")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as problem:  # missing; NUL in the name; a loop of links
            raise BadPair(f"{id}: {name!r}: {getattr(problem, 'strerror', None) or problem}") from problem


def _first_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
