"""The pocket's independent judge: it reads, sees flaws, sees past grain, and was not made from reward or base."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from inpo_fast.comparison.win_rates import points
from inpo_fast.judges.pocket_reader import QUALITIES, WORDS
from inpo_fast.judges.registry import make_judge
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.reader import any_finish, qualities
from inpo_fast.pocket.scenes import Finish, all_scenes, render
from inpo_fast.runtime.errors import UserError


@pytest.fixture(scope="module")
def judge():
    return make_judge(f"pocket-reader:{ASSETS / 'reader'}")


@pytest.fixture(scope="module")
def drawn():
    """Pictures that the base drew, with their captions."""
    rows = pq.read_table(ASSETS / "pairs.parquet", columns=["caption", "jpg_0"]).slice(0, 200).to_pylist()
    pictures = [np.asarray(Image.open(io.BytesIO(row["jpg_0"])).convert("RGB")) for row in rows]
    return pictures, [row["caption"] for row in rows]


def test_it_reads_renderings_that_it_was_not_trained_on(judge):
    rng = np.random.default_rng(77)
    scenes = [all_scenes()[i] for i in rng.integers(len(all_scenes()), size=300)]
    finishes = [any_finish(rng) for _ in scenes]
    pictures = [render(scene, finish, rng) for scene, finish in zip(scenes, finishes, strict=True)]
    scores = judge.score(pictures, [scene.caption for scene in scenes])
    for name in WORDS:
        assert (scores.parts[name] > 0.5).mean() > 0.93, name
    wanted = np.array([qualities(finish) for finish in finishes])
    for column, name in enumerate(QUALITIES):
        assert np.corrcoef(scores.parts[name], wanted[:, column])[0, 1] > 0.7, name
    np.testing.assert_allclose(scores.total, (scores.parts["alignment"] + scores.parts["looks"]) / 2)
    one = judge.score(pictures[:1], [scenes[0].caption])
    np.testing.assert_allclose(one.total, scores.total[:1], atol=1e-6)  # whatever the batch
    assert qualities(Finish()) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "prefers_it"),
    [
        (lambda p, r: np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(2))), False),
        (lambda p, r: (p.mean(-1, keepdims=True) + 0.3 * (p - p.mean(-1, keepdims=True))).astype(np.uint8), False),
        (lambda p, r: np.roll(p, 6, 1), False),
        (lambda p, r: (p + r.normal(size=p.shape) * 2.5).clip(0, 255).astype(np.uint8), None),  # grain, 1 %
    ],
    ids=["blurred", "pale", "off centre", "grain"],
)
def test_what_it_minds_in_the_bases_pictures(judge, drawn, change, prefers_it):
    pictures, captions = drawn
    rng = np.random.default_rng(0)
    changed = [change(picture, rng) for picture in pictures]
    won = points(judge.score(changed, captions).total, judge.score(pictures, captions).total, judge.tie, 1).mean()
    assert abs(won - 0.5) < 0.02 if prefers_it is None else won < 0.35, won


def test_another_caption_costs_it_most(judge, drawn):
    pictures, captions = drawn
    other = captions[1:] + captions[:1]
    assert points(judge.score(pictures, other).total, judge.score(pictures, captions).total, judge.tie, 1).mean() < 0.05


def test_refusals(judge, tmp_path):
    with pytest.raises(UserError, match=r"^judge pocket-reader: names no folder; write pocket-reader:FOLDER$"):
        make_judge("pocket-reader")
    for make in (lambda: None, lambda: (tmp_path / "reader.safetensors").write_bytes(b"\0" * 40)):
        make()
        with pytest.raises(UserError, match="cannot be opened as a reader") as caught:
            make_judge(f"pocket-reader:{tmp_path}")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a pocket caption"):
        judge.check(["a dog"])
    assert judge.id.startswith("pocket-reader ") and 0.02 < judge.tie < 0.1
