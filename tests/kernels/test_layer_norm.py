"""inpo::layer_norm (on the CPU in Triton's interpreter) and its gradients against float64 NumPy formulas."""

import inpo_kernels.layer_norm as module
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.layer_norm import _layer_norm, _layer_norm_backward, layer_norm

SHAPES = {
    "real": (2, 9, 320),  # SD1.5's first level: 320 of 512 lanes; 18 rows, the last block of 8 holds 2
    "deepest": (3, 1280),  # two rows a block, the last one half full
    "odd tail": (7, 11, 60),  # 60 of 64 lanes; 77 rows, the last block of 64 holds 13
    "longest": (2, 8192),  # as long as a row may be
    "one value": (3, 1),  # variance 0, no gradient to x
    "minimal": (1,),
}
STORE = {  # the rounding of a result when it is stored; all arithmetic before is fp32
    torch.float32: 2.0**-23,  # an ulp
    torch.float16: 2.0**-10,  # an ulp
    torch.bfloat16: 2.0**-7,  # an ulp: the interpreter truncates where the GPU rounds to nearest
}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
FP32 = 6 * 2.0**-24  # of the operands' absolute values: 2 in the interpreter; a division costs a GPU 2 ulp
EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def walled(v):
    """v between NaNs: a load past its ends that no mask stops is seen in the results."""
    wall = torch.full((v.numel() + 8192,), torch.nan, dtype=v.dtype, device=DEVICE)
    return wall.as_strided(v.shape, v.stride(), 4096).copy_(v)


def operands(shape, dtype, residual=True, weights=None, mean=1.0, seed=0):
    """x, w, b, residual, dy, du: rows of unequal mean and size, unequal upstream gradients."""
    rng = np.random.default_rng(seed)
    x, r, dy, du = (rng.normal(size=shape) for _ in range(4))
    row = np.arange(x.size).reshape(shape) // shape[-1]
    x = (x + mean) * np.array([1.0, 4.0, 0.3])[row % 3]
    dy, du = dy * np.array([7.0, -3.0, 0.4, 1.0])[row % 4], du * np.array([-0.1, 5.0])[row % 2]
    w, b = 1 + 0.3 * rng.normal(size=shape[-1]), 0.5 * rng.normal(size=shape[-1])
    x, r, dy, du = (walled(torch.from_numpy(v).to(DEVICE, dtype)) for v in (x, r, dy, du))
    w, b = (walled(torch.from_numpy(v).to(DEVICE, weights or dtype)) for v in (w, b))
    return [x, w, b, r if residual else None, dy, du]


def run(inputs, used="yu"):
    """y, u, mean, rstd, dx, dw, db, dresidual, where y, u or both are used further on."""
    *leaves, dy, du = (None if v is None else v.detach() for v in inputs)
    x, w, b, r = (v if v is None else v.requires_grad_() for v in leaves)
    y, u, mean, rstd = _layer_norm(x, w, b, EPS, r)
    used = used if r is not None else "y"
    torch.autograd.backward([{"y": y, "u": u}[v] for v in used], [{"y": dy, "u": du}[v] for v in used])
    return [y, x if r is None else u, mean, rstd, x.grad, w.grad, b.grad, None if r is None else r.grad]


def check(results, inputs, used="yu"):
    """Every result against float64, within what the rounding of its operands in fp32 explains."""
    f64 = lambda v: v.detach().cpu().double().numpy()  # noqa: E731
    dtype, (x, w, b) = inputs[0].dtype, (f64(v) for v in inputs[:3])
    dy = f64(inputs[4]) if "y" in used else 0 * x
    du = f64(inputs[5]) if "u" in used and inputs[3] is not None else 0 * x
    total = x + (0 if inputs[3] is None else f64(inputs[3]))
    u = f64(results[1])  # rounded to its dtype: y belongs to what was stored
    over = lambda v: v.mean(-1, keepdims=True)  # noqa: E731
    rstd = 1 / np.sqrt(over(np.square(u - over(u))) + EPS)
    x_hat, dz, rows = (u - over(u)) * rstd, dy * w, tuple(range(x.ndim - 1))
    along = over(dz * x_hat)
    # what a rounding error of 1 in each operand and sum becomes
    size_hat = 1 + (np.abs(u) + over(np.abs(u))) * rstd
    size_along = over(np.abs(dz) * (np.abs(x_hat) + size_hat))
    size_dx = np.abs(dz) + over(np.abs(dz)) + np.abs(x_hat) * size_along + size_hat * np.abs(along)
    dx = rstd * (dz - over(dz) - x_hat * along) + du, rstd * size_dx + np.abs(du)
    dw = (dy * x_hat).sum(rows), (np.abs(dy) * (np.abs(x_hat) + size_hat)).sum(rows)
    want = {
        "y": (x_hat * w + b, np.abs(w) * size_hat + np.abs(b), dtype),
        "u": (total, 0, dtype),
        "mean": (over(u)[..., 0], over(np.abs(u))[..., 0], torch.float32),
        "rstd": (rstd[..., 0], (rstd * over(size_hat))[..., 0], torch.float32),
        "dx": (*dx, dtype),
        "dw": (*dw, inputs[1].dtype),
        "db": (dy.sum(rows), np.abs(dy).sum(rows), inputs[2].dtype),
        "dresidual": (*dx, dtype),
    }
    for got, (name, (value, size, kind)) in zip(results, want.items(), strict=False):
        if got is None:
            continue
        assert got.dtype == kind and got.shape == value.shape, name
        off = np.abs(f64(got) - value)
        bound = STORE[kind] * np.abs(value) + FP32 * size + SUBNORMAL[kind]
        assert (off <= bound).all(), (name, off.max(), (off / bound).max())


@pytest.mark.parametrize("dtype", STORE, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients(shape, residual, dtype):
    inputs = operands(shape, dtype, residual)
    results = run(inputs)
    check(results, inputs)
    for first, again in zip(results, run(inputs), strict=True):
        assert first is None or torch.equal(first, again), "the same bits on every run"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", ["y", "u"])
def test_one_result_used(used, dtype):
    """u is not normalised when only it is used; weights in fp32 whatever x is."""
    inputs = operands(SHAPES["odd tail"], dtype, weights=torch.float32)
    results = run(inputs, used)
    check(results, inputs, used)
    dx, dresidual = results[4], results[7]
    assert torch.equal(dx, dresidual) and dx.data_ptr() != dresidual.data_ptr(), "equal, and not one tensor"


@pytest.mark.parametrize("rows", [323, 321, 130])
def test_shares_of_rows(monkeypatch, rows):
    """Blocks of 64 rows: 3 for the first program and 3 for the second, of whose last 3 rows or 1 are left; 2 and 1."""
    monkeypatch.setattr(module, "PROGRAMS_BACKWARD", 2)
    inputs = operands((rows, 60), torch.float32)
    check(run(inputs), inputs)


@pytest.mark.parametrize("mean", [1e3, 1e4])
@pytest.mark.parametrize("residual", [True, False])
def test_large_mean(residual, mean):
    """Of the standard deviation: E[x^2] - E[x]^2 is off by about 6e-8 mean^2 of the variance: 0.06 and 6 times it."""
    inputs = operands(SHAPES["odd tail"], torch.float32, residual, mean=mean)
    check(run(inputs), inputs)


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lead=st.lists(st.integers(1, 9), max_size=3),
    width=st.integers(1, 400),
    dtype=st.sampled_from(list(STORE)),
    kind=st.tuples(st.booleans(), st.sampled_from([None, torch.float32]), st.integers(0, 99)),
)
def test_any_shape(lead, width, dtype, kind):
    inputs = operands((*lead, width), dtype, *kind[:2], seed=kind[2])
    check(run(inputs), inputs)


def test_constant_rows_layouts_and_empty_batch():
    """Variance 0; upstream gradients expanded or transposed and weights with a stride give the same bits."""
    x, w, b, r, dy, du = operands(SHAPES["odd tail"], torch.float32)
    inputs = torch.full_like(x, 3.7), w, b, None, dy, du
    check(run(inputs), inputs)
    dy[:], du[:] = dy[..., :1], du[..., :1]
    want = run((x, w, b, r, dy, du))
    column = lambda v: torch.stack([v, v + 1], -1)[:, 0]  # noqa: E731
    expanded = lambda v: v[..., :1].clone().expand(v.shape)  # noqa: E731
    transposed = lambda v: v.transpose(0, 2).contiguous().transpose(0, 2)  # noqa: E731
    for laid in (expanded, transposed):
        for got, like in zip(run((x, column(w), column(b), r, laid(dy), laid(du))), want, strict=True):
            assert torch.equal(got, like)
    y, u, mean, rstd, dx, dw, db, dr = run([v[:0] if v.ndim == 3 else v for v in (x, w, b, r, dy, du)])
    assert y.shape == u.shape == dx.shape == dr.shape == (0, 11, 60) and mean.shape == rstd.shape == (0, 11)
    assert not dw.any() and not db.any() and dw.shape == db.shape == (60,)


def test_public_function():
    """On the CPU torch's LayerNorm, with a right gradient."""
    x, w, b, r, _, _ = (v.cpu() for v in operands((2, 3, 10), torch.float64))
    norm = torch.nn.LayerNorm(10, EPS, dtype=torch.float64)
    norm.load_state_dict({"weight": w, "bias": b})
    for residual, total in ((None, x), (r, x + r)):
        y, u = layer_norm(x, w, b, EPS, residual)
        assert torch.equal(u, total)
        torch.testing.assert_close(y, norm(total), rtol=1e-13, atol=1e-15)
    leaves = [v.clone().requires_grad_() for v in (x, w, b, r)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: layer_norm(x, w, b, EPS, r), leaves)
    for dtype in STORE:
        inputs = [v.cpu() for v in operands((2, 3, 10), dtype)]
        x, w, b, r = inputs[:4]
        check(layer_norm(x, w, b, EPS, r), inputs)


def test_dispatch_and_refusals(as_if_on_cuda):
    x, w, b, r, _, _ = operands((4, 4), torch.float32)
    for residual in (r, None):
        y, u = layer_norm(x, w, b, EPS, residual)
        want = _layer_norm(x, w, b, EPS, residual)
        assert torch.equal(y, want[0]) and (u is x if residual is None else torch.equal(u, want[1]))
    for start, arguments in {
        "weight is": (x, w[:3], b, EPS),
        "bias is": (x, w, b[:, None], EPS),
        "weight is .* on meta": (x, w.to("meta"), b, EPS),
        r"residual is \(3, 4\)": (x, w, b, EPS, r[:3]),
        "residual is .* torch.bfloat16": (x, w, b, EPS, r.bfloat16()),
        "residual is .* on meta": (x, w, b, EPS, r.to("meta")),
        "x must be contiguous": (x.T, w, b, EPS),
        "residual must be contiguous": (x, w, b, EPS, r.T),
        "rows of 8193 are too long": (torch.ones(1, 8193), torch.ones(8193), torch.ones(8193), EPS),
    }.items():
        with pytest.raises(ValueError, match=f"^{start}"):
            layer_norm(*arguments)


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual):
    inputs = operands((3, 5), torch.float32, residual)
    _, u, mean, rstd = (v.detach() for v in run(inputs)[:4])
    _, w, _, _, dy, du = inputs
    leaves = [None if v is None else v.clone().requires_grad_() for v in inputs[:4]]
    torch.library.opcheck(_layer_norm, (*leaves[:3], EPS, leaves[3]))
    torch.library.opcheck(_layer_norm_backward, (dy, du if residual else None, u, w, mean, rstd))


def test_compiles_whole():
    """One graph, the same values and gradients: fake tensors and the registered gradient stand for the kernels."""
    *inputs, dy, du = operands((5, 7), torch.float32)

    def block(x, w, b, r):
        y, u, _, _ = _layer_norm(2 * x, w, b, EPS, r)
        return 3 * y, u + x

    both = []
    for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in inputs]
        out = f(*leaves)
        torch.autograd.backward(out, (dy, du))
        both.append([*(v.detach() for v in out), *(v.grad for v in leaves)])
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_beyond_32_bits():
    """6.72 million rows of 320: offsets pass 2^31 in the last 9114. About 26 GB: x, r, y, u, dy, dx in bf16."""
    rows = 6_720_000
    x, r, dy = (torch.empty(rows, 320, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3))
    _, w, b, *_ = (v.cuda() for v in operands((1, 320), torch.bfloat16))
    y, u, mean, rstd = _layer_norm(x, w, b, EPS, r)
    dx, _, _ = _layer_norm_backward(dy, u, u, w, mean, rstd)
    for part in (slice(0, 64), slice(6_710_880, 6_710_944), slice(rows - 64, rows)):
        cut = [v[part] for v in (x, r, dy, y, u, mean, rstd, dx)]
        check((*cut[3:7], cut[7]), [cut[0], w, b, cut[1], cut[2], cut[4]])
