"""Online training: what is drawn against plain pipeline calls with the round's weights, ties, resumption at every place
where a run can stop, and what is refused."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tiny_runs import Forked, free_port, metric, metrics, policy, run_training, same_bits, save_recipe, train_in
from tiny_world import one_level, tiny_xl

from inpo_fast.comparison.drawing import draw, use_deterministic_sampler
from inpo_fast.config import OnlineConfig, parse
from inpo_fast.cost.step_cost import _drawn
from inpo_fast.data.images import png
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.order import make_order
from inpo_fast.data.pair import BadPair, Pair
from inpo_fast.data.sources import open_source
from inpo_fast.judges import Scores
from inpo_fast.judges.registry import make_judge
from inpo_fast.models.loading import load_pipeline
from inpo_fast.pocket import ASSETS
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.preemption import Preemption
from inpo_fast.runtime.signals import TRY_AGAIN
from inpo_fast.training import online
from inpo_fast.training.online import Online

CLIP = f"clip:{ASSETS / 'clip'}"
HOW = {"every": 2, "mix": 0.7, "judge": CLIP, "sampler_steps": 2, "guidance": 2.0, "batch": 3, "keep": True}
PAIRS, SEED = 4, 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """folder/full: four steps of four pairs, rounds at 0 and 2, checkpoints and pictures kept; folder/off: offline."""
    folder = tmp_path_factory.mktemp("online")
    save_recipe(folder, online=HOW, train={"checkpoint_every": 1, "keep_checkpoints": 9})
    train_in(folder, "full")
    train_in(folder, "off", "--online.every=0", "--online.judge=null")
    return folder


def rows(run, step):
    parts = [pq.read_table(path) for path in sorted((run / "online" / f"{step:06d}").glob("*.parquet"))]
    return pa.concat_tables(parts).to_pylist()


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded))).astype(int)


@pytest.mark.parametrize("step", [0, 2])
def test_pairs_are_what_the_rounds_weights_draw_for_the_stored_prompts(world, step):
    pipeline = StableDiffusionPipeline.from_pretrained(world / "model")
    if step:
        pipeline.unet.load_state_dict(policy(world / "full", step))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    source = open_source(str(world / "pairs.parquet"))
    order, judge, found = (
        make_order(source, "auto", SEED),
        make_judge(CLIP),
        {r["position"]: r for r in rows(world / "full", step)},
    )
    span = range(step * PAIRS, (step + 2) * PAIRS)
    chosen = [p for p in span if keyed_rng.uniform("online", SEED, p) < HOW["mix"]]
    assert 0 < len(chosen) < len(span) and set(found) <= set(chosen) and len(found) > len(chosen) / 2
    for position in chosen:
        prompt, pictures = source.read(order.index(position)).prompt, []
        for k in range(2):
            noise = keyed_rng.normal((4, 8, 8), "online", SEED, position, k)[None]
            drawn = pipeline(prompt, latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="np").images[
                0
            ]
            pictures.append(np.round(drawn * 255).astype(np.uint8))
        scores = judge.score(pictures, [prompt] * 2).total
        if position not in found:
            assert abs(scores[0] - scores[1]) < judge.tie + 1e-3
            continue
        row, better = found[position], int(scores[1] > scores[0])
        assert row["caption"] == prompt and (row["label_0"], row["label_1"]) == (1, 0)
        assert row["score_0"] - row["score_1"] == pytest.approx(abs(scores[0] - scores[1]), abs=0.02)
        for kept, own in ((row["jpg_0"], pictures[better]), (row["jpg_1"], pictures[1 - better])):
            assert np.abs(pixels(kept) - own).max() <= 1  # alone or in a batch: rounded otherwise


def test_rounds_are_a_source_of_their_own(world):
    """What is kept can be read as any parquet of pairs."""
    source = open_source(str(world / "full" / "online"))
    assert len(source) == len(rows(world / "full", 0)) + len(rows(world / "full", 2)) and source.ties == 0
    assert source.read(0).winner == rows(world / "full", 0)[0]["jpg_0"]


def test_metrics_and_names_say_what_was_drawn(world):
    on, off = metrics(world / "full"), metrics(world / "off")
    assert ["online_pairs" in line for line in on] == [True, False, True, False]
    for step in (0, 2):
        wanted = [p for p in range(4 * step, 4 * step + 8) if keyed_rng.uniform("online", SEED, p) < HOW["mix"]]
        line = on[step]
        assert line["online_pairs"] == len(rows(world / "full", step))
        assert line["online_pairs"] + line["online_ties"] == len(wanted)
        assert line["online_evaluations"] == len(wanted) * 2 * 2 * 2  # candidates, sampler steps, guidance
    spent = metric(world / "full", "unet_evaluations")
    assert spent[0] - on[0]["online_evaluations"] == off[0]["unet_evaluations"]
    assert spent[1] == off[1]["unet_evaluations"]  # t of a position is the same
    assert json.loads((world / "full" / "manifest.json").read_text())["variant"] == "inpo-online"
    assert metric(world / "full", "loss")[1:] != metric(world / "off", "loss")[1:]


class Indifferent:
    name, tie = "indifferent", 1.0

    def check(self, prompts):
        assert prompts

    def score(self, images, prompts):
        return Scores(np.full(len(images), 3.0))


def test_where_the_judge_sees_no_difference_the_stored_pair_stays(world, monkeypatch):
    monkeypatch.setattr(online, "make_judge", lambda *_: Indifferent())
    out = train_in(world, "same")
    assert (
        metric(out, "online_pairs")[0]
        if "online_pairs" not in metrics(out)[0]
        else metrics(out)[0]["online_pairs"] == 0
    )
    assert same_bits(out, world / "off", 4)


def again(world, name, step, *extra):
    """The full run as it was after so many steps, continued to its end."""
    out = world / name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(world / "full", out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "model")
    return out


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_has_the_same_bits(world, step):
    """In the middle of the first round, between two, in the middle of the second."""
    out = again(world, "again", step)
    if step < 2:  # pictures of other weights, as if from a run that went on otherwise
        (out / "online/000002/00000.parquet").write_bytes(b"another policy's")
    if step == 2:
        shutil.rmtree(out / "online/000002")
    train_in(world, "again", "--resume")
    assert same_bits(out, world / "full", 4)
    strip = lambda run: [{k: v for k, v in line.items() if "second" not in k} for line in metrics(run)]  # noqa: E731
    assert strip(out) == strip(world / "full")


def test_without_what_it_trained_on_a_run_cannot_go_on(world):
    out = again(world, "gone", 3)
    shutil.rmtree(out / "online/000002")
    with pytest.raises(UserError, match="000002 lacks 1 of 1 files of pairs that steps 2 to 2 used; put them back"):
        train_in(world, "gone", "--resume")


def test_stopped_while_it_draws_it_keeps_what_it_has(world, monkeypatch):
    monkeypatch.setattr(online, "CHUNK", 2)
    whole = train_in(world, "chunks")
    names = sorted(path.name for path in (whole / "online/000002").iterdir())
    assert len(names) > 2
    plain, written = Online._write, []

    def asked(self, table, path):
        plain(self, table, path)
        written.append(path)
        if len(written) == len(list((whole / "online/000000").iterdir())) + 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Online, "_write", asked)
        with pytest.raises(SystemExit) as left:
            train_in(world, "stopped", "--train.checkpoint_every=4")
    assert left.value.code == TRY_AGAIN
    out = world / "stopped"
    there = sorted((out / "online/000002").iterdir())
    assert [path.name for path in there] == names[:1]
    before = there[0].stat().st_mtime_ns
    train_in(world, "stopped", "--resume", "--train.checkpoint_every=4")
    assert there[0].stat().st_mtime_ns == before and same_bits(out, whole, 4)


def test_two_processes_draw_the_same(world):
    words = ["--config", str(world / "tiny.yaml"), "--output", str(world / "two"), "--train.micro_batch=1"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        Forked(world / f"two-{rank}", run_training, *words, RANK=f"{rank}", LOCAL_RANK="0", **meeting)
        for rank in range(2)
    ]
    ends = [process.wait() for process in processes]
    assert ends == [0, 0], [process.complaints.read_text()[-2000:] for process in processes]
    assert json.loads((world / "two" / "manifest.json").read_text())["processes"] == 2
    assert rows(world / "two", 0) == rows(world / "full", 0)  # equal weights, equal batches: the same bytes
    assert metrics(world / "two")[0]["online_pairs"] == metrics(world / "full")[0]["online_pairs"]
    assert metric(world / "two", "grad_norm")[0] == pytest.approx(metric(world / "full", "grad_norm")[0], rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_draws_its_share(world, tmp_path, monkeypatch, rank):
    """Of two: every other file, and all are there when they go on. The other's come from the run of one process."""
    monkeypatch.setattr(online, "CHUNK", 1)
    monkeypatch.setattr(online.distributed, "rank_and_world", lambda: (rank, 2))
    own = rounds(tmp_path, every=2, start=0, mix=1.0, pairs_per_step=PAIRS)
    table = pq.read_table(next((world / "full" / "online" / "000000").glob("*.parquet")))
    drawn, folder = [], tmp_path / "online" / "000000"

    def chunk(positions, *_):
        drawn.extend(positions)
        at = table.schema.get_field_index("position")
        return table.slice(0, 1).set_column(at, "position", pa.array(positions, pa.int64()))

    class Other:
        asked = None

        def agree(self, *_):
            for number in range(2 * PAIRS):
                if not (path := folder / f"{number:05d}.parquet").exists():
                    assert number % 2 != rank
                    pq.write_table(chunk([number]), path)
                    drawn.remove(number)

    monkeypatch.setattr(own, "_chunk", chunk)
    monkeypatch.setattr(online, "drawing_with", lambda *_: contextlib.nullcontext())
    models = type("Models", (), {"pipeline": None, "policy": None})
    values = own.begin(0, models, str, Other())
    assert drawn == list(range(rank, 2 * PAIRS, 2)) and values["online_pairs"] == 2 * PAIRS
    assert own.pair(3) is not None and own.pair(2 * PAIRS) is None


def test_an_adapter_of_sdxl_draws_with_the_adapter(tmp_path):
    """bf16, LoRA: the second round's pictures are those of the trained adapter, not of the base under it."""
    one_level(tiny_xl()).save_pretrained(tmp_path / "xl")
    save_recipe(
        tmp_path,
        models={"base": str(tmp_path / "xl"), "precision": "bf16", "lora": {"rank": 2}},
        train={"steps": 2, "checkpoint_every": 2},
        optim={"lr": 0.1, "warmup_steps": 0},
        online=HOW | {"every": 1, "mix": 1.0},
    )
    out = train_in(tmp_path, "xl-run")
    assert metrics(out)[0]["online_pairs"] and metrics(out)[1]["online_pairs"]
    row = rows(out, 1)[0]
    pipeline = load_pipeline(str(tmp_path / "xl"), torch.bfloat16)
    use_deterministic_sampler(pipeline)
    keys = [("online", SEED, row["position"], k) for k in range(2)]
    base = draw(pipeline, [row["caption"]] * 2, keys, steps=2, guidance=2.0)
    nearest = min(np.abs(pixels(row["jpg_0"]) - picture.astype(int)).mean() for picture in base)
    assert nearest > 2  # levels of 255; rounding alone moves none by more than one


def rounds(run=Path("nowhere"), pairs_per_step=50, **how):
    settings = OnlineConfig(**{"every": 3, "start": 2, "judge": "x"} | how)
    return Online(settings, seed=1, steps=10, pairs_per_step=pairs_per_step, run=run, judge=None)


def test_rounds_that_no_checkpoint_needs_go(tmp_path):
    """A run may continue in the middle of a round that one of its checkpoints lies in."""
    own = rounds(tmp_path, every=2, start=0)
    for name in ("checkpoints/step-0001", "checkpoints/step-0004", "online/000000", "online/000002", "online/000004"):
        (tmp_path / name).mkdir(parents=True)
    left = lambda: sorted(path.name for path in own.folder.iterdir())  # noqa: E731
    own._prune(4)
    assert left() == ["000000", "000002", "000004"]
    (tmp_path / "checkpoints/step-0001").rename(tmp_path / "checkpoints/step-0003")
    own._prune(4)
    assert left() == ["000002", "000004"]
    (tmp_path / "checkpoints/step-0003").rmdir()
    own._prune(4)
    assert left() == ["000004"]
    (tmp_path / "online/.tmp-x").mkdir()
    own.forget_after(3)
    assert left() == []


def test_rounds_and_segments():
    own = rounds()
    assert [step for step in range(10) if own.begins(step)] == [2, 5, 8]
    assert [own.round_of(step) for step in range(10)] == [None, None, 2, 2, 2, 5, 5, 5, 8, 8]
    assert own.segments(0) == [(0, 2), (2, 5), (5, 8), (8, 10)]
    assert own.segments(6) == [(6, 8), (8, 10)] and own.segments(5) == [(5, 8), (8, 10)]
    late = rounds(every=2, start=5)
    assert [step for step in range(10) if late.begins(step)] == [5, 7, 9] and late.round_of(4) is None
    last = own.positions(8)
    assert min(last) >= 400 and max(last) < 500 and len(last) == pytest.approx(50, abs=15)
    assert rounds(mix=1.0).positions(8) == list(range(400, 500))


def test_best_and_worst_of_the_candidates(tmp_path, monkeypatch):
    """And no pair where the stored one cannot be read, or a score is no number."""

    class Brightness:
        name, tie = "brightness", 0.5

        def check(self, prompts):
            pass

        def score(self, images, prompts):
            return Scores(np.array([float(image.mean()) if image.mean() < 200 else np.nan for image in images]))

    def shades(_pipeline, captions, keys, **_how):
        shade = lambda caption, k: int(caption) + 10 * ((k + 1) % 4)  # noqa: E731
        return [np.full((2, 2, 3), shade(c, key[-1]), np.uint8) for c, key in zip(captions, keys, strict=True)]

    def prompt_of(position):
        if position == 7:
            raise BadPair("7")
        return str(20 * position)

    monkeypatch.setattr(online, "draw", shades)
    own = Online(
        OnlineConfig(every=1, candidates=4), seed=0, steps=1, pairs_per_step=1, run=tmp_path, judge=Brightness()
    )
    table = own._chunk([2, 7, 3, 9], type("Models", (), {"pipeline": None}), prompt_of, Preemption()).to_pylist()
    assert [row["position"] for row in table] == [2, 3]  # 9: one of its pictures is too bright
    assert [pixels(row["jpg_0"])[0, 0, 0] - 20 * row["position"] for row in table] == [30, 30]
    assert [pixels(row["jpg_1"])[0, 0, 0] - 20 * row["position"] for row in table] == [0, 0]


def test_a_drawn_pair_takes_the_stored_ones_place():
    """Also where the stored one's latents are in a cache."""
    encoded = png(np.zeros((4, 4, 3), np.uint8))

    class Stored:
        ties, blocks, bytes = 0, None, 0

        def __len__(self):
            return 3

        def read(self, index):
            return Pair("stored", "a", encoded, encoded)

    class Cached:
        def item(self, position):
            return "cached"

    class Drawn:
        def pair(self, position):
            return Pair("drawn", "b", encoded, encoded) if position == 1 else None

    how = {"resolution": 4, "seed": 0, "rank": 0, "world": 1}
    loader = PairLoader(Stored(), DataConfig(), **how, cached=Cached(), online=Drawn())
    assert loader.load(0) == "cached" and loader.load(1).id == "drawn" and loader.prompt(1) == "a"


def test_what_is_refused(world, monkeypatch):
    for words, said in (
        (["--online.judge=null"], r"online\.every needs online\.judge"),
        (["--online.every=0"], r"online\.judge=.* has nothing to judge"),
        (["--online.start=4"], r"online\.start=4: the run ends before it"),
        (["--online.mix=0"], r"online\.mix=0.*0 excluded"),
        (["--online.candidates=1"], r"online\.candidates=1: must be at least 2"),
        ([f"--evaluate.outside_judge={CLIP}"], "evaluate.outside_judge too"),
        (["--inversion.cache=x", "--inversion.model=reference"], r"inversion\.cache with online\.every"),
    ):
        with pytest.raises(UserError, match=said):
            parse("train", ["--config", str(world / "tiny.yaml"), *words])
    with pytest.raises(UserError, match="unknown judge 'nobody'"):
        train_in(world, "nothing", "--online.judge=nobody")
    assert not (world / "nothing").exists()
    with pytest.raises(UserError, match=r"--resume: online\.mix is 0\.2 but the run"):
        train_in(world, "full", "--resume", "--online.mix=0.2")


def test_a_plan_counts_the_drawing(world, capsys, monkeypatch):
    config = parse("train", ["--config", str(world / "tiny.yaml"), "--online.start=1"])
    assert _drawn(config) == pytest.approx(0.7 * 2 * 2 * 2 * 3 / 4)
    train_in(world, "dry", "--dry-run")
    shown = capsys.readouterr().out
    assert "drawing" in shown and "inpo-online" in shown
