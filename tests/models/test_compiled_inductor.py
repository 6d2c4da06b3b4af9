"""models.fast=compiled by Inductor itself, with its C++ compiler: bits, layouts, gradients. `-m slow -s` prints how far
the gradients are off."""

import copy

import pytest
import torch
import torch._inductor.config
from diffusers.models.resnet import ResnetBlock2D
from test_compiled_blocks import KINDS
from test_fast_inversion import STEP_CONFIG, distance, move
from test_fast_unet import inputs, make
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.fast import compiled_blocks, fast_unet
from inpo_fast.models.fast.fast_unet import make_fast
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.unet import UNet
from inpo_fast.pocket import ASSETS
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import make_step_batch


class Layouts(TorchDispatchMode):
    """The images that convolutions' backward passes get: (shape, is it channels_last)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen += [(tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)) for x in args[:2]]
        return function(*args, **(kwargs or {}))


def gradient_of(function, block, arguments: list, weight: torch.Tensor) -> torch.Tensor:
    block.zero_grad()
    given = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in arguments]
    function(*given).backward(weight)
    return torch.cat([x.grad.double().flatten() for x in (*given, *block.parameters())])


# what the compiler knows is else tried by compiling; without vector instructions its code is half as long to compile
@torch._inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 1})
def test_a_block_by_inductor():
    """bf16: the same bits with and without gradient, and a gradient as near to float64's as eager's."""
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=16, groups=8).bfloat16()
    unet = torch.nn.ModuleList([block])
    images = torch.randn(3, 32, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    arguments, weight = [images, torch.randn(3, 16).bfloat16()], torch.randn(3, 64, 8, 8).bfloat16()
    exact = copy.deepcopy(block).double()
    want = gradient_of(exact, exact, [x.double() for x in arguments], weight.double())
    eager = gradient_of(block, block, arguments, weight)
    unet.to(memory_format=torch.channels_last)
    block.fast_mode = fast_unet.Mode()
    forward = compiled_blocks.blockwise(fast_unet._resnet)
    with compiled_blocks.limits():
        got = gradient_of(lambda *args: forward(block, *args), block, arguments, weight)
        given = [x.detach().requires_grad_() for x in arguments]
        with_gradient = forward(block, *given)
        with Layouts() as layouts:
            with_gradient.backward(weight)
        block.fast_mode.cuts = True
        cut = forward(block, *given)
    assert len(layouts.seen) == 2 * 3 and all(nhwc for _, nhwc in layouts.seen), layouts.seen
    assert torch.equal(cut, with_gradient) and cut.grad_fn is None and cut.requires_grad
    assert distance(got, want) < 1.05 * distance(eager, want)


def evaluation(unet, precision: torch.dtype):
    args, more = inputs(unet, 4)
    args = [x.bfloat16().to(precision) if x.is_floating_point() else x for x in args]
    more = {k: {n: x.bfloat16().to(precision) for n, x in v.items()} for k, v in more.items()}
    unet.zero_grad()
    answer = unet(*args, **more).sample
    weight = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    answer.backward(weight.to(precision))
    gradient = torch.cat([p.grad.double().flatten() for p in unet.parameters()])
    with torch.no_grad():
        return answer.detach(), unet(*args, **more).sample, gradient


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_unet_by_inductor(kind):
    """bf16: no bit differs without gradient; the gradient is as near to float64's as the eager ones are."""
    torch._dynamo.reset()
    values = make(kind).bfloat16()
    exact, plain, fast = copy.deepcopy(values).double(), copy.deepcopy(values), copy.deepcopy(values)
    make_fast(fast, "compiled")
    _, _, want = evaluation(exact, torch.float64)
    _, _, eager = evaluation(plain, torch.bfloat16)
    with_gradient, without, got = evaluation(fast, torch.bfloat16)
    assert torch.equal(with_gradient, without)
    print(f"{kind}: gradient from float64's, compiled {distance(got, want):.4f}, eager {distance(eager, want):.4f}")
    assert distance(got, want) < 1.05 * distance(eager, want)


@pytest.mark.slow
def test_sd15_by_inductor():
    """Its true widths, small latents, bf16, two minutes without the compiler's caches; the yardstick is fp32."""
    torch._dynamo.reset()
    counters.clear()
    unet = UNet.make_network("sd15").eval()
    exact = copy.deepcopy(unet.bfloat16()).float()
    fused, fast = copy.deepcopy(unet), unet
    make_fast(fused, "fused"), make_fast(fast, "compiled")
    images, time, text = (
        torch.randn(2, 4, 16, 16).bfloat16(),
        torch.tensor([100, 700]),
        torch.randn(2, 77, 768).bfloat16(),
    )
    weight = torch.randn(2, 4, 16, 16).bfloat16()

    def gradient(unet, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        unet(images.to(dtype), time, text.to(dtype)).sample.backward(weight.to(dtype))
        return torch.cat([p.grad.flatten().bfloat16() for p in unet.parameters()])

    with torch.no_grad():
        without = fast(images, time, text).sample
    assert torch.equal(fast(images, time, text).sample, without)
    want = gradient(exact, torch.float32)
    ours, eager = distance(gradient(fast), want), distance(gradient(fused), want)
    print(f"SD1.5: gradient from fp32's, compiled {ours:.4f}, fused {eager:.4f}")
    assert ours < 1.05 * eager
    assert counters["stats"]["unique_graphs"] == 26


@pytest.mark.slow
def test_the_pocket_by_inductor(items):
    """The model that ships, in bf16: logits of exactly 0, then a step as the fused one's."""
    torch._dynamo.reset()
    gradients, spread = [], []
    for how, precision in (("off", "fp32"), ("fused", "bf16"), ("compiled", "bf16")):
        config = ModelsConfig(base=str(ASSETS / "model"), fast=how, precision=precision)
        models = Models(open_pipeline(config), torch.device("cpu"), config)
        step_batch = make_step_batch(items, models, STEP_CONFIG, models.encode_empty())
        assert not train_step(step_batch, models, STEP_CONFIG, len(items), 1e9)[1].any()
        gradients.append(torch.cat([g.double().flatten() for g in models.weights.gradients]))
        move(models, 1)
        spread.append(noisy_latents(step_batch, models, STEP_CONFIG)[0])
    assert distance(gradients[2], gradients[0]) < 1.05 * distance(gradients[1], gradients[0])
    assert distance(spread[2], spread[0]) < 1.2 * distance(spread[1], spread[0])
