"""A study's results as a picture, an SVG for each kind."""

import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.study.table import by_cell, matrix, two_level

MARKERS = "os^"
LEVELS = re.compile(r"\b(n|steps)=\d+")  # in a cell's name


def plot(results: list[dict], kind: str, path: Path) -> None:
    PLOTS[kind](results, path)


def trainings(results: list[dict], path: Path) -> None:
    """A row for each cell, in the study's order: win-rate and gain with their intervals, and what the training took.

    The dashed line is the negative control, a cell without training.
    """
    cells = by_cell(results)
    trained = {name: runs for name, runs in cells.items() if "unet_evaluations" in runs[0]}
    figure = _figure(9, 1.2 + 0.28 * len(trained))
    win_rates, gains, costs = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 1.4))
    at = np.arange(len(trained))
    for axes, key, label in ((win_rates, "points", "win-rate against the base"), (gains, "gain", "gain in score")):
        for name, runs in cells.items():
            if name not in trained:
                axes.axvline(two_level(matrix(runs, key))[0], color="0.6", linewidth=1, linestyle="--")
        mean, low, high = np.array([two_level(matrix(runs, key)) for runs in trained.values()]).T
        axes.errorbar(mean, at, xerr=np.maximum([mean - low, high - mean], 0), fmt="o", markersize=4, capsize=2)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=5)
    spent = [np.mean([run["unet_evaluations"] for run in runs]) / 1000 for runs in trained.values()]
    costs.barh(at, spent, 0.6, color="0.7")
    costs.set_xlabel("UNet evaluations\nof the training, in 1,000", fontsize=8)
    win_rates.set_yticks(at, list(trained), fontsize=8)
    win_rates.invert_yaxis()
    _save(figure, path)


def reconstructions(results: list[dict], path: Path) -> None:
    """What a cell costs in UNet evaluations against the error that is left, with its interval; cells that differ in n
    alone are one line."""
    figure, lines = _figure(8, 4.5), {}
    axes = figure.subplots()
    for name, runs in by_cell(results).items():
        point = (runs[0]["evaluations_an_image"], *two_level(matrix(runs, "points")))
        lines.setdefault(LEVELS.sub("", name).strip(), []).append(point)
    for number, (name, points) in enumerate(lines.items()):
        x, mean, low, high = np.array(sorted(points)).T
        style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": "-" if number < 10 else "--", "capsize": 2}
        spread = np.maximum([mean - low, high - mean], 0)
        axes.errorbar(x, mean, spread, label=name, markersize=4, linewidth=1, elinewidth=0.7, **style)
    axes.set_xlabel("UNet evaluations an image")
    axes.set_ylabel("relative error")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    _save(figure, path)


def landscapes(results: list[dict], path: Path) -> None:
    """The loss along each direction, with twice its standard error over pairs."""
    figure = _figure(9, 3.8)
    directions = list(results[0]["losses"])
    panels = figure.subplots(1, len(directions), sharey=True)
    for axes, direction in zip(panels, directions, strict=True):
        for name, runs in by_cell(results).items():
            losses = np.concatenate([run["losses"][direction] for run in runs], axis=1)
            mean, spread = losses.mean(1), 2 * losses.std(1) / np.sqrt(losses.shape[1])
            label, alphas = name if axes is panels[0] else None, runs[0]["alphas"]
            (line,) = axes.plot(alphas, mean, marker="o", markersize=3, linewidth=1.2, label=label)
            axes.fill_between(alphas, mean - spread, mean + spread, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_title(f"along the {direction} direction", fontsize=9)
        axes.set_xlabel("alpha, in lengths of the update")
    panels[0].set_ylabel("training loss")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    with rc_context({"svg.hashsalt": path.parent.name}):  # the same results are the same file
        figure.savefig(path, format="svg", metadata={"Date": None})


def leaks(results: list[dict], path: Path) -> None:
    """The pull of each pairs and label, a bar for each cell."""
    figure, rows = _figure(8, 5), results[0]["rows"]
    axes = figure.subplots()
    at, height = np.arange(len(rows)), 0.8 / len(results)
    for number, result in enumerate(results):
        mean, low, high = np.array([row["pull"] for row in result["rows"]]).T
        place = at + (number - (len(results) - 1) / 2) * height
        axes.barh(
            place, mean, height, xerr=[mean - low, high - mean], label=result["cell"], error_kw={"linewidth": 0.8}
        )
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(at, [f"{row['pairs']}: {row['label'].partition(':')[0]}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("pull on the size of predictions; right of 0 they grow")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


PLOTS = {"train": trainings, "reconstruct": reconstructions, "landscape": landscapes, "leak": leaks}
