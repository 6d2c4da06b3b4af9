"""Preference pairs of the pocket world: two samples of the base per prompt, judged, in Pick-a-Pic v2's schema."""

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.progress import Progress

from inpo_fast.comparison.drawing import draw, use_deterministic_sampler
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.judges.pocket_rules import RuleJudge
from inpo_fast.judges.pocket_scenes import Scene
from inpo_fast.runtime import keyed_rng

SAMPLER_STEPS = 20
GUIDANCE = 3.0
TEMPERATURE = 0.02  # Bradley-Terry: P(first wins) = sigmoid((score_0 - score_1) / TEMPERATURE)
TIE_SHARE = 0.11  # of the rows with the smallest difference; 11.2 % in Pick-a-Pic v2
MODEL_NAME = "pocket-base"


def draw_pairs(pipeline: StableDiffusionPipeline, scenes: list[Scene], count: int, seed: int) -> pa.Table:
    """`count` rows over the scenes in turn; labels carry Bradley-Terry noise, the closest rows are ties."""
    use_deterministic_sampler(pipeline)
    chosen = [scenes[keyed_rng.integer(0, len(scenes) - 1, "scene", seed, i)] for i in range(count)]
    captions = [scene.caption for scene in chosen for _ in range(2)]
    keys = [("pair", seed, i, side) for i in range(count) for side in range(2)]
    with Progress() as progress:
        task = progress.add_task("draw pairs", total=len(keys))
        pictures = draw(
            pipeline,
            captions,
            keys,
            steps=SAMPLER_STEPS,
            guidance=GUIDANCE,
            batch=128,
            advance=lambda n: progress.advance(task, n),
        )
    totals = RuleJudge().score(pictures, captions).total.reshape(count, 2)
    difference = totals[:, 0] - totals[:, 1]
    ties = np.abs(difference) <= np.quantile(np.abs(difference), TIE_SHARE)
    chance = 1 / (1 + np.exp(-difference / TEMPERATURE))
    first = np.array([keyed_rng.uniform("label", seed, i) for i in range(count)]) < chance
    epoch = datetime(2025, 6, 1, tzinfo=UTC)
    rows = []
    for i, scene in enumerate(chosen):
        label_0 = 0.5 if ties[i] else float(first[i])
        uids = [f"{keyed_rng.hash_key('uid', seed, i, side):016x}" for side in range(2)]
        rows.append(
            {
                "are_different": not ties[i],
                "best_image_uid": "tie" if ties[i] else uids[0 if first[i] else 1],
                "caption": scene.caption,
                "created_at": (epoch + timedelta(minutes=i)).replace(tzinfo=None),
                "has_label": True,
                "image_0_uid": uids[0],
                "image_0_url": "",
                "image_1_uid": uids[1],
                "image_1_url": "",
                "jpg_0": png(pictures[2 * i]),
                "jpg_1": png(pictures[2 * i + 1]),
                "label_0": label_0,
                "label_1": 1 - label_0,
                "model_0": MODEL_NAME,
                "model_1": MODEL_NAME,
                "ranking_id": i,
                "user_id": 0,
                "num_example_per_prompt": sum(other == scene for other in chosen),
                "__index_level_0__": i,
            }
        )
    return pa.Table.from_pylist(rows, schema=PICKAPIC_SCHEMA)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_pairs(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=256, compression="zstd")
