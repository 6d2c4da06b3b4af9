"""A comparison as markdown and as one page: the tables, and pictures side by side, where the judges disagree first."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inpo_fast.comparison.model_comparison import NEGATIVE_CONTROL, ModelComparison
from inpo_fast.comparison.win_rates import disagreement
from inpo_fast.report.page import render
from inpo_fast.report.pictures import ENLARGED, picture_uris
from inpo_fast.report.plots import PALETTE
from inpo_fast.report.results import Interval, percent, told
from inpo_fast.runtime.files import write_text

SHOWN = 24  # rows of pictures
PICTURE_BYTES = 3_000_000


@dataclass(frozen=True)
class Shot:
    """A model's picture, and of each judge its score and the difference to the base's (None: it is the base)."""

    model: str
    picture: np.ndarray
    scores: list[tuple[str, float, float | None]]


@dataclass(frozen=True)
class Row:
    prompt: str
    labels: list[str]  # its groups
    spread: float  # how far the judges disagree
    shots: list[Shot]


def write_comparison(folder: Path, result: dict, comparison: ModelComparison) -> Path:
    """comparison.json, comparison.md, comparison.html; the path of the page."""
    write_text(folder / "comparison.json", json.dumps(result, indent=1))
    write_text(folder / "comparison.md", markdown(result))
    page = folder / "comparison.html"
    write_text(page, html(result, rows(comparison)))
    return page


def rows(comparison: ModelComparison, count: int = SHOWN) -> list[Row]:
    """The comparisons that the judges differ most about; with one judge, those it finds most different."""
    names = [name for name in comparison.pictures if name != NEGATIVE_CONTROL]
    others = names[1:]
    spreads = []
    for name in others:
        differences = [each[name].total - each[names[0]].total for each in comparison.scores.values()]
        spreads.append(disagreement(differences) if len(differences) > 1 else np.abs(differences[0]))
    spread = np.nan_to_num(np.max(spreads, axis=0), nan=-1.0) if spreads else np.zeros(len(comparison.captions))
    chosen, seen = [], set()
    for i in np.argsort(-spread, kind="stable"):
        if int(i) // comparison.seeds not in seen and len(chosen) < count:  # one row a prompt
            seen.add(int(i) // comparison.seeds)
            chosen.append(int(i))
    return [_row(comparison, names, i, float(spread[i])) for i in chosen]


def _row(comparison: ModelComparison, names: list[str], i: int, spread: float) -> Row:
    shots = []
    for name in names:
        said = []
        for judge, each in comparison.scores.items():
            own, base = float(each[name].total[i]), float(each[names[0]].total[i])
            said.append((judge, own, None if name == names[0] else own - base))
        shots.append(Shot(name, comparison.pictures[name][i], said))
    prompt = i // comparison.seeds
    labels = [label for each in comparison.prompts.groups.values() for label, own in each.items() if prompt in own]
    return Row(comparison.captions[i], labels, spread, shots)


def html(result: dict, shown: list[Row]) -> str:
    """Everything that comes from data is escaped by the template's engine."""
    pictures = [shot.picture for row in shown for shot in row.shots]
    uris = picture_uris(pictures, PICTURE_BYTES)
    return render(
        "comparison.html.j2",
        result=result,
        models=list(next(iter(result["scores"].values()))),
        intervals=intervals(result),
        unfit=unfit_judges(result),
        rows=shown,
        src=lambda picture: uris[id(picture)],
        pixelated=bool(pictures) and max(pictures[0].shape[:2]) < ENLARGED,
        palette=PALETTE,
        text=json.dumps(result, indent=1),
    )


def intervals(result: dict) -> list[Interval]:
    """Every pair of models by every judge, in percent; then each pair by groups of prompts."""
    out = []
    for judge, pairs in result["win_rates"].items():
        for pair in pairs:
            out.append(_interval(f"{pair['model']} against {pair['against']}", judge, pair))
    out.sort(key=lambda row: _order(result, row))
    for judge, pairs in result["win_rates"].items():
        for pair in pairs:
            if NEGATIVE_CONTROL in (pair["model"], pair["against"]):
                continue
            for kind, labels in pair["groups"].items():
                group = f"{pair['model']} against {pair['against']}, by {kind}: {judge}"
                out += [_interval(group, label, values) for label, values in labels.items()]
    return out


def _order(result: dict, row: Interval) -> int:
    pairs = next(iter(result["win_rates"].values()))
    return [f"{pair['model']} against {pair['against']}" for pair in pairs].index(row.group)


def _interval(group: str, name: str, values: dict) -> Interval:
    count = values["prompts"]
    rates = [percent(values[key]) for key in ("win_rate", "low", "high")]
    return Interval(group, name, *rates, (f"{count:,} prompt{'s' * (count != 1)}",), count)


def markdown(result: dict) -> str:
    prompts, sampler = result["prompts"], result["sampler"]
    published = ", the published set" if prompts["published_set"] else ""
    models = list(next(iter(result["scores"].values())))
    lines = [
        "# Comparison",
        "",
        f"{prompts['count']:,} prompts ({prompts['kind']}{published}) x "
        f"{result['seeds']} pictures, the same noise for every model; {sampler['name']}, {sampler['steps']} steps, "
        f"guidance {sampler['guidance']:g}.",
        "",
        *(f"- {_cell(name)}: `{place}`" for name, place in result["models"].items()),
    ]
    if NEGATIVE_CONTROL in models:
        scale = f"{sampler['control_eps_scale']:g}"
        lines.append(f"- {NEGATIVE_CONTROL}: the negative control, the base with its noise prediction x {scale}")
    lines += ["", "## Scores, median (mean)", "", _table("judge", models)]
    for judge, by_model in result["scores"].items():
        lines.append(_line(judge, [_score(by_model[name]) for name in models]))
    if any(value is not None for value in result["diversity"].values()):
        lines.append(_line("diversity", [f"{result['diversity'][name]:.4f}" for name in models]))
    lines += ["", "## Win-rates, percent (95 % interval over prompts)", ""]
    lines += [*_without_score(result), ""] if _without_score(result) else []
    lines += [*(f"- {_cell(line)}" for line in unfit_judges(result)), ""] if unfit_judges(result) else []
    judges = list(result["win_rates"])
    lines.append(_table("models", judges))
    for number, pair in enumerate(result["win_rates"][judges[0]]):
        rates = [_rate(result["win_rates"][judge][number]) for judge in judges]
        lines.append(_line(f"{pair['model']} against {pair['against']}", rates))
    for number, pair in enumerate(result["win_rates"][judges[0]]):
        for kind in pair["groups"] if NEGATIVE_CONTROL not in (pair["model"], pair["against"]) else ():
            title = f"## {_cell(pair['model'])} against {_cell(pair['against'])}, by {kind}"
            lines += ["", title, "", _table(kind, judges)]
            for label in pair["groups"][kind]:
                each = [result["win_rates"][judge][number]["groups"][kind][label] for judge in judges]
                lines.append(_line(label, [_rate(values) for values in each]))
    return "\n".join([*lines, *_published(result)]) + "\n"


def unfit_judges(result: dict) -> list[str]:
    """A line for each judge that tells the negative control from the base, which it should not (docs/judges.md)."""
    out = []
    for judge, pairs in result["win_rates"].items():
        for pair in pairs:
            if pair["model"] != NEGATIVE_CONTROL or pair["low"] is None or pair["low"] <= 0.5 <= pair["high"]:
                continue
            out.append(
                f"{judge} is unfit for this base: it tells even the negative control from it ({_rate(pair)}), so what "
                "it says of a model may be about the size of its noise prediction"
            )
    return out


def _without_score(result: dict) -> list[str]:
    """A judge whose answers were unclear: comparisons with such a picture are left out."""
    out = []
    for judge, by_model in result["scores"].items():
        missing = {name: values["without_score"] for name, values in by_model.items() if values["without_score"]}
        if missing:
            counts = ", ".join(f"{_cell(name)} {count:,}" for name, count in missing.items())
            out.append(f"- {_cell(judge)} gave no clear score for some pictures, which are left out: {counts}")
    return out


def _published(result: dict) -> list[str]:
    """The paper's numbers, where base, prompts and guidance are the paper's."""
    paper = result["paper"]
    if paper is None:
        return []
    judges = list(paper["scores"])
    lines = ["", f"## The paper's, {paper['base']}, same prompts: median (mean)", "", _table("model", judges)]
    for model in paper["scores"][judges[0]]:
        lines.append(_line(f"{model}-{paper['base']}", [_score(paper["scores"][judge][model]) for judge in judges]))
    for name in next(iter(result["scores"].values())):
        lines.append(_line(f"{name} (ours)", [_score(result["scores"][judge][name]) for judge in judges]))
    if any(paper["win_rates"].values()):
        lines += ["", "Win-rates of the paper's InPO, percent:", "", _table("against", judges)]
        for model in paper["win_rates"][judges[0]]:
            rates = [f"{100 * paper['win_rates'][judge][model]:.2f}" for judge in judges]
            lines.append(_line(f"{model}-{paper['base']}", rates))
    return lines


def _score(values: dict) -> str:
    return "-" if values["mean"] is None else f"{values['median']:.5g} ({values['mean']:.5g})"


def _rate(values: dict) -> str:
    return told(*(values[key] for key in ("win_rate", "low", "high", "prompts")))


def _table(first: str, columns: list[str]) -> str:
    return _line(first, columns) + "\n" + "| --- |" + " --- |" * len(columns)


def _line(first: str, cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in (first, *cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
