"""A model of the true layout that is small enough to be trained in a test, and real parquet pairs for it."""

import inspect
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from inpo_fast.data.parquet import PICKAPIC_SCHEMA
from inpo_fast.pocket.base_model import WIDTH, make_pipeline, make_text_encoder, make_tokenizer
from inpo_fast.pocket.pairs import png, write_pairs
from inpo_fast.pocket.scenes import Finish, all_scenes, random_finish, render, split_scenes

# diffusers asks for it in each call of an attention layer
AttnProcessor2_0.__call__.__signature__ = inspect.signature(AttnProcessor2_0.__call__)


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def one_level_unet() -> UNet2DConditionModel:
    """With each kind of layer but those that halve and double an image."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Random weights; the UNet's output layer is widened so that its prediction is about unit size."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([scene.caption for scene in all_scenes()])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.0,
    )
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.weight.mul_(4)
    return make_pipeline(vae, unet, make_text_encoder(tokenizer), tokenizer)


WIDTH_2 = 96  # of SDXL's second text encoder: wider than the first one, as there


def tiny_xl() -> StableDiffusionXLPipeline:
    """The layout of SDXL: two text encoders, linear projections, deeper transformers, text_time conditioning."""
    small = tiny_pipeline()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH + WIDTH_2,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH_2,
    )
    second = small.text_encoder.config.to_dict() | {
        "hidden_size": WIDTH_2,
        "intermediate_size": 2 * WIDTH_2,
        "projection_dim": WIDTH_2,
        "hidden_act": "gelu",
    }
    return StableDiffusionXLPipeline(
        vae=small.vae,
        text_encoder=small.text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)),
        tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer,
        unet=unet,
        scheduler=small.scheduler,
        add_watermarker=False,
    )


def one_level(pipeline: DiffusionPipeline, width: int = 8) -> DiffusionPipeline:
    """With the UNet's level that attends to the prompt alone."""
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config(
        pipeline.unet.config,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(width,),
        attention_head_dim=2,
        transformer_layers_per_block=1,
    )
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(4)
    return pipeline


def save_tiny_model(folder: Path) -> str:
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@lru_cache
def pair_table(rows: int = 48) -> pa.Table:
    """A perfect picture is preferred to an imperfect one; every eighth row is a tie."""
    rng = np.random.default_rng(0)
    records = []
    for i, scene in enumerate(split_scenes()[0][:rows]):
        pictures = [png(render(scene, finish, rng)) for finish in (Finish(), random_finish(rng))]
        swap, tie = i % 2, i % 8 == 7
        record = {field.name: None for field in PICKAPIC_SCHEMA}
        record |= {"caption": scene.caption, "jpg_0": pictures[swap], "jpg_1": pictures[1 - swap]}
        record |= {"label_0": 0.5 if tie else 1.0 - swap, "label_1": 0.5 if tie else float(swap)}
        records.append(record)
    return pa.Table.from_pylist(records, schema=PICKAPIC_SCHEMA)


def save_pairs(path: Path, rows: int = 48) -> str:
    write_pairs(pair_table(rows), path)
    return str(path)
