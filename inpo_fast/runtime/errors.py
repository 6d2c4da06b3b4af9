"""The one exception for what a user can mend: bad configuration, data, folders, a full disk; and what a command line
says to its user."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from inpo_fast.runtime.masking import mask_logs, masked
from inpo_fast.runtime.signals import Signals, exit_status, say_and_leave


class UserError(ValueError):
    """Says what is wrong, where, and how to mend it, in one line; secrets in it are masked."""

    def __init__(self, message: object = ""):
        super().__init__(masked(str(message)))


class Hang(UserError):
    """Another process does not answer: this one must end without waiting for anything that needs it."""


def command_line(program: str, about: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose --help is the file's docstring as it is written. Names are given in full: a short form could be
    the beginning of one of the trainer's keys."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=program, description=about, epilog=epilog, formatter_class=kind, allow_abbrev=False
    )


def run_command(program: str, main: Callable[[], None], again: str = "start it again") -> None:
    """Runs a command line; a UserError becomes one line on stderr and exit status 2, never a traceback. So does a GPU
    that is full where nobody knew a smaller batch. Asked to stop, it ends as signals.py says.

    again: how to go on after that, for the line that says so.
    """
    mask_logs()
    with Signals(program, again, stays=main.__module__ == "__main__") as signals:
        try:
            main()
        except BaseException as problem:
            if signals.raised or isinstance(problem, KeyboardInterrupt):  # what a library makes of it is another thing
                by = signals.asked or "SIGINT"
                say_and_leave(signals.line(by), exit_status(by))
            _tell(program, problem)


def _tell(program: str, problem: BaseException) -> NoReturn:
    if isinstance(problem, Hang):
        say_and_leave(f"{program}: {problem}", 2)  # threads and messages under way would wait for the other process
    if isinstance(problem, UserError):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # torchrun ends this process if the first one had the same error: said once
        print(f"{program}: {problem}", file=sys.stderr, flush=True)
        sys.exit(getattr(problem, "status", 2))
    if type(problem).__name__ == "OutOfMemoryError":  # torch's; importing it would slow down every error
        said = ". ".join(" ".join(str(problem).split()).split(". ")[:2]).rstrip(".")
        remedy = "take a smaller model, resolution or batch; --dry-run of inpo_fast.train counts what needs how much"
        print(f"{program}: {said}; {remedy}", file=sys.stderr, flush=True)
        sys.exit(2)
    raise problem
