"""JSON listings in the manner of HPDv2 and HPDv3: what the fields mean, and what is refused with its place."""

import json
from pathlib import Path

import pytest

from inpo_fast.data import records
from inpo_fast.data.hpd import HpdSource
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

V3 = {"prompt": "p", "path1": "a.png", "path2": "b.png"}
V2 = {"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]}


def save(folder: Path, content: list | str, name: str = "train.json") -> str:
    folder.mkdir(exist_ok=True)
    for image in ("a.png", "b.png"):
        (folder / image).write_bytes(image.encode())
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(folder / name)


def test_both_versions_as_they_are_published(tmp_path):
    records = [
        {**V3, "confidence": 0.9, "model1": "x", "model2": "y", "choice_dist": [9, 1]},
        {**V3, "confidence": None},
        {**V3, "confidence": 0.5},
        {**V2, "user_hash": "u"},
        {**V2, "human_preference": [1, 0], "weight": 2},
    ]
    source = open_source(save(tmp_path / "set", records))
    assert isinstance(source, HpdSource) and source.ties == 1 and source.blocks is None
    assert [source.read(i) for i in range(4)] == [
        Pair("train.json:1", "p", b"a.png", b"b.png", 0.9),
        Pair("train.json:2", "p", b"a.png", b"b.png"),
        Pair("train.json:4", "p", b"b.png", b"a.png"),
        Pair("train.json:5", "p", b"a.png", b"b.png", weight=2.0),
    ]


def test_images_elsewhere(tmp_path):
    listing = save(tmp_path / "set", [V3])
    save(tmp_path / "pictures", [])
    (tmp_path / "pictures" / "a.png").write_bytes(b"another")
    assert open_source(listing, images=str(tmp_path / "pictures")).read(0).winner == b"another"
    assert open_source(listing).read(0).winner == b"a.png"
    with pytest.raises(UserError, match=r"data\.images: no such folder: .*nowhere"):
        open_source(listing, images=str(tmp_path / "nowhere"))


def test_long_list_needs_the_memory_of_a_chunk(tmp_path, monkeypatch):
    """A record larger than a chunk, and commas and brackets inside text at every border."""
    monkeypatch.setattr("inpo_fast.data.records.CHUNK", 50)
    records = [{**V3, "prompt": f'{i} "],[{{ \\ ü𝄞' * (1 + 9 * (i == 3))} for i in range(30)]
    text = "\ufeff \n" + json.dumps(records, ensure_ascii=False)
    source = open_source(save(tmp_path, text))
    assert [source.read(i).prompt for i in range(30)] == [r["prompt"] for r in records]


REFUSALS = {
    "cut off": (
        json.dumps([V3, V3])[:-20],
        r"train\.json: element 2 of the list is cut off or not JSON .*download the",
    ),
    "no end": (json.dumps([V3, V3])[:-1], r"train\.json: element 3 of the list is cut off"),
    "not JSON": ("prompt,path1\n", r"train\.json:1: not JSON in UTF-8"),
    "number in the list": ([V3, 3], r"train\.json:2: no text under `prompt`"),
    "one object": (json.dumps({"train": [V3]}), r"train\.json:1: no text under `prompt`"),
    "keys": ([{"prompt": "p", "chosen": "a.png"}], r"train\.json:1: needs path1 \(the better image\) and path2, or"),
    "URL": (
        [{**V3, "path2": "https://example.org/b.png"}],
        r"train\.json:1: image https.* is a URL; download the images",
    ),
    "path of a number": ([{**V3, "path1": 3}], r"train\.json:1: image 3; expected the path of a file"),
    "empty path": ([{**V3, "path1": ""}], r"train\.json:1: image ''; expected the path"),
    "wrong way round": (
        [{**V3, "confidence": 0.2}],
        r"no usable pair \(0 ties, 1 with labels that are no two shares .* such as confidence 0\.2 \(.*train\.json:1\)",
    ),
    "confidence in text": ([{**V3, "confidence": "0.9"}], r"train\.json:1: confidence '0\.9'; expected a number"),
    "three images": ([{**V2, "file_path": ["a", "b", "c"]}], r"train\.json:1: file_path and human_preference must be"),
    "both better": (
        [{**V2, "human_preference": [1, 1]}],
        r"such as human_preference \[1, 1\] \(.*train\.json:1\)",
    ),
    "truth": ([{**V2, "human_preference": [True, False]}], r"train\.json:1: label_0 True; expected a number"),
    "weight": ([{**V3, "weight": -1}], r"train\.json:1: weight -1; expected a finite number"),
    "all ties": ([{**V3, "confidence": 0.5}] * 2, r"train\.json has no usable pair \(2 ties\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_record_and_the_remedy(tmp_path, name):
    content, message = REFUSALS[name]
    with pytest.raises(UserError, match=message) as caught:
        open_source(save(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_list_that_never_ends_is_given_up(tmp_path, monkeypatch):
    """A record larger than any is: refused after a few pieces, not when all of the file is in memory."""
    monkeypatch.setattr(records, "CHUNK", 1000)
    monkeypatch.setattr(records, "LARGEST", 5000)
    path, read, decoder = save(tmp_path, "[" + '"' + "x" * 10**6), [], json.JSONDecoder.raw_decode
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", lambda self, s, at: read.append(len(s)) or decoder(self, s, at))
    with pytest.raises(UserError, match=r"element 1 of the list is cut off or not JSON"):
        open_source(path)
    assert max(read) < 20_000


def test_folder_in_place_of_the_file_is_refused(tmp_path):
    save(tmp_path, [V3])
    with pytest.raises(UserError, match="is a folder; name the JSON file in it"):
        open_source(str(tmp_path), "hpd")


@pytest.mark.parametrize("where", ["../b.png", "missing.png", "/etc/hostname"])
def test_image_that_is_missing_or_outside_is_a_bad_pair_and_shifts_nothing(tmp_path, where):
    (tmp_path / "b.png").write_bytes(b"secret")
    source = open_source(save(tmp_path / "set", [V3, {**V3, "path2": where}, {**V3, "prompt": "q"}]))
    with pytest.raises(BadPair, match=r"train\.json:2: "):
        source.read(1)
    assert [source.read(i).id for i in (0, 2)] == ["train.json:1", "train.json:3"]


def test_listing_that_changes_while_it_is_used_is_refused(tmp_path):
    path = save(tmp_path, [V3, {**V3, "prompt": "second"}])
    source = open_source(path)
    save(tmp_path, [{**V3, "prompt": "a longer one"}, {**V3, "prompt": "second"}])
    with pytest.raises(UserError, match=r"train\.json:2: changed since it was opened .*; start again"):
        source.read(1)
