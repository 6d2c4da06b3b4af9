"""Prompt sets of every layout against what was written; the paper's numbers against the tables they stand in."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.comparison import published_scores
from inpo_fast.comparison.prompts import HPD_STYLES, read_prompt_set
from inpo_fast.runtime.errors import UserError


def write_hpd(folder, each=3):
    for style in HPD_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(each)]))


def test_hpd_has_styles_in_order(tmp_path):
    write_hpd(tmp_path)
    found = read_prompt_set(str(tmp_path))
    assert found.kind == "hpdv2" and len(found.prompts) == 12 and found.prompts[3] == "concept-art 0"
    assert found.groups["style"]["concept-art"] == [3, 4, 5] and not found.published
    some = read_prompt_set(str(tmp_path), limit=4)
    assert some.groups["style"] == {style: [i] for i, style in enumerate(HPD_STYLES)}  # spread evenly
    write_hpd(tmp_path, 800)
    assert read_prompt_set(str(tmp_path)).published
    (tmp_path / "photo.json").unlink()
    with pytest.raises(UserError, match=r"photo\.json"):
        read_prompt_set(str(tmp_path))


def test_parti_has_quotes_and_categories(tmp_path):
    rows = ["Prompt\tCategory\tChallenge\tNote", 'a "quoted" cat\tAnimals\tBasic\t', "7\tNumbers\tSimple Detail\tx"]
    (tmp_path / "P.tsv").write_text("\n".join(rows) + "\n")
    found = read_prompt_set(str(tmp_path / "P.tsv"))
    assert (found.kind, found.prompts) == ("parti", ['a "quoted" cat', "7"])
    assert found.groups == {
        "category": {"Animals": [0], "Numbers": [1]},
        "challenge": {"Basic": [0], "Simple Detail": [1]},
    }


def test_captions_and_texts(tmp_path):
    pq.write_table(pa.table({"caption": ["b", "a", "b", None, " "], "x": [1] * 5}), tmp_path / "t.parquet")
    for path in (tmp_path / "t.parquet", tmp_path):
        assert read_prompt_set(str(path)).prompts == ["b", "a"]
    (tmp_path / "p.txt").write_text("one\n\n two \none\n")
    assert read_prompt_set(str(tmp_path / "p.txt")).prompts == ["one", "two"]
    (tmp_path / "p.json").write_text('["x", "y"]')
    assert read_prompt_set(str(tmp_path / "p.json")).kind == "text"
    (tmp_path / "bad.json").write_text('{"x": 1}')
    with pytest.raises(UserError, match="not a list of texts"):
        read_prompt_set(str(tmp_path / "bad.json"))


def test_the_papers_numbers_stand_beside_the_same_only():
    judges = ["pickscore:yuvalkirstain/PickScore_v1", "hps-v2.1", "clip-h:x", "pocket-rules"]
    found = published_scores.reference("runwayml/stable-diffusion-v1-5", "hpdv2", True, 7.5, judges)
    assert found["scores"][judges[0]]["InPO"] == {"median": 21.894, "mean": 21.916}
    assert found["scores"]["clip-h:x"]["Base"]["mean"] == 33.945 and found["scores"].keys() == {judges[0], "clip-h:x"}
    assert found["win_rates"][judges[0]]["KTO"] == pytest.approx(0.6741)
    assert (
        published_scores.reference("stable-diffusion-v1-5", "hpdv2", False, 7.5, judges) is None
    )  # a part of the prompts
    assert published_scores.reference("my-model", "hpdv2", True, 7.5, judges) is None
    assert published_scores.reference("stable-diffusion-v1-5", "hpdv2", True, 5.0, judges) is None
    xl = published_scores.reference("stabilityai/stable-diffusion-xl-base-1.0", "pickapic", True, 5.0, ["aesthetic"])
    assert xl["scores"]["aesthetic"]["DPO"]["mean"] == 6.0160 and xl["win_rates"]["aesthetic"] == {}


def test_every_mean_is_near_its_median():
    """A slip of the pen in the table would part them: they differ by at most 2 % in the paper."""
    for rows in published_scores.SCORES.values():
        for row in rows.values():
            assert all(abs(median / mean - 1) < 0.02 for median, mean in row)
