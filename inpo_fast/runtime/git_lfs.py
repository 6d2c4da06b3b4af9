"""Git LFS pointers: what `git clone` leaves in place of large files where git-lfs is not installed, or skipped them.

A pointer is a text of some 130 bytes that begins with the line below (git-lfs, docs/spec.md). It passes for any file
by its name, and every reader fails in its own words, one of which advises to let pickles run code.
"""

from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"
LARGEST = 1024  # bytes that a pointer may have, by the same document
WHAT = "is a Git LFS pointer, a note of where the file lies and not the file: run `git lfs pull` in its repository"


def holds_pointer(content: bytes) -> bool:
    """Of a whole file, or of its first bytes."""
    return content.startswith(BEGINNING)


def is_pointer(path: str | Path) -> bool:
    """Of a file on this machine; False where there is none that can be read."""
    try:
        path = Path(path)
        if not path.is_file() or path.stat().st_size > LARGEST:
            return False
        with path.open("rb") as file:
            return holds_pointer(file.read(len(BEGINNING)))
    except OSError:
        return False


def pointers_below(folder: str | Path) -> list[Path]:
    """Of the files of a folder itself, those that are pointers."""
    folder = Path(folder)
    return sorted(path for path in folder.iterdir() if is_pointer(path)) if folder.is_dir() else []
