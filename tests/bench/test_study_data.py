"""bench.study.made_pairs: the pairs that studies make, by quality, by model and with a planted bias."""

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bench.study import made_pairs, train
from bench.study.cells import config_of
from bench.study.presets import PRESETS
from inpo_fast.data.loader import open_data
from inpo_fast.judges.pocket_rules import RuleJudge
from inpo_fast.models.loading import load_unet
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.pairs import write_pairs


def test_made_pairs_have_the_quality_and_the_bias_they_are_named_after(tmp_path, monkeypatch):
    """Read as the trainer reads them: scores of the winners by the rule judge, and how often the brighter one wins."""
    monkeypatch.setattr(made_pairs, "ROWS", 24)
    judge, mean = RuleJudge(), {}
    for table in (made_pairs.above, made_pairs.below):
        rows = table().to_pylist()
        winners = [Image.open(io.BytesIO(row["jpg_0" if row["label_0"] else "jpg_1"])) for row in rows]
        scores = judge.score([np.asarray(winner) for winner in winners], [row["caption"] for row in rows])
        mean[table.__name__] = scores.parts["looks"].mean()
    shipped = pq.read_table(ASSETS / "pairs.parquet").to_pylist()
    drawn = [np.asarray(Image.open(io.BytesIO(row["jpg_0"]))) for row in shipped[:24]]
    base = judge.score(drawn, [row["caption"] for row in shipped[:24]]).parts["looks"].mean()
    assert mean["below"] < base - 0.1 < base + 0.1 < mean["above"], (mean, base)

    def brighter_wins(rows):
        sided = [row for row in rows if row["label_0"] != 0.5]
        value = made_pairs.brightness
        return np.mean([(value(row["jpg_0"]) > value(row["jpg_1"])) == (row["label_0"] == 1) for row in sided])

    before, after = brighter_wins(shipped), brighter_wins(made_pairs.bright().to_pylist())
    assert after == pytest.approx(before + 0.3 * (1 - before), abs=0.05)  # winners are darker by themselves
    monkeypatch.setattr(made_pairs, "MADE", {tmp_path / "x" / "one.parquet": made_pairs.above})
    made_pairs.make({str(tmp_path / "x" / "one.parquet"), "elsewhere.parquet"})
    assert pq.read_table(tmp_path / "x" / "one.parquet").num_rows == 24 and len(list(tmp_path.iterdir())) == 1


def test_pairs_by_another_model_are_the_shipped_ones_but_for_the_model(tmp_path, monkeypatch):
    """Base in the other model's place: the shipped pictures come back. A model that sees no noise: others do. What it
    is trained on are the rendered winners."""
    base = train.pipeline_of_base().unet
    blind = load_unet("blind", str(ASSETS / "model"), base)
    torch.nn.init.zeros_(blind.conv_out.weight)
    shipped = pq.read_table(ASSETS / "pairs.parquet").to_pylist()
    assert len(shipped) == made_pairs.DRAWN
    asked = []
    monkeypatch.setattr(made_pairs, "FOLDER", tmp_path)
    monkeypatch.setattr(made_pairs, "ROWS", 2)
    monkeypatch.setattr(made_pairs, "DRAWN", 2)
    made = {tmp_path / f"{table.__name__}.parquet": table for table in (made_pairs.above, made_pairs.below)}
    monkeypatch.setattr(made_pairs, "MADE", made)

    def pixels(row):
        return np.stack([np.asarray(Image.open(io.BytesIO(row[key])), dtype=float) for key in ("jpg_0", "jpg_1")])

    for unet, table, source in ((base, made_pairs.better, "above"), (blind, made_pairs.worse, "below")):
        monkeypatch.setattr(
            train,
            "trained",
            lambda config, console, unet=unet: asked.append(config) or train.Trained(unet, "", [], 0.0, 0.0),
        )
        rows, name = table().to_pylist(), table.__name__
        assert asked[-1].method == "sft" and asked[-1].data.source == str(tmp_path / f"{source}.parquet")
        assert asked[-1].seed == 0 and pq.read_table(tmp_path / f"{source}.parquet").num_rows == 2
        assert [(row["model_0"], row["model_1"]) for row in rows] == [(f"pocket-{name}",) * 2] * 2
        assert [row["caption"] for row in rows] == [row["caption"] for row in shipped[:2]]
        apart = [np.abs(pixels(row) - pixels(old)).mean() for row, old in zip(rows, shipped, strict=False)]
        assert max(apart) < 1 if unet is base else min(apart) > 10, (name, apart)


def test_what_filter_and_weights_leave_of_the_bias(tmp_path):
    """Read as the trainer reads them. The filter keeps the half of the pairs that are alike in brightness; the weights
    give what the brighter and what the darker picture won the same sum, and a mean of 1."""
    cells = {cell.name: cell for cell in PRESETS["bias"].cells}

    def opened(name, table):
        data = config_of(PRESETS["bias"], cells[name], 0).data
        assert data.source == str(made_pairs.FOLDER / f"{table.__name__}.parquet")
        write_pairs(table(), tmp_path / f"{table.__name__}.parquet")
        source = open_data(replace(data, source=str(tmp_path / f"{table.__name__}.parquet")))
        return [source.read(i) for i in range(len(source))]

    brightness = cache(made_pairs.brightness)

    def lead(pair):
        return brightness(pair.winner) - brightness(pair.loser)

    biased, kept = (opened(f"planted bias{how}", made_pairs.bright) for how in ("", ", filtered"))
    leads = sorted(abs(lead(pair)) for pair in biased)
    assert len(kept) == pytest.approx(len(biased) / 2, rel=0.05)
    assert max(abs(lead(pair)) for pair in kept) == pytest.approx(leads[len(kept) - 1])
    weighted = opened("planted bias, weighted", made_pairs.balanced)
    assert [(p.winner, p.weight) for p in weighted] != [(p.winner, p.weight) for p in biased]
    assert [p.winner for p in weighted] == [p.winner for p in biased]
    sums = [sum(pair.weight for pair in weighted if (lead(pair) > 0) == side) for side in (True, False)]
    assert sums == pytest.approx([len(weighted) / 2] * 2) and len({pair.weight for pair in weighted}) == 2


def test_sure_labels_are_the_rule_judges_own(tmp_path, monkeypatch):
    """Of pairs drawn by the base, in the better model's place: pictures and ties stay, labels that noise turned go."""
    shipped = pq.read_table(ASSETS / "pairs.parquet").slice(0, 96)
    monkeypatch.setattr(made_pairs, "FOLDER", tmp_path)
    pq.write_table(shipped, tmp_path / "better.parquet")
    before, after, turned = shipped.to_pylist(), made_pairs.sure().to_pylist(), 0
    for old, new in zip(before, after, strict=True):
        captions = [old["caption"]] * 2
        scores = RuleJudge().score([made_pairs.pixels(old[key]) for key in ("jpg_0", "jpg_1")], captions).total
        wanted = 0.5 if old["label_0"] == 0.5 else float(scores[0] > scores[1])
        assert (new["label_0"], new["label_1"]) == (wanted, 1 - wanted)
        if wanted != 0.5:
            assert new["best_image_uid"] == new["image_0_uid" if wanted else "image_1_uid"]
        turned += new["label_0"] != old["label_0"]
        labels = ("label_0", "label_1", "best_image_uid")
        assert {k: v for k, v in new.items() if k not in labels} == {k: v for k, v in old.items() if k not in labels}
    assert turned > 3
