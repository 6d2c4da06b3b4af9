"""inpo::linear_geglu (on the CPU in Triton's interpreter) against float64 NumPy: a product, a bias, h g Phi(g)."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.linear_geglu import _blocks, _linear_geglu, linear_geglu
from kernel_checks import kinds

SHAPES = {  # x, D
    "real": ((2, 3, 320), 1280),  # SD1.5's first level: full blocks of columns, K a multiple of the block
    "odd tail": ((5, 7, 33), 75),  # rows, columns and K end inside a block, in fp32 in the second one
    "minimal": ((1,), 1),  # one row, one column, K = 1
}
STORE = {  # the rounding of a result when it is stored; products are exact or fp32, sums fp32
    torch.float32: 2.0**-23,  # an ulp
    torch.float16: 2.0**-10,  # an ulp
    torch.bfloat16: 2.0**-7,  # an ulp: the interpreter truncates where the GPU rounds to nearest
}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
FP32 = 6 * 2.0**-24  # of the sums' absolute terms: 2 in the interpreter; tensor cores truncate what they add
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def walled(v):
    """v between NaNs: a load past its ends that no mask stops is seen in the results."""
    wall = torch.full((v.numel() + 8192,), torch.nan, dtype=v.dtype, device=DEVICE)
    return wall.as_strided(v.shape, v.stride(), 4096).copy_(v)


def operands(shape, width, dtype, seed=0):
    """x, weight, bias with h and g of order 1 to 2; each row its own size."""
    rng = np.random.default_rng(seed)
    x, w, b = (rng.normal(size=s) for s in (shape, (2 * width, shape[-1]), 2 * width))
    x *= np.array([1.0, 0.2, 2.0])[np.arange(x.size).reshape(shape) // shape[-1] % 3]
    return [walled(torch.from_numpy(v).to(DEVICE, dtype)) for v in (x, w / math.sqrt(shape[-1]), b)]


def check(y, x, w, b):
    """Against float64, within what rounding the absolute terms of each sum in fp32 explains."""
    dtype, (x, w, b) = x.dtype, (v.detach().cpu().double().numpy() for v in (x, w, b))
    h, g = np.split(x @ w.T + b, 2, -1)
    size_h, size_g = np.split(np.abs(x) @ np.abs(w.T) + np.abs(b), 2, -1)
    cdf = 0.5 * np.vectorize(math.erfc)(-g / math.sqrt(2))
    want = h * g * cdf
    size = np.abs(g * cdf) * size_h + 1.13 * np.abs(h) * size_g + np.abs(h * g)  # gelu' is at most 1.13
    assert y.dtype == dtype and y.shape == want.shape
    off = np.abs(y.detach().cpu().double().numpy() - want)
    bound = STORE[dtype] * np.abs(want) + FP32 * size + SUBNORMAL[dtype]
    assert (off <= bound).all(), (off.max(), (off / bound).max())


@pytest.mark.parametrize(
    "shape, dtype",
    kinds(
        product(SHAPES, STORE), [("real", torch.bfloat16), *product(["odd tail"], STORE), ("minimal", torch.float32)]
    ),
    ids=str,
)
def test_value(shape, dtype):
    inputs = operands(*SHAPES[shape], dtype)
    y = _linear_geglu(*inputs)
    check(y, *inputs)
    assert torch.equal(y, _linear_geglu(*inputs)), "the same bits on every run"


@pytest.mark.parametrize(
    "row_blocks, dtype",
    kinds(product([8, 11, 17], STORE), zip([8, 11, 17], [torch.float16, torch.float32, torch.bfloat16], strict=True)),
    ids=str,
)
def test_walk_over_blocks(row_blocks, dtype):
    """One full group of 8 row blocks, one and a part, two and one block, with 3 column blocks.

    There are as many programs as blocks of y, and an unwritten block is NaN: each is written exactly once."""
    blocks = _blocks(torch.empty(0, dtype=dtype))
    inputs = operands(((row_blocks - 1) * blocks["BLOCK_M"] + 5, 6), 2 * blocks["BLOCK_D"] + 6, dtype)
    check(_linear_geglu(*inputs), *inputs)


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lead=st.lists(st.integers(1, 9), max_size=3),
    depth=st.integers(1, 200),
    width=st.integers(1, 140),
    dtype=st.sampled_from(list(STORE)),
    seed=st.integers(0, 99),
)
def test_any_shape(lead, depth, width, dtype, seed):
    inputs = operands((*lead, depth), width, dtype, seed)
    check(_linear_geglu(*inputs), *inputs)


@pytest.mark.parametrize("dtype", STORE, ids=str)
def test_large_gates_and_zeros(dtype):
    """A weight of zeros leaves the biases: gates of 1e4 and 20 pass h or nothing, h = 0 or g = 0 gives 0."""
    x, w, _ = operands((3, 40), 8, dtype)
    h = torch.tensor([1.0, -2.5, 1.0, -2.5, 1.0, 0.0, 0.0, 0.0])
    g = torch.tensor([20.0, 1e4, -20.0, -1e4, 0.0, 1e4, -20.0, 1.0])
    y = _linear_geglu(x, torch.zeros_like(w), torch.cat([h, g]).to(DEVICE, dtype))
    assert torch.equal(y.cpu(), (h * g * (g > 0)).to(dtype).expand(3, 8))


def test_public_function():
    """The definition on the CPU."""
    for dtype in STORE:
        inputs = [v.cpu() for v in operands((3, 5, 14), 9, dtype)]
        check(linear_geglu(*inputs), *inputs)
    x, w, b = (v.cpu() for v in operands((3, 14), 9, torch.float64))
    h, g = torch.nn.functional.linear(x, w, b).chunk(2, -1)
    torch.testing.assert_close(linear_geglu(x, w, b), h * torch.nn.functional.gelu(g), rtol=1e-14, atol=0)


def test_diffusers_module():
    module = pytest.importorskip("diffusers.models.activations").GEGLU(14, 9).to(DEVICE)
    x, _, _ = operands((3, 14), 9, torch.float32)
    with torch.no_grad():  # 14 products and a bias, two of them multiplied: 16 roundings of values below 4
        y = _linear_geglu(x, module.proj.weight, module.proj.bias)
        torch.testing.assert_close(y, module(x), rtol=0, atol=16 * 2.0**-24 * 4)


def test_dispatch_and_refusals(as_if_on_cuda):
    x, w, b = operands((3, 6), 6, torch.float32)
    with torch.no_grad():
        assert torch.equal(linear_geglu(x, w.clone().requires_grad_(), b), _linear_geglu(x, w, b))
    assert linear_geglu(x[:0], w, b).shape == (0, 6) and linear_geglu(x, w[:0], b[:0]).shape == (3, 0)
    for start, arguments in {
        r"weight is \(11, 6\)": (x, w[:11], b[:11]),
        r"weight is \(12, 5\)": (x, w[:, :5], b),
        r"weight is \(12,\)": (x, w[:, 0], b),
        r"weight is .* x is \(\)": (x.sum(), w, b),
        r"bias is \(6,\), expected \(12,\)": (x, w, b[:6]),
        r"bias is \(12, 1\)": (x, w, b[:, None]),
        "weight is torch.float64": (x, w.double(), b),
        "bias is torch.bfloat16": (x, w, b.bfloat16()),
        "weight is torch.float32 on meta": (x, w.to("meta"), b),
        "linear_geglu has no gradient": (x, w, b.clone().requires_grad_()),
        "x must be contiguous": (x.T.contiguous().T, w, b),
        "weight must be contiguous": (x, w.T.contiguous().T, b),
        "bias must be contiguous": (x, w, torch.stack([b, b], 1)[:, 0]),
    }.items():
        with pytest.raises(ValueError, match=f"^{start}"):
            linear_geglu(*arguments)


def test_opcheck_and_compile():
    inputs = operands((2, 3, 10), 7, torch.float32)
    torch.library.opcheck(_linear_geglu, inputs)
    block = lambda x, w, b: 3 * _linear_geglu(2 * x, w, b)  # noqa: E731
    whole = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*inputs), block(*inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_beyond_32_bits():
    """2^25 + 96 rows of 64 in and out: offsets pass 2^31 in the last 96. About 9 GB: x and y in bf16."""
    rows = 2**25 + 96
    x = torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda").normal_()
    _, w, b = (v.to("cuda") for v in operands((1, 64), 64, torch.bfloat16))
    y = _linear_geglu(x, w, b)
    for part in (slice(0, 64), slice(2**25 - 64, 2**25 + 32), slice(rows - 64, rows)):
        check(y[part], x[part], w, b)
