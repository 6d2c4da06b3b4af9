"""Which model is opened and what it answers: SFT starts, other VAEs, v-prediction, random architectures."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from tiny_world import save_pairs, save_tiny_model, tiny_pipeline, tiny_xl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel

from bench.step.contenders import move_policy
from inpo_fast.config import parse
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models import unet as unet_family
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.random_weights import random_pipeline
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.set_up import prepare
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

CPU = torch.device("cpu")
STEP_CONFIG = StepConfig(
    method="inpo",
    objective=ObjectiveConfig(beta=50.0),
    inversion=InversionConfig(steps=10),
    micro_batch=4,
    vae_sample=True,
    seed=0,
)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    source = open_source(save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.parquet"))
    return next(PairLoader(source, DataConfig(flip=False), resolution=32, seed=0, rank=0, world=1).steps(0, 1, 4))


def test_init_starts_policy_and_reference_from_another_unet(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    sft = tiny_pipeline(seed=7)
    sft.save_pretrained(tmp_path / "sft")
    want = sft.unet.state_dict()
    for where in (tmp_path / "sft", tmp_path / "sft" / "unet"):
        config = ModelsConfig(base=base, init=str(where))
        models = Models(open_pipeline(config), CPU, config)
        for unet in (models.policy, models.reference):
            assert all(torch.equal(value, want[name]) for name, value in unet.state_dict().items())
    own = tiny_pipeline().text_encoder.state_dict()
    assert all(torch.equal(v, own[n]) for n, v in models.pipeline.text_encoder.state_dict().items())
    tiny_xl().save_pretrained(tmp_path / "xl")
    with pytest.raises(UserError, match=r"models\.init: the UNet of .* does not fit the base model"):
        open_pipeline(ModelsConfig(base=base, init=str(tmp_path / "xl")))
    with pytest.raises(UserError, match=r"models\.init: no such folder"):
        open_pipeline(ModelsConfig(base=base, init=str(tmp_path / "no" / "where")))


def test_another_vae(tmp_path, items):
    base = save_tiny_model(tmp_path / "base")
    other = tiny_pipeline(seed=9).vae
    other.save_pretrained(tmp_path / "vae")
    config = ModelsConfig(base=base, vae=str(tmp_path / "vae"))
    models = Models(open_pipeline(config), CPU, config)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(models.encode_images(x, None), other.encode(x).latent_dist.mean * other.config.scaling_factor)
    assert models.vae_dtype == torch.float32
    # SDXL's own VAE overflows in fp16; one that was named is trusted
    for vae, want in ((None, torch.float32), (str(tmp_path / "vae"), torch.float16)):
        narrow = ModelsConfig(base=base, vae=vae, precision="fp16")
        assert Models(open_pipeline(narrow), CPU, narrow).vae_dtype == want


def test_published_micro_conditioning(tmp_path, items):
    tiny_xl().save_pretrained(tmp_path / "xl")
    item = replace(items[0], winner=replace(items[0].winner, original=(48, 40), crop=(8, 4)))
    for kind, want in (("image", [48, 40, 8, 4, 32, 32]), ("published", [32, 32, 0, 0, 32, 32])):
        config = ModelsConfig(base=str(tmp_path / "xl"), micro_conditioning=kind)
        models = Models(open_pipeline(config), CPU, config)
        step_batch = make_step_batch([item], models, STEP_CONFIG, models.encode_empty())
        assert step_batch.conditional.sizes[0].tolist() == want


@pytest.fixture(scope="module")
def v_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.save_pretrained(folder)
    config = ModelsConfig(base=str(folder))
    return Models(open_pipeline(config), CPU, config)


def test_v_prediction_inverts_as_diffusers_does(v_models, items):
    """grid diffusers-0.22 told the target is DDIMInverseScheduler's walk with prediction_type v_prediction."""
    how = InversionConfig(steps=10, grid="diffusers-0.22", evaluate_at="target", guidance=1.0)
    step_config = replace(STEP_CONFIG, inversion=how)
    step_batch = make_step_batch(items, v_models, step_config, v_models.encode_empty())
    (x_t,), _ = noisy_latents(step_batch, v_models, step_config)
    scheduler = DDIMInverseScheduler.from_config(v_models.pipeline.scheduler.config)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(10)
    for i in range(len(items)):
        for side in range(2):
            x = step_batch.x_0[i, side][None]
            text = step_batch.conditional.text.hidden[step_batch.conditional.row[2 * i + side]][None]
            for timestep in (w for w in scheduler.timesteps.tolist() if w < int(step_batch.t[0, i])):
                with torch.no_grad():
                    v = v_models.policy(x, torch.tensor([timestep]), text).sample
                x = scheduler.step(v, timestep, x).prev_sample
            torch.testing.assert_close(x_t[i, side], x[0], rtol=1e-4, atol=1e-4)


def test_refined_steps_of_v_are_refused_before_anything_is_written(v_models, tmp_path):
    """They solve for noise."""
    words = [f"--models.base={v_models.config.base}", f"--data.source={save_pairs(tmp_path / 'pairs.parquet')}"]
    config = parse("test", [*words, f"--output={tmp_path / 'run'}", "--inversion.estimator=renoise"])
    with pytest.raises(UserError, match="renoise is for models that predict noise"):
        prepare(config, 0, 1, CPU)
    assert not (tmp_path / "run").exists()


def test_v_predictions_loss_is_that_of_its_noise(v_models, items):
    """Errors of eps = a v + s x_t against tau, by hand; the gradient by autograd through that line."""
    step_batch = make_step_batch(items, v_models, STEP_CONFIG, v_models.encode_empty())
    with torch.no_grad():
        for p in v_models.parameters():
            p.mul_(1.05)
    try:
        metrics, logits = train_step(step_batch, v_models, STEP_CONFIG, len(items), clip=float("inf"))
        (x_t,), _ = noisy_latents(step_batch, v_models, STEP_CONFIG)
        got = torch.cat([p.grad.flatten() for p in v_models.parameters()])
        for p in v_models.parameters():
            p.grad = None
        want = []
        for i in range(len(items)):
            t = step_batch.t[0, i]
            a, s = (c.item() for c in v_models.noise_path.a_s(t))
            gap = 0.0
            for side, sign in ((0, 1), (1, -1)):
                x = x_t[i, side][None]
                text = step_batch.conditional.text.hidden[step_batch.conditional.row[2 * i + side]][None]
                tau = (x - a * step_batch.x_0[i, side]) / s
                with torch.no_grad():
                    r = (a * v_models.reference(x, t[None], text).sample + s * x - tau).square().mean()
                e = (a * v_models.policy(x, t[None], text).sample + s * x - tau).square().mean()
                gap = gap + sign * (e - r)
            want.append(-0.5 * STEP_CONFIG.objective.beta * gap)
        want = torch.stack(want)
        (-torch.nn.functional.logsigmoid(want)).mean().backward()
        torch.testing.assert_close(logits, want.detach(), rtol=1e-3, atol=1e-3)
        by_hand = torch.cat([p.grad.flatten() for p in v_models.parameters()])
        assert (got - by_hand).norm() / by_hand.norm() < 1e-3
        assert metrics.values()["winner_delta"] != 0
    finally:
        v_models.policy.load_state_dict(v_models.reference.state_dict())


class LargestOnTheCpu(TorchDispatchMode):
    """Elements of the largest tensor that any operation leaves on the CPU."""

    def __init__(self):
        super().__init__()
        self.elements, self.of = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.numel() > self.elements:
                self.elements, self.of = x.numel(), f"{function} {tuple(x.shape)}"
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_device_has_its_weights_drawn_there(monkeypatch, precision):
    """Pipeline, policy, reference, masters, the benchmark's moved policy: nothing large is made on the CPU. Two
    of the published levels."""
    small = {name: unet_family.UNETS["sd15"][name][::3] for name in ("block_out_channels", "down_block_types")}
    small["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    monkeypatch.setitem(unet_family.UNETS, "sd15", unet_family.UNETS["sd15"] | small)
    config, meta = ModelsConfig(random="sd15", precision=precision), torch.device("meta")
    with LargestOnTheCpu() as seen:
        models = Models(open_pipeline(config, meta), meta, config)
        move_policy(models)
        gradients = models.weights.gradients
    assert seen.elements < 10_000, seen.of
    parts = (models.policy, models.reference, models.vae, models.pipeline.text_encoder)
    assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}
    assert {x.device.type for x in (*models.parameters(), *gradients)} == {"meta"}


def test_weights_from_files_are_copied_where_they_will_be(tmp_path):
    """One upload; the copies for policy and reference, and their rounding, are the device's."""
    config = ModelsConfig(base=save_tiny_model(tmp_path), precision="bf16")
    pipeline = open_pipeline(config)
    with LargestOnTheCpu() as seen:
        Models(pipeline, torch.device("meta"), config)
    assert seen.elements < 2000, seen.of


@pytest.mark.parametrize(("device", "dtype"), [(None, torch.float32), (CPU, torch.bfloat16)])
def test_random_weights_on_the_cpu_are_the_same_as_ever(monkeypatch, device, dtype):
    """UNet, VAE, text encoder, one after the other from one seed of the CPU's own generator."""
    small = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 2}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(unet_family.UNETS, "sd15", unet_family.UNETS["sd15"] | small)
    monkeypatch.setattr(unet_family, "VAE", unet_family.VAE | {"block_out_channels": (32, 32, 32, 32)})
    monkeypatch.setattr(unet_family, "CLIP_L", shape)
    got = random_pipeline("sd15", dtype, seed=3, device=device)
    before = torch.random.get_rng_state()
    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    try:
        text = unet_family.text_config(unet_family.make_tokenizer(), shape)
        want = UNet.make_network("sd15"), UNet.make_vae("sd15"), CLIPTextModel(text)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.random.set_rng_state(before)
    for one, other in zip((got.unet, got.vae, got.text_encoder), want, strict=True):
        ours, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert {p.dtype for p in one.parameters()} == {dtype}


def test_random_architecture_is_seeded_and_contradicts_a_base():
    with pytest.raises(UserError, match="give one of them"):
        open_pipeline(ModelsConfig(base="somewhere", random="sd15"))
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        pipeline = random_pipeline("sdxl", torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())  # its own generator
    assert pipeline.unet.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    sizes = {n: sum(p.numel() for p in getattr(pipeline, n).parameters()) for n in ("unet", "vae", "text_encoder_2")}
    assert sizes == {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840}
    ids = pipeline.tokenizer("a red cat", padding="max_length").input_ids
    assert len(ids) == 77 and max(ids) < 49408
