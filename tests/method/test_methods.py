"""Diffusion-KTO, SmPO-Diffusion and label smoothing against float64 NumPy written from their formulas: values, and
gradients by central differences; their values at step 0; and kto's reference point over parts of a step."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from inpo_fast.method import objectives as obj
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.methods import METHODS, uses_inversion, variant_name
from inpo_fast.method.reference_point import reference_point
from inpo_fast.runtime.errors import UserError

B, BETA = 5, 300.0
rng = np.random.default_rng(0)
LABEL, WEIGHT = np.array([1.0, 0.9, 0.55, 0.5, 0.7]), np.array([1.0, 0.25, 2.0, 0.5, 0.0])
REF, X_T, X_0 = (rng.normal(size=(2 * B, 2, 3, 3)) for _ in range(3))
PRED = REF + 0.05 * rng.normal(size=REF.shape)
A = rng.uniform(0.3, 0.9, B)
A, S = np.tile(A, 2), np.tile(np.sqrt(1 - A**2), 2)
POINT = 0.002


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def errors(pred):
    tau = (X_T - A[:, None, None, None] * X_0) / S[:, None, None, None]
    return [((y - tau) ** 2).mean((1, 2, 3)) for y in (pred, REF)]


def gap(pred):
    e, r = errors(pred)
    return (e[:B] - e[B:]) - (r[:B] - r[B:])


def kto(pred, label):
    """One image after the other, as a sum over both labels that it may have."""
    e, r = errors(pred)
    out = []
    for i in range(B):
        both = 0.0
        for image, good in ((i, label[i]), (B + i, 1 - label[i])):
            gain = r[image] - e[image] - POINT
            both += good * (1 - sigmoid(BETA * gain)) + (1 - good) * (1 - sigmoid(-BETA * gain))
        out.append(both / 2)
    return np.array(out)


def smpo(pred, label, gamma):
    return np.log1p(np.exp(-(2 * label - 1) * gamma * -0.5 * BETA * gap(pred)))


def cdpo(pred, label):
    z = -0.5 * BETA * gap(pred)
    return label * np.log1p(np.exp(-z)) + (1 - label) * np.log1p(np.exp(z))


def smoothed(share):
    """Each label with the share of wrong ones counted: right and kept, or wrong and swapped."""
    return LABEL * (1 - share) + (1 - LABEL) * share


CASES = {
    "kto": ("kto", {}, partial(kto, label=LABEL)),
    "kto, smoothed": ("kto", {"label_smoothing": 0.2}, partial(kto, label=smoothed(0.2))),
    "smpo": ("smpo", {}, partial(smpo, label=LABEL, gamma=10.0)),
    "smpo, gamma 3": ("smpo", {"gamma": 3.0}, partial(smpo, label=LABEL, gamma=3.0)),
    "smpo, smoothed": ("smpo", {"label_smoothing": 0.1}, partial(smpo, label=smoothed(0.1), gamma=10.0)),
    "inpo, smoothed": ("inpo", {"label_smoothing": 0.1}, partial(cdpo, label=smoothed(0.1))),
    "dpo, smoothed": ("dpo", {"label_smoothing": 0.3}, partial(cdpo, label=smoothed(0.3))),
}


def evaluate(method, settings, pred=PRED, fused=True, point=POINT, **more):
    tensors = [torch.from_numpy(np.array(x)) for x in (pred, REF, X_T, X_0, A, S)]
    weight, label = (torch.from_numpy(np.array(x)) for x in (WEIGHT, LABEL))
    config = ObjectiveConfig(beta=BETA, **settings)
    point = torch.tensor(point, dtype=torch.float64)
    return obj.evaluate(method, config, *tensors, weight=weight, label=label, fused=fused, point=point, **more)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("method", "settings", "want"), CASES.values(), ids=CASES)
def test_value_and_gradient(method, settings, want, fused):
    got = evaluate(method, settings, fused=fused)
    np.testing.assert_allclose(got.loss.numpy(), want(PRED), rtol=1e-11)
    np.testing.assert_allclose(got.logit.numpy(), -0.5 * BETA * gap(PRED), atol=1e-11)
    direction, step = rng.normal(size=PRED.shape), 1e-6
    for image in range(2 * B):  # unlike weights and labels: an image with another's slope would show
        d = np.zeros_like(PRED)
        d[image] = direction[image]
        slope = (WEIGHT * (want(PRED + step * d) - want(PRED - step * d))).sum() / (2 * step)
        assert (got.dpred.numpy() * d).sum() == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("method", "loss"), [("kto", 0.5), ("smpo", math.log(2)), ("inpo", math.log(2))])
def test_step_zero(method, loss):
    """Policy == reference: logits and reference point are 0 bit for bit. kto's utility is 1/2 there, whatever a label
    says; the others start at ln 2."""
    got = evaluate(method, {"label_smoothing": 0.1}, pred=REF, point=0.0)
    assert torch.equal(got.logit, torch.zeros(B, dtype=torch.float64))
    torch.testing.assert_close(got.loss, torch.full((B,), loss, dtype=torch.float64), rtol=1e-15, atol=0)
    assert got.dpred[2].abs().max() > 0


def test_kto_pulls_images_apart_by_themselves():
    """The winner's gradient does not know the loser; the point carries none."""
    alone = evaluate("kto", {}).dpred
    other = PRED.copy()
    other[B:] += 0.1
    np.testing.assert_array_equal(evaluate("kto", {}, pred=other).dpred[:B], alone[:B])
    assert (evaluate("inpo", {}, pred=other).dpred[:B] - evaluate("inpo", {}).dpred[:B]).abs().max() > 1e-6


def test_smpo_lets_undecided_pairs_rest():
    """Where y = 1/2 SmPO has no gradient; cDPO has one, back to the reference."""
    assert (evaluate("smpo", {}).dpred[3] == 0).all() and (evaluate("inpo", {}).dpred[3] != 0).any()


def test_winner_preserving_smpo_gates_the_losers_gradient_only():
    plain, gated = evaluate("smpo", {}), evaluate("smpo", {"winner_preserving": 0.9})
    assert torch.equal(gated.loss, plain.loss) and torch.equal(gated.dpred[:B], plain.dpred[:B])
    held = (gated.gate < 1) & (torch.from_numpy(LABEL) != 0.5)
    assert held.any()
    torch.testing.assert_close(gated.dpred[B:], plain.dpred[B:] * gated.gate[:, None, None, None])


def test_reference_point_is_the_mean_over_the_step():
    """Weighted, over both sides, whatever the parts; never below 0 (Eq. 8 of Diffusion-KTO clamps it)."""
    gain, weight = torch.from_numpy(rng.normal(size=(2, 6)) + 1).float(), torch.tensor([1, 2, 0, 1, 0.5, 3.0])
    parts = [(gain[:, lo : lo + 2], weight[lo : lo + 2]) for lo in (0, 2, 4)]
    want = np.average(gain.double().numpy(), weights=np.tile(weight, (2, 1)))
    for given in (parts, [(gain, weight)]):
        point = reference_point(given, torch.device("cpu"))
        assert point.dtype == torch.float32 and float(point) == pytest.approx(want, rel=1e-6)
    assert reference_point([(-gain.abs(), weight)], torch.device("cpu")) == 0
    assert reference_point([], torch.device("cpu")) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_method_that_there_is_not_is_refused(fused):
    """It must not train Diffusion-DPO in silence."""
    message = "method=ipo: unknown; take one of inpo, smpo, dpo, kto, sft"
    for ask in (
        lambda: evaluate("ipo", {}, fused=fused),
        lambda: variant_name("ipo", ObjectiveConfig(), InversionConfig()),
        lambda: uses_inversion("ipo", InversionConfig()),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_a_new_entry_is_a_method(monkeypatch):
    """One entry, and it has a loss, a gradient and a name; nothing else knows methods by name."""
    hinge = replace(METHODS["dpo"], loss=lambda terms, config: (1 - terms.logit).clamp_min(0), fused=False)
    monkeypatch.setitem(METHODS, "hinge", hinge)
    got = evaluate("hinge", {})
    np.testing.assert_allclose(got.loss.numpy(), np.maximum(1 + 0.5 * BETA * gap(PRED), 0), rtol=1e-11)
    assert got.dpred.abs().max() > 0
    assert variant_name("hinge", ObjectiveConfig(winner_preserving=0.5), InversionConfig(eta=0.1)) == "hinge-wp"
    package = Path(obj.__file__).parents[1]
    names = "|".join(METHODS)
    by_name = re.compile(rf"""method["']?\]? *(==|!=|not in|in) *[(\[{{]? *["']({names})["']""")
    assert by_name.search('if config.method == "kto":') and by_name.search("method not in ('sft',)")
    files = [path for path in package.rglob("*.py") if path.parent.name != "method"]
    assert len(files) > 50 and not [path for path in files if by_name.search(path.read_text(encoding="utf-8"))]
