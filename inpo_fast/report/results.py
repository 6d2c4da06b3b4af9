"""evaluation.json in words: the verdict, the win-rates as intervals, the guards in plain sentences."""

from dataclasses import dataclass

from inpo_fast.report.reasons import SUMMARIES


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
class Guard:
    name: str
    value: str
    meaning: str
    ok: bool


def headline(result: dict) -> Headline:
    """A win is called good only when every guard holds too."""
    from inpo_fast.comparison.evaluation import verdict

    text = verdict(result)
    if result["win_rate_high"] < 0.5:
        return Headline("bad", "Worse than its base", text)
    if not result["win_rate_low"] > 0.5:
        return Headline("undecided", "No difference shown", text)
    if not all(guard["ok"] for guard in result["guards"].values()):
        return Headline("undecided", "Better for the judge, but a guard fails", text)
    return Headline("good", "Better than its base", text)


def win_rates(result: dict) -> list[Interval]:
    """The decisive row first, then the parts of the judgement, then everything it is checked with."""
    found = result["guards"]
    rows = [_interval("Verdict", f"{result['judge']}, total", result["total"])]
    parts = sorted(result["parts"].items(), key=lambda item: item[0] not in SUMMARIES)
    rows += [_interval("Parts of the judgement", name, part) for name, part in parts]
    if "seen" in found:
        rows.append(_interval("Checks", "prompts like those of the training", found["seen"]))
    if "outside" in found:
        rows.append(_interval("Checks", f"outside judge: {found['outside']['judge']}", found["outside"]))
    if "control" in found:
        name = f"control: the base, noise × {found['control']['eps_scale']:g}"
        rows.append(_interval("Checks", name, found["control"], "no better model, so it must not win"))
    return rows


def _interval(group: str, name: str, values: dict, *notes: str) -> Interval:
    for kind in ("mean", "median"):
        if kind in values and f"base_{kind}" in values:
            notes += (f"{kind} {values[f'base_{kind}']:.3g} → {values[kind]:.3g}",)
    rate, low, high = (100 * values[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
    return Interval(group, name, rate, low, high, notes)


def guards(result: dict) -> list[Guard]:
    """Every guard of the evaluation, also one that is not known here."""
    return [_guard(name, values) for name, values in result["guards"].items()]


def _guard(name: str, values: dict) -> Guard:
    from inpo_fast.comparison.evaluation import DIVERSITY_FLOOR

    value, meaning = "", ""
    if "win_rate" in values:
        rate, low, high = (100 * values[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
        value = f"wins {rate:.1f} % ({low:.1f} to {high:.1f})"
    elif "value" in values:
        value = f"{values['value']:.3g}"
    if name == "alignment":
        meaning = (
            "Do the pictures still show what the prompt asks for? It fails when the aligned model clearly loses on "
            "this part: better looks were bought with the content."
        )
    elif name == "diversity_ratio":
        meaning = (
            "How much pictures of one prompt differ from each other, against the base. "
            f"Below {DIVERSITY_FLOOR:g} the model has begun to draw the same picture again and again."
        )
    elif name == "outside":
        meaning = (
            f"A second judge, {values['judge']}, that no training reward was made from. It fails when it clearly "
            "prefers the base: the gain exists for the first judge only. Its mean moved by "
            f"{values['shift']:+.2f} of what two pictures of one prompt differ by."
        )
        if "control" in values:  # not in evaluations of earlier versions
            rate, low, high = values["control"]
            meaning += f" Of the control it says {100 * rate:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
            fooled = ": what it sees also moves with the size of the noise prediction."
            meaning += "." if low <= 0.5 <= high else fooled
    elif name == "seen":
        value = f"gap {100 * values['gap']:+.1f} points"
        meaning = (
            "The win-rate on prompts like those of the training, minus the one on held-out prompts. A large gap means "
            "that the gain does not carry over to new prompts."
        )
    elif name == "control":
        meaning = (
            f"The untrained base with its noise prediction × {values['eps_scale']:g}. It is no better model, so it "
            "must not win; where it does, the judge measures grain rather than quality."
        )
    return Guard(name.replace("_", " "), value, meaning, bool(values["ok"]))
