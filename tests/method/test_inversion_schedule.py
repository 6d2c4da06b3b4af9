"""inpo_fast.method.inversion_schedule against float64 NumPy written from the paper's Eq.

15, and against counts done by hand.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast.method.ddpm_path import CLEAN, DDPMPath
from inpo_fast.method.inversion_schedule import inversion_schedule

T = 1000
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PATH = DDPMPath.of(DDIMScheduler(**SD15))
ALL = torch.arange(T)
GRIDS = ("exact", "spread", "snap", "diffusers-0.20", "diffusers-0.22")
# fp32 coefficients of a float64 computation: half an ulp, 2^-24
ROUNDED = 2.0**-23


def used(trajectory):
    """(M, K) bool: the columns each sample uses."""
    return np.arange(trajectory.p.shape[1]) < trajectory.evaluations.numpy()[:, None]


@pytest.mark.parametrize("steps", [3, 5, 10, 30])
@pytest.mark.parametrize("grid", GRIDS)
def test_coefficients(grid, steps):
    trajectory = inversion_schedule(PATH, ALL, steps=steps, grid=grid, eta=0.1)
    abar = np.append(PATH.abar.numpy().astype(np.float64), 1.0)  # level -1 is the clean image
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    source, target = trajectory.levels.numpy()[:, :-1], trajectory.levels.numpy()[:, 1:]
    p = a[target] / a[source]
    q = s[target] - s[source] * a[target] / a[source]
    sigma = 0.1 * s[source] / s[target] * np.sqrt(np.maximum(1 - abar[target] / abar[source], 0))
    on = used(trajectory)
    np.testing.assert_allclose(trajectory.p.numpy(), np.where(on, p, 1), rtol=ROUNDED)
    np.testing.assert_allclose(trajectory.q.numpy(), np.where(on, q, 0), rtol=ROUNDED, atol=1e-15)
    np.testing.assert_allclose(trajectory.sigma.numpy(), np.where(on, sigma, 0), rtol=ROUNDED, atol=1e-9)
    # beyond a sample's evaluations nothing moves, bit for bit
    assert (trajectory.p.numpy()[~on] == 1).all() and (trajectory.q.numpy()[~on] == 0).all()
    assert all(c.dtype == torch.float32 for c in (trajectory.p, trajectory.q, trajectory.sigma))


@pytest.mark.parametrize(
    ("grid", "mean"),
    [("exact", 5.5), ("snap", 5.5), ("spread", 10.0), ("diffusers-0.20", 6.382), ("diffusers-0.22", 5.48)],
)
def test_mean_evaluations_over_all_t(grid, mean):
    assert int(inversion_schedule(PATH, ALL, steps=10, grid=grid).evaluations.sum()) == round(mean * T)


@pytest.mark.parametrize("steps", [3, 5, 10, 30])
@pytest.mark.parametrize("grid", ["exact", "spread", "snap"])
def test_levels_by_hand(grid, steps):
    """From the clean image through the levels of the definition, rising, the last exactly t (snap: its own level)."""
    trajectory = inversion_schedule(PATH, ALL, steps=steps, grid=grid)
    marks = [k * T // steps - 1 for k in range(1, steps + 1)]
    for t in range(T):
        got = trajectory.levels[t, : int(trajectory.evaluations[t]) + 1].tolist()
        if grid == "spread":
            want = [CLEAN] + [int(np.floor(t * k / steps + 0.5)) for k in range(1, steps + 1)]
        else:
            end = t if grid == "exact" else min(mark for mark in marks if mark >= t)
            want = [CLEAN, *[mark for mark in marks if mark < end], end]
        assert got == want, f"t = {t}"


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 30, 1000])
def test_snap_is_the_next_global_level(steps):
    marks = torch.tensor([k * T // steps - 1 for k in range(1, steps + 1)])
    assert torch.equal(PATH.snap(ALL, steps), marks[torch.searchsorted(marks, ALL)])
    assert torch.equal(PATH.snap(marks, steps), marks)


def test_published_walks():
    """Both walk the timesteps strictly below t; 0.20 stands T // n lower than 0.22 and goes that much too far."""
    t = torch.tensor([0, 1, 2, 101, 102, 801, 802, 999])
    old, new = (inversion_schedule(PATH, t, steps=10, grid=f"diffusers-0.{v}") for v in (20, 22))
    assert old.evaluations.tolist() == [1, 1, 2, 2, 3, 9, 10, 10]
    assert new.evaluations.tolist() == [0, 0, 1, 1, 2, 8, 9, 10]
    assert old.levels[0].tolist() == new.levels[0].tolist() == [CLEAN, *range(1, 1000, 100)]
    assert old.times[0].tolist() == [-99, *range(1, 900, 100)]
    assert new.times[0].tolist() == [0, *range(1, 900, 100)]
    no_offset = DDPMPath(PATH.abar, steps_offset=0)
    levels = inversion_schedule(no_offset, t, steps=10, grid="diffusers-0.22").levels[0].tolist()
    assert levels == [CLEAN, *range(0, 1000, 100)]


def test_time_told():
    t = torch.tensor([5, 250])
    source = inversion_schedule(PATH, t, steps=10, evaluate_at="source")
    target = inversion_schedule(PATH, t, steps=10, evaluate_at="target")
    assert source.times[:, :3].tolist() == [[0, 5, 5], [0, 99, 199]]  # the clean image is told as time 0
    assert target.times[:, :3].tolist() == [[5, 5, 5], [99, 199, 250]]
    assert torch.equal(source.p, target.p) and torch.equal(source.q, target.q)


def test_small_t_survives_in_fp32():
    """In bf16 abar[0] == abar[1] == 1 and the target divides by zero; in fp32 the levels stay apart."""
    assert (PATH.abar[:2].bfloat16() == 1).all()
    assert PATH.abar.dtype == torch.float32 and 1 > PATH.abar[0] > PATH.abar[1]
    a, s = PATH.a_s(ALL)
    abar = PATH.abar.numpy().astype(np.float64)
    np.testing.assert_allclose(a.numpy(), np.sqrt(abar), rtol=ROUNDED)
    np.testing.assert_allclose(s.numpy(), np.sqrt(1 - abar), rtol=ROUNDED)
    assert s[0] > 0 and torch.isfinite(1 / s).all() and s[0] != s[1] and a[0] != a[1]
    for grid in GRIDS:
        trajectory = inversion_schedule(PATH, torch.tensor([0, 1]), steps=10, grid=grid, eta=0.1)
        assert all(torch.isfinite(c).all() for c in (trajectory.p, trajectory.q, trajectory.sigma)), grid
    trajectory = inversion_schedule(PATH, torch.tensor([0, 1]), steps=10)
    assert 1 > trajectory.p[0, 0] > trajectory.p[1, 0] and 0 < trajectory.q[0, 0] < trajectory.q[1, 0]


@pytest.mark.parametrize("one", [True, False])
def test_reads_the_scheduler(one):
    """set_alpha_to_one decides what diffusers takes for the clean image; our own grids always take 1."""
    path = DDPMPath.of(DDIMScheduler(**SD15, set_alpha_to_one=one))
    assert path.steps_offset == 1 and path.first_abar == (1.0 if one else float(path.abar[0]))
    t = torch.tensor([500])
    published = inversion_schedule(path, t, steps=10, grid="diffusers-0.22").p[0, 0].item()
    assert published == pytest.approx(float((path.abar[1] / path.first_abar).sqrt()), rel=1e-7)
    ours = inversion_schedule(path, t, steps=10).p[0, 0].item()
    assert ours == pytest.approx(float(path.abar[99].sqrt()), rel=1e-7)


def test_refuses():
    for steps in (0, -1, T + 1):
        with pytest.raises(ValueError, match=str(steps)):
            inversion_schedule(PATH, ALL, steps=steps)
    for t in (torch.tensor([-1]), torch.tensor([T]), torch.tensor([1.0]), torch.tensor(3), torch.tensor([[3]])):
        with pytest.raises(ValueError, match="t must be int64"):
            inversion_schedule(PATH, t, steps=10)
    with pytest.raises(ValueError, match="unknown inversion grid 'ddim'"):
        inversion_schedule(PATH, ALL, steps=10, grid="ddim")
    assert inversion_schedule(PATH, ALL[:0], steps=10).p.shape == (0, 10)
