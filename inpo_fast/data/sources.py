"""Where preference pairs come from. Every source is a sequence of `Pair`s; ties are left out of it.

parquet     Pick-a-Pic v2's schema, read one row group at a time (parquet.py)
folder      metadata.jsonl beside the images (folder.py)
hpd         JSON in the manner of HPDv2 and HPDv3 (hpd.py)
webdataset  tar shards (webdataset.py)
"""

import logging
from pathlib import Path

from inpo_fast.data.config import Format
from inpo_fast.data.folder import FolderSource
from inpo_fast.data.hpd import HpdSource
from inpo_fast.data.labels import undecided_of
from inpo_fast.data.pair import Source
from inpo_fast.data.parquet import ParquetSource
from inpo_fast.data.places import File, find, is_url
from inpo_fast.data.webdataset import WebdatasetSource
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.masking import keep_secrets_of
from inpo_fast.runtime.warn_once import warn_once

log = logging.getLogger(__name__)


def open_source(
    path: str, format: Format = "auto", *, images: str | None = None, cache_mb: float | None = None
) -> Source:
    """Reads the index of a file, folder, pattern or fsspec URL; images stay where they are. UserError if it is none.

    images: folder that the paths in a JSON listing start from; None: the listing's own. cache_mb: MiB of decoded
    row groups kept in memory; None: what the order of the pairs needs.
    """
    if not path.strip():  # as a path it would be the current folder, and all parquet below it
        raise UserError("data.source is empty; name a file, a folder or an fsspec URL (of the current folder: .)")
    if not is_url(path) and Path(path).expanduser().resolve() == Path("/"):  # looked through for hours, other disks too
        raise UserError(f"data.source: {path} is the root of all folders; name the one with the pairs")
    keep_secrets_of(path)
    source = _open(path, format, images, None if cache_mb is None else int(cache_mb * 2**20))
    if len(source) == 0:
        raise UserError(
            f"data.source: {path} has no usable pair ({undecided_of(source)}); preference training needs pairs "
            "with a better and a worse image"
        )
    if (left := undecided_of(source)).unclear or left.unlabelled:
        warn_once(log, "data.source: %s leaves out %s", path, left)
    return source


def _open(path: str, format: Format, images: str | None, cache_bytes: int | None) -> Source:
    if format == "auto" and not is_url(path):
        place = Path(path).expanduser()
        if place.name == "metadata.jsonl" or (place / "metadata.jsonl").exists():
            format = "folder"
        elif place.suffix in (".json", ".jsonl"):
            format = "hpd"
    if format in ("folder", "hpd"):
        if is_url(path):
            raise UserError(f"data.source: {path}: a {format} source is read from this machine's disk; copy it there")
        place = Path(path).expanduser()
        if not place.exists():
            raise _nothing_there(path)
        root = None if images is None else Path(images).expanduser()
        return FolderSource(place, root) if format == "folder" else HpdSource(place, root)
    if images is not None:
        raise UserError("data.images: only a listing (metadata.jsonl, JSON) names images by path; remove the key")
    suffixes = (".tar",) if format == "webdataset" else (".parquet",)
    files = _files(path, suffixes)
    if format == "auto" and (not files or files[0].name.endswith(".tar")):
        files = files or _files(path, (".tar",))
        format = "webdataset" if files else format
    if not files:
        what = {"auto": "neither metadata.jsonl nor *.parquet nor *.tar", "webdataset": "no *.tar"}
        raise UserError(f"data.source: {path} holds {what.get(format, 'no *.parquet')}")
    return WebdatasetSource(files) if format == "webdataset" else ParquetSource(files, cache_bytes)


def _files(path: str, suffixes: tuple[str, ...]) -> list[File]:
    files = find(path, suffixes)
    if files is None:
        raise _nothing_there(path)
    return files


def _nothing_there(path: str) -> UserError:
    return UserError(
        f"data.source: no such file or folder: {path}; give a .parquet, .tar or .json file, a folder of them, a "
        "pattern in quotes, a folder with metadata.jsonl, or an fsspec URL such as hf://datasets/NAME"
    )
