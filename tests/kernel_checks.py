"""What several kernel tests hold their kernels against."""

import numpy as np
import torch
from inpo_kernels.normal import philox_reference


def draws(keys, steps, n, start=0):
    """(B, n) float64: the normals of keys and steps (lists of B integers), and how far a kernel's fp32 may be off:
    n elements from `start` on.

    Box-Muller of the first two integers at counter (element, step, 0, 0); test_normal.py holds the integers.
    u and its logarithm are rounded to 2^-24, which the square root magnifies near 0; the angle, up to 2 pi, twice.
    On a GPU the square root is an approximation.
    """
    keys, steps = torch.tensor(keys)[:, None], torch.tensor(steps)[:, None]
    zero = torch.zeros_like(steps)
    first, second, *_ = (x.numpy() for x in philox_reference(keys, (start + torch.arange(n)[None], steps, zero, zero)))
    radius = np.sqrt(-2 * np.log((first // 256 + 0.5) / 2**24))
    rounding = (4 if torch.cuda.is_available() else 1) * 2.0**-24
    return radius * np.cos(2 * np.pi * (second // 256) / 2**24), rounding * (2 / radius + 16 * radius)


def kinds(every, differing):
    """The cases of a test. A GPU gets all: it compiles each dtype and alignment anew. The interpreter, which runs the
    same lines for many of them, gets those that differ."""
    return list(every) if torch.cuda.is_available() else list(differing)


# What a multi-tensor kernel walks over: shapes and how they lie in memory.
LISTS = {
    # of SD1.5: conv_in, a norm, a part of a projection; 6 + 1 + 5 blocks of 2048, most of them full
    "real": [((320, 4, 3, 3), "channels_last"), ((320,), "rows"), ((32, 320), "rows")],
    # one element, none, a block and its neighbours, two blocks and a bit, gaps in no order of dims
    "odd": [
        *[((n,), "rows") for n in (1, 0, 2047, 2048, 2049, 4133)],
        *[((4, 8, 1, 1), "channels_last"), ((9, 4, 3, 3), "channels_last"), ((33, 65), "columns"), ((), "rows")],
    ],
    "minimal": [((1,), "rows")],
}


def tensors(which, dtype=torch.float32, seed=0, device="cpu"):
    """Normal numbers in the shapes and layouts of LISTS[which]."""
    rng = np.random.default_rng(seed)
    lay = {
        "rows": lambda x: x,
        "columns": lambda x: x.mT.contiguous().mT,
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    }
    return [lay[how](torch.tensor(rng.normal(size=shape)).to(device, dtype)) for shape, how in LISTS[which]]


def odd_addresses(xs):
    """The same tensors as views of one buffer, 3 elements apart from element 1 on, and what lies between them."""
    whole = xs[0].new_full((sum(x.numel() + 3 for x in xs) + 1,), 77)
    between, views, at = torch.ones_like(whole, dtype=torch.bool), [], 1
    for x in xs:
        view = whole.as_strided(x.shape, x.stride(), at).copy_(x)
        between[at : at + x.numel()] = False
        views.append(view)
        at += x.numel() + 3
    return views, lambda: whole[between]
