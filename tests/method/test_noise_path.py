"""The DDPM path against float64 NumPy, and the interface itself: a rectified flow, written here in thirty lines, goes
through schedule, inversion, solvers, target, objective, step and cache, on data whose path is known exactly."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import one_level, save_pairs, tiny_pipeline

from inpo_fast.caches.trajectory_cache import open_trajectory_cache
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.ddpm_path import CLEAN, DDPMPath
from inpo_fast.method.inversion import check_inversion, evaluations_of, invert
from inpo_fast.method.inversion_schedule import inversion_schedule, shares_prefix
from inpo_fast.method.noise_path import NoisePath, noised, per_image, target
from inpo_fast.method.objectives import evaluate
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
ROUNDED = 2.0**-23  # fp32 coefficients of a float64 computation: half an ulp, 2^-24
KEYS = [("t", 0, position) for position in range(400)]


class Flow(NoisePath):
    """x_s = (1 - s) x_0 + s eps with 0 < s <= 1; the network predicts sign (eps - x_0)."""

    clean, output, implicit_steps, identity = 0.0, "velocity", True, "rectified flow"

    def __init__(self, time_of=lambda s: 1000 * s, sign: float = 1.0, shift: float = 1.0):
        self.time_of, self.sign, self.shift = time_of, sign, shift

    def check(self, t, steps):
        if not (t.is_floating_point() and t.ndim == 1 and ((t > 0) & (t <= 1)).all() and steps >= 1):
            raise ValueError("s must be floating (M,) in 0..1, 0 excluded")

    def a_s(self, t):
        return (1 - t).float(), t.float()

    def network_time(self, t):
        return self.time_of(t).float()

    def global_levels(self, steps):
        s = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return self.shift * s / (1 + (self.shift - 1) * s)

    def own_levels(self, t, steps):
        return t[:, None] * torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def all_levels(self, steps):
        return self.global_levels(4 * steps)[1:]

    def step_coefficients(self, levels, grid):
        q = self.sign * levels.diff(dim=1)
        return torch.ones_like(q), q, torch.zeros_like(q)

    def noise_from_output(self, output, x, a, s):
        return x + self.sign * per_image(a) * output

    def part(self, t, parts):
        return (t * parts).long().clamp_max(parts - 1)

    def draw_timesteps(self, span, keys):
        return self._timesteps(span, torch.tensor([keyed_rng.uniform(*key) for key in keys], dtype=torch.float64))

    def possible_timesteps(self, span):
        return self._timesteps(span, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)

    def _timesteps(self, span, first):
        """Logit-normal: the quantiles of uniform numbers in span's share of 0..1, K of them evenly spaced around."""
        u = (first + torch.arange(span.per_pair)[:, None] / span.per_pair) % 1
        return torch.special.ndtri((span.min + u * (span.max + 1 - span.min)) / 1000).sigmoid()


# DDPM


@pytest.mark.parametrize("output", ["epsilon", "v"])
def test_ddpm_steps_against_numpy(output):
    """From level to level in noise: x' = (a'/a) x + (s' - s a'/a) eps. With v the same point, eps = a v + s x in it."""
    path = replace(DDPMPath.of(DDIMScheduler(**SD15)), output=output)
    abar = np.append(path.abar.numpy().astype(np.float64), 1.0)
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    levels = np.array([[CLEAN, 0, 1, 500, 999], [CLEAN, 99, 99, 998, 999]])
    p, q, sigma = (c.numpy() for c in path.step_coefficients(torch.from_numpy(levels), "exact"))
    old, new = levels[:, :-1], levels[:, 1:]
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, 2, 4))
    eps = a[old] * v + s[old] * x if output == "v" else v
    np.testing.assert_allclose(
        p * x + q * v, a[new] / a[old] * x + (s[new] - s[old] * a[new] / a[old]) * eps, rtol=1e-12
    )
    variance = (s[old] / s[new]) ** 2 * np.maximum(1 - abar[new] / abar[old], 0)
    np.testing.assert_allclose(sigma, np.sqrt(variance), rtol=1e-12)
    assert p.dtype == q.dtype == sigma.dtype == np.float64


def test_ddpm_levels():
    path = DDPMPath.of(DDIMScheduler(**SD15))
    a, s = path.a_s(torch.tensor([CLEAN, 0, 999]))
    abar = np.append(1.0, path.abar[[0, 999]].numpy().astype(np.float64))
    np.testing.assert_allclose(a.numpy(), np.sqrt(abar), rtol=ROUNDED)
    np.testing.assert_allclose(s.numpy(), np.sqrt(1 - abar), rtol=ROUNDED)
    assert path.clean == CLEAN and path.network_time(torch.tensor([CLEAN, 0, 7])).tolist() == [0, 0, 7]
    assert path.global_levels(4).tolist() == [CLEAN, 249, 499, 749, 999]
    assert path.own_levels(torch.tensor([0, 10]), 4).tolist() == [[CLEAN, 0, 0, 0, 0], [CLEAN, 3, 5, 8, 10]]
    assert path.all_levels(3).tolist() == list(range(1000))
    for parts in (1, 5, 7):
        want = [next(b for b in range(parts) if t < 1000 * (b + 1) / parts) for t in range(1000)]
        assert path.part(torch.arange(1000), parts).tolist() == want


def test_ddpm_reads_what_the_network_predicts():
    """Noise comes back untouched; v = a eps - s x_0 gives eps in fp32, with the gradient a."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    path, kinds = DDPMPath.of(DDIMScheduler(**SD15)), ("epsilon", "v_prediction")
    assert [DDPMPath.of(DDIMScheduler(**SD15, prediction_type=kind)).output for kind in kinds] == ["epsilon", "v"]
    a, s = path.a_s(torch.tensor([0, 500, 999]))
    x = noised(x_0, eps, a, s)
    assert path.noise_from_output(eps, x, a, s) is eps and path.implicit_steps
    path = replace(path, output="v")
    v = (per_image(a) * eps - per_image(s) * x_0).requires_grad_()
    noise = path.noise_from_output(v, x, a, s)
    torch.testing.assert_close(noise.detach(), eps, rtol=0, atol=1e-5)
    noise.sum().backward()
    assert torch.equal(v.grad, per_image(a).expand_as(v)) and not path.implicit_steps
    assert path.noise_from_output(v.detach().bfloat16(), x, a, s).dtype == torch.float32


def test_ddpm_draws_timesteps():
    """The first from its key alone, uniform on the range; `possible_timesteps` has every draw once."""
    path, span = DDPMPath.of(DDIMScheduler(**SD15)), Timesteps(100, 899, 4)
    t = path.draw_timesteps(span, KEYS)
    assert t.shape == (4, 400) and t[0].tolist() == [keyed_rng.integer(100, 899, *key) for key in KEYS]
    assert torch.equal(path.draw_timesteps(span, KEYS[7:9]), t[:, 7:9]) and path.draw_timesteps(span, []).shape == (
        4,
        0,
    )
    every = path.possible_timesteps(span)
    assert every.shape == (4, 800) and torch.equal(every[:, t[0] - 100], t)
    assert torch.equal(every[0], torch.arange(100, 900))


def test_identity_is_written_as_ever():
    """Into the manifests of caches: a change of one character closes them."""
    path = DDPMPath(torch.tensor([0.75, 0.5, 0.1]), 0.75, 1, "v")
    assert path.identity == "([0.75, 0.5, 0.10000000149011612], 0.75, 1)" and path.output == "v"
    assert DDPMPath.of(DDIMScheduler()).output == "epsilon"


# a rectified flow


def test_flow_schedule_by_hand():
    path, s = Flow(), torch.tensor([0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = inversion_schedule(path, s, steps=2)
    assert found.levels.tolist() == [[0, 0.25, 0.25], [0, 0.5, 0.5], [0, 0.5, 0.9], [0, 0.5, 1]]
    assert found.evaluations.tolist() == [1, 1, 2, 2] and (found.p == 1).all() and not found.sigma.any()
    torch.testing.assert_close(found.q, torch.tensor([[0.25, 0], [0.5, 0], [0.5, 0.4], [0.5, 0.5]]))
    assert found.times.dtype == torch.float32 and found.times[2].tolist() == [0, 500]
    there = inversion_schedule(path, s.float(), steps=2, evaluate_at="target")
    torch.testing.assert_close(there.times[2], torch.tensor([500.0, 900.0]))
    assert inversion_schedule(path, s, steps=2, grid="snap").levels[:, 1:].tolist() == [[0.5, 0.5]] * 2 + [[0.5, 1]] * 2
    assert inversion_schedule(path, s, steps=2, grid="spread").levels[0].tolist() == [0, 0.125, 0.25]
    assert Flow(shift=3.0).global_levels(2).tolist() == [0, 0.75, 1]
    assert inversion_schedule(Flow(lambda s: 1 - s, sign=-1.0), s, steps=2).q[3].tolist() == [-0.5, -0.5]
    assert inversion_schedule(Flow(lambda s: 1 - s), s, steps=2).times[3].tolist() == [1, 0.5]


def test_flow_has_grids_of_its_own():
    path = Flow()
    for grid, at in product(path.grids, ("source", "target")):
        good = grid == "snap" or (grid, at) == ("exact", "source")
        assert shares_prefix(path, steps=5, grid=grid, evaluate_at=at) == good, (grid, at)
    with pytest.raises(ValueError, match=r"unknown inversion grid 'diffusers-0\.22'; one of exact, spread, snap"):
        inversion_schedule(path, torch.ones(1), steps=5, grid="diffusers-0.22")
    with pytest.raises(UserError, match=r"grid=diffusers-0\.22 is not of this model; take one of exact, spread, snap"):
        check_inversion(InversionConfig(grid="diffusers-0.22"), path)
    check_inversion(InversionConfig(estimator="renoise"), path)
    v = DDPMPath.of(DDIMScheduler(prediction_type="v_prediction"))
    check_inversion(InversionConfig(grid="diffusers-0.22"), v)
    with pytest.raises(
        UserError, match=r"estimator=renoise is for models that predict noise, this one predicts v; take"
    ):
        check_inversion(InversionConfig(estimator="renoise"), v)


SD = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)[:, None, None]  # of the data, by channel
LEVELS = torch.tensor([0.1, 0.25, 0.5, 0.77, 1.0], dtype=torch.float64)
IMAGES = SD * torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exact(x_0, s):
    """Where the flow of Gaussian data carries x_0: its scale at s over that at 0."""
    s = per_image(s)
    return x_0 * ((1 - s) ** 2 * SD**2 + s**2).sqrt() / SD


def field(path: Flow, level_of):
    """The exact field as a network, conditioned on the path's time: v = (s - (1 - s) d^2) / ((1 - s)^2 d^2 + s^2) x."""

    def predict(x, time, rows):
        s = per_image(level_of(time.double()))
        return path.sign * (s - (1 - s) * SD**2) / ((1 - s) ** 2 * SD**2 + s**2) * x

    return predict


FLOWS = {
    "1000 s": (Flow(), lambda time: time / 1000),
    "1 - s, minus v": (Flow(lambda s: 1 - s, sign=-1.0), lambda time: 1 - time),
    "shifted": (Flow(shift=1 / 3), lambda time: time / 1000),
}


@pytest.mark.parametrize(("path", "level_of"), FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize(("estimator", "factor"), [("ddim", 2), ("renoise", 4)])
def test_errors_of_the_inverted_flow_fall_with_the_order(path, level_of, estimator, factor):
    """Half the step: half of Euler's distance to the exact path at every level, a quarter of Heun's."""

    def distance(steps: int) -> np.ndarray:
        found = inversion_schedule(path, LEVELS, steps=steps, grid="spread")
        x, spent = invert(field(path, level_of), IMAGES, found, batch=2, estimator=estimator)
        assert spent == len(LEVELS) * steps * (2 if estimator == "renoise" else 1) and x.dtype == torch.float64
        return (x - exact(IMAGES, LEVELS)).square().mean((1, 2, 3)).sqrt().numpy()

    coarse, fine = distance(20), distance(40)
    assert (fine < 0.05).all()
    assert (coarse / fine > 0.9 * factor).all() and (coarse / fine < 1.1 * factor).all(), coarse / fine


def test_global_levels_of_the_flow_end_at_each_own_level():
    """Mixed levels in one batch, on the grid that all share, some of them from one trajectory."""
    path, level_of = FLOWS["1000 s"]
    found = inversion_schedule(path, LEVELS, steps=200)
    x, spent = invert(field(path, level_of), IMAGES, found, batch=3)
    assert spent == int(found.evaluations.sum()) == sum(math.ceil(200 * s) for s in LEVELS.tolist())
    assert (x - exact(IMAGES, LEVELS)).abs().max() < 0.03
    shared, once = invert(
        field(path, level_of), IMAGES[:1], inversion_schedule(path, LEVELS, steps=200), batch=3, each=5
    )
    assert once == 200 == evaluations_of(InversionConfig(steps=200), path, LEVELS[:, None]).item()
    assert (shared - exact(IMAGES[:1].expand_as(IMAGES), LEVELS)).abs().max() < 0.03


def test_a_straight_flow_is_its_own_target():
    """Constant v: x_s = x_0 + s v, so tau = v + x_0, and v itself with a = 1, in any number of steps."""
    v = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for steps in (1, 7):
        found = inversion_schedule(Flow(), LEVELS, steps=steps)
        x, _ = invert(lambda x, time, rows: v.expand_as(x), IMAGES, found, batch=4)
        tau = target(x, IMAGES, 1 - LEVELS, LEVELS)
        torch.testing.assert_close(tau, v + IMAGES, rtol=0, atol=1e-5)
        torch.testing.assert_close(target(x, IMAGES, torch.ones(5), LEVELS), v.expand_as(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_objective_of_a_flow(fused, sign):
    """Errors of noise are (1 - s)^2 times those of velocities, which the same call gives with a = 1; logit 0 at step 0;
    swapped sides negate it; the gradient goes through to the network's output."""
    path, B = Flow(sign=sign), 2
    s = torch.tensor([0.3, 0.9]).repeat(2).double()
    x_0, x = IMAGES[:4], exact(IMAGES[:4], s)
    exact_v = field(path, lambda time: time / 1000)(x, path.network_time(s), None)
    rng = torch.Generator().manual_seed(2)
    policy, reference = exact_v + 0.1 * torch.randn(2, 4, 3, 4, 4, dtype=torch.float64, generator=rng)
    a, weight, config = 1 - s, torch.ones(B, dtype=torch.float64), ObjectiveConfig(beta=5.0)

    def objective(outputs, order=slice(None)):
        noise = (path.noise_from_output(o, x, a, s)[order] for o in outputs)
        return evaluate("inpo", config, *noise, x[order], x_0[order], a, s, weight, fused=fused)

    found = objective((policy, reference))
    velocities = (sign * policy, sign * reference)
    straight = evaluate("inpo", config, *velocities, x, x_0, torch.ones_like(a), s, weight, fused=fused)
    torch.testing.assert_close(found.image[:, :2], a[:, None] ** 2 * straight.image[:, :2], rtol=1e-12, atol=0)
    assert torch.equal(objective((reference, reference)).logit, torch.zeros(B, dtype=torch.float64))
    torch.testing.assert_close(objective((policy, reference), [2, 3, 0, 1]).logit, -found.logit)

    policy.requires_grad_()
    path.noise_from_output(policy, x, a, s).backward(found.dpred)
    torch.testing.assert_close(policy.grad, sign * per_image(a) * found.dpred)
    tau = target(x, x_0, a, s)
    e, r = ((path.noise_from_output(o.detach(), x, a, s) - tau).square().mean((1, 2, 3)) for o in (policy, reference))
    torch.testing.assert_close(found.logit, -0.5 * 5.0 * ((e[:B] - e[B:]) - (r[:B] - r[B:])))


def test_flow_draws_timesteps():
    """Logit-normal, K of a pair evenly spaced in probability, whatever else is in the step."""
    path, span = Flow(), Timesteps(per_pair=4)
    s = path.draw_timesteps(span, KEYS)
    assert s.shape == (4, 400) and s.dtype == torch.float64 and (s > 0).all() and (s <= 1).all()
    assert torch.equal(path.draw_timesteps(span, KEYS[7:9]), s[:, 7:9])
    quarters = torch.tensor([-0.6744897501960817, 0.0, 0.6744897501960817], dtype=torch.float64).sigmoid()
    assert (torch.bucketize(s, quarters).sort(0).values == torch.arange(4)[:, None]).all()
    every = path.possible_timesteps(span).logit()
    assert every.mean().abs() < 1e-6 and every.std() == pytest.approx(1.0, abs=0.01)
    assert path.possible_timesteps(Timesteps(500, 999)).min() > 0.5
    assert path.part(torch.tensor([1e-6, 0.19, 0.2, 0.99, 1.0]), 5).tolist() == [0, 0, 1, 4, 4]


@pytest.mark.parametrize("grid", ["exact", "spread"])
def test_a_training_step_asks_nothing_else_of_the_path(tmp_path, grid):
    """A UNet that is taken for a flow's network: one step, and on the exact grid the same from a cache."""
    models = Models(one_level(tiny_pipeline()), torch.device("cpu"))
    models.noise_path = Flow(lambda s: 1000 * s, sign=-1.0)
    items = next(
        PairLoader(
            open_source(save_pairs(tmp_path / "pairs.parquet")), DataConfig(), resolution=32, seed=0, rank=0, world=1
        ).steps(0, 1, 4)
    )
    how = InversionConfig(steps=5, batch=1, grid=grid, model="reference")
    config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=500.0, timesteps=Timesteps(per_pair=2)),
        inversion=how,
        micro_batch=2,
        vae_sample=False,
        seed=0,
    )
    batch = make_step_batch(items, models, config, models.encode_empty())
    assert batch.times.dtype == torch.float32 and batch.times.min() > 1
    metrics, logits = train_step(batch, models, config, 4, clip=math.inf)
    values, gradient = metrics.values(), [p.grad.clone() for p in models.parameters()]
    assert torch.equal(logits, torch.zeros(4)) and values["loss"] == pytest.approx(math.log(2))
    assert math.isfinite(values["grad_norm"]) and values["grad_norm"] > 0
    if grid == "spread":
        return
    for spent in (5 * 8, 0):  # written, then read
        cache = open_trajectory_cache(models, replace(how, cache=str(tmp_path / "c")), config.objective, DataConfig())
        cache.store.start()
        cached = replace(config, trajectory_cache=cache)
        batch = make_step_batch(items, models, cached, models.encode_empty())
        metrics, _ = train_step(batch, models, cached, 4, clip=math.inf)
        assert metrics.values()["unet_evaluations"] == spent + 2 * 2 * 8
        for p, want in zip(models.parameters(), gradient, strict=True):
            assert (p.grad - want).norm() <= 1e-5 * want.norm() + 1e-9
