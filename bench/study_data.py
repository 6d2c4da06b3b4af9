"""Preference pairs that a study needs beside the shipped ones, made from them and from the pocket world's renderer.

    above.parquet    rendered, the winner perfect: better than anything the base draws
    below.parquet    rendered, both sides stained, off centre and pale, the rule judge's favourite wins: worse than it
    bright.parquet   the shipped pairs with a planted bias: in SHARE of them the brighter picture wins, come what may

They are functions of nothing but this file and the shipped pairs, in build/study (not kept in git).
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from inpo_fast import draws
from inpo_fast.files import whole
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.judge import RuleJudge
from inpo_fast.pocket.pairs import SCHEMA, png, write_pairs
from inpo_fast.pocket.scenes import Finish, Scene, random_finish, render, split_scenes

FOLDER, ROWS, SHARE = Path("build") / "study", 1281, 0.3


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
        row = {field.name: None for field in SCHEMA} | {"caption": scene.caption}
        row |= {"jpg_0": png(pictures[0]), "jpg_1": png(pictures[1]), "label_0": label, "label_1": 1 - label}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def above() -> pa.Table:
    return rendered(lambda scene, rng: (render(scene, Finish(), rng), render(scene, random_finish(rng), rng)))


def below() -> pa.Table:
    return rendered(lambda scene, rng: tuple(render(scene, worse_finish(rng), rng) for _ in range(2)))


def bright() -> pa.Table:
    rows = pq.read_table(ASSETS / "pairs.parquet").to_pylist()
    for i, row in enumerate(rows):
        if draws.uniform("bias", i) < SHARE:
            first, second = (brightness(row[key]) for key in ("jpg_0", "jpg_1"))
            row |= {"label_0": float(first > second), "label_1": float(first <= second)}
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def brightness(encoded: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), dtype=np.float64).mean())


ABOVE = FOLDER / "above.parquet"
MADE = {FOLDER / f"{table.__name__}.parquet": table for table in (above, below, bright)}


def make(sources: set[str]) -> None:
    """Those of the sources that are made here, where they are not there yet."""
    for path, table in MADE.items():
        if str(path) in sources and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as aside:
                write_pairs(table(), aside)
