"""The whole objective of a micro-batch and the gradient of its predictions, against autograd over the formula."""

import torch
from inpo_kernels.inpo_loss import _inpo_loss, inpo_loss, inpo_loss_reference

from bench.kernels.case import STORED, Case, Draw, Gradient

SHAPES = {  # two images a pair, winners first
    "tiny": (6, 3, 19, 23),  # a masked tail
    "sd15 64x64 16 pairs": (32, 4, 64, 64),
    "sdxl 128x128 8 pairs": (16, 4, 128, 128),
}
BETA = 2000.0


def eager(pred, ref, x_t, x_0, a, s):
    over, shape = (1, 2, 3), (-1, 1, 1, 1)
    y, v = pred.float(), ref.float()
    tau = (x_t - a.view(shape) * x_0) / s.view(shape)
    e, r = (y - tau).square().mean(over), (v - tau).square().mean(over)
    (e_w, e_l), (r_w, r_l) = e.chunk(2), r.chunk(2)
    logit = -0.5 * BETA * ((e_w - e_l) - (r_w - r_l))
    products = tau.square().mean(over), v.square().mean(over), (y * v).mean(over), (tau * v).mean(over)
    return -torch.nn.functional.logsigmoid(logit), logit, torch.stack([e, r, *products], 1)


def op(f):
    """(loss, logit, metrics, dpred) of the op, its reference or its public function."""

    def ours(pred, ref, x_t, x_0, a, s, weight):
        loss, logit, _, image, dpred = f(pred, ref, x_t, x_0, a, s, weight)
        return loss, logit, image[:, :6].clone(), dpred  # cross is not computed without the gate

    return ours


def make(shape, dtype, device):
    draw = Draw(device)
    abar = draw.uniform(0.0047, 0.99, shape[0])
    pred, ref = (draw.normal(*shape, dtype=dtype) for _ in range(2))
    x_t, x_0 = draw.normal(*shape), draw.normal(*shape)
    # a policy near its reference: logits of a few units, as in training
    ref = (pred.float() + 0.02 * ref.float()).to(dtype)
    return pred, ref, x_t, x_0, abar.sqrt(), (1 - abar).sqrt(), draw.uniform(0.5, 1.5, shape[0] // 2)


def case(name, shape, dtype):
    n = torch.Size(shape).numel()
    return Case(
        kernel="inpo_loss", op="loss and gradient", shape=name, dtype=dtype, real=name != "tiny",
        make=lambda device: make(shape, dtype, device),
        eager=Gradient(eager),
        ours=op(lambda *x: _inpo_loss(*x, torch.ones_like(x[-1]), BETA)),
        exact=op(lambda *x: inpo_loss_reference(*x, torch.ones_like(x[-1]), BETA)),
        public=op(lambda *x: inpo_loss(*x[:-1], weight=x[-1], beta=BETA)),
        # pred is read twice, ref once, x_t and x_0 (fp32) twice, dpred written
        bytes=4 * n * dtype.itemsize + 4 * 4 * n,
        flops=24 * n,  # tau 3 twice, each of two errors 3, four products 2, dpred 3, and the means
        # errors are summed to 2e-7 and differ by 1e-3: the logit, beta / 2 times that difference, has 2e-4 left
        tolerance=max(5e-4, 2 * STORED[dtype]), because="fp32 sums, differenced and multiplied by beta / 2 = 1000",
    )  # fmt: skip


CASES = [case(name, shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]


def test_inpo_loss(measure, case, provider):
    measure(case, provider)
