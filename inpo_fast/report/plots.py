"""A training curve as an SVG whose colours are the page's: light or dark, it is always readable."""

import io
import re

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from inpo_fast.report.curves import Curve, Series

# name -> (light, dark). Blue and vermilion stay apart for every kind of colour vision; the levels run from one end
# of a perceptually even scale to the other.
PALETTE = {
    "ink": ("#1f2430", "#e3e7ee"),
    "faint": ("#6a7180", "#98a1b0"),
    "grid": ("#e1e4ea", "#2f3642"),
    "first": ("#0067ab", "#59b8f5"),
    "second": ("#c94c00", "#ff9a4d"),
    "level0": ("#0d0888", "#a58bff"),
    "level1": ("#7201a9", "#d77bf0"),
    "level2": ("#b12a91", "#ff7da0"),
    "level3": ("#dd5e66", "#ffad55"),
    "level4": ("#e2962b", "#ffe169"),
}
POINTS = 400  # drawn per line at most
SMOOTH = 20  # the thick line is a mean over 1/20 of the run
WIDTH, HEIGHT = 4.5, 2.35  # inches: labels keep a readable size from a phone to half a screen


def draw(curve: Curve, series: Series) -> str:
    """<svg>…</svg> to put into the page: no network, no script, colours as CSS variables."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    lines = curve.drawn(series)
    for line in lines:
        _line(axes, *series[line.metric], colour=_hex(line.colour), smooth=curve.smooth, faint=len(lines) <= 2)
    if curve.mark is not None:
        axes.axhline(curve.mark, color=_hex("faint"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            curve.mark_label, (1, curve.mark), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8, color=_hex("faint"), annotation_clip=False,
        )  # fmt: skip
    _frame(axes, curve)
    return _svg(figure, f"Curve of {curve.title}")


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, colour: str, smooth: bool, faint: bool) -> None:
    """Where the plot is not crowded, single steps stand faintly behind their running mean."""
    window = max(1, len(values) // SMOOTH) if smooth else 1
    if window > 1 and faint:
        axes.plot(*_thin(steps, values), color=colour, linewidth=0.8, alpha=0.28)
    dot = {"marker": "o", "markersize": 3} if len(values) < 15 else {}
    axes.plot(*_thin(steps, running_mean(values, window)), color=colour, linewidth=1.7, **dot)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends; (N,) like its input."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Long runs: neighbours are averaged so that the page stays small."""
    group = -(-len(values) // POINTS)
    if group == 1:
        return steps, values
    starts = np.arange(0, len(values), group)
    counts = np.diff([*starts, len(values)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _frame(axes: Axes, curve: Curve) -> None:
    low, high = axes.get_ylim()
    if curve.from_zero:
        low = 0.0
    if curve.mark is not None:
        margin = 0.06 * (max(high, curve.mark) - min(low, curve.mark))
        low, high = min(low, curve.mark - margin), max(high, curve.mark + margin)
    axes.set_ylim(low, high)
    first, last = axes.dataLim.intervalx
    if first == last:  # a single step
        axes.set_xlim(first - 1, first + 1)
    axes.grid(axis="y", color=_hex("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_hex("faint"))
    axes.tick_params(colors=_hex("faint"), labelcolor=_hex("ink"), labelsize=8.5, length=0, pad=4)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("-", "\N{MINUS SIGN}"))
    axes.set_xlabel("step", color=_hex("faint"), fontsize=8.5, labelpad=1, loc="right")


def _hex(name: str) -> str:
    return PALETTE[name][0]


def _svg(figure: Figure, description: str) -> str:
    """Real text instead of outlines, no fixed size, and every colour of the palette as var(--name)."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "path.simplify": True}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.S)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', f' role="img" aria-label="{description}"', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # several plots share one page, and nothing refers to these
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    return text
