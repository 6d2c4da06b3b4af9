"""Filters against a plain reading of the rules, on each kind of source; counts, weights, and what is refused."""

import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from inpo_fast.config import parse
from inpo_fast.data import filters
from inpo_fast.data.filters import FilterConfig, filtered
from inpo_fast.data.order import make_order
from inpo_fast.data.sources import open_source
from inpo_fast.runtime.errors import UserError

PROMPTS = [
    "a red cube", "Anime girl", "an animel", "two  red\tcubes", "RED CUBE, sharp", "", "a naked tree",
    "x anime red cube", "xanime", "a # sharp tree, red",
]  # fmt: skip
ROWS = [
    {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "label": i % 2,
        "quality": None if i % 7 == 4 else i / 10,  # row 16 is exactly on the threshold
        "model_0": "sdxl" if i % 3 else "sd15",
        "model_1": "sdxl" if i % 5 else "sd21",
        "weight": 2.0 if i % 4 == 1 else 1.0,
    }
    for i in range(40)
]


def make(kind: str, folder):
    if kind == "parquet":
        columns = {name: [row[name] for row in ROWS] for name in ("quality", "model_0", "model_1", "weight")}
        columns |= {"caption": [row["prompt"] for row in ROWS], "label_1": [float(row["label"]) for row in ROWS]}
        columns["label_0"] = [1 - x for x in columns["label_1"]]
        for side in (0, 1):
            columns[f"jpg_{side}"] = pa.array([f"{i}.{side}".encode() for i in range(len(ROWS))])
        pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=6)
        return open_source(str(folder / "a.parquet"))
    if kind == "folder":
        for i in range(len(ROWS)):
            for side in (0, 1):
                (folder / f"{i}.{side}").write_bytes(f"{i}.{side}".encode())
        lines = [json.dumps(row | {"image_0": f"{i}.0", "image_1": f"{i}.1"}) for i, row in enumerate(ROWS)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        return open_source(str(folder))
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, row in enumerate(ROWS):
            members = {"0.png": f"{i}.0".encode(), "1.png": f"{i}.1".encode(), "json": json.dumps(row).encode()}
            for name, content in members.items():
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return open_source(str(folder / "a.tar"))


def pairs_of(source) -> dict[int, float]:
    """Number of the row -> weight, each read once."""
    read = [source.read(i) for i in range(len(source))]
    return {int(pair.winner.split(b".")[0]): pair.weight for pair in read}


@pytest.mark.parametrize("kind", ["parquet", "folder", "webdataset"])
def test_rules(tmp_path, kind):
    source = make(kind, tmp_path)
    words = tmp_path / "words.txt"
    words.write_text("# sharp\nred cube\n\n  r.d\n")
    config = FilterConfig(
        block_words=("anime",), block_list=str(words), score="quality", min_score=1.6, models=("sdxl", "sd21"),
        weights={"naked": 0.5, "tree": 0.5, "red": 3.0},
    )  # fmt: skip
    kept = filtered(source, config)
    want, why = {}, {}
    for i, row in enumerate(ROWS):
        said = row["prompt"].lower().replace(",", " ").split()
        if "anime" in said or any(pair == ("red", "cube") for pair in pairwise(said)):
            reason = "blocked words"
        elif row["quality"] is None:
            reason = "without quality"
        elif row["quality"] < 1.6:
            reason = "quality below 1.6"
        elif row["model_0"] == "sd15":
            reason = "other models"
        else:
            halves = ("naked" in said) + ("tree" in said)
            want[i] = row["weight"] * 0.5**halves * (3.0 if "red" in said else 1.0)
            continue
        why[reason] = why.get(reason, 0) + 1
    assert pairs_of(kept) == want and kept.left_out == why and set(why) == {
        "blocked words", "without quality", "quality below 1.6", "other models"
    }  # fmt: skip
    assert kept.reweighted == sum(w != ROWS[i]["weight"] for i, w in want.items()) > 0 and kept.ties == source.ties
    assert [record["prompt"] for record in kept.facts(())] == [ROWS[i]["prompt"] for i in want]
    assert all(kept.read(i).id == source.read(int(kept.kept[i])).id for i in range(len(kept)))


def test_blocks_are_mapped(tmp_path):
    """The order by blocks visits each kept pair once, and a block's pairs still lie in its row group."""
    source = make("parquet", tmp_path)
    kept = filtered(source, FilterConfig(block_words=("anime", "cube", "cubes", "animel")))
    assert kept.blocks[-1] == len(kept) and (np.diff(kept.blocks) >= 0).all() and len(kept.blocks) == len(source.blocks)
    for block, end in enumerate(kept.blocks):
        for i in range(kept.blocks[block - 1] if block else 0, end):
            assert np.searchsorted(source.blocks, kept.kept[i], "right") == block
    order = make_order(kept, "blocks", 1)
    assert sorted(order.index(i) for i in range(len(kept))) == list(range(len(kept)))
    assert 0 < kept.bytes < source.bytes


def test_nothing_named_nothing_done(tmp_path):
    source = make("folder", tmp_path)
    assert filtered(source, FilterConfig()) is source


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            FilterConfig(block_words=("a", "an", "anime", "two", "red", "x"), models=("none",)),
            r"leave none of 40 pairs \(",
        ),
        (FilterConfig(score="aesthetic", min_score=1), "no column aesthetic"),
        (FilterConfig(block_list="no/such/file"), r"block_list: no/such/file cannot be read"),
        (FilterConfig(weights={"red": -1.0}), "'red' has factor -1"),
        (FilterConfig(weights={"red": float("inf")}), "'red' has factor inf"),
        (FilterConfig(weights={"red": float("nan")}), "'red' has factor nan"),
    ],
)
def test_refusals(tmp_path, config, said):
    with pytest.raises(UserError, match=said):
        filtered(make("parquet", tmp_path), config)


def test_command_line_and_manifest(tmp_path):
    config = parse(
        "train", ["--data.filters.block_words=[anime, red cube]", '--data.filters.weights={"naked": 0.5}', "--output=x"]
    )
    assert config.data.filters.block_words == ("anime", "red cube") and config.data.filters.weights == {"naked": 0.5}


SIZES = [(64, 48), (48, 64), (47, 90), (48, 48), (200, 20), (49, 300)]  # (width, height) of image 0; image 1 is 64 x 64


def sized(kind: str, folder) -> None:
    """One pair a size, the small image on either side; then one whose image is cut off in its header, one cut later."""
    images = []
    for number, size in enumerate(SIZES):
        pair = [encode(Image.new("RGB", size)), encode(Image.new("RGB", (64, 64)))]
        images.append(pair[:: 1 - 2 * (number % 2)])
    images += [[encode(Image.new("RGB", (10, 10)))[:8], images[0][1]], [encode(noise(90, 80))[:400], images[0][1]]]
    if kind == "parquet":
        columns = {f"jpg_{side}": pa.array([pair[side] for pair in images]) for side in (0, 1)}
        columns |= {"caption": ["a"] * len(images), "label_0": [1.0] * len(images), "label_1": [0.0] * len(images)}
        pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=3)
        return
    if kind == "webdataset":
        with tarfile.open(folder / "a.tar", "w") as tar:
            for i, (first, second) in enumerate(images):
                about = json.dumps({"prompt": "a", "label": 0}).encode()
                for name, content in (("0.png", first), ("1.png", second), ("json", about)):
                    info = tarfile.TarInfo(f"{i}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return
    for i, pair in enumerate(images):
        for side, content in enumerate(pair):
            (folder / f"{i}.{side}.png").write_bytes(content)
    (folder / "8.0.png").write_bytes(b"")
    lines = [json.dumps({"prompt": "a", "chosen": f"{i}.0.png", "rejected": f"{i}.1.png"}) for i in range(len(images))]
    lines.append(json.dumps({"prompt": "a", "chosen": "../out.png", "rejected": "missing.png"}))
    if kind == "hpd":
        lines = [line.replace("chosen", "path1").replace("rejected", "path2") for line in lines]
    (folder / ("metadata.jsonl" if kind == "folder" else "train.jsonl")).write_text("\n".join(lines))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "folder", "hpd", "webdataset"])
def test_small_images_go_by_their_headers(tmp_path, monkeypatch, kind):
    """Either side of either image counts, equal is enough; a broken pair stays, to be counted as one; no decoding."""
    sized(kind, tmp_path)
    source = open_source(str(tmp_path / "train.jsonl" if kind == "hpd" else tmp_path))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    if kind in ("folder", "hpd"):  # nor is a file read whole
        monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"{path} read whole"))
    kept = filtered(source, FilterConfig(min_side=48))
    want = [i for i, size in enumerate(SIZES) if min(size) >= 48]
    assert kept.kept.tolist() == want + list(range(len(SIZES), len(source)))
    assert kept.left_out == {"image side below 48": 2} and len(source) == len(SIZES) + 2 + (kind in ("folder", "hpd"))


def test_only_what_passes_the_other_filters_is_looked_at(tmp_path, monkeypatch):
    """A pair counts under the first reason; no size asked, no header read."""
    source, looked = make("folder", tmp_path), []
    monkeypatch.setattr(filters, "short_side", lambda path: looked.append(path.name) or 5)
    filtered(source, FilterConfig(block_words=("anime",)))
    assert not looked
    with pytest.raises(UserError, match=r"leave none of 40 pairs \(8 blocked words, 32 image side below 6\)"):
        filtered(source, FilterConfig(block_words=("anime",), min_side=6))
    assert len(looked) == 2 * 32
    assert not filtered(source, FilterConfig(min_side=5)).left_out
