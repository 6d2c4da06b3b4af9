"""What only the inversion may do: a compiled graph, one text for all images, fp8. Against the plain inversion."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny_world import one_level, tiny_pipeline, tiny_unet, tiny_xl

from inpo_fast.caches.trajectory_cache import open_trajectory_cache
from inpo_fast.config import RunConfig
from inpo_fast.config.rules import check
from inpo_fast.data.loader import DataConfig
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.methods import variant_name
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.fast import attention, fast_unet
from inpo_fast.models.fast.attention import Processor, attend
from inpo_fast.models.fast.fast_unet import inverting, make_fast
from inpo_fast.models.fast.fp8 import Fp8Weights, eligible, quantise
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step_batch import StepConfig, make_step_batch

STEP_CONFIG = StepConfig(
    method="inpo",
    objective=ObjectiveConfig(beta=50.0),
    inversion=InversionConfig(steps=5, batch=6),
    micro_batch=2,
    vae_sample=True,
    seed=0,
)
ROUNDED = 2e-5  # relative, in norm: some fifty layers in fp32 that add up in another order


def small():
    """Of one level, as wide as fp8 wants it."""
    return one_level(tiny_pipeline(), width=16)


def world(pipeline, **how) -> Models:
    models = Models(pipeline(), torch.device("cpu"), ModelsConfig(base="x", **how))
    move(models, 1)
    return models


def move(models: Models, seed: int) -> None:
    """The policy's weights, in place, as an optimizer does it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in models.parameters():
            p.add_(0.05 * p.std().nan_to_num() * torch.randn(p.shape, generator=generator))
    models.weights.refresh()


def inverted(models: Models, items: list, **how) -> torch.Tensor:
    step_config = replace(STEP_CONFIG, inversion=replace(STEP_CONFIG.inversion, **how))
    return noisy_latents(make_step_batch(items, models, step_config, models.encode_empty()), models, step_config)[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("pipeline", [pytest.param(tiny_pipeline, marks=pytest.mark.slow), tiny_xl])
def test_compiled(traced, items, pipeline):
    """x_t as on the plain path, no new graph for other timesteps, and new weights are seen by the old ones."""
    plain, fast = world(pipeline), world(pipeline, fast="compiled")
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    graphs = len(traced)
    before = inverted(plain, items)
    for models in (plain, fast):
        move(models, 2)
    after = inverted(plain, items)
    assert distance(after, before) > 100 * ROUNDED
    assert distance(inverted(fast, items), after) < ROUNDED
    others = [replace(item, position=item.position + 100) for item in items]  # other timesteps and flips
    assert distance(inverted(fast, others), inverted(plain, others)) < ROUNDED
    assert len(traced) == graphs > 5


@pytest.mark.parametrize("frozen", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_cache_of_trajectories_keeps_the_graphs(traced, items, tmp_path, frozen, whole):
    """However many images of a window are new: ten in calls of six, then two, then none; x_t as on the plain path. A
    CUDA graph is of one size: its calls are filled up."""
    how = replace(STEP_CONFIG.inversion, model="reference", cache=str(tmp_path), frozen=frozen)
    plain, fast = world(small), world(small, fast="compiled", cuda_graphs=whole)
    cache = open_trajectory_cache(fast, how, STEP_CONFIG.objective, DataConfig())
    cache.store.start()
    step_config, graphs, sizes = replace(STEP_CONFIG, inversion=how, trajectory_cache=cache), 0, []
    fast.network("reference").register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for part in (items, [replace(items[0], position=99), *items[1:]], items):
        step_batch = make_step_batch(part, fast, step_config, fast.encode_empty())
        # a frozen record is written with the reference's answers: not here
        assert len(step_batch.cached.missing) == {items[0].position: 0, 99: 2}[part[0].position] or not len(cache.store)
        got = noisy_latents(step_batch, fast, step_config)[0]
        bare = replace(step_batch, cached=None)
        want = noisy_latents(bare, plain, replace(step_config, trajectory_cache=None))[0]
        graphs = graphs or len(traced)
        assert distance(got, want) < ROUNDED and len(traced) == graphs
    assert set(sizes) == {6} if whole else 2 in sizes or frozen


@pytest.mark.slow
def test_compiled_by_inductor(items):
    plain, fast = world(tiny_pipeline), world(tiny_pipeline, fast="compiled")
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    for models in (plain, fast):
        move(models, 2)
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
def test_the_empty_prompt_has_keys_and_values_once(items, pipeline, monkeypatch):
    """Its hidden states go in once for all images, and x_t is the plain path's; a guided inversion has both kinds."""
    plain, fast = world(pipeline), world(pipeline, fast="fused")
    seen = []
    for name, module in fast.policy.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    assert set(seen) == {1}
    seen.clear()
    how = {"guidance": 3.0}
    assert distance(inverted(fast, items, **how), inverted(plain, items, **how)) < ROUNDED
    assert 1 in seen and max(seen) > 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_diffusers_own(shared, cross):
    torch.manual_seed(0)
    module = Attention(query_dim=24, cross_attention_dim=16 if cross else None, heads=3, dim_head=8)
    x, text = torch.randn(4, 9, 24), torch.randn(4, 5, 16)
    text = text[:1].expand(4, -1, -1) if shared else text
    want = module(x, encoder_hidden_states=text if cross else None)
    module.set_processor(Processor("torch"))
    got = module(x, encoder_hidden_states=(text[:1] if shared else text) if cross else None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_attention_with_a_mask_goes_the_old_way():
    torch.manual_seed(0)
    module, x = Attention(query_dim=8, heads=2, dim_head=4), torch.randn(2, 6, 8)
    mask = torch.where(torch.rand(2, 1, 6) < 0.5, 0.0, -1e4)
    want = module(x, attention_mask=mask)
    module.set_processor(Processor("torch"))
    assert torch.equal(module(x, attention_mask=mask), want) and not torch.equal(module(x), want)


ODD = {
    "residual_connection": True,
    "rescale_output_factor": 2.0,
    "group_norm": torch.nn.GroupNorm(2, 16),
    "spatial_norm": torch.nn.Identity(),
    "norm_cross": torch.nn.LayerNorm(32),
    "norm_q": torch.nn.LayerNorm(8),
    "norm_k": torch.nn.LayerNorm(8),
    "to_out": torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Dropout()]),
}


@pytest.mark.parametrize("name", ODD)
def test_attention_that_is_more_than_a_product_is_left_alone(name):
    unet = tiny_unet()
    odd = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    setattr(odd, name, ODD[name])
    make_fast(unet, "fused")
    kinds = {id(m): type(m.processor) for m in unet.modules() if isinstance(m, Attention)}
    assert kinds.pop(id(odd)) is AttnProcessor2_0 and set(kinds.values()) == {Processor}


def test_the_table_of_back_ends(monkeypatch):
    """auto looks up (capability, size of a head); what only runs on a GPU is refused without one."""
    unet = tiny_unet()
    sizes = {m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}
    monkeypatch.setattr(attention, "FASTEST", {(0, size): "xformers" for size in sizes})
    make_fast(unet, "fused")
    assert {m.processor.backend for m in unet.modules() if isinstance(m, Attention)} == {"xformers"}
    for name in ("flash", "cudnn", "efficient"):
        with pytest.raises(UserError, match=f"models.attention={name} runs on a GPU only"):
            make_fast(tiny_unet(), "fused", name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("size", [40, 64, 80, 160])
def test_back_ends_agree(backend, size):
    """bf16 keeps 8 bits; the sum of softmax times values is within 2 ulp of its largest element."""
    if backend == "cudnn" and size > 128:
        pytest.skip("cuDNN's heads end at 128")
    q, k, v = (torch.randn(2, n, 4, size, device="cuda").bfloat16() for n in (256, 77, 77))
    want = attend(q.double(), k.double(), v.double(), "torch")
    assert (attend(q, k, v, backend).double() - want).abs().max() < 2.0**-6 * want.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash", "cudnn", "efficient"])
@pytest.mark.parametrize("size", [40, 64, 80, 160])
def test_a_gradient_changes_no_bit(backend, size):
    """The policy has one and the reference has not. cuDNN, which torch takes on an H100, keeps more for it."""
    if backend == "cudnn" and size > 128:
        pytest.skip("cuDNN's heads end at 128")
    q, k, v = (torch.randn(2, n, 4, size, device="cuda").bfloat16().requires_grad_() for n in (256, 77, 77))
    with torch.no_grad():
        without = attend(q, k, v, backend)
    assert torch.equal(attend(q, k, v, backend), without) and without.any()


def test_fp8_rounds_to_four_bits():
    """Half a step of 3 stored bits is 1/16 of a number; below 2^-6 of a row's scale, 2^-10 of it."""
    x = torch.randn(64, 128, dtype=torch.float64) * torch.logspace(-4, 4, 64, dtype=torch.float64)[:, None]
    narrow, scale = quantise(x)
    error = (narrow.double() * scale[:, None].double() - x).abs()
    assert narrow.dtype == torch.float8_e4m3fn
    assert (error <= (x.abs() / 16).clamp_min(2.0**-10 * scale[:, None].double()) * (1 + 1e-6)).all()
    assert (error > 0).double().mean() > 0.9
    assert not quantise(torch.zeros(2, 16))[0].float().any()


def test_which_layers_may_be_fp8():
    """Plain linear layers whose sides the tensor cores can take."""

    class Other(torch.nn.Linear):
        pass

    layers = [torch.nn.Linear(32, 48), torch.nn.Linear(24, 32), torch.nn.Linear(32, 24), Other(32, 32)]
    assert [eligible(layer) for layer in [*layers, torch.nn.Conv2d(16, 16, 1)]] == [True, False, False, False, False]


def test_fp8_linear():
    """Independent float64 products of the rounded factors, and the true product within the factors' 1/16."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    weights = Fp8Weights([layer])
    weights.refresh()
    x = torch.randn(2, 5, 64)
    got = weights.linear(layer, x)
    (a, sa), (b, sb) = quantise(x.reshape(-1, 64)), quantise(layer.weight.detach())
    want = (a.double() * sa[:, None]) @ (b.double() * sb[:, None]).T + layer.bias
    torch.testing.assert_close(got.double(), want.reshape(2, 5, 32), rtol=1e-5, atol=1e-5)
    assert 0.01 < distance(got, layer(x)) < 1 / 16
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(weights.linear(layer, x), got)  # what was rounded, until the next refresh
    weights.refresh()
    assert not torch.equal(weights.linear(layer, x), got)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_xl])
@pytest.mark.parametrize("lora", [0, 2])
def test_fp8_inversion(items, pipeline, lora):
    """x_t moves, a little; the next weights are rounded anew; the loss's predictions stay as they were."""
    how = {"lora": LoraSettings(rank=lora)} if lora else {}
    plain, fast = world(pipeline, **how), world(pipeline, fast="fused", **how)
    change = distance(inverted(fast, items, fp8=True), inverted(plain, items))
    assert 1e-4 < change < 0.03
    assert distance(inverted(fast, items), inverted(plain, items)) < ROUNDED
    args = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    more = {"encoder_hidden_states": torch.randn(2, 16, plain.reference.config.cross_attention_dim)}
    if plain.denoiser.is_xl:
        more["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 96), "time_ids": torch.rand(2, 6)}
    before = fast.policy(*args, **more).sample.detach()
    with fast.inverting("policy", fp8=True), torch.no_grad():
        assert distance(fast.policy(*args, **more).sample, before) > 1e-4
    with fast.inverting("policy", fp8=True):  # with a gradient, as nobody does: in full
        assert distance(fast.policy(*args, **more).sample.detach(), before) < ROUNDED
    with torch.no_grad():
        assert distance(fast.policy(*args, **more).sample, before) < ROUNDED
    for models in (plain, fast):
        move(models, 3)
    assert distance(inverted(fast, items, fp8=True), inverted(plain, items)) < 0.03


def test_fp8_is_a_variant_and_needs_a_fast_unet():
    how = InversionConfig(fp8=True)
    assert variant_name("inpo", ObjectiveConfig(), how) == "inpo-fp8"
    with pytest.raises(UserError, match=r"inversion.fp8=true needs models.fast"):
        check(RunConfig(inversion=how))
    with pytest.raises(UserError, match=r"inversion.fp8 needs models.fast=fused"), inverting(tiny_unet(), fp8=True):
        pass
    assert fast_unet.resolve("auto", torch.device("cpu")) == "off"
