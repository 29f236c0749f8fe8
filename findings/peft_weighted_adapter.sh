#!/bin/bash
# peft 0.21.2 (torch 2.13.0): combining LoRAs with add_weighted_adapter changes those with rsLoRA, DoRA or a bias.
#
# An adapter combined of one adapter with the weight 1 should be that adapter. It is for a plain LoRA. But the new one
# keeps use_rslora with alpha = rank, so it counts sqrt(rank) times: 4 times at rank 16. Of a DoRA it has the matrices,
# but not the learned magnitudes, and of lora_bias=True not the bias. It is the same with "svd" and "cat", which the
# docstring calls precise, and with "linear". Nothing warns. Users have reported it (peft's issue 3761).
#
# Output seen: norm(outputs with the combined adapter - outputs with the adapter) / norm(the adapter's effect)
#                        svd    linear       cat
#   LoRA                0.00      0.00      0.00
#   use_rslora          4.07      4.07      4.07
#   use_dora            0.28      0.28      0.28
#   lora_bias           0.45      0.45      0.45
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    peft==0.21.2 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def error(kind, **settings):
    """Combine one adapter of rank 16 with the weight 1, and return how far the outputs are from the adapter's."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0", "2"], **settings)
    model = get_peft_model(base, config, adapter_name="task")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)  # as if trained
    model.add_weighted_adapter(["task"], [1.0], "combined", combination_type=kind)
    x = torch.randn(256, 32)
    with torch.no_grad():
        with model.disable_adapter():
            without = model(x)
        model.set_adapter("task")
        wanted = model(x)
        model.set_adapter("combined")
        return ((model(x) - wanted).norm() / (wanted - without).norm()).item()


print("                     svd    linear       cat")
found = {}
for name, settings in {
    "LoRA": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
}.items():
    found[name] = [error(kind, **settings) for kind in ("svd", "linear", "cat")]
    print(f"{name:14s}" + "".join(f"{e:10.2f}" for e in found[name]))
plain = found.pop("LoRA")
sys.exit(not (max(plain) < 1e-4 and min(min(errors) for errors in found.values()) > 0.1))
END
