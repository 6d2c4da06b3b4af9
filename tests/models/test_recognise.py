"""What a file or folder is, by its names alone; names as the published models have them."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from inpo_fast.models.files.model_files import find_model
from inpo_fast.models.files.recognise import family_of_class, folder_without_index, other_than_a_unet, quantized
from inpo_fast.models.files.safetensors_header import plain_name, read_header
from inpo_fast.runtime.errors import UserError

FILES = {  # a tensor's name as published files have it -> what such a file is
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "a LoRA",
    "base_model.model.mid_block.attentions.0.proj_in.lora_B.default.weight": "a LoRA",
    "down_blocks.0.attentions.0.processor.to_q_lora.down.weight": "a LoRA",
    "unet.down_blocks.0.to_q.lora_linear_layer.up.weight": "a LoRA",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": "a LoRA of the kind LoHa",
    "lora_unet_input_blocks_1_1_proj_in.lokr_w1": "a LoRA of the kind LoKr",
    "oft_unet_input_blocks_1_1_proj_in.oft_blocks": "an OFT adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "control_model.input_hint_block.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "an AnimateDiff motion module",
    "emb_params": "a textual inversion (embedding)",
    "clip_g": "a textual inversion (embedding)",
    "<a-cat>": "a textual inversion (embedding)",
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3",
    "model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "FLUX or a relative",
    "double_blocks.0.img_mod.lin.weight": "FLUX or a relative",
    "single_stream_modulation.lin.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.bias": "Chroma",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "HiDream",
    "transformer_blocks.0.img_mod.1.weight": "Qwen-Image",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "model.diffusion_model.layers.0.adaLN_modulation.0.weight": "Lumina 2 or Z-Image",
    "blocks.0.cross_attn.q_linear.weight": "PixArt or Sana",
    "clip_txt_mapper.weight": "Stable Cascade (Würstchen)",
    "head.modulation": "Wan",
    "patchify_proj.weight": "LTX-Video",
    "net.x_embedder.proj.1.weight": "Cosmos",
    "model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight": "Stable Video Diffusion",
    "edm_mean": "Playground v2.5 (SDXL's shape with EDM's noise levels)",
    "edm_vpred.sigma_max": "CosXL or a relative (SDXL's shape with EDM's noise levels)",
    "model.diffusion_model.input_blocks.1.0.weight.absmax": "weights quantized by bitsandbytes",
    "scaled_fp8": "scaled fp8 weights",
    "encoder.down.0.block.0.norm1.weight": "a VAE",
    "first_stage_model.decoder.conv_in.weight": "a VAE",
    "decoder.up_blocks.0.resnets.0.norm1.weight": "a VAE",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "a CLIP text encoder",
    "transformer.resblocks.0.ln_1.weight": "a CLIP text encoder",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": "a CLIP model with an image encoder",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "body.0.rdb1.conv1.weight": "an image upscaler",
    "model.1.sub.0.RDB1.conv1.0.weight": "an image upscaler",
}
UNETS = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "input_blocks.0.0.weight",
    "conv_in.weight",
    "unet.conv_in.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
    "state_dict.model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model._orig_mod.input_blocks.0.0.weight",
]


def save(path, *names, width: int = 768):
    save_file({name: torch.zeros(width) for name in names}, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_called_what_it_is(tmp_path, name):
    file = save(tmp_path / "x.safetensors", name)
    assert other_than_a_unet(read_header("k", file)) == FILES[name]
    # what else is in it does not hide it: SDXL's shape with other noise, a ControlNet with its UNet
    if FILES[name] not in ("a VAE", "a T5 text encoder", "an image upscaler", "a language model") and (
        "CLIP" not in FILES[name] and name != "<a-cat>"
    ):
        both = save(tmp_path / "y.safetensors", name, UNETS[0])
        assert other_than_a_unet(read_header("k", both)) == FILES[name]
    with pytest.raises(UserError, match=r"^models\.base: .*x\.safetensors (is|holds) ") as refusal:
        find_model("models.base", str(file))
    assert FILES[name] in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_is_one_in_all_namings(tmp_path, name):
    assert other_than_a_unet(read_header("k", save(tmp_path / "x.safetensors", name))) is None


def test_what_nobody_knows_is_shown_by_its_first_tensor(tmp_path):
    assert "whatever.0.weight" in other_than_a_unet(
        read_header("k", save(tmp_path / "x.safetensors", "whatever.0.weight", width=5))
    )
    save_file({}, tmp_path / "empty.safetensors")
    assert "empty" in other_than_a_unet(read_header("k", tmp_path / "empty.safetensors"))


def test_integers_in_place_of_weights_are_quantized(tmp_path):
    save_file({"conv_in.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "x.safetensors")
    assert quantized(read_header("k", tmp_path / "x.safetensors")) == "quantized weights (I8)"
    save_file(
        {"conv_in.weight": torch.zeros(4, 4), "position_ids": torch.zeros(1, 4, dtype=torch.int64)}, tmp_path / "y"
    )
    assert quantized(read_header("k", tmp_path / "y")) is None


def test_classes():
    wanted = {
        "StableDiffusion3Pipeline": "Stable Diffusion 3",
        "FluxPipeline": "FLUX",
        "Flux2KleinPipeline": "FLUX.2",
        "SanaPipeline": "Sana",
        "PixArtAlphaPipeline": "PixArt",
        "KandinskyV22Pipeline": "Kandinsky",
        "KolorsPipeline": "Kolors (another text encoder)",
        "StableCascadeDecoderPipeline": "Stable Cascade",
        "WanPipeline": "Wan",
        "ZImagePipeline": "Z-Image",
        "QwenImagePipeline": "Qwen-Image",
        "LatentConsistencyModelPipeline": "a latent consistency model (LCM)",
        "AltDiffusionPipeline": "AltDiffusion (another text encoder)",
        "MyOwnPipeline": None,
    }
    assert {name: family_of_class(name) for name in wanted} == wanted
    assert family_of_class("IFPipeline").startswith("DeepFloyd")


# ---- headers ---------------------------------------------------------------------------------------------------------
def test_wrappers_are_taken_off():
    assert plain_name("state_dict.module.model._orig_mod.x") == "model.x"
    assert plain_name("modules.x") == "modules.x"


def test_a_header_is_read_without_the_tensors(tmp_path):
    x = {"_orig_mod.a": torch.arange(6, dtype=torch.float16).view(2, 3), "b": torch.zeros(0)}
    save_file(x, tmp_path / "x.safetensors", {"modelspec.title": "t"})
    file = read_header("k", tmp_path / "x.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in file.tensors.items()} == {"a": ("F16", (2, 3)), "b": ("F32", (0,))}
    assert file.metadata == {"modelspec.title": "t"}
    assert file.read("a").equal(x["_orig_mod.a"])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4265146304\n"
BROKEN = {
    "pointer": (POINTER.encode(), "Git LFS pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    "pickle": (b"\x80\x02}q\x00.", "pickle"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle"),
    "JSON": (b'{"_class_name": "StableDiffusionPipeline"}', "is JSON, not weights"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "empty": (b"", "not a .safetensors file, or only its beginning"),
    "cut in its header": (struct.pack("<Q", 5000) + b'{"a":', "or only its beginning"),
    "no table": (struct.pack("<Q", 4) + b"[12]", "no list of tensors"),
    "no JSON": (struct.pack("<Q", 4) + b"abcd", "no list of tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_safetensors_file_says_what_it_is(tmp_path, kind):
    content, words = BROKEN[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"^models.base: .*x.safetensors.*{words}") as refusal:
        find_model("models.base", str(tmp_path / "x.safetensors"))
    assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)


def test_a_download_that_was_cut_off_says_how_much_is_there(tmp_path):
    save_file({"conv_in.weight": torch.zeros(1000)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1001])
    with pytest.raises(UserError, match=rf"cut off: {len(whole) - 1001:,} of {len(whole):,} bytes"):
        read_header("k", tmp_path / "x.safetensors")


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_folders_that_are_no_pipelines_say_what_they_are(tmp_path):
    def folder(name: str, **files) -> str:
        for file, content in files.items():
            path = (
                tmp_path
                / name
                / file.replace("__", "/").replace("_json", ".json").replace("_safetensors", ".safetensors")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return folder_without_index(tmp_path / name)

    assert "a LoRA" in folder("lora", pytorch_lora_weights_safetensors=0)
    assert "a LoRA" in folder("peft", adapter_config_json={})
    assert "a VAE" in folder("vae", config_json={"_class_name": "AutoencoderKL"})
    assert "a ControlNet" in folder("control", config_json={"_class_name": "ControlNetModel"})
    assert "a CLIP text encoder" in folder("text", config_json={"architectures": ["CLIPTextModel"]})
    assert "GPT2LMHeadModel" in folder("gpt", config_json={"architectures": ["GPT2LMHeadModel"]})
    assert str(tmp_path / "run" / "model") in folder("run", model__model_index_json={})
    assert "hub's cache" in folder("models--a--b", snapshots__0__model_index_json={})
    assert "x.safetensors" in folder("files", x_safetensors=0)
    assert "a UNet alone goes to models.init" in folder("part", unet__config_json={})
