"""Prompt sets of every layout against what was written; the paper's numbers against the tables they stand in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.comparison import published_scores
from inpo_fast.comparison.prompts import HPD_STYLES, read_prompt_set, read_prompts
from inpo_fast.comparison.win_rates import win_rate
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.keyed_rng import hash_key


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


SPELLINGS = ["a cat", " a cat ", "a  cat", "A Cat", "a\u00a0cat", "a cat\r"]
CAFE = ["caf\u00e9", "cafe\u0301"]


def listings(folder):
    """The same eight listings of two prompts in every kind of file."""
    listed = [*SPELLINGS, *CAFE]
    (folder / "p.json").write_text(json.dumps(listed))
    (folder / "p.jsonl").write_text("\n".join(json.dumps(x) for x in ({"prompt": p} for p in listed)))
    (folder / "p.txt").write_bytes("\n".join(p.strip("\r") for p in listed).encode())
    (folder / "p.tsv").write_text("Prompt\tCategory\n" + "".join(f"{p.strip(chr(13))}\tx\n" for p in listed))
    (folder / "p.csv").write_text("name,Prompt\n" + "".join(f'1,"{p}"\n' for p in listed))
    pq.write_table(pa.table({"caption": listed}), folder / "p.parquet")
    return [folder / f"p.{kind}" for kind in ("json", "jsonl", "txt", "tsv", "csv", "parquet")]


def test_a_prompt_that_is_listed_again_counts_once_in_every_kind_of_file(tmp_path, caplog):
    for path in listings(tmp_path):
        caplog.clear()
        found = read_prompt_set(str(path))
        assert found.prompts == ["a cat", CAFE[0]], path
        (line,) = caplog.messages
        assert f"{path}: {found.repeated} of {found.repeated + 2} prompts are listed again; each counts once" == line
        assert found.repeated == (4 if path.suffix == ".parquet" else 6)  # equal captions of parquet are pairs


def test_repeated_prompts_do_not_narrow_an_interval(tmp_path):
    """Half-width of a fair judge over 64 prompts that are listed three times: 0.12 as for 64, not 0.07."""
    (tmp_path / "p.json").write_text(json.dumps([f"prompt {i}" for i in range(64)] * 3))
    prompts = read_prompts(str(tmp_path / "p.json"))
    scores = np.array([hash_key("s", prompt) % 2 * 2 - 1.0 for prompt in prompts])
    _, low, high, count = win_rate(scores, np.zeros(len(prompts)), 0.1, seeds=1)
    assert count == 64 and 0.105 < (high - low) / 2 < 0.14


def test_a_prompt_of_two_groups_belongs_to_both(tmp_path):
    rows = ["Prompt\tCategory\tChallenge", "bond\tAbstract\tBasic", "a cat\tAnimals\tBasic", "Bond \tPeople\tBasic"]
    (tmp_path / "P.tsv").write_text("\n".join(rows) + "\n")
    found = read_prompt_set(str(tmp_path / "P.tsv"))
    assert found.prompts == ["bond", "a cat"] and found.repeated == 1
    assert found.groups == {
        "category": {"Abstract": [0], "Animals": [1], "People": [0]},
        "challenge": {"Basic": [0, 1]},
    }
    assert read_prompt_set(str(tmp_path / "P.tsv"), limit=1).groups["category"] == {"Abstract": [0], "People": [0]}


def test_the_published_sets_are_told_by_what_they_list(tmp_path):
    """Also where a prompt of the published file stands there twice."""
    rows = [f"prompt {i % 1600}\tx\ty" for i in range(1632)]
    (tmp_path / "P.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge", *rows]))
    found = read_prompt_set(str(tmp_path / "P.tsv"))
    assert found.published and len(found.prompts) == 1600 and found.repeated == 32
    assert not read_prompt_set(str(tmp_path / "P.tsv"), limit=1599).published


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "name,words\n1,2\n", "no column prompt or caption or text"),
        ("p.csv", "", "no column"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n', ":2 has no text"),
        ("p.jsonl", '"a"\n[', ":2 is not JSON"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.json", '[" ", ""]', "has no prompt"),
    ],
)
def test_lists_that_are_none_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_prompt_set(str(tmp_path / name))
