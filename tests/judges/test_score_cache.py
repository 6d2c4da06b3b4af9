"""Cached and imported scores against the judge that made them: asked once, the same bits, nothing lost in a crash."""

import json

import numpy as np
import pytest

from inpo_fast.data.images import png
from inpo_fast.judges import Scores
from inpo_fast.judges import cache as cached
from inpo_fast.judges.registry import make_judge
from inpo_fast.judges.score_file import ScoreFileJudge
from inpo_fast.runtime.errors import UserError


class Counting:
    """An irrational number of the picture and the length of the prompt; counts what it is asked."""

    name, tie = "counting", 0.0

    def __init__(self, id="counting 1"):
        self.id, self.asked = id, 0

    def check(self, prompts): ...

    def score(self, images, prompts):
        self.asked += len(images)
        total = np.array([np.sqrt(i.mean() + len(p)) for i, p in zip(images, prompts, strict=True)])
        return Scores(total, {"looks": total / 3})


def pictures(n=10):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (5, 4, 3), dtype=np.uint8) for _ in range(n)]


def test_nothing_is_judged_twice_and_the_bits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "CHUNK", 4)
    judge, prompts = Counting(), [f"p{'x' * i}" for i in range(10)]
    first = cached.ScoreCache(tmp_path / "scores").score(judge, pictures(), prompts)
    again = cached.ScoreCache(tmp_path / "scores")
    assert judge.asked == 10 and again.missing(judge, pictures(), prompts) == 0
    second = again.score(judge, pictures(), prompts)
    direct = Counting().score(pictures(), prompts)
    for found in (first, second):
        np.testing.assert_array_equal(found.total, direct.total)
        np.testing.assert_array_equal(found.parts["looks"], direct.parts["looks"])
    assert judge.asked == 10
    again.score(judge, pictures(), prompts[::-1])  # other prompts of the same pictures
    other = Counting("counting 2")  # another judge
    again.score(other, pictures(), prompts)
    assert judge.asked == 20 and other.asked == 10
    again.score(judge, pictures(3) * 5, ["new"] * 15)
    assert judge.asked == 23  # equal pictures once


def test_a_cut_line_costs_one_score(tmp_path):
    judge = Counting()
    cached.ScoreCache(tmp_path).score(judge, pictures(), ["p"] * 10)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    again = cached.ScoreCache(tmp_path)
    np.testing.assert_array_equal(
        again.score(judge, pictures(), ["p"] * 10).total, Counting().score(pictures(), ["p"] * 10).total
    )
    assert judge.asked == 11


def test_hash_is_of_pixels_and_shape():
    a = pictures(1)[0]
    assert cached.image_hash(a) == cached.image_hash(np.asfortranarray(a)) != cached.image_hash(a.reshape(4, 5, 3))
    b = a.copy()
    b[0, 0, 0] ^= 1
    assert cached.image_hash(a) != cached.image_hash(b)


def test_scores_made_elsewhere(tmp_path):
    some = pictures(3)
    (tmp_path / "a.png").write_bytes(png(some[1]))
    lines = [
        {"image": cached.image_hash(some[0]), "prompt": "p", "score": 1.25, "parts": {"looks": 2}},
        {"file": "a.png", "prompt": "p", "score": -3, "parts": {"looks": 4}},
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    judge = make_judge(f"scores:{tmp_path / 's.jsonl'}")
    judge.check(["p"])
    found = judge.score(some[:2], ["p", "p"])
    assert found.total.tolist() == [1.25, -3] and found.parts["looks"].tolist() == [2, 4]
    with pytest.raises(UserError, match="no score for picture"):
        judge.score(some[2:], ["p"])
    with pytest.raises(UserError, match="no score for 1 of 2 prompts, such as 'q'"):
        judge.check(["p", "q"])


@pytest.mark.parametrize(
    "line", ['{"image": "x", "prompt": "p"}', '{"prompt": "p", "score": 1}', '{"image": "x", "score": 1}', "{"]
)
def test_wrong_lines_are_named(tmp_path, line):
    (tmp_path / "s.jsonl").write_text('{"image": "y", "prompt": "p", "score": 1}\n' + line)
    with pytest.raises(UserError, match=r"s\.jsonl:2"):
        ScoreFileJudge(tmp_path / "s.jsonl")
