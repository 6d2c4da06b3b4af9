"""Exported files held against their readers: diffusers' from_single_file and load_lora_weights, bit for bit, and the
names of the original checkpoints."""

import hashlib
import json
import resource
import shutil
import sys
from datetime import UTC, datetime, timedelta

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_xl

from inpo_fast import export as export_command
from inpo_fast.handover import single_file_export
from inpo_fast.handover.output_model import output_pipeline, save_adapter
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.families import denoiser_of
from inpo_fast.models.loading import load_pipeline, open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.errors import UserError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT = {  # where the original keeps its text encoders
    "sd15": {"cond_stage_model.transformer.text_model.final_layer_norm.weight"},
    "sd21": {"cond_stage_model.model.ln_final.weight"},
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.ln_final.weight",
    },
}
STOCK = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders sd15, sd21 (OpenCLIP, v-prediction) and sdxl (v-prediction), in a run's folder each."""
    folder = tmp_path_factory.mktemp("world")
    for kind in STOCK:
        pipeline = tiny_xl() if kind == "sdxl" else tiny_pipeline()
        if kind == "sd21":
            pipeline.text_encoder.config.hidden_act = "gelu"
        if kind != "sd15":
            pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
        for name in PARTS:  # biases and norms begin as constants, which any mix-up would leave equal
            for parameter in getattr(pipeline, name).parameters() if hasattr(pipeline, name) else ():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        pipeline.save_pretrained(folder / kind / "model")
    (folder / "sd15" / "manifest.json").write_text(json.dumps({"variant": "inpo", "config_sha256": "ab12"}))
    return folder


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export_command.main()


def single_file(pipeline) -> dict[str, torch.Tensor]:
    return denoiser_of(pipeline).single_file(pipeline)


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: getattr(pipeline, name, None) for name in PARTS}
    return {f"{name}.{k}": x for name, part in parts.items() if part is not None for k, x in part.state_dict().items()}


@pytest.mark.parametrize("kind", STOCK)
def test_a_single_file_opens_with_the_same_bits(world, tmp_path, monkeypatch, kind):
    folder, file = world / kind / "model", tmp_path / "out" / "x.safetensors"
    run(monkeypatch, "--model", folder, "--output", file, "--dtype", "fp32")
    assert TEXT[kind] <= load_file(file).keys()
    expected = weights(STOCK[kind].from_pretrained(folder, local_files_only=True))
    stock = STOCK[kind].from_single_file(str(file), config=str(folder), local_files_only=True)
    for opened in (stock, load_pipeline(str(file), single_file_config=str(folder))):
        found = weights(opened)
        assert type(opened) is STOCK[kind] and found.keys() == expected.keys()
        assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_fp16_is_the_nearest_and_what_does_not_fit_is_refused(world, tmp_path, monkeypatch):
    file, exact = tmp_path / "half.safetensors", tmp_path / "exact.safetensors"
    run(monkeypatch, "--model", world / "sd15" / "model", "--output", file)  # fp16 is the default
    run(monkeypatch, "--model", world / "sd15" / "model", "--output", exact, "--dtype", "fp32")
    half, exact = load_file(file), load_file(exact)
    assert all(torch.equal(half[name], exact[name].half()) for name in exact)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["inpo_fast.source"] == "sd15/model" and about["inpo_fast.config_sha256"] == "ab12"
    with pytest.raises(
        UserError, match=r"a\.weight has values that are not finite in torch\.float16; take --dtype bf16"
    ):
        single_file_export.convert({"a.weight": torch.tensor([1.0, 7e4])}, torch.float16)


SPECIFIED = {
    "sd15": ("stable-diffusion-v1", "epsilon"),
    "sd21": ("stable-diffusion-v1", "v"),  # its text is as wide as 1.x's here
    "sdxl": ("stable-diffusion-xl-v1-base", "v"),
}


@pytest.mark.parametrize("kind", STOCK)
def test_a_file_says_what_it_is(world, tmp_path, monkeypatch, kind):
    file = tmp_path / "my model.safetensors"
    run(monkeypatch, "--model", world / kind / "model", "--output", file)
    with safe_open(file, "pt") as opened:
        about = {n.removeprefix("modelspec."): x for n, x in opened.metadata().items() if n.startswith("modelspec.")}
    content = file.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert about["hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
    assert (about["architecture"], about["prediction_type"]) == SPECIFIED[kind]
    assert about["title"] == "my model" and about["resolution"] == "32x32" and about["sai_model_spec"] == "1.0.1"
    assert abs(datetime.fromisoformat(about["date"]) - datetime.now(UTC).replace(tzinfo=None)) < timedelta(minutes=5)
    load_file(file)  # the header still fits


def test_a_lora_in_kohyas_names_says_what_it_belongs_to(world, tmp_path, monkeypatch):
    for kind, version, architecture in (("sd15", "sd_v1", "v1"), ("sdxl", "sdxl_base_v1-0", "xl-v1-base")):
        lora_world(tmp_path / kind, kind, world)
        shutil.copytree(world / kind / "model", tmp_path / kind / "model")
        manifest = {"model": {"base": "a-group/a-model"}, "variant": "inpo"}
        (tmp_path / kind / "manifest.json").write_text(json.dumps(manifest))
        file = tmp_path / f"{kind}.safetensors"
        run(monkeypatch, "--lora", tmp_path / kind / "lora", "--output", file)
        with safe_open(file, "pt") as opened:
            about = opened.metadata()
        content = file.read_bytes()
        digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert about["sshs_model_hash"] == digest and about["modelspec.hash_sha256"] == f"0x{digest}"
        assert about["ss_base_model_version"] == version and about["ss_output_name"] == kind
        assert about["modelspec.architecture"] == f"stable-diffusion-{architecture}/lora"
        assert about["ss_sd_model_name"] == about["modelspec.merged_from"] == "a-group/a-model"
        assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "4.0")
        run(monkeypatch, "--lora", tmp_path / kind / "lora", "--output", file, "--overwrite", "--format", "diffusers")
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_v_and_zero_snr_come_back_from_a_file(world, tmp_path, monkeypatch):
    """Whatever the configuration beside it says. sd21: of SD 1.x's and 2.x's layout."""
    for kind in ("sd21", "sdxl"):
        file, config = tmp_path / f"{kind}.safetensors", tmp_path / kind
        run(monkeypatch, "--model", world / kind / "model", "--output", file)
        shutil.copytree(world / kind / "model", config)
        scheduler = config / "scheduler" / "scheduler_config.json"
        told = json.loads(scheduler.read_text()) | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
        scheduler.write_text(json.dumps(told))
        opened = load_pipeline(str(file), single_file_config=str(config)).scheduler.config
        assert (opened["prediction_type"], opened["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_a_lora_with_diffusers_layers_is_read_without_its_model(world, tmp_path, monkeypatch):
    """Names with underscores: only the layers of the published XL tell which dots they stand for."""
    with torch.device("meta"):
        modules = [n for n, _ in UNet.make_network("sdxl").named_modules() if n.endswith("attn2.to_k")]
    state = {}
    for name in modules:
        flat = "lora_unet_" + name.replace(".", "_")
        state |= {f"{flat}.lora_down.weight": torch.ones(1, 2048), f"{flat}.lora_up.weight": torch.ones(640, 1)}
    save_file(state, tmp_path / "x.safetensors")
    for format, names in (
        ("diffusers", {f"unet.{name}.lora_A.weight" for name in modules}),
        ("kohya-diffusers", {f"lora_unet_{name.replace('.', '_')}.lora_down.weight" for name in modules}),
        ("kohya", {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"}),
    ):
        tensors, _ = single_file_export.lora_tensors(tmp_path / "x.safetensors", format, None)
        assert names <= tensors.keys() and len(tensors) == (2 + (format != "diffusers")) * len(modules)


def test_sdxl_tells_comfyui_that_it_predicts_v(world):
    tensors = single_file(load_pipeline(str(world / "sdxl" / "model")))
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert "v_pred" not in single_file(load_pipeline(str(world / "sd15" / "model")))


def lora_world(folder, kind, world) -> tuple[Models, dict]:
    """An adapter of rank 4 and alpha 6 with random weights, on projections and the feed-forward layers too; inputs."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    config = ModelsConfig(base=str(world / kind / "model"), lora=LoraSettings(rank=4, alpha=6.0, targets=targets))
    models = Models(open_pipeline(config), torch.device("cpu"), config)
    torch.manual_seed(3)
    for parameter in models.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(models, folder / "lora")
    unet = models.policy.config
    inputs = {"encoder_hidden_states": torch.randn(2, 16, unet.cross_attention_dim)}
    if models.denoiser.is_xl:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 96), "time_ids": torch.full((2, 6), 32.0)}
    return models, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([20, 700]), **inputs}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_acts_alike_in_every_format(world, tmp_path, monkeypatch, kind):
    models, inputs = lora_world(tmp_path, kind, world)
    adapted, base = models.policy(**inputs).sample, models.predict("reference", *split(inputs))
    assert (adapted - base).abs().max() > 0.1
    merged = output_pipeline(models)
    # sums of 8 to 96 products in another order, through some twenty layers, at unit size: 1e-4 is 1000 roundings
    torch.testing.assert_close(merged.unet(**inputs).sample, adapted, atol=1e-4, rtol=0)
    model = world / kind / "model"
    pipeline = load_pipeline(str(model))
    for format in ("kohya", "kohya-diffusers", "diffusers"):
        file = tmp_path / f"{format}.safetensors"
        run(monkeypatch, "--lora", tmp_path / "lora", "--model", model, "--output", file, "--format", format)
        if format == "diffusers":  # as a reader that knows no alpha: the tensors alone
            save_file(load_file(file), file)
        pipeline.load_lora_weights(str(file))
        torch.testing.assert_close(pipeline.unet(**inputs).sample, adapted, atol=1e-4, rtol=0)
        pipeline.unload_lora_weights()
        assert torch.equal(pipeline.unet(**inputs).sample, base)


def split(inputs: dict) -> tuple:
    rest = {name: x for name, x in inputs.items() if name not in ("sample", "timestep")}
    return inputs["sample"], inputs["timestep"], rest


@pytest.mark.parametrize(
    ("layers", "width", "names", "about"),
    [
        (2, 768, {"down_blocks.0.attentions.0": "down_blocks_0_attentions_0"}, ("sd_v1", "stable-diffusion-v1/lora")),
        (
            2,
            1024,
            {"down_blocks.0.attentions.0": "down_blocks_0_attentions_0"},
            ("sd_v2", "stable-diffusion-v2-512/lora"),
        ),
        (
            2,
            2048,
            {
                "down_blocks.1.attentions.0": "input_blocks_4_1",
                "down_blocks.2.attentions.1": "input_blocks_8_1",
                "mid_block.attentions.0": "middle_block_1",
                "up_blocks.0.attentions.2": "output_blocks_2_1",
                "up_blocks.1.attentions.0": "output_blocks_3_1",
            },
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ),
        (
            1,  # KOALA: one residual layer in a down block, two in an up block
            2048,
            {
                "down_blocks.1.attentions.0": "input_blocks_3_1",
                "down_blocks.2.attentions.0": "input_blocks_5_1",
                "up_blocks.0.attentions.1": "output_blocks_1_1",
                "up_blocks.1.attentions.0": "output_blocks_2_1",
            },
            ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ),
    ],
)
def test_kohya_names_without_a_model_beside(tmp_path, layers, width, names, about):
    """The names by hand. The LoRA alone shows how many layers a block has, because it has all of their attentions."""
    layer = f"transformer_blocks.{int(width == 2048)}.attn2.to_k"
    modules = set(names)
    if width == 2048:
        modules |= {f"down_blocks.{block}.attentions.{i}" for block in (1, 2) for i in range(layers)}
        modules |= {f"up_blocks.{block}.attentions.{i}" for block in (0, 1) for i in range(layers + 1)}
    sides = {"A": torch.ones(2, width), "B": torch.ones(320, 2)}
    state = {f"unet.{m}.{layer}.lora_{k}.weight": x.clone() for m in modules for k, x in sides.items()}
    save_file(state, tmp_path / "x.safetensors")
    tensors, metadata = single_file_export.lora_tensors(tmp_path / "x.safetensors", "kohya", None)
    assert len(tensors) == 3 * len(modules)  # no two layers under one name
    for name in names.values():
        name = f"lora_unet_{name}_{layer.replace('.', '_')}"
        assert tensors[f"{name}.lora_down.weight"].shape == (2, width)
        assert tensors[f"{name}.lora_up.weight"].shape == (320, 2)
        assert tensors[f"{name}.alpha"] == 2  # none is stored: it is the rank
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == about


def test_layers_that_leave_blocks_out_do_not_show_how_many_there_are(tmp_path):
    sides = {"A": torch.ones(2, 2048), "B": torch.ones(320, 2)}
    layer = "down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k"
    save_file({f"unet.{layer}.lora_{k}.weight": x for k, x in sides.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--lora: .* SD or SDXL, or to one with other blocks; .* --model"):
        single_file_export.lora_tensors(tmp_path / "x.safetensors", "kohya", None)
    tensors, about = single_file_export.lora_tensors(
        tmp_path / "x.safetensors", "kohya-diffusers", None
    )  # needs no count
    assert f"lora_unet_{layer.replace('.', '_')}.alpha" in tensors
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_bad_input_is_refused_in_one_line(world, tmp_path, monkeypatch):
    model, out = world / "sd15" / "model", tmp_path / "x.safetensors"
    (tmp_path / "taken.safetensors").write_text("mine")
    (tmp_path / "empty").mkdir()
    save_file({f"unet.a.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, tmp_path / "unknown.safetensors")
    save_file({"unet.a.b.lora_A.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    (tmp_path / "several").mkdir()
    for name in ("half", "unknown"):
        shutil.copy(tmp_path / f"{name}.safetensors", tmp_path / "several")
    odd = tiny_pipeline()
    odd.unet.register_to_config(down_block_types=["KDownBlock2D", "DownBlock2D"])
    cases = [
        (["--output", out], "nothing to export"),
        (["--model", tmp_path / "no", "--output", out], r"--model: no such folder: .*no"),
        (["--model", tmp_path / "empty", "--output", out], r"--model: .*holds no model_index\.json"),
        (["--model", model, "--output", tmp_path / "taken.safetensors"], r"is there already; --overwrite replaces it"),
        (["--model", model, "--output", tmp_path / "x.ckpt"], r"x\.ckpt: must end with \.safetensors"),
        (["--lora", tmp_path / "none", "--output", out], r"--lora: no such file or folder: .*none"),
        (["--lora", tmp_path / "empty", "--output", out], r"--lora: .* holds no LoRA: neither pytorch_lora_weights"),
        (
            ["--lora", tmp_path / "several", "--output", out],
            r"holds 2 LoRAs .half.safetensors, unknown.*; name the file",
        ),
        (["--lora", tmp_path / "taken.safetensors", "--output", out], r"--lora: .* is not a .safetensors file"),
        (["--lora", tmp_path / "half.safetensors", "--output", out], r"layer a\.b has one of its two matrices only"),
        (["--lora", tmp_path / "unknown.safetensors", "--output", out], r"2 of 2, the first unet\.a\.lora_A\.weight"),
    ]
    for arguments, words in cases:
        with pytest.raises(UserError, match=words) as error:
            run(monkeypatch, *arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"not a supported layout: StableDiffusionPipeline with KDownBlock2D"):
        single_file(odd)
    odd = tiny_pipeline()
    odd.unet.extra = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"extra\.weight has no name in the original checkpoints"):
        single_file(odd)
    assert (tmp_path / "taken.safetensors").read_text() == "mine" and not out.exists()


def test_a_full_disk_leaves_the_old_file(world, tmp_path, monkeypatch):
    out = tmp_path / "x.safetensors"
    out.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file cannot grow beyond it, as on a full disk
    try:
        with pytest.raises(UserError, match=r"x\.safetensors cannot be written \(.*\); free some space"):
            run(monkeypatch, "--model", world / "sd15" / "model", "--output", out, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"] and out.read_text() == "old"
    run(monkeypatch, "--model", world / "sd15" / "model", "--output", out, "--overwrite")
    assert len(load_file(out)) > 100
