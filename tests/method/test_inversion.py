"""Batch slots against one sample at a time in float64 NumPy, against diffusers' DDIMInverseScheduler, and itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from inpo_kernels.normal import normal_reference

from inpo_fast.method.ddpm_path import CLEAN, DDPMPath
from inpo_fast.method.inversion import fill_batch_slots, invert, occupancy
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.method.losses import rms
from inpo_fast.method.noise_path import target
from inpo_fast.runtime import keyed_rng

T = 1000
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PATH = DDPMPath.of(DDIMScheduler(**SD15))
ABAR = np.append(PATH.abar.numpy().astype(np.float64), 1.0)  # index CLEAN = -1 is the clean image
A, S = np.sqrt(ABAR), np.sqrt(1 - ABAR)
MIXED = [333, 0, 999, 1, 640, 100, 99, 2, 101, 902, 1]  # both sides of every published and exact level
t_MIXED, EVERYONE = torch.tensor(MIXED), list(range(len(MIXED)))
x_0, C = (torch.from_numpy(np.random.default_rng(0).normal(size=(len(MIXED), *shape))) for shape in ((3, 4, 5), (3,)))


def eps_of(c):
    """A smooth nonlinear eps that mixes pixels and depends on x, time and the sample's conditioning row c."""

    def eps(x, time, rows):
        time = time[:, None, None, None].double()
        inside = c[rows][:, :, None, None] + 0.9 * torch.cos(time / 400) * x + 0.2 * x.roll(1, -1)
        return torch.tanh(inside) + 0.3 * torch.sin(time / 150 + x.mean((1, 2, 3), keepdim=True))

    return eps


def one_by_one(x, c, t, steps, grid, evaluate_at):
    """The definition for one sample: its moves (from, to), then Eq. 15 along them. Returns x_t and the evaluations."""
    marks, stride, clean_time = [k * T // steps - 1 for k in range(1, steps + 1)], T // steps, 0
    if grid == "diffusers-0.20":  # walks -99, 1, ..., each step goes up from there
        moves, clean_time = [(w, w + stride) for w in range(1 - stride, T - stride, stride) if w < t], 1 - stride
    elif grid == "diffusers-0.22":  # walks 1, 101, ..., each step comes from below
        moves = [(w - stride, w) for w in range(1, T, stride) if w < t]
    elif grid == "spread":
        moves = list(pairwise([CLEAN] + [int(np.floor(t * k / steps + 0.5)) for k in range(1, steps + 1)]))
    else:
        end = t if grid == "exact" else min(mark for mark in marks if mark >= t)
        moves = list(pairwise([CLEAN, *(mark for mark in marks if mark < end), end]))
    for s, e in moves:
        s = max(s, CLEAN)
        told = e if evaluate_at == "target" else (clean_time if s == CLEAN else s)
        inside = c[:, None, None] + 0.9 * np.cos(told / 400) * x + 0.2 * np.roll(x, 1, -1)
        eps = np.tanh(inside) + 0.3 * np.sin(told / 150 + x.mean())
        p, q = A[e] / A[s], S[e] - S[s] * A[e] / A[s]
        x = float(np.float32(p)) * x + float(np.float32(q)) * eps
    return x, len(moves)


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("evaluate_at", ["source", "target"])
@pytest.mark.parametrize("grid", ["exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22"])
def test_against_a_plain_loop(grid, evaluate_at, steps):
    """float64 states with coefficients rounded to fp32 on both sides, so only float64 rounding is left: 1e-10."""
    trajectory = inversion_schedule(PATH, t_MIXED, steps=steps, grid=grid, evaluate_at=evaluate_at)
    x_t, spent = invert(eps_of(C), x_0, trajectory, batch=4)
    want = [one_by_one(x_0[i].numpy(), C[i].numpy(), MIXED[i], steps, grid, evaluate_at) for i in EVERYONE]
    assert x_t.dtype == torch.float64 and spent == sum(n for _, n in want)
    np.testing.assert_allclose(x_t.numpy(), np.stack([x for x, _ in want]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_images_are_inverted_in_fp32(dtype):
    """Whatever dtype x_0 has, the state is fp32: a bf16 state would be off by 1e-2."""
    trajectory = inversion_schedule(PATH, t_MIXED, steps=10)
    x_t, _ = invert(eps_of(C), x_0.to(dtype), trajectory, batch=4)
    assert x_t.dtype == torch.float32
    want, _ = invert(eps_of(C), x_0.to(dtype).double(), trajectory, batch=4)
    torch.testing.assert_close(x_t.double(), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_against_diffusers(one, offset):
    """grid diffusers-0.22 told the target is DDIMInverseScheduler walked while timestep < t, for either first abar.
    Its alphas are widened to float64, our coefficients rounded to fp32: 2^-24 a step, 1e-6 in all."""
    options = {**SD15, "set_alpha_to_one": one, "steps_offset": offset}
    path = DDPMPath.of(DDIMScheduler(**options))
    trajectory = inversion_schedule(path, t_MIXED, steps=10, grid="diffusers-0.22", evaluate_at="target")
    x_t, _ = invert(eps_of(C), x_0, trajectory, batch=64)
    oracle = DDIMInverseScheduler(**options, clip_sample=False)
    oracle.alphas_cumprod = oracle.alphas_cumprod.double()
    oracle.initial_alpha_cumprod = oracle.initial_alpha_cumprod.double()
    oracle.set_timesteps(10)
    for i in EVERYONE:
        x, row = x_0[i : i + 1], torch.tensor([i])
        for timestep in (w for w in oracle.timesteps.tolist() if w < MIXED[i]):
            x = oracle.step(eps_of(C)(x, torch.tensor([timestep]), row), timestep, x).prev_sample
        torch.testing.assert_close(x_t[i], x[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_batch_and_order_have_no_effect(eta):
    keys = [keyed_rng.hash_key(7, position, "eta") for position in EVERYONE]

    def run(pick, batch):
        trajectory = inversion_schedule(PATH, t_MIXED[pick], steps=10, eta=eta)
        return invert(eps_of(C[pick]), x_0[pick], trajectory, batch=batch, noise_keys=[keys[i] for i in pick])[0]

    shuffled = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(0)).tolist()
    back = torch.tensor(shuffled).argsort()
    alone = torch.cat([run([i], 1) for i in EVERYONE])
    for other in (run(EVERYONE, 64), run(EVERYONE, 1), run(EVERYONE, 4), run(shuffled, 3)[back]):
        torch.testing.assert_close(other, alone, atol=1e-12, rtol=0)


def test_noise_of_each_step():
    """eta * sigma_ddim times the key's own normals, none on the step from the clean image (sigma = 0 there)."""
    t, shape, keys = [600, 600, 150], (4, 32, 32), [keyed_rng.hash_key(1, name) for name in "abc"]
    trajectory, black = inversion_schedule(PATH, torch.tensor(t), steps=10, eta=0.1), torch.zeros(3, *shape)
    x_t, _ = invert(lambda x, time, rows: 0 * x, black, trajectory, batch=2, noise_keys=keys)
    for i in range(3):
        x = np.zeros(shape)
        for j, (s, e) in enumerate(pairwise([CLEAN, *range(99, t[i], 100), t[i]])):
            sigma = 0.1 * np.sqrt((1 - ABAR[s]) / (1 - ABAR[e]) * (1 - ABAR[e] / ABAR[s]))
            own = normal_reference(torch.tensor([keys[i]]), torch.tensor([j]), shape, torch.float64)[0].numpy()
            x = A[e] / A[s] * x + sigma * own
        np.testing.assert_allclose(x_t[i].numpy(), x, atol=1e-6)
    # the last sample has one noisy step; the deviation of 4096 numbers is known to 1.1 %, five times that allowed
    assert x_t[2].std().item() == pytest.approx(sigma, rel=0.055)
    assert not black.any()  # the window's own images are not written to
    with pytest.raises(ValueError, match="noise_keys"):
        invert(lambda x, time, rows: x, black, trajectory, batch=2)


def generate(eps, x_t, levels):
    """Plain DDIM from the last level down to the clean image, every level told as itself."""
    for s, e in reversed(list(pairwise(levels))):
        predicted = eps(x_t, torch.full((len(x_t),), e), torch.arange(len(x_t)))
        x_t = A[s] / A[e] * x_t + (S[s] - S[e] * A[s] / A[e]) * predicted
    return x_t


@pytest.mark.parametrize(("rate", "at"), [(0, "source"), (0, "target"), (0.01, "target")])
@pytest.mark.parametrize("grid", ["exact", "spread"])
def test_eps_blind_to_x_regenerates_exactly(grid, rate, at):
    """Blind to time too: told the source or the target. Else told the target, as generation is.
    Coefficients rounded to fp32, divided by a_t = 0.07 at t = 999: 10 steps * 2^-24 / 0.07 = 1e-5."""
    trajectory = inversion_schedule(PATH, t_MIXED, steps=10, grid=grid, evaluate_at=at)
    eps = lambda x, time, rows: torch.sin(C[rows] + rate * time[:, None])[:, :, None, None].expand_as(x)  # noqa: E731
    x_t, _ = invert(eps, x_0, trajectory, batch=4)
    for i in EVERYONE:
        own = lambda x, time, rows, i=i: eps(x, time, rows + i)  # noqa: E731
        x = generate(own, x_t[i : i + 1], trajectory.levels[i, : int(trajectory.evaluations[i]) + 1].tolist())
        torch.testing.assert_close(x[0], x_0[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("t", [600, 999])
def test_reconstruction_improves_with_n(t):
    """The exact eps of data N(+-0.8, 0.3^2): the error of inverting and generating again falls as n grows."""

    def eps(x, time, rows):
        a, s = (torch.from_numpy(v)[time][:, None, None, None] for v in (A, S))
        variance = 0.09 * a**2 + s**2
        return s * (x - 0.8 * a * torch.tanh(0.8 * a * x / variance)) / variance

    data, errors = 0.8 * torch.sign(x_0) + 0.3 * x_0.roll(1, 0), []
    for steps in (3, 5, 10, 30):
        trajectory = inversion_schedule(PATH, torch.full((len(data),), t), steps=steps)
        x_t, _ = invert(eps, data, trajectory, batch=64)
        again = generate(eps, x_t, trajectory.levels[0, : int(trajectory.evaluations[0]) + 1].tolist())
        errors.append((again - data).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 3, errors


@pytest.mark.parametrize(("w", "who"), [(0.0, "u"), (1.0, "c"), (7.5, "cu"), (-0.5, "cu")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_guidance(w, who, dtype):
    """0 asks the unconditional model, 1 the conditional, else both, combined wide; every evaluation counts."""
    trajectory, calls = inversion_schedule(PATH, t_MIXED, steps=10), []
    u, c = eps_of(C), eps_of(C.flip(0))

    def asked(name, eps):
        return lambda x, time, rows: calls.append((name, len(x))) or eps(x, time, rows).to(dtype)

    got, spent = invert(asked("u", u), x_0, trajectory, batch=4, conditional=asked("c", c), guidance=w)
    assert {name for name, _ in calls} == set(who) and spent == sum(n for _, n in calls)
    assert spent == len(who) * int(trajectory.evaluations.sum())

    def combined(x, time, rows):
        first, second = u(x, time, rows).to(dtype).double(), c(x, time, rows).to(dtype).double()
        return first + w * (second - first)

    want, _ = invert(combined, x_0, trajectory, batch=64)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_calls_are_full_and_counted(batch):
    """Evaluations as planned, in no more calls than anybody could do with, every call but the last equally wide."""
    trajectory, sizes = inversion_schedule(PATH, t_MIXED, steps=10), []

    def eps(x, time, rows):
        assert len(x) == len(time) == len(rows) and x.is_contiguous()  # the kernel refuses any other x
        assert len(set(rows.tolist())) == len(rows)
        sizes.append(len(x))
        return x

    _, spent = invert(eps, x_0.contiguous(memory_format=torch.channels_last), trajectory, batch=batch)
    total = int(trajectory.evaluations.sum())
    assert sum(sizes) == spent == total and max(sizes) <= batch
    assert len(sizes) == max(10, -(-total // batch)) and set(sizes[:-1]) <= {max(sizes), max(sizes) - 1}
    assert invert(eps, x_0[:0], inversion_schedule(PATH, t_MIXED[:0], steps=10), batch=batch)[1] == 0


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_padded_calls(guidance):
    """All of one size, the same result; slots that hold nobody are not counted and move nobody."""
    trajectory, sizes = inversion_schedule(PATH, t_MIXED, steps=10, eta=0.3), []
    keys = [keyed_rng.hash_key(7, position, "eta") for position in EVERYONE]
    eps, other = eps_of(C), eps_of(C.flip(0))

    def seen(x, time, rows):
        sizes.append(len(x))
        return eps(x, time, rows)

    how = {"conditional": other, "guidance": guidance, "noise_keys": keys}
    want = invert(eps, x_0, trajectory, batch=4, **how)
    got = invert(seen, x_0, trajectory, batch=4, width=4, **how)
    assert set(sizes) == {4} and got[1] == want[1]
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=0)
    sizes.clear()
    invert(seen, x_0, trajectory, batch=64, width=20, **how)
    assert set(sizes) == {20}
    assert invert(eps, x_0[:0], inversion_schedule(PATH, t_MIXED[:0], steps=10), batch=4, width=4)[1] == 0


@given(st.lists(st.integers(0, 10), max_size=40), st.integers(1, 20))
def test_slots(evaluations, batch):
    """Each sample as often as it needs, never twice in a call; the number of calls is the lower bound; the closed form
    of the occupancy counts the calls."""
    needed = torch.tensor(evaluations, dtype=torch.int64)
    calls = fill_batch_slots(needed, batch)
    assert torch.equal(
        torch.bincount(torch.cat([*calls, torch.zeros(0, dtype=torch.int64)]), minlength=len(needed)), needed
    )
    assert all(0 < len(set(call.tolist())) == len(call) <= batch for call in calls)
    total = sum(evaluations)
    assert len(calls) == max(max(evaluations, default=0), -(-total // batch))
    used = total / (len(calls) * max(map(len, calls))) if calls else 1.0
    assert occupancy(needed, batch) == pytest.approx(used)


@pytest.mark.parametrize(("pairs", "least"), [(1024, 0.99), (128, 0.97), (32, 0.93)])
@pytest.mark.parametrize("steps", [10, 30])
def test_occupancy_of_a_step(pairs, steps, least):
    """Both sides at one t, 64 images a call. Lockstep batches, which wait for their slowest sample, use 0.6 of it."""
    used, lockstep = [], []
    for seed in range(8):
        t = torch.tensor([keyed_rng.integer(0, 999, "t", seed, pair) for pair in range(pairs)]).repeat_interleave(2)
        evaluations = inversion_schedule(PATH, t, steps=steps).evaluations
        used.append(occupancy(evaluations, 64))
        together = [batch.max().item() * 64 for batch in evaluations.split(64)]
        lockstep.append(evaluations.sum().item() / sum(together))
    assert min(used) >= least and np.mean(lockstep) < 0.65, (used, lockstep)


@pytest.mark.parametrize("grid", ["exact", "spread", "snap"])
def test_tau_has_the_size_of_noise_at_every_t(grid):
    """Where the model answers with unit noise, the grids that land on t make x_t exactly as noisy as t asks for."""
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise /= rms(noise)[:, None, None, None]
    t = torch.arange(0, 1000, 37)
    x_0 = torch.randn(len(t), 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    path = DDPMPath.of(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    trajectory = inversion_schedule(path, t, steps=10, grid=grid)
    x_t, _ = invert(lambda x, time, rows: noise.expand_as(x), x_0, trajectory, batch=7)
    a, s = path.a_s(path.snap(t, 10) if grid == "snap" else t)
    # fp32 coefficients of up to ten steps, magnified by 1 / s_t (34 at t = 0)
    torch.testing.assert_close(
        rms(target(x_t, x_0, a.double(), s.double())), torch.ones(len(t)).double(), rtol=0, atol=5e-5
    )
