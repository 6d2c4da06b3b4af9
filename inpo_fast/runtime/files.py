"""Files that are either whole or absent; and files of a user's folder, which may hold anything."""

import errno
import io
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: Path, content: bytes) -> None:
    """Written aside and renamed: nobody ever sees half of it, and a crash leaves the old one."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException as problem:
        aside.unlink(missing_ok=True)
        _name(problem, path)
        raise


def _name(problem: BaseException, path: Path) -> None:
    """Tells an OSError that knows no file which one could not be written. Arrow's have no number either."""
    if isinstance(problem, OSError) and problem.filename is None:
        full = "errno 28" in str(problem).lower()
        problem.errno, problem.strerror = (
            problem.errno or (errno.ENOSPC if full else errno.EIO),
            problem.strerror or (os.strerror(errno.ENOSPC) if full else str(problem)),
        )
        problem.filename = str(path)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def parse_json(text: str | bytes):
    """json.loads, but ValueError also of what is nested deeper than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise ValueError("nested too deeply") from problem


def json_or_none(path: Path) -> dict | None:
    """A file's JSON object; None where there is none."""
    try:
        content = parse_json(read_regular(path))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def open_regular(path: str | Path) -> BinaryIO:
    """A file of a user's folder, for reading. OSError of all that is no regular file: a named pipe, a socket or a
    device would be waited for, perhaps for ever."""
    return os.fdopen(regular_handle(path)[0], "rb")


def regular_handle(path: str | Path) -> tuple[int, int]:
    """The same as the number of an open file (the caller closes it), and its size in bytes."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(handle)
    if stat.S_ISREG(found.st_mode):
        return handle, found.st_size
    os.close(handle)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    raise OSError(errno.EINVAL, "is no regular file (a named pipe, a socket or a device)", str(path))


def read_regular(path: str | Path) -> bytes:
    """All bytes of a file of a user's folder. OSError as of `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """A text of a user's folder. OSError as of `open_regular`, ValueError (UnicodeDecodeError) of other bytes."""
    with io.TextIOWrapper(open_regular(path), encoding, errors) as file:
        return file.read()


def inside(folder: Path, name: str, *, resolved: bool = False) -> Path:
    """The file that a listing in `folder` names, symbolic links resolved. OSError where it would lie outside: a listing
    of somebody else must not say which files of this machine are read (or shown). ValueError of a NUL in the name.

    resolved: `folder` has no symbolic link any more.
    """
    root = str(folder) if resolved else os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(os.path.join(root, "")):
        raise PermissionError(errno.EACCES, f"outside {root}", name)
    return Path(path)


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
    except BaseException as problem:
        aside.unlink(missing_ok=True)
        _name(problem, path)
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
