"""Files that are either whole or absent."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Written aside and renamed: nobody ever sees half of it, and a crash leaves the old one."""
    aside = path.with_name(f".tmp-{path.name}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write under, of this call alone: several processes may make the same file.

    When the block ends, what stands there is synced and renamed; when it fails, removed.
    """
    aside = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
