"""Filters against a plain reading of the rules, on each kind of source; counts, weights, and what is refused."""

import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inpo_fast.config import parse
from inpo_fast.data.filters import FilterConfig, filtered
from inpo_fast.data.order import make_order
from inpo_fast.data.sources import open_source
from inpo_fast.refusal import Refusal

PROMPTS = [
    "a red cube", "Anime girl", "an animel", "two  red\tcubes", "RED CUBE, sharp", "", "a naked tree",
    "x anime red cube",
]  # fmt: skip
ROWS = [
    {
        "prompt": PROMPTS[i % len(PROMPTS)],
        "label": i % 2,
        "quality": None if i % 7 == 3 else i / 10,
        "model_0": "sdxl" if i % 3 else "sd15",
        "model_1": "sdxl" if i % 5 else "sd21",
    }
    for i in range(40)
]


def make(kind: str, folder):
    if kind == "parquet":
        columns = {name: [row[name] for row in ROWS] for name in ("quality", "model_0", "model_1")}
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
    words.write_text("# not these\nred cube\n\n")
    config = FilterConfig(
        block_words=("anime",), block_list=str(words), score="quality", min_score=1.0, models=("sdxl", "sd21"),
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
        elif row["quality"] < 1:
            reason = "quality below 1"
        elif row["model_0"] == "sd15":
            reason = "other models"
        else:
            want[i] = (0.25 if "naked" in said else 1.0) * (3.0 if "red" in said else 1.0)
            continue
        why[reason] = why.get(reason, 0) + 1
    assert pairs_of(kept) == want and kept.left_out == why and set(why) == {
        "blocked words", "without quality", "quality below 1", "other models"
    }  # fmt: skip
    assert kept.reweighted == sum(w != 1 for w in want.values()) > 0 and kept.ties == source.ties
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
    ],
)
def test_refusals(tmp_path, config, said):
    with pytest.raises(Refusal, match=said):
        filtered(make("parquet", tmp_path), config)


def test_command_line_and_manifest(tmp_path):
    config = parse(
        "train", ["--data.filters.block_words=[anime, red cube]", '--data.filters.weights={"naked": 0.5}', "--output=x"]
    )
    assert config.data.filters.block_words == ("anime", "red cube") and config.data.filters.weights == {"naked": 0.5}
