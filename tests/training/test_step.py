"""train_step held against the naive loop's gradients, itself at other batch sizes, and exact properties."""

import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from tiny_world import one_level, save_pairs, tiny_pipeline

from bench.step.naive import naive_step
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.losses import rms
from inpo_fast.method.noise_path import noised
from inpo_fast.models.models import Models
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import micro_step, train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

STEP_CONFIG = StepConfig(
    method="inpo",
    objective=ObjectiveConfig(beta=500.0),
    inversion=InversionConfig(steps=4, batch=7),
    micro_batch=4,
    vae_sample=True,
    seed=0,
)
PAIRS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    models = Models(one_level(tiny_pipeline()), torch.device("cpu"))
    source = open_source(save_pairs(folder / "pairs.parquet"))
    loader = PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1)
    return models, next(loader.steps(0, 1, PAIRS))


@pytest.fixture
def moved(world):
    """The world with a policy that differs from the reference; put back afterwards."""
    models, items = world
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in models.parameters():
            p.add_(0.05 * p.std().nan_to_num() * torch.randn(p.shape, generator=generator))
    yield models, items
    models.policy.load_state_dict(models.reference.state_dict())


def gradient(models, items, step_config):
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    metrics, logits = train_step(step_batch, models, step_config, len(items), clip=math.inf)
    return torch.cat([p.grad.reshape(-1) for p in models.parameters()]), metrics.values(), logits


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("method", ["inpo", "dpo"])
def test_step_zero_is_exactly_ln_2(world, method):
    models, items = world
    _, values, logits = gradient(models, items, replace(STEP_CONFIG, method=method))
    assert torch.equal(logits, torch.zeros(PAIRS))
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-7)  # fp32's ln 2
    assert values["winner_delta"] == values["loser_delta"] == 0
    assert values["eps_scale"] == pytest.approx(1, abs=1e-6)


def test_gradient_equals_the_naive_loop(moved):
    models, items = moved[0], moved[1][:4]
    how = InversionConfig(steps=10, grid="diffusers-0.22", evaluate_at="target", guidance=1.0)
    ours, values, _ = gradient(models, items, replace(STEP_CONFIG, inversion=how))
    models.policy.zero_grad()
    seen = naive_step(items, models, beta=500.0, inversion_steps=10, seed=0)
    theirs = torch.cat([p.grad.reshape(-1) for p in models.parameters()])
    assert distance(ours, theirs) < 1e-3  # fp32, ten chained evaluations, sums in another order
    assert values["loss"] == pytest.approx(seen["loss"], rel=1e-4)
    assert values["unet_evaluations"] == seen["unet_evaluations"]


def test_micro_batch_inversion_batch_and_order_change_nothing(moved):
    models, items = moved
    whole, values, logits = gradient(models, items, STEP_CONFIG)
    for micro_batch, batch in ((1, 3), (2, 64), (8, 5)):
        step_config = replace(
            STEP_CONFIG, micro_batch=micro_batch, inversion=replace(STEP_CONFIG.inversion, batch=batch)
        )
        other, other_values, _ = gradient(models, items, step_config)
        assert distance(other, whole) < 1e-4
        assert other_values["loss"] == pytest.approx(values["loss"], rel=1e-5)
    turned, _, turned_logits = gradient(models, items[::-1], STEP_CONFIG)
    assert distance(turned, whole) < 1e-4
    torch.testing.assert_close(turned_logits.flip(0), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("inpo", {}),
        ("inpo", {"tau_norm": "orthogonal"}),
        ("inpo", {"winner_preserving": 0.9}),
        ("dpo", {}),
        ("inpo", {"label_smoothing": 0.2}),
    ],
)
def test_the_fused_loss_is_the_plain_one(moved, method, changes):
    """The gradient, the logits and every metric: to the rounding of fp32, times beta / 2 in the logit."""
    models, items = moved
    step_config = replace(STEP_CONFIG, method=method, objective=replace(STEP_CONFIG.objective, **changes))
    fused, values, logits = gradient(models, items, step_config)
    plain, plain_values, plain_logits = gradient(models, items, replace(step_config, fused_loss=False))
    assert distance(fused, plain) < 1e-5
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=250 * 2.0**-22)
    assert values == pytest.approx(plain_values, rel=1e-4, abs=250 * 2.0**-22) and values.keys() == plain_values.keys()


@pytest.mark.parametrize("fused", [True, False])
def test_labels_and_weights_of_pairs(moved, fused):
    """An independent float64 slope: the gradient is linear in it, pair by pair. Weight 0 leaves a pair out."""
    models, items = moved
    step_config = replace(STEP_CONFIG, fused_loss=fused)
    alone, logits = [], []
    for item in items[:3]:
        g, _, logit = gradient(models, [item], step_config)
        alone.append(g)
        logits.append(logit.double().item())
    label, weight = (0.7, 1.0, 0.5), (1.0, 0.25, 2.0)
    changed = [replace(x, label=p, weight=w) for x, p, w in zip(items[:3], label, weight, strict=True)]
    got, values, _ = gradient(models, changed, step_config)
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    wanted, losses = 0.0, []
    for g, z, p, w in zip(alone, logits, label, weight, strict=True):
        wanted = wanted + g * w * (p * sigmoid(-z) - (1 - p) * sigmoid(z)) / sigmoid(-z) / 3
        losses.append(-p * math.log(sigmoid(z)) - (1 - p) * math.log(sigmoid(-z)))
    assert distance(got, wanted) < 1e-4
    assert values["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    silent = [replace(items[0], weight=0.0), *items[1:3]]
    assert distance(gradient(models, silent, step_config)[0] * 3, (alone[1] + alone[2])) < 1e-4


def test_swapping_winner_and_loser_negates_the_logit(moved):
    """Held on the noised window: the images keep their own draws, only their roles change."""
    models, items = moved
    step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
    x_t, _ = noisy_latents(step_batch, models, STEP_CONFIG)
    swapped = replace(step_batch, x_0=step_batch.x_0.flip(1))
    pairs = slice(0, PAIRS)
    found = micro_step(step_batch, x_t, 0, pairs, models, STEP_CONFIG).objective
    other = micro_step(swapped, x_t.flip(2), 0, pairs, models, STEP_CONFIG).objective
    torch.testing.assert_close(other.logit, -found.logit, rtol=1e-3, atol=1e-3)
    assert found.logit.abs().max() > 0.01


def test_random_estimator_is_diffusion_dpo(moved):
    models, items = moved
    random = replace(STEP_CONFIG, inversion=InversionConfig(estimator="random"))
    assert torch.equal(
        gradient(models, items, random)[0], gradient(models, items, replace(STEP_CONFIG, method="dpo"))[0]
    )
    step_batch = make_step_batch(items, models, random, models.encode_empty())
    (x_t,), spent = noisy_latents(step_batch, models, random)
    a, s = (c[:, None, None, None, None] for c in models.noise_path.a_s(step_batch.t[0]))
    tau = (x_t - a * step_batch.x_0) / s
    assert spent == 0
    torch.testing.assert_close(tau[:, 0], tau[:, 1], rtol=0, atol=1e-3)  # the same z for both sides


def test_dpo_loss_equals_an_independent_computation(moved):
    models, items = moved
    step_config = replace(STEP_CONFIG, method="dpo")
    _, values, logits = gradient(models, items, step_config)
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    (x_t,), _ = noisy_latents(step_batch, models, step_config)
    expected = []
    for i in range(PAIRS):
        abar = models.noise_path.abar[step_batch.t[0, i]].double()
        errors = {}
        for side in range(2):
            text = step_batch.conditional.text.hidden[step_batch.conditional.row[2 * i + side]][None]
            tau = (x_t[i, side].double() - abar.sqrt() * step_batch.x_0[i, side].double()) / (1 - abar).sqrt()
            for name, unet in (("e", models.policy), ("r", models.reference)):
                with torch.no_grad():
                    out = unet(x_t[i, side][None], step_batch.t[0, i], text).sample[0].double()
                errors[name, side] = (tau - out).square().mean()
        gap = (errors["e", 0] - errors["e", 1]) - (errors["r", 0] - errors["r", 1])
        expected.append(-0.5 * 500.0 * gap)
    expected = torch.stack(expected)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=2e-3)
    assert values["loss"] == pytest.approx(torch.log1p(torch.exp(-expected)).mean().item(), rel=1e-3)


def test_kto_at_step_zero_and_in_parts(moved):
    """1/2 before the first update; afterwards the reference point is that of the whole step for any micro-batch, and
    the loss and its gradient with it."""
    models, items = moved
    step_config = replace(STEP_CONFIG, method="kto", micro_batch=8)
    whole, values, logits = gradient(models, items, step_config)
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    x_t, _ = noisy_latents(step_batch, models, step_config)
    # without a point it is 0: the errors, of which the point is the mean
    found = micro_step(step_batch, x_t, 0, slice(0, PAIRS), models, replace(step_config, method="dpo")).objective
    gain = (found.image[:, 1] - found.image[:, 0]).double()
    point = max(gain.mean().item(), 0.0)
    assert values["reference_point"] == pytest.approx(point, rel=1e-4, abs=1e-9)
    sign = torch.ones(2 * PAIRS).index_fill(0, torch.arange(PAIRS, 2 * PAIRS), -1)
    assert values["loss"] == pytest.approx((1 - torch.sigmoid(sign * 500 * (gain - point))).mean().item(), rel=1e-4)
    assert values["unet_evaluations"] == 8 * PAIRS  # both models, both sides, twice
    torch.testing.assert_close(logits, found.logit)
    other, other_values, _ = gradient(models, items[::-1], replace(step_config, micro_batch=3))
    assert distance(other, whole) < 1e-4 and other_values["loss"] == pytest.approx(values["loss"], rel=1e-5)

    models.policy.load_state_dict(models.reference.state_dict())
    _, values, logits = gradient(models, items, step_config)
    assert torch.equal(logits, torch.zeros(PAIRS)) and values["loss"] == 0.5 and values["reference_point"] == 0


@pytest.mark.parametrize("estimator", ["renoise", "fixed-point", "gradient"])
def test_estimators_in_the_step(moved, estimator):
    """smpo with each: their own x_t, counted as planned, and ln 2 at step 0. The gradient estimator leaves none in the
    weights."""
    models, items = moved
    how = replace(STEP_CONFIG.inversion, steps=2, estimator=estimator)
    step_config = replace(STEP_CONFIG, method="smpo", inversion=how)
    _, values, logits = gradient(models, items, step_config)
    _, plain, _ = gradient(models, items, replace(step_config, inversion=replace(how, estimator="ddim")))
    assert logits.abs().max() > 0 and values["loss"] != plain["loss"]
    more = {"gradient": 3}.get(estimator, 2)
    assert values["unet_evaluations"] - 4 * PAIRS == more * (plain["unet_evaluations"] - 4 * PAIRS)
    models.policy.zero_grad()
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    noisy_latents(step_batch, models, step_config)
    assert all(p.grad is None or not p.grad.any() for p in models.parameters())
    models.policy.load_state_dict(models.reference.state_dict())
    _, values, logits = gradient(models, items, step_config)
    assert torch.equal(logits, torch.zeros(PAIRS)) and values["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_sft_descends_the_winners_error_only(moved):
    models, items = moved
    got, values, _ = gradient(models, items, replace(STEP_CONFIG, method="sft"))
    assert values["loss"] == pytest.approx(values["winner_error"])
    assert "margin" not in values and "loser_error" not in values
    losers_changed = [replace(item, loser=item.winner) for item in items]
    assert torch.equal(gradient(models, losers_changed, replace(STEP_CONFIG, method="sft"))[0], got)


@pytest.mark.parametrize("norm", ["rms", "orthogonal"])
def test_tau_norm_gives_unit_tau_and_keeps_step_zero(world, norm, monkeypatch):
    """Of what x_t is rebuilt from; orthogonal: nothing of the image is in it."""
    models, items = world
    step_config = replace(STEP_CONFIG, objective=replace(STEP_CONFIG.objective, tau_norm=norm))
    seen = []

    def spy(x_0, tau, a_t, s_t):
        seen.append((x_0, tau))
        return noised(x_0, tau, a_t, s_t)

    monkeypatch.setattr("inpo_fast.training.step.noised", spy)
    _, _, logits = gradient(models, items, step_config)
    x_0, tau = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(tau) == 2 * PAIRS
    torch.testing.assert_close(rms(tau), torch.ones(len(tau)))
    along = (x_0 * tau).mean((1, 2, 3)) / rms(x_0)
    assert (along.abs().max() < 1e-6) == (norm == "orthogonal")
    assert torch.equal(logits, torch.zeros(PAIRS))


def test_winner_preserving_changes_the_gradient_not_the_loss(moved):
    models, items = moved
    plain, values, _ = gradient(models, items, STEP_CONFIG)
    gated, gated_values, _ = gradient(
        models, items, replace(STEP_CONFIG, objective=replace(STEP_CONFIG.objective, winner_preserving=0.9))
    )
    assert gated_values["loss"] == values["loss"]
    assert distance(gated, plain) > 1e-3
    assert 0 <= gated_values["loser_gate"] <= 1


def test_timestep_range_and_snap_are_respected(world):
    models, items = world
    step_config = replace(STEP_CONFIG, objective=replace(STEP_CONFIG.objective, timesteps=Timesteps(300, 420)))
    (t,) = make_step_batch(items, models, step_config, models.encode_empty()).t
    assert t.min() >= 300 and t.max() <= 420 and len(set(t.tolist())) > 1
    snapped = replace(STEP_CONFIG, inversion=replace(STEP_CONFIG.inversion, grid="snap"))
    (t,) = make_step_batch(items, models, snapped, models.encode_empty()).t
    assert set(((t + 1) % 250).tolist()) == {0}


def test_reference_inversion_does_not_follow_the_policy(moved):
    models, items = moved
    step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
    by_policy, _ = noisy_latents(step_batch, models, STEP_CONFIG)
    by_reference, _ = noisy_latents(
        step_batch, models, replace(STEP_CONFIG, inversion=replace(STEP_CONFIG.inversion, model="reference"))
    )
    assert (by_policy - by_reference).abs().max() > 1e-3


def test_a_missing_pair_leaves_the_mean_over_the_others(moved):
    models, items = moved
    six = items[:6]
    step_batch = make_step_batch(six, models, STEP_CONFIG, models.encode_empty())
    train_step(step_batch, models, STEP_CONFIG, pairs_per_step=8, clip=math.inf)  # two of eight were dropped
    got = torch.cat([p.grad.reshape(-1) for p in models.parameters()])
    assert distance(gradient(models, six, STEP_CONFIG)[0], got) < 1e-5


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
def test_any_number_of_processes_draws_the_same_timesteps_latents_and_prompts(world, tmp_path, shuffle):
    """1 process x 8 pairs, 2 x 4, 4 x 2; two steps; by position."""
    models, _ = world
    path = save_pairs(tmp_path / "pairs.parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=5)
    source = open_source(path)
    empty, drawn = models.encode_empty(), []
    for processes in (1, 2, 4):
        found = {}
        for rank in range(processes):
            config = DataConfig(shuffle=shuffle, prompt_dropout=0.3, crop="random")
            loader = PairLoader(source, config, resolution=32, seed=0, rank=rank, world=processes)
            for items in loader.steps(0, 2, PAIRS):
                step_batch = make_step_batch(items, models, STEP_CONFIG, empty)
                for i, item in enumerate(items):
                    assert item.position not in found
                    found[item.position] = (item.id, item.prompt, int(step_batch.t[0, i]), step_batch.x_0[i])
        drawn.append(found)
    first = drawn[0]
    assert sorted(first) == list(range(2 * PAIRS)) and len({found[2] for found in first.values()}) > 8
    for other in drawn[1:]:
        assert {p: found[:3] for p, found in other.items()} == {p: found[:3] for p, found in first.items()}
        # convolutions of a batch of another size add up in another order
        assert all(torch.allclose(other[p][3], first[p][3], atol=1e-5) for p in first)
