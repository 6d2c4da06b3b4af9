"""The score in a language model's answer, by a written rule that would rather find none than a wrong one.

1. What stands before the last `</think>` (thinking, thought, reasoning, reflection) is no answer; thinking that is
   never closed: unclear.
2. An answer that is a JSON object, also between ``` lines: where exactly one of its keys is `score` or `rating`, what
   stands there, by the rules below where it is a text.
3. `N/HIGH`, `N out of HIGH`, and `N of HIGH` at the end of a sentence, HIGH the scale's upper end: N. Where there is
   such a one, nothing else counts; several with different N, or one off the scale: unclear.
   Not with a noun behind (10 out of 10 people): what may stand there is listed in _WENT_ON.
4. Otherwise exactly one number on the scale, from low to high, ends included, if it is said to be the score: that one.
   None or several: unclear, also where the others name the scale (on a scale from 0 to 10, a 7). A number off the scale
   (a year) is passed over. It is said to be the score where it is
   a. the whole answer, or, where it has not refused to rate, a line of its own or its last sentence; little
      words (it's a 7) and what comes after a dash or a conjunction aside;
   b. directly behind a word for it (score, rate, give, grade, answer, …), again with little words only between; where
      there is not even such a one (score 1: …), what is behind it must be as in a.
   So numbers of lists, steps and things (1. Good; step 1; #2; 5 apples) are none.

In 3 and 4 a negation in front of the number in its clause (not a 10/10), an if in its sentence, and a question make it
unclear.

A number that is a part of something else counts as one in 3 and 4, but is never the score: the end of a range (7-8,
between 6 and 7, six or 7), a fraction (7/5, 7 out of 100), a percentage (unless the scale is 0 to 100), minus something
on a scale from 0 up, what has a letter beside it (3D, SD1.5, 7th, 10-point), a comma that may be decimal or a list's
(7,5), 7+, >7, at least 7, less than 7, 7 or more, 7 and a half, and a scale that is only named (out of 10, seven of
10). Words (seven) are no numbers.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

LONGEST = 20_000  # characters of an answer without its thinking: a longer one is no score
AROUND = 40  # characters beside a number that tell what it is
BEFORE = 200  # in front of it, that tell whether it is the score
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
_MINUS = re.compile(r"(?<![\w.)\]%])-\Z")  # after a digit it is a range's
# what makes a number a part of something else, in the text before it
_BEFORE = re.compile(
    rf"[A-Za-z]-?\Z|[A-Za-z]\.\Z|\d[:.,]\Z|(?:^|[\s:(])[<>≤≥]=?\s*\Z|\d%?{_JOIN}\Z|\b{WORD}{_WORD_JOIN}\Z|\d\s*/\s*\Z"
    rf"|\bout\s+of\s+(?:(?:a|the|possible|maximum)\s+)*\Z|\bscale\s+of\s+\Z|\bmax(?:imum)?(?:\s+of)?:?\s+\Z"
    rf"|\b{WORD}(?:\s+of\s+|\s*/\s*)\Z|#\s*\Z|\b(?:no|nr|fig|pic|img|vol|v|p|ch|sec|ex)\.\s*\Z"
    r"|\b(?:than|at\s+(?:least|most)|over|under|above|below|beyond|up\s+to|near(?:ly)?|almost|far\s+from|short\s+of|close\s+to|minimum(?:\s+of)?)"
    r"(?:\s+an?)?\s+\Z",
    re.IGNORECASE,
)
# and in the text behind it
_AFTER = re.compile(
    rf"-?[A-Za-z]|\s*%|[:.,]\d|\+|\s+per\s?cent\b|\s+and\s+a\s+(?:half|quarter)\b|{_JOIN}-?\.?\d|{_WORD_JOIN}{WORD}\b"
    r"|\s+or\b|\s+at\s+(?:least|most|best)\b",
    re.IGNORECASE,
)
# what says that a number is the score: words for it in front, little words between, a way for the sentence to go on
_CUE = (
    r"(?:\b(?:scor(?:e[sd]?|ing)|rat(?:e[sd]?|ings?)|giv(?:e[sn]?|ing)|gave|grad(?:e[sd]?|ing)|answer|assign(?:s|ed)?"
    r"|award(?:s|ed)?|deserves?|earns?|verdict|overall|final|boxed|I(?:'d|\s+would)?\s+say)\b|[\u5f97\u8bc4\u6253]\u5206)"
)
_LITTLE = (
    r"(?:[^\w.!?;]|\b(?:in|is|was|it|its|s|this|that|the|an?|of|at|as|be|would|will|d|i|me|my|to|for|with|by|so|say|image"
    r"|picture|photo|overall|final|solid|strong|clear(?:ly)?|definite(?:ly)?)\b)"
)
_UNIT = r"(?:\s*(?:points?\b|stars?\b|marks?\b|\u5206)|\s+out\s+of\s+ten\b)?"
_JOINED = (
    r",?\s+(?:for|because|since|as|due|overall|given|based|considering|and|but|while|although|though|so|which"
    r"|to\s+(?:this|the|it))\b"
)
_BEHIND_CUE = re.compile(rf"{_CUE}{_LITTLE}*$", re.IGNORECASE)
_BARE_CUE = re.compile(rf"{_CUE}\s*$", re.IGNORECASE)
_OTHER_SCORE = re.compile(
    rf"\b(?:highest|maximum|max|lowest|minimum|average|mean|best|worst|top|possible)\s+{_CUE}\W", re.I
)
_REFUSED = re.compile(
    r"\b(?:cannot|can't|unable\s+to|no|not|won't|don't)\s+(?:\w+\s+){0,4}(?:scor|rat(?:e|ing)|grad(?:e|ing)|evaluat|assess|judge)",
    re.IGNORECASE,
)
_NOTHING_BEFORE = re.compile(
    r"(?:\W|\d|\b(?:in|is|it|s|this|that|an?|i|d|would|say|so|solid|strong|clear(?:ly)?|definite(?:ly)?)\b)*",
    re.IGNORECASE,
)
_OWN_SENTENCE = re.compile(r"(?:[.!?\u2026][\s\"'(\[]*|\n\W*)$")
_WENT_ON = re.compile(rf"{_UNIT}\s*(?:$|[.!;,:)\]}}<>\"'|\n(-]|(?<=\s)\W)|{_UNIT}{_JOINED}", re.IGNORECASE)
_NOTHING_BEHIND = re.compile(rf"{_UNIT}(?:[^\w?]*$|[.!]?[^\S\n]*\n|\s+-+\s|\s*\(|{_JOINED}|\s*</)", re.IGNORECASE)
_NO_CLAUSE = re.compile(
    r"\b(?:not?|never|cannot|without|unable|hardly|neither|nor)\b|n't\b|\bcant\b|\bdont\b", re.IGNORECASE
)
_CLAUSE = re.compile(r"[,;.!?\n]|\b(?:but|so)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[;.!?\n]")
_IF = re.compile(r"\b(?:if|unless)\b", re.IGNORECASE)
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
        good = good and not any(_denied(text, n) for n in ratios)
        return ratios[0].value if good else None
    on_scale = [n for n in numbers if low <= n.value <= high]
    if len(on_scale) != 1 or not on_scale[0].plain or _FRACTION.match(text, on_scale[0].end):
        return None
    return on_scale[0].value if _is_said(text, on_scale[0]) and not _denied(text, on_scale[0]) else None


def _is_said(text: str, n: _Number) -> bool:
    """Whether the answer says of this number that it is the score: 4 a and b."""
    before, behind = text[max(0, n.start - BEFORE) : n.start], text[n.end : n.end + AROUND]
    alone = _NOTHING_BEHIND.match(behind) is not None
    if _BEHIND_CUE.search(before):
        if _OTHER_SCORE.search(before):
            return False
        return alone if _BARE_CUE.search(before) else _WENT_ON.match(behind) is not None
    if n.start <= BEFORE and _NOTHING_BEFORE.fullmatch(before):
        return alone
    own = None if _REFUSED.search(before) else _OWN_SENTENCE.search(before)
    return own is not None and alone and ("\n" in own[0] or re.match(r"[^\w?]*$", behind) is not None)


def _denied(text: str, n: _Number) -> bool:
    """Whether the clause in front of the number has a negation, its sentence an if, or it is a question."""
    before = text[max(0, n.start - BEFORE) : n.start]
    clause, sentence = _CLAUSE.split(before)[-1], _SENTENCE.split(before)[-1]
    asked = re.match(r"[^\w.!;\n]*\?", text[n.end : n.end + AROUND])
    return bool(_NO_CLAUSE.search(clause) or _IF.search(sentence) or asked)


def _is_ratio(text: str, n: _Number, whole: _Number, high: float) -> bool:
    between, behind = text[n.end : whole.start], text[whole.end : whole.end + AROUND]
    if whole.value != high or not _OUT_OF.fullmatch(between):
        return False
    if re.match(r"\s*/\s*\d|\s*%", behind) or re.search(r"\d\s*/\s*$", text[max(0, n.start - AROUND) : n.start]):
        return False  # a date, or a longer fraction
    if between.strip() == "of":
        return re.match(r"\s*(?:[.,;:!)\]}\n]|$|points?\b|stars?\b)", behind) is not None
    return _WENT_ON.match(behind) is not None


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
