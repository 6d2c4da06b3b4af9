"""What every process of a run finds out by itself and only the first one says."""

import logging
import os


def warn_once(log: logging.Logger, message: str, *values: object) -> None:
    """A warning, once a run and not once a process. What only this process knows is logged as ever."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(message, *values)
