"""A study's results as a table and a plot. Intervals over training seeds and over prompts at once.

Two-level bootstrap: all cells draw the same prompts, so the values of a cell are a matrix, seeds by prompts. A resample
draws rows and columns with replacement, each on its own, and takes the mean of what they cross in; the interval is the
middle 95 % of 2,000 such means. It is somewhat too narrow for few seeds: the spread of k resampled seeds is
sqrt((k - 1) / k) of the true one on average, and with one seed none of it is in the interval, which the table says.
"""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.study_measures import MEASURES
from inpo_fast.files import write_text

RESAMPLES = 2000


def two_level(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, prompts)."""
    rng = np.random.default_rng(0)
    seeds, prompts = values.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds))
    columns = rng.integers(prompts, size=(RESAMPLES, prompts))
    means = values[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def matrix(results: list[dict], name: str) -> np.ndarray:
    """(seeds, prompts) of one cell. name: points, gain, outside, a part or a measure."""
    return np.array([r[name] if name in r else (r["parts"] | r["measures"])[name] for r in results])


def by_cell(results: list[dict]) -> dict[str, list[dict]]:
    """In the order in which the cells came, each by seed."""
    cells: dict[str, list[dict]] = {}
    for result in results:
        cells.setdefault(result["cell"], []).append(result)
    return {name: sorted(some, key=lambda r: r["seed"]) for name, some in cells.items()}


def table(results: list[dict], kind: str) -> str:
    """Markdown."""
    rows = [_reconstruction(*cell) if kind == "reconstruct" else _training(*cell) for cell in by_cell(results).items()]
    head = (
        ["cell", "relative error", *(f"t = {t}" for t in results[0]["by_t"]), "rms(tau)", "UNet evaluations an image"]
        if kind == "reconstruct"
        else ["cell", "label", "seeds", "win-rate", "gain", "alignment", "looks", "outside", *MEASURES, "diversity",
              "eps_scale", "UNet evaluations", "seconds"]
    )  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def _span(values: tuple[float, float, float], digits: int = 3) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


def _training(name: str, runs: list[dict]) -> list[str]:
    mean = lambda key: np.mean([run[key] for run in runs])  # noqa: E731
    trained = "variant" in runs[0]
    diversity = "-" if runs[0]["diversity"] is None else f"{mean('diversity'):.2f}"
    scale = np.mean([run["training"]["eps_scale"] for run in runs]) if trained else np.nan
    return [
        name,
        runs[0].get("variant", "-"),
        f"{len(runs)}" if len(runs) > 1 or not trained else "1 (interval over prompts only)",
        _span(two_level(matrix(runs, "points"))),
        _span(two_level(matrix(runs, "gain")), 4),
        *(_span(two_level(matrix(runs, part))) for part in ("alignment", "looks", "outside")),
        *(_span(two_level(matrix(runs, measure))) for measure in MEASURES),
        diversity,
        f"{scale:.3f}" if trained else "-",
        f"{mean('unet_evaluations'):,.0f}" if trained else "-",
        f"{mean('seconds'):.0f}" if trained else "-",
    ]


def _reconstruction(name: str, runs: list[dict]) -> list[str]:
    run = runs[0]
    sizes = list(run["tau_rms"].values())
    return [
        name,
        _span(two_level(matrix(runs, "points"))),
        *(f"{error:.3f}" for error in run["by_t"].values()),
        f"{min(sizes):.2f} to {max(sizes):.2f}",
        f"{run['evaluations_an_image']:.1f}",
    ]


def plot(results: list[dict], kind: str, path: Path) -> None:
    """An SVG: what a cell costs in UNet evaluations against what it brings, with both intervals in one bar."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, runs in by_cell(results).items():
        mean, low, high = two_level(matrix(runs, "points"))
        cost = "evaluations_an_image" if kind == "reconstruct" else "unet_evaluations"
        if cost not in runs[0]:
            axes.axhline(mean, color="0.6", linewidth=1, linestyle="--", label=name)
            continue
        x = np.mean([run[cost] for run in runs])
        axes.errorbar(x, mean, [[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o", capsize=3, label=name)
    axes.set_xlabel("UNet evaluations " + ("an image" if kind == "reconstruct" else "of the training"))
    axes.set_ylabel("relative error" if kind == "reconstruct" else "win-rate against the base")
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def write(folder: Path, results: list[dict], kind: str, title: str) -> str:
    """table.md and plot.svg into the folder; the table."""
    text = table(results, kind)
    write_text(folder / "table.md", f"{title}\n\n{text}")
    plot(results, kind, folder / "plot.svg")
    return text
