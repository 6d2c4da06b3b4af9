"""bf16 working copies from fp32 masters, all tensors of a UNet in one launch."""

import torch
from inpo_kernels.refresh import _refresh, refresh_, refresh_reference

from bench.kernels.case import Case, Draw
from bench.kernels.unet_shapes import SD15

SHAPES = {"tiny": {(3, 7): 2, (2500,): 1}, "sd15 all parameters": SD15}


def eager(masters, copies):
    torch._foreach_copy_(copies, masters)


def make(shapes, device):
    draw = Draw(device)
    masters = [draw.normal(*shape) for shape, count in shapes.items() for _ in range(count)]
    return masters, [draw.normal(*x.shape, dtype=torch.bfloat16) for x in masters]


def case(name, shapes):
    n = sum(torch.Size(shape).numel() * count for shape, count in shapes.items())
    return Case(
        kernel="refresh", op="step", shape=name, dtype=torch.bfloat16, real=name != "tiny",
        make=lambda device: make(shapes, device),
        eager=eager, ours=_refresh, exact=refresh_reference, public=refresh_, writes=(1,),
        bytes=(4 + 2) * n, flops=n,
    )  # fmt: skip


CASES = [case(name, shapes) for name, shapes in SHAPES.items()]


def test_refresh(measure, case, provider):
    measure(case, provider)
