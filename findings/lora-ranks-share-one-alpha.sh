#!/usr/bin/env bash
# diffusers 0.39.0: a LoRA without alpha whose layers have different ranks is scaled wrongly, without a word.
#
# In diffusers' file layout a LoRA without alpha means W + B A. `load_lora_adapter` (utils/peft_utils.py,
# get_peft_kwargs) takes the first layer's rank for the alpha of all layers, so that a layer of rank 8 behind one of
# rank 2 is added at a quarter. The same with 0.32.2, 0.34.0 and 0.36.0; 0.42.1 gives every layer its own alpha.
#
# Seen 2026-11-28, Python 3.11, CPU: {'to_q': 1.0, 'to_v': 0.25}
# What it means for a writer: give all layers one rank, the smaller ones filled up with zeros.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q torch==2.13.0 diffusers==0.39.0 transformers==5.5.4 peft==0.18.1 accelerate==1.15.0
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import torch
from diffusers import UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=8,
    attention_head_dim=2,
    norm_num_groups=4,
)
attention, state = "mid_block.attentions.0.transformer_blocks.0.attn1", {}
for name, rank in (("to_q", 2), ("to_v", 8)):
    state[f"unet.{attention}.{name}.lora_A.weight"] = torch.randn(rank, 16)
    state[f"unet.{attention}.{name}.lora_B.weight"] = torch.randn(16, rank)
unet.load_lora_adapter(state, prefix="unet")
layers = dict(unet.named_modules())
seen = {name: next(iter(layers[f"{attention}.{name}"].scaling.values())) for name in ("to_q", "to_v")}
print(seen)
assert seen == {"to_q": 1.0, "to_v": 0.25}, "changed: expected to_v at a quarter"
PY
