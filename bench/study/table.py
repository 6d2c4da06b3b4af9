"""A study's results as a table. Intervals over training seeds and over prompts at once.

Two-level bootstrap: all cells draw the same prompts, so the values of a cell are a matrix, seeds by prompts. A resample
draws rows and columns with replacement, each on its own, and takes the mean of what they cross in; the interval is the
middle 95 % of 2,000 such means. It is somewhat too narrow for few seeds: the spread of k resampled seeds is
sqrt((k - 1) / k) of the true one on average, and with one seed none of it is in the interval, which the table says.
Of win-rates that are nearly all equal it is made no narrower than what so many prompts can rule out, and of too few
prompts it is left out (comparison/win_rates.py).
"""

import functools

import numpy as np

from bench.study.measures import MEASURES
from inpo_fast.comparison.win_rates import FEWEST, widened

RESAMPLES = 2000


@functools.lru_cache(2)  # the cells of a table are alike
def drawn(seeds: int, prompts: int) -> np.ndarray:
    """(RESAMPLES, seeds, prompts): places in a matrix of seeds by prompts."""
    rng = np.random.default_rng(0)
    rows = rng.integers(seeds, size=(RESAMPLES, seeds))
    columns = rng.integers(prompts, size=(RESAMPLES, prompts))
    return rows[:, :, None] * prompts + columns[:, None, :]


def two_level(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of values (seeds, prompts)."""
    means = values.take(drawn(*values.shape)).mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def win_rates(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of values (seeds, prompts) from 0 to 1; None where so few prompts have no interval."""
    mean, low, high = two_level(values)
    return (mean, None, None) if values.shape[1] < FEWEST else (mean, *widened(values.mean(0), low, high))


def matrix(results: list[dict], name: str) -> np.ndarray:
    """(seeds, prompts) of one cell. name: points, gain, outside, a part or a measure."""
    return np.array([r[name] if name in r else (r["parts"] | r["measures"])[name] for r in results])


def by_cell(results: list[dict]) -> dict[str, list[dict]]:
    """In the order in which the cells came, each by seed."""
    cells: dict[str, list[dict]] = {}
    for result in results:
        cells.setdefault(result["cell"], []).append(result)
    return {name: sorted(some, key=lambda r: r["seed"]) for name, some in cells.items()}


def table(results: list[dict], kind: str, against: str | None = None) -> str:
    """Markdown. against: a cell of trainings whose win-rates are taken off the others'."""
    return trainings(results, against) if kind == "train" else TABLES[kind](results)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def _span(values: tuple[float, float | None, float | None], digits: int = 3) -> str:
    if values[1] is None:
        return f"{values[0]:.{digits}f} [no interval]"
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


def trainings(results: list[dict], against: str | None) -> str:
    head = ["cell", "label", "seeds", "win-rate", "gain", "alignment", "looks", "outside", *MEASURES, "diversity"]
    head += ["eps_scale", "UNet evaluations", "seconds of a core"]
    cells = by_cell(results)
    rows = [_training(*cell) for cell in cells.items()]
    if against in cells:
        head.insert(4, f"less {against}'s")
        for row, (name, runs) in zip(rows, cells.items(), strict=True):
            row.insert(4, _difference(runs, cells[against]) if name != against else "-")
    return _markdown(head, rows)


def _difference(runs: list[dict], others: list[dict]) -> str:
    """Of the win-rates: the same prompts, noise and training seeds, so that what they share falls out."""
    seeds = [run["seed"] for run in runs]
    if seeds != [other["seed"] for other in others]:
        return "-"
    mean, low, high = two_level(matrix(runs, "points") - matrix(others, "points"))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def reconstructions(results: list[dict]) -> str:
    head = [
        "cell",
        "relative error",
        *(f"t = {t}" for t in results[0]["by_t"]),
        "rms(tau)",
        "UNet evaluations an image",
    ]
    return _markdown(head, [_reconstruction(*cell) for cell in by_cell(results).items()])


def landscapes(results: list[dict]) -> str:
    alphas = [f"alpha = {alpha:g}" for alpha in results[0]["alphas"]]
    rows = [row for cell in by_cell(results).items() for row in _landscape(*cell)]
    return _markdown(["cell", "seeds", "along", *alphas, "curvature at 0", "cosine of gradients"], rows)


def leaks(results: list[dict]) -> str:
    """A line for each pairs and label, a column of pull for each cell."""
    properties = list(results[0]["rows"][0]["tau"])
    head = ["pairs", "the better one by", "decided", *(f"tau: {name}, better / worse" for name in properties)]
    head += [f"pull, {result['cell']}" for result in results]
    lines = []
    for rows in zip(*(result["rows"] for result in results), strict=True):
        row = rows[0]
        values = ["{:.3f} / {:.3f}".format(*row["tau"][name]) for name in properties]
        pulls = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*each["pull"]) for each in rows]
        lines.append([row["pairs"], row["label"].partition(":")[0], str(row["count"]), *values, *pulls])
    return _markdown(head, lines)


def _training(name: str, runs: list[dict]) -> list[str]:
    mean = lambda key: np.mean([run[key] for run in runs])  # noqa: E731
    trained = "variant" in runs[0]
    diversity = "-" if runs[0]["diversity"] is None else f"{mean('diversity'):.2f}"
    scale = np.mean([run["training"]["eps_scale"] for run in runs]) if trained else np.nan
    return [
        name,
        runs[0].get("variant", "-"),
        f"{len(runs)}" if len(runs) > 1 or not trained else "1 (interval over prompts only)",
        _span(win_rates(matrix(runs, "points"))),
        _span(two_level(matrix(runs, "gain")), 4),
        *(_span(win_rates(matrix(runs, part))) for part in ("alignment", "looks", "outside")),
        *(_span(two_level(matrix(runs, name)), 4) if name in runs[0]["measures"] else "-" for name in MEASURES),
        diversity,
        f"{scale:.3f}" if trained else "-",
        f"{mean('unet_evaluations'):,.0f}" if trained else "-",
        f"{mean('cpu_seconds'):.0f}" if trained else "-",
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


def _landscape(name: str, runs: list[dict]) -> list[list[str]]:
    """A row for each direction: loss at each alpha, and its second difference there. Seeds have pairs of their own."""
    own = [agreement(np.array(run["cosines"])) for run in runs]
    mean, error = np.mean([m for m, _ in own]), np.sqrt(np.sum([e**2 for _, e in own])) / len(own)
    rows = []
    for direction in runs[0]["losses"]:
        losses = np.array([run["losses"][direction] for run in runs])  # seeds, alphas, pairs
        bend = curvature(np.array(runs[0]["alphas"]), losses.swapaxes(0, 1))
        told = [f"{loss:.4f}" for loss in losses.mean((0, 2))]
        cosine = f"{mean:.3f} ± {error:.3f}" if not rows else ""
        rows.append([name, f"{len(runs)}", direction, *told, _span(two_level(bend), 4), cosine])
    return rows


TABLES = {"reconstruct": reconstructions, "landscape": landscapes, "leak": leaks}


def curvature(alphas: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Second difference of losses (alphas, …) at alpha = 0, with the nearest alphas on either side, equally far."""
    zero = int(np.flatnonzero(alphas == 0)[0])
    down, up = alphas[zero] - alphas[zero - 1], alphas[zero + 1] - alphas[zero]
    assert down == up, (down, up)
    return (losses[zero + 1] - 2 * losses[zero] + losses[zero - 1]) / up**2


def agreement(cosines: np.ndarray) -> tuple[float, float]:
    """Mean of the cosines (B, B) between different minibatches' gradients, and its standard error.

    Pairs of minibatches share minibatches, so the error is the jackknife's: each minibatch left out in turn.
    """
    n = len(cosines)
    rows = cosines.sum(1) - np.diag(cosines)
    total = rows.sum()
    without = (total - 2 * rows) / ((n - 1) * (n - 2))
    return float(total / n / (n - 1)), float(np.sqrt((n - 1) * without.var()))
