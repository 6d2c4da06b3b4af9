"""Counted bytes against counts by hand of a ResNet block and a transformer block, and against figures known from
elsewhere for whole UNets."""

from functools import cache

import pytest
import torch
from plans import network_traffic
from torch.utils.flop_counter import FlopCounterMode

from inpo_fast.cost import memory_traffic
from inpo_fast.cost.memory_traffic import SECOND, Traffic, least_bytes, roofline_bytes
from inpo_fast.models.fast.fast_unet import inverting, make_fast
from inpo_fast.models.meta_device import counting
from inpo_fast.models.unet import UNet

META = torch.device("meta")
BF16 = 2  # bytes


def unet(name: str, how: str):
    with META:
        out = UNet.make_network(name)
    torch.nn.Module.to(out, torch.bfloat16)
    make_fast(out, how)
    return out


@cache
def counted(name: str, how: str):
    made = unet(name, how)
    return network_traffic(made, made.config.sample_size, 77)


def image(channels: int, side: int) -> torch.Tensor:
    x = torch.empty(1, channels, side, side, dtype=torch.bfloat16, device=META)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def both_ways(module, *args, **more) -> tuple[dict, dict]:
    with counting():
        with Traffic() as forward:
            y = module(*args, **more)
        with Traffic() as backward:
            y.backward(torch.empty_like(y))
    return dict(forward.bytes), dict(backward.bytes)


def test_resnet_block_by_hand():
    """SD1.5's first block from 320 to 640 channels, 32 x 32: every byte."""
    block = unet("sd15", "fused").down_blocks[1].resnets[0]
    temb = torch.empty(1, 1280, dtype=torch.bfloat16, device=META, requires_grad=True)
    forward, backward = both_ways(block, image(320, 32), temb)
    X, Y, E = 320 * 32 * 32 * BF16, 640 * 32 * 32 * BF16, 640 * BF16
    statistics = 2 * 32 * 4  # mean and rstd of 32 groups, fp32
    assert forward == {
        "norm": (2 * X + statistics) + (2 * Y + statistics + E),
        SECOND: X + Y,
        "silu": 2 * 1280 * BF16,  # of the time embedding
        "bias": 3 * 2 * Y,  # conv1, conv2, the shortcut
        "add": 3 * Y,  # the shortcut's
    }
    weights = 2 * E + 2 * E // 2  # gradients of the scales and shifts, of 640 and of 320 channels
    assert backward == {
        "norm": (3 * X + statistics) + (3 * Y + statistics + 2 * E) + weights,
        SECOND: 2 * X + 2 * Y,
        "silu": 3 * 1280 * BF16,
        "bias gradient": 3 * Y + 2 * E,  # three convolutions, the projection of the time embedding
        "add": 3 * X,  # the two branches' gradients of the input
        "copy": 2 * statistics,  # torch makes zeros for the gradient of mean and rstd
    }


def test_transformer_block_by_hand():
    """SD1.5's at 640 channels, 32 x 32 tokens, 77 of text: every byte."""
    block = unet("sd15", "fused").down_blocks[1].attentions[0].transformer_blocks[0]
    L, D = 32 * 32, 640
    tokens = torch.empty(1, L, D, dtype=torch.bfloat16, device=META, requires_grad=True)
    text = torch.empty(1, 77, 768, dtype=torch.bfloat16, device=META)
    forward, backward = both_ways(block, tokens, encoder_hidden_states=text)
    T, statistics = L * D * BF16, 2 * L * 4
    assert forward == {
        "norm": (2 * T + statistics) + 2 * (4 * T + statistics),  # the second and third add the residual: u is written
        "gate": 8 * T + 4 * T,
        "add": 3 * T,  # after the feed-forward
    }
    weights = 3 * 2 * D * BF16
    assert backward == {
        "norm": (3 * T + statistics) + 2 * (4 * T + statistics) + weights,
        "gate": 4 * T + 8 * T + 8 * T,
        "add": 2 * 3 * T + 3 * T,  # q, k and v of the self-attention; the first norm's input and the stream
        "bias gradient": (T + 8 * T + T + T) + (1 + 8 + 1 + 1) * D * BF16,
    }


def test_plain_blocks_by_hand():
    """The same two as diffusers runs them, NCHW."""
    X, Y, E = 320 * 32 * 32 * BF16, 640 * 32 * 32 * BF16, 640 * BF16
    plain = unet("sd15", "off").down_blocks[1]
    x = torch.empty(1, 320, 32, 32, dtype=torch.bfloat16, device=META, requires_grad=True)
    temb = torch.empty(1, 1280, dtype=torch.bfloat16, device=META)
    forward, _ = both_ways(plain.resnets[0], x, temb)
    statistics = 2 * 32 * 4
    assert forward == {
        "norm": 2 * X + 2 * Y + 2 * statistics // 2,  # its mean and rstd are bf16
        SECOND: X + Y,
        "silu": 2 * X + 2 * Y + 2 * 1280 * BF16,
        "bias": 3 * 2 * Y,
        "add": (2 * Y + E) + 3 * Y,
        "scale": 2 * Y,  # output_scale_factor, 1
    }
    T = 32 * 32 * 640 * BF16
    tokens = torch.empty(1, 32 * 32, 640, dtype=torch.bfloat16, device=META, requires_grad=True)
    text = torch.empty(1, 77, 768, dtype=torch.bfloat16, device=META)
    forward, backward = both_ways(plain.attentions[0].transformer_blocks[0], tokens, encoder_hidden_states=text)
    statistics = forward["norm"] - 3 * 2 * T
    assert 0 < statistics <= 3 * 2 * 32 * 32 * 4
    assert forward == {
        "norm": 6 * T + statistics,
        "scale": 2 * 2 * T,
        "gate": 2 * 4 * T + 3 * 4 * T,
        "add": 3 * 3 * T,
    }
    assert backward["gate"] == 3 * 4 * T + 2 * 3 * 4 * T and backward["copy"] == 2 * 8 * T  # the halves put together


# MB of one image, bf16, by kind: the table of the documentation
TABLE = {
    ("sd15", "off", "forward"): (319.5, 90.1, 134.1, 462.0, 397.7, 119.8, 140.6, 245.8, 0),
    ("sd15", "off", "backward"): (479.3, 318.8, 201.2, 831.7, 576.7, 380.3, 140.6, 0, 401.5),
    ("sd15", "fused", "inversion"): (411.9, 90.1, 0.1, 0, 210.9, 73.6, 0, 153.4, 0),
    ("sd15", "fused", "forward"): (411.9, 90.1, 0.1, 277.2, 210.9, 73.6, 0, 153.4, 0),
    ("sd15", "fused", "backward"): (525.6, 180.2, 0.2, 462.0, 438.1, 14.9, 0, 0, 377.4),
    ("sdxl", "off", "forward"): (1879.4, 309.3, 534.9, 4194.3, 2582.2, 367.1, 1032.9, 605.8, 0),
    ("sdxl", "off", "backward"): (2819.1, 1877.0, 802.3, 7549.7, 3904.8, 3394.8, 1032.8, 0, 2792.6),
    ("sdxl", "fused", "inversion"): (2718.3, 309.3, 0.1, 0, 1046.0, 283.2, 0, 605.8, 0),
    ("sdxl", "fused", "forward"): (2718.3, 309.3, 0.1, 2516.6, 1046.0, 283.2, 0, 605.8, 0),
    ("sdxl", "fused", "backward"): (3238.6, 618.7, 0.1, 4194.3, 2646.5, 55.1, 0, 0, 2695.6),
}
ORDER = ("norm", SECOND, "silu", "gate", "add", "copy", "scale", "bias", "bias gradient")


@pytest.mark.parametrize(("name", "how", "part"), TABLE)
def test_whole_unets(name, how, part):
    kinds = getattr(counted(name, how), part)
    assert set(kinds) <= set(ORDER)
    assert [kinds.get(kind, 0) / 1e6 for kind in ORDER] == pytest.approx(TABLE[name, how, part], abs=0.06)


@pytest.mark.parametrize(
    ("name", "flop", "eager", "fused"), [("sd15", 0.8033e12, 0.437, 0.243), ("sdxl", 6.761e12, 0.313, 0.187)]
)
def test_share_of_the_matrix_work(name, flop, eager, fused):
    """Elementwise time over matrix time of a forward pass, 4.3 TB/s and 790 TFLOP/s. Known: 44 and 31 % eager."""

    def share(size: float) -> float:
        return size / 4.3e12 / (flop / 790e12)

    assert share(sum(counted(name, "off").forward.values())) == pytest.approx(eager, abs=5e-4)
    assert share(roofline_bytes(counted(name, "fused").forward)) == pytest.approx(fused, abs=5e-4)
    assert round(eager, 2) == {"sd15": 0.44, "sdxl": 0.31}[name]


def test_kernels_of_sd15(monkeypatch):
    """Known figures, MB an image forward: GroupNorm with SiLU 405 to 271, GEGLU 462 to 277, its product with the gate
    370 less; cuDNN's copies of an NCHW network's convolutions 564."""
    monkeypatch.setattr(memory_traffic, "KINDS", {name: name for name in memory_traffic.KINDS})
    made = unet("sd15", "off")
    copies = 0

    def look(module, args, output):
        nonlocal copies
        copies += 2 * (args[0].nbytes + output.nbytes) / 1e6

    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    with torch.no_grad(), counting(), Traffic() as plain:
        UNet(made.config).meta_pass(made, 64, 77)
    fast = memory_traffic.network_traffic(unet("sd15", "fused"), 64, 77)  # by the kinds above
    plain, inversion, forward = (
        {kind: size / 1e6 for kind, size in of.items()} for of in (plain.bytes, fast.inversion, fast.forward)
    )
    assert plain["native_group_norm"] + plain[SECOND] + plain["silu"] == pytest.approx(405, rel=0.005)
    assert forward["group_norm_silu"] + forward[SECOND] == pytest.approx(271, rel=0.005)
    assert plain["gelu"] + plain["mul"] == pytest.approx(462, rel=0.005)
    assert forward["geglu"] == pytest.approx(277, rel=0.005) and "geglu" not in inversion
    # neither the product (2 D wide) is written nor the gate reads it, and the gate's result is the product's
    assert forward["geglu"] + forward["geglu"] / 3 == pytest.approx(370, rel=0.005)
    assert copies == pytest.approx(564, rel=0.005)


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_fused_path_does_the_same_matrix_work(name):
    """Also where projection and gate are one kernel; none of it is counted as traffic."""
    flop = []
    for how in ("off", "fused"):
        made = unet(name, how)
        with torch.no_grad(), counting(), inverting(made), FlopCounterMode(display=False) as counter, Traffic():
            UNet(made.config).meta_pass(made, made.config.sample_size, 77)
        flop.append(counter.get_total_flops())
    assert flop[0] == flop[1]


def test_what_is_counted():
    """One read of each tensor, one write of each result; nothing for a view, an allocation or a weight."""
    x = torch.empty(3, 8, device=META)
    weight = torch.nn.Parameter(torch.empty(8, device=META))

    def of(run) -> dict:
        with torch.no_grad(), Traffic() as counter:
            run()
        return dict(counter.bytes)

    assert of(lambda: (x.view(4, 6), x[1:], x.t(), x.split(1), torch.empty_like(x), x.new_empty(5), x.detach())) == {}
    assert of(lambda: x @ x.t()) == {}
    assert of(lambda: x + x) == {"add": 2 * 96} and of(lambda: x + x.clone()) == {"copy": 2 * 96, "add": 3 * 96}
    assert of(lambda: x + weight) == {"add": 2 * 96}
    assert of(lambda: x + x[0].expand(3, 8)) == {"add": 3 * 96}  # the view's storage is x's
    assert of(lambda: x + torch.empty(8, device=META).expand(3, 8)) == {"add": 2 * 96 + 32}
    assert of(lambda: x.add_(x.clone())) == {"copy": 2 * 96, "add": 3 * 96}
    assert of(lambda: (x / 1.0, x * 2)) == {"scale": 4 * 96} and of(lambda: x * x.clone())["gate"] == 3 * 96
    assert of(lambda: torch.cat([x, x])) == {"copy": 96 + 192}
    half = torch.empty(3, 8, dtype=torch.bfloat16, device=META)
    assert of(lambda: half.float()) == {"copy": 48 + 96}


def test_a_leftover_gradient_is_not_added_to():
    made = unet("sd15", "fused")
    assert memory_traffic.network_traffic(made, 8, 77) == memory_traffic.network_traffic(made, 8, 77)


def test_conventions():
    kinds = {"norm": 1, SECOND: 2, "bias": 4, "bias gradient": 8, "scale": 16, "silu": 32, "gate": 64, "add": 128}
    assert roofline_bytes(kinds) == 1 + 2 + 64 + 128
    assert least_bytes(kinds) == 255 - 2
