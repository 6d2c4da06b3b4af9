#!/usr/bin/env bash
# bitsandbytes 0.50.2: one step of an optimizer takes a model out of channels_last. Before each update `p.data` is
# replaced by `p.data.contiguous()`, for good, and nothing is said: results stay right, convolutions run in the other
# layout from then on, and whoever keeps a second copy of the weights (fp32 masters beside bf16 parameters) finds that
# the two no longer lie alike. torch's own AdamW leaves the layout as it is.
#
# Seen (Python 3.11, x86_64, CPU):
#   torch.optim.AdamW: strides (288, 1, 96, 32) -> (288, 1, 96, 32)
#   bitsandbytes 0.50.2 AdamW8bit: strides (288, 1, 96, 32) -> (288, 9, 3, 1)
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
cat >"$folder/layout.py" <<'PY'
import bitsandbytes
import torch
from bitsandbytes.optim import AdamW8bit

for name, optimizer in (
    ("torch.optim.AdamW", torch.optim.AdamW),
    (f"bitsandbytes {bitsandbytes.__version__} AdamW8bit", AdamW8bit),
):
    convolution = torch.nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)
    convolution(torch.randn(1, 32, 8, 8)).sum().backward()
    before = convolution.weight.stride()
    optimizer(convolution.parameters(), lr=1e-3).step()
    print(f"{name}: strides {before} -> {convolution.weight.stride()}")
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy==2.3.5
"$folder/venv/bin/python" "$folder/layout.py" | tee "$folder/said"
grep ': strides' "$folder/said" | diff - <(sed -n 's/^#   \(.*: strides\)/\1/p' "$0")
