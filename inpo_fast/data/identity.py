"""What the pairs of a source are, in a few digests: so that a run is not continued, a cache not read and a sidecar of
labels not applied with other pairs.

By content, never by names of folders or times of files: a copy on a node's own disk is the same source. Two digests,
so that it can be said what changed:

rows       prompts, labels, weights, their order and how they lie in files. Listings and the JSON of tar shards: every
           byte. Parquet: all values of the columns that a run reads beside the pictures, and where row groups end.
pictures   of each picture that a listing names or a tar shard holds its size and 4 KiB at both ends; of parquet the
           sizes of the picture columns in each row group, these whole where they are small, and 16 samples of 4 KiB
           where they are large. Behind an fsspec URL the sizes, and the checksum that the file system gives of a file.

Missed is what leaves all of these as they were: in the middle of a picture other bytes of the same number (of a large
row group in parquet: other pictures of exactly the same sizes, away from the samples); behind a URL, where the file
system gives no checksum, other pictures of the same sizes.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from inpo_fast.data.pair import Source
from inpo_fast.data.places import File
from inpo_fast.runtime.files import regular_handle

END = 4096  # bytes of a picture's beginning and end
READERS, PART = 16, 256  # threads that look at files (disks are mostly waited for), files that each is given at a time
CHECKSUMS = ("ETag", "etag", "sha256", "md5Hash", "md5", "crc32c", "content_md5", "blob_id")
WORDS = {
    "pairs": "the number of pairs",
    "rows": "the rows of data.source (prompts, labels, weights or their order)",
    "pictures": "the pictures of data.source",
    "labels": "the labels of data.labels",
    "filters": "what data.filters keep or weigh",
}

Identity = dict[str, str | int]


def identity_of(source: Source) -> Identity:
    """pairs: their number; rows, pictures: 32 hexadecimal digits each; labels, filters where a sidecar or filters
    changed what the source says. Reads parts of every file: seconds for most sources, minutes for millions of loose
    pictures; asked again, the same source answers at once. OSError and UserError as reading the source raises them."""
    known = getattr(source, "_identity", None)
    if known is None:
        own = source.identity() if hasattr(source, "identity") else {}
        known = {"pairs": len(source)} | own
        source._identity = known
    return dict(known)


def differences(there: Identity, here: Identity) -> list[str]:
    """What is not the same, in words for a line such as "its pictures differ"; empty where all is.

    What one of the two does not know (an older manifest) does not count.
    """
    both = [name for name in WORDS if name in there and name in here and there[name] != here[name]]
    counts = f" ({there['pairs']:,} then, {here['pairs']:,} now)" if "pairs" in both else ""
    return [WORDS[name] + (counts if name == "pairs" else "") for name in both]


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def add(digest: Any, *parts: bytes) -> None:
    """The lengths count: ("ab", "c") is not ("a", "bc")."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def of_files(paths: Iterable[Path | None]) -> str:
    """Of pictures that are files each, in their order. None, or one that cannot be read, counts too."""
    digest = new_digest()
    with ThreadPoolExecutor(READERS) as pool:
        for part in _mapped(pool, _of_part, _parts(iter(paths))):
            digest.update(part)
    return digest.hexdigest()


def _of_part(paths: list[Path | None]) -> bytes:
    return b"".join(_of_file(path) for path in paths)


def _of_file(path: Path | None) -> bytes:
    try:
        if path is None:
            raise OSError("not to be read")
        handle, size = regular_handle(path)
        try:
            found = b"".join(ends(handle, 0, size))
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return bytes(24)
    return size.to_bytes(8, "little") + hashlib.blake2b(found, digest_size=16).digest()


def ends(handle: int, start: int, length: int) -> Iterator[bytes]:
    """The first END bytes of a stretch of an open file, and the last ones that were not among them."""
    yield os.pread(handle, min(END, length), start)
    if length > END:
        beyond = max(END, length - END)
        yield os.pread(handle, length - beyond, start + beyond)


def checksum(file: File) -> str:
    """What a remote file system says of a file's content beside its size; "" where it says nothing."""
    try:
        info = file.fs.info(file.path)
    except Exception:  # a remote file system raises what its library raises
        return ""
    lfs = info.get("lfs") or {}
    given = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    given = given or next((info[name] for name in CHECKSUMS if info.get(name)), "")
    return str(given).strip('"')


def _parts(items: Iterator) -> Iterator[list]:
    while part := list(islice(items, PART)):
        yield part


def _mapped(pool: ThreadPoolExecutor, function, items: Iterator):
    """pool.map that does not take all items at once."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == 4 * READERS:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
