"""Which training curves are shown, what each one means, and which values deserve a second look."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inpo_fast.method.inversion import UNDER_NOISED

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
                row = json.loads(text)
                step = row.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                continue
            if type(step) not in (int, float) or not math.isfinite(step):
                continue
            for name, value in row.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    rows.setdefault(name, []).append((step, value))
    return {name: (np.array([s for s, _ in points]), np.array([v for _, v in points])) for name, points in rows.items()}


def chosen(series: Series) -> Iterator[Curve]:
    """The curves for which there is something to draw."""
    contrast = "margin" in series
    for curve in CURVES:
        if curve.contrast in (None, contrast) and curve.drawn(series):
            yield curve


def _winners_worse(latest: Latest) -> str:
    if latest.get("winner_delta", 0) > 0:
        return "The winners are predicted worse than by the reference: a smaller lr usually mends it, or a larger beta."
    return ""


def _under_noised(latest: Latest) -> str:
    low = min(latest.values())
    if low < UNDER_NOISED:
        return f"{low:.2f} is below {UNDER_NOISED}: the inversion leaves the latents too clean."
    return ""


def _amplitude(latest: Latest) -> str:
    drift = latest["eps_scale"] - 1
    if abs(drift) > AMPLITUDE_DRIFT:
        return f"The amplitude moved by {100 * drift:+.1f} %: compare the grain of the pictures before and after."
    return ""


def _chance(latest: Latest) -> str:
    if latest.get("implicit_accuracy", 1.0) <= 0.5:
        return "Not above chance at the end of the run."
    if latest.get("held_out_implicit_accuracy", 1.0) <= 0.5:
        return "Not above chance on held-out pairs: what was learned holds for the training pairs only."
    return ""


CURVES = (
    Curve(
        "Loss",
        "It starts at ln 2, where the model equals its reference, and should sink below the dashed line; staying on it "
        "means nothing is learned, rising above it that the losers are preferred. A falling loss alone proves nothing.",
        (Line("loss", "loss", "first"),),
        mark=math.log(2),
        mark_label="ln 2",
        contrast=True,
    ),
    Curve(
        "Loss",
        "The squared error of the noise predicted for the winners. It should sink slowly or hold; a rise is bad.",
        (Line("loss", "loss", "first"),),
        contrast=False,
    ),
    Curve(
        "Implicit accuracy",
        "The share of pairs whose winner the model favours, measured against the reference. 0.5 is chance, above is "
        "learning; close to 1 it has memorised its pairs. Models that draw worse can reach 0.7 too.",
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
        "How much worse than the reference the noise is predicted. Good: winners below 0 and losers above them. Bad: "
        "winners above 0, which means that the margin comes from unlearning the losers, and pictures decay.",
        (Line("winner_delta", "winners", "first"), Line("loser_delta", "losers", "second")),
        mark=0.0,
        mark_label="0",
        contrast=True,
        watch=_winners_worse,
    ),
    Curve(
        "Error against the reference",
        "How much worse than the reference the noise of the winners is predicted. Below 0 is good, above 0 is bad.",
        (Line("winner_delta", "winners", "first"),),
        mark=0.0,
        mark_label="0",
        contrast=False,
        watch=_winners_worse,
    ),
    Curve(
        "Winners' error by noise level",
        "How much worse than the reference the winners' noise is predicted, from little noise (t near 0) to nearly "
        "pure noise. Good: below 0. A level that rises alone is where pictures begin to decay.",
        tuple(Line(f"winner_delta_t{b}", f"t {200 * b}–{200 * b + 199}", f"level{b}") for b in range(5)),
        mark=0.0,
        mark_label="0",
    ),
    Curve(
        "Losers' error by noise level",
        "The same for the losers. Good: above the winners at the same level; far above 0 while the winners rise too "
        "means that the model unlearns instead of learning.",
        tuple(Line(f"loser_delta_t{b}", f"t {200 * b}–{200 * b + 199}", f"level{b}") for b in range(5)),
        mark=0.0,
        mark_label="0",
        contrast=True,
    ),
    Curve(
        "Error on held-out pairs",
        "How much worse than the reference the noise of pairs is predicted that are not trained on. Good: winners "
        "below 0, or at least well below the losers.",
        (Line("held_out_winner_delta", "winners", "first"), Line("held_out_loser_delta", "losers", "second")),
        mark=0.0,
        mark_label="0",
    ),
    Curve(
        "Margin by noise level",
        "How strongly winners are favoured, from little noise (t near 0) to nearly pure noise. Good: all lines rise "
        "above 0 together. Bad: one runs far ahead or sinks below 0, so only a part of the drawing process learns.",
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
        f"The noise that the model has to predict; 1 is right. Below {UNDER_NOISED} the noisy pictures are too clean "
        "and training hardly helps. Winners well below losers reward too little noise, unless tau_norm is rms.",
        (Line("tau_rms_winner", "winners", "first"), Line("tau_rms_loser", "losers", "second")),
        mark=1.0,
        mark_label="1",
        watch=_under_noised,
    ),
    Curve(
        "Pull on the amplitude",
        "How much more noise than the reference predicts the targets ask for, along its own prediction. Good: winners "
        "and losers together. Bad: winners lastingly below losers, which rewards grainy pictures.",
        (Line("tau_residual_winner", "winners", "first"), Line("tau_residual_loser", "losers", "second")),
        mark=0.0,
        mark_label="0",
        contrast=True,
    ),
    Curve(
        "Amplitude of the model's noise",
        "The size of the predicted noise against the reference's. Good: it stays near 1. A drift of one or two percent "
        "makes pictures grainier (below 1) or smoother (above 1), and that alone can fool a judge.",
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
