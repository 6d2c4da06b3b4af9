"""One run per output folder: an advisory lock that the system gives back however the run ends."""

import fcntl
import json
import os
import socket
from pathlib import Path

from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import json_or_none

NAME = ".lock"


def launch_id() -> str:
    """The same for all attempts of one `torchrun --max-restarts`, another for every other start."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


def is_restart_of(folder: Path) -> bool:
    """Whether torchrun started this process again after a failure, and the run in the folder is the one that failed."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return _read(folder / NAME).get("launch") == launch_id()


def take(folder: Path, name: str = NAME, *, of: Path | None = None) -> int:
    """Locks the folder for the life of this process (the number of an open file is returned: keep it).

    name: of the lock's file, where a folder has several; of: what it stands for then. UserError, naming the other,
    where another process holds it.
    """
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        os.close(handle)
        raise UserError(_taken(folder, name, of)) from problem
    except OSError:
        pass  # a file system without locks
    _write(handle, {})
    return handle


def note_launch(handle: int) -> None:
    """From here on the folder's run is that of this launch, for `is_restart_of`."""
    _write(handle, {"launch": launch_id()})


def _write(handle: int, more: dict) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **more}).encode(), 0)


def check(folder: Path) -> None:
    """UserError where another process holds the folder. Changes nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as problem:
        raise UserError(_taken(folder)) from problem
    except OSError:
        pass
    finally:
        os.close(handle)


def _taken(folder: Path, name: str = NAME, of: Path | None = None) -> str:
    other = _read(folder / name)
    who = f"pid {other.get('pid', '?')} on {other.get('host', '?')}"
    return f"{of or folder}: another run is writing there ({who}); wait for it, stop it, or choose another --output"


def _read(path: Path) -> dict:
    return json_or_none(path) or {}
