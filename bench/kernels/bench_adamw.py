"""AdamW with bf16 moments and the working copy in one pass, against torch's fused AdamW with fp32 moments and a copy.

Not the same work: ours keeps half the state, which is what it is for. Parameters and copies must agree.
"""

import torch
from inpo_kernels.adamw import _adamw, adamw_, adamw_reference

from bench.kernels.case import Case, Draw
from bench.kernels.unet_shapes import SD15

SHAPES = {
    "tiny": {(3, 7): 2, (2500,): 1},
    # a quarter: with all, arguments and float64 truth together would fill the largest GPU
    "sd15 a quarter of the parameters": {shape: -(-count // 4) for shape, count in SD15.items()},
}
OPTIONS = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": 7}


def eager(params, grads, m, v, copies, m32, v32, steps):
    torch._fused_adamw_(
        params, grads, m32, v32, [], steps, lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    torch._foreach_copy_(copies, params)


def ours(params, grads, m, v, copies, m32, v32, steps):
    scale = torch.ones((), device=params[0].device)
    _adamw(params, grads, m, v, copies, scale, 1e-5, 0.9, 0.999, 1e-8, 0.01, 7, 0)


def exact(params, grads, m, v, copies, m32, v32, steps):
    new, _, _ = adamw_reference(params, grads, m, v, seed=0, **OPTIONS)
    return [*new, *new]


def public(params, grads, m, v, copies, m32, v32, steps):
    adamw_(params, grads, m, v, copies, seed=0, **OPTIONS)


def make(shapes, device):
    draw = Draw(device)
    sizes = [shape for shape, count in shapes.items() for _ in range(count)]
    params, grads = [draw.normal(*s, std=0.02) for s in sizes], [draw.normal(*s, std=1e-3) for s in sizes]
    m = [draw.normal(*s, std=1e-3, dtype=torch.bfloat16) for s in sizes]
    v = [draw.uniform(1e-7, 2e-6, *s, dtype=torch.bfloat16) for s in sizes]
    copies = [x.to(torch.bfloat16) for x in params]
    steps = [torch.full((), 7.0, device=draw.device) for _ in sizes]
    return params, grads, m, v, copies, [x.float() for x in m], [x.float() for x in v], steps


def case(name, shapes):
    n = sum(torch.Size(shape).numel() * count for shape, count in shapes.items())
    return Case(
        kernel="adamw", op="step", shape=name, dtype=torch.bfloat16, real=name != "tiny",
        make=lambda device: make(shapes, device),
        eager=eager, ours=ours, exact=exact, public=public, writes=(0, 4),
        uncompiled="torch.compile cannot trace torch._fused_adamw_, which is a fused kernel already",
        bytes=(12 + 8 + 2) * n,  # p, g, m, v read; p, m, v and the copy written. Eager: 34
        flops=16 * n,
    )  # fmt: skip


CASES = [case(name, shapes) for name, shapes in SHAPES.items()]


def test_adamw(measure, case, provider):
    measure(case, provider)
