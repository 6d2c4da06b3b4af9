"""What a source is: the same for a copy elsewhere, another one for every change that training would see, by name."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.data.config import DataConfig, FilterConfig
from inpo_fast.data.identity import WORDS, differences, identity_of
from inpo_fast.data.loader import open_data

PICTURES = [np.random.default_rng(i).integers(0, 256, 3000, np.uint8).tobytes() for i in range(16)]
ROWS, PICTURED, PAIRS = WORDS["rows"], WORDS["pictures"], WORDS["pairs"]


def parquet(folder: Path, rows, name="a.parquet", large=1) -> str:
    """rows: (prompt, first picture, second picture, label_0). large: pictures are so many times longer."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "caption": [row[0] for row in rows],
        "jpg_0": [row[1] * large for row in rows],
        "jpg_1": [row[2] * large for row in rows],
        "label_0": [row[3] for row in rows],
        "label_1": [1 - row[3] for row in rows],
    }
    pq.write_table(pa.table(columns), folder / name, row_group_size=4, compression="none", use_dictionary=False)
    return str(folder)


def listing(folder: Path, rows, name="metadata.jsonl") -> str:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (prompt, first, second, label) in enumerate(rows):
        for side, content in enumerate((first, second)):
            (folder / "images" / f"{number}-{side}.jpg").write_bytes(content)
        lines.append({"prompt": prompt, "image_0": f"images/{number}-0.jpg", "image_1": f"images/{number}-1.jpg"})
        lines[-1]["label"] = 1 - label
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def hpd(folder: Path, rows) -> str:
    listing(folder, rows)
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").unlink()
    lines = [
        {
            "prompt": r["prompt"],
            "file_path": [r["image_0"], r["image_1"]],
            "human_preference": [1 - r["label"], r["label"]],
        }
        for r in records
    ]
    (folder / "train.json").write_text(json.dumps(lines))
    return str(folder / "train.json")


def tar(folder: Path, rows) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as out:
        for number, (prompt, first, second, label) in enumerate(rows):
            about = json.dumps({"prompt": prompt, "label": 1 - label}).encode()
            for name, content in (("0.jpg", first), ("1.jpg", second), ("json", about)):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return str(folder)


MAKERS = {"parquet": parquet, "folder": listing, "hpd": hpd, "webdataset": tar}
BASE = [(f"a thing {i}", PICTURES[2 * i], PICTURES[2 * i + 1], 1.0) for i in range(6)]


def of(path: str, **settings):
    return identity_of(open_data(DataConfig(source=path, **settings)))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_elsewhere_is_the_same_source(tmp_path, kind):
    """As clusters copy data to a node's own disk: other folder, other times."""
    here = of(MAKERS[kind](tmp_path / "a", BASE))
    shutil.copytree(tmp_path / "a", tmp_path / "node" / "b")
    for path in (tmp_path / "node").rglob("*"):
        os.utime(path, (1, 1))
    there = of(str(tmp_path / "node" / "b" / ("train.json" if kind == "hpd" else "")))
    assert here == there and {"pairs", "rows", "pictures"} == here.keys() and here["pairs"] == 6


def flipped_byte(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


CHANGES = {
    "row appended": ([*BASE, ("more", PICTURES[12], PICTURES[13], 1.0)], PAIRS),
    "rows reordered": ([BASE[1], BASE[0], *BASE[2:]], ROWS),
    "relabelled": ([*BASE[:3], (*BASE[3][:3], 0.0), *BASE[4:]], ROWS),
    "how sure": ([*BASE[:3], (*BASE[3][:3], 0.75), *BASE[4:]], ROWS),
    "prompt": ([*BASE[:3], ("a thinG 3", *BASE[3][1:]), *BASE[4:]], ROWS),
    "picture of the same size": ([*BASE[:3], (BASE[3][0], PICTURES[15], *BASE[3][2:]), *BASE[4:]], PICTURED),
    "one bit of a picture": (
        [*BASE[:3], (BASE[3][0], flipped_byte(BASE[3][1], 1500), *BASE[3][2:]), *BASE[4:]],
        PICTURED,
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed_and_named(tmp_path, kind, change):
    rows, word = CHANGES[change]
    before, after = of(MAKERS[kind](tmp_path / "a", BASE)), of(MAKERS[kind](tmp_path / "b", rows))
    said = differences(before, after)
    assert any(one.startswith(word) for one in said), said
    if word == PICTURED:
        assert said == [PICTURED]  # and nothing else is blamed
    if word == PAIRS:
        assert said[0] == f"{PAIRS} (6 then, 7 now)"


def test_large_row_groups_are_sampled(tmp_path):
    """Pictures of 900 KB, row groups of 3.6 MB: a label inside, a picture of another size, one of the same size."""
    before = of(parquet(tmp_path / "a", BASE, large=300))
    changes = {
        ROWS: [*BASE[:3], (*BASE[3][:3], 0.0), *BASE[4:]],
        PICTURED: [*BASE[:1], (BASE[1][0], PICTURES[15], *BASE[1][2:]), *BASE[2:]],
    }
    for word, rows in changes.items():
        after = of(parquet(tmp_path / f"b{len(rows)}{word[:6]}", rows, large=300))
        assert differences(before, after) == [word]
    longer = [*BASE[:1], (BASE[1][0], BASE[1][1] + b"x", *BASE[1][2:]), *BASE[2:]]
    assert differences(before, of(parquet(tmp_path / "c", longer, large=300))) == [PICTURED]


def test_shards_added_and_replaced(tmp_path):
    parquet(tmp_path / "a", BASE)
    before = of(parquet(tmp_path / "a", BASE, "b.parquet"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    after = of(parquet(tmp_path / "b", BASE, "c.parquet"))
    assert differences(before, after) == [f"{PAIRS} (12 then, 18 now)", ROWS, PICTURED]
    after = of(parquet(tmp_path / "a", [*BASE[::-1]], "b.parquet"))
    assert differences(before, after) == [ROWS, PICTURED]


def test_listing_with_its_images_elsewhere(tmp_path):
    """The pictures count, wherever data.images says they are."""
    hpd(tmp_path / "a", BASE)
    shutil.move(tmp_path / "a" / "images", tmp_path / "one" / "images")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    path = str(tmp_path / "a" / "train.json")
    before = of(path, images=str(tmp_path / "one"))
    assert of(path, images=str(tmp_path / "two")) == before
    (tmp_path / "two" / "images" / "3-0.jpg").write_bytes(PICTURES[15])
    assert differences(before, of(path, images=str(tmp_path / "two"))) == [PICTURED]
    (tmp_path / "two" / "images" / "3-0.jpg").unlink()
    assert differences(before, of(path, images=str(tmp_path / "two"))) == [PICTURED]


def test_behind_a_url(tmp_path):
    """Rows by content; of pictures the sizes, and what the file system says of the file."""

    def remote(name, rows):
        fs = fsspec.filesystem("memory")
        fs.pipe(f"/{name}/a.parquet", (Path(parquet(tmp_path / name, rows)) / "a.parquet").read_bytes())
        return of(f"memory://{name}")

    before = remote("a", BASE)
    assert remote("b", BASE) == before
    assert differences(before, remote("c", CHANGES["relabelled"][0])) == [ROWS]
    assert differences(before, remote("d", CHANGES["row appended"][0]))[0].startswith(PAIRS)
    bigger = [*BASE[:3], (BASE[3][0], PICTURES[15] + b"x", *BASE[3][2:]), *BASE[4:]]
    assert differences(before, remote("e", bigger)) == [PICTURED]


def test_filters_and_a_block_list_that_changed(tmp_path):
    path = parquet(tmp_path / "a", BASE)
    (tmp_path / "words.txt").write_text("0\n")
    filters = FilterConfig(block_list=str(tmp_path / "words.txt"))
    before = of(path, filters=filters)
    (tmp_path / "words.txt").write_text("1\n")
    assert differences(before, of(path, filters=filters)) == [WORDS["filters"]]
