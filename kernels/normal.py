"""Standard normal numbers that are a function of (key, step, element): Philox 4x32-10 and Box-Muller.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The 64-bit key is the generator's key,
the counter is (element, step, 0, 0). Nothing depends on how samples are batched or on which device draws: the
integers are the same everywhere, the normals agree to the rounding of log, sqrt and cos.
"""

import math

import torch
import triton
import triton.language as tl

MASK = 0xFFFFFFFF
ROUNDS = 10


def philox_reference(key: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Four 32-bit integers (as int64) of key (int64, all 64 bits used) and four counters (their low 32), broadcast."""
    c0, c1, c2, c3 = (c & MASK for c in counter)
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        high_0, low_0 = _wide_product(c0, 0xD2511F53)
        high_1, low_1 = _wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def _wide_product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low half of a 32 x 32 bit product, in 16-bit pieces: int64 would overflow."""
    upper, lower = (x >> 16) * factor, (x & 0xFFFF) * factor
    whole = upper + (lower >> 16)
    return whole >> 16, ((whole & 0xFFFF) << 16) | (lower & 0xFFFF)


def normal_reference(keys: torch.Tensor, steps: torch.Tensor, shape: tuple[int, ...], dtype=torch.float32):
    """(B, *shape) standard normals in `dtype` of keys (B,) int64 and steps (B,) integers; on keys' device."""
    index = torch.arange(math.prod(shape), device=keys.device)[None]
    zero = torch.zeros_like(index)
    step = steps.to(keys.device, torch.int64)[:, None]
    first, second, _, _ = philox_reference(keys[:, None], (index + zero, step + zero, zero, zero))
    radius = (-2 * (((first >> 8).double() + 0.5) * 2.0**-24).log()).sqrt()
    angle = 2 * math.pi * (second >> 8).double() * 2.0**-24
    return (radius * angle.cos()).to(dtype).view(len(keys), *shape)


@triton.jit
def normal(key, step, o):
    """Inside a kernel: normals of elements o (int32 block) of one key (int64) and step (int32)."""
    zero = o * 0
    first, second, _, _ = tl.philox(key, o.to(tl.uint32), (step + zero).to(tl.uint32), zero, zero)
    # 24 bits fit fp32 exactly; + 0.5 keeps the logarithm finite: |normal| <= 5.9
    radius = tl.sqrt(-2.0 * tl.log(((first >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08))
    return radius * tl.cos(6.283185307179586 * ((second >> 8).to(tl.float32) * 5.9604644775390625e-08))
