"""Which training curves are shown, what each one means, and which values deserve a second look."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inpo_fast.runtime.files import parse_json

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps (N,), values (N,)
Latest = dict[str, float]

AMPLITUDE_DRIFT = 0.02  # the base with its noise prediction scaled by this much can fool a judge


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    colour: str  # a name in plots.PALETTE


@dataclass(frozen=True)
class Curve:
    """One plot. A line whose metric was never written is left out, and so is a curve without lines."""

    title: str
    meaning: str
    lines: tuple[Line, ...]
    mark: float | None = None  # a dashed horizontal line
    mark_label: str = ""
    from_zero: bool = False
    smooth: bool = True
    contrast: bool | None = None  # True: only for methods with winners against losers; False: only for the others
    objective: str | None = None  # only where the loss is of this kind: preference, or utility (kto)
    watch: Callable[[Latest], str] = lambda _: ""

    def drawn(self, series: Series) -> list[Line]:
        return [line for line in self.lines if line.metric in series]

    def latest(self, series: Series) -> Latest:
        """By metric, the mean over the last tenth of the steps, at least 10 of them: single steps say little."""
        return {line.metric: tail_mean(series[line.metric][1]) for line in self.drawn(series)}


def tail_mean(values: np.ndarray) -> float:
    return float(values[-max(10, len(values) // 10) :].mean())


def read_series(path: Path) -> Series:
    """metrics.jsonl by name. Lines cut short by a crash and values that were not finite are skipped."""
    rows: dict[str, list[tuple[float, float]]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = parse_json(text)
                step = row.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            if type(step) not in (int, float) or not math.isfinite(step):
                continue
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    rows.setdefault(name, []).append((step, value))
    return {name: (np.array([s for s, _ in points]), np.array([v for _, v in points])) for name, points in rows.items()}


def chosen(series: Series) -> Iterator[Curve]:
    """The curves for which there is something to draw."""
    contrast, objective = "margin" in series, "utility" if "reference_point" in series else "preference"
    for curve in CURVES:
        if curve.contrast in (None, contrast) and curve.objective in (None, objective) and curve.drawn(series):
            yield curve


def _winners_worse(latest: Latest) -> str:
    if latest.get("winner_delta", 0) > 0:
        return (
            "At the end of the run the winners are predicted worse than by the reference: a smaller lr usually mends "
            "it, or a larger beta."
        )
    return ""


def _loss(latest: Latest) -> str:
    """What the last steps' mean says, and no more."""
    if latest["loss"] > math.log(2) + 1e-4:  # fp32's ln 2 is above it
        return (
            "At the end the mean loss is above ln 2, where the model would be if it equalled its reference. Pairs that "
            "are told wrongly by much weigh more in it than those told rightly: accuracy says how many there are."
        )
    return ""


def _amplitude(latest: Latest) -> str:
    drift = latest.get("eps_scale", 1.0) - 1
    if abs(drift) > AMPLITUDE_DRIFT:
        return f"The amplitude moved by {100 * drift:+.1f} %: compare the grain of the pictures before and after."
    return ""


def _chance(latest: Latest) -> str:
    here, held_out = latest.get("implicit_accuracy"), latest.get("held_out_implicit_accuracy")
    if here is not None and here <= 0.5:
        return "Not above chance at the end of the run."
    if held_out is not None and held_out <= 0.5:
        more = ", though on training pairs" if here is not None else ""
        return f"Not above chance on held-out pairs at the end of the run{more}."
    return ""


CURVES = (
    Curve(
        "Loss",
        "It starts at ln 2, the dashed line, where the model equals its reference. It is a mean over pairs of what is "
        "small where the winner is favoured, and grows with the margin where the loser is: a few pairs that are told "
        "wrongly by much raise it even while accuracy rises. That it falls does not show that pictures become better.",
        (Line("loss", "loss", "first"),),
        mark=math.log(2),
        mark_label="ln 2",
        contrast=True,
        objective="preference",
        watch=_loss,
    ),
    Curve(
        "Loss",
        "What each image's utility falls short of 1, on average. It starts at 1/2, the dashed line, where the model "
        "equals its reference; below it, images called good are predicted better than by the reference, or those that "
        "are called bad worse.",
        (Line("loss", "loss", "first"),),
        mark=0.5,
        mark_label="1/2",
        contrast=True,
        objective="utility",
    ),
    Curve(
        "Loss",
        "The squared error of what the model predicts for the winners. It differs between steps mostly by their "
        "timesteps; the error against the reference, below, is free of that.",
        (Line("loss", "loss", "first"),),
        contrast=False,
    ),
    Curve(
        "Implicit accuracy",
        "The share of pairs whose winner the model favours, measured against the reference: 0.5 is chance. On pairs "
        "that are trained on more than once, close to 1 can be memory. It does not show that pictures become better: "
        "models that draw worse can reach 0.7 too.",
        (
            Line("implicit_accuracy", "accuracy", "first"),
            Line("held_out_implicit_accuracy", "on held-out pairs", "second"),
        ),
        mark=0.5,
        mark_label="chance",
        contrast=True,
        watch=_chance,
    ),
    Curve(
        "Error against the reference",
        "How much worse than the reference the model predicts. Good: winners below 0 and losers above them. Winners "
        "above 0 are predicted worse than by the reference: a margin then comes from losers that are even worse.",
        (Line("winner_delta", "winners", "first"), Line("loser_delta", "losers", "second")),
        mark=0.0,
        mark_label="0",
        contrast=True,
        watch=_winners_worse,
    ),
    Curve(
        "Error against the reference",
        "How much worse than the reference the model predicts for the winners. Below 0 is good, above 0 is bad.",
        (Line("winner_delta", "winners", "first"),),
        mark=0.0,
        mark_label="0",
        contrast=False,
        watch=_winners_worse,
    ),
    Curve(
        "Winners' error by noise level",
        "How much worse than the reference the model predicts for the winners, from little noise (t near 0) to nearly "
        "pure noise. Good: below 0.",
        tuple(Line(f"winner_delta_t{b}", f"t {200 * b}–{200 * b + 199}", f"level{b}") for b in range(5)),
        mark=0.0,
        mark_label="0",
    ),
    Curve(
        "Losers' error by noise level",
        "The same for the losers. Good: above the winners at the same level, with winners not above 0.",
        tuple(Line(f"loser_delta_t{b}", f"t {200 * b}–{200 * b + 199}", f"level{b}") for b in range(5)),
        mark=0.0,
        mark_label="0",
        contrast=True,
    ),
    Curve(
        "Error on held-out pairs",
        "How much worse than the reference the model predicts for pairs that are not trained on. Good: winners "
        "below 0, or at least well below the losers.",
        (Line("held_out_winner_delta", "winners", "first"), Line("held_out_loser_delta", "losers", "second")),
        mark=0.0,
        mark_label="0",
    ),
    Curve(
        "Margin by noise level",
        "How strongly winners are favoured, from little noise (t near 0) to nearly pure noise. Above 0 the winners are "
        "favoured on average, below 0 the losers; levels apart from each other learn at different speeds.",
        (
            Line("margin", "all", "ink"),
            *(Line(f"margin_t{b}", f"t {200 * b}–{200 * b + 199}", f"level{b}") for b in range(5)),
        ),
        mark=0.0,
        mark_label="0",
        contrast=True,
    ),
    Curve(
        "Amplitude of the target noise",
        "The noise that the model has to predict, before tau_norm: 1 for Gaussian noise. Inversion leaves less, even "
        "along the exact path, and the less the smoother a picture is: it is no measure of the inversion (noise_ratio "
        "is, where it was measured).",
        (Line("tau_rms_winner", "winners", "first"), Line("tau_rms_loser", "losers", "second")),
        mark=1.0,
        mark_label="1",
    ),
    Curve(
        "Pull on the amplitude",
        "How much more noise than the reference predicts the targets ask for, along its own prediction. Good: winners "
        "and losers together. Winners lastingly below losers reward predicting less noise, which leaves grain.",
        (Line("tau_residual_winner", "winners", "first"), Line("tau_residual_loser", "losers", "second")),
        mark=0.0,
        mark_label="0",
        contrast=True,
    ),
    Curve(
        "Amplitude of the model's noise",
        "The size of the predicted noise against the reference's. A drift of one or two percent makes pictures "
        "grainier (below 1) or smoother (above 1), and that alone can fool a judge: so is the negative control made.",
        (Line("eps_scale", "scale", "first"),),
        mark=1.0,
        mark_label="1",
        watch=_amplitude,
    ),
    Curve(
        "Gate on the losers",
        "How much of the losers' gradient winner_preserving lets through. 1 leaves the method as it was; near 0 it "
        "trains on winners only.",
        (Line("loser_gate", "gate", "first"),),
        mark=1.0,
        mark_label="1",
    ),
    Curve(
        "Gradient norm",
        "The length of the gradient before clipping. Good: the same order of magnitude throughout. Bad: steady growth, "
        "or spikes that return.",
        (Line("grad_norm", "norm", "first"),),
        from_zero=True,
    ),
    Curve(
        "Learning rate",
        "What was asked for: a warm-up, then the planned course. Anything else is a mistake in the configuration.",
        (Line("lr", "lr", "first"),),
        from_zero=True,
        smooth=False,
    ),
    Curve(
        "Speed",
        "Preference pairs per second, all processes together. Good: flat. Dips are checkpoints or waiting for data; "
        "the first step is slower because everything warms up.",
        (Line("pairs_per_second", "pairs/s", "first"),),
        from_zero=True,
    ),
)
