"""The shipped pocket world held against its definition: scenes, judge, pairs, hashes, and what its base model draws."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline

from inpo_fast.comparison.drawing import draw, use_deterministic_sampler
from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.data.sources import open_source
from inpo_fast.judges.pocket_rules import ALIGNMENT, LOOKS, RuleJudge
from inpo_fast.judges.pocket_scenes import COLOURS, RADIUS, SHAPES, parse_caption
from inpo_fast.pocket import ASSETS
from inpo_fast.pocket.pairs import GUIDANCE, SAMPLER_STEPS
from inpo_fast.pocket.scenes import Finish, all_scenes, random_finish, render, split_scenes


def test_split_is_disjoint_complete_and_covers_every_word():
    seen, held_out = split_scenes()
    assert not set(seen) & set(held_out) and set(seen) | set(held_out) == set(all_scenes())
    assert len(held_out) == round(0.12 * len(all_scenes()))
    for scenes in (seen, held_out):
        assert {s.shape for s in scenes} == set(SHAPES) and {s.colour for s in scenes} == set(COLOURS)
        assert {s.size for s in scenes} == set(RADIUS)


def test_captions_round_trip_and_others_are_refused():
    assert all(parse_caption(scene.caption) == scene for scene in all_scenes())
    for text in ("", "a dog", "a small red circle on a blue", "a huge red circle on a blue background"):
        with pytest.raises(ValueError, match="not a pocket caption"):
            parse_caption(text)


def score(scene, finish, asked=None):
    picture = render(scene, finish, np.random.default_rng(0))
    parts = RuleJudge().score([picture], [(asked or scene).caption]).parts
    return {name: float(value[0]) for name, value in parts.items()}


def test_judge_reads_every_scene():
    rng = np.random.default_rng(0)
    scenes = all_scenes()
    perfect = RuleJudge().score([render(s, Finish(), rng) for s in scenes], [s.caption for s in scenes])
    assert perfect.total.min() > 0.95
    rough = RuleJudge().score([render(s, random_finish(rng), rng) for s in scenes], [s.caption for s in scenes])
    for name in ALIGNMENT:
        assert (rough.parts[name] > 0.5).mean() > 0.97, name  # imperfect looks are no reason to misread


@pytest.mark.parametrize(
    ("field", "other"), [("colour", "green"), ("shape", "star"), ("background", "yellow"), ("size", "large")]
)
def test_each_wrong_word_costs_its_own_part(field, other):
    scene = parse_caption("a small red circle on a blue background")
    wrong = type(scene)(**{**vars(scene), field: other})
    right, parts = score(scene, Finish()), score(scene, Finish(), asked=wrong)
    assert right[field] > 0.9 and parts[field] < 0.35
    assert all(parts[name] == right[name] for name in ALIGNMENT if name not in (field, "size"))


@pytest.mark.parametrize(
    ("part", "worse"),
    [
        ("centring", Finish(dx=4)),
        ("saturation", Finish(saturation=0.4)),
        ("edges", Finish(edge=5)),
        ("cleanliness", Finish(stain=0.12)),
    ],
)
def test_each_flaw_costs_its_own_part(part, worse):
    scene = parse_caption("a large green square on a white background")
    good, bad = score(scene, Finish()), score(scene, worse)
    assert bad[part] < good[part] - 0.3
    assert all(bad[name] > good[name] - 0.2 for name in LOOKS if name != part)


def test_an_empty_picture_scores_near_nothing():
    parts = RuleJudge().score([np.full((32, 32, 3), 128, np.uint8)], ["a small red circle on a gray background"])
    assert parts.total[0] < 0.2


def test_files_are_those_of_the_manifest():
    manifest = json.loads((ASSETS / "manifest.json").read_text())
    files = {str(p.relative_to(ASSETS)) for p in ASSETS.rglob("*") if p.is_file()} - {"manifest.json"}
    assert files == set(manifest["sha256"])
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name
    assert sum((ASSETS / name).stat().st_size for name in files) <= 12e6


def test_pairs_have_the_schema_and_never_a_held_out_scene():
    table = pq.read_table(ASSETS / "pairs.parquet")
    assert table.schema.names == PICKAPIC_SCHEMA.names and len(PICKAPIC_SCHEMA) == 19
    _, held_out = split_scenes()
    assert not set(table["caption"].to_pylist()) & {scene.caption for scene in held_out}
    source = open_source(str(ASSETS / "pairs.parquet"))
    assert 0.08 < source.ties / len(table) < 0.14
    assert source.read(0).winner[:4] == b"\x89PNG"
    prompts = (ASSETS / "prompts-held-out.txt").read_text().splitlines()
    assert prompts == [scene.caption for scene in held_out]


def test_base_model_draws_what_is_asked_with_room_in_looks():
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "model", safety_checker=None, dtype=torch.float32)
    use_deterministic_sampler(pipeline)
    captions = [scene.caption for scene in split_scenes()[0][::9]]
    pictures = draw(
        pipeline, captions, [("test", i) for i in range(len(captions))], steps=SAMPLER_STEPS, guidance=GUIDANCE
    )
    parts = RuleJudge().score(pictures, captions).parts
    right = ((parts["colour"] == 1) & (parts["shape"] > 0.5)).mean()
    assert right >= 0.85, f"{right:.2f} of {len(captions)} pictures show the right colour and shape"
    assert parts["looks"].mean() < 0.85
