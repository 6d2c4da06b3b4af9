"""inpo::ddim_step (on the CPU in Triton's interpreter), in place, against p x + q eps + sigma z in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.ddim_step import _ddim_step, ddim_step_, ddim_step_reference
from kernel_checks import draws

SHAPES = {
    "real": (2, 4, 32, 32),  # a quarter of SD1.5's latent: 4 full blocks, no mask at work
    "odd tail": (3, 3, 19, 23),  # 1311 elements: a full block, then 287; images unaligned in memory
    "minimal": (1, 1, 1, 1),  # everything but one lane is masked
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of eps; the state and the arithmetic are fp32 in all
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the operands |p x| + |q eps|: two products and a sum, 1.5 * 2^-24 each way. Guidance adds two sums, a product and
# a rounded weight, noise a product and a sum.
ROUNDED = {"plain": 2.0**-23, "guided": 2.0**-22, "noisy": 2.0**-22}
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some channels": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def operands(shape, dtype, seed=0):
    """x, eps, p, q; the coefficients unlike in every image."""
    rng = np.random.default_rng(seed)
    x, eps, p, q = (torch.from_numpy(rng.normal(size=size)) for size in (shape, shape, shape[:1], shape[:1]))
    return x.to(DEVICE).float(), eps.to(DEVICE, dtype), p.to(DEVICE).float(), q.to(DEVICE).float()


def everything(shape, dtype, seed=0):
    """x, eps, p, q and all options: two idle samples, the others in two more rows than samples, three left alone."""
    x, eps, p, q = operands((5, *shape[1:]), dtype, seed)
    x = operands((7, *shape[1:]), dtype, seed + 1)[0]
    _, conditional, sigma, _ = operands((5, *shape[1:]), dtype, seed + 2)
    integers = {"rows": [5, -1, 0, 3, -1], "keys": [3, 4, -5, 1 << 62, 6], "steps": [0, 7, 7, 2, 1]}
    options = {name: torch.tensor(value, device=DEVICE) for name, value in integers.items()}
    return (x, eps, p, q), options | {"conditional": conditional, "guidance": 7.3, "sigma": sigma.abs()}


def check(got, x, eps, p, q, *, rows=None, conditional=None, guidance=0.0, sigma=None, keys=None, steps=None):
    got, before, eps, p, q = (v.cpu().double().numpy() for v in (got, x, eps, p, q))
    p, q = p[:, None, None, None], q[:, None, None, None]
    want, size, rounded = before.copy(), np.zeros_like(before), ROUNDED["plain"]
    rows = range(len(eps)) if rows is None else rows.tolist()
    here, there = [i for i, row in enumerate(rows) if row >= 0], [row for row in rows if row >= 0]
    guess, spread = eps, np.abs(eps)
    if conditional is not None:
        conditional = conditional.cpu().double().numpy()
        guess, rounded = eps + guidance * (conditional - eps), ROUNDED["guided"]
        spread = spread + abs(guidance) * (np.abs(conditional) + spread)
    want[there] = p[here] * before[there] + q[here] * guess[here]
    size[there] = np.abs(p[here] * before[there]) + np.abs(q[here]) * spread[here]
    slack = np.zeros_like(size)
    if sigma is not None:
        sigma, rounded = sigma.cpu().double().numpy()[:, None, None, None], ROUNDED["noisy"]
        z, off = (v.reshape(eps.shape) for v in draws(keys.tolist(), steps.tolist(), eps[0].size))
        want[there] += sigma[here] * z[here]
        size[there] += sigma[here] * np.abs(z[here])
        slack[there] = sigma[here] * off[here]
    assert (np.abs(got - want) <= rounded * size + slack).all(), np.abs(got - want).max()


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


@pytest.mark.parametrize(
    "shape, dtype", [("real", torch.bfloat16), *(("odd tail", d) for d in DTYPES), ("minimal", torch.float32)], ids=str
)
def test_options(shape, dtype):
    """Rows permuted and absent, guidance, noise: each alone and all at once; rows that nobody moves stay."""
    (x, eps, p, q), options = everything(SHAPES[shape], dtype)
    alone = [("rows",), ("conditional", "guidance"), ("sigma", "keys", "steps")] if shape != "real" else []
    for names in (*alone, tuple(options)):
        chosen = {name: options[name] for name in names}
        start = x if "rows" in names else x[:5]
        got = start.clone()
        _ddim_step(got, eps, p, q, **chosen)
        check(got, start, eps, p, q, **chosen)
        assert "rows" not in names or torch.equal(got[[1, 2, 4, 6]], x[[1, 2, 4, 6]])
    again = x.clone()
    _ddim_step(again, eps, p, q, **options)
    assert torch.equal(got, again), "the same bits on every run"


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    layouts=st.tuples(*(st.sampled_from(list(LAYOUTS)) for _ in range(3))),
)
def test_any_shape(shape, dtype, seed, layouts):
    x, eps, p, q = operands(shape, dtype, seed)
    got = LAYOUTS[layouts[0]](x.clone())
    _ddim_step(got, LAYOUTS[layouts[1]](eps), p, q)
    check(got, x, eps, p, q)
    (x, eps, p, q), options = everything(shape, dtype, seed)
    got, eps = LAYOUTS[layouts[0]](x.clone()), LAYOUTS[layouts[1]](eps)
    options["conditional"] = LAYOUTS[layouts[2]](options["conditional"])
    _ddim_step(got, eps, p, q, **options)
    check(got, x, eps, p, q, **options)


@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layout_changes_nothing(of_x):
    """The same bits, noise included, however each of the three images lies in memory: all unlike at once."""
    (x, eps, p, q), options = everything(SHAPES["odd tail"], torch.bfloat16)
    want = x.clone()
    _ddim_step(want, eps, p, q, **options)
    names = list(LAYOUTS)
    turn = names.index(of_x)
    of_eps, of_conditional = LAYOUTS[names[turn - 1]], LAYOUTS[names[turn - 2]]
    got = LAYOUTS[of_x](x.clone())
    options["conditional"] = of_conditional(options["conditional"])
    _ddim_step(got, of_eps(eps), p, q, **options)
    assert torch.equal(got, want)
    transposed = x.mT.contiguous().mT
    for images in ((transposed, eps, options["conditional"]), (x, eps.mT.contiguous().mT, options["conditional"])):
        with pytest.raises(ValueError, match="not evenly spaced"):
            _ddim_step(*images[:2], p, q, conditional=images[2])


def test_batching_changes_nothing():
    """Samples one at a time, in another order, in a batch with others: the same bits, draws included."""
    (x, eps, p, q), options = everything(SHAPES["odd tail"], torch.float16)
    together, alone = x.clone(), x.clone()
    _ddim_step(together, eps, p, q, **options)
    for i in reversed(range(5)):
        one = {name: value[i : i + 1] for name, value in options.items() if name != "guidance"}
        _ddim_step(alone, eps[i : i + 1], p[i : i + 1], q[i : i + 1], **one, guidance=options["guidance"])
    assert torch.equal(together, alone)


def test_sigma_zero_adds_nothing():
    """A noisy trajectory has samples at their level: p = 1, q = sigma = 0 keeps their bits beside ones that move."""
    (x, eps, p, q), options = everything(SHAPES["odd tail"], torch.float32)
    p[3], q[3], options["sigma"][3] = 1, 0, 0
    got = x.clone()
    _ddim_step(got, eps, p, q, **options)
    assert torch.equal(got[3], x[3]) and not torch.equal(got[0], x[0])


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
    (x, eps, _, _), options = everything(SHAPES["odd tail"], torch.float32)
    plan = torch.arange(105.0, device=DEVICE).view(3, 5, 7) / 10
    chosen = {
        name: torch.stack([value, value + 1], 1)[:, 0] for name, value in options.items() if name in ("keys", "steps")
    }
    chosen |= {"rows": options["rows"].repeat_interleave(2)[::2], "sigma": plan[2, :, 3]}
    got = x.clone()
    step(got, eps, plan[0, :, 2], plan[1, :, 5], **chosen)
    check(got, x, eps, plan[0, :, 2].clone(), plan[1, :, 5].clone(), **{k: v.clone() for k, v in chosen.items()})


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
    (x, eps, p, q), options = everything((5, 2, 3, 5), torch.bfloat16)
    x, eps, p, q = (v.cpu() for v in (x, eps, p, q))
    options = {name: value if name == "guidance" else value.cpu() for name, value in options.items()}
    got = ddim_step_(x.clone(), eps, p, q, **options)
    check(got, x, eps, p, q, **options)
    wide = {name: value.double() if name == "sigma" else value for name, value in options.items()}
    got = ddim_step_reference(x.double(), eps, p, q, **wide)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), ddim_step_reference(x, eps, p, q, **options), rtol=1e-5, atol=1e-4)


def test_public_function_runs_the_kernel(as_if_on_cuda):
    """The CUDA branch hands every argument on, and refuses what the kernel would read as something else."""
    (x, eps, p, q), options = everything((5, 2, 3, 5), torch.bfloat16)
    want, got = x.clone(), x.clone()
    _ddim_step(want, eps, p, q, **options)
    assert ddim_step_(got, eps, p, q, **options) is got and torch.equal(got, want)
    for name, changed in {"x": (x.double(), p, q), "p": (x, p.double(), q), "q": (x, p, q.half())}.items():
        with pytest.raises(ValueError, match=f"^{name} must be float32"):
            ddim_step_(changed[0], eps, *changed[1:], **options)
    with pytest.raises(ValueError, match=r"^sigma must be float32"):
        ddim_step_(x, eps, p, q, **options | {"sigma": options["sigma"].double()})


def test_refuses():
    x, eps, p, q = operands((2, 1, 3, 3), torch.float32)
    two = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    noise = {"sigma": p, "keys": two, "steps": two}
    for words, arguments, options in (
        ("eps is ", (x, eps[:1], p, q), {}),
        ("eps is ", (x, eps[:, :, :2], p, q), {"rows": two}),
        ("eps is ", (x, eps.to("meta"), p, q), {}),
        ("p is ", (x, eps, p[:1], q), {}),
        ("q is ", (x, eps, p, q[:, None]), {}),
        ("q is ", (x, eps, p, q.to("meta")), {}),
        ("rows is ", (x, eps, p, q), {"rows": two[:1]}),
        ("rows must be int64", (x, eps, p, q), {"rows": two.int()}),
        ("conditional is ", (x, eps, p, q), {"conditional": eps[:1], "guidance": 2.0}),
        ("sigma is ", (x, eps, p, q), noise | {"sigma": p[:1]}),
        ("keys is ", (x, eps, p, q), noise | {"keys": two[:1]}),
        ("keys must be int64", (x, eps, p, q), noise | {"keys": two.float()}),
        ("steps must be int64", (x, eps, p, q), noise | {"steps": two.int()}),
        ("sigma, keys and steps belong", (x, eps, p, q), {"sigma": p}),
        ("sigma, keys and steps belong", (x, eps, p, q), {"sigma": p, "keys": two}),
        ("sigma, keys and steps belong", (x, eps, p, q), {"keys": two, "steps": two}),
    ):
        before = x.clone()
        with pytest.raises(ValueError, match=f"^{words}"):
            ddim_step_(*arguments, **options)
        assert torch.equal(x, before)


def test_opcheck():
    torch.library.opcheck(_ddim_step, operands((2, 1, 3, 5), torch.bfloat16))
    arguments, options = everything((5, 1, 3, 5), torch.bfloat16)
    torch.library.opcheck(_ddim_step, arguments, options)


def test_compiles_whole():
    """One graph with the mutation kept: what is read after the op is the new state."""
    arguments, options = everything((5, 2, 5, 7), torch.float32)

    def two_steps(x, eps, p, q, options):
        x = x * 2
        _ddim_step(x, eps, p, q, **options)
        y = x + 1
        _ddim_step(x[1:6], eps, q, p)
        return x, y

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments, options), two_steps(*arguments, options), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """2^31 + 131072 elements: x 8 GiB, eps 4 GiB, 13 GiB in all. The last samples move the first rows."""
    shape = (131080, 4, 64, 64)
    x, eps = torch.randn(shape, device="cuda"), torch.randn(shape, dtype=torch.float16, device="cuda")
    p, q = torch.randn(len(x), device="cuda"), torch.randn(len(x), device="cuda")
    rows = torch.arange(len(x), device="cuda").flip(0)
    probe = torch.tensor([0, 1, 65535, 65536, 131071, 131072, 131079], device="cuda")
    before = x[rows[probe]]
    _ddim_step(x, eps, p, q, rows=rows)
    check(x[rows[probe]], before, eps[probe], p[probe], q[probe])
