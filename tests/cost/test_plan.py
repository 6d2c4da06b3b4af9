"""--dry-run against counts known from elsewhere, the published recipe's numbers, and the tables in the documents."""

import re
from dataclasses import replace

import pytest
import torch
from plans import counted_once, network_passes, plan_of, plan_without_unet, recipe
from rich.console import Console
from safetensors.torch import save_file
from tiny_world import save_tiny_model

from inpo_fast.config import parse, shipped
from inpo_fast.config.run import OptimConfig
from inpo_fast.cost.flops import ask_vae, forward_flop
from inpo_fast.cost.plan import make_plan, show
from inpo_fast.models import shapes as shapes_room
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.peak_memory import decoding_bytes, encoding_bytes
from inpo_fast.models.shapes import open_shapes
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.memory import GIB
from inpo_fast.training.optim import make_optimizer

RECIPES = ["sd15", "sdxl", "sd15-lora", "sdxl-lora", "sd15-published", "sdxl-published"]


def test_a_count_that_is_remembered_is_the_count(tmp_path):
    """Of the tests' own shortcut: a plan from remembered counts is the one that make_plan makes alone."""
    plain = recipe("sd15", "--models.base=" + save_tiny_model(tmp_path), "--models.random=null")
    frugal = replace(plain, models=replace(plain.models, gradient_checkpointing=True))  # counting leaves its mark
    for other in (plain, frugal):
        counted_once(other, 1)
    assert counted_once(frugal, 1) == make_plan(frugal, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "backward", "kept", "vae"),
    [("sd15", 859_520_964, 0.803, 1.667, 0.94e9, 1.117), ("sdxl", 2_567_463_684, 6.761, 13.862, 6.9e9, 4.879)],
)
def test_counts(name, parameters, forward, backward, kept, vae):
    """Figures counted independently of this code, with another tool; TFLOP per image, bytes of activations."""
    with torch.device("meta"):
        unet, encoder = UNet.make_network(name), UNet.make_vae(name)
    torch.nn.Module.to(unet, torch.bfloat16)
    passes = network_passes(unet, unet.config.sample_size, 77)
    assert passes.parameters == parameters
    assert passes.forward_flop / 1e12 == pytest.approx(forward, rel=1e-3)
    assert passes.backward_flop / 1e12 == pytest.approx(backward, rel=1e-3)
    assert passes.activations == pytest.approx(kept, rel=0.01)
    assert forward_flop(lambda: ask_vae(encoder, 8 * unet.config.sample_size)) / 1e12 == pytest.approx(vae, rel=1e-3)


def test_counted_activations_are_what_autograd_keeps(tmp_path):
    """The tiny model really run on the CPU, its saved tensors added up; the same on the meta device."""
    models = Models(open_pipeline(ModelsConfig(base=save_tiny_model(tmp_path))), torch.device("cpu"))
    unet, weights = models.policy, {p.untyped_storage().data_ptr() for p in models.policy.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 64))
    real = sum(storage.nbytes() for storage in kept.values())
    counted = network_passes(type(unet).from_config(unet.config).to("meta"), 8, 16).activations
    # attention on the CPU keeps its statistics in another shape than on a GPU
    assert counted == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("kind", ["adamw", "adamw-bf16", "adamw-8bit", "adafactor"])
def test_planned_states_are_what_the_optimizer_allocates(kind, tmp_path):
    base = save_tiny_model(tmp_path)
    config = recipe("sd15", "--models.base=" + base, "--models.random=null", f"--optim.kind={kind}")
    planned = make_plan(config, 1).kept[f"optimizer ({kind})"]
    models = Models(open_pipeline(config.models), torch.device("cpu"), config.models)
    optimizer = make_optimizer(models.parameters(), OptimConfig(kind=kind))
    for p in models.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    shared = {"step", "qmap1", "qmap2", "RMS"}  # one number, or one table for all parameters
    held = [v for state in optimizer.state.values() for key, v in state.items() if key not in shared]
    # blocks of 8-bit moments are rounded up by the library in its own way
    assert planned == pytest.approx(sum(v.nbytes for v in held if isinstance(v, torch.Tensor)), rel=0.02)


@pytest.mark.parametrize("gpus", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(("name", "beta", "optimizer"), [("sd15", "2000", "adamw"), ("sdxl", "5000", "adafactor")])
def test_published_recipe(name, beta, optimizer, gpus):
    """1.024e-5 after 200 steps of warm-up, 1024 pairs, the paper's beta: printed alike for 1 and 8 GPUs."""
    config = recipe(f"{name}-published")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    plan = plan_of(f"{name}-published", gpus=gpus)
    show(config, plan, console)
    text = console.export_text()
    for words in (
        "400 x 1024 = 409,600 pairs",
        f"1.024e-05 ({optimizer}), 200 steps of warm-up",
        "5.12e-08 / 1.024e-05",
    ):
        assert words in text
    assert f"beta                    {beta}" in text
    assert plan.pairs_per_gpu == 1024 // gpus and plan.micro_batches * config.train.micro_batch * gpus == 1024
    assert plan.gpu_hours == plan_of(f"{name}-published").gpu_hours  # GPU-hours do not depend on their number


def clip_flop(layers: int, width: int, tokens: int = 77) -> int:
    """By hand: four projections and a feed-forward of four times the width, two products of attention."""
    return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def test_work_of_a_pair():
    """From the counts of one image by hand: 2 E + 2 + 2 forwards, 2 backwards, 2 encodings, one prompt."""
    flop = plan_of("sd15").work.flop
    want = {"VAE encoding": 2 * 1.1167, "inversion": 2 * 5.5 * 0.8033, "reference": 2 * 0.8033}
    want |= {"policy forward": 2 * 0.8033, "policy backward": 2 * 1.6665, "text encoding": clip_flop(12, 768) / 1e12}
    assert {k: v / 1e12 for k, v in flop.items()} == pytest.approx(want, rel=1e-3)
    assert plan_of("sdxl").work.flop["text encoding"] == clip_flop(12, 768) + clip_flop(32, 1280)
    cheaper = plan_of("sd15", "--method=dpo").work.flop
    assert cheaper == flop | {"inversion": 0.0}
    guided = plan_of("sd15", "--inversion.guidance=5").work.flop
    assert guided["inversion"] == pytest.approx(2 * flop["inversion"])
    sft = plan_of("sd15", "--method=sft").work.flop
    assert sft["reference"] == 0 and sft["policy backward"] == pytest.approx(flop["policy backward"] / 2)
    kto = plan_of("sd15", "--method=kto").work.flop  # the reference point: all errors once more
    assert kto == flop | {"inversion": 0.0} | {name: 2 * flop[name] for name in ("reference", "policy forward")}
    refined = plan_of("sd15", "--method=smpo", "--inversion.estimator=renoise", "--inversion.refinements=2").work.flop
    assert refined == flop | {"inversion": pytest.approx(3 * flop["inversion"])}


def test_bytes_of_a_pair():
    """From the bytes of one image (test_memory_traffic.py): as often as the FLOPs, each phase in its own convention."""
    work = plan_of("sd15").work
    assert work.roofline_bytes == pytest.approx(
        {
            "VAE encoding": 2 * 2505.0e6,
            "text encoding": 43.54e6,
            "inversion": 2 * 5.5 * 1063.7e6,
            "reference": 2 * 1063.7e6,
            "policy forward": 2 * 1063.7e6,
            "policy backward": 2 * 1620.9e6,
        },
        rel=1e-3,
    )
    sums = 10 * 859_520_964 / 8  # of 8 pairs: a bf16 gradient read, an fp32 sum read and written
    assert work.fused_bytes == pytest.approx(
        {
            "VAE encoding": 2 * 4795.4e6,
            "text encoding": 54.90e6,
            "inversion": 2 * 5.5 * 849.9e6,
            "reference": 2 * 1127.1e6,
            "policy forward": 2 * 1127.1e6,
            "policy backward": 2 * 1818.3e6 + sums,
        },
        rel=1e-3,
    )
    wide = plan_of("sd15", "--models.precision=fp32").work
    assert wide.roofline_bytes["policy forward"] == pytest.approx(2 * work.roofline_bytes["policy forward"], rel=1e-3)
    assert wide.fused_bytes["policy backward"] == pytest.approx(2 * 2 * 1818.3e6 + 1.2 * sums, rel=1e-3)
    half = plan_of("sd15", "--models.precision=fp16").work  # its VAE runs in fp32
    assert half.roofline_bytes == work.roofline_bytes | {
        "VAE encoding": pytest.approx(2 * work.roofline_bytes["VAE encoding"], rel=1e-3)
    }


def test_lora_and_checkpointing_save_what_they_say():
    full, lora = plan_of("sd15"), plan_of("sd15-lora")
    assert lora.trained == 3_188_736 and lora.kept["reference"] == 0 and full.kept["reference"] == full.kept["policy"]
    frugal = plan_of("sd15", "--models.gradient_checkpointing=true")
    assert frugal.activations < full.activations / 3
    # all but what lies outside of the blocks is computed once more
    again = frugal.work.flop["policy backward"] - full.work.flop["policy backward"]
    assert 0.6 < again / full.work.flop["policy forward"] < 1
    again = frugal.work.roofline_bytes["policy backward"] - full.work.roofline_bytes["policy backward"]
    assert 0.6 < again / full.work.roofline_bytes["policy forward"] < 1


@pytest.mark.parametrize(("name", "edge", "batch"), [("sd15", 512, 8), ("sdxl-lora", 1024, 2)])
def test_what_is_encoded_fits_the_plan(name, edge, batch):
    """The batch that the run will take, counted as a whole, beside all that the plan says is there."""
    plan = plan_of(name)
    with torch.device("meta"):
        vae = UNet.make_vae(name.partition("-")[0])
    torch.nn.Module.to(vae, torch.bfloat16)
    assert plan.vae_batch == batch and plan.encoding == encoding_bytes(vae, edge, batch)
    reserve = plan.peak(1) - sum(plan.kept.values()) - plan.step_batches
    assert reserve >= plan.encoding + 2 * GIB
    assert plan.peak(1) < 24 * GIB < sum(plan.kept.values()) + 32 * encoding_bytes(vae, edge) or name == "sd15"


def test_what_takes_turns_with_the_policy():
    """Each part alone can be the largest; the micro-batches that fit leave room for it."""
    small = plan_of("sd15-lora")
    rest = sum(small.kept.values()) + small.step_batches + 2 * GIB
    assert small.peak(1) == rest + small.encoding and small.activations < small.inversion < small.encoding
    more = plan_of("sd15-lora", "--data.vae_batch=16")
    assert more.vae_batch == 16 and more.encoding == 2 * small.encoding and more.peak(1) == rest + more.encoding
    assert more.largest_micro_batch(rest / GIB + 6) == 4 and more.largest_micro_batch(rest / GIB + 5) == 0
    just, mib = rest + 7 * small.activations, 2**20
    assert [small.largest_micro_batch((just + off) / GIB) for off in (-mib, mib)] == [6, 7]
    pixels = plan_without_unet("sd15-lora", "--data.resolution=1024")
    assert pixels.vae_batch == 2 and pixels.encoding == small.encoding
    wide = plan_without_unet("sd15-lora", "--models.precision=fp32")
    assert wide.vae_batch == 4 and plan_without_unet("sd15-lora", "--models.precision=fp16").encoding == wide.encoding
    # drawn at the end: 64 guided pictures a pass of the UNet; of few, the VAE decides
    drawn = plan_of("sd15-lora", "--evaluate.prompts=x", "--evaluate.batch=64")
    assert small.drawing == 0 and drawn.drawing == 2 * 64 / 32 * small.inversion
    assert drawn.peak(1) == rest + drawn.drawing > small.peak(1)
    one = plan_of("sd15-lora", "--observe.images_every=1", "--observe.prompts=x", "--evaluate.batch=1")
    assert one.drawing == decoding_bytes(torch.nn.Module.to(meta_vae("sd15"), torch.bfloat16), 64)
    online = plan_of("sd15-lora", "--online.every=5", "--online.judge=pocket-rules", "--online.guidance=1")
    assert online.drawing == 16 / 32 * small.inversion


def test_compiled_blocks_keep_what_they_had_for_a_gradient():
    """An inversion on the graphs that have one: the largest block of each image more, and of drawn pictures too."""
    more = ("--evaluate.prompts=x", "--evaluate.batch=64")
    fused, compiled = (plan_of("sd15-lora", f"--models.fast={how}", *more) for how in ("fused", "compiled"))
    block = (compiled.inversion - fused.inversion) / 32
    side, heads = 64 * 64, 8
    stored = 2 * side * 320 * (3 + 3 + 1 + 2) + 4 * side * heads  # of an adapted block: q, k, v, what they are made of
    assert stored < block < 4 * stored and compiled.drawing - fused.drawing == 2 * 64 * block
    whole = [plan_of("sd15", f"--models.fast={how}") for how in ("fused", "compiled")]
    assert whole[0].activations == whole[1].activations and whole[1].inversion > whole[0].inversion + 64 * block


def meta_vae(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return UNet.make_vae(name)


def test_latents_and_text_of_the_windows():
    """By hand: two windows of 1024 pairs, fp32 latents of both sides, a prompt each in bf16; x_t at further t."""
    text = 1024 * 77 * 2048 * 2
    latents = 4 * 2 * 1024 * 4 * 128 * 128
    assert plan_of("sdxl").step_batches == 2 * (latents + text)
    assert plan_of("sdxl", gpus=8).step_batches == 2 * (latents + text) // 8
    assert plan_of("sdxl", "--objective.timesteps.per_pair=3").step_batches == 4 * latents + 2 * text
    assert plan_of("sdxl", "--method=sft").step_batches == latents + 2 * text


def test_text_is_counted():
    """32 prompts at once. SDXL's second encoder has all its layers' answers alive, and what its last layer takes."""
    small, large = plan_of("sd15").text, plan_of("sdxl").text
    layer = 32 * 77 * 1280 * 2
    assert 33 * layer < large < 45 * layer and 0 < small < large / 3


def test_the_plan_shows_what_is_encoded():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(recipe("sdxl-lora"), plan_of("sdxl-lora"), console)
    text = console.export_text()
    for words in (
        r"VAE encoding, 2 images +2\.54",
        r"text encoding, 32 prompts +0\.25",
        r"latents and text of .* 0\.20",
    ):
        assert re.search(words, text), text
    assert "drawing" not in text.replace("encoding, drawing, inversion", "")
    show(recipe("sdxl-lora", "--plan.memory=11"), plan_of("sdxl-lora"), console)
    assert "data.vae_batch=1" in console.export_text()  # what is too large here
    show(recipe("sd15-lora"), plan_of("sd15-lora", "--data.vae_batch=1", "--evaluate.prompts=x"), console)
    text = console.export_text()
    assert re.search(r"VAE encoding, 1 image +0\.32", text) and re.search(r"drawing pictures .* 2\.19", text)


@pytest.mark.slow
def test_memory_table_of_the_recipes():
    """The recipes' README says what make_plan computes."""
    lines = (shipped.FOLDER / "README.md").read_text().splitlines()
    for name in RECIPES:
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert line == table_line(name)


def table_line(name: str) -> str:
    config = recipe(name)
    plan = plan_of(name)
    fits = " / ".join(str(plan.largest_micro_batch(memory) or "none") for memory in (24, 80))
    micro_batch = config.train.micro_batch
    sizes = (sum(plan.kept.values()), plan.activations * micro_batch, plan.peak(micro_batch))
    return f"| {name} | {micro_batch} | " + " | ".join(f"{size / GIB:.1f}" for size in sizes) + f" | {fits} |"


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_planned_without_a_network(name, tmp_path, monkeypatch):
    """Its base is a hub id whose shapes are known here; a folder of that name goes before."""
    monkeypatch.setattr(shapes_room, "find_model", None)  # calling it would fail
    models = parse("test", ["--config", name]).models
    shapes, known = open_shapes(models), open_shapes(recipe(name).models)
    assert shapes.network.config == known.network.config and shapes.vae.config == known.vae.config
    assert [text.config.to_dict() for text in shapes.texts] == [text.config.to_dict() for text in known.texts]
    assert sum(p.numel() for p in shapes.network.parameters()) == (859_520_964 if "sd15" in name else 2_567_463_684)
    (tmp_path / models.base).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError):
        open_shapes(models)


def test_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not divide over 3 processes"):
        make_plan(recipe("sd15"), 3)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        make_plan(recipe("sd15", f"--models.base={file}", "--models.random=null"), 1)
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        make_plan(recipe("sd15", f"--models.base={tmp_path}", "--models.random=null"), 1)


@pytest.mark.parametrize("key", ["init", "vae"])
def test_what_else_a_run_names_is_looked_for(key, tmp_path):
    for base in (str(tmp_path), "stable-diffusion-v1-5/stable-diffusion-v1-5"):
        models = parse("test", [f"--models.base={base}", f"--models.{key}={tmp_path}/none/"]).models
        with pytest.raises(UserError, match=rf"^models\.{key}: no such folder"):
            open_shapes(models)


def test_a_lora_of_another_model_does_not_pass_as_a_start(tmp_path):
    save_file({f"unet.mid_block.x.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}, tmp_path / "x.safetensors")
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    models = parse("test", [f"--models.base={base}", f"--models.init={tmp_path / 'x.safetensors'}"]).models
    with pytest.raises(UserError, match=r"^models\.init: .* without a place in the UNet"):
        open_shapes(models)
