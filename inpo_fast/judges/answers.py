"""The score in a language model's answer, by a written rule that would rather find none than a wrong one.

1. What stands before the last `</think>` (thinking, thought, reasoning, reflection) is no answer; thinking that is
   never closed: unclear.
2. An answer that is a JSON object, also between ``` lines: where exactly one of its keys is `score` or `rating`, what
   stands there, by the rules below where it is a text.
3. `N/HIGH`, `N out of HIGH`, and `N of HIGH` at the end of a sentence, HIGH the scale's upper end: N. Where there is
   such a one, nothing else counts; several with different N, or one off the scale: unclear.
4. Otherwise exactly one number on the scale, from low to high, ends included: that one. None or several: unclear, also
   where the others name the scale (on a scale from 0 to 10, a 7). A number off the scale (a year) is passed over.

A number that is a part of something else counts as one in 3 and 4, but is never the score: the end of a range (7-8,
between 6 and 7, six or 7), a fraction (7/5, 7 out of 100), a percentage (unless the scale is 0 to 100), minus something
on a scale from 0 up, what has a letter beside it (3D, SD1.5, 7th, 10-point), a comma that may be decimal or a list's
(7,5), 7+, >7, 7 and a half, and a scale that is only named (out of 10, seven of 10). Words (seven) are no numbers.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

LONGEST = 20_000  # characters of an answer without its thinking: a longer one is no score
AROUND = 40  # characters beside a number that tell what it is
THINKING = r"(?:think|thinking|thought|reasoning|reflection)"
KEYS = ("score", "rating")
WORD = r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|half)"

_NUMBER = re.compile(
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:[.,]\d+)*(?:[eE][+-]?\d+(?![\w.]))?|(?<![\w.,])\.\d+"
)
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_JOIN = r"(?:\s*(?:-|~|\.\.+)\s*|\s+(?:to|or|and|through)\s+)"
_WORD_JOIN = r"(?:-|\s+(?:to|or|and)\s+)"
_OUT_OF = re.compile(r"\s*/\s*|\s+out\s+of\s+(?:a\s+(?:possible\s+)?)?|\s+of\s+", re.IGNORECASE)
_MINUS = re.compile(r"(?<![\w.)\]%])-$")  # after a digit it is a range's
# what makes a number a part of something else, in the text before it
_BEFORE = re.compile(
    rf"[A-Za-z]-?$|[A-Za-z]\.$|\d[:.,]$|(?:^|[\s:(])[<>≤≥]=?\s*$|\d%?{_JOIN}$|\b{WORD}{_WORD_JOIN}$|\d\s*/\s*$"
    rf"|\bout\s+of\s+(?:(?:a|the|possible|maximum)\s+)*$|\bscale\s+of\s+$|\bmax(?:imum)?(?:\s+of)?:?\s+$"
    rf"|\b{WORD}(?:\s+of\s+|\s*/\s*)$",
    re.IGNORECASE,
)
# and in the text behind it
_AFTER = re.compile(
    rf"-?[A-Za-z]|\s*%|[:.,]\d|\+|\s+per\s?cent\b|\s+and\s+a\s+(?:half|quarter)\b|{_JOIN}-?\.?\d|{_WORD_JOIN}{WORD}\b",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\s*/\s*[\w.]|\s+out\s+of\s+(?!ten\b)|\s+of\s+\d", re.IGNORECASE)  # of another scale than ours


@dataclass(frozen=True)
class _Number:
    value: float
    start: int
    end: int
    plain: bool  # not a part of something else; a fraction's upper number may be


def score_in(answer: str, low: float, high: float) -> float | None:
    """The score, None where it is unclear. low < high: the ends of the scale that was asked for."""
    text = _said(answer)
    if text is None:
        return None
    found = _json(text)
    if isinstance(found, dict):
        values = [value for name, value in found.items() if name.strip().lower() in KEYS]
        if len(values) == 1 and not isinstance(values[0], str):
            value = values[0]
            good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            return float(value) if good else None
        text = values[0] if len(values) == 1 else text
    return _in_words(text, low, high)


def _said(answer: str) -> str | None:
    """What stands behind the thinking, in plain characters; None where the thinking never ends, or it is too long."""
    text = re.split(rf"</{THINKING}>", answer, flags=re.IGNORECASE)[-1].strip()
    if len(text) > LONGEST or re.search(rf"<{THINKING}>", text, re.IGNORECASE):
        return None
    if any(unicodedata.category(c) in ("No", "Nl") for c in text):  # ½ ² ① Ⅶ: made plain, they would join a number
        return None
    text = re.sub(r"[\u2014\u2015]", " - ", text)
    text = re.sub(r"[\u2010-\u2013\u2212]", "-", unicodedata.normalize("NFKC", text))
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text).strip()


def _json(text: str) -> object:
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json").removeprefix("JSON")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _in_words(text: str, low: float, high: float) -> float | None:
    text = re.sub(r"[*`_$]+", "", text)  # emphasis and formulas
    if (low, high) == (0, 100):
        text = text.replace("%", "")
    numbers = _numbers(text, low)
    ratios = [n for n, whole in pairwise(numbers) if _is_ratio(text, n, whole, high)]
    if ratios:
        good = all(n.plain and low <= n.value <= high and n.value == ratios[0].value for n in ratios)
        return ratios[0].value if good else None
    on_scale = [n for n in numbers if low <= n.value <= high]
    if len(on_scale) != 1 or not on_scale[0].plain or _FRACTION.match(text, on_scale[0].end):
        return None
    return on_scale[0].value


def _is_ratio(text: str, n: _Number, whole: _Number, high: float) -> bool:
    between, behind = text[n.end : whole.start], text[whole.end : whole.end + AROUND]
    if whole.value != high or not _OUT_OF.fullmatch(between):
        return False
    if re.match(r"\s*/\s*\d|\s*%", behind) or re.search(r"\d\s*/\s*$", text[max(0, n.start - AROUND) : n.start]):
        return False  # a date, or a longer fraction
    return between.strip() != "of" or re.match(r"\s*(?:[.,;:!)\]}\n]|$|points?\b|stars?\b)", behind) is not None


def _numbers(text: str, low: float) -> list[_Number]:
    out = []
    for found in _NUMBER.finditer(text):
        before, after = text[max(0, found.start() - AROUND) : found.start()], text[found.end() : found.end() + AROUND]
        written, plain = found[0], not (_BEFORE.search(before) or _AFTER.match(after))
        if _GROUPED.fullmatch(written):
            written = written.replace(",", "")
        elif "," in written or written.count(".") > 1:
            written, plain = re.match(r"\d+", written)[0], False
        value = float(written)
        if _MINUS.search(before):
            value, plain = (-value, plain) if low < 0 else (value, False)
        out.append(_Number(value, found.start(), found.end(), plain))
    return out
