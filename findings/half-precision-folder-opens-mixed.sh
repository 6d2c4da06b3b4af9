#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: a pipeline saved in fp16 and opened without `dtype=` cannot draw.
#
# diffusers opens its own models as fp32 when no dtype is given, whatever the files hold; transformers 5 opens a model
# as its config.json says ("dtype": "float16"). The text encoder's fp16 output then meets an fp32 UNet.
# Giving dtype (either one) works, and so does "dtype": "float32" in text_encoder/config.json beside the fp16 weights.
#
# Seen 2026-11-28, Python 3.11, CPU: unet float32, vae float32, text encoder float16;
# RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.manual_seed(0)
letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[], model_max_length=16)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text = CLIPTextModel(CLIPTextConfig(vocab_size=len(letters), eos_token_id=53, max_position_embeddings=16, **sizes))
vae = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
    norm_num_groups=4, sample_size=16,
)
unet = UNet2DConditionModel(
    sample_size=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
)
StableDiffusionPipeline(
    vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
).to(torch.float16).save_pretrained("folder")


def opened(**options):
    pipeline = StableDiffusionPipeline.from_pretrained("folder", local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


pipeline = opened()
print("unet", pipeline.unet.dtype, "vae", pipeline.vae.dtype, "text encoder", pipeline.text_encoder.dtype)
try:
    pipeline("a cat", num_inference_steps=1, height=16, width=16)
except RuntimeError as problem:
    print("RuntimeError:", problem)
else:
    raise SystemExit("changed: it draws")
opened(dtype=torch.float32)("a cat", num_inference_steps=1, height=16, width=16)
config = Path("folder/text_encoder/config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))
opened()("a cat", num_inference_steps=1, height=16, width=16)
print("with dtype=, or with float32 in text_encoder/config.json: draws")
PY
