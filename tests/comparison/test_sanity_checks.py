"""Each state of the sanity checks, in the numbers and in the words of report, card and console."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from inpo_fast.comparison.config import EvaluateConfig
from inpo_fast.comparison.evaluation import Evaluation, Gallery, summarise
from inpo_fast.judges import Scores
from inpo_fast.report.results import checks_in_words, headline, sanity_checks, verdict
from inpo_fast.report.write import write_report

PROMPTS = [f"prompt {i}" for i in range(12)]


class Reads:
    """A judge that reads its score off the first pixel: 0 to 255."""

    tie = 0.5

    def __init__(self, name, channel=0):
        self.name, self.channel = name, channel

    def score(self, images, prompts):
        return Scores(np.array([float(image[0, 0, self.channel]) for image in images]))


def gallery(first, second, spread=0):
    """Pictures that the first judge gives `first`, the second one `second`; the two of a prompt differ by spread."""
    pictures = []
    for i in range(2 * len(PROMPTS)):
        picture = np.full((8, 8, 3), 100 + spread * (i % 2), np.uint8)
        picture[0, 0] = first, second, 0
        pictures.append(picture)
    return Gallery(PROMPTS, 2, pictures)


def result_of(aligned=(60, 50), control=(50, 50), spreads=(10, 10)):
    galleries = {
        "base": gallery(50, 50, spreads[0]),
        "aligned": gallery(*aligned, spreads[1]),
        "control": gallery(*control, spreads[0]),
    }
    judge = Reads("first")
    scores = {name: judge.score(g.pictures, g.captions) for name, g in galleries.items()}
    config = replace(EvaluateConfig(), seeds=2)
    return Evaluation(summarise(galleries, scores, judge, Reads("second", 1), config, "inpo"), galleries, scores)


@pytest.mark.parametrize(
    ("aligned", "control", "ok", "words"),
    [
        ((60, 60), (50, 50), True, "all sanity checks hold."),
        ((60, 50), (50, 50), True, "all sanity checks hold."),  # ties: it does not prefer the base
        ((60, 40), (50, 50), False, "fail: independent judge (second, a judge that no reward was made from, prefers"),
        # it tells the control from the base: whatever it says of the model
        ((60, 40), (50, 70), None, "cannot decide: independent judge (second tells even the base from the base with"),
        ((60, 60), (50, 70), None, "cannot decide: independent judge (second tells"),
        ((60, 60), (50, 30), None, "cannot decide: independent judge (second tells"),
    ],
)
def test_the_independent_judge_decides_only_where_it_is_fit(tmp_path, aligned, control, ok, words):
    evaluation = result_of(aligned, control)
    check = json.loads(json.dumps(evaluation.result))["guards"]["outside"]
    assert check["ok"] is ok and check["fit"] is (ok is not None)
    text = verdict(evaluation.result)
    assert words in text and ("the other 2 hold" in text) == (ok is not True)
    assert ("for this judge" in text) == (ok is False) and "FAIL" not in text
    assert headline(evaluation.result).tone == ("undecided" if ok is False else "good")
    page = write_report(tmp_path, evaluation).read_text()
    state = re.search(r'independent judge</th>.*?class="state (\w+)">([^<]+)<', page, re.DOTALL)
    assert (
        state.groups()
        == {
            True: ("good", "✔ ok"),
            False: ("bad", "✘ FAILS"),
            None: ("undecided", "? cannot decide"),
        }[ok]
    )
    assert ("unfit for this base" in page) == (ok is None)


def test_a_judge_that_prefers_the_control_is_named_with_what_it_means():
    result = result_of(control=(90, 50)).result
    assert result["guards"]["control"]["ok"] is False
    assert "negative control (first also prefers the untrained base with its noise prediction x 1.01" in verdict(result)
    assert headline(result).tone == "undecided"


def test_diversity_without_any_in_the_base():
    """Nothing to compare with: no failure, and no ratio in the millions."""
    for spread in (0, 10):
        result = result_of(spreads=(0, spread)).result
        assert result["guards"]["diversity_ratio"] == {"value": None, "ok": None}
        assert "diversity ratio (the base draws one picture of a prompt only)" in verdict(result)
        assert [check.value for check in sanity_checks(result) if check.name == "diversity ratio"] == [""]
    assert result_of(spreads=(10, 5)).result["guards"]["diversity_ratio"]["ok"] is False


def test_too_few_prompts_decide_nothing():
    few = PROMPTS[:3]
    full = result_of(aligned=(60, 40))
    galleries = {name: Gallery(few, 2, g.pictures[:6]) for name, g in full.galleries.items()}
    scores = {name: Reads("first").score(g.pictures, few) for name, g in galleries.items()}
    result = summarise(
        galleries, scores, Reads("first"), Reads("second", 1), replace(EvaluateConfig(), seeds=2), "inpo"
    )
    assert result["guards"]["outside"]["ok"] is None and result["guards"]["outside"]["fit"] is True
    assert "Too few prompts" in verdict(result) and headline(result).tone == "undecided"
    assert "independent judge (too few prompts for an interval)" in checks_in_words(result)


def test_no_check_was_made():
    result = result_of().result | {"guards": {}}
    assert "; no sanity check was made." in verdict(result)
