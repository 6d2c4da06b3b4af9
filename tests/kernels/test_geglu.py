"""inpo::geglu (on the CPU in Triton's interpreter) and its gradient against h g Phi(g) in float64 with math.erfc."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.geglu import _geglu, _geglu_backward, geglu
from kernel_checks import kinds

SHAPES = {
    "real": (2, 9, 2560),  # SD1.5's first level: 5 full blocks of 256 columns; 18 rows, the last block of 8 holds 2
    "widest": (5, 10240),  # the lowest level: 10 full blocks of 512
    "odd tail": (7, 11, 120),  # 60 columns in one block of 64; 77 rows, 13 in the last block of 32
    "two blocks": (3, 1400),  # 512 columns and 188 masked ones; the halves of a row are unaligned in memory
    "minimal": (2,),  # one row, one column
}
STORE = {  # the rounding of a result when it is stored; all arithmetic before is fp32
    torch.float32: 2.0**-23,  # an ulp
    torch.float16: 2.0**-10,  # an ulp
    torch.bfloat16: 2.0**-7,  # an ulp: the interpreter truncates where the GPU rounds to nearest
}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
FP32 = 4 * 2.0**-24  # of the operands: erf, exp (2 ulp on a GPU) and the products; 1 + erf(g) cancels for negative g
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def walled(v):
    """v between NaNs: a load past its ends that no mask stops is seen in the results."""
    wall = torch.full((v.numel() + 8192,), torch.nan, dtype=v.dtype, device=DEVICE)
    return wall.as_strided(v.shape, v.stride(), 4096).copy_(v)


def operands(shape, dtype, seed=0):
    """x and dy; gates up to 6, unequal upstream gradients."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=shape), rng.normal(size=(*shape[:-1], shape[-1] // 2))
    x[..., shape[-1] // 2 :] *= 2
    dy *= np.array([3.0, -0.5, 0.1])[np.arange(dy.size).reshape(dy.shape) // dy.shape[-1] % 3]
    return tuple(walled(torch.from_numpy(v).to(DEVICE, dtype)) for v in (x, dy))


def run(x, dy, f=_geglu):
    x = x.detach().requires_grad_()
    y = f(x)
    y.backward(dy)
    return y, x.grad


def check(results, x, dy):
    dtype, (h, g), dy = x.dtype, np.split(x.cpu().double().numpy(), 2, -1), dy.cpu().double().numpy()
    cdf = 0.5 * np.vectorize(math.erfc)(-g / math.sqrt(2))
    slope = cdf + g * np.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    want = h * g * cdf, np.concatenate([dy * g * cdf, dy * h * slope], -1)
    size = np.abs(h * g), np.abs(np.concatenate([dy * g, dy * h], -1))
    for name, got, value, scale in zip(("y", "dx"), results, want, size, strict=True):
        assert got.dtype == dtype and got.shape == value.shape, name
        off = np.abs(got.detach().cpu().double().numpy() - value)
        bound = STORE[dtype] * np.abs(value) + FP32 * scale + SUBNORMAL[dtype]
        assert (off <= bound).all(), (name, off.max(), (off[bound > 0] / bound[bound > 0]).max())


FEW = [("real", torch.bfloat16), ("widest", torch.float16), *product(["odd tail"], STORE)]
FEW += product(["two blocks", "minimal"], [torch.float32])


@pytest.mark.parametrize("shape, dtype", kinds(product(SHAPES, STORE), FEW), ids=str)
def test_value_and_gradient(shape, dtype):
    x, dy = operands(SHAPES[shape], dtype)
    results = run(x, dy)
    check(results, x, dy)
    for first, again in zip(results, run(x, dy), strict=True):
        assert torch.equal(first, again), "the same bits on every run"


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lead=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(1, 700),
    dtype=st.sampled_from(list(STORE)),
    seed=st.integers(0, 99),
)
def test_any_shape(lead, width, dtype, seed):
    x, dy = operands((*lead, 2 * width), dtype, seed)
    check(run(x, dy), x, dy)


@pytest.mark.parametrize("dtype", STORE, ids=str)
def test_large_gates_and_zeros(dtype):
    """Far gates pass h or nothing; where h or g is 0 the value is 0, and 0 is the exact gradient of the other."""
    g = torch.tensor([20.0, -20.0, 1e4, -1e4, 0.0, -0.0, 5.5, -5.5], dtype=dtype, device=DEVICE)
    h = torch.tensor([1.0, -2.5, 0.0], dtype=dtype, device=DEVICE)
    x = torch.cat([h[:, None].expand(3, 8), g.expand(3, 8)], 1)
    dy = torch.tensor([1.0, -0.5, 2.0], dtype=dtype, device=DEVICE)[:, None].expand(3, 8).contiguous()
    y, dx = run(x, dy)
    check((y, dx), x, dy)
    assert torch.equal(y[:2, [0, 2]], (x[:2, :8] * x[:2, 8:])[:, [0, 2]])
    assert not y[:, [1, 3, 4, 5]].any() and not y[2].any() and not dx[2, 8:].any() and not dx[:, 4:6].any()
    assert torch.equal(dx[:, 12], 0.5 * (dy * x[:, :8])[:, 4])


def test_layouts_and_empty_batch():
    x, dy = operands(SHAPES["odd tail"], torch.float32)
    dy[:] = dy[:, :, :1]
    want = run(x, dy)
    assert torch.equal(run(x, dy[:, :, :1].clone().expand(dy.shape))[1], want[1])
    assert torch.equal(run(x, dy.transpose(0, 2).contiguous().transpose(0, 2))[1], want[1])
    for shape in ((0, 3, 8), (3, 0)):
        y, dx = run(*operands(shape, torch.float32))
        assert y.shape == (*shape[:-1], shape[-1] // 2) and dx.shape == shape


def test_public_function():
    """The definition on the CPU, with a right gradient."""
    for dtype in STORE:
        x, dy = (v.cpu() for v in operands((3, 5, 14), dtype))
        check(run(x, dy, geglu), x, dy)
    x, dy = (v.cpu() for v in operands((3, 14), torch.float64))
    assert torch.autograd.gradcheck(geglu, (x.requires_grad_(),))


def test_diffusers_module():
    module = pytest.importorskip("diffusers.models.activations").GEGLU(12, 9).to(DEVICE)
    x = torch.randn(4, 12, device=DEVICE)
    y, want = _geglu(module.proj(x)), module(x)
    torch.testing.assert_close(y, want, rtol=2.0**-22, atol=2.0**-22)
    dy = torch.randn_like(y)
    both = (torch.autograd.grad(v, module.proj.weight, dy)[0] for v in (y, want))
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


def test_dispatch_and_refusals(as_if_on_cuda):
    x, _ = operands((4, 6), torch.float32)
    assert torch.equal(geglu(x), _geglu(x))
    for start, wrong in {
        r"x is \(4, 5\)": x[:, :5],
        r"x is \(\)": x.sum(),
        "x must be contiguous": x.T,
    }.items():
        with pytest.raises(ValueError, match=f"^{start}"):
            geglu(wrong)


def test_opcheck():
    x, dy = operands((2, 3, 10), torch.float32)
    torch.library.opcheck(_geglu, (x.clone().requires_grad_(),))
    torch.library.opcheck(_geglu_backward, (dy, x))


def test_compiles_whole():
    """One graph, the same value and gradient: fake tensors and the registered gradient stand for the kernels."""
    x, dy = operands((5, 14), torch.float32)
    block = lambda x: 3 * _geglu(2 * x)  # noqa: E731
    both = [run(x, dy, f) for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_beyond_32_bits():
    """840000 rows of 2560: offsets pass 2^31 in the last 1139 rows. About 13 GB: x, y, dy, dx in bf16."""
    x = torch.empty(840_000, 2560, dtype=torch.bfloat16, device="cuda").normal_()
    dy = torch.empty(840_000, 1280, dtype=torch.bfloat16, device="cuda").normal_()
    y, dx = _geglu(x), _geglu_backward(dy, x)
    for rows in (slice(0, 64), slice(838_816, 838_912), slice(839_936, 840_000)):
        check((y[rows], dx[rows]), x[rows], dy[rows])
