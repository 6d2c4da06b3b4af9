"""Files on this machine or behind an fsspec URL (hf://, s3://, memory:// …): found, opened, read in parts."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular
from inpo_fast.runtime.masking import masked_address


@dataclass(frozen=True)
class File:
    """path: as its file system wants it. name: relative to what was asked for, with slashes; part of a pair's id.

    fs: the fsspec file system, None for this machine's.
    """

    path: str
    name: str
    fs: Any = None

    def __str__(self) -> str:
        return self.path

    def open(self, *, in_order: bool) -> BinaryIO:
        """in_order: read from front to back; otherwise a remote one fetches what is asked for and nothing around it."""
        if self.fs is None:
            return open_regular(self.path)
        return self.fs.open(self.path, "rb", **({} if in_order else {"cache_type": "none"}))

    def size(self) -> int:
        return Path(self.path).stat().st_size if self.fs is None else self.fs.size(self.path)

    def is_lfs_pointer(self) -> bool:
        """Asked when a reader has failed: whether there is a Git LFS pointer in the file's place."""
        try:
            (beginning,) = self.read((0, len(git_lfs.BEGINNING)))
        except Exception:  # a remote file system raises what its library raises
            return False
        return git_lfs.holds_pointer(beginning)

    def read(self, *spans: tuple[int, int]) -> list[bytes]:
        """The bytes of each (start, length)."""
        if self.fs is not None:
            return [self.fs.cat_file(self.path, start=start, end=start + length) for start, length in spans]
        parts = []
        with open_regular(self.path) as file:
            for start, length in spans:
                file.seek(start)
                parts.append(file.read(length))
        return parts


def is_url(source: str) -> bool:
    return "://" in source and not source.startswith("file://")


def find(source: str, suffixes: tuple[str, ...]) -> list[File] | None:
    """A single file whatever its name; of a folder all files below that end so; of a pattern what it matches.

    In the order of their paths. None if there is nothing at that place. UserError if the protocol is unknown, its
    package is missing, or the place cannot be asked.
    """
    return _find_remote(source, suffixes) if is_url(source) else _find_here(source, suffixes)


def _find_here(source: str, suffixes: tuple[str, ...]) -> list[File] | None:
    place = Path(source.removeprefix("file://")).expanduser()
    if place.is_file():
        return [File(str(place), place.name)]
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.name.endswith(suffixes) and p.is_file())
        return [File(str(p), p.relative_to(place).as_posix()) for p in found]
    if glob.has_magic(str(place)):
        found = sorted(p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file())
        return _named([str(p) for p in found], None) or None
    return None


def _find_remote(source: str, suffixes: tuple[str, ...]) -> list[File] | None:
    import fsspec

    protocol = source.split("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(source)
    except ImportError as problem:  # fsspec names the package
        raise UserError(
            f"data.source: {source}: {problem}; pip install inpo-fast[data] has the usual ones"
        ) from problem
    except ValueError as problem:
        raise UserError(
            f"data.source: {source}: unknown protocol {protocol}://; install the fsspec package that brings it "
            "(s3fs for s3://, gcsfs for gs://, adlfs for abfs://), or copy the files to this machine"
        ) from problem
    try:
        if glob.has_magic(root):
            found = sorted(fs.glob(root))
        elif fs.isfile(root):
            found = [root]
        else:
            found = sorted(p for p in fs.find(root) if p.endswith(suffixes))
            if not found and not fs.exists(root):
                return None
    except Exception as problem:  # a file system raises what its library raises: no network, no permission, …
        line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(f"data.source: {source} cannot be listed ({line}); check name, network and access") from problem
    return _named(found, fs)


def _named(paths: list[str], fs: Any) -> list[File]:
    """Names relative to the folder that all of them share. A signed address's parameters say who may read, not what is
    read: their values are no part of a pair's id."""
    shown = paths if fs is None else list(map(masked_address, paths))
    folders = [Path(path).parent.parts for path in shown]
    shared = 0
    while folders and all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    names = ["/".join(Path(path).parts[shared:]) for path in shown]
    return [File(path, name, fs) for path, name in zip(paths, names, strict=True)]
