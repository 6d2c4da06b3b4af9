"""Writes report.html, and samples.png when there are pictures, from what a run and its evaluation left."""

from collections.abc import Iterator
from pathlib import Path

from inpo_fast.comparison.evaluation import Evaluation
from inpo_fast.report import curves, pictures, plots, reasons, results
from inpo_fast.report.page import render
from inpo_fast.report.start import ITSELF, WITH_LORA, started_from
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import json_or_none, parse_json, write_bytes, write_text
from inpo_fast.runtime.masking import masked

STRIP_BYTES = 600_000
PICTURE_BYTES = 1_600_000  # of the whole page, before base64 adds a third


def write_report(folder: Path, evaluation: Evaluation | None) -> Path:
    """The path of report.html. Shows what the run folder has: every part may be missing.

    folder: config.yaml, manifest.json and metrics.jsonl are read from it if they exist. evaluation: the verdict
    and the pictures; None for a run that was only trained. An evaluation that also has `scores`, a dict from a
    gallery's name to the judge's Scores of its pictures, gets the section on why pictures won.
    """
    try:
        galleries = evaluation.galleries if evaluation is not None else {}
        if "base" in galleries and "aligned" in galleries:
            write_bytes(
                folder / "samples.png",
                pictures.contact_sheet(
                    pictures.before_after(galleries["base"], galleries["aligned"]),
                    results.base_or_start(evaluation.result),
                ),
            )
        report = folder / "report.html"
        write_text(report, page(folder, evaluation))
    except OSError as problem:
        raise UserError(
            f"the report in {folder} cannot be written or read ({problem.strerror or problem})"
        ) from problem
    return report


def report_of_finished(folder: Path, evaluation: Evaluation | None) -> Path:
    """The path of report.html of a finished run, whose folder has evaluation.json only of its very model.

    evaluation: made just now; where None, the report of an earlier one stays, as only that had the pictures.
    """
    report = folder / "report.html"
    if evaluation is None and (result := json_or_none(folder / "evaluation.json")):
        if report.exists():
            return report
        evaluation = Evaluation(result)
    return write_report(folder, evaluation)


def page(folder: Path, evaluation: Evaluation | None) -> str:
    """The HTML. Everything that comes from data is escaped by the template's engine."""
    manifest_text = _text(folder / "manifest.json")
    manifest = _tree(manifest_text)
    series = curves.read_series(folder / "metrics.jsonl")
    result = evaluation.result if evaluation is not None else None
    galleries = evaluation.galleries if evaluation is not None else {}
    start = result.get("compared_with") if result else started_from(manifest.get("model") or {})
    before_after, why = [], None
    if "base" in galleries and "aligned" in galleries:
        before_after = pictures.before_after(galleries["base"], galleries["aligned"])
        if evaluation is not None and (scores := evaluation.scores):
            why = reasons.extremes(galleries["base"], galleries["aligned"], scores["base"], scores["aligned"])
    extreme = [case.comparison for case in (*why.gains, *why.losses)] if why else []
    uris = pictures.data_uris([*before_after, *extreme], PICTURE_BYTES)
    return render(
        "template.html.j2",
        variant=manifest.get("variant") or (result or {}).get("variant") or "unnamed run",
        subtitle=list(_subtitle(manifest, series, result)),
        verdict=results.headline(result) if result else None,
        base="start" if start else "base",
        start=start,
        before_after=before_after,
        why=why,
        strips=pictures.strips(folder / "images", STRIP_BYTES),
        src=lambda picture: uris[id(picture)],
        win_rates=results.win_rates(result) if result else [],
        checks=results.sanity_checks(result) if result else [],
        warnings=_tree(_text(folder / "warnings.json")).get("said", []),
        curves=[(curve, curve.latest(series), plots.draw(curve, series)) for curve in curves.chosen(series)],
        palette=plots.PALETTE,
        config=_text(folder / "config.yaml"),
        manifest=manifest_text,
    )


def _subtitle(manifest: dict, series: curves.Series, result: dict | None) -> Iterator[str]:
    """What was done, in a few phrases, from whatever is known."""
    data, model = manifest.get("data") or {}, manifest.get("model") or {}
    if model.get("base"):
        within = {
            ITSELF: "aligned from {init}, in the pipeline of {base}",
            WITH_LORA: "aligned from {base} with the LoRA {init}",
        }
        yield within.get(model.get("reference"), "aligned from {base}").format_map(model)
    if data.get("pairs") is not None:
        yield f"{data['pairs']:,} preference pairs"
    if series:
        yield f"{max(int(steps[-1]) for steps, _ in series.values()):,} training steps"
    if result:
        yield f"compared on {result['prompts']:,} prompts × {result['seeds']} pictures"
        sampler = result.get("sampler")
        if sampler:
            yield f"{sampler['name']}, {sampler['steps']} steps, guidance {sampler['guidance']:g}"


def _text(path: Path) -> str | None:
    """Masked: what an earlier version wrote may not be."""
    return masked(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None


def _tree(text: str | None) -> dict:
    try:
        tree = parse_json(text or "{}")
    except ValueError:  # the page shows the text as it is
        return {}
    return tree if isinstance(tree, dict) else {}
