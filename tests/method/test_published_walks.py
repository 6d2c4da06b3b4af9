"""The published scripts' inversions: x_t as diffusers' own inverse scheduler gave it, by version, and where it lands.

The numbers are of diffusers 0.20.0, which both scripts pin, and 0.22.3: their schedulers walked by the scripts' rule
(every time below t; SmPO's answer is the mean of two at the same time) with the network below, in float64.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast.config import parse
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion import invert
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.method.methods import variant_name
from inpo_fast.runtime.errors import UserError
from inpo_fast.training import noisy_latents

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATH = DDPMPath.of(DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1))
X_0 = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 2, 2)
PINNED = {"grid": "diffusers-0.20", "refine_at": "source"}
LATER = {"grid": "diffusers-0.22", "evaluate_at": "target"}
# first three elements of x_t, by (version's settings, n, t, whether each step's answer is the mean of two)
REAL = [
    (PINNED, 5, 2, True, [-2.298074, -2.152767, -1.975031]),
    (PINNED, 5, 700, True, [-1.360921, -1.314128, -1.200139]),
    (PINNED, 10, 150, True, [-2.299608, -2.154322, -1.976167]),
    (PINNED, 10, 999, True, [-0.757463, -0.699696, -0.54415]),
    (PINNED, 10, 2, False, [-2.24228, -2.081286, -1.898439]),
    (PINNED, 10, 950, False, [-0.9549, -0.900886, -0.752823]),
    (LATER, 5, 2, True, [-2.013375, -1.839673, -1.665084]),
    (LATER, 5, 700, True, [-1.819385, -1.743476, -1.600834]),
    (LATER, 10, 150, True, [-2.24521, -2.083815, -1.900622]),
    (LATER, 10, 999, True, [-0.547911, -0.48496, -0.318798]),
    (LATER, 10, 2, False, [-2.013364, -1.839661, -1.665071]),
    (LATER, 10, 950, False, [-0.779718, -0.713361, -0.536794]),
]


def network(x, time, rows=None):
    return torch.tanh(1.3 * x + 0.002 * time.view(-1, 1, 1, 1).to(x.dtype)) + 0.1 * x.flip(-1)


@pytest.mark.parametrize(("how", "n", "t", "refined", "want"), REAL)
def test_x_t_is_that_of_the_real_scheduler(how, n, t, refined, want):
    estimator = "renoise" if refined else "ddim"
    x_t, spent = invert(
        network,
        X_0,
        inversion_schedule(PATH, torch.tensor([t, t]), steps=n, **how),
        batch=4,
        estimator=estimator,
    )
    np.testing.assert_allclose(x_t.flatten()[:3].numpy(), want, atol=2e-6)
    walked = [s + (0 if how is LATER else -1000 // n) for s in range(1, 1000, 1000 // n)]
    assert spent == 2 * sum(time < t for time in walked) * (2 if refined else 1)


def test_where_the_pinned_grid_lands():
    """docs/methods.md: on t at 1, 101 ... 901; else too noisy, by 99 at most; from 902 on too clean, by 98 at most."""
    t = torch.arange(1000)
    found = inversion_schedule(PATH, t, steps=10, grid="diffusers-0.20")
    off = found.levels.gather(1, found.evaluations[:, None])[:, 0] - t
    assert t[off == 0].tolist() == list(range(1, 1000, 100))
    assert int(off[:902].min()) == 0 and int(off[:902].max()) == 99 and int(off[902:].max()) < 0
    assert int(off.min()) == int(off[999]) == -98
    # at t = 2 x_t is at level 101: tau^2 of a unit image with unit noise is 43
    a, s = (c.double() for c in PATH.a_s(torch.tensor([2, 101])))
    assert float(((a[1] - a[0]) ** 2 + s[1] ** 2) / s[0] ** 2) == pytest.approx(43, abs=0.5)
    found = inversion_schedule(PATH, t, steps=10, grid="diffusers-0.22")
    off = found.levels.gather(1, found.evaluations[:, None])[:, 0] - t
    assert int(off.max()) <= 0 and int(off.min()) == -100  # t = 101 stays at 1
    # t = 0 and 1 are not inverted at all
    assert found.evaluations[:2].tolist() == [0, 0]


def test_a_run_takes_the_configured_level():
    """From the configuration to what conditions the network when a step is refined."""
    models, t = SimpleNamespace(noise_path=PATH), torch.tensor([700])
    times = {}
    for at in ("source", "target"):
        how = InversionConfig(steps=5, grid="diffusers-0.20", estimator="renoise", refine_at=at)
        times[at] = noisy_latents._schedule_of(models, how)(t).target_times[0].tolist()
    assert times["source"] == [-199, 1, 201, 401, 601] and times["target"] == [1, 201, 401, 601, 801]


def test_names_and_refusals():
    how = InversionConfig(steps=5, grid="diffusers-0.20", estimator="renoise", refine_at="source", guidance=1.0)
    assert variant_name("smpo", ObjectiveConfig(), how) == "smpo-refined-at-source-diffusers-0.20-w1"
    words = ["--models.base=b", "--data.source=s", "--output=o"]
    for more, reason in (
        (["--inversion.grid=diffusers-0.22", "--inversion.eta=0.1"], "inversion.eta=0.1 with grid=diffusers-0.22"),
        (["--inversion.refine_at=source"], "estimator=ddim has no refinements"),
        (
            ["--inversion.refine_at=source", "--inversion.estimator=renoise", "--inversion.evaluate_at=target"],
            "with evaluate_at=target is in nobody's code",
        ),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            parse("test", [*words, *more])
        assert "\n" not in str(caught.value)
    pinned = ["--inversion.grid=diffusers-0.20", "--inversion.eta=0.1"]
    assert parse("test", [*words, *pinned]).inversion.eta == 0.1
