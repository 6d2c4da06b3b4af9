"""inpo::refresh (on the CPU in Triton's interpreter) against rounding to nearest even, done on the bits in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from inpo_kernels.refresh import _refresh, refresh_, refresh_reference
from kernel_checks import LISTS, odd_addresses, tensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # of the copies
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to_bf16(x, nearest):
    """fp32 NumPy rounded to bf16 on its bits: to nearest even, or towards zero. NaN stays."""
    word = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    word = word + (0x7FFF + (word >> 16 & 1) if nearest else 0) & 0xFFFF0000
    return np.where(np.isnan(x), x, word.astype(np.uint32).view(np.float32).reshape(x.shape))


def check(masters, copies):
    """Bit for bit; Triton's interpreter may also cut fp32 off to bf16: the other neighbour, an ulp."""
    for master, copy in zip(masters, copies, strict=True):
        want, got = master.detach().cpu().float().numpy(), copy.cpu().double().numpy()
        if copy.dtype == torch.float16:
            want = want.astype(np.float16)
        if copy.dtype == torch.bfloat16:
            cut, want = to_bf16(want, nearest=False), to_bf16(want, nearest=True)
            want = np.where((got == cut) & (DEVICE == "cpu"), cut, want)
        np.testing.assert_array_equal(got, want.astype(np.float64))


def blank(masters, dtype):
    return [torch.empty_like(x, dtype=dtype) for x in masters]  # NaN, see conftest.py


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", LISTS)
def test_value_in_place(which, dtype):
    masters = tensors(which, device=DEVICE)
    kept, copies = [x.clone() for x in masters], blank(masters, dtype)
    assert _refresh(masters, copies) is None
    check(masters, copies)
    assert all(torch.equal(x, y) for x, y in zip(masters, kept, strict=True))
    want = refresh_reference(masters, copies)
    assert all(x.dtype == dtype for x in want)
    check(masters, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(dtype):
    """Views that start anywhere in a buffer, so that no load may be wide; what lies between them is untouched."""
    masters = tensors("odd", device=DEVICE)
    for source in (masters, odd_addresses(masters)[0]):
        copies, between = odd_addresses(blank(masters, dtype))
        _refresh(source, copies)
        check(masters, copies)
        assert (between() == 77).all()


# no shrinking: a failure would take minutes in the interpreter
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    sizes=st.lists(st.integers(0, 4500), min_size=1, max_size=5),
    of_master=st.sampled_from(DTYPES),
    of_copy=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_sizes(sizes, of_master, of_copy, seed):
    rng = np.random.default_rng(seed)
    masters = [torch.tensor(rng.normal(size=n)).to(DEVICE, of_master) for n in sizes]
    copies = blank(masters, of_copy)
    _refresh(masters, copies)
    check(masters, copies)


def test_special_values():
    """Infinities, NaN and both zeros; a tie and its neighbours; beyond fp16 is infinite."""
    values = [
        float("inf"),
        -float("inf"),
        float("nan"),
        0.0,
        -0.0,
        3e38,
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 - 2.0**-9,
        7e4,
    ]
    masters = [torch.tensor(values, device=DEVICE)]
    for dtype in DTYPES:
        copies = blank(masters, dtype)
        with np.errstate(over="ignore"):
            _refresh(masters, copies)
            check(masters, copies)
        assert torch.equal(copies[0][3:5].signbit().cpu(), torch.tensor([False, True]))


def test_tensors_replaced_between_calls():
    """A copy or a master that moved is found where it is now."""
    masters = tensors("odd", device=DEVICE)
    copies = blank(masters, torch.bfloat16)
    _refresh(masters, copies)
    old = copies[4]
    kept = old.clone()
    masters[2], masters[4], copies[4] = masters[2] * 3, masters[4] + 1, torch.empty_like(old)
    torch._foreach_mul_(masters[5:], 5)
    _refresh(masters, copies)
    check(masters, copies)
    assert torch.equal(old, kept)


def test_public_function_on_the_cpu():
    masters = tensors("odd")
    copies = blank(masters, torch.bfloat16)
    assert refresh_([x.requires_grad_() for x in masters], copies) is None
    assert all(torch.equal(copy, x.to(torch.bfloat16)) for x, copy in zip(masters, copies, strict=True))
    assert not any(x.requires_grad for x in copies)
    refresh_([], [])
    _refresh([], [])
    _refresh([torch.zeros(0, device=DEVICE)], [torch.zeros(0, device=DEVICE)])


def test_public_function_runs_the_kernel(as_if_on_cuda):
    masters = tensors("odd", device=DEVICE)
    copies = blank(masters, torch.bfloat16)
    refresh_([torch.nn.Parameter(x) for x in masters], copies)
    check(masters, copies)
    with pytest.raises(ValueError, match=r"^copies has 9 tensors, masters 10"):
        refresh_(masters, copies[1:])


def test_opcheck():
    masters = tensors("odd", device=DEVICE)[-4:]
    torch.library.opcheck(_refresh, (masters, [x.to(torch.bfloat16) for x in masters]))


def test_compiles_whole():
    """One graph with the mutation kept: what is read after the op is the new copy."""
    masters = tensors("odd", device=DEVICE)[-4:]

    def twice(masters, copies):
        _refresh(masters, copies)
        first = [copy + 1 for copy in copies]
        _refresh([2 * x for x in masters], copies)
        return first

    got, want = blank(masters, torch.bfloat16), blank(masters, torch.bfloat16)
    first, wanted = torch.compile(twice, fullgraph=True, backend="aot_eager")(masters, got), twice(masters, want)
    for x, y in zip((*got, *first), (*want, *wanted), strict=True):
        assert torch.equal(x, y)
    check([2 * x for x in masters], got)


@pytest.mark.gpu
def test_beyond_two_to_the_31():
    """2^31 + 4097 elements in one tensor, a small one after it: fp32 8 GiB, bf16 4 GiB, 13 GiB in all; bit for bit."""
    masters = [torch.randn(2**31 + 4097, device="cuda"), torch.randn(5, device="cuda")]
    copies = blank(masters, torch.bfloat16)
    refresh_(masters, copies)
    for master, copy in zip(masters, copies, strict=True):
        for lo in range(0, len(master), 2**28):
            assert torch.equal(copy[lo : lo + 2**28], master[lo : lo + 2**28].to(torch.bfloat16)), lo
