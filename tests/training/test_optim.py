"""Learning rate, AdamW's settings and averaged weights against values worked out by hand and in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo_fast.config.run import OptimConfig
from inpo_fast.training.optim import Average, lr_at, make_optimizer

STEPS = 12
RISE = [0.25, 0.5, 0.75, 1.0]  # 4 steps of warm-up
LR = {
    "constant": [*RISE, *[1.0] * 8],
    "linear": [*RISE, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [*RISE, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602],
}


@pytest.mark.parametrize("decay", LR)
def test_lr_by_hand(decay):
    config = OptimConfig(lr=2.0, warmup_steps=4, decay=decay)
    got = [lr_at(step, STEPS, config) for step in range(STEPS)]
    assert got == pytest.approx([2 * value for value in LR[decay]], abs=1e-6)


@pytest.mark.parametrize("decay", LR)
def test_lr_without_warmup_and_with_warmup_alone(decay):
    none = OptimConfig(lr=2.0, warmup_steps=0, decay=decay)
    assert lr_at(0, STEPS, none) == 2.0
    longer = OptimConfig(lr=2.0, warmup_steps=40, decay=decay)
    assert [lr_at(step, STEPS, longer) for step in range(STEPS)] == pytest.approx([(s + 1) / 20 for s in range(STEPS)])
    whole = OptimConfig(lr=2.0, warmup_steps=STEPS, decay=decay)
    assert lr_at(STEPS - 1, STEPS, whole) == 2.0


@settings(deadline=None, database=None)
@given(steps=st.integers(1, 500), warmup=st.integers(0, 500), decay=st.sampled_from(["linear", "cosine"]))
def test_decay_falls_from_lr_to_almost_nothing(steps, warmup, decay):
    config = OptimConfig(lr=1.0, warmup_steps=warmup, decay=decay)
    values = [lr_at(step, steps, config) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    after = values[warmup:]
    assert after == sorted(after, reverse=True)
    if after:
        assert after[0] == 1
        assert lr_at(steps, steps, config) == pytest.approx(0, abs=1e-12)
        assert after[-1] <= (1 / len(after) if decay == "linear" else math.pi**2 / 4 / len(after) ** 2) + 1e-12


def test_adamw_gets_its_settings():
    """Two updates with unequal gradients, by hand in float64."""
    config = OptimConfig(lr=0.1, betas=(0.6, 0.7), eps=0.01, weight_decay=0.5)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = make_optimizer([weight], config)
    w, m, v = [1.0, -2.0, 0.5], [0.0] * 3, [0.0] * 3
    for number, gradient in enumerate(([0.1, -3.0, 0.0], [2.0, 1.0, -0.2]), 1):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            m[i] = 0.6 * m[i] + 0.4 * g
            v[i] = 0.7 * v[i] + 0.3 * g * g
            step = (m[i] / (1 - 0.6**number)) / (math.sqrt(v[i] / (1 - 0.7**number)) + 0.01)
            w[i] = w[i] * (1 - 0.1 * 0.5) - 0.1 * step
        assert weight.tolist() == pytest.approx(w, abs=1e-12)


def walk(steps: int) -> list[list[torch.Tensor]]:
    """The weights after each of the updates: two tensors that wander."""
    generator = torch.Generator().manual_seed(steps)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    out = []
    for _ in range(steps):
        start = [p + torch.randn(p.shape, generator=generator) for p in start]
        out.append(start)
    return out


def averaged(iterates: list[list[torch.Tensor]], config: OptimConfig, resume_at: int | None = None) -> list:
    """Average fed with the iterates; at resume_at it is rebuilt from wrong weights and given its mean back."""
    parameters = [torch.nn.Parameter(torch.zeros_like(p)) for p in iterates[0]]
    average = Average(parameters, config, len(iterates))
    for step, weights in enumerate(iterates):
        if step == resume_at:
            mean = [m.clone() for m in average.mean]
            average = Average(parameters, config, len(iterates))
            for new, old in zip(average.mean, mean, strict=True):
                new.copy_(old)
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        average.update(step)
    return average.mean


LAST_HALF = OptimConfig(average="last-half")
EMA = OptimConfig(average="ema", ema_decay=0.6)


@pytest.mark.parametrize(("steps", "taken"), [(1, 1), (2, 1), (7, 4), (10, 5), (101, 51)])
def test_last_half_is_the_plain_mean(steps, taken):
    iterates = walk(steps)
    for number, mean in enumerate(averaged(iterates, LAST_HALF)):
        exact = torch.stack([weights[number] for weights in iterates[-taken:]]).double().mean(0)
        torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e-5)  # fp32 running mean of values up to 30
        assert mean.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 4, 14, 40])
def test_ema_by_its_formula(steps):
    """mean <- d mean + (1 - d) weights, d = min(0.6, (step + 1) / (step + 10)), from the initial weights (zero)."""
    iterates = walk(steps)
    for number, mean in enumerate(averaged(iterates, EMA)):
        exact = torch.zeros_like(iterates[0][number], dtype=torch.float64)
        for step, weights in enumerate(iterates):
            decay = min(0.6, (step + 1) / (step + 10))
            exact = decay * exact + (1 - decay) * weights[number].double()
        torch.testing.assert_close(mean.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [LAST_HALF, EMA], ids=["last-half", "ema"])
@pytest.mark.parametrize("resume_at", [1, 4, 5, 6, 9])
def test_average_continues_exactly(config, resume_at):
    iterates = walk(10)
    for mean, again in zip(averaged(iterates, config), averaged(iterates, config, resume_at), strict=True):
        assert torch.equal(mean, again)


def test_average_is_a_copy():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = Average([parameter], LAST_HALF, 2)
    average.update(0)
    with torch.no_grad():
        parameter.zero_()
    assert torch.equal(average.mean[0], torch.ones(3))
    assert not average.mean[0].requires_grad
