"""data.validate on real sources with planted faults: every count, the exit status, the contact sheet."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiny_world import pair_table

from inpo_fast.data import validate
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig
from inpo_fast.pocket.pairs import png, write_pairs


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
        validate.main()
    return left.value.code


def test_every_count(tmp_path):
    path, records = planted(tmp_path, broken=3, same=2)
    found, samples = validate.examine(open_source(path), path, DataConfig(), resolution=32, limit=None)
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
    assert len(samples) == validate.SAMPLES and found.pairs_per_second > 0
    size = sum(len(r["jpg_0"]) + len(r["jpg_1"]) for r in records[3:]) / good
    assert found.bytes_per_pair == pytest.approx(size)


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

    found, _ = validate.examine(Spy(), path, DataConfig(), resolution=32, limit=10)
    assert found.looked_at == 10 and found.pairs == len(records)
    assert len(set(seen)) == 10 and max(seen) > len(records) // 2
    first = sorted(seen)
    seen.clear()
    validate.examine(Spy(), path, DataConfig(), resolution=32, limit=10)
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
        assert picture.width == 2 * (2 * validate.TILE + 16) + 8
    assert bool(json.loads(listing.read_text())["problems"]) == (code == 1)


def test_the_better_image_stands_on_the_left(tmp_path):
    records = pair_table(8).to_pylist()[:1]
    red, blue = (png(np.full((32, 32, 3), c, np.uint8)) for c in ((255, 0, 0), (0, 0, 255)))
    records[0] |= {"jpg_0": blue, "jpg_1": red, "label_0": 0.0, "label_1": 1.0}
    write_pairs(pa.Table.from_pylist(records, schema=pair_table(8).schema), tmp_path / "pairs.parquet")
    _, samples = validate.examine(
        open_source(str(tmp_path / "pairs.parquet")), "x", DataConfig(), resolution=32, limit=None
    )
    sheet = np.asarray(Image.open(io.BytesIO(validate.contact_sheet(samples, 10**6))))
    assert sheet[8 + 96, 8 + 96].tolist() == [255, 0, 0] and sheet[8 + 96, 8 + 192 + 4 + 96].tolist() == [0, 0, 255]
