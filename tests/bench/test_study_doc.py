"""docs/study.md and the tables beside the raw results: what they say is what the kept results give."""

import re

import pytest

from bench.results import ROOT
from bench.study import table
from bench.study.presets import PRESETS
from bench.study.run import there, wanted_of

KEPT = ROOT / "bench" / "results" / "study"
KEPT_NAMES = sorted(folder.name for folder in KEPT.iterdir() if folder.name != "runs")
UNTOLD = {"short"}  # what `make study` runs
COMMAND = re.compile(r"python -m bench\.study ([a-z-]+)")
SECTIONS = re.split(r"^### ", (ROOT / "docs" / "study.md").read_text(encoding="utf-8"), flags=re.M)[1:]


def tables(text: str) -> list[list[list[str]]]:
    """Markdown tables as rows of cells, the headings first."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.M)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for n, line in enumerate(block.splitlines()) if n != 1]
        for block in blocks
    ]


def test_every_preset_is_told_with_its_picture():
    assert set(KEPT_NAMES) == set(PRESETS) - UNTOLD
    told = {COMMAND.search(section)[1]: section for section in SECTIONS}
    assert set(told) == set(KEPT_NAMES)
    for name, section in told.items():
        assert f"(../bench/results/study/{name}/table.md)" in section and f"study/{name}/plot.svg)" in section, name


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_kept_tables_are_of_all_the_kept_results(name):
    study, runs = PRESETS[name], KEPT / "runs"
    results = there(study, runs)
    assert len(results) == len(wanted_of(study, runs))
    text = table.table(results, study.kind, study.against)
    assert (KEPT / name / "table.md").read_text(encoding="utf-8").split("\n\n", 1)[1] == text


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_what_the_document_shows_is_in_the_kept_table(section):
    name = COMMAND.search(section)[1]
    (kept,) = tables((KEPT / name / "table.md").read_text(encoding="utf-8"))
    for head, *rows in tables(section):
        if name == "tuning":  # a summary: the chosen setting and the range of all six
            column = kept[0].index("win-rate")
            found = {row[0]: row[column].split()[0] for row in kept[1:]}
            for method, chosen, best, range_ in rows:
                six = [value for cell, value in found.items() if cell.startswith(f"{method}: ")]
                assert found[f"{method}: {chosen}"] == best == max(six) and range_ == f"{min(six)} to {max(six)}"
                assert len(six) == 6
            continue
        columns = [kept[0].index(title) for title in head]
        whole = [[row[column] for column in columns] for row in kept[1:]]
        for row in rows:
            assert row in whole, row
