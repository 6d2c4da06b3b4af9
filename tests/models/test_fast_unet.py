"""A fast UNet against diffusers' own: forward, gradients, layout in memory, a loss curve, and the way back."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from tiny_world import one_level_unet, save_pairs, tiny_pipeline, tiny_unet, tiny_xl

from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.fast import fast_unet
from inpo_fast.models.fast.fast_unet import inverting, make_fast, undo
from inpo_fast.models.lora import add_adapter
from inpo_fast.models.models import Models
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

UNETS = {"sd": tiny_unet, "xl": lambda: tiny_xl().unet}
ROUNDED = 2e-5  # relative, in norm: some fifty layers in fp32 that add up in another order


def make(kind: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    unet = (UNETS | {"one level": one_level_unet})[kind]().eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.05 * torch.randn(p.shape))  # norms start at exactly 1 and 0: a forgotten weight would not show
    return unet


def inputs(unet, batch: int = 3, size: int = 8) -> tuple[tuple, dict]:
    """On the UNet's device; the same numbers on each. In the shapes of the tiny pipelines, whose graphs are then these
    too."""
    torch.manual_seed(1)
    config, device, more = unet.config, unet.device, {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        texts, ids = torch.randn(batch, pooled), 32 * torch.rand(batch, 6)
        more["added_cond_kwargs"] = {"text_embeds": texts.to(device), "time_ids": ids.to(device)}
    text = torch.randn(batch, 16, config.cross_attention_dim)
    args = torch.randn(batch, 4, size, size), torch.randint(0, 1000, (batch,)), text
    return tuple(x.to(device) for x in args), more


def answer_and_gradient(unet, batch: int = 3):
    args, more = inputs(unet, batch)
    unet.zero_grad()
    answer = unet(*args, **more).sample
    weight = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2))
    (answer * weight.to(answer.device)).sum().backward()
    return answer.detach(), {n: p.grad.clone() for n, p in unet.named_parameters() if p.requires_grad}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def check_same(fast, plain, batch: int = 3, rounded: float = ROUNDED) -> None:
    (got, got_gradient), (want, want_gradient) = (answer_and_gradient(unet, batch) for unet in (fast, plain))
    assert distance(got, want) < rounded
    assert got_gradient.keys() == want_gradient.keys()
    largest = max(g.norm() for g in want_gradient.values())
    for name, wanted in want_gradient.items():
        # a gradient that is zero but for rounding (a bias before a norm) is held to the size of the others
        off = (got_gradient[name] - wanted).norm()
        assert off <= 10 * rounded * wanted.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("kind", UNETS)
def test_fused_is_plain(kind):
    plain = make(kind)
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    check_same(fast, plain)
    check_same(fast, plain, batch=65)  # from 64 on diffusers' upsampler goes another way


def test_fused_is_plain_on_the_kernels(interpreted):
    plain = make("one level")
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    check_same(fast, plain, batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", UNETS)
def test_fused_is_plain_on_a_gpu(monkeypatch, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it would keep 10 bits of fp32
    plain = make(kind).to("cuda")
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    # cuDNN has other algorithms for fp32 in channels_last, some of them (Winograd) with a few bits less
    check_same(fast, plain, rounded=10 * ROUNDED)


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_every_convolution_sees_channels_last(kind, training, batch):
    """Input and output of each, and no copy in between could hide: an NCHW tensor anywhere fails."""
    unet = make(kind).train(training)
    make_fast(unet, "fused")
    wrong, seen = [], 0

    def look(name):
        def hook(module, args, output):
            nonlocal seen
            seen += 1
            for what, x in (("input", args[0]), ("output", output)):
                if min(x.shape[1:]) > 1 and not x.is_contiguous(memory_format=torch.channels_last):
                    wrong.append((name, what, tuple(x.shape), x.stride()))

        return hook

    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name != "conv_in":  # the latent itself comes as it is
            module.register_forward_hook(look(name))
    args, more = inputs(unet, batch)
    unet(*args, **more)
    assert seen > 10 and not wrong, wrong


@pytest.mark.parametrize("kind", UNETS)
def test_with_adapters(kind):
    """LoRA on attention, feed-forward and the 1x1 convolutions around the transformer."""
    settings = LoraSettings(
        rank=2, targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj")
    )
    plain = make(kind).requires_grad_(False)
    add_adapter(plain, settings)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    check_same(fast, plain)
    with torch.no_grad(), inverting(fast):  # the single kernel knows no adapter: it must not be taken
        args, more = inputs(fast)
        assert distance(fast(*args, **more).sample, plain(*args, **more).sample) < ROUNDED


def test_with_gradient_checkpointing():
    plain = make("sd")
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    fast.enable_gradient_checkpointing()
    check_same(fast, plain)


ODD = [
    ("resnet", "output_scale_factor", 2.0),
    ("resnet", "dropout", torch.nn.Dropout(0.1)),
    ("resnet", "skip_time_act", True),
    ("resnet", "time_embedding_norm", "scale_shift"),
    ("resnet", "nonlinearity", torch.nn.Mish()),
    ("block", "pos_embed", torch.nn.Identity()),
    ("block", "only_cross_attention", True),
    ("block", "norm_type", "ada_norm"),
    ("block", "_chunk_size", 4),
]


@pytest.mark.parametrize(("kind", "name", "value"), ODD)
def test_what_is_not_known_is_left_alone(kind, name, value):
    """A module that does more than the fused one computes keeps diffusers' own forward; its neighbours do not."""
    unet = tiny_unet()
    modules = [m for m in unet.modules() if isinstance(m, ResnetBlock2D if kind == "resnet" else BasicTransformerBlock)]
    setattr(modules[1], name, value)
    make_fast(unet, "fused")
    assert ["forward" in m.__dict__ for m in modules] == [number != 1 for number in range(len(modules))]


@pytest.mark.parametrize(("size", "limit"), [(None, 4 * 8 * 64), (None, 4 * 8 * 64 * 3), ((11, 15), 8 * 165 * 2)])
def test_upsampling_in_parts(monkeypatch, size, limit):
    """A batch that cannot be addressed at once: cut by the size of what comes out, which `size` decides; same image."""
    torch.manual_seed(0)
    plain, sizes = Upsample2D(8, use_conv=True), []
    x = torch.randn(5, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    want = plain(x, size)
    monkeypatch.setattr(fast_unet, "INDEXABLE", limit)
    interpolate = fast_unet.F.interpolate

    def counted(part, **how):
        out = interpolate(part, **how)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(fast_unet.F, "interpolate", counted)
    assert torch.equal(fast_unet._upsample(plain, x, size), want)
    assert max(sizes) <= limit and len(sizes) == {1: 5, 2: 3, 3: 2}[limit // (want[0].numel())]


def test_undo_and_copies():
    plain = make("sd").to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    make_fast(fast, "fused")
    second = copy.deepcopy(fast)
    assert second.fast_mode is not fast.fast_mode
    assert all(m.fast_mode is second.fast_mode for m in second.modules() if "fast_mode" in m.__dict__)
    with torch.no_grad():
        for p in fast.parameters():
            p.zero_()
    check_same(second, plain)  # the copy's methods are its own, not bound to the first
    undo(second)
    args, more = inputs(plain)
    assert torch.equal(second(*args, **more).sample, plain(*args, **more).sample)
    assert not any("forward" in module.__dict__ for module in second.modules())


def test_the_single_kernel_serves_the_inversion_only(monkeypatch):
    taken = []
    monkeypatch.setattr(fast_unet, "linear_geglu", lambda *args: taken.append(1) or _linear_geglu_reference(*args))
    unet = make("sd")
    make_fast(unet, "fused")
    args, more = inputs(unet)
    with torch.no_grad():
        want = unet(*args, **more).sample
        assert not taken  # the reference's prediction: rounds as the policy's
        with inverting(unet):
            got = unet(*args, **more).sample
    assert taken and distance(got, want) < ROUNDED
    taken.clear()
    with inverting(unet):
        unet(*args, **more)
    assert not taken  # with a gradient it has none
    with torch.no_grad():
        unet(*args, **more)
        with inverting(unet, fp8=True):
            unet(*args, **more)
    assert not taken  # with fp8 it would multiply by the wide weights


def _linear_geglu_reference(x, weight, bias):
    h, g = torch.nn.functional.linear(x, weight, bias).chunk(2, -1)
    return h * torch.nn.functional.gelu(g)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    source = open_source(save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet"))
    return list(PairLoader(source, DataConfig(), resolution=32, seed=0, rank=0, world=1).steps(0, 10, 4))


def curve(items, pipeline, fast: str, precision: str, steps: int):
    config = ModelsConfig(base="x", fast=fast, precision=precision)
    models = Models(pipeline(), torch.device("cpu"), config)
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=50.0),
        inversion=InversionConfig(steps=3),
        micro_batch=2,
        vae_sample=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW(models.parameters(), lr=2e-4)
    losses = []
    for step in range(steps):
        step_batch = make_step_batch(items[step], models, step_config, models.encode_empty())
        metrics, logits = train_step(step_batch, models, step_config, 4, 1.0)
        if step == 0:
            assert not logits.any(), "policy and reference go through the same operations: exactly 0"
        losses.append(metrics.values()["loss"])
        optimizer.step()
        models.weights.refresh()
    return torch.tensor(losses)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_the_same_loss_curve(items, pipeline):
    plain, fast = (curve(items, pipeline, how, "fp32", 6) for how in ("off", "fused"))
    assert (plain - plain[0]).abs().max() > 0.05
    torch.testing.assert_close(fast, plain, rtol=0, atol=2e-3)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_step_zero_is_exact_in_bf16(items, pipeline):
    curve(items, pipeline, "fused", "bf16", 1)


def test_x_t_of_a_fused_inversion(items):
    config = ModelsConfig(base="x", fast="fused")
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(),
        inversion=InversionConfig(steps=5),
        micro_batch=2,
        vae_sample=True,
        seed=0,
    )
    both = []
    for how in ("off", "fused"):
        models = Models(tiny_pipeline(), torch.device("cpu"), replace(config, fast=how))
        step_batch = make_step_batch(items[0], models, step_config, models.encode_empty())
        both.append(noisy_latents(step_batch, models, step_config)[0])
    assert distance(both[1], both[0]) < ROUNDED
