"""Which image is better and how sure that is, read the same way from the label fields of every source.

Labels are two shares that add up to 1. Stored as float16, or rounded to two or three digits (0.67 and 0.34), they miss
it by up to ROUNDED, and are divided by their sum. What misses it by more is no such label, whatever was meant: ratings
(5 and 3), percentages, counts of votes. It is counted apart from the ties, and above a limit a source is refused.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from inpo_fast.runtime.errors import UserError

TIE, UNLABELLED, UNCLEAR = -1, -2, -3  # in place of a winning side
EXACT = 1e-6
ROUNDED = 0.0101  # two shares rounded to two digits each
CONTRADICT = "(they contradict each other)"


@dataclass(frozen=True)
class Undecided:
    """Rows that make no pair, by why: neither image is the better one; no label (null or NaN); numbers that are no two
    shares that add up to 1, and the first of these."""

    ties: int = 0
    unlabelled: int = 0
    unclear: int = 0
    example: str = ""

    def counted(self, side: int, said: str) -> "Undecided":
        """With one more row, of which `said` is where and what."""
        if side == TIE:
            return replace(self, ties=self.ties + 1)
        if side == UNLABELLED:
            return replace(self, unlabelled=self.unlabelled + 1)
        return replace(self, unclear=self.unclear + 1, example=self.example or said)

    def joined(self, other: "Undecided") -> "Undecided":
        counts = (getattr(self, name) + getattr(other, name) for name in ("ties", "unlabelled", "unclear"))
        return Undecided(*counts, self.example or other.example)

    def __str__(self) -> str:
        said = f"{self.ties:,} ties"
        if self.unlabelled:
            said += f", {self.unlabelled:,} without a label"
        if self.unclear:
            said += f", {self.unclear:,} with labels that are no two shares that add up to 1, such as {self.example}"
        return said


def undecided_of(source: object) -> Undecided:
    """Of a source that counts only its ties too."""
    return getattr(source, "undecided", None) or Undecided(getattr(source, "ties", 0))


def check_undecided(source: object, rows: int, limit: float) -> None:
    """UserError where more than this share of the rows (never before the second) has labels that are none."""
    found = undecided_of(source)
    if found.unclear > max(1, limit * rows):
        raise UserError(
            f"data.source: {found.unclear:,} of {rows:,} rows have labels that are no two shares that add up to 1, "
            f"such as {found.example}; more than data.bad_pair_limit={limit:g} lets pass. Write the probability that "
            "each image is the better one (counts of votes and percentages divided by their sum; of ratings 1/0, 0/1 "
            "or 0.5/0.5), or raise the limit"
        )


def decide(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pick-a-Pic's two label columns, (N,) each, which add up to 1: 1/0, 0/1, 0.5/0.5 a tie, 0.7/0.3 a soft label.

    Gives the winning side (N,) int8, or TIE, UNLABELLED, UNCLEAR; and (N,) float64 how sure that is, in (0.5, 1], 0.5
    where no side wins.
    """
    first, second = (np.asarray(x, dtype=np.float64) for x in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        total = first + second
        off = np.abs(total - 1)
        label = np.maximum(first, second)
        label = np.where(off < EXACT, label, label / total)
        shares = (off < ROUNDED) & (np.minimum(first, second) >= 0)
        each = (np.maximum(first, second) > 0.5 + EXACT) & (np.minimum(first, second) < 0.5 - EXACT)
        decided = shares & (label > 0.5 + EXACT) & (each | (off < EXACT))
    unknown = np.isnan(first) | np.isnan(second)
    side = np.select([unknown, ~shares, ~decided], [UNLABELLED, UNCLEAR, TIE], np.where(second > first, 1, 0))
    return side.astype(np.int8), np.where(decided, label, 0.5)


def choice(record: dict, where: str) -> tuple[int, float]:
    """The same of a JSON object with `label`, 0 (image_0 is better) to 1, or with label_0 and label_1; UNCLEAR where it
    has both and they contradict each other."""
    if "label" in record:
        second = _number(record["label"], where, "label")
        first = 1 - second
    else:
        first, second = (_number(record[key], where, key) for key in ("label_0", "label_1"))
    side, label = decide(np.array([first]), np.array([second]))
    if "label" in record and contradict(int(side[0]), _side_beside(record)):
        return UNCLEAR, 0.5
    return int(side[0]), float(label[0])


def contradict(side: int, other: int) -> bool:
    """Whether two statements about a pair name different sides, or one a side and one a tie. What is no label says
    nothing."""
    return side != other and min(side, other) >= TIE


def _side_beside(record: dict) -> int:
    """What label_0 and label_1, or one of them, say in a record that has `label`; no numbers say nothing."""
    given = [record.get(key) for key in ("label_0", "label_1")]
    if given == [None, None]:
        return UNLABELLED
    usable = [not isinstance(x, bool) and isinstance(x, int | float) and abs(x) <= 1 for x in given]
    first, second = (float(x) if good else math.nan for x, good in zip(given, usable, strict=True))
    first, second = (1 - second if given[0] is None else first), (1 - first if given[1] is None else second)
    return int(decide(np.array([first]), np.array([second]))[0][0])


def said(record: dict) -> str:
    """The label fields of a record, as an example of what is none."""
    names = ("confidence",) if "confidence" in record else ("label", "label_0", "label_1")
    fields = {name: record[name] for name in names if isinstance(record.get(name), int | float)}
    text = ", ".join(f"{name} {value:g}" for name, value in fields.items())
    return f"{text} {CONTRADICT}" if "label" in fields and len(fields) > 1 else text


def confidence(record: dict, where: str) -> tuple[int, float]:
    """Of a record whose better image is known, side 0: 0.5 (a tie) to 1, absent or null 1."""
    if (given := record.get("confidence")) is None:
        return 0, 1.0
    value = _number(given, where, "confidence")
    side, label = decide(np.array([value]), np.array([1 - value]))
    return (UNCLEAR, 0.5) if side[0] == 1 else (int(side[0]), float(label[0]))  # the worse one is the better one?


def weight(record: dict, where: str) -> float:
    """0 or more; absent or null 1."""
    if (given := record.get("weight")) is None:
        return 1.0
    value = _number(given, where, "weight")
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: weight {given!r}; expected a finite number, not negative")
    return value


def _number(value: object, where: str, key: str) -> float:
    """NaN for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        need = "expected a number"
        if key == "label":
            need = "expected 0 or 1 (the better image), a number between (a soft label), or 0.5 (tie)"
        raise UserError(f"{where}: {key} {value!r}; {need}")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
