"""evaluation.json in words: the verdict, the win-rates as intervals, the sanity checks in plain sentences."""

from dataclasses import dataclass

from inpo_fast.comparison.evaluation import DIVERSITY_FLOOR
from inpo_fast.comparison.win_rates import FEWEST
from inpo_fast.judges import SUMMARIES

RATE = ("win_rate", "win_rate_low", "win_rate_high")
NAMES = {  # of sanity checks whose key in evaluation.json says less
    "diversity_ratio": "diversity ratio",
    "outside": "independent judge",
    "seen": "seen prompts",
    "control": "negative control",
}


FAILS = {  # what it means, for people who have never heard of the check
    "alignment": "its pictures show less of what the prompt asks for than the {base}'s",
    "diversity_ratio": "its pictures of one prompt are too much alike",
    "outside": "{second}, a judge that no reward was made from, prefers the {base}: the gain may be {judge}'s only",
    "seen": "it wins far more often on prompts like those of the training than on new ones",
    "control": "{judge} also prefers the {untrained} with its noise prediction x {scale}, which is no better: it "
    "rewards something else than quality",
}
CANNOT_DECIDE = {
    "diversity_ratio": "the {base} draws one picture of a prompt only",
    "outside": "{second} tells even the {base} from the {base} with a slightly scaled noise prediction, so what it "
    "says of this model may be about that",
}


@dataclass(frozen=True)
class Headline:
    tone: str  # good, bad or undecided: the colour of the box
    title: str
    text: str


@dataclass(frozen=True)
class Interval:
    """A win-rate with its 95 % interval, all in percent; None where there is none.

    prompts: it is over so many; None: of an evaluation by an earlier version.
    """

    group: str
    name: str
    rate: float | None
    low: float | None
    high: float | None
    notes: tuple[str, ...] = ()
    prompts: int | None = None

    @property
    def side(self) -> str:
        if self.low is None or self.high is None:
            return "both"
        return "above" if self.low > 50 else "below" if self.high < 50 else "both"

    @property
    def between(self) -> str:
        return "no interval" if self.low is None else f"{self.low:.0f}–{self.high:.0f}"


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def told(rate: float | None, low: float | None, high: float | None, prompts: int | None) -> str:
    """A win-rate of 0..1 in percent: `62.0 (55.1 to 69.8; 128 prompts)`, `100.0 (1 prompt, no interval)`, `-`."""
    if rate is None:
        return "-"
    count = "" if prompts is None else f"{prompts:,} prompt{'s' * (prompts != 1)}"
    if low is None or high is None:
        return f"{100 * rate:.1f} ({count + ', ' if count else ''}no interval)"
    return f"{100 * rate:.1f} ({100 * low:.1f} to {100 * high:.1f}{'; ' + count if count else ''})"


@dataclass(frozen=True)
class SanityCheck:
    name: str
    value: str
    meaning: str
    ok: bool | None  # None: it cannot decide


def base_or_start(result: dict) -> str:
    """The word for what the model is compared with; `compared_with` says what the start is."""
    return "start" if result.get("compared_with") else "base"


def verdict(result: dict) -> str:
    """The result in one sentence, with its numbers."""
    start = result.get("compared_with")  # its words end with a name, hence the commas
    rate, low, high = (percent(result[key]) for key in RATE)
    comma, failed = "," * bool(start), checks_that(result, False)
    if low is None or high is None:
        return _too_few(result)
    if low > 50:
        word = f"The aligned model is better than {start or 'its base'}{f'{comma} for this judge' if failed else ''}"
    elif high < 50:
        word = f"The aligned model is WORSE than {start or 'its base'}"
    else:
        word = f"No difference from {start or 'the base'}{comma} can be shown"
    checks = checks_in_words(result)
    return (
        f"{word}: it wins {rate:.1f} % of paired comparisons (95 % interval {low:.1f} to {high:.1f}) on "
        f"{result['prompts']} prompts x {result['seeds']} pictures, judged by {result['judge']} "
        f"[{result['variant']}]; {checks}.{_without_score(result)}"
    )


def _too_few(result: dict) -> str:
    count = result["total"].get("prompts", result["prompts"])
    failed = [_with_reason(key, result, FAILS) for key in checks_that(result, False)]
    against = f" with {result['compared_with']}," if result.get("compared_with") else ""
    checks = f" These sanity checks fail: {'; '.join(failed)}." if failed else ""
    return (
        f"Too few prompts for a verdict: it wins {100 * result['win_rate']:.1f} % of paired comparisons{against} on "
        f"{count} prompt{'s' * (count != 1)} x {result['seeds']} pictures, judged by {result['judge']} "
        f"[{result['variant']}]; with fewer than {FEWEST} nothing can be told from chance."
        f"{checks}{_without_score(result)}"
    )


def _without_score(result: dict) -> str:
    """What an unclear answer cost: said, as nobody knows on which pictures a judge keeps silent."""
    count = sum(result.get("without_score", {}).values())
    return f" {count:,} pictures got no clear score and are left out." if count else ""


def headline(result: dict) -> Headline:
    """A win is called good only when no sanity check fails and a check that cannot decide is named with it."""
    text = verdict(result)
    if result["win_rate_low"] is None:
        return Headline("undecided", "Too few prompts for a verdict", text)
    if result["win_rate_high"] < 0.5:
        return Headline("bad", f"Worse than its {base_or_start(result)}", text)
    if not result["win_rate_low"] > 0.5:
        return Headline("undecided", "No difference shown", text)
    if checks_that(result, False):
        return Headline("undecided", "Better for the judge, but a sanity check fails", text)
    if checks_that(result, None):
        return Headline("good", f"Better than its {base_or_start(result)}, though a sanity check cannot decide", text)
    return Headline("good", f"Better than its {base_or_start(result)}", text)


def win_rates(result: dict) -> list[Interval]:
    """The decisive row first, then the parts of the judgement, then everything it is checked with."""
    found = result["guards"]
    rows = [_interval("Verdict", f"{result['judge']}, total", result["total"])]
    parts = sorted(result["parts"].items(), key=lambda item: item[0] not in SUMMARIES)
    rows += [_interval("Parts of the judgement", name, part) for name, part in parts]
    if "seen" in found:
        rows.append(_interval("Sanity checks", "prompts like those of the training", found["seen"]))
    if "outside" in found:
        rows.append(_interval("Sanity checks", f"independent judge: {found['outside']['judge']}", found["outside"]))
    if "control" in found:
        name = f"negative control: the {base_or_start(result)}, noise × {found['control']['eps_scale']:g}"
        rows.append(_interval("Sanity checks", name, found["control"], "no better model, so it must not win"))
    return rows


def _interval(group: str, name: str, values: dict, *notes: str) -> Interval:
    for kind in ("mean", "median"):
        if kind in values and f"base_{kind}" in values:
            notes += (f"{kind} {values[f'base_{kind}']:.3g} → {values[kind]:.3g}",)
    prompts = values.get("prompts")
    if prompts is not None:
        notes += (f"{prompts:,} prompt{'s' * (prompts != 1)}",)
    return Interval(group, name, *(percent(values[key]) for key in RATE), notes, prompts)


def sanity_checks(result: dict) -> list[SanityCheck]:
    """Every sanity check of the evaluation, also one that is not known here."""
    return [_sanity_check(key, values, base_or_start(result)) for key, values in result["guards"].items()]


def _sanity_check(key: str, values: dict, base: str) -> SanityCheck:
    value, meaning = "", ""
    if "win_rate" in values:
        found = told(*(values[key] for key in RATE), values.get("prompts"))
        value = f"wins {found.replace(' ', ' % ', 1)}"
    elif values.get("value") is not None:
        value = f"{values['value']:.3g}"
    if key == "alignment":
        meaning = (
            "Do the pictures still show what the prompt asks for? It fails when the aligned model clearly loses on "
            "this part: better looks were bought with the content."
        )
    elif key == "diversity_ratio":
        meaning = (
            f"How much pictures of one prompt differ from each other, against the {base}. "
            f"Below {DIVERSITY_FLOOR:g} the model has begun to draw the same picture again and again. Where the {base} "
            "itself draws only one, there is nothing to compare."
        )
    elif key == "outside":
        meaning = (
            f"A second judge, {values['judge']}, that no training reward was made from. The check fails when "
            f"this judge clearly prefers the {base}: the gain exists for the first judge only. Its mean moved by "
            f"{values['shift']:+.2f} of what two pictures of one prompt differ by."
        )
        if "control" in values:  # not in evaluations of earlier versions
            rate, low, high = values["control"]
            between = "no interval" if low is None else f"{100 * low:.0f} to {100 * high:.0f}"
            meaning += f" Of the negative control it says {100 * (rate or 0):.0f} % ({between})"
            fooled = (
                f", which is no better and no worse than the {base}: what it sees also moves with the size of the "
                f"noise prediction, so it is unfit for this {base} and cannot decide, for the model or against it."
            )
            meaning += "." if low is None or low <= 0.5 <= high else fooled
    elif key == "seen":
        value = f"gap {100 * values['gap']:+.1f} points"
        meaning = (
            "The win-rate on prompts like those of the training, minus the one on held-out prompts. A large gap means "
            "that the gain does not carry over to new prompts."
        )
    elif key == "control":
        meaning = (
            f"The {base} with its noise prediction × {values['eps_scale']:g}. It is no better model, so it "
            "must not win; where it does, the judge measures grain rather than quality."
        )
    ok = None if values["ok"] is None else bool(values["ok"])
    return SanityCheck(NAMES.get(key, key.replace("_", " ")), value, meaning, ok)


def checks_that(result: dict, state: bool | None) -> list[str]:
    """Keys of the sanity checks that hold (True), fail (False) or cannot decide (None)."""
    return [key for key, check in result["guards"].items() if check["ok"] is state]


def checks_in_words(result: dict) -> str:
    """For people who have never heard of them: which fail or cannot decide, and what that means."""
    failed, open_ = checks_that(result, False), checks_that(result, None)
    if not result["guards"]:
        return "no sanity check was made"
    if not failed and not open_:
        return "all sanity checks hold"
    parts = []
    if failed:
        parts.append("BUT these sanity checks fail: " + "; ".join(_with_reason(key, result, FAILS) for key in failed))
    if open_:
        parts.append("cannot decide: " + "; ".join(_with_reason(key, result, CANNOT_DECIDE) for key in open_))
    held = len(result["guards"]) - len(failed) - len(open_)
    return "; ".join([*parts, *([f"the other {held} hold" if held > 1 else "the other one holds"] if held else [])])


def _with_reason(key: str, result: dict, reasons: dict[str, str]) -> str:
    check = result["guards"][key]
    base = base_or_start(result)
    untrained = "untrained base" if base == "base" else base
    names = {
        "base": base,
        "untrained": untrained,
        "judge": result["judge"],
        "second": check.get("judge", ""),
        "scale": f"{check.get('eps_scale', 0):g}",
    }
    reason = reasons.get(key, "").format_map(names)
    if reasons is CANNOT_DECIDE and check.get("fit"):
        reason = "too few prompts for an interval"
    return f"{NAMES.get(key, key.replace('_', ' '))}{f' ({reason})' if reason else ''}"
