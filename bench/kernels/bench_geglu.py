"""GEGLU after its projection, forward and backward."""

import torch
import torch.nn.functional as F
from inpo_kernels.geglu import _geglu, geglu, geglu_reference

from bench.kernels.case import STORED, Case, Draw, Gradient

SHAPES = {  # tokens of all images, 2 D; 32 images of SD1.5, 12 of SDXL
    "tiny": (37, 2 * 80),
    "sd15 64x64 D 1280": (32 * 4096, 2 * 1280),
    "sd15 32x32 D 2560": (32 * 1024, 2 * 2560),
    "sd15 16x16 D 5120": (32 * 256, 2 * 5120),
    "sdxl 64x64 D 2560": (12 * 4096, 2 * 2560),
    "sdxl 32x32 D 5120": (12 * 1024, 2 * 5120),
}


def eager(x):
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def make(shape, dtype, device, upstream):
    draw = Draw(device)
    x = draw.normal(*shape, dtype=dtype)
    return (x, draw.normal(shape[0], shape[1] // 2, dtype=dtype)) if upstream else (x,)


def case(op, name, shape, dtype):
    backward = op == "forward+backward"
    wrap = Gradient if backward else lambda f: f
    n = shape[0] * shape[1] // 2  # elements of y
    return Case(
        kernel="geglu", op=op, shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device, backward),
        eager=wrap(eager), ours=wrap(_geglu), exact=wrap(geglu_reference), public=wrap(geglu),
        bytes=(3 + 5 if backward else 3) * n * dtype.itemsize,  # x read, y written; x and dy read, dx written
        flops=(60 if backward else 25) * n,  # erf and exp count about 20 each
        eager_tolerance=4 * STORED[dtype],  # gelu is rounded before the product, and in the gradient
    )  # fmt: skip


OPS, DTYPES = ("forward", "forward+backward"), (torch.float32, torch.bfloat16)
CASES = [
    case(op, name, shape, dtype)
    for op in OPS
    for name, shape in SHAPES.items()
    for dtype in DTYPES
    if dtype == torch.bfloat16 or name in ("tiny", "sd15 64x64 D 1280")
]


def test_geglu(measure, case, provider):
    measure(case, provider)
