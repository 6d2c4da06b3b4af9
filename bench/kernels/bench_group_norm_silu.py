"""GroupNorm + SiLU on channels_last images, with and without the time embedding in front, forward and backward."""

import torch
import torch.nn.functional as F
from inpo_kernels.group_norm_silu import _group_norm_silu, group_norm_silu, group_norm_silu_reference

from bench.kernels.case import STORED, Case, Draw, Gradient

# N, C, H, W, groups. Without gradient 60 images go together, with it 32; SDXL 16 and 12
FORWARD = {
    "tiny": (2, 60, 7, 5, 6),  # masked channels and pixels
    "sd15 320 x 64x64": (60, 320, 64, 64, 32),
    "sd15 960 x 64x64": (60, 960, 64, 64, 32),
    "sd15 1280 x 16x16": (60, 1280, 16, 16, 32),
    "sd15 2560 x 8x8": (60, 2560, 8, 8, 32),
    "sdxl 640 x 64x64": (16, 640, 64, 64, 32),
    "sdxl 1920 x 64x64": (16, 1920, 64, 64, 32),
}
NORMS = {name: FORWARD[name] for name in ("tiny", "sd15 320 x 64x64", "sdxl 640 x 64x64")}  # before a transformer
BACKWARD = {
    "tiny": (2, 60, 7, 5, 6),
    "sd15 320 x 64x64": (32, 320, 64, 64, 32),
    "sd15 1280 x 16x16": (32, 1280, 16, 16, 32),
    "sdxl 640 x 64x64": (12, 640, 64, 64, 32),
}
EPS = 1e-5


def eager(groups, silu, temb):
    def f(x, weight, bias, *embedding):
        if temb:
            x = x + embedding[0][:, :, None, None]
        y = F.group_norm(x, groups, weight, bias, EPS)
        return F.silu(y) if silu else y

    return f


def ours(f, groups, silu):
    def g(x, weight, bias, temb=None):
        y = f(x, weight, bias, groups, EPS, silu, temb)
        return y[0] if isinstance(y, tuple) else y

    return g


def make(shape, dtype, device, temb, upstream):
    draw, (n, c, height, width, _) = Draw(device), shape
    image = lambda: draw.normal(n, height, width, c, dtype=dtype).permute(0, 3, 1, 2)  # noqa: E731
    inputs = (image(), draw.normal(c, dtype=dtype, std=0.3, mean=1), draw.normal(c, dtype=dtype, std=0.3))
    inputs += (draw.normal(n, c, dtype=dtype),) if temb else ()
    return (*inputs, image()) if upstream else inputs


def case(op, name, shape, dtype):
    silu, temb, backward = "SiLU" in op, "temb" in op, "backward" in op
    groups, n = shape[4], torch.Size(shape[:4]).numel()
    # dx and the gradients of weight, bias and temb are four outputs, summed over n / C elements each
    wrap = (lambda f: Gradient(f, of=(0, 1, 2, 3) if temb else (0, 1, 2))) if backward else (lambda f: f)
    return Case(
        kernel="group_norm_silu", op=op, shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device, temb, backward),
        eager=wrap(eager(groups, silu, temb)), ours=wrap(ours(_group_norm_silu, groups, silu)),
        exact=wrap(ours(group_norm_silu_reference, groups, silu)), public=wrap(ours(group_norm_silu, groups, silu)),
        # the least: x read once and y written; backward x and dy read and dx written. Ours reads x (and dy) twice
        bytes=(5 if backward else 2) * n * dtype.itemsize,
        flops=(40 if backward else 14) * n,
        tolerance=2 * STORED[dtype], because="fp32 sums over a group, one rounding to the stored dtype",
        # eager rounds x + temb and the norm before SiLU, and sums dtemb over rounded dx
        eager_tolerance=16 * STORED[dtype],
    )  # fmt: skip


DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    case(op, name, shape, dtype)
    for op, shapes in {
        "SiLU": FORWARD, "temb SiLU": FORWARD, "no activation": NORMS,
        "SiLU forward+backward": BACKWARD, "temb SiLU forward+backward": BACKWARD,
    }.items()
    for name, shape in shapes.items()
    for dtype in DTYPES
    if dtype == torch.bfloat16 or name in ("tiny", "sd15 320 x 64x64")
]  # fmt: skip


def test_group_norm_silu(measure, case, provider):
    measure(case, provider)
