#!/usr/bin/env bash
# torch 2.13.0, torch.compile on a CPU (backend inductor), bf16 or fp16, images in NCHW: where nearest-neighbour
# upsampling stands between two convolutions, everything before the upsampling can get a gradient of exactly zero. The
# outputs are right, nothing is said. Whether it happens depends on what else is in the graph: here a learned number
# that is added at the end. In channels_last and in fp32 the gradient is right, and so is it without the compiler.
# diffusers' UNet2DConditionModel, compiled as a whole in bf16, is a case (small widths, 8 x 8 latents): its gradient is
# 0.61 of its size away from float64's, as everything before the upsampler gets none.
# Not tried on a GPU.
#
# Seen (Python 3.11, x86_64, CPU):
#   bf16 NCHW: input gradient eager 231.3, compiled 0.0
#   fp16 NCHW: input gradient eager 231.3, compiled 0.0
#   fp32 NCHW: input gradient eager 231.3, compiled 231.3
#   bf16 NHWC: input gradient eager 231.3, compiled 231.3
# Exit status 0: still so. Needs about 6 GB for as long as it runs, and a C++ compiler.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools==83.0.0
cat >"$folder/gradient.py" <<'PY'
import sys

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.added = nn.Parameter(torch.ones(()))

    def forward(self, x):
        large = nn.functional.interpolate(self.before(x), scale_factor=2.0, mode="nearest")
        return self.after(large) + self.added


name, layout = sys.argv[1:]
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
torch.manual_seed(0)
block = Block().to(dtype).to(memory_format=memory)
x = torch.randn(2, 64, 32, 32).to(dtype).contiguous(memory_format=memory)
upstream = torch.randn(2, 64, 64, 64).to(dtype)
sizes = []
for function in (block, torch.compile(block)):
    image = x.clone().requires_grad_()
    function(image).backward(upstream)
    sizes.append(image.grad.double().norm().item())
print(f"{name} {layout}: input gradient eager {sizes[0]:.1f}, compiled {sizes[1]:.1f}")
sys.exit(0 if (sizes[1] == 0) == (name != "fp32" and layout == "NCHW") and sizes[0] > 0 else 1)
PY
for case in "bf16 NCHW" "fp16 NCHW" "fp32 NCHW" "bf16 NHWC"; do
    # shellcheck disable=SC2086
    "$folder/venv/bin/python" "$folder/gradient.py" $case
done
