"""Where preference pairs come from. Every source is a sequence of `Pair`s; ties are left out of it.

parquet     Pick-a-Pic v2's schema, read one row group at a time (parquet.py)
folder      metadata.jsonl beside the images (folder.py)
hpd         JSON in the manner of HPDv2 and HPDv3 (hpd.py)
webdataset  tar shards (webdataset.py)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from inpo_fast.data.places import File, find, is_url
from inpo_fast.refusal import Refusal

Format = Literal["auto", "parquet", "folder", "hpd", "webdataset"]


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
    """The pairs, and what the order needs to know of how they lie.

    ties: rows left out because neither image is the better one. blocks: (blocks,) int64, where each stretch of pairs
    that is read as a whole ends, the last one at len(); None where any pair can be read alone. bytes: of all encoded
    images and prompts, 0 where `blocks` is None. A source that wraps another one maps `blocks` to its own indices; one
    without these two is taken for one of cheap random access.
    """

    ties: int
    blocks: np.ndarray | None
    bytes: int

    def __len__(self) -> int: ...

    def read(self, index: int) -> Pair:
        """The pair at index 0..len-1, from any thread. BadPair if its record cannot be used."""
        ...


def open_source(
    path: str, format: Format = "auto", *, images: str | None = None, cache_mb: float | None = None
) -> Source:
    """Reads the index of a file, folder, pattern or fsspec URL; images stay where they are. Refusal if it is none.

    images: folder that the paths in a JSON listing start from; None: the listing's own. cache_mb: MiB of decoded
    row groups kept in memory; None: what the order of the pairs needs.
    """
    source = _open(path, format, images, None if cache_mb is None else int(cache_mb * 2**20))
    if len(source) == 0:
        raise Refusal(
            f"data.source: {path} has no usable pair ({source.ties} ties); preference training needs pairs "
            "with a better and a worse image"
        )
    return source


def _open(path: str, format: Format, images: str | None, cache_bytes: int | None) -> Source:
    # a reader is imported when a source of its kind is opened: the readers import this file
    if format == "auto" and not is_url(path):
        place = Path(path).expanduser()
        if place.name == "metadata.jsonl" or (place / "metadata.jsonl").exists():
            format = "folder"
        elif place.suffix in (".json", ".jsonl"):
            format = "hpd"
    if format in ("folder", "hpd"):
        if is_url(path):
            raise Refusal(f"data.source: {path}: a {format} source is read from this machine's disk; copy it there")
        place = Path(path).expanduser()
        if not place.exists():
            raise _nothing_there(path)
        root = None if images is None else Path(images).expanduser()
        if format == "folder":
            from inpo_fast.data.folder import FolderSource

            return FolderSource(place, root)
        from inpo_fast.data.hpd import HpdSource

        return HpdSource(place, root)
    if images is not None:
        raise Refusal("data.images: only a listing (metadata.jsonl, JSON) names images by path; remove the key")
    suffixes = (".tar",) if format == "webdataset" else (".parquet",)
    files = _files(path, suffixes)
    if format == "auto" and (not files or files[0].name.endswith(".tar")):
        files = files or _files(path, (".tar",))
        format = "webdataset" if files else format
    if not files:
        what = {"auto": "neither metadata.jsonl nor *.parquet nor *.tar", "webdataset": "no *.tar"}
        raise Refusal(f"data.source: {path} holds {what.get(format, 'no *.parquet')}")
    if format == "webdataset":
        from inpo_fast.data.webdataset import WebdatasetSource

        return WebdatasetSource(files)
    from inpo_fast.data.parquet import ParquetSource

    return ParquetSource(files, cache_bytes)


def _files(path: str, suffixes: tuple[str, ...]) -> list[File]:
    files = find(path, suffixes)
    if files is None:
        raise _nothing_there(path)
    return files


def _nothing_there(path: str) -> Refusal:
    return Refusal(
        f"data.source: no such file or folder: {path}; give a .parquet, .tar or .json file, a folder of them, a "
        "pattern in quotes, a folder with metadata.jsonl, or an fsspec URL such as hf://datasets/NAME"
    )
