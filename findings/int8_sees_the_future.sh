#!/bin/bash
# onnxruntime 1.32.0's and torch 2.13.0's dynamic int8: a causal model's predictions depend on the tokens that follow.
#
# Both quantize a linear map's input with one scale and zero point for the whole tensor: all texts of the batch, and all
# their tokens. So a later token, or another text, changes how an earlier one is rounded, whatever the attention mask
# says. A perplexity measured in one pass is then not that of the same model writing token by token, and it depends on
# the batch. That results depend on the batch has been reported; that they depend on the future is said nowhere we
# looked. torchao 0.18.0, with a scale for each token, does neither.
#
# Output seen, on a random GPT of 4 layers and 16 texts of 64 tokens: predicted next tokens that change
#   changed predictions     from float32    without later tokens    without the other texts
#   torch, float32                 0.0 %                   0.0 %                      0.0 %
#   onnxruntime, float32           0.0 %                   0.0 %                      0.0 %
#   onnxruntime, int8              2.1 %                   2.7 %                      1.9 %
#   torch, int8                    5.0 %                   6.8 %                      5.5 %
#   torchao, int8                  1.6 %                   0.0 %                      0.0 %
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    onnx==1.23.2 onnxruntime==1.32.0 torchao==0.18.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - 2> log <<'END' || { cat log; exit 1; }
import sys

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def make():
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    return nn.Sequential(nn.Embedding(256, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, 256)).eval()


def onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda idx: torch.from_numpy(session.run(None, {"idx": idx.numpy()})[0])


def changed(found, wanted):
    """How many of the predicted next tokens differ, in percent."""
    return 100 * (found.argmax(-1) != wanted.argmax(-1)).double().mean().item()


model = make()
texts = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(0))
sizes = {"idx": {0: "texts", 1: "tokens"}}
torch.onnx.export(model, (texts,), "float.onnx", input_names=["idx"], dynamic_axes=sizes, dynamo=False)
quantize_dynamic("float.onnx", "int8.onnx")
by_token = make()
quantize_(by_token, Int8DynamicActivationInt8WeightConfig(version=2))
models = {
    "torch, float32": model,
    "onnxruntime, float32": onnx("float.onnx"),
    "onnxruntime, int8": onnx("int8.onnx"),
    "torch, int8": torch.ao.quantization.quantize_dynamic(make(), {nn.Linear}),
    "torchao, int8": by_token,
}
print("changed predictions     from float32    without later tokens    without the other texts")
found = []
with torch.no_grad():
    for name, run in models.items():
        logits = run(texts)
        quantized = changed(logits, model(texts))
        later = changed(run(texts[:, :32]), logits[:, :32])
        others = changed(torch.cat([run(text[None]) for text in texts]), logits)
        found.append((quantized, later, others))
        print(f"{name:20s}{quantized:14.1f} %{later:22.1f} %{others:25.1f} %")
sys.exit(not (all(share[1:] == (0, 0) for share in (found[0], found[4])) and min(*found[2], *found[3]) > 1))
END
