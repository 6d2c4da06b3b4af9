"""The feed-forward's first half, projection and GEGLU, without gradient: against cuBLAS and a pointwise GEGLU."""

import torch
import torch.nn.functional as F
from inpo_kernels.linear_geglu import _linear_geglu, linear_geglu, linear_geglu_reference

from bench.kernels.case import STORED, Case, Draw

SHAPES = {  # tokens of 60 (SD1.5) and 16 (SDXL) images, K, D
    "tiny": (75, 40, 36),
    "sd15 64x64 K 320": (60 * 4096, 320, 1280),
    "sd15 32x32 K 640": (60 * 1024, 640, 2560),
    "sd15 16x16 K 1280": (60 * 256, 1280, 5120),
    "sdxl 64x64 K 640": (16 * 4096, 640, 2560),
    "sdxl 32x32 K 1280": (16 * 1024, 1280, 5120),
}


def eager(x, weight, bias):
    hidden, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def make(shape, dtype, device):
    draw, (rows, k, d) = Draw(device), shape
    weight = draw.normal(2 * d, k, dtype=dtype, std=k**-0.5)
    return draw.normal(rows, k, dtype=dtype), weight, draw.normal(2 * d, dtype=dtype, std=0.1)


def case(name, shape, dtype):
    rows, k, d = shape
    return Case(
        kernel="linear_geglu", op="forward", shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device),
        eager=eager, ours=_linear_geglu, exact=linear_geglu_reference, public=linear_geglu,
        bytes=(rows * k + 2 * d * k + 2 * d + rows * d) * dtype.itemsize,
        flops=2 * rows * k * 2 * d,
        # each product's sum is taken in fp32; 4 sizes of the result because y = h gelu(g) and both carry an error
        tolerance=4 * STORED[dtype], because="fp32 sums over K, h and g both inexact, one rounding",
        eager_tolerance=8 * STORED[dtype],  # h and g are rounded to the dtype first
    )  # fmt: skip


CASES = [
    case(name, shape, dtype)
    for name, shape in SHAPES.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype == torch.bfloat16 or name == "tiny"
]


def test_linear_geglu(measure, case, provider):
    measure(case, provider)
