"""inpo::inpo_loss (on the CPU in Triton's interpreter) against its formulas in float64 NumPy, and against autograd."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.errors import errors
from inpo_kernels.inpo_loss import COLUMNS, Objective, _inpo_loss, inpo_loss, inpo_loss_reference
from kernel_checks import kinds

from inpo_fast.method import losses
from inpo_fast.method.noise_path import target

SHAPES = {
    "real": (1, 4, 32, 32),  # pairs and a quarter of SD1.5's latent: 2 full blocks, no mask at work
    "odd tail": (3, 3, 31, 23),  # 2139 elements: a full block, then 91; images unaligned in memory
    "minimal": (1, 1, 1, 1),  # everything but one lane is masked
}
# Sums are fp32 whatever the inputs are: 2^-24 of the operands. What differs is the rounding of dpred when it is stored.
STORE = {
    torch.float32: 2.0**-23,  # an ulp
    torch.float16: 2.0**-10,  # an ulp
    torch.bfloat16: 2.0**-7,  # an ulp: the interpreter truncates where the GPU rounds to nearest
}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 2.0**-24
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def operands(shape, dtype, seed=0, x_dtype=torch.float32):
    """pred, ref, x_t, x_0, a, s of (B, C, H, W) pairs as in training, then weight and label: unlike in every pair."""
    rng = np.random.default_rng(seed)
    pairs, shape = shape[0], (2 * shape[0], *shape[1:])
    noise, x_0, off, more = (torch.from_numpy(rng.normal(size=shape)) for _ in range(4))
    abar = torch.linspace(0.9, 0.0047, len(noise), dtype=torch.float64)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x_t = a[:, None, None, None] * x_0 + s[:, None, None, None] * noise
    # a loser's residual leans to its winner's in two pairs of three and away from it in the second: gates below 1
    off[pairs:] += torch.tensor([1.5, -1.5, 2.5, 3.0])[:pairs, None, None, None] * off[:pairs]
    ref = noise + 0.3 * off
    vectors = a, s, torch.tensor([0.25, 3.0, 0.7, 11.0])[:pairs], torch.tensor([1.0, 0.75, 0.0, 0.5])[:pairs]
    images = (ref + 0.1 * more).to(dtype), ref.to(dtype), x_t.to(x_dtype), x_0.to(x_dtype)
    return [x.to(DEVICE) for x in images] + [v.to(DEVICE).float() for v in vectors]


def numbers(*tensors):
    return [x.detach().cpu().double().numpy() for x in tensors]


def check(got, inputs, beta, mu=None, velocity=False):
    """Image means from the operands, logit from the means, loss and gate from logit and means, dpred from all of them:
    each link in float64 from the fp32 numbers before it, within what rounding its operands in fp32 explains."""
    y, v, x_t, x_0, a, s, weight, label = numbers(*inputs)
    loss, logit, gate, image, dpred = numbers(*got)
    wide, pairs = (lambda c: c[:, None, None, None]), len(weight)
    of_x, of_image = (wide(a), 1.0) if velocity else (1.0, wide(a))
    tau = (of_x * x_t - of_image * x_0) / wide(s)
    of_tau = (np.abs(of_x * x_t) + np.abs(of_image * x_0)) / wide(s)
    # operands with what their own rounding is relative to: differences cancel
    g, d, t, p, r = (y - tau, np.abs(y) + of_tau), (v - tau, np.abs(v) + of_tau), (tau, of_tau), (y, 0), (v, 0)
    other = tuple(np.roll(x, pairs, 0) for x in g)
    products = dict(zip(COLUMNS, ((g, g), (d, d), (t, t), (r, r), (p, r), (t, r), (g, other)), strict=True))
    assert got.image.shape == (2 * pairs, 7)
    for k, (name, ((x, of_x), (z, of_z))) in enumerate(products.items()):
        want = (x * z).mean((1, 2, 3)) * (name != "cross" or mu is not None)
        # 16 sums in sequence, 11 in the tree, 32 allowed; 8 roundings in each factor
        bound = FP32 * (8 * (of_x * np.abs(z) + of_z * np.abs(x)) + 32 * np.abs(x * z)).mean((1, 2, 3))
        assert (np.abs(image[:, k] - want) <= bound).all(), (name, image[:, k], want, bound)

    (e_w, e_l), (r_w, r_l) = np.split(image[:, 0], 2), np.split(image[:, 1], 2)
    want = -0.5 * beta * ((e_w - e_l) - (r_w - r_l))
    assert (np.abs(logit - want) <= FP32 * 2 * beta * (np.abs(e_w - e_l) + np.abs(r_w - r_l))).all()

    # exp of z is off by |z| roundings where it is made of exp2
    chance = 8 + np.abs(logit) * (DEVICE == "cuda")
    want = label * np.logaddexp(0, -logit) + (1 - label) * np.logaddexp(0, logit)
    assert (np.abs(loss - want) <= FP32 * chance * want).all(), (loss, want)

    cross = image[:pairs, 6]
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(cross > 0, np.clip((1 - (mu or 0)) * e_w / cross, 0, 1), 1)
    np.testing.assert_allclose(gate, want, rtol=8 * FP32, atol=0)

    doubt, belief = np.exp(-np.logaddexp(0, logit)), np.exp(-np.logaddexp(0, -logit))
    slope, size = label * doubt - (1 - label) * belief, label * doubt + (1 - label) * belief
    each = lambda c: wide(beta / g[0][0].size * np.concatenate([weight * c, -weight * gate * c]))  # noqa: E731
    want, size = each(slope) * g[0], np.abs(each(size)) * g[1] * np.concatenate([chance, chance])[:, None, None, None]
    bound = STORE.get(got.dpred.dtype, 0) * np.abs(want) + 2 * FP32 * size + SUBNORMAL.get(got.dpred.dtype, 0)
    assert (np.abs(dpred - want) <= bound).all(), np.abs(dpred - want).max()


def kernel(inputs, beta, mu=None, velocity=False):
    return Objective(*_inpo_loss(*inputs, beta, mu, velocity))


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("mu", [None, 0.25], ids=["no gate", "gate"])
@pytest.mark.parametrize(
    "shape, dtype",
    kinds(
        product(SHAPES, STORE), [("real", torch.bfloat16), *product(["odd tail"], STORE), ("minimal", torch.float32)]
    ),
    ids=str,
)
def test_value_and_gradient(shape, dtype, mu):
    inputs = operands(SHAPES[shape], dtype, x_dtype=dtype if mu else torch.float32)
    got = kernel(inputs, 30.0, mu)
    assert got.dpred.dtype == dtype and all(x.dtype == torch.float32 for x in got[:4])
    check(got, inputs, 30.0, mu)
    check(inpo_loss_reference(*inputs, 30.0, mu), inputs, 30.0, mu)
    assert same(kernel(inputs, 30.0, mu), got), "the same bits on every run"


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    dtypes=st.tuples(*(st.sampled_from(list(STORE)) for _ in range(2))),
    seed=st.integers(0, 99),
    mu=st.sampled_from([None, 0.0, 0.6, 1.0]),
    layouts=st.tuples(*(st.sampled_from(list(LAYOUTS)) for _ in range(4))),
)
def test_any_shape(shape, dtypes, seed, mu, layouts):
    inputs = operands(shape, dtypes[0], seed, dtypes[1])
    got = kernel([LAYOUTS[name](x) for name, x in zip(layouts, inputs, strict=False)] + inputs[4:], 7.0, mu)
    check(got, inputs, 7.0, mu)


@pytest.mark.parametrize("of_pred", LAYOUTS)
def test_layout_changes_nothing(of_pred):
    """The same bits however each of the four images lies in memory: all unlike at once. dpred lies as pred does."""
    inputs = operands(SHAPES["odd tail"], torch.bfloat16)
    names = list(LAYOUTS)
    turn = names.index(of_pred)
    turned = [LAYOUTS[names[turn - k]](x) for k, x in enumerate(inputs[:4])]
    got = kernel(turned + inputs[4:], 30.0, 0.25)
    assert same(got, kernel(inputs, 30.0, 0.25))
    assert got.dpred.stride() == torch.empty_like(turned[0]).stride()
    for k, name in enumerate(("pred", "ref", "x_t", "x_0")):
        uneven = [*inputs[:k], inputs[k].mT.contiguous().mT, *inputs[k + 1 :]]
        with pytest.raises(ValueError, match=f"pixels of {name} are not evenly spaced"):
            kernel(uneven, 30.0)


@pytest.mark.parametrize("dtype", kinds(STORE, [torch.bfloat16]), ids=str)
def test_pred_equal_to_ref(dtype):
    """Bit for bit in fp32: logit 0, loss ln 2, whatever the errors are; the gradient is that of a sigmoid of 1/2."""
    pred, ref, *rest = operands(SHAPES["odd tail"], dtype)
    both = [pred, torch.cat([ref[:1], pred[1:2], ref[2:4], pred[4:5], ref[5:]]), *rest]  # the second pair alone
    for beta in (1.0, 2000.0):
        got = kernel(both, beta)
        assert torch.equal(got.logit == 0, torch.tensor([False, True, False], device=DEVICE))
        assert torch.equal(got.image[[1, 4], 0], got.image[[1, 4], 1])
        rest[-1][1] = 1.0
        got = kernel([pred, pred, *rest], beta, 0.5)
        assert torch.equal(got.logit, torch.zeros(3, device=DEVICE))
        assert torch.equal(got.loss[1], torch.tensor(math.log(2), device=DEVICE))
        check(got, [pred, pred, *rest], beta, 0.5)


def test_winner_and_loser_exchanged():
    """The logit turns its sign, loss and gradient follow; with the label turned too all is as before, bit for bit."""
    inputs = operands(SHAPES["odd tail"], torch.float32)
    inputs[7] = torch.tensor([1.0, 0.5, 0.0], device=DEVICE)  # products with these are exact, fused or not
    swapped = [x.roll(3, 0) for x in inputs[:6]] + inputs[6:]
    got, turned = kernel(inputs, 30.0), kernel(swapped, 30.0)
    assert torch.equal(turned.logit, -got.logit) and torch.equal(turned.image, got.image.roll(3, 0))
    assert (turned.loss != got.loss).tolist() == [True, False, True] and (turned.dpred[3] != got.dpred[0]).all()
    back = kernel([*swapped[:7], 1 - inputs[7]], 30.0)
    assert torch.equal(back.loss, got.loss) and torch.equal(back.dpred, got.dpred.roll(3, 0))


def test_large_logits():
    """Finite out to +-2000, and the loss keeps fp32's relative precision down to 1e-12 and below."""
    wanted = torch.tensor([80.0, -80.0, 2000.0, -2000.0, 27.6, 16.0, 12.0, 5.0, -0.3])
    gap = (2 * wanted.abs() / 2000).sqrt()[:, None, None, None].expand(-1, 1, 2, 3)
    up = (wanted > 0)[:, None, None, None]
    pred = torch.cat([torch.where(up, 0, gap), torch.where(up, gap, 0)]).to(DEVICE)
    zero, one = torch.zeros_like(pred), torch.ones(len(pred), device=DEVICE)
    for label in (1.0, 0.0, 0.25):
        inputs = [pred, zero, zero, zero, one, one, one[:9], label * one[:9]]
        got = kernel(inputs, 2000.0)
        torch.testing.assert_close(got.logit.cpu(), wanted, rtol=1e-6, atol=0)
        assert all(x.isfinite().all() for x in got)
        check(got, inputs, 2000.0)
        if label == 1:
            assert 0.9e-12 < got.loss[4] < 1.1e-12 and got.loss[3] == -got.logit[3]
            assert not got.dpred[[2, 11]].any(), "nothing is left to learn at 2000"


@pytest.mark.parametrize("mu", [None, 0.25], ids=["no gate", "gate"])
def test_velocity(mu):
    """Of v-models, at zero terminal SNR too: a is 0 in the last pair, where the noise has no error to speak of."""
    inputs = operands(SHAPES["odd tail"], torch.float32)
    a, s = (
        torch.tensor([0.95, 0.3, 0.0]).repeat(2),
        torch.tensor([0.95, 0.3, 0.0]).square().neg().add(1).sqrt().repeat(2),
    )
    inputs[4:6] = a.to(DEVICE), s.to(DEVICE)
    got = kernel(inputs, 30.0, mu, True)
    check(got, inputs, 30.0, mu, True)
    check(inpo_loss_reference(*inputs, 30.0, mu, True), inputs, 30.0, mu, True)
    assert same(kernel(inputs, 30.0, mu, True), got), "the same bits on every run"
    assert got.dpred[2].abs().max() > 0
    assert not same(kernel(inputs, 30.0, mu), got)
    still = kernel([inputs[0], inputs[0], *inputs[2:]], 2000.0, mu, True)
    assert torch.equal(still.logit, torch.zeros(3, device=DEVICE))
    # beta / a^2 of each pair on the noise that these velocities mean, in float64
    wide = [x.cpu().double() for x in operands((1, 2, 3, 5), torch.float32)]
    a, s = torch.full((2,), 0.28, dtype=torch.float64), torch.full((2,), 0.96, dtype=torch.float64)
    noise = [0.28 * v + 0.96 * wide[2] for v in wide[:2]]
    one = inpo_loss_reference(*wide[:4], a, s, *wide[6:], 3.0, mu, True)
    other = inpo_loss_reference(*noise, *wide[2:4], a, s, *wide[6:], 3.0 / 0.28**2, mu)
    for x, y in ((one.loss, other.loss), (one.logit, other.logit), (one.gate, other.gate)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.dpred, 0.28 * other.dpred, rtol=1e-9, atol=1e-12)  # d noise / d v


def test_gate():
    """Products of the residuals of every kind; the loser's gradient is scaled, value, logit and winner are not."""
    pred, _, x_t, x_0, a, s, _, _ = operands((4, 2, 3, 5), torch.float32)
    a, s = torch.zeros_like(a), torch.ones_like(s)  # tau is x_t: residuals are what is put in
    own = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    factor = torch.tensor([3.0, 0.5, -2.0, 0.0], device=DEVICE)[:, None, None, None]
    inputs = [x_t + torch.cat([own, factor * own]), pred, x_t, x_0, a, s, 1 + torch.arange(4.0, device=DEVICE)]
    inputs.append(torch.ones(4, device=DEVICE))
    free = kernel(inputs, 3.0)
    assert torch.equal(free.gate, torch.ones(4, device=DEVICE)) and not free.image[:, 6].any()
    for mu, gates in ((0.25, [0.25, 1, 1, 1]), (0.7, [0.1, 0.6, 1, 1]), (0.0, [1 / 3, 1, 1, 1]), (1.0, [0, 0, 1, 1])):
        got = kernel(inputs, 3.0, mu)
        torch.testing.assert_close(got.gate.cpu(), torch.tensor(gates, dtype=torch.float32), rtol=1e-5, atol=0)
        check(got, inputs, 3.0, mu)
        assert torch.equal(got.image[:4, 6], got.image[4:, 6])
        assert torch.equal(got.loss, free.loss) and torch.equal(got.logit, free.logit)
        assert torch.equal(got.dpred[:4], free.dpred[:4]), "the winner's gradient is whole"
        assert got.dpred[4:][got.gate == 0].abs().sum() == 0


@pytest.mark.parametrize("mu", [None, 0.25, 1.0])
def test_equals_errors_losses_and_autograd(mu):
    """The path of plain functions: float64 to its rounding on the CPU, the kernel to fp32's, magnified by beta / 2."""
    narrow = operands((3, 2, 5, 7), torch.float32)
    narrow[7] = torch.ones_like(narrow[7])
    inputs = [x.cpu().double() for x in narrow]
    pred, (ref, x_t, x_0, a, s, weight, _) = inputs[0].clone().requires_grad_(), inputs[1:]
    e, r = errors(pred, ref, x_t, x_0, a, s)
    (e_w, e_l), (r_w, r_l), gate = e.chunk(2), r.chunk(2), torch.ones(3, dtype=torch.float64)
    if mu is not None:
        gate = losses.loser_gate(*(pred - target(x_t, x_0, a, s)).chunk(2), mu)
        e_l = losses.gate_gradient(e_l, gate)
    logit = losses.logit(e_w, e_l, r_w, r_l, 30.0)
    loss = losses.preference_loss(logit)
    (weight * loss).sum().backward()
    assert mu is None or (gate < 1).any()
    ours = inpo_loss(*inputs[:6], beta=30.0, mu=mu, weight=weight)
    for got, rtol, atol in ((ours, 1e-12, 1e-14), (kernel(narrow, 30.0, mu), 1e-4, 1e-6)):
        assert got is not ours or got.loss.dtype == got.image.dtype == torch.float64
        for value, want in ((got.loss, loss), (got.logit, logit), (got.gate, gate), (got.dpred, pred.grad)):
            torch.testing.assert_close(value.cpu().double(), want.detach(), rtol=rtol, atol=atol)
        torch.testing.assert_close(got.image[:, 0].cpu().double(), e.detach(), rtol=rtol, atol=atol)


def test_public_function_runs_the_kernel(as_if_on_cuda):
    """Every argument is handed on, weight and label are 1 without it, vectors may be columns; no graph is made."""
    inputs = operands((3, 2, 3, 5), torch.bfloat16)
    columns = [torch.stack([v, v + 1], 1)[:, 0] for v in inputs[4:]]
    options = {"beta": 30.0, "mu": 0.25, "weight": columns[2], "label": columns[3]}
    got = inpo_loss(inputs[0].requires_grad_(), inputs[1].requires_grad_(), *inputs[2:4], *columns[:2], **options)
    assert same(got, kernel([x.detach() for x in inputs], 30.0, 0.25)) and not got.loss.requires_grad
    of_v = inpo_loss(*inputs[:4], *columns[:2], **options, velocity=True)
    assert same(of_v, kernel([x.detach() for x in inputs], 30.0, 0.25, True))
    one = torch.ones_like(inputs[6])
    inputs = [x.detach() for x in inputs]
    assert same(inpo_loss(*inputs[:6], beta=30.0), kernel([*inputs[:6], one, one], 30.0))
    for name in ("a", "s", "weight", "label"):
        given = dict(zip(("a", "s", "weight", "label"), inputs[4:], strict=True))
        given[name] = given[name].double()
        with pytest.raises(ValueError, match=f"^{name} must be float32"):
            inpo_loss(*inputs[:4], **given, beta=1.0)
    for k, name in enumerate(("pred", "ref", "x_t", "x_0")):
        uneven = [*inputs[:k], inputs[k].mT.contiguous().mT, *inputs[k + 1 : 6]]
        with pytest.raises(ValueError, match=f"pixels of {name} are not evenly spaced"):
            inpo_loss(*uneven, beta=1.0)


def test_refuses():
    pred, ref, x_t, x_0, a, s, weight, label = operands((2, 1, 3, 3), torch.float32)
    for words, arguments, options in (
        ("pred is ", (pred[:3], ref[:3], x_t[:3], x_0[:3], a[:3], s[:3]), {}),
        ("pred is ", (pred[0], ref[0], x_t[0], x_0[0], a, s), {}),
        ("ref is ", (pred, ref[:2], x_t, x_0, a, s), {}),
        ("ref is ", (pred, ref.to("meta"), x_t, x_0, a, s), {}),
        ("ref is torch.float16, pred torch.float32", (pred, ref.half(), x_t, x_0, a, s), {}),
        ("x_t is ", (pred, ref, x_t[:, :, :2], x_0, a, s), {}),
        ("x_0 is ", (pred, ref, x_t, x_0.flatten(1), a, s), {}),
        ("a is ", (pred, ref, x_t, x_0, a[:2], s), {}),
        ("s is ", (pred, ref, x_t, x_0, a, s[:, None]), {}),
        ("weight is ", (pred, ref, x_t, x_0, a, s), {"weight": a}),
        ("label is ", (pred, ref, x_t, x_0, a, s), {"label": label[:1]}),
        ("label is ", (pred, ref, x_t, x_0, a, s), {"weight": weight, "label": label.to("meta")}),
        ("mu is 1.5", (pred, ref, x_t, x_0, a, s), {"mu": 1.5}),
        ("mu is -0.1", (pred, ref, x_t, x_0, a, s), {"mu": -0.1}),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            inpo_loss(*arguments, beta=2.0, **options)


def test_no_pair_is_no_work():
    inputs = operands((2, 1, 3, 3), torch.bfloat16)
    for got in (kernel([x[:0] for x in inputs], 2.0), inpo_loss(*(x[:0] for x in inputs[:6]), beta=2.0)):
        assert [tuple(x.shape) for x in got] == [(0,), (0,), (0,), (0, 7), (0, 1, 3, 3)]


def test_opcheck():
    inputs = operands((2, 1, 3, 5), torch.bfloat16)
    inputs[0] = LAYOUTS["channels_last"](inputs[0])
    for mu, velocity in ((None, False), (0.25, True)):
        torch.library.opcheck(_inpo_loss, (*inputs, 2.0, mu, velocity))


def test_compiles_whole():
    """One graph, the same numbers: fake tensors stand for the kernels."""
    inputs = operands((2, 2, 5, 7), torch.float32)

    def step(pred, *rest):
        loss, logit, gate, image, dpred = _inpo_loss(2 * pred, *rest, 3.0, 0.25)
        return loss.sum(), logit, gate, image, 2 * dpred

    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """2^31 + 131072 elements in each of four bf16 tensors, 20 GiB with dpred: a few pairs, as they are alone."""
    shape = (131080, 4, 64, 64)
    pairs = shape[0] // 2
    images = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    a, s, weight = (0.1 + torch.rand(n, device="cuda") for n in (2 * pairs, 2 * pairs, pairs))
    whole = inpo_loss(*images, a, s, beta=0.5, mu=0.25, weight=weight)
    some = torch.tensor([0, 1, 32768, 65535, 65539], device="cuda")
    both = torch.cat([some, some + pairs])
    few = inpo_loss(*(x[both] for x in images), a[both], s[both], beta=0.5, mu=0.25, weight=weight[some])
    assert same(few, Objective(*(x[some] for x in whole[:3]), whole.image[both], whole.dpred[both]))
