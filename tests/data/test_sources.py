"""Sources against files made here: parquet in the full Pick-a-Pic v2 schema, folders with metadata.jsonl; bad ones are
refused with one clear line.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.data.folder import FolderSource
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.parquet import ParquetSource
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

FIRST, SECOND, TIE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def pickapic(labels: list[tuple[float, float]], start: int = 0, **replaced) -> pa.Table:
    """Rows `start`, start + 1, … with all 19 columns; the images are the bytes 'first 7' and 'second 7'."""
    rows = range(start, start + len(labels))
    columns = {
        "are_different": [False for _ in rows],  # unused, and of no use: must not decide anything
        "best_image_uid": [f"uid-{i}" for i in rows],
        "caption": [f"caption {i}" for i in rows],
        "created_at": pa.array([datetime(2023, 5, 1, tzinfo=UTC)] * len(labels), pa.timestamp("ns", "UTC")),
        "has_label": [i % 2 == 0 for i in rows],
        "image_0_uid": [f"a-{i}" for i in rows],
        "image_0_url": [f"https://example.org/a/{i}.png" for i in rows],
        "image_1_uid": [f"b-{i}" for i in rows],
        "image_1_url": [f"https://example.org/b/{i}.png" for i in rows],
        "jpg_0": pa.array([b"first %d" % i for i in rows], pa.binary()),
        "jpg_1": pa.array([b"second %d" % i for i in rows], pa.binary()),
        "label_0": pa.array([a for a, _ in labels], pa.float64()),
        "label_1": pa.array([b for _, b in labels], pa.float64()),
        "model_0": ["model-a" for _ in rows],
        "model_1": ["model-b" for _ in rows],
        "ranking_id": [i * 7 for i in rows],
        "user_id": [i % 3 for i in rows],
        "num_example_per_prompt": pa.array([1 for _ in rows], pa.int64()),
        "__index_level_0__": pa.array(list(rows), pa.int64()),
    }
    assert len(columns) == 19
    columns |= replaced
    return pa.table({name: values for name, values in columns.items() if values is not None})


def write(path: Path, labels, group: int = 4, start: int = 0, **replaced) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pickapic(labels, start, **replaced), path, row_group_size=group)
    return path


def write_folder(folder: Path, records: list[dict | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_parquet_shards_and_row_groups(tmp_path):
    """3 shards of 3 row groups (more than are kept in memory): sides by label, ties left out and counted."""
    labels = [[FIRST, SECOND, TIE, SECOND, FIRST, FIRST, TIE, SECOND, SECOND, FIRST], [SECOND] * 11, [TIE, FIRST] * 6]
    expected, start = [], 0
    for number, part in enumerate(labels):
        name = f"train/part-{number}.parquet" if number else "part-0.parquet"
        write(tmp_path / name, part, start=start)
        for row, label in enumerate(part):
            images = [b"first %d" % (start + row), b"second %d" % (start + row)]
            if label != TIE:
                winner, loser = images if label == FIRST else images[::-1]
                expected.append(Pair(f"{name}:{row // 4}:{row % 4}", f"caption {start + row}", winner, loser))
        start += len(part)
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    assert source.ties == 8
    assert len(source) == len(expected) == 25
    for index in [*range(25), *reversed(range(25)), 7, 20, 0]:
        assert source.read(index) == expected[index]
    assert len({source.read(i).id for i in range(25)}) == 25


def test_single_parquet_file_and_other_number_types(tmp_path):
    path = write(tmp_path / "a.parquet", [FIRST, SECOND], label_0=pa.array([1, 0], pa.int8()))
    source = open_source(str(path))
    assert [source.read(i).winner for i in range(2)] == [b"first 0", b"second 1"]


@pytest.mark.parametrize(
    "label",
    [(0.5, 0.5), (1.0, 1.0), (0.0, 0.0), (0.7, 0.4), (1.5, -0.5), (None, 0.0), (float("nan"), 1.0), (0.5 + 4e-7, 0.5)],
)
def test_undecided_labels_are_left_out_and_counted(tmp_path, label):
    source = open_source(str(write(tmp_path / "a.parquet", [FIRST, label, SECOND])))
    found = source.undecided
    assert len(source) == 2 and found.ties + found.unlabelled + found.unclear == 1
    assert [source.read(i).prompt for i in range(2)] == ["caption 0", "caption 2"]


def test_parquet_record_without_image_or_caption_is_a_bad_pair(tmp_path):
    images = pa.array([b"x", None, b"x", b"", b"x"], pa.binary())
    captions = [None, *(f"caption {i}" for i in range(1, 5))]
    source = open_source(str(write(tmp_path / "a.parquet", [FIRST] * 5, jpg_1=images, caption=captions)))
    for index, name in ((0, "a.parquet:0:0"), (1, "a.parquet:0:1"), (3, "a.parquet:0:3")):
        with pytest.raises(BadPair, match=name):
            source.read(index)
    assert source.read(2).loser == b"x"
    assert source.read(4).prompt == "caption 4"


def test_caption_that_is_not_utf8_is_a_bad_pair(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    source = open_source(str(write(tmp_path / "a.parquet", [FIRST], caption=broken)))
    with pytest.raises(BadPair, match=r"a\.parquet:0:0.*UTF-8"):
        source.read(0)


def test_folder_in_both_forms(tmp_path):
    sides = {"image_0": "a.png", "image_1": "b.png"}
    chosen = {"chosen": "b.png", "rejected": "a.png"}
    records = [{"prompt": f"p{label}", **sides, "label": label} for label in (0, 1, 0.5)]
    records += ["", {"caption": "naïve", **chosen}, {"prompt": "float", **sides, "label": 1.0}]
    source = open_source(str(write_folder(tmp_path / "set", records)))
    assert isinstance(source, FolderSource)
    assert source.ties == 1
    assert [source.read(i) for i in range(len(source))] == [
        Pair("metadata.jsonl:1", "p0", b"a.png", b"b.png"),
        Pair("metadata.jsonl:2", "p1", b"b.png", b"a.png"),
        Pair("metadata.jsonl:5", "naïve", b"b.png", b"a.png"),
        Pair("metadata.jsonl:6", "float", b"b.png", b"a.png"),
    ]


@pytest.mark.parametrize("where", ["winner", "loser"])
@pytest.mark.parametrize("name", ["../secret.png", "absolute", "link.png", "missing.png", "sub", "a\0.png", "loop.png"])
def test_folder_image_that_cannot_be_taken_is_a_bad_pair(tmp_path, name, where):
    """Outside the folder (.., absolute, symlink), missing, a folder, NUL in the name, links in a circle."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    name = str(secret) if name == "absolute" else name
    chosen, rejected = (name, "a.png") if where == "winner" else ("a.png", name)
    folder = write_folder(tmp_path / "set", [{"prompt": "p", "chosen": chosen, "rejected": rejected}])
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(secret)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(BadPair, match=r"metadata\.jsonl:1"):
        open_source(str(folder)).read(0)


def truncated(tmp_path: Path) -> Path:
    path = write(tmp_path / "cut.parquet", [FIRST] * 9)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.parquet"
    path.write_text("no parquet at all\n" * 20)
    return path


def damaged_group(tmp_path: Path) -> Path:
    path = write(tmp_path / "damaged.parquet", [FIRST] * 9)
    group = pq.ParquetFile(path).metadata.row_group(0)
    size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(size) + content[4 + size :])
    return path


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


GOOD = {"prompt": "p", "chosen": "a.png", "rejected": "b.png"}
SIDES = {"prompt": "p", "image_0": "a.png", "image_1": "b.png"}
REFUSALS = {
    "missing path": (lambda d: d / "nowhere", r"nowhere; give a \.parquet, \.tar or \.json file"),
    "empty folder": (empty_folder, r"empty holds neither metadata\.jsonl nor \*\.parquet"),
    "truncated": (truncated, r"cut\.parquet: not a readable parquet.*download it again"),
    "text": (text_file, r"text\.parquet: not a readable parquet.*download it again"),
    "damaged": (damaged_group, r"damaged\.parquet: row group 0 cannot be read.*download it again"),
    "column": (lambda d: write(d / "c.parquet", [FIRST], jpg_1=None), r"c\.parquet: no column jpg_1; .*needs caption"),
    "text labels": (
        lambda d: write(d / "l.parquet", [FIRST], label_1=["0"]),
        r"l\.parquet: column label_1 is string, expected numbers \(1 better",
    ),
    "image paths": (
        lambda d: write(d / "p.parquet", [FIRST], jpg_0=[{"bytes": b"x", "path": "a"}]),
        r"p\.parquet: column jpg_0 is struct.*expected binary",
    ),
    "ties": (
        lambda d: write(d / "t.parquet", [TIE] * 3),
        r"t\.parquet has no usable pair \(3 ties\).*needs pairs with",
    ),
    "bad line": (lambda d: write_folder(d, [GOOD, "", '{"prompt": ']), r"metadata\.jsonl:3: not JSON"),
    "not an object": (lambda d: write_folder(d, [GOOD, "[1]"]), r"metadata\.jsonl:2: no text under `prompt`"),
    "no prompt": (
        lambda d: write_folder(d, [GOOD, {"chosen": "a", "rejected": "b"}]),
        r"metadata\.jsonl:2: no text under `prompt`",
    ),
    "label 7": (
        lambda d: write_folder(d, [{**SIDES, "label": 7}]),
        r"no usable pair \(0 ties, 1 with labels that are no two shares that add up to 1, such as label 7 \(.*:1\)\)",
    ),
    "shares beyond 0 and 1": (
        lambda d: write_folder(d, [{**SIDES, "label_0": 2, "label_1": -1}]),
        r"such as label_0 2, label_1 -1 \(.*metadata\.jsonl:1\)",
    ),
    "endless weight": (
        lambda d: write_folder(d, [GOOD, {**GOOD, "weight": float("inf")}]),
        r"metadata\.jsonl:2: weight inf; expected a finite number",
    ),
    "mixed labels": (
        lambda d: write_folder(d, [{**SIDES, "label": 1}, {**SIDES, "label": "1"}]),
        r"metadata\.jsonl:2: label '1'; expected 0 or 1",
    ),
    "missing keys": (lambda d: write_folder(d, [SIDES]), r"metadata\.jsonl:1: needs image_0, image_1 and label, or"),
    "folder of ties": (lambda d: write_folder(d, [{**SIDES, "label": 0.5}]), r"has no usable pair \(1 ties\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_names_the_file_and_the_remedy(tmp_path, name):
    make, message = REFUSALS[name]
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(make(tmp_path)))
    assert "\n" not in str(caught.value)


def test_listing_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    folder = write_folder(tmp_path, [GOOD])
    with (folder / "metadata.jsonl").open("ab") as file:
        file.write(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl:2: not JSON in UTF-8"):
        open_source(str(folder))


def test_format_forces_the_reader(tmp_path):
    write(tmp_path / "a.parquet", [FIRST])
    write_folder(tmp_path, [{"prompt": "listed", "chosen": "a.png", "rejected": "b.png"}])
    assert open_source(str(tmp_path)).read(0).prompt == "listed"
    assert open_source(str(tmp_path), "parquet").read(0).prompt == "caption 0"
    with pytest.raises(UserError, match=r"no metadata\.jsonl"):
        open_source(str(write(tmp_path / "sub" / "b.parquet", [FIRST]).parent), "folder")
