"""objective.timesteps.per_pair: a pair at several timesteps in its step, for one trajectory of the inversion.

Each timestep must be what it is alone: x_t, the noise, the gradient; only the evaluations are shared.
"""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from plans import counted_once, recipe
from sweep_runs import HOW, STEP, STEPS, run, same, save_world
from test_inversion import PATH, C, eps_of, x_0
from tiny_world import one_level, save_pairs, tiny_pipeline

from inpo_fast.config import parse
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.ddpm_path import DDPMPath, systematic_timesteps
from inpo_fast.method.inversion import evaluations_of, invert, occupancy, trajectory_serves_all
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, inversion_costs, make_step_batch

EACH, PAIRS = 3, 3
LEVELS = ("t", "times", "a", "s")  # of a batch, (K, …)
OBJECTIVE = ObjectiveConfig(beta=500.0, timesteps=Timesteps(per_pair=EACH))
STEP_CONFIG = StepConfig(
    method="inpo",
    objective=OBJECTIVE,
    inversion=InversionConfig(steps=4, batch=4),
    micro_batch=2,
    vae_sample=False,
    seed=0,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy that differs from its reference, and pairs."""
    folder = tmp_path_factory.mktemp("world")
    models = Models(one_level(tiny_pipeline()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in models.parameters():
            p.add_(0.05 * p.std().nan_to_num() * torch.randn(p.shape, generator=generator))
    source = open_source(save_pairs(folder / "pairs.parquet"))
    return models, next(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, PAIRS))


def window_of(world, how: StepConfig):
    models, items = world
    return make_step_batch(items, models, how, models.encode_empty())


def at_each(step_batch) -> list:
    """The window at each of its timesteps alone."""
    return [
        replace(
            step_batch,
            gaussian_keys=[step_batch.gaussian_keys[k]],
            **{c: getattr(step_batch, c)[k : k + 1] for c in LEVELS},
        )
        for k in range(EACH)
    ]


def gradient(models, step_batch, how: StepConfig):
    metrics, logits = train_step(step_batch, models, how, PAIRS, clip=math.inf)
    return torch.cat([p.grad.reshape(-1) for p in models.parameters()]).clone(), metrics.values(), logits


@pytest.mark.parametrize(("low", "high", "count"), [(0, 999, 4), (0, 999, 7), (100, 899, 3), (5, 5, 1), (0, 3, 4)])
def test_systematic_timesteps(low, high, count):
    """Over all first ones each of the others takes every value once; together they are one in each part."""
    first = torch.arange(low, high + 1)
    t = systematic_timesteps(first, low, high, count)
    assert t.shape == (count, len(first)) and torch.equal(t[0], first)
    for row in t:
        assert torch.equal(row.sort().values, first)
    gaps = t.sort(0).values.diff(dim=0)
    width = len(first)
    assert count == 1 or (gaps.min() >= width // count and gaps.max() <= -(-width // count))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.1])
@pytest.mark.parametrize("width", [None, 6])
def test_shared_trajectories_are_those_alone(guidance, eta, width):
    """The same eps for the same x and time, so the same bits, for as many evaluations as the furthest takes."""
    t = systematic_timesteps(torch.tensor([333, 0, 999, 1, 640, 100, 99, 2, 101, 902, 1]), 0, 999, EACH)
    keys = list(range(100, 100 + len(x_0)))
    options = {"conditional": eps_of(2 * C), "guidance": guidance, "batch": 4}
    trajectory = inversion_schedule(PATH, t.T.flatten(), steps=10, eta=eta)
    got, spent = invert(eps_of(C), x_0, trajectory, each=EACH, width=width, noise_keys=keys, **options)
    for k in range(EACH):
        alone = inversion_schedule(PATH, t[k], steps=10, eta=eta)
        want, _ = invert(eps_of(C), x_0, alone, noise_keys=keys, **options)
        assert torch.equal(got[k::EACH], want)
    furthest = trajectory.evaluations.view(-1, EACH).amax(1)
    assert spent == furthest.sum() * (2 if guidance == 3.0 else 1)


def test_only_explicit_steps_are_shared():
    trajectory = inversion_schedule(PATH, torch.full((2 * len(x_0),), 500), steps=5)
    with pytest.raises(ValueError, match="renoise"):
        invert(eps_of(C), x_0, trajectory, batch=4, estimator="renoise", each=2)


@pytest.mark.parametrize(
    ("how", "shared"),
    [
        ({}, True),
        ({"eta": 0.1}, True),
        ({"grid": "snap"}, True),
        ({"grid": "diffusers-0.22", "evaluate_at": "target"}, True),
        ({"grid": "spread"}, False),
        ({"evaluate_at": "target"}, False),
        ({"estimator": "renoise"}, False),
    ],
)
def test_x_t_of_each_moment(world, how, shared):
    """Where trajectories cannot be shared each is made alone. fp32 in batches of other sizes: 1e-5 of the largest."""
    models, how = world[0], replace(STEP_CONFIG, inversion=replace(STEP_CONFIG.inversion, **how))
    step_batch = window_of(world, how)
    assert len(step_batch.t) == EACH and trajectory_serves_all(how.inversion, models.noise_path) == shared
    got, spent = noisy_latents(step_batch, models, how)
    alone = [noisy_latents(moment, models, how) for moment in at_each(step_batch)]
    for ours, ((theirs,), _) in zip(got, alone, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert spent < sum(own for _, own in alone) if shared else spent == sum(own for _, own in alone)
    if how.inversion.estimator == "ddim":
        told = inversion_costs([item.position for item in world[1]], how, models)
        assert spent == 2 * sum(told)


@pytest.mark.parametrize("method", ["inpo", "dpo", "sft", "kto"])
def test_the_gradient_is_the_mean_of_its_timesteps(world, method):
    """Micro-batches of other sizes, too. kto's point is of all timesteps, so theirs are given that one."""
    models, how = world[0], replace(STEP_CONFIG, method=method)
    whole = window_of(world, how)
    got, values, logits = gradient(models, whole, how)
    again = gradient(models, window_of(world, how), replace(how, micro_batch=3))[0]
    assert (again - got).norm() < 1e-4 * got.norm()
    alone = [gradient(models, replace(moment, reference_point=whole.reference_point), how) for moment in at_each(whole)]
    want = torch.stack([g for g, _, _ in alone]).mean(0)
    assert (got - want).norm() < 1e-4 * want.norm()
    assert values["loss"] == pytest.approx(sum(v["loss"] for _, v, _ in alone) / EACH, rel=1e-5)
    torch.testing.assert_close(logits, torch.stack([z for _, _, z in alone]).mean(0), rtol=1e-4, atol=1e-4)
    forward = {"sft": 2, "kto": 8}.get(method, 4)  # sft: one side; kto: twice over
    if method != "inpo":
        assert values["unet_evaluations"] == EACH * PAIRS * forward
        return
    furthest = evaluations_of(how.inversion, models.noise_path, whole.t).repeat_interleave(2)
    assert values["unet_evaluations"] == EACH * PAIRS * forward + furthest.sum()
    assert values["slot_utilisation"] == pytest.approx(occupancy(furthest, how.inversion.batch))


def test_noise_is_new_at_each_timestep_and_the_first_is_as_ever(world):
    """A run with one timestep draws what it drew before there could be more."""
    models, how = world[0], replace(STEP_CONFIG, method="dpo")
    step_batch = window_of(world, how)
    one = window_of(world, replace(how, objective=ObjectiveConfig(beta=500.0)))
    x_t, _ = noisy_latents(step_batch, models, how)
    assert torch.equal(one.t, step_batch.t[:1])
    assert torch.equal(noisy_latents(one, models, how)[0], x_t[:1])
    noise = []
    for a, s, x in zip(step_batch.a, step_batch.s, x_t, strict=True):
        a, s = (c[..., None, None, None] for c in (a, s))
        noise.append((x - a * step_batch.x_0) / s)
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    torch.testing.assert_close(noise[1][:, 0], noise[1][:, 1], rtol=0, atol=1e-3)  # of both sides the same


def test_cached_trajectories_serve_all_timesteps(tmp_path):
    """inversion.cache: cold, warm and without one the same bits (batches of one); warm only the loss is computed."""
    save_world(tmp_path)
    objective = replace(OBJECTIVE, tau_norm="rms")
    plain, cold, warm = (run(tmp_path, cache, how=HOW, objective=objective) for cache in (None, *2 * [tmp_path / "c"]))
    assert same(plain, cold) and same(cold, warm)
    assert warm.each("unet_evaluations") == STEPS * [EACH * STEP]


def test_what_a_plan_says():
    """Evaluations of an image: the mean of the furthest of its timesteps, counted here one by one."""
    plain, several = recipe("sd15"), recipe("sd15", "--objective.timesteps.per_pair=4")
    one, four = counted_once(plain, 1), counted_once(several, 1)
    furthest = [max(math.ceil(((t + 250 * k) % 1000 + 1) / 100) for k in range(4)) for t in range(1000)]
    assert four.work.evaluations == pytest.approx(sum(furthest) / 1000, abs=1e-6)
    for phase in ("reference", "policy forward", "policy backward"):
        assert four.work.flop[phase] == 4 * one.work.flop[phase]
    assert four.work.flop["VAE encoding"] == one.work.flop["VAE encoding"]
    path = DDPMPath.of(DDIMScheduler())
    t = systematic_timesteps(torch.arange(1000), 0, 999, 4)
    assert evaluations_of(several.inversion, path, t).double().mean() == pytest.approx(four.work.evaluations)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--objective.timesteps.per_pair=0"], "objective.timesteps.per_pair=0: must be in 1..1000"),
        (
            ["--objective.timesteps.min=990", "--objective.timesteps.per_pair=11"],
            "objective.timesteps.per_pair=11: must be in 1..10, the number of different ones",
        ),
        (
            [
                "--objective.timesteps.per_pair=2",
                "--inversion.model=reference",
                "--inversion.cache=c",
                "--inversion.frozen=true",
            ],
            "inversion.frozen=true keeps one t of a pair, and objective.timesteps.per_pair=2; take 1",
        ),
    ],
)
def test_refusals(words, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        parse("test", words)
