"""inpo::adamw (on the CPU in Triton's interpreter) against torch.optim.AdamW in float64 and the law of its rounding."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.adamw import _adamw, adamw_, adamw_reference, round_reference
from kernel_checks import odd_addresses, tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of the gradients
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 2.0**-24
HOW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02}
SAMPLE = 1 << 16


def state(which, dtype=torch.float32, seed=0, of_g=1.0):
    """params, grads, m, v as in the middle of training, and copies full of NaN: unlike numbers in all of them."""
    p, g, m, v = (tensors(which, seed=4 * seed + k, device=DEVICE) for k in range(4))
    m, v = [0.3 * x.bfloat16() for x in m], [(0.1 * x * x + 1e-3).bfloat16() for x in v]
    copies = [torch.empty_like(x, dtype=torch.bfloat16) for x in p]
    return p, [(of_g * x).to(dtype) for x in g], m, v, copies


def clone(lists):
    return [[x.clone() for x in xs] for xs in lists]


def same(one, other):
    return all(torch.equal(x, y) for xs, ys in zip(one, other, strict=True) for x, y in zip(xs, ys, strict=True))


def kernel(p, g, m, v, copies, *, step, seed=5, scale=1.0, **how):
    how = HOW | how
    scale = torch.tensor(scale, device=DEVICE)
    _adamw(p, g, m, v, copies, scale, how["lr"], *how["betas"], how["eps"], how["weight_decay"], step, seed)


def exact(p, g, m, v, *, step, scale=1.0, **how):
    """torch.optim.AdamW in float64, from moments as they are stored, for one step."""
    leaf = p.detach().cpu().double().requires_grad_()
    leaf.grad = g.cpu().double() * float(np.float32(scale))
    optimizer = torch.optim.AdamW([leaf], **HOW | how, foreach=False)
    moments = {"exp_avg": m.cpu().double(), "exp_avg_sq": v.cpu().double()}
    optimizer.state[leaf] = {"step": torch.tensor(step - 1.0), **moments}
    optimizer.step()
    return [x.detach().numpy() for x in (leaf, *moments.values())]


def ulp(x):
    """Of bf16 at x (float64)."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x), 2.0**-126))) - 7)


def check(after, before, *, step, scale=1.0, **how):
    """p to fp32 rounding of the operands, m and v one of bf16's two neighbours of the exact number, copies rounded."""
    how = HOW | how
    for p, _, m, v, *copy in zip(*(xs for xs in after if len(xs)), strict=True):
        assert p.dtype == torch.float32 and m.dtype == v.dtype == torch.bfloat16
        assert all(x.isfinite().all() for x in (p, m, v, *copy))
        if copy:
            off = (copy[0].float() - p).abs()
            assert torch.equal(copy[0], p.bfloat16()) or (DEVICE == "cpu" and (off <= 2.0**-7 * p.abs()).all())
    for i, (p0, g0, m0, v0) in enumerate(zip(*before[:4], strict=True)):
        p, m, v = exact(p0, g0, m0, v0, step=step, scale=scale, **how)
        got_p, got_m, got_v = (after[k][i].cpu().double().numpy() for k in (0, 2, 3))
        p0, g0, m0 = (np.abs(x.cpu().double().numpy()) for x in (p0, g0, m0))
        # of a difference, a product and a sum with three rounded constants; of a sum of squares
        of_m, of_v = 4 * FP32 * ((1 - how["betas"][0]) * (g0 * scale + m0) + np.abs(m)), 6 * FP32 * v
        ratio = how["lr"] / (1 - how["betas"][0] ** step) / (np.sqrt(v / (1 - how["betas"][1] ** step)) + how["eps"])
        # the root and the quotient are approximations on a GPU; decay, a product and a sum
        assert (np.abs(got_p - p) <= ratio * (of_m + 16 * FP32 * np.abs(m)) + 3 * FP32 * p0 + FP32 * np.abs(p)).all()
        for got, want, off in ((got_m, m, of_m), (got_v, v, of_v)):
            assert (np.abs(got - want) < ulp(np.abs(want) + off) + off).all()


@pytest.mark.parametrize(
    "which, dtype", [("real", torch.bfloat16), *(("odd", d) for d in DTYPES), ("minimal", torch.float32)], ids=str
)
def test_one_step(which, dtype):
    before, start = state(which, dtype), state(which, dtype)
    after = clone(before)
    assert kernel(*after, step=7, scale=0.37) is None
    check(after, before, step=7, scale=0.37)
    assert same(after[1:2], before[1:2])
    kernel(*start, step=7, scale=0.37)
    assert same(start, after), "the same bits on every run"


@pytest.mark.parametrize("public", [False, True], ids=["kernel", "public on the CPU"])
def test_several_steps(public):
    """From nothing, other gradients each step: every step from where it stands; all against fp32 moments in float64."""
    p, g, m, v, copies = state("odd")
    for x in (*m, *v):
        x.zero_()
    leaves = [torch.nn.Parameter(x.cpu().double()) for x in p]
    optimizer = torch.optim.AdamW(leaves, **HOW)
    for step in range(1, 6):
        g = tensors("odd", seed=100 + step, device=DEVICE)
        before, lists = clone((p, g, m, v, [])), (p, g, m, v, copies)
        adamw_(*lists, **HOW, step=step, seed=5) if public else kernel(*lists, step=step)
        check(lists, before, step=step)
        for leaf, x in zip(leaves, g, strict=True):
            leaf.grad = x.cpu().double()
        optimizer.step()
    for leaf, x in zip(leaves, p, strict=True):
        # an update is at most about lr, and off by what five roundings of 2^-7 make of m
        assert not x.numel() or (leaf - x.cpu()).abs().max() <= 5 * HOW["lr"] * 2.0**-5


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    sizes=st.lists(st.integers(0, 4500), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([1, 2, 1000, 10**6]),
    seed=st.sampled_from([0, 1, 2**31 + 5, 2**62 + 3, 2**63 - 1]),
    how=st.sampled_from([{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"weight_decay": 0.0, "lr": 0.1}]),
)
def test_any_sizes(sizes, dtype, step, seed, how):
    rng = np.random.default_rng(step)
    p, g, m, v = ([torch.tensor(rng.normal(size=n), device=DEVICE) for n in sizes] for _ in range(4))
    m, v = [x.bfloat16() for x in m], [(x * x + 1e-3).bfloat16() for x in v]
    lists = [[x.float() for x in p], [x.to(dtype) for x in g], m, v, []]
    after = clone(lists)
    kernel(*after, step=step, seed=seed, **how)
    check(after, lists, step=step, **how)
    same_as_reference(after, lists, step=step, seed=seed, **how)


def same_as_reference(after, before, **how):
    """m and v to the bit on the CPU; where fp32 itself differs, on a GPU, the rounding may turn for a few."""
    p, m, v = adamw_reference(*before[:4], **HOW | how)
    for got, want in zip((*after[2], *after[3]), (*m, *v), strict=True):
        assert int((got != want).sum()) <= (DEVICE == "cuda") * (1 + got.numel() // 100)
    for got, want in zip(after[0], p, strict=True):
        torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)


def test_odd_addresses_and_layouts():
    """Views that start anywhere in a buffer: the same numbers, and what lies between is untouched. Elements are
    numbered as they lie in memory, whatever the layout."""
    before = state("odd")
    want = clone(before)
    kernel(*want, step=3)
    moved = [odd_addresses(xs) for xs in before]
    kernel(*(views for views, _ in moved), step=3)
    assert same([views for views, _ in moved], want) and all((between() == 77).all() for _, between in moved)
    same_as_reference(want, before, step=3, seed=5)
    flat = clone(
        [[x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).flatten() for x in xs] for xs in before]
    )
    kernel(*flat, step=3)
    for xs, ys in zip(flat, want, strict=True):
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x, y.permute(sorted(range(y.ndim), key=y.stride, reverse=True)).flatten())


def roundings(step=7, seed=5, skip=0, g=None):
    """How m and v of a large tensor, the last of a list, were rounded: (up - chance of up), and the chance, of each."""
    rng = np.random.default_rng(0)
    small = torch.zeros(3, device=DEVICE)
    large = [torch.tensor(rng.normal(size=SAMPLE)).float().to(DEVICE) for _ in range(3)]
    lists = [[small] * skip + [large[0]], [small] * skip + [large[1]]]
    lists += [[small.bfloat16()] * skip + [x.bfloat16()] for x in (large[2], large[0].square())]
    before = clone(lists)
    kernel(*lists, [], step=step, seed=seed)
    _, *moments = exact(*(xs[-1] for xs in before), step=step)
    out = []
    for got, want in zip(lists[2:], moments, strict=True):
        low = np.floor(np.abs(want) / ulp(want)) * ulp(want)  # the neighbour nearer to zero
        chance = (np.abs(want) - low) / ulp(want)
        up = np.abs(got[-1].cpu().double().numpy()) > low
        out.append((up - chance, chance))
    return out


@pytest.fixture(scope="module")
def rounded():
    return roundings()


def test_rounding_is_right_in_the_mean(rounded):
    """Up as often as the part cut off says, in every tenth of it (5 standard errors): to nearest would be 0 or 1."""
    for off, chance in rounded:
        for tenth in range(10):
            here = (chance * 10).astype(int) == tenth
            assert here.sum() > SAMPLE / 50
            assert abs(off[here].mean()) < 5 * np.sqrt((chance * (1 - chance))[here].mean() / here.sum()), tenth


def test_rounding_depends_on_seed_step_tensor_element(rounded):
    """The roundings of m and v, of neighbours, and under each change are uncorrelated (5 standard errors)."""
    (m, _), (v, _) = rounded
    assert all(np.array_equal(x, y) for x, y in zip((m, v), (off for off, _ in roundings()), strict=True))
    others = {"v": v, "element": np.roll(m, 1), "block": np.roll(m, 2048)}
    others |= {"seed": roundings(seed=6)[0][0], "upper seed": roundings(seed=5 + (1 << 32))[0][0]}
    others |= {"step": roundings(step=8)[0][0], "tensor": roundings(skip=1)[0][0]}
    for name, other in others.items():
        assert abs(np.corrcoef(m, other)[0, 1]) < 5 / np.sqrt(SAMPLE), name
        assert name in ("v", "element", "block") or abs(np.corrcoef(v, other)[0, 1]) < 5 / np.sqrt(SAMPLE), name


def test_batching_changes_nothing():
    """A tensor's bits depend on its number in the list, not on the sizes of the others, nor on programs before it."""
    before = state("odd")
    whole, part = clone(before), clone([xs[:5] for xs in before])
    kernel(*whole, step=3)
    kernel(*part, step=3)
    assert same([xs[:5] for xs in whole], part)
    resized = clone([[xs[3], xs[3], *xs[2:5]] for xs in before])
    kernel(*resized, step=3)
    assert same([xs[2:] for xs in resized], [xs[2:] for xs in part])


def test_v_does_not_stand_still():
    """500 steps of a gradient of 0 take v from 1 to 0.999^500 = 0.61 in the mean; rounded to nearest it stays 1."""
    zero = torch.zeros(2048, device=DEVICE)
    v, nearest = [torch.ones_like(zero).bfloat16()], torch.ones_like(zero).bfloat16()
    m = [zero.bfloat16()]
    for step in range(1, 501):
        # on the CPU the reference: the kernel's moments are the same to the bit, and 500 launches too slow there
        adamw_([zero], [zero], m, v, lr=1e-3, step=step, seed=5)
        nearest = (0.999 * nearest.float()).bfloat16()
    assert (nearest == 1).all() and not m[0].any()
    # a rounding is off by 2^-9 on average, 500 of them by 0.05, their mean over 2048 elements by 1e-3
    assert abs(v[0].float().mean() - 0.999**500) < 5e-3


def test_scale_and_copies():
    """As with gradients clipped before; without copies the rest is the same; p is rounded into them."""
    before = state("odd", of_g=40.0)
    folded, clipped, without = clone(before), clone(before), clone(before)
    kernel(*folded, step=3, scale=0.37)
    clipped[1] = [x * torch.tensor(0.37, device=DEVICE) for x in clipped[1]]
    kernel(*clipped, step=3)
    for k in (0, 2, 3):
        for x, y in zip(folded[k], clipped[k], strict=True):
            # a GPU fuses scale and the next product: an ulp of bf16
            assert ((x - y).abs() <= (2.0**-6 * y.abs() if DEVICE == "cuda" else 0)).all()
    kernel(*without[:4], [], step=3, scale=0.37)
    assert same(without[:4], folded[:4]) and all(x.isnan().all() for x in without[4])
    for x, p in zip(folded[4], folded[0], strict=True):
        assert (x.float() - p).abs().le(2.0**-7 * p.abs()).all()


def bare_nan():
    """Of both signs, all bits set, as a GPU makes them: adding to these would end at a zero or a small number."""
    return torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)


def test_what_is_not_finite_is_kept():
    """An infinite or undefined gradient is seen in its moments, in no other element, and never as a finite number."""
    before, inf = state("odd"), float("inf")
    bad, want = clone(before), clone(before)
    bad[1][5][:5] = torch.cat([torch.tensor([inf, -inf, float("nan")]), bare_nan()])
    with np.errstate(invalid="ignore"):
        kernel(*bad, step=3)
    kernel(*want, step=3)
    m, v, p = (bad[k][5][:5].float().cpu() for k in (2, 3, 0))
    assert m[:2].tolist() == [inf, -inf] and v[:2].tolist() == [inf, inf]
    assert m[2:].isnan().all() and v[2:].isnan().all() and p.isnan().all()
    for k in (0, 2, 3):
        bad[k][5], want[k][5] = bad[k][5][5:], want[k][5][5:]
        assert same([bad[k]], [want[k]])


def test_round_reference():
    """Both neighbours at the right chance, over all 65536 values of the bits; exact numbers and signs stay."""
    bits = torch.arange(1 << 16)
    for x, low, high, ups in (
        (1 + 2.0**-9, 1.0, 1 + 2.0**-7, 1 << 14),
        (-1.5 - 2.0**-8, -1.5, -1.5 - 2.0**-7, 1 << 15),
    ):
        got = round_reference(torch.full((1 << 16,), x), bits).float()
        assert int((got == low).sum()) == (1 << 16) - ups and int((got == high).sum()) == ups
    kept = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, 3.3895313892515355e38, float("inf"), -float("inf")])
    for some in (0, 1, 40000, 65535):
        got = round_reference(kept, torch.full((8,), some))
        assert torch.equal(got.float(), kept) and torch.equal(got.signbit(), kept.signbit())
        assert round_reference(bare_nan(), torch.tensor([some])).isnan().all()


def test_public_function():
    """On the CPU the reference, with copies; float64 is exact, as torch has it; nothing is nothing."""
    before = [[x.cpu() for x in xs] for xs in state("odd")]
    after = clone(before)
    adamw_(*after, **HOW, step=3, seed=5, scale=torch.tensor(0.37))
    check(after, before, step=3, scale=0.37)
    assert all(torch.equal(x, p.bfloat16()) for x, p in zip(after[4], after[0], strict=True))
    wide = [[x.double() for x in xs] for xs in before[:4]]
    for k, values in enumerate(zip(*adamw_reference(*wide, **HOW, step=3, seed=5), strict=True)):
        for x, want in zip(values, exact(*(xs[k] for xs in wide), step=3), strict=True):
            np.testing.assert_allclose(x.numpy(), want, rtol=1e-12, atol=1e-15)
    adamw_([], [], [], [], step=1, seed=0, lr=1.0)
    _adamw([], [], [], [], [], torch.ones((), device=DEVICE), 1.0, 0.9, 0.99, 1e-8, 0.0, 1, 0)


def test_public_function_runs_the_kernel(as_if_on_cuda):
    before = state("odd")
    got, want = clone(before), clone(before)
    scale = torch.tensor(0.37, device=DEVICE)
    how = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    adamw_([torch.nn.Parameter(x) for x in got[0]], *got[1:], **how, step=3, seed=9, scale=scale)
    kernel(*want, **how, step=3, seed=9, scale=0.37)
    assert same(got, want)
    got, want = clone(before), clone(before)
    adamw_(*got[:4], lr=0.01, step=1, seed=0)
    kernel(*want[:4], [], lr=0.01, weight_decay=0.0, step=1, seed=0)
    assert same(got[:4], want[:4])


def test_refuses():
    p, g, m, v, copies = state("odd")
    scale = torch.ones(2, device=DEVICE)
    for words, lists, options in (
        (r"grads has 9 tensors, params 10", (p, g[1:], m, v), {}),
        (r"m\[7\] .*must be alike", (p, g, [*m[:7], m[7].contiguous(), *m[8:]], v), {}),
        (r"copies\[2\] .*must be alike", (p, g, m, v, [*copies[:2], copies[3], *copies[3:]]), {}),
        (r"v\[1\] is torch.float32, v\[0\] torch.bfloat16", (p, g, m, [v[0], v[1].float(), *v[2:]]), {}),
        ("params must be torch.float32, got torch.bfloat16", (copies, g, m, v), {}),
        ("m must be torch.bfloat16, got torch.float32", (p, g, p, v), {}),
        ("v must be torch.bfloat16, got torch.float32", (p, g, m, p), {}),
        ("copies must be torch.bfloat16, got torch.float32", (p, g, m, v, p), {}),
        ("step is 0", (p, g, m, v), {"step": 0}),
        ("scale is ", (p, g, m, v), {"scale": scale}),
        ("scale is ", (p, g, m, v), {"scale": scale[0].double()}),
        ("scale is ", (p, g, m, v), {"scale": scale[0].to("meta")}),
    ):
        kept = clone((p, m, v))
        with pytest.raises(ValueError, match=f"^{words}"):
            adamw_(*lists, **{"lr": 1e-3, "step": 1, "seed": 0} | options)
        assert same(kept, (p, m, v))


def test_opcheck():
    lists = [xs[-4:] for xs in state("odd")]
    copies = [x.bfloat16() for x in lists[0]]
    scale = torch.ones((), device=DEVICE)
    torch.library.opcheck(_adamw, (*lists[:4], copies, scale, 1e-3, 0.9, 0.999, 1e-8, 0.01, 3, 5))


def test_compiles_whole():
    """One graph with the mutation kept: what is read after the op is the new state."""
    before = [xs[-4:] for xs in state("odd")]

    def two_steps(p, g, m, v, copies):
        kernel(p, [2 * x for x in g], m, v, copies, step=3)
        between = [x + 1 for xs in (p, m, v, copies) for x in xs]
        kernel(p, g, m, v, [], step=4)
        return between

    got, want = clone(before), clone(before)
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(*got)
    assert same([compiled], [two_steps(*want)]) and same(got, want)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """2^31 + 4097 elements in one tensor: params 8 GiB, gradients, m, v and copies 4 each; the ends and the middle."""
    n = 2**31 + 4097
    p, copy = torch.randn(n, device="cuda"), torch.empty(n, dtype=torch.bfloat16, device="cuda")
    g, m, v = (torch.randn(n, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    v.square_().add_(0.01)
    parts = [slice(0, 5000), slice(2**31 - 3000, 2**31 + 3000), slice(n - 3000, n)]
    before = [[x[part].clone() for part in parts] for x in (p, g, m, v)]
    kernel([p], [g], [m], [v], [copy], step=3)
    check([[x[part] for part in parts] for x in (p, g, m, v, copy)], before, step=3)
