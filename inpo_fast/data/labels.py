"""Which image is better and how sure that is, read the same way from the label fields of every source."""

import math

import numpy as np

from inpo_fast.runtime.errors import UserError


def decide(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pick-a-Pic's two label columns, (N,) each, which add up to 1: 1/0, 0/1, 0.5/0.5 a tie, 0.7/0.3 a soft label.

    Gives the winning side (N,) int8, -1 where neither is better or the labels say nothing, and (N,) float64 how sure
    that is, in (0.5, 1].
    """
    label = np.maximum(first, second)
    # comparisons with NaN are false: undecided
    decided = (np.abs(first + second - 1) < 1e-6) & (np.minimum(first, second) >= 0) & (label > 0.5 + 1e-6)
    return np.where(decided, second > first, -1).astype(np.int8), np.where(decided, label, 0.5)


def choice(record: dict, where: str) -> tuple[int, float] | None:
    """The same of a JSON object with `label`, 0 (image_0 is better) to 1, or with label_0 and label_1; None: a tie."""
    if "label" in record:
        second = _number(record["label"], where, "label")
        if not 0 <= second <= 1:
            raise _unclear(where, record["label"])
        first = 1 - second
    else:
        first, second = (_number(record[key], where, key) for key in ("label_0", "label_1"))
        if not (0 <= first <= 1 and abs(first + second - 1) < 1e-6):
            raise UserError(f"{where}: label_0 {first} and label_1 {second}; expected two shares that add up to 1")
    side, label = decide(np.array([first]), np.array([second]))
    return None if side[0] < 0 else (int(side[0]), float(label[0]))


def confidence(record: dict, where: str) -> float | None:
    """Of a record whose better image is known: 0.5 to 1, absent or null 1; None at 0.5, a tie."""
    if (given := record.get("confidence")) is None:
        return 1.0
    value = _number(given, where, "confidence")
    if not 0.5 <= value <= 1:
        raise UserError(
            f"{where}: confidence {given!r}; expected 0.5 (a tie) to 1, the probability that the better image is better"
        )
    return None if value <= 0.5 + 1e-6 else value


def weight(record: dict, where: str) -> float:
    """0 or more; absent or null 1."""
    if (given := record.get("weight")) is None:
        return 1.0
    value = _number(given, where, "weight")
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{where}: weight {given!r}; expected a finite number, not negative")
    return value


def _number(value: object, where: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unclear(where, value, key)
    return float(value)


def _unclear(where: str, value: object, key: str = "label") -> UserError:
    if key == "label":
        need = "expected 0 or 1 (the better image), a number between (a soft label), or 0.5 (tie)"
    else:
        need = "expected a number"
    return UserError(f"{where}: {key} {value!r}; {need}")
