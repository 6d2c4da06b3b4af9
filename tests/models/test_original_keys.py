"""Names of the original checkpoints against the published files' own, and against a walk through the network."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from inpo_fast.models import unet as unet_family
from inpo_fast.models.files.original_keys import unet_name
from inpo_fast.models.unet import UNet

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
    text = unet_family.make_tokenizer()

    def second():
        return CLIPTextModelWithProjection(unet_family.text_config(text, unet_family.OPENCLIP_G))

    with torch.device("meta"):
        pipeline = SimpleNamespace(
            unet=UNet.make_network(kind),
            vae=UNet.make_vae(kind),
            text_encoder=CLIPTextModel(unet_family.text_config(text, unet_family.CLIP_L)),
            text_encoder_2=second() if kind == "sdxl" else None,
            scheduler=SimpleNamespace(config={}),
        )
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    pipeline.unet.state_dict, pipeline.vae.state_dict = lambda: unet, lambda: vae
    found, (counts, shapes) = UNet(pipeline.unet.config).single_file(pipeline), FACTS[kind]
    assert {prefix: sum(name.startswith(prefix) for name in found) for prefix in counts} == counts
    assert len(found) == sum(counts.values())
    assert {name: tuple(found[name].shape) for name in shapes} == shapes
    back = convert_ldm_unet_checkpoint(found, pipeline.unet.config)
    assert back.keys() == unet.keys() and all(back[name] is unet[name] for name in unet)
    back = convert_ldm_vae_checkpoint(found, pipeline.vae.config)
    assert back.keys() == vae.keys()
    assert all(back[name] is vae[name] for name in vae if "attentions" not in name)  # those are views


@pytest.mark.parametrize("layers", [2, [1, 3, 2], (2, 2, 2)])
def test_blocks_with_layers_of_their_own_are_counted_one_after_the_other(layers):
    """The original UNet has one row of layers down and one up; here it is walked as the picture goes."""
    shallow = {"layers_per_block": layers, "transformer_layers_per_block": 1}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_family.UNETS["sdxl"] | shallow)
    expected, down, up = {}, 1, 0
    for b, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            expected[f"down_blocks.{b}.resnets.{i}.norm1.weight"] = f"input_blocks.{down}.0.in_layers.0.weight"
            if hasattr(block, "attentions"):
                expected[f"down_blocks.{b}.attentions.{i}.norm.bias"] = f"input_blocks.{down}.1.norm.bias"
            down += 1
        if block.downsamplers:
            expected[f"down_blocks.{b}.downsamplers.0.conv.bias"] = f"input_blocks.{down}.0.op.bias"
            down += 1
    for b, block in enumerate(unet.up_blocks):
        for i in range(len(block.resnets)):
            expected[f"up_blocks.{b}.resnets.{i}.norm1.weight"] = f"output_blocks.{up}.0.in_layers.0.weight"
            if hasattr(block, "attentions"):
                expected[f"up_blocks.{b}.attentions.{i}.norm.bias"] = f"output_blocks.{up}.1.norm.bias"
            up += 1
        if block.upsamplers:
            at = 1 + hasattr(block, "attentions")
            expected[f"up_blocks.{b}.upsamplers.0.conv.bias"] = f"output_blocks.{up - 1}.{at}.conv.bias"
    names = unet.state_dict().keys()
    assert expected.keys() <= names
    assert {name: unet_name(name, unet.config) for name in expected} == expected
    assert len({unet_name(name, unet.config) for name in names}) == len(names)
