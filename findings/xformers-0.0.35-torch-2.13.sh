#!/usr/bin/env bash
# xformers 0.0.35, the newest, asks for torch >= 2.10 and gets any newer one. Its extension is linked with CUDA 12
# (libcudart.so.12, built for torch 2.10.0+cu128), while the index's torch 2.11 to 2.13 brings CUDA 13: the installation
# succeeds, the extension never loads, and because diffusers 0.42.1 imports xformers wherever it is installed, every
# program that opens a UNet prints six lines of warning, whatever attention it uses.
#
# Seen (Python 3.11 and 3.13, x86_64): `import diffusers; diffusers.UNet2DConditionModel` prints
#   WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:
#       PyTorch 2.10.0+cu128 with CUDA 1208 (you have 2.13.0+cu130)
# Exit status 0: still so. Needs about 6 GB for as long as it runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 xformers==0.0.35 diffusers==0.42.1 transformers==5.23.0
said=$("$folder/venv/bin/python" -c "import diffusers; diffusers.UNet2DConditionModel" 2>&1)
echo "$said"
[[ $said == *"WARNING[XFORMERS]"*"built for"*"2.10.0+cu128 with CUDA 1208 (you have 2.13.0+cu130)"* ]]
