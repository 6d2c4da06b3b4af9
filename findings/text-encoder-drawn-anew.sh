#!/usr/bin/env bash
# transformers 5.5.4 opens a CLIPTextModel that transformers 5.23.0 saved with newly initialised weights.
#
# 5.23 saves CLIPTextModel's tensors without the prefix `text_model.`; 5.5 expects it, finds none of them, draws new
# weights and goes on (a table in the log says so). A Stable Diffusion folder from a current trainer then ignores its
# prompts in a program that pins the older version. The other way round works: 5.23 reads both namings.
#
# Seen 2026-11-28, Python 3.11, CPU: tensors begin with "embeddings.", "encoder.", "final_layer_norm.";
# largest difference of the output 3.9 where the largest value is 3.1 (new weights, so it varies); with the prefix 0.
# What it means for a writer: write the prefix.
set -euo pipefail
tmp=$(mktemp -d) && trap 'rm -rf "$tmp"' EXIT
for version in 5.23.0 5.5.4; do
    "${PYTHON:-python3}" -m venv "$tmp/$version"
    "$tmp/$version/bin/pip" install -q torch==2.13.0 "transformers==$version" safetensors==0.8.0
done
cd "$tmp"
"$tmp/5.23.0/bin/python" - <<'PY'
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = CLIPTextModel(CLIPTextConfig(vocab_size=100, bos_token_id=98, eos_token_id=99, pad_token_id=99, **sizes)).eval()
model.save_pretrained("as-saved")
model.save_pretrained("with-prefix")
state = load_file("as-saved/model.safetensors")
begins = sorted({name.split(".")[0] for name in state})
print("tensors begin with", begins)
assert begins == ["embeddings", "encoder", "final_layer_norm"], "changed: the prefix is there"
save_file({f"text_model.{name}": x for name, x in state.items()}, "with-prefix/model.safetensors", {"format": "pt"})
tokens = torch.tensor([[98, 5, 6, 7, 99]])
torch.save(model(tokens).last_hidden_state.detach(), "expected.pt")
again = CLIPTextModel.from_pretrained("with-prefix").eval()
assert torch.equal(again(tokens).last_hidden_state, model(tokens).last_hidden_state), "5.23 no longer reads the prefix"
PY
"$tmp/5.5.4/bin/python" - <<'PY'
import torch
from transformers import CLIPTextModel

tokens, expected = torch.tensor([[98, 5, 6, 7, 99]]), torch.load("expected.pt")
for folder in ("as-saved", "with-prefix"):
    found = CLIPTextModel.from_pretrained(folder).eval()(tokens).last_hidden_state.detach()
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    print(f"{folder}: largest difference {difference:.3f}, largest value {largest:.3f}")
    assert (difference > 0.5) == (folder == "as-saved"), "changed"
    assert folder == "as-saved" or difference < 1e-5, "changed"
PY
