"""inpo::errors (on the CPU in Triton's interpreter) and its gradient against the definition in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.errors import _errors, _errors_backward, errors, errors_reference

SHAPES = {
    "real": (2, 4, 64, 64),  # SD1.5's latent: 16 full blocks, no mask at work
    "odd tail": (3, 3, 19, 23),  # 1311 elements: a full block, then 287; images unaligned in memory
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


def operands(shape, dtype, seed=0):
    """pred, ref, x_t, x_0, a, s as in training: levels from a clean to a noisy end, x_t = a x_0 + s noise."""
    rng = np.random.default_rng(seed)
    pred, ref, noise, x_0 = (torch.from_numpy(rng.normal(size=shape)) for _ in range(4))
    abar = torch.linspace(0.99915, 0.0047, shape[0], dtype=torch.float64)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x_t = a[:, None, None, None] * x_0 + s[:, None, None, None] * noise
    return [x.to(DEVICE, dtype) for x in (pred, ref, x_t, x_0)] + [a.to(DEVICE).float(), s.to(DEVICE).float()]


def upstream(n):
    """Unequal: a kernel that took image 0's gradient for every image passes with equal ones."""
    return torch.tensor([700.0, -300.0, 41.0, 5.0])[:n].to(DEVICE)


def check(e, r, dpred, inputs, de, velocity=False):
    """Against float64, within what rounding of the *operands* in fp32 explains."""
    pred, ref, x_t, x_0, a, s, e, r, got, de = (x.detach().cpu().double().numpy() for x in (*inputs, e, r, dpred, de))
    a, s, de = (v[:, None, None, None] for v in (a, s, de))
    of_x, of_image = (a, 1.0) if velocity else (1.0, a)
    tau = (of_x * x_t - of_image * x_0) / s
    of_tau = (np.abs(of_x * x_t) + np.abs(of_image * x_0)) / s
    for name, value, y in (("e", e, pred), ("r", r, ref)):
        size = np.abs(y) + of_tau
        want = np.square(y - tau).mean((1, 2, 3))
        # 3 roundings and a division (2 ulp on a GPU) in the difference; 16 sums in sequence, 10 in the tree, 32 allowed
        bound = 2.0**-24 * (16 * (np.abs(y - tau) * size).mean((1, 2, 3)) + 32 * want)
        assert (np.abs(value - want) <= bound).all(), (name, value, want, bound)
    want = de * 2 * (pred - tau) / pred[0].size
    size = np.abs(de) * 2 * (np.abs(pred) + of_tau) / pred[0].size
    bound = STORE[inputs[0].dtype] * np.abs(want) + 16 * 2.0**-24 * size + SUBNORMAL[inputs[0].dtype]
    assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max()


def run(inputs, de, velocity=False):
    pred = inputs[0].clone().requires_grad_()
    e, r = _errors(pred, *inputs[1:], velocity)
    # r is given a gradient too: none of it may reach pred
    torch.autograd.backward((e, r), (de, 1e3 * torch.ones_like(de)))
    return e, r, pred.grad


@pytest.mark.parametrize("dtype", STORE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient(shape, dtype):
    inputs, de = operands(shape, dtype), upstream(shape[0])
    e, r, dpred = run(inputs, de)
    assert e.dtype == r.dtype == torch.float32 and dpred.dtype == dtype and dpred.shape == shape
    check(e, r, dpred, inputs, de)
    for first, again in zip((e, r, dpred), run(inputs, de), strict=True):
        assert torch.equal(first, again), "the same bits on every run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_velocity(dtype):
    """Of v-models: the target is (a x_t - x_0) / s, also where a is 0; value and gradient of kernel and definition."""
    inputs, de = operands(SHAPES["odd tail"], dtype), upstream(3)
    inputs[4][2], inputs[5][2] = 0.0, 1.0
    got = run(inputs, de, True)
    check(*got, inputs, de, True)
    pred = inputs[0].clone().cpu().requires_grad_()
    e, r = errors(pred, *(x.cpu() for x in inputs[1:]), True)
    e.backward(de.cpu())
    check(e, r, pred.grad, inputs, de, True)
    assert not torch.equal(got[0], run(inputs, de)[0])


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    dtype=st.sampled_from(list(STORE)),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, seed):
    inputs, de = operands(shape, dtype, seed), upstream(shape[0])
    check(*run(inputs, de), inputs, de)


@pytest.mark.parametrize("dtype", STORE, ids=str)
def test_equal_predictions_have_equal_errors(dtype):
    """Bit for bit where pred is ref, in fp32: the step-0 logit is exactly 0. Elsewhere they differ."""
    pred, ref, *rest = operands(SHAPES["odd tail"], dtype)
    ref[1] = pred[1]
    e, r = _errors(pred, ref, *rest)
    assert torch.equal(e == r, torch.tensor([False, True, False], device=DEVICE))
    assert torch.equal(*_errors(pred, pred, *rest))


def test_strided_vectors_and_empty_batch():
    """a, s and the upstream gradient may be columns of a matrix or expanded scalars; no image is no work."""
    inputs = operands(SHAPES["odd tail"], torch.float32)
    de = upstream(3)
    want = run(inputs, de)
    column = lambda v: torch.stack([v, v + 1], 1)[:, 0]  # noqa: E731
    for x, y in zip(run([*inputs[:4], column(inputs[4]), column(inputs[5])], column(de)), want, strict=True):
        assert torch.equal(x, y)
    pred = inputs[0].clone().requires_grad_()
    _errors(pred, *inputs[1:])[0].sum().backward()
    check(*want[:2], pred.grad, inputs, torch.ones_like(de))
    e, r = _errors(*(x[:0] for x in inputs))
    assert e.shape == r.shape == (0,)


def test_reference_is_the_definition():
    """The public function on the CPU: float64 to float64 rounding, a right gradient, fp32 sums of narrow inputs."""
    inputs = [x.cpu() for x in operands((3, 2, 3, 2), torch.float64)]
    pred = inputs[0].clone().requires_grad_()
    e, r = errors(pred, *inputs[1:])
    p, v, x_t, x_0, a, s = (x.double().numpy() for x in inputs)
    tau = (x_t - a[:, None, None, None] * x_0) / s[:, None, None, None]
    np.testing.assert_allclose(e.detach().numpy(), np.square(p - tau).mean((1, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(r.numpy(), np.square(v - tau).mean((1, 2, 3)), rtol=1e-13)
    assert torch.autograd.gradcheck(lambda x: errors_reference(x, *inputs[1:])[0], (pred,))
    for dtype in STORE:
        inputs, de = [x.cpu() for x in operands((3, 3, 19, 23), dtype)], upstream(3).cpu()
        pred = inputs[0].clone().requires_grad_()
        e, r = errors(pred, *inputs[1:])
        e.backward(de)
        check(e, r, pred.grad, inputs, de)


def test_public_function_runs_the_kernel(as_if_on_cuda):
    """The CUDA branch hands every argument on, and refuses what the kernel would read as something else."""
    inputs, de = operands(SHAPES["odd tail"], torch.bfloat16), upstream(3)
    pred = inputs[0].clone().requires_grad_()
    e, r = errors(pred, *inputs[1:])
    e.backward(de)
    for got, want in zip((e, r, pred.grad), run(inputs, de), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(errors(*inputs, True), run(inputs, de, True), strict=False):
        assert torch.equal(got, want)
    for k in range(4):
        for uneven in (inputs[k].mT.contiguous().mT, inputs[k].contiguous(memory_format=torch.channels_last)):
            with pytest.raises(ValueError, match=r"must be contiguous; call \.contiguous"):
                errors(*inputs[:k], uneven, *inputs[k + 1 :])
    for k in (4, 5):
        with pytest.raises(ValueError, match=r"^a and s must be float32"):
            errors(*inputs[:k], inputs[k].double(), *inputs[k + 1 :])


def test_refuses():
    pred, ref, x_t, x_0, a, s = operands((2, 1, 3, 3), torch.float32)
    for name, arguments in (
        ("ref", (pred, ref[:1], x_t, x_0, a, s)),
        ("ref", (pred, ref.to("meta"), x_t, x_0, a, s)),
        ("x_t", (pred, ref, x_t[:, :, :2], x_0, a, s)),
        ("x_0", (pred, ref, x_t, x_0.flatten(1), a, s)),
        ("a", (pred, ref, x_t, x_0, a[:1], s)),
        ("s", (pred, ref, x_t, x_0, a, s[:, None])),
        ("s", (pred, ref, x_t, x_0, a, s.to("meta"))),
    ):
        with pytest.raises(ValueError, match=f"^{name} is "):
            errors(*arguments)


def test_opcheck():
    inputs = operands((2, 1, 3, 5), torch.float32)
    torch.library.opcheck(_errors, (inputs[0].requires_grad_(), *inputs[1:]))
    pred, _, x_t, x_0, a, s = (x.detach() for x in inputs)
    torch.library.opcheck(_errors_backward, (pred, x_t, x_0, a, s, upstream(2)))


def test_compiles_whole():
    """One graph, the same value and gradient: fake tensors and the registered gradient stand for the kernels."""
    inputs, de = operands((3, 2, 5, 7), torch.float32), upstream(3)

    def weighed(pred, ref, x_t, x_0, a, s, de):
        e, r = _errors(2 * pred, ref, x_t, x_0, a, s)
        return (de * (e - r)).sum()

    both = []
    for f in (weighed, torch.compile(weighed, fullgraph=True, backend="aot_eager")):
        pred = inputs[0].clone().requires_grad_()
        value = f(pred, *inputs[1:], de)
        value.backward()
        both.append((value.detach(), pred.grad))
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """2^31 + 131072 elements in each of four bf16 tensors, 20 GiB with dpred: a few images, as they are alone."""
    images = [torch.randn(131080, 4, 64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    a, s, de = (0.1 + torch.rand(131080, device="cuda") for _ in range(3))
    some = torch.tensor([0, 1, 65535, 65536, 131071, 131072, 131079], device="cuda")
    few = run([x[some] for x in (*images, a, s)], de[some])
    pred = images[0].requires_grad_()
    e, r = _errors(pred, *images[1:], a, s)
    e.backward(de)
    for got, want in zip((e, r, pred.grad), few, strict=True):
        assert torch.equal(got[some], want)
