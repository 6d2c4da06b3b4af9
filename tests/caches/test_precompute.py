"""Latents and text made beforehand: what a run computes from them, how they are made, and what is refused."""

import contextlib
import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from rich.console import Console
from tiny_runs import run_command
from tiny_world import one_level, pair_table, save_tiny_model, tiny_pipeline, tiny_xl

from inpo_fast.caches import latent_cache, precompute
from inpo_fast.caches.latent_cache import LatentCache
from inpo_fast.config import RunConfig
from inpo_fast.config import TrainConfig as Train
from inpo_fast.config.rules import check
from inpo_fast.data.filters import FilterConfig
from inpo_fast.data.loader import DataConfig, PairLoader, open_data
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.pocket.pairs import write_pairs
from inpo_fast.runtime import record_store
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

QUIET = Console(quiet=True)
KILLS, SHARDS = 20, 48


def fill(config, models):
    pairs = config.train.steps * config.train.pairs_per_step
    return precompute.fill(config.data, models, 0, 1, QUIET, seed=config.seed, pairs=pairs)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """36 pairs; one of them has half an image; labels and weights differ."""
    records = [r for r in pair_table(42).to_pylist() if r["label_0"] != 0.5][:36]
    records[5]["jpg_1"] = records[5]["jpg_1"][:40]
    for number, record in enumerate(records):
        record["weight"] = 1 + number % 3 / 2
        if number % 4 == 2:
            record |= {"label_0": 0.25, "label_1": 0.75}
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_pairs(pa.Table.from_pylist(records, schema=pair_table(42).schema.append(pa.field("weight", "f8"))), path)
    return str(path)


def configuration(source: str, folder: Path, **data) -> RunConfig:
    how = {"prompt_dropout": 0.2, "bad_pair_limit": 1.0, "crop": "random"} | data
    return RunConfig(
        data=DataConfig(source=source, resolution=32, cache=str(folder), **how),
        train=Train(steps=3, pairs_per_step=12, micro_batch=6),
        inversion=InversionConfig(steps=1, batch=16),
        seed=3,
    )


def models_of(pipeline=tiny_pipeline, **how) -> Models:
    return Models(one_level(pipeline()), torch.device("cpu"), ModelsConfig(base="x", **how))


same_models = lru_cache(models_of)  # where nothing of them changes


def trained(config: RunConfig, models: Models, store: LatentCache | None) -> tuple[torch.Tensor, list]:
    """Weights and metrics of three steps."""
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=500.0),
        inversion=config.inversion,
        micro_batch=config.train.micro_batch,
        vae_sample=config.data.vae_sample,
        seed=config.seed,
        latent_cache=store,
        vae_batch=config.data.vae_batch,
    )
    reader = PairLoader(
        open_source(config.data.source), config.data, resolution=32, seed=config.seed, rank=0, world=1, cached=store
    )
    optimizer, seen, empty = torch.optim.AdamW(models.parameters(), lr=1e-4), [], models.encode_empty()
    for items in reader.steps(0, 3, 12):
        metrics, _ = train_step(make_step_batch(items, models, step_config, empty), models, step_config, 12, 1.0)
        seen.append((metrics.values(), [item.id for item in items]))
        optimizer.step()
        models.weights.refresh()
    return torch.cat([p.detach().reshape(-1) for p in models.parameters()]), [*seen, reader.dropped]


def open_latent_cache(models, data, resolution, seed):
    return latent_cache.open_latent_cache(models, data, open_data(data), resolution, seed)


@lru_cache
def trained_without(source: str) -> tuple[torch.Tensor, list]:
    return trained(configuration(source, Path("nowhere")), models_of(), None)


@pytest.mark.parametrize(
    ("pipeline", "precision", "vae_sample", "vae_batch"),
    [
        (tiny_pipeline, "fp32", True, None),
        (tiny_pipeline, "fp32", False, 16),
        (tiny_xl, "bf16", True, None),
    ],
)
def test_training_from_it_is_training(source, tmp_path, monkeypatch, pipeline, precision, vae_sample, vae_batch):
    """Bit for bit: flips, crops, dropped prompts, VAE noise or mean, labels, weights, a broken pair. Nothing is decoded
    or encoded again."""
    config = configuration(source, tmp_path / "cache", vae_sample=vae_sample, vae_batch=vae_batch)
    want, said = trained(config, models_of(pipeline, precision=precision), None)
    fill(config, same_models(pipeline, precision=precision))
    models = models_of(pipeline, precision=precision)
    store = open_latent_cache(models, config.data, 32, config.seed)
    empty = models.encode_empty()
    never = lambda *args, **how: pytest.fail("encoded again")  # noqa: E731
    monkeypatch.setattr(models, "encode_images", never)
    monkeypatch.setattr(models, "encode_prompts", never)
    monkeypatch.setattr(models, "encode_empty", lambda: empty)
    monkeypatch.setattr("inpo_fast.data.loader.decode", never)
    got, also_said = trained(config, models, store)
    assert torch.equal(got, want) and also_said == said
    assert len(said[-1]) == 1 and "not an image of a known format" in said[-1][0]


def test_a_part_of_it_is_enough(source, tmp_path):
    """Positions that are not there are decoded and encoded; the batches differ then, so to rounding."""
    config = configuration(source, tmp_path / "cache")
    want, said = trained_without(source)
    fill(replace(config, train=replace(config.train, steps=2)), same_models())
    models = models_of()
    got, also_said = trained(config, models, open_latent_cache(models, config.data, 32, config.seed))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [ids for _, ids in also_said[:3]] == [ids for _, ids in said[:3]]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_it_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    """Killed before, between and after each write of shards: the same files in the end, nothing made twice."""
    monkeypatch.setattr(precompute, "ROWS", 8)
    whole, broken = (configuration(source, tmp_path / name) for name in ("whole", "broken"))
    fill(whole, same_models())

    class Killed(BaseException):
        pass

    made, plain = [], latent_cache.RecordStore.write
    for after in range(12):

        def write(self, keys, parts, left=[after]):  # noqa: B006
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            made.extend(keys)
            plain(self, keys, parts)

        monkeypatch.setattr(latent_cache.RecordStore, "write", write)
        try:
            fill(broken, same_models())
        except Killed:
            continue
        break
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole") and after > 3
    assert len(made) == len(set(made))


def command(source: str, folder: Path, model: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "inpo_fast.cache", f"--models.base={model}", f"--data.source={source}",
        f"--data.cache={folder}", "--data.bad_pair_limit=1", "--train.steps=8", "--train.pairs_per_step=200",
        "--train.threads=1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_kill_9_at_random_moments(source, tmp_path):
    """Twenty times, a real process, while it writes; then the files are those of an uninterrupted run."""
    model = str(tmp_path / "model")
    tiny_pipeline().save_pretrained(model)
    long = f"--train.steps={SHARDS}", f"--train.pairs_per_step={precompute.ROWS}"

    def start(folder: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command(source, tmp_path / folder, model, *long),
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        for line in process.stdout:
            if "GiB free" in line:  # the last thing before the first pair
                break
        return process

    def written() -> int:
        return len(list((tmp_path / "broken" / "latents").glob("*.safetensors")))

    process, begun = start("whole"), time.monotonic()
    process.communicate()
    of_one = (time.monotonic() - begun) / SHARDS
    assert process.returncode == 0
    rng, there, cut_off = random.Random(0), 0, 0
    for _ in range(KILLS):
        process, least = start("broken"), there + rng.choice((0, 1))
        while written() < least and process.poll() is None:
            time.sleep(of_one / 20)
        time.sleep(rng.uniform(0, of_one))
        cut_off += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        before, there = there, written()
        assert before <= there
    assert cut_off == KILLS and 1 < there < SHARDS  # each came while there was work
    subprocess.run(command(source, tmp_path / "broken", model, *long), check=True)
    whole, broken = (contents(tmp_path / name) for name in ("whole", "broken"))
    assert {k: v for k, v in broken.items() if ".tmp-" not in k} == whole


@pytest.mark.slow
def test_two_processes_share_the_work(source, tmp_path):
    """torchrun, the real command line: every position and prompt is there, with the values of one process."""
    model = str(tmp_path / "model")
    tiny_pipeline().save_pretrained(model)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--train.steps=3", "--data.resolution=32"]
    words = command(source, tmp_path / "two", model, *more)[1:]
    out = subprocess.run(
        [*torchrun, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert out.returncode == 0, out.stderr
    assert "600 pairs" in out.stdout and "GiB free" in out.stdout
    config = RunConfig(
        data=DataConfig(source=source, resolution=32, cache=str(tmp_path / "one"), bad_pair_limit=1.0),
        train=Train(steps=3, pairs_per_step=200),
    )
    from inpo_fast.models.loading import load_pipeline

    models = Models(load_pipeline(model), torch.device("cpu"), ModelsConfig(base=model))
    one = fill(config, models)
    two = LatentCache(
        tmp_path / "two", models, replace(config.data, cache=str(tmp_path / "two")), open_data(config.data), 32, 0
    )
    for kind in ("latent_store", "text_store"):
        assert getattr(two, kind).places.keys() == getattr(one, kind).places.keys()
    for position in (0, 255, 256, 599):
        a, b = (store.item(position) for store in (one, two))
        assert a.id == b.id and a.prompt == b.prompt and torch.equal(a.x_0, b.x_0)


CHANGES = {
    "crop": "center",
    "flip": False,
    "max_pixels": 999,
    "prompt_dropout": 0.0,
    "shuffle": "blocks",
    "vae_batch": 3,
    "vae_sample": False,
}


def test_another_configuration_is_refused(source, tmp_path):
    config = configuration(source, tmp_path / "cache")
    models = same_models()
    fill(config, models)
    for name, value in CHANGES.items():
        with pytest.raises(
            UserError, match=rf"made for something else \(data\.{name} is .* here\); name another folder"
        ):
            open_latent_cache(models, replace(config.data, **{name: value}), 32, 3)
    for name, resolution, seed in (("seed", 32, 4), ("resolution", 64, 3)):
        with pytest.raises(UserError, match=rf"made for something else \({name} is"):
            open_latent_cache(models, config.data, resolution, seed)
    with pytest.raises(UserError, match=r"what data\.filters keep or weigh is None there"):
        open_latent_cache(models, replace(config.data, filters=FilterConfig(weights={"red": 2.0})), 32, 3)
    same = replace(
        config.data, format="parquet", workers=7, prefetch_mb=1, cache_mb=5, bad_pair_limit=0.5
    )  # about reading
    assert open_latent_cache(models, same, 32, 3) is not None


def test_prompts_are_kept_once_and_a_missing_half_is_made_again(source, tmp_path):
    """Twice in a list is once in the folder; where only one of SDXL's two parts can be read both are encoded."""
    models = same_models(tiny_xl)
    data = configuration(source, tmp_path / "cache").data
    store = LatentCache(tmp_path / "cache", models, data, open_data(data), 32, 3)
    store.start()
    assert store.unknown_prompts(["a", "b", "a"]) == ["a", "b"]
    store.add_prompts(["a", "b"], models.encode_prompts(["a", "b"]))
    assert store.unknown_prompts(["c", "a", "c"]) == ["c"]
    want, read = models.encode_prompts(["b", "c", "a"]), store.text_store.read

    def half(part, keys):
        rows = read(part, keys)
        return [None, *rows[1:]] if part == "pooled" else rows

    store.text_store.read = half
    got = store.encode_prompts(["b", "c", "a"], models)
    assert torch.equal(got.hidden, want.hidden) and torch.equal(got.pooled, want.pooled)


def test_other_models_and_sources_are_refused(source, tmp_path):
    config = configuration(source, tmp_path / "cache")
    fill(config, same_models())
    for what, module in (("vae", "vae"), ("text", "text_encoder")):
        models = models_of()
        with torch.no_grad():
            next(getattr(models.pipeline, module).parameters()).add_(1e-3)
        with pytest.raises(UserError, match=rf"else \(not the same: {what}\); name"):
            open_latent_cache(models, config.data, 32, config.seed)
    copy = tmp_path / "other.parquet"
    copy.write_bytes(Path(source).read_bytes())
    models = same_models()
    assert open_latent_cache(models, replace(config.data, source=str(copy)), 32, 3) is not None  # moved, but the same
    write_pairs(pair_table(40), copy)
    with pytest.raises(UserError, match=r"not the same: the rows of data\.source"):
        open_latent_cache(models, replace(config.data, source=str(copy)), 32, 3)


def test_refusals(source, tmp_path, monkeypatch):
    config = configuration(source, tmp_path / "cache")
    with pytest.raises(UserError, match=r"holds no latents; fill it first: python -m inpo_fast\.cache"):
        open_latent_cache(same_models(), config.data, 32, 3)
    with precompute.alone(tmp_path / "cache"), pytest.raises(UserError, match="being filled by another process"):  # noqa: SIM117
        with precompute.alone(tmp_path / "cache"):
            pass
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GiB free on the disk .*take another disk"):
        fill(config, same_models())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    both = replace(config, inversion=InversionConfig(model="reference", cache=str(tmp_path / "t")))
    with pytest.raises(UserError, match=r"data\.cache and inversion\.cache"):
        check(both)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
@pytest.mark.parametrize("words", [(), ("circle",)])
def test_the_need_that_is_printed_is_what_lies_on_disk(source, tmp_path, monkeypatch, pipeline, words):
    """At most, and not much more: latents, texts, what stands beside them; the disk that holds it all but a byte is
    refused; nothing is needed for what is there."""
    config = configuration(source, tmp_path / "cache", filters=FilterConfig(block_words=words))
    config = replace(config, train=Train(steps=len(open_data(config.data)), pairs_per_step=1))
    needs, room = [], precompute.check_room

    def noted(latent_cache, missing, record, prompts, text, console):
        needs.append(missing * (record + precompute.BESIDE) + prompts * (text + precompute.BESIDE))
        monkeypatch.setattr(precompute.shutil, "disk_usage", lambda path: SimpleNamespace(free=needs[-1]))
        room(latent_cache, missing, record, prompts, text, console)
        monkeypatch.setattr(precompute.shutil, "disk_usage", lambda path: SimpleNamespace(free=max(0, needs[-1] - 1)))
        with pytest.raises(UserError, match="take another disk") if needs[-1] else contextlib.nullcontext():
            room(latent_cache, missing, record, prompts, text, console)

    monkeypatch.setattr(precompute, "check_room", noted)
    fill(config, same_models(pipeline))
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert 0.7 * needs[0] < size <= needs[0]
    fill(config, same_models(pipeline))
    assert needs[1] == 0


def test_a_second_cache_into_the_same_folder_is_refused(source, tmp_path, capsys):
    """The command itself, while the folder's lock is held elsewhere: one line, status 2, nothing written."""
    _, _, module, *words = command(source, tmp_path / "cache", save_tiny_model(tmp_path / "model"))
    with precompute.alone(tmp_path / "cache"), pytest.raises(SystemExit) as end:
        run_command(module, *words)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and said.startswith("python -m inpo_fast.cache: ")
    assert "is being filled by another process; wait for it" in said
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_disk_that_fills_up(source, tmp_path, monkeypatch):
    """Refused in one line, no half file; with room again it goes on to the same files."""
    monkeypatch.setattr(precompute, "ROWS", 8)
    whole, config = (configuration(source, tmp_path / name) for name in ("whole", "cache"))
    fill(whole, same_models())
    save, left = record_store.save_file, [4]

    def filling(tensors, path, metadata):
        if not left[0]:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        save(tensors, path, metadata)

    monkeypatch.setattr(record_store, "save_file", filling)
    with pytest.raises(
        UserError, match=r"could not be written \(.*No space left.* are whole: free some space and start"
    ):
        fill(config, same_models())
    there = contents(tmp_path / "cache")
    assert sum(name.endswith(".safetensors") for name in there) == 4 and not any(".tmp" in name for name in there)
    left[0] = 99
    fill(config, same_models())
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_full_gpu_ends_it(source, tmp_path, monkeypatch):
    """With a size that training must have too; not halved on the way, as all latents of a folder are rounded alike."""

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    models = same_models()
    monkeypatch.setattr(models, "encode_images", full)
    with pytest.raises(UserError, match=r"at data\.vae_batch=8; take data\.vae_batch=4, for the training too, and an "):
        fill(configuration(source, tmp_path / "cache"), models)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_damaged_shard_is_made_again_by_the_run(source, tmp_path, caplog):
    config = configuration(source, tmp_path / "cache")
    want, _ = trained_without(source)
    fill(config, same_models())
    (shard,) = (tmp_path / "cache" / "latents").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    models = models_of()
    got, _ = trained(config, models, open_latent_cache(models, config.data, 32, 3))
    assert "is damaged" in caplog.text
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
