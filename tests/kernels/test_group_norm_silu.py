"""inpo::group_norm_silu (on the CPU in Triton's interpreter) and its gradients against float64 NumPy formulas."""

from itertools import product

import inpo_kernels.group_norm_silu as module
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.group_norm_silu import _group_norm_silu, _group_norm_silu_backward, group_norm_silu
from kernel_checks import kinds

SHAPES = {  # (N, C, H, W), groups
    "real": ((1, 320, 6, 8), 32),  # SD1.5's first level: 5 full blocks of 64 channels, groups of 10 cross their borders
    "joined": ((1, 960, 3, 5), 32),  # after a skip: 15 blocks of 64 channels, groups of 30 in 32 lanes
    "widest": ((1, 2560, 2, 3), 32),  # the lowest level: 10 blocks of 256, 6 pixels in 8 rows
    "odd tail": ((3, 60, 13, 23), 6),  # 4 of 64 lanes masked; 299 pixels: two chunks of 128 and one of 43
    "two blocks": ((2, 300, 3, 7), 6),  # 256 channels and 44 masked ones; group 5 crosses from one to the other
    "one value": ((2, 4, 1, 1), 4),  # every group is one value: variance 0, no gradient to x
    "minimal": ((1, 1, 1, 1), 1),
}
STORE = {  # the rounding of a result when it is stored; all arithmetic before is fp32
    torch.float32: 2.0**-23,  # an ulp
    torch.float16: 2.0**-10,  # an ulp
    torch.bfloat16: 2.0**-7,  # an ulp: the interpreter truncates where the GPU rounds to nearest
}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 0.0}
FP32 = 6 * 2.0**-24  # of the operands' absolute values: 2 in the interpreter; exp and division cost a GPU 2 ulp each
EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # silu of a large negative number


def walled(v):
    """v between NaNs: a load past its ends that no mask stops is seen in the results."""
    wall = torch.full((v.numel() + 8192,), torch.nan, dtype=v.dtype, device=DEVICE)
    return wall.as_strided(v.shape, v.stride(), 4096).copy_(v)


def operands(shape, groups, dtype, temb=True, weights=None, mean=1.0, seed=0):
    """x, w, b, temb, dy: each image and upstream gradient has its own size, each channel its own mean."""
    rng = np.random.default_rng(seed)
    n, c = shape[:2]
    size = np.array([1.0, 4.0, 0.3])[:n, None, None, None]
    x = size * (rng.normal(size=shape) + mean * (1 + rng.normal(size=(n, c, 1, 1)) * (mean < 100)))
    dy = np.array([7.0, -3.0, 0.4])[:n, None, None, None] * rng.normal(size=shape)
    w, b, t = 1 + 0.3 * rng.normal(size=c), 0.5 * rng.normal(size=c), rng.normal(size=(n, c))
    x, dy = (torch.from_numpy(v).to(dtype).contiguous(memory_format=torch.channels_last) for v in (x, dy))
    w, b, t = (torch.from_numpy(v).to(weights or dtype) for v in (w, b, t))
    x, w, b, t, dy = (walled(v.to(DEVICE)) for v in (x, w, b, t, dy))
    return [x, w, b, t if temb else None, dy]


def run(inputs, groups, silu):
    *leaves, dy = (None if v is None else v.detach() for v in inputs)
    leaves = [v if v is None else v.requires_grad_() for v in leaves]
    y, mean, rstd = _group_norm_silu(*leaves[:3], groups, EPS, silu, leaves[3])
    y.backward(dy)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in (y, leaves[0].grad))
    return [y, mean, rstd, *(v.grad for v in leaves if v is not None)]


def check(results, inputs, groups, silu):
    """Every result against float64, within what the rounding of its operands in fp32 explains."""
    x, w, b, t, dy = (0.0 if v is None else v.detach().cpu().double().numpy() for v in inputs)
    (n, c), (w, b) = x.shape[:2], (v[:, None, None] for v in (w, b))
    t = t[:, :, None, None] if inputs[3] is not None else 0.0
    over = lambda v: v.reshape(n, groups, -1).mean(2).repeat(c // groups, 1)[:, :, None, None]  # noqa: E731
    mean = over(x + t)
    rstd = 1 / np.sqrt(over(np.square(x + t - mean)) + EPS)
    x_hat = (x + t - mean) * rstd
    z = x_hat * w + b
    s = 1 / (1 + np.exp(-z)) if silu else np.ones_like(z)
    dz = dy * (s * (1 + z * (1 - s)) if silu else 1)
    along = over(w * dz * x_hat)
    dx = rstd * (w * dz - over(w * dz) - x_hat * along)
    # what a rounding error of 1 in each operand and sum becomes; silu' and silu'' are below 1.1
    size_u = np.abs(x) + np.abs(t) + over(np.abs(x) + np.abs(t))
    size_hat = 1 + size_u * rstd
    size_z = np.abs(w) * size_hat + np.abs(b)
    size_dz = np.abs(dy) * (1 + size_z)
    size_along = over(np.abs(w) * (size_dz * np.abs(x_hat) + np.abs(dz) * size_hat))
    size_dx = np.abs(w) * size_dz + over(np.abs(w) * size_dz) + np.abs(x_hat) * size_along + size_hat * np.abs(along)
    size_dw = size_dz * np.abs(x_hat) + np.abs(dz) * size_hat
    first = lambda v: v[:, :: c // groups, 0, 0]  # noqa: E731
    want = {
        "y": (z * s, size_z),
        "mean": (first(mean), first(over(size_u))),
        "rstd": (first(rstd), first(rstd * over(size_hat))),
        "dx": (dx, rstd * size_dx),
        "dw": ((dz * x_hat).sum((0, 2, 3)), size_dw.sum((0, 2, 3))),
        "db": (dz.sum((0, 2, 3)), size_dz.sum((0, 2, 3))),
        "dtemb": (dx.sum((2, 3)), (rstd * size_dx).sum((2, 3))),
    }
    if inputs[3] is None:
        del want["dtemb"]
    likes = [inputs[0], None, None, *inputs[:4]]
    for got, like, (name, (value, size)) in zip(results, likes, want.items(), strict=False):
        dtype = torch.float32 if like is None else like.dtype
        assert got.dtype == dtype and got.shape == value.shape, name
        off = np.abs(got.detach().cpu().double().numpy() - value)
        bound = STORE[dtype] * np.abs(value) + FP32 * size + SUBNORMAL[dtype]
        assert (off <= bound).all(), (name, off.max(), (off / bound).max())


def held(shape, groups, silu=True, **kinds):
    inputs = operands(shape, groups, **kinds)
    results = run(inputs, groups, silu)
    check(results, inputs, groups, silu)
    return inputs, results


FEW = {  # blocks and groups lie alike in every dtype
    "real": [torch.bfloat16],
    "joined": [torch.float16],
    "widest": [torch.bfloat16],
    "odd tail": STORE,
    "two blocks": [torch.float32],
    "one value": [torch.float32, torch.bfloat16],
    "minimal": [torch.float32],
}


@pytest.mark.parametrize(
    "shape, dtype",
    kinds(product(SHAPES, STORE), ((shape, dtype) for shape, dtypes in FEW.items() for dtype in dtypes)),
    ids=str,
)
def test_value_and_gradients(shape, dtype):
    held(*SHAPES[shape], dtype=dtype)


@pytest.mark.parametrize("dtype", kinds([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("silu, temb", [(True, False), (False, True), (False, False)])
def test_without_silu_or_embedding(silu, temb, dtype):
    """Weights and embedding in fp32 whatever the images are, as where the trained copy is not narrowed."""
    shape = SHAPES["odd tail"]
    inputs, results = held(*shape, silu, dtype=dtype, temb=temb, weights=torch.float32)
    for first, again in zip(results, run(inputs, shape[1], silu), strict=True):
        assert torch.equal(first, again), "the same bits on every run"


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_large_mean(mean):
    """Of the standard deviation: E[x^2] - E[x]^2 is off by about 6e-8 mean^2 of the variance: 0.06 and 6 times it."""
    held(*SHAPES["odd tail"], dtype=torch.float32, mean=mean)


def test_many_blocks_per_chunk(monkeypatch):
    """What 512 x 512 pixels do: 299 pixels in 2 chunks of 3 blocks of 64, the last block past the end."""
    monkeypatch.setattr(module, "PROGRAMS_PER_IMAGE", 2)
    held(*SHAPES["odd tail"], dtype=torch.float32)


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 24),
    plane=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    dtype=st.sampled_from(list(STORE)),
    kind=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, torch.float32]), st.integers(0, 99)),
)
def test_any_shape(n, groups, width, plane, dtype, kind):
    silu, temb, weights, seed = kind
    held((n, groups * width, *plane), groups, silu, dtype=dtype, temb=temb, weights=weights, seed=seed)


@pytest.mark.parametrize("silu", [True, False])
def test_constant_images_and_saturated_silu(silu):
    """Variance 0 is not divided by; exp(-z) overflows at z = -300 without harm."""
    shape, groups = (2, 12, 5, 7), 3
    inputs = operands(shape, groups, torch.float32, temb=False)
    inputs[0].fill_(3.7)
    check(run(inputs, groups, silu), inputs, groups, silu)
    inputs = operands(shape, groups, torch.float32)
    inputs[1].mul_(300)
    check(run(inputs, groups, silu), inputs, groups, silu)


def test_layouts_of_the_rest():
    """dy expanded or NCHW, weights and embedding as columns of a matrix: the same bits; an empty batch is no work."""
    (shape, groups), column = SHAPES["two blocks"], lambda v: torch.stack([v, v + 1], -1)[..., 0]
    x, w, b, temb, dy = operands(shape, groups, torch.float32)
    dy[:] = dy[:, :1, :1, :1]
    want = run((x, w, b, temb, dy), groups, True)
    for other in (dy.contiguous(memory_format=torch.contiguous_format), dy[:, :1, :1, :1].clone().expand(shape)):
        y = _group_norm_silu(x.requires_grad_(), w, b, groups, EPS, True, temb)[0]
        assert torch.equal(torch.autograd.grad(y, x, other)[0], want[3])
    mean, rstd = want[1:3]
    rest = _group_norm_silu_backward(dy, x.detach(), column(w), column(b), mean, rstd, True, column(temb))
    for got, like in zip(rest, want[3:], strict=True):
        assert torch.equal(got, like)
    assert torch.equal(_group_norm_silu(x, column(w), column(b), groups, EPS, True, column(temb))[0], want[0])
    y, _, _, *grads = run((x[:0], w, b, temb[:0], dy[:0]), groups, True)
    assert y.shape == grads[0].shape == (0, *shape[1:]) and grads[3].shape == (0, shape[1])
    assert not grads[1].any() and not grads[2].any()


def test_images_do_not_know_their_neighbours():
    shape, groups = SHAPES["odd tail"]
    x, w, b, temb, dy = operands(shape, groups, torch.float32)
    y, mean, rstd, dx, _, _, dtemb = run((x, w, b, temb, dy), groups, True)
    alone = run((x[1:2], w, b, temb[1:2], dy[1:2]), groups, True)
    for got, want in zip((y, mean, rstd, dx, dtemb), (*alone[:4], alone[6]), strict=True):
        assert torch.equal(got[1:2], want)


def test_public_function():
    """On the CPU torch's modules, with a right gradient."""
    x, w, b, temb, _ = (v.cpu() for v in operands((2, 12, 3, 5), 3, torch.float64))
    norm = torch.nn.GroupNorm(3, 12, EPS, dtype=torch.float64)
    norm.load_state_dict({"weight": w, "bias": b})
    torch.testing.assert_close(group_norm_silu(x, w, b, 3, EPS), torch.nn.functional.silu(norm(x)), rtol=1e-13, atol=0)
    torch.testing.assert_close(group_norm_silu(x, w, b, 3, EPS, silu=False), norm(x), rtol=1e-13, atol=0)
    leaves = [v.requires_grad_() for v in (x, w, b, temb)]
    assert torch.autograd.gradcheck(lambda x, w, b, t: group_norm_silu(x, w, b, 3, EPS, True, t), leaves)
    for dtype in STORE:
        x, w, b, temb, _ = inputs = [v.cpu() for v in operands((2, 12, 3, 5), 3, dtype)]
        check([group_norm_silu(x, w, b, 3, EPS, True, temb)], inputs, 3, True)


def test_diffusers_order():
    """What ResnetBlock2D feeds its second convolution: conv1's output + projected embedding, GroupNorm, SiLU."""
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    block = resnet.ResnetBlock2D(in_channels=12, temb_channels=8, groups=3, eps=EPS).to(DEVICE).requires_grad_(False)
    torch.nn.init.normal_(block.norm2.weight)
    torch.nn.init.normal_(block.norm2.bias)
    seen = {}
    block.conv1.register_forward_hook(lambda *a: seen.update(x=a[2].clone()))
    block.time_emb_proj.register_forward_hook(lambda *a: seen.update(temb=a[2].clone()))
    block.conv2.register_forward_pre_hook(lambda *a: seen.update(y=a[1][0].clone()))
    block(torch.randn(2, 12, 5, 7, device=DEVICE), torch.randn(2, 8, device=DEVICE))
    x = seen["x"].contiguous(memory_format=torch.channels_last)
    y, _, _ = _group_norm_silu(x, block.norm2.weight, block.norm2.bias, 3, EPS, True, seen["temb"])
    torch.testing.assert_close(y, seen["y"], rtol=0, atol=16 * 2.0**-24 * 4)  # 16 roundings of values up to 4


def test_dispatch_and_refusals(as_if_on_cuda):
    x, w, b, temb, _ = operands((2, 12, 3, 5), 3, torch.float32)
    y = _group_norm_silu(x, w, b, 3, EPS, True, temb)[0]
    assert torch.equal(group_norm_silu(x, w, b, 3, EPS, True, temb), y)
    huge, v = torch.empty(1, 2048, 1024, 1024, device="meta"), torch.empty(2048, device="meta")
    for start, arguments in {
        r"x is \(2, 12, 15\)": (x.flatten(2), w, b, 3, EPS),
        r"x is \(2, 12, 3, 5\), .* groups = 5": (x, w, b, 5, EPS),
        r"x is .* groups = 0": (x, w, b, 0, EPS),
        "weight is": (x, w[:1], b, 3, EPS),
        "bias is": (x, w, b[:, None], 3, EPS),
        "temb is": (x, w, b, 3, EPS, True, temb[:1]),
        "weight is .* on meta": (x, w.to("meta"), b, 3, EPS),
        "x must be channels_last": (x.contiguous(), w, b, 3, EPS),
        r"an image of x .* 2\^31": (huge, v, v, 32, EPS),
    }.items():
        with pytest.raises(ValueError, match=f"^{start}"):
            group_norm_silu(*arguments)


@pytest.mark.parametrize("temb", [True, False])
def test_opcheck(temb):
    x, w, b, temb, dy = operands((2, 4, 1, 3), 1, torch.float32, temb)
    mean, rstd = run((x, w, b, temb, dy), 1, True)[1:3]
    leaves = [v if v is None else v.clone().requires_grad_() for v in (x, w, b, temb)]
    torch.library.opcheck(_group_norm_silu, (*leaves[:3], 1, EPS, True, leaves[3]))
    torch.library.opcheck(_group_norm_silu_backward, (dy, x, w, b, mean, rstd, True, temb))


def test_compiles_whole():
    """One graph, the same value and gradients: fake tensors and the registered gradient stand for the kernels."""
    *inputs, dy = operands((2, 6, 3, 4), 3, torch.float32)

    def block(x, w, b, temb):
        return _group_norm_silu(2 * x, w, b, 3, EPS, True, temb)[0] + x

    both = []
    for f in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [v.clone().requires_grad_() for v in inputs]
        y = f(*leaves)
        y.backward(dy)
        assert y.is_contiguous(memory_format=torch.channels_last)
        both.append([y.detach(), *(v.grad for v in leaves)])
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)


def test_compiles_for_a_batch_of_any_size(monkeypatch):
    """The check of x's layout too: while the batch is a symbol, torch 2.11 denies that x + 1 is channels_last."""
    w, b = torch.empty(2, 8, device="meta")
    block = torch.compile(lambda x: group_norm_silu(x + 1, w, b, 2, EPS), fullgraph=True, backend="eager")
    for batch in (3, 5):
        x = torch.empty(batch, 8, 3, 5, device="meta", memory_format=torch.channels_last)
        torch._dynamo.mark_dynamic(x, 0)
        assert block(x).shape == x.shape
    x, w, b, _, _ = operands((2, 12, 3, 5), 3, torch.float32)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.Tensor, "is_contiguous", lambda x, **_: False)  # as 2.11 says
    group_norm_silu(x, w, b, 3, EPS)


@pytest.mark.gpu
def test_beyond_32_bits():
    """33 images of 2^26 elements: offsets pass 2^31 in the last two. About 20 GB: x, y, dy, dx in bf16."""
    shape, groups = (33, 256, 512, 512), 32
    x, dy = (torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last) for _ in "xy")
    for i in range(len(x)):
        x[i].normal_(), dy[i].normal_()
    w, b, temb = (torch.randn(n, device="cuda") for n in (256, 256, (33, 256)))
    y, mean, rstd = _group_norm_silu(x, w, b, groups, EPS, True, temb)
    dx, _, _, dtemb = _group_norm_silu_backward(dy, x, w, b, mean, rstd, True, temb)
    for i in (0, 31, 32):
        one = slice(i, i + 1)
        alone, m, r = _group_norm_silu(x[one], w, b, groups, EPS, True, temb[one])
        assert torch.equal(y[one], alone) and torch.equal(mean[one], m)
        alone, _, _, t = _group_norm_silu_backward(dy[one], x[one], w, b, m, r, True, temb[one])
        assert torch.equal(dx[one], alone) and torch.equal(dtemb[one], t)
