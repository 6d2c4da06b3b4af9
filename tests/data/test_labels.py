"""Labels of every source by one rule: shares that add up to 1, as they are stored and rounded; the rest is counted
apart from the ties, named, and refused above the limit."""

import io
import json
import logging
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_runs import run_command

from inpo_fast.data import labels
from inpo_fast.data.config import DataConfig
from inpo_fast.data.identity import identity_of
from inpo_fast.data.images import png
from inpo_fast.data.loader import open_data
from inpo_fast.data.relabelled import METADATA
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

GREY = png(np.full((8, 8, 3), 90, np.uint8)), png(np.full((8, 8, 3), 200, np.uint8))


def parquet(folder, rows, kind=None):
    columns = {"caption": [f"p{i}" for i in range(len(rows))], "jpg_0": [GREY[0]] * len(rows)}
    columns |= {"jpg_1": [GREY[1]] * len(rows)}
    columns |= {f"label_{side}": pa.array([row[side] for row in rows], kind) for side in (0, 1)}
    pq.write_table(pa.table(columns), folder / "p.parquet", row_group_size=4)
    return str(folder / "p.parquet")


def listed(folder, rows):
    for side in (0, 1):
        (folder / f"{side}.png").write_bytes(GREY[side])
    pair = {"image_0": "0.png", "image_1": "1.png"}
    lines = [{"prompt": f"p{i}", **pair, "label_0": a, "label_1": b} for i, (a, b) in enumerate(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def hpd(folder, rows):
    listed(folder, rows)
    (folder / "metadata.jsonl").unlink()
    pair = {"file_path": ["0.png", "1.png"]}
    lines = [{"prompt": f"p{i}", **pair, "human_preference": list(row)} for i, row in enumerate(rows)]
    (folder / "train.json").write_text(json.dumps(lines))
    return str(folder / "train.json")


def tar(folder, rows):
    with tarfile.open(folder / "0.tar", "w") as out:
        for i, (a, b) in enumerate(rows):
            about = json.dumps({"prompt": f"p{i}", "label_0": a, "label_1": b}).encode()
            for name, content in (("0.png", GREY[0]), ("1.png", GREY[1]), ("json", about)):
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return str(folder / "0.tar")


MAKERS = {"parquet": parquet, "folder": listed, "hpd": hpd, "webdataset": tar}


@pytest.mark.parametrize("kind", MAKERS)
def test_rounded_shares_are_labels(tmp_path, kind):
    """Two digits, three digits, an exact one; divided by their sum."""
    rows = [(0.67, 0.34), (0.33, 0.66), (0.333, 0.666), (0.7, 0.3), (1, 0), (0.501, 0.498)]
    source = open_source(MAKERS[kind](tmp_path, rows))
    got = [source.read(i) for i in range(len(source))]
    assert [pair.winner == GREY[0] for pair in got] == [True, False, False, True, True, True]
    want = [0.67 / 1.01, 0.66 / 0.99, 0.666 / 0.999, 0.7, 1, 0.501 / 0.999]
    np.testing.assert_allclose([pair.label for pair in got], want, rtol=1e-15)
    assert got[3].label == 0.7  # what adds up is taken as it is
    assert (source.undecided.ties, source.undecided.unclear) == (0, 0)


@pytest.mark.parametrize("kind", MAKERS)
def test_rounded_shares_of_which_one_is_a_half_are_ties(tmp_path, kind):
    rows = [(0.5, 0.51), (0.51, 0.5), (0.5, 0.49), (0.499, 0.5), (0.501, 0.5), (0.505, 0.505), (0.51, 0.49), (0, 1)]
    source = open_source(MAKERS[kind](tmp_path, rows))
    assert (len(source), source.ties, source.undecided.unclear) == (2, 6, 0) and source.read(0).label == 0.51


CHOSEN = {"chosen": "0.png", "rejected": "1.png"}
NUMBERED = {"image_0": "0.png", "image_1": "1.png"}
TWICE = {  # a record that says it twice: what is left of it
    "label and shares": ({**NUMBERED, "label": 1, "label_0": 1, "label_1": 0}, "unclear"),
    "label and one share": ({**NUMBERED, "label": 1, "label_0": 1}, "unclear"),
    "a side and a tie": ({**NUMBERED, "label": 1, "label_0": 0.5, "label_1": 0.5}, "unclear"),
    "a tie and a side": ({**NUMBERED, "label": 0.5, "label_1": 1}, "unclear"),
    "chosen and label": ({**CHOSEN, **NUMBERED, "label": 1}, "unclear"),
    "chosen and shares": ({**CHOSEN, "image_0": "1.png", "image_1": "./0.png", "label_0": 1, "label_1": 0}, "unclear"),
    "chosen and a tie": ({**CHOSEN, **NUMBERED, "label": 0.5}, "unclear"),
    "other images": ({**CHOSEN, "image_0": "0.png", "image_1": "2.png", "label": 0}, "unclear"),
    "the same": ({**NUMBERED, "label": 0, "label_0": 1, "label_1": 0}, "first"),
    "the same, softer": ({**NUMBERED, "label": 0, "label_0": 0.7, "label_1": 0.3}, "first"),
    "the same of chosen": ({**CHOSEN, "image_0": "1.png", "image_1": "./0.png", "label": 1}, "first"),
    "no label beside": ({**NUMBERED, "label": 0, "label_0": None, "label_1": "cat"}, "first"),
    "ratings beside": ({**NUMBERED, "label": 0, "label_0": 3, "label_1": 5}, "first"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_record_that_contradicts_itself_is_counted(tmp_path, name):
    record, want = TWICE[name]
    listed(tmp_path, [])
    lines = [{"prompt": "p", **NUMBERED, "label": 0}, {"prompt": "q", **record}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(str(tmp_path))
    assert source.undecided.unclear == (want == "unclear") == (len(source) == 1) and not source.ties
    assert not source.undecided.example or "contradict each other" in source.undecided.example
    assert len(source) == 1 or source.read(1).winner == GREY[0]


def test_contradictions_in_other_formats(tmp_path):
    (tmp_path / "tar").mkdir()
    content = json.dumps({"prompt": "p", "label": 1, "label_0": 1, "label_1": 0}).encode()
    with tarfile.open(tmp_path / "tar" / "0.tar", "w") as out:
        for name, part in (("0.png", GREY[0]), ("1.png", GREY[1]), ("json", content)):
            member = tarfile.TarInfo(f"x.{name}")
            member.size = len(part)
            out.addfile(member, io.BytesIO(part))
    with pytest.raises(UserError, match=r"label 1, label_0 1, label_1 0 .they contradict each other"):
        open_data(DataConfig(source=str(tmp_path / "tar" / "0.tar")))
    path = hpd(tmp_path, [(1, 0)])
    both = {"path1": "0.png", "path2": "1.png", "file_path": ["0.png", "1.png"]}
    rows = [{"prompt": "p", **both, "human_preference": choice} for choice in ([1, 0], [0, 1], [0.5, 0.5])]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    source = open_source(path)
    assert (len(source), source.undecided.unclear) == (1, 2)


def test_every_share_as_float16_keeps_its_label(tmp_path):
    shares = np.arange(1, 100) / 100
    rows = [(np.float16(p), np.float16(1 - p)) for p in shares]
    source = open_source(parquet(tmp_path, rows, pa.float16()))
    assert source.ties == 1 and len(source) == 98 and source.undecided.unclear == 0  # one half alone is a tie
    got = [(pair.winner == GREY[0], pair.label) for pair in map(source.read, range(98))]
    want = [(p > 0.5, max(p, 1 - p)) for p in shares if p != 0.5]
    assert [side for side, _ in got] == [side for side, _ in want]
    np.testing.assert_allclose([label for _, label in got], [label for _, label in want], atol=3e-4)


NO_SHARES = {
    "ratings": (5, 3),
    "percent": (70, 30),
    "counts of votes": (7, 3),
    "both better": (1, 1),
    "none better": (0, 0),
    "one digit": (0.7, 0.4),
    "beyond 0 and 1": (1.5, -0.5),
    "scores": (0.2, 0.9),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("what", NO_SHARES)
def test_what_is_no_share_is_a_count_of_its_own_and_refused_above_the_limit(tmp_path, kind, what, caplog):
    first, second = NO_SHARES[what]
    path = MAKERS[kind](tmp_path, [(1, 0), (0.5, 0.5), (first, second), (first, second), (0, 1)])
    with caplog.at_level(logging.WARNING):
        source = open_data(DataConfig(source=path, bad_pair_limit=0.5))
    assert len(source) == 2 and source.ties == 1 and source.undecided.unclear == 2
    example = f"human_preference [{first}, {second}]" if kind == "hpd" else f"label_0 {first:g}, label_1 {second:g}"
    assert source.undecided.example.startswith(example)
    assert f"2 with labels that are no two shares that add up to 1, such as {example}" in caplog.text
    with pytest.raises(UserError) as error:
        open_data(DataConfig(source=path, bad_pair_limit=0.1))
    said = str(error.value)
    assert said.startswith(
        "data.source: 2 of 5 rows have labels that are no two shares that add up to 1, such as " + example
    )
    assert "data.bad_pair_limit=0.1" in said and "\n" not in said
    assert (
        len(open_data(DataConfig(source=MAKERS[kind](tmp_path, [(1, 0), (first, second)])))) == 1
    )  # never at the first


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_without_a_label_are_no_ties_and_no_mistake(tmp_path, kind):
    path = MAKERS[kind](tmp_path, [(1, 0), (None, None), (0.5, 0.5), (None, 1), (None, None)])
    source = open_data(DataConfig(source=path))
    assert (len(source), source.ties, source.undecided.unlabelled, source.undecided.unclear) == (1, 1, 3, 0)


@pytest.mark.parametrize("value", [3, -0.2, 70])
def test_single_labels_and_confidences(tmp_path, value):
    listed(tmp_path, [(1, 0)])
    rows = [{"image_0": "0.png", "image_1": "1.png", "label": value}, {"chosen": "0.png", "rejected": "1.png"}]
    rows[1]["confidence"] = value
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "p"} | row) for row in [*rows, {**rows[0], "label": 1}])
    )
    source = open_data(DataConfig(source=str(tmp_path), bad_pair_limit=1))
    assert (len(source), source.ties, source.undecided.unclear) == (1, 0, 2)
    assert source.undecided.example == f"label {value:g} ({tmp_path / 'metadata.jsonl'}:1)"


def sidecar(path, soft, source, kind=None):
    ids = [source.id(i) for i in range(len(source))]
    about = {"source": "s", "source_identity": identity_of(source), "judges": ["j"]}
    table = pa.table({"id": ids, "soft": pa.array(soft, kind), "hard": [1.0] * len(ids)})
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(about).encode()}), path)
    return str(path)


def test_sidecars_by_the_same_rule(tmp_path):
    path = parquet(tmp_path, [(1, 0)] * 5)
    plain = open_source(path)
    soft = sidecar(tmp_path / "l.parquet", [0.7, 0.5, None, 7.0, 0.2], plain)
    source = open_data(DataConfig(source=path, labels=soft, labels_as="soft", bad_pair_limit=1))
    found = source.undecided
    assert (len(source), found.ties, found.unlabelled, found.unclear) == (2, 1, 1, 1)
    assert found.example == f"soft 7 ({soft})" and source.read(1).winner == GREY[1] and source.read(1).label == 0.8
    scores = sidecar(tmp_path / "s.parquet", [21.5, 20.1, 0.7, 22.0, 19.9], plain)
    with pytest.raises(UserError, match=r"4 of 5 rows have labels .* such as soft 21\.5"):
        open_data(DataConfig(source=path, labels=scores, labels_as="soft"))
    half = sidecar(tmp_path / "h.parquet", np.array([0.7, 0.5, 0.34, 0.1, 1], np.float16), plain, pa.float16())
    source = open_data(DataConfig(source=path, labels=half, labels_as="soft"))
    assert (len(source), source.ties) == (4, 1) and abs(source.read(0).label - 0.7) < 3e-4


def test_validate_shows_them(tmp_path, capsys):
    path = parquet(tmp_path, [(1, 0), (5, 3), (None, None), (0.5, 0.5), (0.67, 0.34)])
    with pytest.raises(SystemExit) as end:
        run_command("inpo_fast.validate", "--source", path, "--resolution", "8", "--json", str(tmp_path / "f.json"))
    said = capsys.readouterr().out
    assert not end.value.code
    assert "no two shares that add up to 1: label_0 5, label_1 3 in row 1 of row group 0" in said
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["pairs"], found["ties"], found["unlabelled"], found["unclear_labels"]) == (2, 1, 1, 1)


def test_exact_labels_are_what_they_were():
    """Bit for bit, also where the sum is off by rounding of double precision."""
    p = np.concatenate([np.random.default_rng(0).random(1000), [0, 1, 0.5, 0.1 + 0.2]])
    side, label = labels.decide(p, 1 - p)
    decided = np.abs(p - 0.5) > 1e-6
    assert (label[decided] == np.maximum(p, 1 - p)[decided]).all() and (side[decided] == (p < 0.5)[decided]).all()
    assert (side[~decided] == labels.TIE).all()
