"""LayerNorm with the residual added in front, and alone, forward and backward."""

import torch
import torch.nn.functional as F
from inpo_kernels.layer_norm import _layer_norm, layer_norm, layer_norm_reference

from bench.kernels.case import STORED, Case, Draw, Gradient

SHAPES = {  # tokens of 32 (SD1.5) and 12 (SDXL) images, D
    "tiny": (37, 40),
    "sd15 64x64 D 320": (32 * 4096, 320),
    "sd15 32x32 D 640": (32 * 1024, 640),
    "sd15 16x16 D 1280": (32 * 256, 1280),
    "sdxl 64x64 D 640": (12 * 4096, 640),
    "sdxl 32x32 D 1280": (12 * 1024, 1280),
}
EPS = 1e-5


def eager(x, weight, bias, residual=None):
    u = x if residual is None else x + residual
    y = F.layer_norm(u, x.shape[-1:], weight, bias, EPS)
    return y if residual is None else (y, u)


def ours(f):
    def g(x, weight, bias, residual=None):
        y, u, *_ = f(x, weight, bias, EPS, residual)
        return y if residual is None else (y, u)

    return g


def make(shape, dtype, device, residual, upstream):
    draw, (rows, d) = Draw(device), shape
    inputs = (
        draw.normal(rows, d, dtype=dtype),
        draw.normal(d, dtype=dtype, mean=1, std=0.3),
        draw.normal(d, dtype=dtype),
    )
    inputs += (draw.normal(rows, d, dtype=dtype),) if residual else ()
    dy = tuple(draw.normal(rows, d, dtype=dtype) for _ in range(2 if residual else 1))
    return (*inputs, *dy) if upstream else inputs


def case(op, name, shape, dtype):
    residual, backward = "residual" in op, "backward" in op
    n = shape[0] * shape[1]
    of = (0, 1, 2, 3) if residual else (0, 1, 2)
    wrap = (lambda f: Gradient(f, of=of, upstream=2 if residual else 1)) if backward else (lambda f: f)
    forward_tensors, backward_tensors = (4, 4) if residual else (2, 3)  # x (+ r) -> y (+ u); u, dy (+ du) -> dx
    return Case(
        kernel="layer_norm", op=op, shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device, residual, backward),
        eager=wrap(eager), ours=wrap(ours(_layer_norm)), exact=wrap(ours(layer_norm_reference)),
        public=wrap(ours(layer_norm)),
        bytes=(forward_tensors + (backward_tensors if backward else 0)) * n * dtype.itemsize,
        flops=(28 if backward else 9) * n,
        # u is rounded to the dtype before it is normalised, as eager does; exact does not round it
        tolerance=4 * STORED[dtype], because="u and the result are rounded to the stored dtype",
        eager_tolerance=8 * STORED[dtype],
    )  # fmt: skip


OPS = ("alone", "residual", "alone forward+backward", "residual forward+backward")
CASES = [
    case(op, name, shape, dtype)
    for op in OPS
    for name, shape in SHAPES.items()
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.bfloat16 or name == "tiny"
]


def test_layer_norm(measure, case, provider):
    measure(case, provider)
