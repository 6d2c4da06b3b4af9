"""inversion.frozen: a run's second time is the policy's step alone, and what it computes is the first time's."""

import math
from dataclasses import replace

import pytest
import torch
from sweep_runs import (
    DATA,
    FROZEN,
    HOW,
    OBJECTIVE,
    PAIRS,
    STEP,
    STEPS,
    loader,
    models_of,
    recipe_of,
    run,
    same,
    save_world,
)

from inpo_fast.method.config import ObjectiveConfig, Timesteps
from inpo_fast.models.models import Models
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import make_step_batch


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def policy_alone(monkeypatch):
    """From its call on, VAE and reference fail when they are asked."""
    predict = Models.predict

    def forbidden(*_):
        raise AssertionError("asked")

    def policy(self, who, *rest):
        return (forbidden if who == "reference" else predict)(self, who, *rest)

    def watch():
        monkeypatch.setattr(Models, "encode_images", forbidden)
        monkeypatch.setattr(Models, "predict", policy)

    return watch


@pytest.mark.parametrize(
    ("base", "objective", "how", "precision"),
    [
        ("sd", OBJECTIVE, FROZEN, "fp32"),
        ("sd", ObjectiveConfig(beta=500.0, tau_norm="rms", timesteps=Timesteps(200, 800)), FROZEN, "bf16"),
        ("sd", OBJECTIVE, replace(FROZEN, grid="spread", guidance=1.0), "fp32"),
        ("xl", OBJECTIVE, replace(FROZEN, grid="snap"), "bf16"),
    ],
    ids=["plain", "rms", "spread", "xl"],
)
def test_a_frozen_step_is_the_policys_alone(world, tmp_path, policy_alone, base, objective, how, precision):
    """The second run equals the first, which starts at ln 2 exactly; it asks neither VAE nor reference."""
    options = {"base": base, "objective": objective, "how": how, "precision": precision}
    cold = run(world, tmp_path, **options)
    assert torch.equal(cold.logits[0], torch.zeros(PAIRS)) and cold.each("trajectories_hit")[0] == 0
    policy_alone()
    warm = run(world, tmp_path, **options)
    assert same(cold, warm) and warm.each("margin")[-1] != 0
    assert warm.each("unet_evaluations") == STEPS * [STEP / 2] and warm.each("trajectories_hit") == STEPS * [1]
    other = run(world, tmp_path, **options | {"micro_batch": 4, "steps": 1})  # to rounding times beta / 2
    assert other.each("loss")[0] == pytest.approx(math.log(2), abs=1e-4 if precision == "fp32" else 0.2)


@pytest.mark.parametrize(("base", "precision"), [("sd", "fp32"), ("xl", "bf16")])
def test_fused_it_starts_at_ln_2_too(world, tmp_path, base, precision):
    """The UNet's output is channels_last there, what the cache keeps is not: sums would be rounded otherwise."""
    cold = run(world, tmp_path, base=base, how=FROZEN, precision=precision, fast="fused", steps=1)
    assert torch.equal(cold.logits[0], torch.zeros(PAIRS))


@pytest.mark.parametrize("tau_norm", ["none", "rms"])
def test_frozen_records_hold_what_a_plain_step_computes(world, tmp_path, tau_norm):
    """One pair at a time: the gradient of the plain recipe, whose t is put to the pair's own."""
    models, objective = models_of(world), ObjectiveConfig(beta=500.0, tau_norm=tau_norm)
    with torch.no_grad():
        models.policy.conv_out.weight.mul_(1.1)
    how, (items,) = replace(HOW, frozen=True), loader(world, 0, DATA, 0, 1)
    got = []
    for _ in range(2):
        recipe = recipe_of(models, tmp_path, how, objective, micro_batch=1)
        step_batch = make_step_batch(items, models, recipe, models.encode_empty())
        metrics, logits = train_step(step_batch, models, recipe, PAIRS, math.inf)
        got.append([logits, *(g.clone() for g in models.weights.gradients)])
    assert metrics.values()["unet_evaluations"] == STEP / 2 and logits.abs().max() > 0
    recipe = recipe_of(models, None, HOW, objective, micro_batch=1)
    own = {name: getattr(step_batch, name) for name in ("t", "times", "a", "s")}
    plain = replace(make_step_batch(items, models, recipe, models.encode_empty()), **own)
    _, logits = train_step(plain, models, recipe, PAIRS, math.inf)
    for a, b, c in zip(*got, [logits, *models.weights.gradients], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(("base", "guidance"), [("sd", 1.0), ("xl", 0.0)])
def test_frozen_x_t_of_what_is_new(world, tmp_path, base, guidance):
    """In a window that is partly there each image is inverted to its own t with its own conditioning, bit for bit."""
    models, how = models_of(world, base), replace(HOW, frozen=True, guidance=guidance)
    run(world, tmp_path, base=base, how=how, seed=5, steps=1)
    recipe, (items,) = recipe_of(models, tmp_path, how), loader(world, 0, DATA, 0, 1)
    step_batch = make_step_batch(items, models, recipe, models.encode_empty())
    assert 0 < len(step_batch.cached.missing) < 2 * PAIRS and step_batch.cached.missing != list(
        range(len(step_batch.cached.missing))
    )
    got, want = (noisy_latents(w, models, recipe)[0] for w in (step_batch, replace(step_batch, cached=None)))
    assert torch.equal(got, want)


def test_frozen_t_belongs_to_the_pair(world, tmp_path):
    """Whatever seed, epoch and mirror; within the span; and pairs differ in it."""
    models, objective = models_of(world), ObjectiveConfig(timesteps=Timesteps(300, 420))
    seen: dict[str, set[int]] = {}
    for seed in range(3):
        recipe = recipe_of(models, tmp_path, FROZEN, objective, seed=seed)
        for items in loader(world, seed, DATA, 0, 4):
            step_batch = make_step_batch(items, models, recipe, models.encode_empty())
            for item, t in zip(items, step_batch.t[0].tolist(), strict=True):
                seen.setdefault(item.id, set()).add(t)
    values = {t for own in seen.values() for t in own}
    assert len(seen) == 7 and all(len(own) == 1 for own in seen.values())
    assert len(values) > 4 and min(values) >= 300 and max(values) <= 420


def test_frozen_and_partly_there(world, tmp_path):
    """What is there is taken, what is new is predicted, each once; afterwards all of it is there."""
    run(world, tmp_path, how=FROZEN, seed=5, steps=1)
    part, warm = run(world, tmp_path, how=FROZEN), run(world, tmp_path, how=FROZEN)
    hit, spent = part.each("trajectories_hit")[0], part.each("unet_evaluations")[0]
    new = round((1 - hit) * 2 * PAIRS)
    assert 0 < hit < 1 and STEP / 2 + 2 * new <= spent <= STEP / 2 + (1 + HOW.steps) * new
    assert same(part, warm) and warm.each("unet_evaluations") == STEPS * [STEP / 2]
    assert part.logits[0].abs().max() < 1e-3  # the new ones in smaller batches than the policy's: rounding, times 250
