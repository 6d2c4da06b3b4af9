"""The table of a multi-tensor launch against the tensors it was made of, and what lists are refused."""

import pytest
import torch
from inpo_kernels.tensor_lists import BLOCK, TYPES, check, table
from kernel_checks import LISTS, odd_addresses, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("which", LISTS)
def test_every_element_once(which):
    """The programs take each block of each tensor once, at its address; empty tensors cost none."""
    one, two = tensors(which, device=DEVICE), tensors(which, torch.bfloat16, device=DEVICE)
    t = table(one, two)
    for addresses, xs in zip(t.addresses, (one, two), strict=True):
        assert addresses.dtype == torch.int64 and addresses.tolist() == [x.data_ptr() for x in xs]
    assert t.sizes.tolist() == [x.numel() for x in one]
    taken = list(zip(t.tensor.tolist(), t.block.tolist(), strict=True))
    assert taken == [(i, k) for i, x in enumerate(one) for k in range(-(-x.numel() // BLOCK))]
    assert t.addresses[0].device == t.sizes.device == t.tensor.device == t.block.device == one[0].device


def test_aligned_only_if_all_are():
    one, two = tensors("odd", device=DEVICE), tensors("odd", torch.bfloat16, device=DEVICE)
    assert table(one, two).aligned
    assert not table(one, odd_addresses(two)[0]).aligned
    assert not table(odd_addresses(one)[0], two).aligned
    last = torch.zeros(9, device=DEVICE)
    assert not table([*one, last[1:]]).aligned and table([*one, last[4:]]).aligned


def test_kept_until_a_tensor_is_replaced():
    """New numbers in the same memory need no new table; a tensor elsewhere does, and so do the same addresses cut
    into other sizes."""
    one, two = tensors("odd", device=DEVICE), tensors("odd", device=DEVICE)
    first = table(one, two)
    torch._foreach_mul_(one, 2)
    assert table(list(one), list(two)) is first
    moved = [*one[:3], one[3].clone(), *one[4:]]
    other = table(moved, two)
    assert other is not first and other.addresses[0].tolist() == [x.data_ptr() for x in moved]
    assert table(one, two) is first
    shorter = [*one[:-3], one[-3][:1], *one[-2:]]
    assert table(shorter, two).sizes.tolist() != first.sizes.tolist()


def test_accepts():
    """Any dense layout, alike in all lists; strides that say nothing may differ; dtypes may differ between lists."""
    check({"a": [], "b": []})
    check({name: tensors("odd", dtype) for name, dtype in zip("abc", TYPES, strict=True)})
    check({"a": [torch.zeros(2, 3, 4).permute(2, 0, 1)], "b": [torch.zeros(2, 3, 4).permute(2, 0, 1)]})
    weight = torch.zeros(4, 8, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
    (weight.flatten(1) @ torch.ones(8, 3)).sum().backward()
    assert weight.grad.stride() != weight.stride(), "autograd gives a 1x1 convolution such a gradient"
    check({"params": [weight], "grads": [weight.grad]})


def test_refuses():
    good = tensors("odd")
    for words, bad in {
        r"copies has 9 tensors, masters 10": good[1:],
        r"copies\[2\] is \(2046,\).*; masters\[2\] \(2047,\).*must be alike": [*good[:2], good[2][:-1], *good[3:]],
        r"copies\[7\] .*must be alike": [*good[:7], good[7].contiguous(), *good[8:]],
        r"copies\[8\] .*must be alike": [*good[:8], good[8].contiguous(), good[9]],
        r"copies\[4\] .*on meta.*must be alike": [*good[:4], good[4].to("meta"), *good[5:]],
        r"copies\[1\] is torch.float16, copies\[0\] torch.float32: one": [good[0], good[1].half(), *good[2:]],
        r"copies\[0\] is torch.float64": [x.double() for x in good],
        r"copies\[0\] is torch.int32": [x.int() for x in good],
    }.items():
        with pytest.raises(ValueError, match=f"^{words}"):
            check({"masters": good, "copies": bad})
    gap = [torch.zeros(4, 6)[:, :5]]
    with pytest.raises(ValueError, match=r"^masters\[0\] has gaps"):
        check({"masters": gap, "copies": gap})
    over = [torch.zeros(3)[:, None].expand(3, 4)]
    with pytest.raises(ValueError, match=r"^masters\[0\] has gaps"):
        check({"masters": over, "copies": over})
