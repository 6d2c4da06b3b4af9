"""objective.error_space=velocity: each method's loss and gradient against float64 NumPy written in v, and steps of runs
on v-models with zero terminal SNR."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_world import one_level, save_pairs, tiny_pipeline

from inpo_fast.config import parse
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method import objectives as obj
from inpo_fast.method.config import InversionConfig, ObjectiveConfig, Timesteps
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.methods import METHODS, variant_name
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.set_up import prepare
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

B, BETA, POINT = 4, 40.0, 0.01
rng = np.random.default_rng(3)
A = np.array([0.97, 0.5, 0.1, 0.0])  # the last has no image left in it
A, S = np.tile(A, 2), np.tile(np.sqrt(1 - A**2), 2)
LABEL, WEIGHT = np.array([1.0, 0.8, 1.0, 0.9]), np.array([1.0, 0.25, 2.0, 0.5])
wide = lambda c: c[:, None, None, None]  # noqa: E731
X_0, NOISE = (rng.normal(size=(2 * B, 2, 3, 3)) for _ in range(2))
X_T = wide(A) * X_0 + wide(S) * NOISE
REF = wide(A) * NOISE - wide(S) * X_0 + 0.3 * rng.normal(size=X_0.shape)  # v, arXiv 2202.00512
PRED = REF + 0.1 * rng.normal(size=REF.shape)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def errors(pred):
    v = wide(A) * NOISE - wide(S) * X_0
    return [((y - v) ** 2).mean((1, 2, 3)) for y in (pred, REF)]


def logit(pred):
    e, r = errors(pred)
    return -0.5 * BETA * ((e[:B] - e[B:]) - (r[:B] - r[B:]))


def preference(pred):
    z = logit(pred)
    return LABEL * np.logaddexp(0, -z) + (1 - LABEL) * np.logaddexp(0, z)


def kto(pred):
    e, r = errors(pred)
    gain, good = BETA * ((r - e) - POINT), np.concatenate([LABEL, 1 - LABEL])
    each = good / (1 + np.exp(gain)) + (1 - good) / (1 + np.exp(-gain))
    return (each[:B] + each[B:]) / 2


LOSSES = {
    "inpo": preference,
    "dpo": preference,
    "smpo": lambda pred: np.logaddexp(0, -(2 * LABEL - 1) * 10 * logit(pred)),
    "kto": kto,
    "sft": lambda pred: errors(pred)[0][:B],
}


def evaluate(method, pred=PRED, fused=True, **settings):
    sides = METHODS[method].sides
    tensors = [torch.from_numpy(np.array(x[: sides * B])) for x in (pred, REF, X_T, X_0, A, S)]
    weight, label, point = (torch.from_numpy(np.array(x)) for x in (WEIGHT, LABEL, POINT))
    config = ObjectiveConfig(beta=BETA, error_space="velocity", **settings)
    return obj.evaluate(method, config, *tensors, weight=weight, label=label, fused=fused, point=point)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient(method, fused):
    """Nothing divides by a: pairs without an image left are trained like the others."""
    want, got = LOSSES[method], evaluate(method, fused=fused)
    np.testing.assert_allclose(got.loss.numpy(), want(PRED), rtol=1e-9)
    direction, step = rng.normal(size=PRED.shape), 1e-6
    for image in range(METHODS[method].sides * B):
        d = np.zeros_like(PRED)
        d[image] = direction[image]
        slope = (WEIGHT * (want(PRED + step * d) - want(PRED - step * d))).sum() / (2 * step)
        assert (got.dpred[image].numpy() * d[image]).sum() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method", ["inpo", "smpo"])
def test_winner_preserving_is_that_of_v(method):
    """One factor a^2 in both of its products: the gate is the same number as in the noise, where there is one."""
    target = wide(A) * NOISE - wide(S) * X_0
    pred = target.copy()
    pred[:B] += 0.3 * rng.normal(size=pred[:B].shape)
    pred[B:] += 2.0 * (pred[:B] - target[:B]) + 0.01 * rng.normal(size=pred[:B].shape)
    gated, free = (evaluate(method, pred=pred, **more) for more in ({"winner_preserving": 0.5}, {}))
    g = pred - target
    cross, own = (g[:B] * g[B:]).mean((1, 2, 3)), (g[:B] ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(gated.gate.numpy(), np.clip(0.5 * own / cross, 0, 1), rtol=1e-9)
    assert (gated.gate < 0.5).all() and torch.equal(gated.logit, free.logit)
    torch.testing.assert_close(gated.dpred[B:], wide(gated.gate) * free.dpred[B:])


def test_names_and_refusals():
    config = ObjectiveConfig(error_space="velocity")
    assert variant_name("inpo", config, InversionConfig()) == "inpo-velocity"
    assert variant_name("dpo", config, InversionConfig()) == "dpo-velocity"
    obj.check_objective(config, DDPMPath.of(DDIMScheduler(**SD, prediction_type="v_prediction")))
    with pytest.raises(UserError, match=r"^objective.error_space=velocity is for models that predict v, this one pred"):
        obj.check_objective(config, DDPMPath.of(DDIMScheduler(**SD)))


def test_notes_on_zero_terminal_snr():
    zero = DDPMPath.of(DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True))
    plain = DDPMPath.of(DDIMScheduler(**SD, prediction_type="v_prediction"))
    (note,) = obj.objective_notes(ObjectiveConfig(), zero)
    assert "zero terminal SNR" in note and "error_space=velocity" in note and "\n" not in note
    almost = replace(zero, abar=zero.abar.clone().index_fill_(0, torch.tensor([999]), 2.0**-24))  # Euler's scheduler
    assert obj.objective_notes(ObjectiveConfig(), almost)
    for config, path in (
        (ObjectiveConfig(), plain),
        (ObjectiveConfig(error_space="velocity"), zero),
        (ObjectiveConfig(timesteps=Timesteps(max=900)), zero),
    ):
        assert obj.objective_notes(config, path) == []


def test_documented_weights():
    """docs/methods.md: of the weight abar_t that a v-model's timesteps have in the noise's error."""
    shares = {}
    for zero in (False, True):
        abar = DDIMScheduler(**SD, rescale_betas_zero_snr=zero).alphas_cumprod
        shares[zero] = float(abar[:500].sum() / abar.sum()), float(abar[999])
    assert shares[False] == pytest.approx((0.886, 0.0047), abs=5e-4)
    assert shares[True] == pytest.approx((0.911, 0.0), abs=5e-4)


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    pipeline = one_level(tiny_pipeline())
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    pipeline.save_pretrained(folder / "base")
    return folder / "base", save_pairs(folder / "pairs.parquet")


def test_the_noisiest_timestep_is_trained(zero_snr):
    """At t = 999 the noise of a v-model has no error and no gradient; v has both, and the logit still starts at 0."""
    base, pairs = zero_snr
    words = ["--models.base", str(base), "--data.source", str(pairs), "--output", "unused"]
    models = Models(prepare_pipeline(words), torch.device("cpu"))
    items = next(PairLoader(open_source(pairs), DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 2))
    found = {}
    for space in ("noise", "velocity"):
        objective = ObjectiveConfig(beta=500.0, error_space=space, timesteps=Timesteps(min=999))
        how = StepConfig(
            method="inpo",
            objective=objective,
            inversion=InversionConfig(steps=2),
            micro_batch=2,
            vae_sample=False,
            seed=0,
        )
        batch = make_step_batch(items, models, how, models.encode_empty())
        metrics, logits = train_step(batch, models, how, 2, math.inf)
        found[space] = metrics.values()
        assert torch.equal(logits, torch.zeros(2)) and found[space]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert found["noise"]["grad_norm"] == found["noise"]["winner_error"] == 0
    assert found["velocity"]["grad_norm"] > 0.01 and found["velocity"]["winner_error"] > 0.1
    for name in ("tau_rms_winner", "tau_residual_winner", "eps_scale"):  # of the noise, whatever is trained
        assert found["velocity"][name] == pytest.approx(found["noise"][name], rel=1e-5)


def prepare_pipeline(words):
    from inpo_fast.models.loading import open_pipeline

    return open_pipeline(parse("test", words).models)


def test_a_run_says_so_or_refuses(zero_snr, tmp_path):
    base, pairs = zero_snr
    words = [f"--models.base={base}", f"--data.source={pairs}", "--train.pairs_per_step=2", "--train.micro_batch=2"]
    run = prepare(parse("test", [*words, f"--output={tmp_path / 'noise'}"]), 0, 1, torch.device("cpu"))
    assert sum("zero terminal SNR" in note for note in run.notes) == 1
    run.folder.release()
    of_v = [*words, "--objective.error_space=velocity"]
    run = prepare(parse("test", [*of_v, f"--output={tmp_path / 'v'}"]), 0, 1, torch.device("cpu"))
    assert run.variant == "inpo-velocity" and not run.notes
    run.folder.release()
    one_level(tiny_pipeline()).save_pretrained(tmp_path / "epsilon")
    of_v[0] = f"--models.base={tmp_path / 'epsilon'}"
    with pytest.raises(UserError, match="this one predicts epsilon"):
        prepare(parse("test", [*of_v, f"--output={tmp_path / 'other'}"]), 0, 1, torch.device("cpu"))
