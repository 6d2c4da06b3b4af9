"""Files that are either whole or absent."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Written aside and renamed: nobody ever sees half of it, and a crash leaves the old one."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


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
        allow_reading(aside)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def allow_reading(path: Path) -> None:
    """Gives a file the rights that `open` gives a new one under this process's umask: safetensors 0.8 writes mode 0600.

    Elsewhere than on Linux, where the umask cannot be asked without setting it, 022 counts.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        umask = next(int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    except (OSError, StopIteration):
        umask = 0o022
    path.chmod(0o666 & ~umask)
