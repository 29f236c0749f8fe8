#!/bin/bash
# torchao 0.18.0 and torch 2.13.0's quantize_dynamic on transformers 5.23.0's GPT-2: int8 makes it larger.
#
# Both replace torch.nn.Linear. GPT-2's 48 matrices are transformers' Conv1D and stay in float32, in silence. The one
# Linear is the head, which is tied to the embedding: it is quantized, no longer tied, and so its 38.6 million int8
# values come on top of the float32 embedding.
#
# Output seen, for a 124M GPT-2:
#   float32            497.8 MB    48 of 48 matrices of the blocks in float32
#   torchao int8       536.7 MB    48 of 48 matrices of the blocks in float32
#   quantize_dynamic   536.4 MB    48 of 48 matrices of the blocks in float32
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torchao==0.18.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" -W ignore - <<'END'
import io
import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel


def make():
    return GPT2LMHeadModel(GPT2Config()).eval()


def report(name, model):
    """Return the megabytes of a saved state_dict, in which memory that is shared is kept once, and count matrices."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    size = len(file.getvalue()) / 1e6
    blocks = [p for key, p in model.named_parameters() if ".h." in key and p.dim() == 2]
    n_float32 = len([p for p in blocks if type(p.data) is torch.Tensor and p.dtype == torch.float32])
    print(f"{name:18s}{size:6.1f} MB    {n_float32} of {len(blocks)} matrices of the blocks in float32")
    return size, n_float32


before, _ = report("float32", make())
model = make()
quantize_(model, Int8WeightOnlyConfig(version=2))
torchao = report("torchao int8", model)
dynamic = report("quantize_dynamic", torch.ao.quantization.quantize_dynamic(make(), {torch.nn.Linear}))
larger = torchao[0] > before + 38 and dynamic[0] > before + 38
sys.exit(not (larger and torchao[1] == dynamic[1] == 48))
END
