"""The inversion update of a batch of images that stand at different levels, in place."""

import torch
from inpo_kernels.ddim_step import _ddim_step, ddim_step_, ddim_step_reference

from bench.kernels.case import STORED, Case, Draw

# images in the window, images in the batch, C, H, W
SHAPES = {
    "tiny": (4, 3, 3, 19, 23),
    "sd15 64x64 64 images": (256, 64, 4, 64, 64),
    "sdxl 128x128 64 images": (256, 64, 4, 128, 128),
}
GUIDANCE = 7.5


def eager(x, eps, p, q):
    return x.copy_(p[:, None, None, None] * x + q[:, None, None, None] * eps)


def eager_guided(x, eps, p, q, conditional):
    return eager(x, eps + GUIDANCE * (conditional - eps), p, q)


def eager_slots(x, eps, p, q, rows):
    return x.index_copy_(0, rows, p[:, None, None, None] * x[rows] + q[:, None, None, None] * eps)


def make(op, window, batch, *image, dtype, device):
    draw = Draw(device)
    x = draw.normal(window if op == "slots" else batch, *image)
    eps = draw.normal(batch, *image, dtype=dtype)
    arguments = (x, eps, draw.uniform(0.9, 1.0, batch), draw.uniform(0.05, 0.15, batch))
    if op == "guided":
        return (*arguments, draw.normal(batch, *image, dtype=dtype))
    if op == "slots":  # batch different images, in no order
        return (*arguments, torch.argsort(draw.uniform(0, 1, window))[:batch])
    return arguments


OPS = {  # eager, ours, reference, public
    "plain": (eager, _ddim_step, ddim_step_reference, ddim_step_),
    "guided": (
        eager_guided,
        lambda x, eps, p, q, c: _ddim_step(x, eps, p, q, conditional=c, guidance=GUIDANCE),
        lambda x, eps, p, q, c: ddim_step_reference(x, eps, p, q, conditional=c, guidance=GUIDANCE),
        lambda x, eps, p, q, c: ddim_step_(x, eps, p, q, conditional=c, guidance=GUIDANCE),
    ),
    "slots": (
        eager_slots,
        lambda x, eps, p, q, rows: _ddim_step(x, eps, p, q, rows=rows),
        lambda x, eps, p, q, rows: ddim_step_reference(x, eps, p, q, rows=rows),
        lambda x, eps, p, q, rows: ddim_step_(x, eps, p, q, rows=rows),
    ),
}


def case(op, name, shape, dtype):
    n = torch.Size(shape[1:]).numel()
    narrow = 2 if op == "guided" else 1
    plain, ours, reference, public = OPS[op]
    return Case(
        kernel="ddim_step", op=op, shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(op, *shape, dtype=dtype, device=device),
        eager=plain, ours=ours, exact=reference, public=public, writes=(0,),
        # eager combines the two predictions in eps's dtype: three roundings, the last two of numbers of size 8
        eager_tolerance=8 * STORED[dtype] if op == "guided" else 0.0,
        bytes=2 * 4 * n + narrow * n * dtype.itemsize,  # x read and written in fp32, eps read
        flops=(6 if op == "guided" else 3) * n,
    )  # fmt: skip


DTYPES = (torch.float32, torch.bfloat16)  # of eps
CASES = [case(op, name, shape, dtype) for op in OPS for name, shape in SHAPES.items() for dtype in DTYPES]


def test_ddim_step(measure, case, provider):
    measure(case, provider)
