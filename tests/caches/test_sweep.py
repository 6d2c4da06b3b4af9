"""Training with inversion.cache against training without it: the same bits, at the cost of what is new."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from sweep_runs import DATA, HOW, PAIRS, STEP, STEPS, loader, models_of, recipe_of, run, same, save_world

from inpo_fast.caches.frozen_steps import FrozenSteps
from inpo_fast.caches.trajectory_replay import TrajectoryReplay
from inpo_fast.data.images import decode, make_view
from inpo_fast.data.loader import DataConfig
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import ObjectiveConfig
from inpo_fast.runtime.memory import TooLarge
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import make_step_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


KINDS = {"sd": ("sd", HOW), "w1": ("sd", replace(HOW, guidance=1.0, grid="snap")), "xl": ("xl", HOW)}
SHORT = {("sd", "bf16"), ("xl", "fp32")}  # each size and each precision; the others are slow


@pytest.mark.parametrize(
    ("base", "how", "precision"),
    [
        pytest.param(*KINDS[name], precision, id=f"{name}-{precision}", marks=[pytest.mark.slow] * (not short))
        for name, precision in product(KINDS, ("fp32", "bf16"))
        for short in [(name, precision) in SHORT]
    ],
)
def test_cold_warm_and_mixed_equal_the_uncached_run(world, tmp_path, base, how, precision):
    """Bit for bit, one image at a time: batches round. mixed: another seed's run has left some of the views."""
    options = {"base": base, "how": how, "precision": precision}
    plain = run(world, **options)
    cold, warm = run(world, tmp_path / "cache", **options), run(world, tmp_path / "cache", **options)
    run(world, tmp_path / "mixed", seed=5, steps=1, **options)
    part = run(world, tmp_path / "mixed", **options)
    assert all(math.isfinite(loss) for loss in plain.each("loss")) and plain.each("margin")[-1] != 0
    assert same(plain, cold) and same(plain, warm) and same(plain, part)
    assert cold.each("trajectories_hit")[0] == 0 and 0 < sum(part.each("trajectories_hit")) < STEPS
    assert warm.each("trajectories_hit") == STEPS * [1] and warm.each("unet_evaluations") == STEPS * [STEP]
    for outcome in (cold, part):  # an answer a step for each new image
        new = [hit < 1 for hit in outcome.each("trajectories_hit")]
        spent = [round((1 - hit) * 2 * PAIRS) * HOW.steps for hit in outcome.each("trajectories_hit")]
        assert outcome.each("unet_evaluations") == [STEP + own for own in spent] and any(new)


def test_batches_change_rounding_only(world, tmp_path):
    """Cold and warm are equal at any batch; uncached to fp32's rounding, 1e-7 in each of three evaluations."""
    how = replace(HOW, batch=3)
    plain = run(world, how=how)
    cold, warm = run(world, tmp_path / "cache", how=how), run(world, tmp_path / "cache", how=how)
    run(world, tmp_path / "mixed", seed=5, steps=1, how=how)
    assert same(cold, warm)
    for other in (cold, run(world, tmp_path / "mixed", how=how)):
        for name in ("tau_rms_winner", "tau_rms_loser", "winner_error", "eps_scale"):
            assert other.each(name)[0] == pytest.approx(plain.each(name)[0], rel=1e-5)
        assert other.each("grad_norm")[0] == pytest.approx(plain.each("grad_norm")[0], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [2, 64])
def test_x_t_of_other_batches(world, tmp_path, precision, batch):
    """fp32: within 1e-5 of the largest. bf16: an answer may differ in its last place, 2^-8 of it, and so may x_t."""
    models = models_of(world, precision=precision)
    x_t = []
    for folder, own in ((None, 16), (tmp_path, batch)):
        recipe = recipe_of(models, folder, replace(HOW, batch=own))
        (items,) = loader(world, 0, DATA, 0, 1)
        x_t.append(noisy_latents(make_step_batch(items, models, recipe, models.encode_empty()), models, recipe)[0])
    bound = {"fp32": 1e-5, "bf16": 2.0**-6}[precision]
    assert (x_t[0] - x_t[1]).abs().max() <= bound * x_t[0].abs().max()


def test_a_full_cache_serves_every_seed(world, tmp_path):
    """Both ways round of each picture; then a new seed, beta and lr cost reference and policy alone, same bits."""
    source, views = open_source(str(world / "pairs.parquet")), set()
    for pair in (source.read(i) for i in range(7)):
        for image, flip in product((pair.winner, pair.loser), (False, True)):
            views.add(make_view(decode(image, 10**6), 32, flip=flip, crop="center", draw=(0, 0)).pixels.tobytes())
    models = models_of(world)
    for seed in range(20):
        recipe = recipe_of(models, tmp_path, seed=seed)
        for items in loader(world, seed, DATA, 0, 4):
            noisy_latents(make_step_batch(items, models, recipe, models.encode_empty()), models, recipe)
        if len(recipe.trajectory_cache.store) == len(views):
            break
    options = {"seed": 100, "objective": ObjectiveConfig(beta=50.0, tau_norm="rms"), "lr": 1e-4}
    warm = run(world, tmp_path, **options)
    assert warm.each("unet_evaluations") == STEPS * [STEP] and same(warm, run(world, **options))
    assert len(warm.cache.store) == len(views) > 14


def test_latents_drawn_for_each_seed_serve_their_seed(world, tmp_path):
    """With data.vae_sample a record is a position's: the same seed finds all of them again, another one nothing."""
    data = DataConfig(vae_sample=True)
    cold, warm = run(world, tmp_path, data=data), run(world, tmp_path, data=data, lr=1e-3)
    assert same(cold, run(world, data=data)) and same(cold, warm)
    assert warm.each("trajectories_hit") == STEPS * [1] and len(warm.cache.store) == STEPS * 2 * PAIRS
    assert run(world, tmp_path, data=data, seed=1).each("trajectories_hit") == STEPS * [0]


def test_each_image_draws_its_own_latent(world, tmp_path):
    """In whatever batches it is encoded, and whichever others are there: to fp32's rounding."""
    models, data, latents = models_of(world), DataConfig(vae_sample=True), []
    run(world, tmp_path, data=data, steps=1)
    (items,) = loader(world, 0, data, 0, 1)
    items = [replace(items[0], position=99), *items[1:]]  # two images that are not there, in front
    for folder, batch in ((None, 1), (None, 64), (tmp_path, 1), (tmp_path, 64)):
        recipe = recipe_of(models, folder, replace(HOW, batch=batch), data=data)
        step_batch = make_step_batch(items, models, recipe, models.encode_empty())
        assert folder is None or step_batch.cached.missing == [0, 1]
        latents.append(step_batch.x_0)
    for other in latents[1:]:
        torch.testing.assert_close(other, latents[0], rtol=1e-5, atol=1e-5)


def test_an_adapter_trains_from_its_bases_cache(world, tmp_path):
    run(world, tmp_path, precision="bf16")
    warm = run(world, tmp_path, precision="bf16", rank=4)
    assert warm.each("trajectories_hit") == STEPS * [1] and same(warm, run(world, precision="bf16", rank=4))


def spoil(path: Path, part: str) -> None:
    """Flips a bit of the first row of one tensor of a shard."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header + json.loads(content[8 : 8 + header])[part]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("frozen", "part"), [(False, "answers"), (True, "x_t"), (True, "answer")])
def test_what_gets_damaged_is_made_again(world, tmp_path, caplog, monkeypatch, frozen, part):
    """Before a run, and in a window between its latents and the rest: a warning, and what the first run computed."""
    how = replace(HOW, frozen=frozen)
    options = {"how": how, "micro_batch": 1, "steps": 1}
    plain = run(world, tmp_path, **options)
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    again = run(world, tmp_path, **options)
    assert same(again, plain) and again.each("unet_evaluations") == plain.each("unet_evaluations")
    assert [record.args[0] for record in caplog.records if record.name == "inpo_fast.runtime.record_store"] == [shard]

    kind = FrozenSteps if frozen else TrajectoryReplay
    x_t = kind.x_t

    def damaged(self, *arguments):
        spoil(shard, part)
        return x_t(self, *arguments)

    monkeypatch.setattr(kind, "x_t", damaged)
    again = run(world, tmp_path, **options)
    assert same(again, plain)
    if frozen:  # its first record is read first
        assert again.each("unet_evaluations") == plain.each("unet_evaluations")
        assert again.each("trajectories_hit") == [0]
    else:  # those with more evaluations than the first record were read before it
        made = (again.each("unet_evaluations")[0] - STEP) / HOW.steps
        assert made > 0 and again.each("trajectories_hit") == [1 - made / (2 * PAIRS)]
    monkeypatch.undo()
    assert run(world, tmp_path, **options).each("trajectories_hit") == [1]  # found in the newer file


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("phase", ["inversion.batch", "train.micro_batch"])
def test_a_full_gpu_repeats_the_step_exactly(world, tmp_path, phase, frozen, monkeypatch):
    """Out of memory in either half of a step: lowered, repeated, and what was recorded is whole."""
    models = models_of(world)
    recipe = recipe_of(models, tmp_path, replace(HOW, batch=8, frozen=frozen))
    unet = models.policy if phase == "train.micro_batch" else models.reference
    forward = unet.forward

    def crowded(x, *args, **kwargs):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", crowded)
    (items,), tried = loader(world, 0, DATA, 0, 1), []
    step_batch = make_step_batch(items, models, recipe, models.encode_empty())
    while True:
        try:
            metrics, _ = train_step(step_batch, models, recipe, PAIRS, 1.0)
            break
        except TooLarge as problem:
            tried.append(problem.key)
            if problem.key == "train.micro_batch":
                recipe = replace(recipe, micro_batch=problem.size // 2)
            else:
                recipe = replace(recipe, inversion=replace(recipe.inversion, batch=problem.size // 2))
    got = [g.clone() for g in models.weights.gradients]
    if phase == "train.micro_batch":  # what was inverted is not inverted again
        assert metrics.values()["unet_evaluations"] <= STEP
    monkeypatch.undo()
    again = recipe_of(models, tmp_path, recipe.inversion, micro_batch=recipe.micro_batch)
    step_batch = make_step_batch(items, models, again, models.encode_empty())
    metrics, _ = train_step(step_batch, models, again, PAIRS, 1.0)
    assert phase in tried and metrics.values()["trajectories_hit"] == 1
    assert all(torch.equal(a, b) for a, b in zip(got, models.weights.gradients, strict=True))
