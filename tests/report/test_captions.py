"""What the report says of a run's numbers, for runs of each kind: it may not contradict them."""

import html
import json
import math
import re

import pytest

from inpo_fast.report import curves, plots
from inpo_fast.report.write import write_report

STEPS = 40
LN_2 = math.log(2)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take longer than the rest of the page."""
    monkeypatch.setattr(plots, "draw", lambda curve, series: "<svg></svg>")


def page_of(folder, steps=STEPS, **metrics):
    """metrics: by name, from the first step's value to the last one's; a number for all steps."""
    rows = []
    for i in range(steps):
        part = i / max(1, steps - 1)
        row = {k: v if v is None or isinstance(v, float) else v[0] + part * (v[1] - v[0]) for k, v in metrics.items()}
        rows.append(json.dumps({"step": i + 1, **row}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    return html.unescape(write_report(folder, None).read_text())


def watched(page):
    return re.findall(r'<p class="watch">⚠ ([^<]*)</p>', page)


def captions(page):
    """Meaning of each curve, by its title."""
    return dict(re.findall(r'card curve">\s*<h3>([^<]*)</h3>.*?<p class="note">([^<]*)</p>', page, re.DOTALL))


PAIRWISE = {"margin": (0.0, 1.0), "winner_delta": -0.01, "loser_delta": 0.02, "winner_error": 0.3, "eps_scale": 1.0}


def test_a_rising_loss_beside_a_rising_accuracy(tmp_path):
    """Few pairs told wrongly by much raise the mean: nobody prefers the losers."""
    page = page_of(tmp_path, loss=(LN_2, 0.9), implicit_accuracy=(0.5, 0.72), **PAIRWISE)
    assert "losers are preferred" not in page
    (said,) = watched(page)
    assert "above ln 2" in said and "accuracy says how many there are" in said
    assert "even while accuracy rises" in captions(page)["Loss"]


def test_a_falling_loss_beside_a_falling_accuracy(tmp_path):
    page = page_of(tmp_path, loss=(LN_2, 0.5), implicit_accuracy=(0.5, 0.4), **PAIRWISE | {"margin": (0.0, -1.0)})
    assert watched(page) == ["Not above chance at the end of the run."]
    assert "does not show that pictures become better" in captions(page)["Loss"]


def test_held_out_pairs(tmp_path):
    """Only what was looked at is spoken of."""
    page = page_of(tmp_path, loss=0.6, implicit_accuracy=0.7, **PAIRWISE)
    assert "held-out" not in page and watched(page) == []
    page = page_of(tmp_path, loss=0.6, implicit_accuracy=0.7, held_out_implicit_accuracy=0.45, **PAIRWISE)
    assert watched(page) == ["Not above chance on held-out pairs at the end of the run, though on training pairs."]
    page = page_of(tmp_path, loss=0.6, held_out_implicit_accuracy=0.45, **PAIRWISE)
    assert watched(page) == ["Not above chance on held-out pairs at the end of the run."]


@pytest.mark.parametrize("size", [0.45, 0.97])
def test_the_size_of_tau_is_no_measure(tmp_path, size):
    """With tau_norm it is rescaled, and along the exact path it is below 1 too: neither is warned of."""
    page = page_of(tmp_path, loss=0.6, tau_rms_winner=size, tau_rms_loser=size, **PAIRWISE)
    assert watched(page) == [] and "0.9" not in "".join(captions(page).values())
    assert "no measure of the inversion" in captions(page)["Amplitude of the target noise"]


def test_methods_of_each_kind(tmp_path):
    sft = page_of(tmp_path, loss=(0.4, 0.5), winner_delta=0.01, winner_error=0.3, eps_scale=1.0, tau_rms_winner=1.0)
    assert "ln 2" not in sft and "chance" not in sft and "loser" not in "".join(captions(sft).values())
    assert [said[:50] for said in watched(sft)] == ["At the end of the run the winners are predicted wo"]
    kto = page_of(tmp_path, loss=(0.5, 0.45), implicit_accuracy=0.7, reference_point=0.01, **PAIRWISE)
    assert "ln 2" not in kto and "It starts at 1/2" in captions(kto)["Loss"] and watched(kto) == []
    dpo = page_of(tmp_path, loss=(LN_2, 0.6), implicit_accuracy=0.7, tau_rms_winner=1.0, tau_rms_loser=1.0, **PAIRWISE)
    assert "It starts at ln 2" in captions(dpo)["Loss"] and watched(dpo) == []


def test_runs_with_almost_nothing(tmp_path):
    one = page_of(tmp_path, steps=1, loss=0.6931471824645996, implicit_accuracy=0.5, **PAIRWISE | {"margin": 0.0})
    assert watched(one) == ["Not above chance at the end of the run."]  # fp32's ln 2 is not above ln 2
    nothing = page_of(tmp_path, steps=5, loss=None, margin=None)  # never finite
    assert "no training metrics" in nothing
    (tmp_path / "metrics.jsonl").write_text("")  # all pairs of the first step were dropped
    assert "no training metrics" in write_report(tmp_path, None).read_text()


def test_warnings_are_shown_with_their_end(tmp_path):
    (tmp_path / "warnings.json").write_text(
        json.dumps({"steps": 9, "said": ["x: from step 2 to step 4, then no longer"]})
    )
    page = page_of(tmp_path, loss=0.6, **PAIRWISE)
    assert "Warnings while training" in page and "⚠ x: from step 2 to step 4, then no longer" in page
    (tmp_path / "warnings.json").write_text(json.dumps({"steps": 9, "said": []}))
    assert "Warnings while training" not in page_of(tmp_path, loss=0.6, **PAIRWISE)


def test_captions_state_no_verdict():
    """They hold for every run: none says what a run did."""
    for curve in curves.CURVES:
        for word in ("are preferred", "hardly helps", "pictures decay", "memorised", "is learned"):
            assert word not in curve.meaning, (curve.title, word)
