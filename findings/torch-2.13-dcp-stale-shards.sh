#!/usr/bin/env bash
# torch.distributed.checkpoint writes and reads folders of safetensors (HuggingFaceStorageWriter and
# HuggingFaceStorageReader). A second save into the same folder that makes another number of files (other processes, or
# another limit for a file) leaves the first one's files beside its own, and the reader takes every .safetensors of the
# folder for the checkpoint: what it loads is partly the old state, without an error or a warning. Nothing in the folder
# says which files belong together unless they are consolidated.
#
# Seen (torch 2.13.0, Python 3.11, CPU): two tensors saved as 1, 1 in two files, then as 2, 2 in one file; loaded: 2, 1.
# Saved as 1, 1 in one file, then as 2, 2 in two; loaded: 1, 2.
# Exit status 0: still so. Here every checkpoint is written into a new folder, and state.json lists its files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.2 fsspec==2026.9.0
cat > "$folder/twice.py" <<'PY'
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter


def save(folder, value, files):
    state = {name: torch.full((4,), float(value)) for name in files}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder, files, save_distributed=True), no_dist=True)


for first, second in (({"a": 1, "b": 2}, {"a": 1, "b": 1}), ({"a": 1, "b": 1}, {"a": 1, "b": 2})):
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 1, first)
        save(folder, 2, second)
        state = {name: torch.zeros(4) for name in first}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        print("saved as 2, 2; loaded:", *(f"{x[0].item():g}" for x in state.values()))
PY
said=$("$folder/venv/bin/python" "$folder/twice.py" 2> "$folder/complaints")
echo "$said"
[[ $said == *"loaded: 2 1"*"loaded: 1 2"* ]]
