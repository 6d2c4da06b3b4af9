"""evaluation.json in words: the verdict, the win-rates as intervals, the sanity checks in plain sentences."""

from dataclasses import dataclass

from inpo_fast.comparison.evaluation import DIVERSITY_FLOOR
from inpo_fast.judges import SUMMARIES

NAMES = {  # of sanity checks whose key in evaluation.json says less
    "diversity_ratio": "diversity ratio",
    "outside": "independent judge",
    "seen": "seen prompts",
    "control": "negative control",
}


@dataclass(frozen=True)
class Headline:
    tone: str  # good, bad or undecided: the colour of the box
    title: str
    text: str


@dataclass(frozen=True)
class Interval:
    """A win-rate against the base with its 95 % interval, all in percent."""

    group: str
    name: str
    rate: float
    low: float
    high: float
    notes: tuple[str, ...] = ()

    @property
    def side(self) -> str:
        return "above" if self.low > 50 else "below" if self.high < 50 else "both"


@dataclass(frozen=True)
class SanityCheck:
    name: str
    value: str
    meaning: str
    ok: bool


def verdict(result: dict) -> str:
    """The result in one sentence, with its numbers."""
    rate, low, high = (100 * result[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
    failed = [NAMES.get(name, name) for name, check in result["guards"].items() if not check["ok"]]
    if low > 50:
        word = f"The aligned model is better than its base{'' if not failed else ' for this judge'}"
    elif high < 50:
        word = "The aligned model is WORSE than its base"
    else:
        word = "No difference from the base can be shown"
    checks = "all sanity checks hold" if not failed else "BUT these sanity checks fail: " + ", ".join(failed)
    return (
        f"{word}: it wins {rate:.1f} % of paired comparisons (95 % interval {low:.1f} to {high:.1f}) on "
        f"{result['prompts']} prompts x {result['seeds']} pictures, judged by {result['judge']} "
        f"[{result['variant']}]; {checks}."
    )


def headline(result: dict) -> Headline:
    """A win is called good only when every sanity check holds too."""
    text = verdict(result)
    if result["win_rate_high"] < 0.5:
        return Headline("bad", "Worse than its base", text)
    if not result["win_rate_low"] > 0.5:
        return Headline("undecided", "No difference shown", text)
    if not all(check["ok"] for check in result["guards"].values()):
        return Headline("undecided", "Better for the judge, but a sanity check fails", text)
    return Headline("good", "Better than its base", text)


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
        name = f"negative control: the base, noise × {found['control']['eps_scale']:g}"
        rows.append(_interval("Sanity checks", name, found["control"], "no better model, so it must not win"))
    return rows


def _interval(group: str, name: str, values: dict, *notes: str) -> Interval:
    for kind in ("mean", "median"):
        if kind in values and f"base_{kind}" in values:
            notes += (f"{kind} {values[f'base_{kind}']:.3g} → {values[kind]:.3g}",)
    rate, low, high = (100 * values[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
    return Interval(group, name, rate, low, high, notes)


def sanity_checks(result: dict) -> list[SanityCheck]:
    """Every sanity check of the evaluation, also one that is not known here."""
    return [_sanity_check(key, values) for key, values in result["guards"].items()]


def _sanity_check(key: str, values: dict) -> SanityCheck:
    value, meaning = "", ""
    if "win_rate" in values:
        rate, low, high = (100 * values[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
        value = f"wins {rate:.1f} % ({low:.1f} to {high:.1f})"
    elif "value" in values:
        value = f"{values['value']:.3g}"
    if key == "alignment":
        meaning = (
            "Do the pictures still show what the prompt asks for? It fails when the aligned model clearly loses on "
            "this part: better looks were bought with the content."
        )
    elif key == "diversity_ratio":
        meaning = (
            "How much pictures of one prompt differ from each other, against the base. "
            f"Below {DIVERSITY_FLOOR:g} the model has begun to draw the same picture again and again."
        )
    elif key == "outside":
        meaning = (
            f"A second judge, {values['judge']}, that no training reward was made from. The check fails when "
            "this judge clearly prefers the base: the gain exists for the first judge only. Its mean moved by "
            f"{values['shift']:+.2f} of what two pictures of one prompt differ by."
        )
        if "control" in values:  # not in evaluations of earlier versions
            rate, low, high = values["control"]
            meaning += f" Of the negative control it says {100 * rate:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            fooled = ": what it sees also moves with the size of the noise prediction."
            meaning += "." if low <= 0.5 <= high else fooled
    elif key == "seen":
        value = f"gap {100 * values['gap']:+.1f} points"
        meaning = (
            "The win-rate on prompts like those of the training, minus the one on held-out prompts. A large gap means "
            "that the gain does not carry over to new prompts."
        )
    elif key == "control":
        meaning = (
            f"The base with its noise prediction × {values['eps_scale']:g}. It is no better model, so it "
            "must not win; where it does, the judge measures grain rather than quality."
        )
    return SanityCheck(NAMES.get(key, key.replace("_", " ")), value, meaning, bool(values["ok"]))
