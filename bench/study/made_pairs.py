"""Preference pairs that a study needs beside the shipped ones, made from them and from the pocket world's renderer.

    above.parquet      rendered, the winner perfect: better than anything the base draws
    below.parquet      rendered, both sides stained, off centre and pale, the rule judge's favourite wins: worse than it
    better.parquet     drawn by another model: the base after a short SFT on above.parquet
    worse.parquet      drawn by another model: the base after a short SFT on below.parquet
    sure.parquet       better.parquet without the noise of its labels: whichever the rule judge scores higher wins
    bright.parquet     the shipped pairs with a planted bias: in SHARE of them the brighter picture wins, come what may;
                       `alike`, 1 - |difference of the two pictures' brightness|, in 0..1, is there for a filter
    balanced.parquet   the same with a `weight`: pairs that the brighter picture won and those that the darker one won
                       weigh the same in sum

They are functions of nothing but this file, the trainer and the shipped pairs, in build/study (not kept in git).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from bench.study.cells import Cell, Study, config_of
from inpo_fast.data.images import decode
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.judges.pocket_rules import RuleJudge
from inpo_fast.judges.pocket_scenes import Scene
from inpo_fast.models.loading import load_pipeline, quiet_libraries
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.pairs import draw_pairs, png, write_pairs
from inpo_fast.pocket.scenes import Finish, random_finish, render, split_scenes
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.files import whole

FOLDER, ROWS, SHARE = Path("build") / "study", 1281, 0.3
DRAWN, SEED = 1440, 0  # rows and seed of the shipped pairs: the same prompts, noise and label noise
OTHER = {"method": "sft", "optim.lr": "2e-4", "train.steps": "40"}  # how another model is made of the base


def worse_finish(rng: np.random.Generator) -> Finish:
    """Beyond random_finish, the data that the base learned from."""
    return Finish(
        dx=rng.uniform(-6, 6),
        dy=rng.uniform(-6, 6),
        saturation=rng.uniform(0.15, 0.6),
        edge=rng.uniform(2.0, 4.0),
        stain=rng.uniform(0.05, 0.2),
    )


def rendered(pictures_of: Callable[[Scene, np.random.Generator], tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    """ROWS pairs over the seen scenes; the better one of two by the rule judge wins, equal ones are left out."""
    rng, judge, scenes, rows = np.random.default_rng(0), RuleJudge(), split_scenes()[0], []
    while len(rows) < ROWS:
        scene = scenes[int(rng.integers(len(scenes)))]
        pictures = pictures_of(scene, rng)
        first, second = judge.score(list(pictures), [scene.caption] * 2).total
        if abs(first - second) < judge.tie:
            continue
        label = float(first > second)
        row = {field.name: None for field in PICKAPIC_SCHEMA} | {"caption": scene.caption}
        row |= {"jpg_0": png(pictures[0]), "jpg_1": png(pictures[1]), "label_0": label, "label_1": 1 - label}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA)


def above() -> pa.Table:
    return rendered(lambda scene, rng: (render(scene, Finish(), rng), render(scene, random_finish(rng), rng)))


def below() -> pa.Table:
    return rendered(lambda scene, rng: tuple(render(scene, worse_finish(rng), rng) for _ in range(2)))


def better() -> pa.Table:
    return drawn_by_other("better", "above")


def worse() -> pa.Table:
    return drawn_by_other("worse", "below")


def sure() -> pa.Table:
    source = FOLDER / "better.parquet"
    make({str(source)})
    rows, judge = pq.read_table(source).to_pylist(), RuleJudge()
    captions = [row["caption"] for row in rows]
    first, second = (judge.score([pixels(row[key]) for row in rows], captions).total for key in ("jpg_0", "jpg_1"))
    for row, better in zip(rows, first > second, strict=True):
        if row["label_0"] != 0.5:
            row |= {"label_0": float(better), "label_1": float(not better)}
            row["best_image_uid"] = row["image_0_uid" if better else "image_1_uid"]
    return pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA)


def drawn_by_other(name: str, winners: str) -> pa.Table:
    """DRAWN rows as the shipped ones, with the same prompts and noise, drawn by the base fine-tuned (OTHER) on the
    winners of the other made pairs.

    Sampler, judge and label noise are draw_pairs' own; the closest rows are ties. Mean score of the first 96 pictures
    by the rule judge: better 0.942, base 0.863, worse 0.680 (looks 0.884, 0.725, 0.400).
    """
    from bench.study import train  # the trainer's imports, only where something is trained

    source = FOLDER / f"{winners}.parquet"
    make({str(source)})
    quiet_libraries()
    torch.set_num_threads(1)  # as in the studies' processes: the number of threads is in the rounding
    settings = OTHER | {"data.source": str(source)}
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        config = config_of(Study(name, ()), Cell(name, tuple(settings.items())), SEED, f"{folder}/run")
        unet = train.trained(config, Console()).unet
    pipeline = load_pipeline(config.models.base)
    pipeline.unet = unet
    table = draw_pairs(pipeline, split_scenes()[0], DRAWN, SEED)
    for column in ("model_0", "model_1"):
        place = table.schema.get_field_index(column)
        table = table.set_column(place, table.schema.field(place), pa.array([f"pocket-{name}"] * DRAWN))
    return table


def bright() -> pa.Table:
    rows = pq.read_table(ASSETS / "pairs.parquet").to_pylist()
    for i, row in enumerate(rows):
        first, second = (brightness(row[key]) for key in ("jpg_0", "jpg_1"))
        row["alike"] = 1 - abs(first - second) / 255
        if keyed_rng.uniform("bias", i) < SHARE:
            row |= {"label_0": float(first > second), "label_1": float(first <= second)}
    return pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA.append(pa.field("alike", pa.float64())))


def balanced() -> pa.Table:
    """Half of the pairs' weight for either group, and a mean weight of 1 over them: the gradient's size stays. Ties,
    which nobody trains on, and pairs of equal brightness have 1."""
    table = bright()
    lead = np.array([np.sign(brightness(row["jpg_0"]) - brightness(row["jpg_1"])) for row in table.to_pylist()])
    group = lead * np.sign(table["label_0"].to_numpy() - 0.5)  # 1: the brighter one won, -1: the darker one
    weight = np.ones(len(group))
    for sign in (-1, 1):
        weight[group == sign] = (group != 0).sum() / 2 / (group == sign).sum()
    return table.append_column("weight", pa.array(weight))


def pixels(encoded: bytes) -> np.ndarray:
    """A picture file's RGB values, (H, W, 3) uint8."""
    return np.asarray(decode(encoded, 10**8))


def brightness(encoded: bytes) -> float:
    """Mean of a picture file's RGB values, in 0..255."""
    return float(pixels(encoded).mean(dtype=np.float64))


ABOVE = FOLDER / "above.parquet"
MADE = {FOLDER / f"{table.__name__}.parquet": table for table in (above, below, better, worse, sure, bright, balanced)}


def make(sources: set[str]) -> None:
    """Those of the sources that are made here, where they are not there yet."""
    for path, table in MADE.items():
        if str(path) in sources and not path.exists():
            print(f"{path} is made", flush=True)  # one that another model draws takes minutes
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as aside:
                write_pairs(table(), aside)
