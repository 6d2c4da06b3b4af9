"""Where a command may write, asked before its work, as hours later is too late: a place that can be written, never over
what it reads, nor over what is there unless it is told to."""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from inpo_fast.runtime.errors import UserError


def check_file(option: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """UserError, which begins with the option or key, where no file of this name can be written, or one that has
    another ending, so that a slip does not replace data. Writes nothing that stays."""
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{option} {path}: must end with {' or '.join(endings)}")
    _check_address(option, path)
    if not path.name or _is_folder(option, path):
        raise UserError(f"{option} {path} is a folder; name a file")
    if path.exists() and not path.is_file():  # what is written is renamed onto it, in the device's place
        raise UserError(f"{option} {path} is a device or a pipe; name a file")
    _check_place(option, path, path.absolute().parent)


def check_folder(option: str, path: Path) -> None:
    """UserError where no folder of this name can be written in. Writes nothing that stays."""
    _check_address(option, path)
    if path.resolve() == Path("/"):
        raise UserError(f"{option} {path} is the root of all folders; name one of its own")
    _check_place(option, path, path.absolute())


def check_free(
    output: Path,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None],
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> None:
    """UserError before anything is done. inputs: what the command reads, by the option that names it; links are
    followed. is_ours: of a file that is there, whether the command may replace it without a word."""
    solid = output.resolve()
    for option, named in inputs.items():
        place = None if named is None else Path(named).expanduser()
        if place is not None and place.exists() and (solid == place.resolve() or solid.is_relative_to(place.resolve())):
            if place.is_dir() and not output.exists():
                continue
            where = "lies in" if place.is_dir() else "is"
            raise UserError(
                f"--output {output} {where} {option} {named}, which would be overwritten; name another file"
            )
    if output.exists() and not overwrite and not is_ours(output):
        raise UserError(f"--output {output} is there already; --overwrite replaces it, or name another file")


def _check_address(option: str, path: Path) -> None:
    if found := re.match(r"([a-z][a-z0-9+.-]+):/", str(path)):  # a Path has lost one of the two slashes
        raise UserError(f"{option} {path} is an address ({found[1]}); outputs are written to this machine, name a path")


def _is_folder(option: str, path: Path) -> bool:
    try:
        path.lstat()  # unlike is_dir, says why a name cannot be
        return path.is_dir()
    except FileNotFoundError:
        return False
    except OSError as problem:
        raise _refusal(option, path, problem) from problem


def _check_place(option: str, path: Path, folder: Path) -> None:
    """The nearest folder above that exists must be one, and take a file; the names below it must be possible."""
    try:
        nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if len(os.fsencode(path.absolute())) > 4000:  # 4,095 with what is put behind
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        for name in path.absolute().relative_to(nearest).parts:
            if len(os.fsencode(name)) > 240:  # 255 with what is put before and behind while it is written
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if nearest.is_symlink() and not nearest.exists():
            raise OSError(errno.ENOENT, f"{nearest} is a link to {os.readlink(nearest)}, which leads nowhere")
        if not nearest.is_dir():
            raise OSError(errno.ENOTDIR, f"{nearest} is no folder")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as problem:
        raise _refusal(option, path, problem) from problem


def _refusal(option: str, path: Path, problem: OSError) -> UserError:
    return UserError(f"{option} {path} cannot be written ({problem.strerror}); name another place or mend its rights")
