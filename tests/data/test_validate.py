"""inpo_fast.validate on real sources with planted faults: every count, the exit status, the contact sheet."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiny_world import pair_table

from inpo_fast import validate as validate_command
from inpo_fast.data import examine
from inpo_fast.data.contact_sheet import TILE, contact_sheet
from inpo_fast.data.filters import FilterConfig, filtered
from inpo_fast.data.loader import DataConfig
from inpo_fast.data.sources import open_source
from inpo_fast.pocket.pairs import png, write_pairs
from inpo_fast.runtime.errors import UserError


def planted(folder, rows: int = 40, broken: int = 0, same: int = 0):
    """Pairs of the tiny world; the first `broken` have half an image, the next `same` one image twice."""
    records = [r for r in pair_table(rows).to_pylist() if r["label_0"] != 0.5]
    for number, record in enumerate(records[:broken]):
        side = f"jpg_{number % 2}"
        record[side] = record[side][: len(record[side]) // 2]
    for record in records[broken : broken + same]:
        record["jpg_1"] = record["jpg_0"]
    records[-1] |= {"caption": "  "}
    records[-2] |= {"caption": records[-3]["caption"], "jpg_0": png(np.zeros((48, 20, 3), np.uint8))}
    write_pairs(pa.Table.from_pylist(records, schema=pair_table(rows).schema), folder / "pairs.parquet")
    return str(folder / "pairs.parquet"), records


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["validate", *words])
    with pytest.raises(SystemExit) as left:
        validate_command.main()
    return left.value.code


def test_every_count(tmp_path):
    path, records = planted(tmp_path, broken=3, same=2)
    found, samples = examine.examine(open_source(path), path, DataConfig(), resolution=32, limit=None)
    good = len(records) - 3
    assert (found.pairs, found.looked_at, len(found.broken), found.same_image) == (len(records), len(records), 3, 2)
    assert found.prompts == len({r["caption"] for r in records[3:]}) and found.empty_prompts == 1
    assert found.most_used_prompt == (records[-3]["caption"], 2)
    assert found.sizes == {"32 x 32": 2 * good - 1, "20 x 48": 1} and found.smaller_than == 1
    assert found.labels == {"1.0": good} and found.weight == 1
    seen, again = set(), 0
    for r in records[3:]:
        images = {r["jpg_0"], r["jpg_1"]}
        again += len(images & seen)
        seen |= images
    assert found.repeated_images == again
    assert all("pairs.parquet" in what for what in found.broken)
    assert len(samples) == examine.SAMPLES and found.pairs_per_second > 0
    size = sum(len(r["jpg_0"]) + len(r["jpg_1"]) for r in records[3:]) / good
    assert found.bytes_per_pair == pytest.approx(size)


def stored(records: list[dict], path) -> str:
    write_pairs(pa.Table.from_pylist(records, schema=pair_table(8).schema), path)
    return str(path)


def test_images_that_occur_again(tmp_path):
    """An image counts once a pair, on either side, from the second pair on that has it."""
    first, second, third, fourth = pair_table(8).to_pylist()[:4]
    second |= {"jpg_0": first["jpg_1"], "jpg_1": first["jpg_1"]}  # twice in one pair, once again
    third |= {"jpg_1": first["jpg_0"]}
    found, _ = examine.examine(
        open_source(stored([first, second, third, fourth], tmp_path / "a.parquet")), "x", DataConfig(), resolution=32,
        limit=None,
    )  # fmt: skip
    assert found.repeated_images == 2 and found.same_image == 1


def test_soft_labels_weights_and_large_images(tmp_path):
    """How sure: down to the tenth below. A mean weight; weight 0 alone is unfit; the trainer's own limit of pixels."""
    (tmp_path / "a.png").write_bytes(png(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "b.png").write_bytes(png(np.full((9, 9, 3), 255, np.uint8)))
    rows = [
        {"prompt": str(i), "chosen": "a.png", "rejected": "b.png", "confidence": sure, "weight": weight}
        for i, (sure, weight) in enumerate([(0.58, 0.5), (0.99, 2.0), (1.0, 0.0), (0.7, 1.0)])
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path))

    def examined(source, **options):
        return examine.examine(source, "x", DataConfig(**options), resolution=8, limit=9)[0]

    found = examined(source)
    assert found.labels == {"0.5": 1, "0.7": 1, "0.9": 1, "1.0": 1} and found.weight == 3.5 / 4
    assert found.looked_at == 4  # a limit beyond the source is the source, not its second epoch
    assert len(examined(source, max_pixels=80).broken) == 4 and not examined(source, max_pixels=81).broken
    nothing = examined(filtered(source, FilterConfig(weights={str(i): 0.0 for i in range(4)})))
    assert nothing.weight == 0 and nothing.problems == ["every pair has weight 0"] and nothing.weighted == 4


@pytest.mark.parametrize(("same", "fit"), [(1, True), (2, False)])
def test_one_in_a_hundred_may_show_an_image_twice(same, fit):
    found = examine.Findings("x", 100, 0, looked_at=100, same_image=same, weight=1.0)
    assert bool(examine.problems(found, DataConfig())) != fit


def test_nothing_usable_is_not_fit(tmp_path, monkeypatch, capsys):
    """One pair, and it is broken: a single one is never above data.bad_pair_limit."""
    lines = [{"prompt": "p", "chosen": "A.png", "rejected": "B.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(monkeypatch, "--source", str(tmp_path)) == 1
    assert "NOT FIT: none of the 1 pairs" in capsys.readouterr().out


def test_few_pairs_are_held_at_a_time():
    """However many there are: what was read and not yet looked at is bounded."""
    done = []
    with ThreadPoolExecutor(2) as pool:
        for number, _ in enumerate(examine._bounded(pool, done.append, range(500))):
            assert len(done) <= number + examine.AHEAD
    assert sorted(done) == list(range(500))


def test_filters_and_the_trainers_keys(tmp_path, monkeypatch, capsys):
    """What each filter left out is said and counted, and what remains is judged; source and format from either."""
    path, records = planted(tmp_path, broken=3)
    (tmp_path / "recipe.yaml").write_text(
        "data: {resolution: 33, filters: {min_side: 21}}\ntrain: {pairs_per_step: 7}\n"
    )
    word = records[5]["caption"]
    blocked = sum(word in r["caption"] for r in records)
    listing = tmp_path / "found.json"
    words = ["--config", str(tmp_path / "recipe.yaml"), "--json", str(listing)]
    words += [f"--data.source={path}", f"--data.filters.block_words=['{word}']"]
    code = run(monkeypatch, *words)
    said, found = " ".join(capsys.readouterr().out.split()), json.loads(listing.read_text())
    assert found["left_out"] == {"blocked words": blocked, "image side below 21": 1}
    assert f"left out: blocked words {blocked}" in said and "left out: image side below 21 1" in said
    assert found["pairs"] == len(records) - blocked - 1 == found["looked_at"] and "20 x 48" not in found["sizes"]
    assert found["smaller_than"] == 2 * (found["pairs"] - len(found["broken"]))  # data.resolution of the recipe
    assert code == (len(found["broken"]) > 1) and "steps of 7;" in said
    for bad, line in ((["--source", path, "--data.no=1"], "unknown key 'data.no'"), ([], "no source: give --source")):
        monkeypatch.setattr(sys, "argv", ["validate", *bad])
        with pytest.raises(UserError, match=line):
            validate_command.main()


def test_images_elsewhere_and_a_format_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
    (tmp_path / "images" / "b.png").write_bytes(png(np.ones((32, 32, 3), np.uint8)))
    listing = tmp_path / "pairs.txt"
    listing.write_text(json.dumps({"prompt": "a", "path1": "a.png", "path2": "b.png"}))
    words = ["--source", str(listing), "--format=hpd", "--images", str(tmp_path / "images"), "--workers=1"]
    assert run(monkeypatch, *words) == 0


def test_a_part_of_it(tmp_path):
    """Spread over the source, each pair at most once, the same ones again."""
    path, records = planted(tmp_path)
    seen = []

    class Spy:
        ties = 0
        source = open_source(path)

        def __len__(self):
            return len(self.source)

        def read(self, index):
            seen.append(index)
            return self.source.read(index)

    found, _ = examine.examine(Spy(), path, DataConfig(), resolution=32, limit=10)
    assert found.looked_at == 10 and found.pairs == len(records)
    assert len(set(seen)) == 10 and max(seen) > len(records) // 2
    first = sorted(seen)
    seen.clear()
    examine.examine(Spy(), path, DataConfig(), resolution=32, limit=10)
    assert sorted(seen) == first


@pytest.mark.parametrize(
    ("faults", "code", "said"),
    [({}, 0, "fit to train on"), ({"broken": 1}, 0, "broken: "), ({"broken": 3}, 1, "3 of 35 pairs are broken"),
     ({"same": 4}, 1, "4 pairs show the same image twice")],
)  # fmt: skip
def test_exit_status(tmp_path, monkeypatch, capsys, faults, code, said):
    path, _ = planted(tmp_path, **faults)
    sheet, listing = tmp_path / "out" / "sheet.png", tmp_path / "found.json"
    assert run(monkeypatch, "--source", path, "--resolution=32", "--sheet", str(sheet), "--json", str(listing)) == code
    assert said in capsys.readouterr().out
    with Image.open(sheet) as picture:
        picture.load()
        assert picture.width == 2 * (2 * TILE + 16) + 8
    assert bool(json.loads(listing.read_text())["problems"]) == (code == 1)


def test_the_better_image_stands_on_the_left(tmp_path):
    records = pair_table(8).to_pylist()[:1]
    red, blue = (png(np.full((32, 32, 3), c, np.uint8)) for c in ((255, 0, 0), (0, 0, 255)))
    records[0] |= {"jpg_0": blue, "jpg_1": red, "label_0": 0.0, "label_1": 1.0}
    source = open_source(stored(records, tmp_path / "pairs.parquet"))
    _, samples = examine.examine(source, "x", DataConfig(), resolution=32, limit=None)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(samples, 10**6))))
    assert sheet[8 + 96, 8 + 96].tolist() == [255, 0, 0] and sheet[8 + 96, 8 + 192 + 4 + 96].tolist() == [0, 0, 255]
