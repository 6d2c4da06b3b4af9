"""The one exception for what a user can mend: bad configuration, data, folders, a full disk."""

import os
import sys
import time
from collections.abc import Callable


class Refusal(ValueError):
    """Says what is wrong, where, and how to mend it, in one line."""


def run_or_refuse(program: str, main: Callable[[], None]) -> None:
    """Runs a command line; a Refusal becomes one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except Refusal as problem:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(
                2
            )  # if the first process refuses for the same reason, torchrun ends this one before it repeats it
        print(f"{program}: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
