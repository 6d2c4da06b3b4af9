"""What a number on a command line may be: types for argparse, whose refusals name the limits."""

import argparse
import math
from collections.abc import Callable

MANY = 10**9  # more of anything that is counted is a slip of the keyboard
SEEDS = 2**63 - 1


def whole(least: int = 1, most: int = MANY) -> Callable[[str], int]:
    """A whole number within limits."""

    def read(text: str) -> int:
        try:
            number = int(text) if len(text) <= 40 else None
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number in {least}..{most}")
        return number

    return read


def number(*, above: float | None = None, least: float | None = None, most: float = 1e9) -> Callable[[str], float]:
    """A finite number within limits: above `above`, or at least `least`, and at most `most`."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        low = above is None or found > above
        low = low and (least is None or found >= least)
        if not (math.isfinite(found) and low and found <= most):
            limits = f" above {above:g}" if above is not None else "" if least is None else f" of at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number{limits}, at most {most:g}")
        return found

    return read


seed = whole(0, SEEDS)
