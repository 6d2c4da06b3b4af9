"""Exported files held against their readers: diffusers' from_single_file and load_lora_weights, bit for bit, and the
names of the original checkpoints."""

import json
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import tiny_pipeline, tiny_xl
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from inpo_fast import architectures, export
from inpo_fast.hand_over import output_pipeline, save_adapter
from inpo_fast.loading import load_pipeline, open_pipeline
from inpo_fast.models import LoraSettings, Models, ModelsConfig
from inpo_fast.refusal import Refusal

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
    export.main()


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
    with pytest.raises(Refusal, match=r"a\.weight has values that are not finite in torch\.float16; take --dtype bf16"):
        export.convert({"a.weight": torch.tensor([1.0, 7e4])}, torch.float16)


def test_sdxl_tells_comfyui_that_it_predicts_v(world):
    tensors = export.single_file(load_pipeline(str(world / "sdxl" / "model")))
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert "v_pred" not in export.single_file(load_pipeline(str(world / "sd15" / "model")))


FACTS = {  # of v1-5-pruned-emaonly and sd_xl_base_1.0: tensors by prefix, and shapes
    "sd15": (
        {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.transformer.text_model.": 196},
        {
            "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
            "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
            "model.diffusion_model.input_blocks.8.1.proj_in.weight": (1280, 1280, 1, 1),
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # no attention before it
            "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
            "model.diffusion_model.time_embed.0.weight": (1280, 320),
            "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
            "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
            "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        },
    ),
    "sdxl": (
        {
            "model.diffusion_model.": 1680,
            "first_stage_model.": 248,
            "conditioner.embedders.0.transformer.text_model.": 196,
            "conditioner.embedders.1.model.": 389,  # the original has logit_scale as well, which nothing reads
        },
        {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.7.1.proj_in.weight": (1280, 1280),
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
            "model.diffusion_model.output_blocks.0.0.skip_connection.weight": (1280, 2560, 1, 1),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
            "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
            "conditioner.embedders.1.model.positional_embedding": (77, 1280),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
            "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.bias": (5120,),
        },
    ),
}


@pytest.mark.parametrize("kind", FACTS)
def test_names_of_the_exact_architectures_are_the_originals(kind):
    """On the meta device. diffusers' own reader must find every tensor again: the same objects, not equal shapes."""
    text = architectures.make_tokenizer()

    def second():
        return CLIPTextModelWithProjection(architectures.text_config(text, architectures.OPENCLIP_G))

    with torch.device("meta"):
        pipeline = SimpleNamespace(
            unet=architectures.make_unet(kind),
            vae=architectures.make_vae(kind),
            text_encoder=CLIPTextModel(architectures.text_config(text, architectures.CLIP_L)),
            text_encoder_2=second() if kind == "sdxl" else None,
            scheduler=SimpleNamespace(config={}),
        )
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    pipeline.unet.state_dict, pipeline.vae.state_dict = lambda: unet, lambda: vae
    found, (counts, shapes) = export.single_file(pipeline), FACTS[kind]
    assert {prefix: sum(name.startswith(prefix) for name in found) for prefix in counts} == counts
    assert len(found) == sum(counts.values())
    assert {name: tuple(found[name].shape) for name in shapes} == shapes
    back = convert_ldm_unet_checkpoint(found, pipeline.unet.config)
    assert back.keys() == unet.keys() and all(back[name] is unet[name] for name in unet)
    back = convert_ldm_vae_checkpoint(found, pipeline.vae.config)
    assert back.keys() == vae.keys()
    assert all(back[name] is vae[name] for name in vae if "attentions" not in name)  # those are views


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
    if models.is_xl:
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
    for format in ("kohya", "diffusers"):
        file = tmp_path / f"{format}.safetensors"
        model = world / kind / "model"
        run(monkeypatch, "--lora", tmp_path / "lora", "--model", model, "--output", file, "--format", format)
        if format == "diffusers":  # as a reader that knows no alpha: the tensors alone
            save_file(load_file(file), file)
        pipeline = load_pipeline(str(model))
        pipeline.load_lora_weights(str(file))
        torch.testing.assert_close(pipeline.unet(**inputs).sample, adapted, atol=1e-4, rtol=0)


def split(inputs: dict) -> tuple:
    rest = {name: x for name, x in inputs.items() if name not in ("sample", "timestep")}
    return inputs["sample"], inputs["timestep"], rest


@pytest.mark.parametrize(
    ("module", "name", "width", "about"),
    [
        ("down_blocks.0.attentions.0", "down_blocks_0_attentions_0", 768, {}),
        ("down_blocks.0.attentions.0", "down_blocks_0_attentions_0", 1024, {"ss_v2": "True"}),
        ("down_blocks.1.attentions.0", "input_blocks_4_1", 2048, {"ss_base_model_version": "sdxl_base_v1-0"}),
        ("mid_block.attentions.0", "middle_block_1", 2048, {"ss_base_model_version": "sdxl_base_v1-0"}),
        ("up_blocks.0.attentions.2", "output_blocks_2_1", 2048, {"ss_base_model_version": "sdxl_base_v1-0"}),
        ("up_blocks.1.attentions.0", "output_blocks_3_1", 2048, {"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_kohya_names_without_a_model_beside(tmp_path, module, name, width, about):
    layer = f"transformer_blocks.{int(width == 2048)}.attn2.to_k"
    sides = {"A": torch.ones(2, width), "B": torch.ones(320, 2)}
    save_file({f"unet.{module}.{layer}.lora_{k}.weight": x for k, x in sides.items()}, tmp_path / "x.safetensors")
    tensors, metadata = export.lora_file(tmp_path / "x.safetensors", "kohya", None)
    name = f"lora_unet_{name}_{layer.replace('.', '_')}"
    assert {key: tuple(x.shape) for key, x in tensors.items()} == {
        f"{name}.lora_down.weight": (2, width),
        f"{name}.lora_up.weight": (320, 2),
        f"{name}.alpha": (),
    }
    assert tensors[f"{name}.alpha"] == 2  # none is stored: it is the rank
    assert {key: x for key, x in metadata.items() if key in ("ss_v2", "ss_base_model_version")} == about


def test_bad_input_is_refused_in_one_line(world, tmp_path, monkeypatch):
    model, out = world / "sd15" / "model", tmp_path / "x.safetensors"
    (tmp_path / "taken.safetensors").write_text("mine")
    (tmp_path / "empty").mkdir()
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "kohya.safetensors")
    save_file({f"unet.a.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, tmp_path / "unknown.safetensors")
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    odd = tiny_pipeline()
    odd.unet.register_to_config(down_block_types=["KDownBlock2D", "DownBlock2D"])
    cases = [
        (["--output", out], "nothing to export"),
        (["--model", tmp_path / "no", "--output", out], r"--model: no such folder: .*no"),
        (["--model", tmp_path / "empty", "--output", out], r"--model: .*holds no model_index\.json"),
        (["--model", model, "--output", tmp_path / "taken.safetensors"], r"exists; replace it with --overwrite"),
        (["--model", model, "--output", tmp_path / "x.ckpt"], r"x\.ckpt: must end with \.safetensors"),
        (["--lora", tmp_path, "--output", out], r"--lora: no such file: .*pytorch_lora_weights"),
        (["--lora", tmp_path / "taken.safetensors", "--output", out], r"--lora: .* cannot be read"),
        (["--lora", tmp_path / "kohya.safetensors", "--output", out], r"not a UNet's LoRA in diffusers' layout"),
        (["--lora", tmp_path / "half.safetensors", "--output", out], r"not a UNet's LoRA in diffusers' layout"),
        (["--lora", tmp_path / "unknown.safetensors", "--output", out], r"SD or SDXL; name the folder with --model"),
    ]
    for arguments, words in cases:
        with pytest.raises(Refusal, match=words) as refusal:
            run(monkeypatch, *arguments)
        assert "\n" not in str(refusal.value)
    with pytest.raises(Refusal, match=r"not a supported layout: StableDiffusionPipeline with KDownBlock2D"):
        export.single_file(odd)
    odd = tiny_pipeline()
    odd.unet.extra = torch.nn.Linear(1, 1)
    with pytest.raises(Refusal, match=r"extra\.weight has no name in the original checkpoints"):
        export.single_file(odd)
    assert (tmp_path / "taken.safetensors").read_text() == "mine" and not out.exists()


def test_a_full_disk_leaves_the_old_file(world, tmp_path, monkeypatch):
    out = tmp_path / "x.safetensors"
    out.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a file cannot grow beyond it, as on a full disk
    try:
        with pytest.raises(Refusal, match=r"x\.safetensors cannot be written \(.*\); free some space"):
            run(monkeypatch, "--model", world / "sd15" / "model", "--output", out, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"] and out.read_text() == "old"
    run(monkeypatch, "--model", world / "sd15" / "model", "--output", out, "--overwrite")
    assert len(load_file(out)) > 100
