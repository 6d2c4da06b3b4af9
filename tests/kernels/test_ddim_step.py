"""inpo::ddim_step (on the CPU in Triton's interpreter), in place, against p x + q eps in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.ddim_step import _ddim_step, ddim_step_, ddim_step_reference

SHAPES = {
    "real": (2, 4, 64, 64),  # SD1.5's latent: 16 full blocks, no mask at work
    "odd tail": (3, 3, 19, 23),  # 1311 elements: a full block, then 287; images unaligned in memory
    "minimal": (1, 1, 1, 1),  # everything but one lane is masked
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of eps; the state and the arithmetic are fp32 in all
ROUNDED = 2.0**-23  # of the operands |p x| + |q eps|: two products and a sum, 1.5 * 2^-24 each way
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def operands(shape, dtype, seed=0):
    """x, eps, p, q; the coefficients unlike in every image."""
    rng = np.random.default_rng(seed)
    x, eps, p, q = (torch.from_numpy(rng.normal(size=size)) for size in (shape, shape, shape[:1], shape[:1]))
    return x.to(DEVICE).float(), eps.to(DEVICE, dtype), p.to(DEVICE).float(), q.to(DEVICE).float()


def check(got, x, eps, p, q):
    got, x, eps, p, q = (v.cpu().double().numpy() for v in (got, x, eps, p, q))
    p, q = p[:, None, None, None], q[:, None, None, None]
    assert (np.abs(got - (p * x + q * eps)) <= ROUNDED * (np.abs(p * x) + np.abs(q * eps))).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_in_place(shape, dtype):
    x, eps, p, q = operands(shape, dtype)
    whole = torch.cat([x, x, x])  # the op gets the middle of a larger tensor, as the wavefront gives it
    part, kept = whole[shape[0] : 2 * shape[0]], eps.clone()
    assert _ddim_step(part, eps, p, q) is None
    check(part, x, eps, p, q)
    assert torch.equal(whole[: shape[0]], x) and torch.equal(whole[2 * shape[0] :], x), "the neighbours are untouched"
    assert torch.equal(eps, kept)
    again = x.clone()
    _ddim_step(again, eps, p, q)
    assert torch.equal(again, part), "the same bits on every run"


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, seed):
    x, eps, p, q = operands(shape, dtype, seed)
    got = x.clone()
    _ddim_step(got, eps, p, q)
    check(got, x, eps, p, q)


@pytest.mark.parametrize("step", [_ddim_step, ddim_step_], ids=["kernel", "public"])
def test_idle_sample_keeps_its_bits(step):
    """p = 1, q = 0 for one image of three; its neighbours move, each by its own coefficients."""
    x, eps, p, q = operands(SHAPES["odd tail"], torch.float32)
    p[1], q[1], q[2], p[0] = 1, 0, 0, 0
    got = x.clone()
    step(got, eps, p, q)
    assert torch.equal(got[1], x[1])
    assert torch.equal(got[0], q[0] * eps[0]) and torch.equal(got[2], p[2] * x[2])


@pytest.mark.parametrize("step", [_ddim_step, ddim_step_], ids=["kernel", "public"])
def test_coefficients_may_be_columns(step):
    """The wavefront passes column j of the plan's (M, K) coefficients: strided, not the first M numbers of the plan."""
    x, eps, _, _ = operands(SHAPES["odd tail"], torch.float32)
    plan = torch.arange(42.0, device=DEVICE).view(2, 3, 7) / 10
    got = x.clone()
    step(got, eps, plan[0, :, 2], plan[1, :, 5])
    check(got, x, eps, plan[0, :, 2].clone(), plan[1, :, 5].clone())


def test_public_function_on_the_cpu():
    """Returns x itself; float64 stays float64, narrow eps does not narrow the state; no image is no work."""
    for dtype in (torch.float32, torch.float64):
        x, eps, p, q = (v.cpu() for v in operands((3, 2, 3, 5), torch.bfloat16))
        x = x.to(dtype)
        want = p.to(dtype).view(-1, 1, 1, 1) * x + q.to(dtype).view(-1, 1, 1, 1) * eps.to(dtype)
        assert torch.equal(ddim_step_reference(x, eps, p, q), want)
        got = ddim_step_(x, eps, p, q)
        assert got is x and x.dtype == dtype and torch.equal(x, want)
    for step in (_ddim_step, ddim_step_):
        step(*(v[:0] for v in operands((3, 2, 3, 5), torch.float32)))


def test_refuses():
    x, eps, p, q = operands((2, 1, 3, 3), torch.float32)
    for name, arguments in {
        "eps": (x, eps[:1], p, q),
        "p": (x, eps, p[:1], q),
        "q": (x, eps, p, q[:, None]),
    }.items():
        before = x.clone()
        with pytest.raises(ValueError, match=f"^{name} is "):
            ddim_step_(*arguments)
        assert torch.equal(x, before)


def test_opcheck():
    torch.library.opcheck(_ddim_step, operands((2, 1, 3, 5), torch.bfloat16))


def test_compiles_whole():
    """One graph with the mutation kept: what is read after the op is the new state."""
    x, eps, p, q = operands((3, 2, 5, 7), torch.float32)

    def two_steps(x, eps, p, q):
        x = x * 2
        _ddim_step(x, eps, p, q)
        y = x + 1
        _ddim_step(x, eps, q, p)
        return x, y

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, eps, p, q), two_steps(x, eps, p, q), strict=True):
        torch.testing.assert_close(got, want)
