"""Files that are either whole or absent."""

import os
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
