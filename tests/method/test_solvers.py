"""Solved steps of the inversion: against float64 NumPy written from their definitions, and against what they are for,
that DDIM sampling comes back to the image."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_inversion import EVERYONE, PATH, A, C, S, eps_of, t_MIXED, x_0

from inpo_fast.method.ddpm_path import CLEAN
from inpo_fast.method.inversion import invert
from inpo_fast.method.inversion_schedule import inversion_schedule


def eps_numpy(x, told, c):
    inside = c[:, None, None] + 0.9 * np.cos(told / 400) * x + 0.2 * np.roll(x, 1, -1)
    return np.tanh(inside) + 0.3 * np.sin(told / 150 + x.mean())


def slope_numpy(there, start, q, told, c):
    """Central differences of |r|^2 / 2."""
    half = lambda y: 0.5 * ((y - start - q * eps_numpy(y, told, c)) ** 2).sum()  # noqa: E731
    out = np.zeros_like(there)
    for i in np.ndindex(there.shape):
        d = np.zeros_like(there)
        d[i] = 1e-5
        out[i] = (half(there + d) - half(there - d)) / 2e-5
    return out


def one_step(kind, k, x, c, s, e, evaluate_at):
    p, q = float(np.float32(A[e] / A[s])), float(np.float32(S[e] - S[s] * A[e] / A[s]))
    first = eps_numpy(x, e if evaluate_at == "target" else max(s, 0), c)
    there, answers = p * x + q * first, [first]
    for _ in range(k):
        if kind == "gradient":
            there = there - slope_numpy(there, p * x, q, e, c)
        else:
            answers.append(eps_numpy(there, e, c))
            there = p * x + q * answers[-1]
    return p * x + q * sum(answers) / len(answers) if kind == "renoise" else there


@pytest.mark.parametrize(("kind", "k"), [("renoise", 1), ("renoise", 3), ("fixed-point", 2), ("gradient", 2)])
@pytest.mark.parametrize("evaluate_at", ["source", "target"])
def test_against_the_definition(kind, k, evaluate_at):
    trajectory, asked = inversion_schedule(PATH, t_MIXED, steps=3, evaluate_at=evaluate_at), []
    eps = eps_of(C)

    def seen(x, time, rows):
        asked.append(len(x))
        return eps(x, time, rows)

    got, spent = invert(seen, x_0, trajectory, batch=4, estimator=kind, refinements=k)
    for i in EVERYONE:
        want, levels = x_0[i].numpy(), trajectory.levels[i].tolist()
        for s, e in list(pairwise(levels))[: int(trajectory.evaluations[i])]:
            want = one_step(kind, k, want, C[i].numpy(), s, e, evaluate_at)
        # central differences in the gradient's oracle
        np.testing.assert_allclose(got[i].numpy(), want, atol=1e-6 if kind == "gradient" else 1e-12)
    each = 1 + 2 * k if kind == "gradient" else 1 + k
    assert spent == int(trajectory.evaluations.sum()) * each
    assert sum(asked) == int(trajectory.evaluations.sum()) * (1 + k)  # a backward pass is counted, and asks nothing


def test_no_refinement_left_is_the_explicit_step():
    trajectory, eps = inversion_schedule(PATH, t_MIXED, steps=3), eps_of(C)
    want, _ = invert(eps, x_0, trajectory, batch=4)
    for kind in ("renoise", "fixed-point", "gradient"):
        got, _ = invert(eps, x_0, trajectory, batch=4, estimator=kind, refinements=0)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "k"), [("fixed-point", 12), ("gradient", 40), ("renoise", 1)])
def test_sampling_comes_back_to_the_image(kind, k):
    """The sampler's steps down the same levels, with the same model: solved steps return what was inverted."""
    eps, t = eps_of(0 * C), torch.full((len(x_0),), 500)
    errors = {}
    for name, how in (("ddim", {}), (kind, {"estimator": kind, "refinements": k})):
        trajectory = inversion_schedule(PATH, t, steps=20)
        x, _ = invert(eps, x_0, trajectory, batch=64, **how)
        levels = trajectory.levels[0, : int(trajectory.evaluations[0]) + 1].tolist()
        for low, high in zip(levels[-2::-1], levels[:0:-1], strict=True):
            answer = eps(x, torch.full((len(x),), high), torch.arange(len(x)))
            x = A[low] * (x - S[high] * answer) / A[high] + S[low] * answer
        errors[name] = (x - x_0).square().mean().sqrt().item()
    assert levels[0] == CLEAN and errors[kind] < errors["ddim"] * {"renoise": 0.75}.get(kind, 0.02), errors


def test_renoise_told_its_own_levels_is_of_higher_order():
    """With k = 1 it is Heun's method for the sampler's equation d(x / a) = eps d(s / a). Halved steps leave a half of
    the error of first-order steps; here 2^-1.5 instead of a quarter, since s goes with the root of t and the first
    step from the clean image is the longest."""
    t = torch.full((len(x_0),), 800)

    def inverted(n, evaluate_at="source", **how):
        trajectory = inversion_schedule(PATH, t, steps=n, grid="spread", evaluate_at=evaluate_at)
        return invert(eps_of(C), x_0, trajectory, batch=64, **how)[0]

    heun, end = {"estimator": "renoise"}, inverted(800, estimator="renoise")
    kinds = {"heun": heun, "ddim": {}, "at the target": heun | {"evaluate_at": "target"}}
    kinds["fixed-point"] = {"estimator": "fixed-point", "refinements": 3}
    for name, how in kinds.items():
        coarse, fine = ((inverted(n, **how) - end).square().mean().sqrt().item() for n in (20, 40))
        ratio = coarse / fine
        assert 2.7 < ratio < 3.5 if name == "heun" else 1.8 < ratio < 2.3, (name, ratio)
        assert name != "heun" or fine < 1e-3  # 7e-3 with the others


@pytest.mark.parametrize("kind", ["renoise", "fixed-point", "gradient"])
def test_guided_and_padded(kind):
    """Two models are combined in every answer; full calls change nothing."""
    trajectory, u, c = inversion_schedule(PATH, t_MIXED, steps=3), eps_of(C), eps_of(C.flip(0))

    def combined(x, time, rows):
        return u(x, time, rows) + 5.0 * (c(x, time, rows) - u(x, time, rows))

    how = {"estimator": kind, "refinements": 2}
    want, alone = invert(combined, x_0, trajectory, batch=64, **how)
    got, spent = invert(u, x_0, trajectory, batch=4, width=4, conditional=c, guidance=5.0, **how)
    # guided steps of this eps are expansive: rounding grows
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert spent == 2 * alone
