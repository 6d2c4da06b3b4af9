#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1, kernels on a CPU): every call of one @triton.jit function from another walks
# all of triton.language with inspect.getmembers and wraps its builtins again, though the launch has wrapped them
# already. So a kernel split into small functions is interpreted many times slower than the same lines in one, and a
# call in a loop pays in each turn of each program. In our own tests of the kernels it was a quarter of the processor
# time; wrapping once a process gives the same numbers (bench/interpreter.py: patch_once).
#
# Seen (triton 3.7.1, Python 3.11, x86_64, CPU), 8 programs of 100 turns of x * x, 32 numbers:
#   one function: 4 walks, 10 ms of processor time
#   a function that calls another: 3204 walks (4 a launch, 4 a call), 90 ms
# Exit status 0: still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >"$folder/walks.py" <<'PY'
import os
import time

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def square(x):
    return x * x


@triton.jit
def alone(X, Y, N: tl.constexpr, TURNS: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    for _ in range(TURNS):
        x = x * x
    tl.store(Y + i, x)


@triton.jit
def calling(X, Y, N: tl.constexpr, TURNS: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    for _ in range(TURNS):
        x = square(x)
    tl.store(Y + i, x)


walks, getmembers = 0, interpreter.inspect.getmembers


def counted(*arguments):
    global walks
    walks += 1
    return getmembers(*arguments)


interpreter.inspect.getmembers = counted
x, y = torch.ones(32), torch.empty(32)
for kernel in (alone, calling):
    kernel[(1,)](x, y, 32, 1)
    walks, start = 0, time.process_time()
    kernel[(8,)](x, y, 32, 100)
    print(f"{kernel.__name__}: {walks} walks, {1000 * (time.process_time() - start):.0f} ms")
    assert torch.equal(x, y)
PY
"$folder/venv/bin/python" "$folder/walks.py" | tee "$folder/seen"
alone=$(sed -nE 's/^alone: ([0-9]+) walks.*/\1/p' "$folder/seen")
calling=$(sed -nE 's/^calling: ([0-9]+) walks.*/\1/p' "$folder/seen")
[ "$alone" -lt 10 ]
[ "$calling" -gt 800 ]
