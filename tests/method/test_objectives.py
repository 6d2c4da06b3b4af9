"""Losses, targets and variant names against float64 NumPy written from the paper, and against its exact properties."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast.method import losses
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.methods import variant_name
from inpo_fast.method.noise_path import noised, target

PATH = DDPMPath.of(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
t = torch.tensor([0, 1, 100, 500, 999])
A, S = PATH.a_s(t)
SHAPE = (len(t), 4, 8, 8)


def normal(shape=SHAPE, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def numpy(*tensors):
    return [x.detach().double().numpy() for x in tensors]


@pytest.mark.parametrize("beta", [2000.0, 5000.0])
def test_loss_against_numpy(beta):
    """Unlike errors in every place, up to where a plain log(sigmoid) overflows."""
    e_w, e_l, r_w, r_l = (0.9 + 0.05 * normal((64,), seed).abs() for seed in range(4))
    logit = losses.logit(e_w, e_l, r_w, r_l, beta)
    w, l, v, m = numpy(e_w, e_l, r_w, r_l)
    want = -0.5 * beta * ((w - l) - (v - m))
    np.testing.assert_allclose(logit.numpy(), want, atol=0.5 * beta * 4 * 2**-24)  # four numbers near 1 in fp32
    loss = losses.preference_loss(logit)
    np.testing.assert_allclose(loss.numpy(), np.logaddexp(0, -logit.double().numpy()), rtol=1e-6, atol=1e-30)
    assert loss.shape == (64,) and logit.abs().max() > 88


def test_step_zero_and_symmetries():
    e_w, e_l, r_w, r_l = (0.9 + 0.001 * normal((64,), seed) for seed in range(4))
    still = losses.logit(e_w, e_l, e_w, e_l, 5000.0)
    assert (still == 0).all()
    assert (losses.preference_loss(still) == torch.full((64,), math.log(2), dtype=torch.float32)).all()
    logit = losses.logit(e_w, e_l, r_w, r_l, 2000.0)
    assert torch.equal(losses.logit(e_l, e_w, r_l, r_w, 2000.0), -logit)
    assert torch.equal(losses.logit(e_w, e_l, r_w, r_l, 8000.0), 4 * logit)
    better = losses.logit(e_w - 0.01, e_l, r_w, r_l, 2000.0)
    assert (better > logit).all() and (losses.preference_loss(better) < losses.preference_loss(logit)).all()


def test_target_is_eq_18():
    """(x_0(t) - x_0) / sigma_t + delta_t, with delta_t the eps that made x_t and x_0(t) the image it points to."""
    x_t, x_0, delta = (normal(seed=seed) for seed in range(3))
    xt, x0, d, a, s = numpy(x_t, x_0, delta, A, S)
    a, s = a[:, None, None, None], s[:, None, None, None]
    tau = ((xt - s * d) / a - x0) / (s / a) + d
    got = target(x_t, x_0, A, S).numpy()
    # operands of size |x_t| and |x_0| are divided by s_t: four roundings of theirs
    assert (np.abs(got - tau) <= 4 * 2**-24 * (np.abs(xt) + a * np.abs(x0)) / s).all()


def test_target_and_noised_are_inverses():
    """tau is the noise when x_t = a x_0 + s noise (so `random` is Diffusion-DPO), and x_t comes back from tau."""
    x_0, noise = normal(seed=1, dtype=torch.float64), normal(seed=2, dtype=torch.float64)
    a, s = A.double(), S.double()
    x_t = noised(x_0, noise, a, s)
    np.testing.assert_allclose(
        x_t.numpy(), a.numpy()[:, None, None, None] * x_0.numpy() + s.numpy()[:, None, None, None] * noise.numpy()
    )
    torch.testing.assert_close(target(x_t, x_0, a, s), noise, atol=1e-13, rtol=0)
    other = normal(seed=3, dtype=torch.float64)
    torch.testing.assert_close(noised(x_0, target(other, x_0, a, s), a, s), other, atol=1e-13, rtol=0)


def test_normalise():
    tau = normal() * torch.tensor([0.1, 0.5, 1.0, 2.0, 30.0])[:, None, None, None] + 0.3
    want = np.sqrt((tau.double().numpy() ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(losses.rms(tau).numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(losses.normalise(tau).numpy(), tau.numpy() / want[:, None, None, None], rtol=1e-6)
    torch.testing.assert_close(losses.rms(losses.normalise(tau)), torch.ones(len(t)), atol=1e-6, rtol=0)
    x_0 = normal(seed=1) + 0.5 * tau
    x, y = (v.double().numpy().reshape(len(t), -1) for v in (x_0, tau))
    rest = y - (x * y).sum(1, keepdims=True) / (x * x).sum(1, keepdims=True) * x
    rest /= np.sqrt((rest**2).mean(1, keepdims=True))
    np.testing.assert_allclose(losses.normalise(tau, x_0).flatten(1).numpy(), rest, atol=1e-5)
    black = torch.zeros_like(tau)  # has no direction
    assert losses.normalise(tau, black).equal(losses.normalise(tau))


@pytest.mark.parametrize("mu", [0.0, 0.25, 0.9, 1.0])
def test_loser_gate_keeps_the_winner(mu):
    """Both sides share one parameter vector, the outputs' shift. Autograd's step along -(gA - lambda gB) lowers e_w by
    at least mu |gA|^2 to first order; lambda is the largest in [0, 1] that does, and 1 where gA.gB <= 0."""
    n = 64
    base_w, base_l = normal((n, 1, 3, 3), 1, torch.float64), normal((n, 1, 3, 3), 2, torch.float64)
    base_l = base_l + 2 * base_w * torch.linspace(-1, 1, n, dtype=torch.float64)[:, None, None, None]
    theta = torch.zeros_like(base_w, requires_grad=True)
    residual_w, residual_l = base_w + theta, base_l + theta
    e_w, e_l = residual_w.square().mean((1, 2, 3)), residual_l.square().mean((1, 2, 3))
    gate = losses.loser_gate(residual_w, residual_l, mu)
    assert not gate.requires_grad and ((gate >= 0) & (gate <= 1)).all()

    (g_w,) = torch.autograd.grad(e_w.sum(), theta, retain_graph=True)
    (g_l,) = torch.autograd.grad(e_l.sum(), theta, retain_graph=True)
    (step,) = torch.autograd.grad((e_w - losses.gate_gradient(e_l, gate)).sum(), theta)
    dot = lambda x, y: (x * y).sum((1, 2, 3))  # noqa: E731
    gain, floor, cross = dot(step, g_w), mu * dot(g_w, g_w), dot(g_w, g_l)
    assert (gain >= floor - 1e-12).all()
    assert (gate[cross <= 0] == 1).all() and (cross <= 0).sum() > 10
    held = gate < 1  # nothing to spare where the gate holds back
    torch.testing.assert_close(gain[held], floor[held], atol=1e-12, rtol=0)
    assert held.sum() > 10
    own, cross = numpy(dot(g_w, g_w), cross)
    want = np.where(cross > 0, np.clip((1 - mu) * own / cross, 0, 1), 1)
    np.testing.assert_allclose(gate.numpy(), want, rtol=1e-12)


def test_loser_gate_of_vanishing_residuals_is_finite():
    """A winner without error, a loser without error, both: never NaN, never outside [0, 1]."""
    one, zero, tiny = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1e-22)
    for w in (one, zero, tiny):
        for l in (one, zero, tiny):
            for mu in (0.0, 0.5, 1.0):
                assert 0 <= losses.loser_gate(w, l, mu).item() <= 1


def test_gate_gradient_keeps_the_value():
    e_l = normal((64,), 5).requires_grad_()
    gate, upstream = torch.linspace(0, 1, 64), torch.arange(1.0, 65.0)
    gated = losses.gate_gradient(e_l, gate)
    assert torch.equal(gated, e_l)
    gated.backward(upstream)
    assert torch.equal(e_l.grad, gate * upstream)


@pytest.mark.parametrize(
    ("name", "method", "objective", "inversion"),
    [
        ("inpo", "inpo", {}, {}),
        ("inpo", "inpo", {"beta": 5000.0}, {"steps": 30, "batch": 8}),  # the paper varies these
        ("inpo-rms", "inpo", {"tau_norm": "rms"}, {}),
        ("inpo-orthogonal", "inpo", {"tau_norm": "orthogonal"}, {}),
        ("inpo-ref", "inpo", {}, {"model": "reference"}),
        ("inpo-spread", "inpo", {}, {"grid": "spread"}),
        ("inpo-target", "inpo", {}, {"evaluate_at": "target"}),
        ("inpo-w1", "inpo", {}, {"guidance": 1.0}),
        ("inpo-eta0.1", "inpo", {}, {"eta": 0.1}),
        ("inpo-wp", "inpo", {"winner_preserving": 0.0}, {}),
        ("inpo-diffusers-0.20-w1-eta0.1", "inpo", {}, {"grid": "diffusers-0.20", "guidance": 1.0, "eta": 0.1}),
        ("inpo-rms-ref-snap-target-w7.5-wp", "inpo", {"tau_norm": "rms", "winner_preserving": 0.5},
         {"model": "reference", "grid": "snap", "evaluate_at": "target", "guidance": 7.5}),
        ("dpo", "dpo", {}, {"grid": "spread"}),
        ("dpo", "inpo", {}, {"estimator": "random"}),
        ("dpo-wp", "dpo", {"winner_preserving": 0.5}, {}),
        ("sft", "sft", {"tau_norm": "rms"}, {"eta": 0.1}),
        ("kto", "kto", {"tau_norm": "rms"}, {"guidance": 1.0}),
        ("kto-ls0.1", "kto", {"label_smoothing": 0.1}, {}),
        ("dpo-ls0.25-wp", "dpo", {"winner_preserving": 0.5, "label_smoothing": 0.25}, {}),
        ("inpo-ls0.1", "inpo", {"label_smoothing": 0.1}, {}),
        ("smpo", "smpo", {}, {"estimator": "renoise"}),
        ("smpo-rms-ddim-gamma5-wp", "smpo", {"gamma": 5.0, "tau_norm": "rms", "winner_preserving": 0.5}, {}),
        ("smpo-random", "smpo", {}, {"estimator": "random"}),
        ("smpo-k2-target-w1", "smpo", {}, {"estimator": "renoise", "refinements": 2, "evaluate_at": "target",
                                          "guidance": 1.0}),
        ("inpo-renoise", "inpo", {}, {"estimator": "renoise"}),
        ("inpo-fixed-point-k3-spread", "inpo", {}, {"estimator": "fixed-point", "refinements": 3, "grid": "spread"}),
        ("inpo-gradient", "inpo", {}, {"estimator": "gradient"}),
    ],
)  # fmt: skip
def test_variant_name_is_honest(name, method, objective, inversion):
    """The bare name for the paper's setting only; each deviation is in the name."""
    assert variant_name(method, ObjectiveConfig(**objective), InversionConfig(**inversion)) == name


def test_defaults_are_the_papers():
    assert ObjectiveConfig() == ObjectiveConfig(2000.0, "none", None, Timesteps(0, 999))
    how = {"estimator": "ddim", "model": "policy", "grid": "exact", "evaluate_at": "source", "guidance": 0, "eta": 0}
    paper = SimpleNamespace(**how, refine_at="target", fp8=False)
    assert variant_name("inpo", ObjectiveConfig(), paper) == "inpo"
