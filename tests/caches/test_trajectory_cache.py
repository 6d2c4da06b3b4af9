"""A cache's parts: x_t replayed against x_t inverted; keys, manifest and size against what records are made of."""

import json
import math
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import one_level, tiny_pipeline, tiny_xl

from inpo_fast.caches import trajectory_cache
from inpo_fast.caches.trajectory_cache import TrajectoryCache, open_trajectory_cache
from inpo_fast.caches.trajectory_replay import TrajectoryRecord
from inpo_fast.data.images import View
from inpo_fast.data.loader import DataConfig, Item
from inpo_fast.method import inversion_schedule as schedule_module
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion_schedule import inversion_schedule, shares_prefix
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import digest

HOW = InversionConfig(steps=4, model="reference", batch=1)
DATA = DataConfig(vae_sample=False)
PAPER = ObjectiveConfig()
GRIDS = list(product(["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"], ["source", "target"]))
GLOBAL = {pair for pair in GRIDS if pair[0] != "spread" and pair != ("exact", "target")}
PATHS = [
    DDPMPath.of(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=offset))
    for offset in (0, 1)
]


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 1000])
@pytest.mark.parametrize("path", PATHS, ids=["offset 0", "offset 1"])
def test_which_grids_have_global_levels(path, steps):
    """By what the UNet would be asked on the way to every t: its times, and the levels it has come from."""
    for grid, at in GRIDS:
        trajectory = inversion_schedule(path, torch.arange(1000), steps=steps, grid=grid, evaluate_at=at)
        taken = torch.arange(trajectory.times.shape[1]) < trajectory.evaluations[:, None]  # (t, step)
        same = [x == x[-1:] for x in (trajectory.times, trajectory.levels[:, : taken.shape[1]])]
        good = bool((taken <= same[0] & same[1] & taken[-1:]).all())
        assert shares_prefix(path, steps=steps, grid=grid, evaluate_at=at) == good, (grid, at)
        if steps in (3, 7, 10):
            assert good == ((grid, at) in GLOBAL), (grid, at)


@pytest.mark.parametrize("name", ["p", "q", "times"])
@pytest.mark.parametrize(("column", "good"), [(3, False), (4, True), (9, True)])  # t = 450 takes five steps
def test_global_levels_are_read_off_the_trajectories(monkeypatch, name, column, good):
    """One number of one trajectory changed: only in its last step may p and q differ, and times in none it takes."""

    def changed(*arguments, **options):
        trajectory = inversion_schedule(*arguments, **options)
        getattr(trajectory, name)[450, column] *= 2
        return trajectory

    monkeypatch.setattr(schedule_module, "inversion_schedule", changed)
    good = good and (name != "times" or column == 9)
    assert shares_prefix(PATHS[0], steps=10, grid="exact", evaluate_at="source") == good


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    one_level(tiny_pipeline()).save_pretrained(folder / "sd")
    one_level(tiny_xl()).save_pretrained(folder / "xl")
    return folder


@lru_cache
def models_of(settings, change=None):
    models = Models(open_pipeline(settings), torch.device("cpu"), settings)
    if change is not None:
        with torch.no_grad():
            change(models)
    return models


def opened(world, folder, *, how=HOW, data=DATA, objective=PAPER, base="sd", change=None, **settings):
    """Opens (and makes) the folder for a model, which is made once."""
    settings = ModelsConfig(base=str(world / base), **settings)
    cache = open_trajectory_cache(models_of(settings, change), replace(how, cache=str(folder)), objective, data)
    cache.store.start()
    return cache


def keys_of(cache: TrajectoryCache, item: Item, seed: int = 0) -> list[str]:
    cached = cache.batch([item], [(seed, item.position, side) for side in range(2)])
    return [cached.keys[r] for r in cached.record]


@pytest.mark.parametrize("base", ["sd", "xl"])
def test_keys(world, tmp_path, base):
    """A key depends on what the record is a function of, and on nothing else: how many of a pair's two change."""
    draw = np.random.default_rng(0)
    a, b = (View(draw.integers(0, 256, (32, 32, 3), np.uint8), (40, 40), (4, 4)) for _ in range(2))
    item = Item(7, "id", "a red circle", a, b)
    one_pixel = a.pixels.copy()
    one_pixel[31, 31, 2] ^= 1
    changes = {
        "winner's pixel": replace(item, winner=replace(a, pixels=one_pixel)),
        "winner's mirror": replace(item, winner=replace(a, pixels=np.ascontiguousarray(a.pixels[:, ::-1]))),
        "sides": replace(item, winner=b, loser=a),
        "size": replace(item, winner=replace(a, original=(41, 40))),
        "crop": replace(item, winner=replace(a, crop=(4, 5))),
        "prompt": replace(item, prompt="a blue circle"),
        "position": replace(item, position=8),
        "seed": item,
    }
    told = dict.fromkeys(("size", "crop"), int(base == "xl"))
    plain = dict.fromkeys(changes, 0) | {"winner's pixel": 1, "winner's mirror": 1, "sides": 2} | told

    def differing(name: str, **options) -> dict[str, int]:
        cache = opened(world, tmp_path / name, base=base, **options)
        before = keys_of(cache, item)
        after = {fact: keys_of(cache, other, seed=int(fact == "seed")) for fact, other in changes.items()}
        return {fact: sum(x != y for x, y in zip(before, keys, strict=True)) for fact, keys in after.items()}

    assert differing("plain") == plain
    assert differing("published", micro_conditioning="published") == plain | dict.fromkeys(told, 0)
    assert differing("conditional", how=replace(HOW, guidance=1.0)) == plain | {"prompt": 2}
    assert differing("sampled", data=DataConfig()) == plain | {"position": 2, "seed": 2}
    # a frozen record is at the t of its pair, which a mirror leaves alone
    frozen = differing("frozen", how=replace(HOW, frozen=True))
    assert frozen == plain | {"prompt": 2, "winner's pixel": 2}


def nudge(parameter: torch.Tensor) -> None:
    parameter.view(-1)[3] = torch.nextafter(parameter.view(-1)[3], torch.tensor(math.inf))


def scheduled(**options):
    def change(models):
        models.noise_path = DDPMPath.of(DDIMScheduler.from_config(models.pipeline.scheduler.config, **options))

    return change


OTHER = [
    ("reference", {"change": lambda models: nudge(models.reference.conv_out.weight)}),
    ("reference", {"change": lambda models: models.reference.register_to_config(norm_eps=1e-6)}),
    ("vae", {"change": lambda models: nudge(models.vae.encoder.conv_in.weight)}),
    ("vae", {"change": lambda models: models.vae.register_to_config(scaling_factor=0.5)}),
    ("text", {"change": lambda models: nudge(next(models.pipeline.text_encoder.parameters()))}),
    ("precision", {"precision": "bf16"}),
    ("fast", {"fast": "fused"}),
    ("device", {"change": lambda models: setattr(models, "device", torch.device("meta"))}),
    ("steps", {"how": replace(HOW, steps=5)}),
    ("grid", {"how": replace(HOW, grid="snap")}),
    ("evaluate_at", {"how": replace(HOW, grid="snap", evaluate_at="target")}),
    ("guidance", {"how": replace(HOW, guidance=1.0)}),
    ("schedule", {"change": scheduled(beta_end=0.013)}),
    ("schedule", {"change": scheduled(steps_offset=7)}),
    ("schedule", {"change": scheduled(set_alpha_to_one=True)}),
    ("prediction", {"change": lambda models: setattr(models, "noise_path", replace(models.noise_path, output="v"))}),
    ("empty_prompt", {"change": lambda models: models.pipeline.register_to_config(force_zeros_for_empty_prompt=True)}),
    ("latent", {"data": replace(DATA, resolution=64)}),
    ("resolution", {"data": replace(DATA, resolution=64)}),
    ("holds", {"how": replace(HOW, frozen=True)}),
]


def test_a_compiled_inversion_is_of_one_kind(world, tmp_path):
    opened(world, tmp_path, fast="compiled")
    with pytest.raises(UserError, match="fast is compiled by blocks, no adapters there, compiled as a CUDA graph, no"):
        opened(world, tmp_path, fast="compiled", cuda_graphs=True)


@pytest.mark.parametrize(("entry", "options"), OTHER)
def test_a_folder_of_another_kind_is_refused(world, tmp_path, entry, options):
    """Each entry of the manifest, with the folder's value and ours (of a digest its name alone), before anything is
    written."""
    opened(world, tmp_path / "theirs")
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    with pytest.raises(UserError) as refusal:
        opened(world, tmp_path / "theirs", **options)
    theirs, ours = (
        json.loads((cache.store.folder / "manifest.json").read_text())
        for cache in (opened(world, tmp_path / "theirs"), opened(world, tmp_path / "ours", **options))
    )
    assert theirs[entry] != ours[entry]
    said, is_digest = str(refusal.value), len(str(theirs[entry])) == 32
    named = said.partition("not the same: ")[2].partition(")")[0].partition(";")[0].split(", ")
    assert entry in named if is_digest else f"{entry} is {theirs[entry]} there, {ours[entry]} here" in said
    assert theirs["reference"] not in said  # a digest tells nobody anything
    assert "name another folder" in str(refusal.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}


def test_what_leaves_records_alone_is_welcome(world, tmp_path):
    opened(world, tmp_path)
    opened(world, tmp_path, how=replace(HOW, batch=7), data=DataConfig(crop="random", flip=False, prompt_dropout=0.5))
    opened(world, tmp_path, objective=ObjectiveConfig(5.0, "rms", 0.5, Timesteps(5, 800)), gradient_checkpointing=True)
    opened(world, tmp_path, change=lambda models: nudge(models.policy.conv_out.weight))


@pytest.mark.parametrize(("highest", "answers"), [(999, 4), (750, 4), (749, 3), (250, 2), (3, 1), (0, 1)])
def test_no_answer_beyond_the_highest_timestep(world, tmp_path, highest, answers):
    """Levels 249, 499, 749, 999. A folder with more answers serves; one with fewer is refused."""
    objective = ObjectiveConfig(timesteps=Timesteps(0, highest))
    cache = opened(world, tmp_path / "own", objective=objective)
    assert cache.form.outputs == answers and cache.record_bytes == 4 * 256 + 8 + answers * (4 * 256 + 8) + 33
    full = opened(world, tmp_path / "full")
    shared = opened(world, tmp_path / "full", objective=objective)
    assert shared.form.outputs == full.form.outputs == 4 and shared.form.highest == full.form.highest == 750
    if answers < 4:
        with pytest.raises(UserError, match=rf"\(answers is {answers} there, 4 here\); name another folder"):
            opened(world, tmp_path / "own")


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_another_library_is_refused(world, tmp_path, monkeypatch, package):
    opened(world, tmp_path)
    version = trajectory_cache.version
    monkeypatch.setattr(trajectory_cache, "version", lambda name: "9.9" if name == package else version(name))
    with pytest.raises(UserError, match=rf"\({package} is [\w.+]+ there, 9\.9 here\)"):
        opened(world, tmp_path)


def test_other_frozen_steps_are_refused(world, tmp_path):
    how = replace(HOW, frozen=True)
    opened(world, tmp_path / "sd", how=how)
    for objective, words in (
        (ObjectiveConfig(timesteps=Timesteps(1, 999)), r"timesteps is \[0, 999\] there, \[1, 999\] here"),
        (ObjectiveConfig(tau_norm="rms"), "tau_norm is none there, rms here"),
    ):
        with pytest.raises(UserError, match=words):
            opened(world, tmp_path / "sd", how=how, objective=objective)
    opened(world, tmp_path / "xl", base="xl")
    with pytest.raises(UserError, match="micro_conditioning is image there, published here"):
        opened(world, tmp_path / "xl", base="xl", micro_conditioning="published")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fast", ["off", "fused"])
def test_an_adapters_reference_is_its_base(world, tmp_path, precision, fast):
    """One folder for both, but where an adapter makes the fused inversion take another kernel."""
    options = {"precision": precision, "fast": fast}
    opened(world, tmp_path, **options)
    trained = {"lora": LoraSettings(4), "change": lambda models: models.weights.working[1].add_(1.0), **options}
    if fast == "off":
        opened(world, tmp_path, **trained)
    else:
        with pytest.raises(UserError, match=r"\(fast is fused, no adapters there, fused, adapters here\)"):
            opened(world, tmp_path, **trained)


@pytest.mark.parametrize(("grid", "evaluate_at"), GRIDS)
def test_grids_without_global_levels_are_refused(world, tmp_path, grid, evaluate_at):
    """Naming those that work; a frozen step has one t and may take any."""
    how = replace(HOW, grid=grid, evaluate_at=evaluate_at)
    if (grid, evaluate_at) in GLOBAL:
        opened(world, tmp_path, how=how)
    else:
        with pytest.raises(UserError) as refusal:
            opened(world, tmp_path, how=how)
        assert f"inversion.grid={grid} with evaluate_at={evaluate_at}" in str(refusal.value)
        names = str(refusal.value).split("can be cached: ")[1].split(";")[0].split(", ")
        assert {tuple(name.rstrip(")").split(" (")) for name in names} == GLOBAL and not any(tmp_path.iterdir())
    opened(world, tmp_path / "frozen", how=replace(how, frozen=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_record_bytes_are_what_lies_on_disk(world, tmp_path, precision, frozen):
    """A full shard of the tiny model's, headers left out of the account: they are below 1 % of it."""
    cache = opened(world, tmp_path, how=replace(HOW, frozen=frozen), precision=precision)
    latents = torch.zeros(256, 1, *cache.form.latent)
    answers = torch.zeros(256, max(1, cache.form.outputs), *cache.form.latent, dtype=cache.form.dtype)
    parts = (
        {"x_0": latents, "x_t": latents.clone(), "answer": answers} if frozen else {"x_0": latents, "answers": answers}
    )
    cache.store.write([digest(b"%d" % i) for i in range(256)], parts)
    (shard,) = tmp_path.glob("*.safetensors")
    assert shard.stat().st_size == pytest.approx(256 * cache.record_bytes, rel=0.01)
    assert shard.stat().st_size >= 256 * cache.record_bytes


@pytest.mark.parametrize(("name", "side"), [("SD1.5", 64), ("SDXL", 128)])
def test_disk_table_of_the_documentation(name, side):
    """docs/sweep.md says what record_bytes computes, for the paper's 400 x 1024 pairs."""
    lines = (Path(__file__).resolve().parents[2] / "docs" / "sweep.md").read_text().splitlines()
    for n in (10, 30, 0):
        cache = TrajectoryCache(
            store=None,
            form=TrajectoryRecord(999, n, (4, side, side), torch.bfloat16),
            frozen=n == 0,
            prompted=False,
            vae_sample=False,
            told_sizes=False,
            views=2.0,
        )
        size = cache.record_bytes
        kept = "" if n == 0 else f"{(size + n * (4 * 4 * side**2 + 8)) * 819_200 / 2**30:.2g}"
        (line,) = [line for line in lines if line.startswith(f"| {name}, bf16, {f'n = {n}' if n else 'frozen'} |")]
        bytes_, all_, with_states = (cell.strip() for cell in line.split("|")[2:5])
        assert (bytes_, all_) == (f"{size:,}", f"{size * 819_200 / 2**30:.0f} GiB")
        assert not kept or float(kept) == float(with_states.removesuffix(" GiB"))


@pytest.mark.parametrize(
    ("data", "how", "images"),
    [
        ({}, {}, 4 * 30),  # two images a pair, two ways round
        ({"flip": False}, {}, 2 * 30),
        ({"flip": False, "prompt_dropout": 0.2}, {}, 2 * 30),  # the prompt is no part of an unconditional record
        ({"flip": False, "prompt_dropout": 0.2}, {"guidance": 1.0}, 4 * 30),
        ({"flip": False, "prompt_dropout": 1.0}, {"guidance": 1.0}, 2 * 30),
        ({"prompt_dropout": 0.2}, {"frozen": True}, 8 * 30),
        ({"crop": "random"}, {}, 2 * 1000),  # every position has a view of its own
        ({"vae_sample": True}, {}, 2 * 1000),
    ],
)
def test_disk_need(world, tmp_path, monkeypatch, data, how, images):
    """All views of the source or all images of the run, whichever is less; less what is there; refused where it does
    not fit."""
    cache = opened(world, tmp_path / "a" / "b", data=replace(DATA, **data), how=replace(HOW, **how))
    for own, processes, wanted in ((1000, 1, images), (20, 1, 40), (1000, 2, min(2 * images, 2000))):
        cache.store.places = {str(i): (tmp_path, i) for i in range(7)}
        need = (wanted - 7) * cache.record_bytes
        monkeypatch.setattr(trajectory_cache.shutil, "disk_usage", lambda path, need=need: SimpleNamespace(free=need))
        text, *more = cache.notes(own // 10, 10, 30, processes)
        for words in (f"{wanted:,} images x {cache.record_bytes:,} bytes", "7 there", f"{need / 2**30:.3g} GiB free"):
            assert words in text
        assert ["data.vae_sample=false" in line for line in more] == [True] * bool(data.get("vae_sample"))
        monkeypatch.setattr(
            trajectory_cache.shutil, "disk_usage", lambda path, need=need: SimpleNamespace(free=need - 1)
        )
        with pytest.raises(UserError, match=r"GiB more .* free on the disk of .*; take another disk"):
            cache.notes(own // 10, 10, 30, processes)
        cache.store.places = {str(i): (tmp_path, i) for i in range(9999)}
        assert cache.notes(own // 10, 10, 30, processes)[0].startswith("inversion.cache: at most 0 GiB more")
