"""Philox against Random123's published vectors; normals, in torch and in a kernel, against Box-Muller and their law."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from inpo_kernels.normal import normal, normal_reference, philox_reference
from kernel_checks import draws

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Random123's kat_vectors, philox4x32 10: counter, key, output
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}
KEYS = [0, 1, -1, 7, (1 << 62) + 12345, (1 << 63) - 1, -(1 << 63), 0x299F31D0A4093822, 1 << 32, -(1 << 40) + 3]
STEPS = [0, 1, 2, 999, 0, 1, 2**31 - 1, 5, -1, 2**31]  # the low 32 bits count
SAMPLE = 1 << 18


@triton.jit
def _draw(p_out, p_keys, p_steps, start, n, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = normal(tl.load(p_keys + i_b), tl.load(p_steps + i_b).to(tl.int32), start + o_n)
    tl.store(p_out + i_b * n + o_n, z, mask=o_n < n)


def tensors(*lists):
    return [torch.tensor(x, device=DEVICE) for x in lists]


def drawn(keys, steps, n, start=0):
    out = torch.empty(len(keys), n, device=DEVICE)
    _draw[(len(keys), triton.cdiv(n, 1024))](out, *tensors(keys, steps), start, n, BLOCK=1024)
    return out


def many(keys=3, steps=0, n=SAMPLE):
    return normal_reference(*tensors([keys], [steps]), (n,), torch.float64)[0].cpu().numpy()


@pytest.mark.parametrize("counter, key, output", KNOWN.values(), ids=KNOWN)
def test_known_answers(counter, key, output):
    whole = np.array([key[1] << 32 | key[0]], np.uint64).view(np.int64).tolist()
    # a second, different lane: nothing is shared between lanes
    got = philox_reference(*tensors([*whole, 5]), [c.repeat(2) for c in tensors(*([c] for c in counter))])
    assert [int(x[0]) for x in got] == output
    assert all(int(x[0]) != int(x[1]) for x in got)


def test_normals_are_box_muller_of_the_integers():
    """In float64 to its rounding, whatever the shape; the largest that can be drawn, at u = 2^-25, is finite."""
    got = normal_reference(*tensors(KEYS, STEPS), (3, 5, 7), torch.float64)
    assert got.shape == (len(KEYS), 3, 5, 7) and normal_reference(*tensors(KEYS, STEPS), (2,)).dtype == torch.float32
    np.testing.assert_allclose(got.flatten(1).cpu(), draws(KEYS, STEPS, 105)[0], atol=1e-13)
    assert math.isclose(math.sqrt(50 * math.log(2)), 5.887, rel_tol=1e-4) and abs(many()).max() < 5.888


@pytest.mark.parametrize("n", [2048, 105, 1], ids=["two blocks", "odd tail", "minimal"])
def test_kernel_draws_the_same(n):
    got, (want, bound) = drawn(KEYS, STEPS, n), draws(KEYS, STEPS, n)
    assert (np.abs(got.double().cpu().numpy() - want) <= bound).all()
    assert torch.equal(got, drawn(KEYS, STEPS, n)), "the same bits on every run"


@pytest.mark.parametrize("key, element, radius", [(0, 14883995, 5.887), (3, 2350790, 2.44e-4)], ids=["least", "most"])
def test_ends_of_the_logarithm(key, element, radius):
    """Where u is the least and the most that 24 bits give: finite, and as far out as it should be."""
    got, (want, bound) = drawn([key], [0], 8, element), draws([key], [0], 8, element)
    assert np.abs(want[0, 0]) <= radius and (np.abs(got.double().cpu().numpy() - want) <= bound).all()
    first = philox_reference(*tensors([key]), tensors([element], [0], [0], [0]))[0]
    assert int(first) >> 8 in (0, 2**24 - 1)


def test_law():
    """2^18 draws: mean, variance, skewness, kurtosis within 4 standard errors; Kolmogorov-Smirnov at 0.1 %."""
    z = many()
    n = len(z)
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - want) < 4 * math.sqrt(spread / n), power
    law = torch.special.ndtr(torch.from_numpy(np.sort(z))).numpy()
    distance = max(np.abs(np.arange(n) / n - law).max(), np.abs(np.arange(1, n + 1) / n - law).max())
    assert distance * math.sqrt(n) < 1.95
    assert len(np.unique(z)) > 0.99 * n, "no element is drawn twice"


def test_independent_of_batching():
    """Any subset in any order, any number of elements: the same numbers for a (key, step, element)."""
    keys, steps = tensors(KEYS, STEPS)
    whole = normal_reference(keys, steps, (4, 3, 3))
    order = torch.tensor([7, 2, 2, 9, 0], device=DEVICE)
    assert torch.equal(normal_reference(keys[order], steps[order], (4, 3, 3)), whole[order])
    assert torch.equal(normal_reference(keys[4:5], steps[4:5], (30,))[0], whole[4].flatten()[:30])


def test_unrelated_along_key_step_element():
    """Neighbours in each, and sides of the 32-bit halves of the key, are uncorrelated (4 standard errors)."""
    z = many()
    others = {
        "element": np.roll(z, 1),
        "step": many(steps=1),
        "key": many(keys=4),
        "upper key": many(keys=3 + (1 << 32)),
    }
    others |= {"sign of the key": many(keys=-3), "key and step exchanged": many(keys=0, steps=3)}
    for name, other in others.items():
        for f in (lambda x: x, np.square):  # squares: a shared radius shows although the signs differ
            assert abs(np.corrcoef(f(z), f(other))[0, 1]) < 4 / math.sqrt(len(z)), name
