#!/bin/bash
# diffusers 0.42.1: StableDiffusionXLPipeline.from_single_file does not see the keys `v_pred` and `ztsnr`, by which SDXL
# checkpoints say that they predict v and were trained with zero terminal SNR (ComfyUI writes and reads them; NoobAI-XL
# v-pred is published so). The pipeline comes with the configuration's epsilon scheduler, without an error or a warning,
# and draws noise. Its own scheduler knows both settings.
# Seen: "epsilon False, 0 warnings" for a file with both keys, as for one without.
# Exit status: 0 while this is so, 1 if it changes.
set -e
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pip install -q --target "$tmp/site" torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
PYTHONPATH="$tmp/site" HF_HUB_OFFLINE=1 python3 - <<'EOF'
import json, logging, sys, warnings
from pathlib import Path
import diffusers, torch
from safetensors.torch import save_file

# A configuration as SDXL's: only scheduler and class matter here; the modules are given ready-made.
folder = Path("config")
diffusers.EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, prediction_type="epsilon"
).save_pretrained(folder / "scheduler")
parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "image_encoder", "feature_extractor")
index = {name: [None, None] for name in parts} | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
index |= {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1", "force_zeros_for_empty_prompt": True}
(folder / "model_index.json").write_text(json.dumps(index))
given = dict.fromkeys(parts)
given["vae"] = diffusers.AutoencoderKL(block_out_channels=(32,))
given["unet"] = diffusers.UNet2DConditionModel(block_out_channels=(32, 32), cross_attention_dim=8, attention_head_dim=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}

class Count(logging.Handler):
    seen = 0
    def emit(self, record): Count.seen += record.levelno >= logging.WARNING
logging.getLogger("diffusers").addHandler(Count())
found = []
for marks in ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}):
    save_file(weights | marks, "sdxl.safetensors")
    Count.seen = 0
    with warnings.catch_warnings(record=True) as caught:
        pipeline = diffusers.StableDiffusionXLPipeline.from_single_file(
            "sdxl.safetensors", config=str(folder), local_files_only=True, add_watermarker=False, **given)
    own = pipeline.scheduler.config
    found.append((own.prediction_type, own.rescale_betas_zero_snr, Count.seen + len(caught)))
    print(f"diffusers {diffusers.__version__}, {sorted(marks) or 'no marks'}:", *found[-1][:2], f"({found[-1][2]} warnings)")
own = diffusers.EulerDiscreteScheduler.from_config(own, prediction_type="v_prediction", rescale_betas_zero_snr=True)
print("its scheduler can:", own.config.prediction_type, own.config.rescale_betas_zero_snr)
sys.exit(0 if found[0][:2] == found[1][:2] == ("epsilon", False) and found[0][2] == found[1][2] else 1)
EOF
