"""A cache is used for the very pairs and models that it was made from: what changed is named, and what the source's
fingerprint cannot see is looked for in some of the records."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from tiny_runs import run_command
from tiny_world import one_level, save_pairs, save_tiny_model, tiny_pipeline

from inpo_fast.caches import latent_cache
from inpo_fast.caches.latent_cache import open_latent_cache, spots
from inpo_fast.caches.precompute import fill
from inpo_fast.caches.trajectory_cache import open_trajectory_cache
from inpo_fast.data.identity import differences, identity_of
from inpo_fast.data.images import png
from inpo_fast.data.loader import DataConfig, open_data
from inpo_fast.data.order import make_order
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.models import Models
from inpo_fast.models.unet import make_tokenizer
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.fingerprint import fingerprint, tokenizer_fingerprint

PAIRS = 6


@pytest.fixture(scope="module")
def models():
    return Models(one_level(tiny_pipeline()), torch.device("cpu"), ModelsConfig(base="x"))


def picture(seed: int) -> bytes:
    """Noise of 64 x 64: a PNG of more than 12 KiB."""
    return png(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8))


def listing(folder: Path, prompts=range(PAIRS)) -> DataConfig:
    """A JSON listing in one folder, its pictures in another."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(2 * PAIRS):
        (folder / "pictures" / f"{i}.png").write_bytes(picture(i))
    rows = [{"prompt": f"p{n}", "path1": f"{2 * i}.png", "path2": f"{2 * i + 1}.png"} for i, n in enumerate(prompts)]
    (folder / "list").mkdir(exist_ok=True)
    (folder / "list" / "train.json").write_text(json.dumps(rows))
    return DataConfig(
        source=str(folder / "list" / "train.json"),
        images=str(folder / "pictures"),
        resolution=32,
        cache=str(folder / "cache"),
        bad_pair_limit=1.0,
    )


def filled(config: DataConfig, models: Models) -> None:
    fill(config, models, 0, 1, Console(quiet=True), seed=3, pairs=2 * PAIRS)


def opened(config: DataConfig, models: Models):
    return open_latent_cache(models, config, open_data(config), 32, 3)


def test_pictures_elsewhere_that_were_replaced(tmp_path, models):
    config = listing(tmp_path)
    filled(config, models)
    assert opened(config, models) is not None
    (tmp_path / "pictures").rename(tmp_path / "moved")
    moved = replace(config, images=str(tmp_path / "moved"))
    assert opened(moved, models) is not None  # the same pictures elsewhere
    (tmp_path / "moved" / "3.png").write_bytes(picture(99))
    said = r"made for something else \(not the same: the pictures of data\.source\); name another folder$"
    with pytest.raises(UserError, match=said):
        opened(moved, models)
    with pytest.raises(UserError, match=said):
        filled(moved, models)


def changed_inside(path: Path) -> None:
    """As many bytes, the same at both ends."""
    content = bytearray(path.read_bytes())
    assert len(content) > 2 * 4096 + 600
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_the_fingerprint_cannot_see_some_records_show(tmp_path, models):
    config = listing(tmp_path)
    filled(config, models)
    before = identity_of(open_data(config))
    changed_inside(tmp_path / "pictures" / "4.png")
    assert differences(before, identity_of(open_data(config))) == []
    said = rf"{tmp_path}/cache was made from other pairs: the record of sample \d+ \(train\.json:3\) has another "
    for use in (opened, filled):
        with pytest.raises(UserError, match=said + "better picture; name another folder, or remove this one"):
            use(config, models)


def test_a_record_of_a_broken_pair(tmp_path, models):
    """As it was: fine. Readable now, or broken since: other pairs."""
    config = listing(tmp_path)
    good = (tmp_path / "pictures" / "4.png").read_bytes()
    broken = bytearray(good)
    broken[100] ^= 255
    (tmp_path / "pictures" / "4.png").write_bytes(broken)
    filled(config, models)
    assert opened(config, models) is not None
    (tmp_path / "pictures" / "4.png").write_bytes(good)
    with pytest.raises(UserError, match=r"the pictures of data\.source"):
        opened(config, models)


def test_sixteen_pairs_are_read_and_of_row_groups_four(tmp_path, models, monkeypatch):
    path = save_pairs(tmp_path / "pairs.parquet", rows=64)
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=4)
    config = DataConfig(source=path, resolution=32, cache=str(tmp_path / "cache"), shuffle="blocks")
    fill(config, models, 0, 1, Console(quiet=True), seed=3, pairs=96)
    source = open_data(config)
    read, seen = source.read, []
    monkeypatch.setattr(source, "read", lambda index: seen.append(index) or read(index))
    open_latent_cache(models, config, source, 32, 3)
    assert len(set(seen)) > 12
    monkeypatch.setattr(latent_cache, "FULL_BYTES", 0)
    source = open_data(config)
    open_latent_cache(models, config, source, 32, 3)
    assert source.cache.loads <= 4


def test_spots_are_spread_and_skip_what_is_not_there():
    index_of = lambda p: (7 * p) % 100  # noqa: E731
    assert list(spots(160, None, index_of, lambda p: True)) == list(range(0, 160, 10))
    assert list(spots(160, None, index_of, lambda p: p >= 150)) == [150] * 7
    blocks = np.arange(10, 101, 10)
    found = list(spots(80, blocks, index_of, lambda p: True))
    assert len({index_of(p) // 10 for p in found}) <= 4 and {0, 20, 40, 60} <= set(found)
    assert list(spots(0, None, index_of, lambda p: True)) == []


def other_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 20
    return tokenizer


def test_another_tokenizer_under_the_same_weights(tmp_path, models):
    config = listing(tmp_path)
    filled(config, models)
    inversion = InversionConfig(steps=1, cache=str(tmp_path / "trajectories"))
    trajectories = open_trajectory_cache(models, inversion, ObjectiveConfig(), config)
    trajectories.store.start()
    pipeline = one_level(tiny_pipeline())
    pipeline.tokenizer = other_tokenizer()
    others = Models(pipeline, torch.device("cpu"), ModelsConfig(base="x"))
    with pytest.raises(UserError, match=r"cache/text was made for something else \(not the same: tokenizers"):
        opened(config, others)
    with pytest.raises(UserError, match=r"trajectories was made for something else \(not the same: tokenizers"):
        open_trajectory_cache(others, inversion, ObjectiveConfig(), config)


def test_a_text_encoder_is_more_than_its_weights():
    """quick_gelu for gelu in config.json: the same tensors, other embeddings."""
    one, two = tiny_pipeline().text_encoder, tiny_pipeline().text_encoder
    assert fingerprint(one) == fingerprint(two)
    two.config.hidden_act = "quick_gelu" if one.config.hidden_act != "quick_gelu" else "gelu"
    assert fingerprint(one) != fingerprint(two)


def test_tokenizers_are_told_apart():
    one = make_tokenizer()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(make_tokenizer())
    one("a text", padding="max_length", max_length=9, truncation=True)  # leaves traces in a tokenizer
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(other_tokenizer()) != tokenizer_fingerprint(make_tokenizer())
    more = make_tokenizer()
    more.add_tokens(["<concept>"])
    assert tokenizer_fingerprint(more) != tokenizer_fingerprint(make_tokenizer())


@pytest.mark.parametrize("below", ["", "/in/it"])
def test_a_file_in_the_place_of_the_cache_is_one_line(tmp_path, capfd, below):
    model, source = save_tiny_model(tmp_path / "m"), save_pairs(tmp_path / "p.parquet")
    (tmp_path / "file").write_text("mine")
    capfd.readouterr()
    words = (f"--models.base={model}", f"--data.source={source}", f"--data.cache={tmp_path}/file{below}")
    with pytest.raises(SystemExit) as end:
        run_command("inpo_fast.cache", *words, f"--output={tmp_path}/run")
    problem = capfd.readouterr().err
    assert end.value.code == 2 and problem.count("\n") == 1 and "data.cache" in problem
    assert f"{tmp_path}/file{below}" in problem and "is no folder" in problem
    assert (tmp_path / "file").read_text() == "mine"


def test_old_caches_are_refused(tmp_path, models):
    """They do not say what their records were made from."""
    config = listing(tmp_path)
    filled(config, models)
    manifest = tmp_path / "cache" / "latents" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": 1, "source": "0" * 32}))
    with pytest.raises(UserError, match="layout is 1 there, 2 here"):
        opened(config, models)
    assert make_order(open_data(config), "auto", 3).index(0) < PAIRS
