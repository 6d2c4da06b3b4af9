"""Win-rates' intervals against exact bounds computed another way, their coverage, what is said where there is none."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
from test_run_comparison import comparison

from inpo_fast.comparison.evaluation import Gallery, summarise
from inpo_fast.comparison.model_comparison import summarise as summarise_models
from inpo_fast.comparison.win_rates import FEWEST, interval, points, win_rate
from inpo_fast.config import EvaluateConfig
from inpo_fast.handover.model_card import _evaluation
from inpo_fast.judges import Scores
from inpo_fast.report import comparison as page
from inpo_fast.report.results import headline, sanity_checks, told, verdict, win_rates


def exact(wins: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson's bounds by bisection of the binomial's tails, in float64."""

    def tail(p: float, ks) -> float:
        return math.fsum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in ks)

    def solve(rises: bool, ks) -> float:
        lo, hi = 0.0, 1.0
        for _ in range(200):
            middle = (lo + hi) / 2
            lo, hi = (middle, hi) if (tail(middle, ks) < 0.025) == rises else (lo, middle)
        return lo

    low = 0.0 if wins == 0 else solve(True, range(wins, count + 1))
    high = 1.0 if wins == count else solve(False, range(wins + 1))
    return low, high


@pytest.mark.parametrize("count", [6, 7, 10, 30, 100, 1632])
def test_all_won_and_all_lost_have_the_exact_bounds(count):
    for wins in (0, count):
        found = interval(np.full(count, float(wins > 0)))
        assert (found.low, found.high) == pytest.approx(exact(wins, count), abs=1e-12) and found.prompts == count
    assert interval(np.ones(count)).low > 0.5  # six wins of six are told from chance


def test_all_ties_have_a_width_and_the_worst_case_of_what_was_not_seen():
    found = interval(np.full(40, 0.5))
    unseen = 1 - 0.025 ** (1 / 40)
    assert found[:3] == pytest.approx((0.5, 0.5 - unseen / 2, 0.5 + unseen / 2), abs=1e-12)


@pytest.mark.parametrize("count", range(FEWEST))
def test_too_few_prompts_have_no_interval(count):
    """With so many not even a win of all can be told from a fair coin, by exact counting."""
    found = interval(np.ones(count))
    assert found == ((1.0 if count else None), None, None, count) and not found.above and not found.below
    assert 2 * 0.5**count > 0.05 >= 2 * 0.5**FEWEST
    assert count == 0 or exact(count, count)[0] < 0.5


def test_one_loss_more_never_raises_a_bound():
    for count in (6, 12, 30):
        found = [interval(np.arange(count) < wins) for wins in range(count + 1)]
        for worse, better in pairwise(found):
            assert worse.low <= better.low + 1e-12 and worse.high <= better.high + 1e-12


def test_ordinary_intervals_are_the_bootstraps():
    values = np.random.default_rng(0).choice([0.0, 0.25, 0.5, 0.75, 1.0], size=200)
    drawn = np.random.default_rng(0).integers(200, size=(2000, 200))
    low, high = np.quantile(np.array([values[row].mean() for row in drawn]), [0.025, 0.975])
    assert interval(values)[:3] == (values.mean(), low, high)


@pytest.mark.parametrize(("count", "share"), [(6, 0.8), (6, 0.95), (10, 0.9), (16, 0.95), (30, 0.95), (64, 0.98)])
def test_the_truth_is_in_nine_of_ten_intervals(count, share):
    """Where nearly all are won the bootstrap alone holds it in 10 to 80 of a hundred."""
    rng = np.random.default_rng(count)
    held = 0
    for _ in range(100):
        found = interval((rng.random(count) < share).astype(float))
        held += found.low - 1e-9 <= share <= found.high + 1e-9
    assert held >= 89


def test_a_picture_without_a_score_leaves_its_comparison_out():
    ours = np.array([1, np.nan, 1, 1, np.nan, np.nan, -1, 0.0])
    found = points(ours, np.zeros(8), 0.1, seeds=2)
    np.testing.assert_array_equal(found, [1, 1, np.nan, 0.25])
    assert win_rate(ours, np.zeros(8), 0.1, seeds=2) == (0.75, None, None, 3)


class Judge:
    name, tie = "j", 1e-6

    def score(self, pictures, captions):
        return Scores(np.array([picture.mean() for picture in pictures]))


def evaluated(prompts: int, seeds: int = 2, missing: int = 0) -> dict:
    """A model whose pictures are all better."""

    def gallery(level):
        pictures = [np.full((2, 2, 3), level + seed, np.uint8) for _ in range(prompts) for seed in range(seeds)]
        return Gallery([f"p{i}" for i in range(prompts)], seeds, pictures)

    galleries = {"base": gallery(50), "aligned": gallery(90), "control": gallery(50)}
    judge = Judge()
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    scores["aligned"].total[:missing] = np.nan
    config = dataclasses.replace(EvaluateConfig(), seeds=seeds)
    return json.loads(json.dumps(summarise(galleries, scores, judge, judge, config, "inpo"), allow_nan=False))


@pytest.mark.parametrize("prompts", [1, 2, FEWEST - 1])
def test_no_verdict_on_a_few_prompts(prompts):
    result = evaluated(prompts)
    assert result["win_rate"] == 1 and result["win_rate_low"] is result["win_rate_high"] is None
    text = verdict(result)
    assert text.startswith("Too few prompts for a verdict") and "better" not in text and "hold" not in text
    assert f"{prompts} prompt{'s' * (prompts > 1)} x 2 pictures" in text and text in _evaluation(result, {})
    assert headline(result).tone == "undecided" and headline(result).title == "Too few prompts for a verdict"
    assert all(row.low is None and row.between == "no interval" and row.side == "both" for row in win_rates(result))
    assert all("no interval" in check.value for check in sanity_checks(result) if check.name == "negative control")


def test_a_verdict_from_six_prompts_on_and_every_row_names_its_prompts():
    result = evaluated(FEWEST)
    assert headline(result).tone == "good" and "54.1 to 100.0" in verdict(result)
    assert all(row.prompts == FEWEST and "6 prompts" in row.notes for row in win_rates(result))
    control = next(check for check in sanity_checks(result) if check.name == "negative control")
    assert control.value == "wins 50.0 % (27.0 to 73.0; 6 prompts)"


def test_what_got_no_score_is_said():
    result = evaluated(8, missing=5)  # all of two prompts, one of two of a third
    assert result["without_score"] == {"aligned": 5} and result["total"]["prompts"] == 6
    assert verdict(result).endswith("5 pictures got no clear score and are left out.")
    with pytest.raises(ValueError, match="judge j: no two of 16 pictures have scores"):
        evaluated(8, missing=16)


def test_told():
    assert told(1.0, None, None, 1) == "100.0 (1 prompt, no interval)"
    assert told(0.62, 0.551, 0.698, 1632) == "62.0 (55.1 to 69.8; 1,632 prompts)"
    assert told(None, None, None, 0) == "-" and told(0.5, 0.4, 0.6, None) == "50.0 (40.0 to 60.0)"


def test_tables_of_a_comparison_with_unclear_answers(tmp_path):
    made = comparison(tmp_path)
    made.scores["j2"]["ours"].total[[0, 1, 4, 5]] = np.nan  # all of `anime`
    result = json.loads(json.dumps(summarise_models(made, EvaluateConfig()), allow_nan=False))
    ours = result["win_rates"]["j2"][0]
    assert (ours["prompts"], ours["groups"]["style"]["anime"]["win_rate"]) == (2, None)
    text = page.markdown(result)
    assert "- j2 gave no clear score for some pictures, which are left out: ours 4" in text
    assert "| anime | 75.0 (2 prompts, no interval) | - |" in text
    shown = page.html(result, page.rows(made))
    assert (
        "unclear" in shown and "not judged" in shown and "4 pictures without a score" in shown and ">nan" not in shown
    )
    assert "no interval" in shown and "2 prompts" in shown
