#!/usr/bin/env bash
# torch 2.11.0 requires triton 3.6.0 exactly, and neither says which numpy: an installation today gets numpy 2.4.
# With it, triton 3.6.0's interpreter (TRITON_INTERPRET=1) fails in any kernel with a `range` loop whose bound is an
# argument: it takes int() of an array with one element, which numpy 2.4 no longer allows. numpy 2.3.5 is right, with a
# DeprecationWarning; so is triton 3.7.1 with numpy 2.4.6. Compiled kernels are not concerned.
#
# Seen (Python 3.11 and 3.12, x86_64, CPU):
#   numpy 2.4.6: triton.runtime.errors.InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
#   numpy 2.3.5: 45.0
# Exit status 0: still so. Needs about 6 GB for as long as it runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 triton==3.6.0 numpy==2.4.6
cat >"$folder/total.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def total(x, out, n, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(x + at, at < n, 0.0)
    tl.store(out, tl.sum(sums))


out = torch.zeros(1)
total[(1,)](torch.arange(10.0), out, 10, BLOCK=4)
print(out.item())
PY
new=$("$folder/venv/bin/python" "$folder/total.py" 2>&1 | tail -1) || true
echo "numpy 2.4.6: $new"
"$folder/venv/bin/pip" install --quiet numpy==2.3.5
old=$("$folder/venv/bin/python" -W ignore "$folder/total.py" 2>&1 | tail -1) || true
echo "numpy 2.3.5: $old"
[[ $new == *"only 0-dimensional arrays can be converted to Python scalars"* && $old == 45.0 ]]
