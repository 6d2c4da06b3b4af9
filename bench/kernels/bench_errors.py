"""The errors of policy and reference against tau, and their gradient: what a micro-batch needs of them."""

import torch
from inpo_kernels.errors import _errors, errors, errors_reference

from bench.kernels.case import Case, Draw, Gradient

SHAPES = {  # two images a pair
    "tiny": (3, 3, 19, 23),  # a full block and a masked tail
    "sd15 64x64 16 pairs": (32, 4, 64, 64),
    "sdxl 128x128 8 pairs": (16, 4, 128, 128),
}


def eager(pred, ref, x_t, x_0, a, s):
    a, s = a[:, None, None, None], s[:, None, None, None]
    tau = (x_t.float() - a * x_0.float()) / s
    e = (pred.float() - tau).square().mean((1, 2, 3))
    r = (ref.float() - tau).square().mean((1, 2, 3))
    return e, r


def make(shape, dtype, device, upstream):
    draw = Draw(device)
    pred, ref, x_t, x_0 = (draw.normal(*shape, dtype=dtype) for _ in range(4))
    abar = draw.uniform(0.0047, 0.99, shape[0])
    inputs = (pred, ref, x_t, x_0, abar.sqrt(), (1 - abar).sqrt())
    return (*inputs, draw.uniform(0.5, 1.5, shape[0])) if upstream else inputs


def case(op, name, shape, dtype):
    wrap = Gradient if op == "forward+backward" else lambda f: f
    n = torch.Size(shape).numel()
    tensors = 4 + 3 + 1 if op == "forward+backward" else 4  # backward reads pred, x_t, x_0 and writes dpred
    return Case(
        kernel="errors", op=op, shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device, upstream=op != "forward"),
        eager=wrap(eager), ours=wrap(_errors), exact=wrap(errors_reference), public=wrap(errors),
        bytes=tensors * n * dtype.itemsize + 4 * 4 * shape[0],  # and a, s, e, r
        flops=(15 if op == "forward+backward" else 9) * n,  # tau 3, each error 3; backward: tau 3, dpred 3
    )  # fmt: skip


OPS, DTYPES = ("forward", "forward+backward"), (torch.float32, torch.bfloat16)
CASES = [case(op, name, shape, dtype) for op in OPS for name, shape in SHAPES.items() for dtype in DTYPES]


def test_errors(measure, case, provider):
    measure(case, provider)
