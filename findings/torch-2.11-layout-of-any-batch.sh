#!/usr/bin/env bash
# torch 2.11.0, torch.compile with a batch of any size (mark_dynamic, or dynamic=True): inside the compiled function
# x.is_contiguous(memory_format=torch.channels_last) is False for what an operator made of a channels_last image,
# though its strides are right. A function that asks takes the other branch, on any device and with any back end, and
# nothing is said. With a batch of one size the answer is right; so is it in torch 2.13.0.
#
# Seen (Python 3.12, x86_64, CPU):
#   torch 2.11.0, one batch: eager True, compiled True
#   torch 2.11.0, any batch: eager True, compiled False
#   torch 2.13.0, one batch: eager True, compiled True
#   torch 2.13.0, any batch: eager True, compiled True
# Exit status 0: still so. Needs about 11 GB for as long as it runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PIP_FIND_LINKS PIP_CONSTRAINT PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
cat >"$folder/layout.py" <<'PY'
import torch


def answer(x):
    return torch.tensor((x + 1).is_contiguous(memory_format=torch.channels_last))


for name in ("one batch", "any batch"):
    torch._dynamo.reset()
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    if name == "any batch":
        torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(answer, backend="eager", dynamic=False)
    version = torch.__version__.partition("+")[0]
    print(f"torch {version}, {name}: eager {answer(x).item()}, compiled {compiled(x).item()}")
PY
for version in 2.11.0 2.13.0; do
    python3 -m venv "$folder/venv-$version"
    "$folder/venv-$version/bin/pip" install --quiet "torch==$version" numpy==2.3.5
    "$folder/venv-$version/bin/python" "$folder/layout.py"
done | tee "$folder/said"
grep '^torch' "$folder/said" | diff - <(sed -n 's/^#   \(torch 2\)/\1/p' "$0")
