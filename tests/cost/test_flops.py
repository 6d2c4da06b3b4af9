"""FLOPs by class: their sum is that of torch's own counter, a convolution's class is its weight's."""

import pytest
import torch
from tiny_world import tiny_pipeline
from torch.utils.flop_counter import FlopCounterMode

from inpo_fast.cost.flops import Flops, ask_vae, forward_flop, network_passes
from inpo_fast.models.config import LoraSettings
from inpo_fast.models.lora import add_adapter
from inpo_fast.models.meta_device import counting
from inpo_fast.models.unet import UNet


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_sums_are_torchs_own(lora, checkpointing):
    pipeline = tiny_pipeline()
    network, vae = pipeline.unet, pipeline.vae.to("meta")
    if lora:
        network.requires_grad_(False)
        add_adapter(network, LoraSettings(rank=2, targets=("to_q", "conv1", "proj_in")))
    passes = network_passes(network.to("meta"), 8, 16, checkpointing)
    denoiser = UNet(network.config)
    with counting(), FlopCounterMode(display=False) as forward:
        output = denoiser.meta_pass(network, 8, 16)
    with counting(), FlopCounterMode(display=False) as backward:
        output.backward(torch.empty_like(output))
    assert passes.forward_flop == forward.get_total_flops()
    assert passes.backward_flop == backward.get_total_flops() > passes.forward_flop / 2
    assert list(passes.forward) == ["conv 3x3", "conv 1x1", "linear", "attention"]
    with counting(), torch.no_grad(), FlopCounterMode(display=False) as whole:
        ask_vae(vae, 32)
    assert forward_flop(lambda: ask_vae(vae, 32)) == whole.get_total_flops()


def test_classes_by_hand():
    """2 images, 4 to 8 channels, 5 x 5; the gradient of a layer's image and weights is twice its forward pass."""
    x, one = (torch.empty(2, c, 5, 5, device="meta", requires_grad=True) for c in (4, 8))
    with torch.device("meta"):
        three, small, linear = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(5, 3)
    with Flops() as forward:
        y = three(x)
        z = small(one)
        w = linear(z)
        v = torch.bmm(y.flatten(2), z.flatten(2).mT)
    known = {"conv 3x3": 2 * 2 * 8 * 4 * 9 * 25, "conv 1x1": 2 * 2 * 8 * 8 * 25, "linear": 2 * 80 * 5 * 3}
    known["attention"] = 2 * 2 * 8 * 8 * 25
    assert forward.by_class() == known
    with Flops() as backward:
        (w.sum() + v.sum()).backward()
    assert backward.by_class() == {kind: 2 * flop for kind, flop in known.items()}
