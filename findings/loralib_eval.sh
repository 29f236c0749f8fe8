#!/bin/bash
# loralib 0.1.2 (torch 2.13.0): what a LoRA file does depends on whether eval() was called before it was loaded.
#
# eval() merges B·A into the weight, once, and train() takes it out again; whether it is in is kept in an attribute of
# the layer, which no state_dict has. So a state_dict that is taken in eval mode, loaded into a new layer, counts the
# LoRA twice: it is in the saved weight, and the new layer adds it once more. And a LoRA that is loaded into a model in
# eval mode does nothing at all: the layer believes that it is merged. Neither is told.
#
# Output seen (largest difference from the layer that was saved; its LoRA changes outputs by about 1):
#   state_dict taken in train mode, loaded, eval()        0.0
#   state_dict taken in eval mode, loaded, eval()         0.9
#   base, eval(), then the LoRA loaded: effect of it      0.0
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    loralib==0.1.2 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import copy
import sys

import loralib
import torch
from torch import nn

torch.manual_seed(0)
x = torch.randn(64, 16)
layer = loralib.Linear(16, 16, r=4)
nn.init.normal_(layer.lora_B)
wanted = layer(x)
in_train = copy.deepcopy(layer.state_dict())
layer.eval()
in_eval = copy.deepcopy(layer.state_dict())

differences = []
for name, saved in (("train", in_train), ("eval", in_eval)):
    again = loralib.Linear(16, 16, r=4)
    again.load_state_dict(saved)
    again.eval()
    differences.append((again(x) - wanted).abs().max().item())
    told = f"state_dict taken in {name} mode, loaded, eval()"
    print(f"{told:50s}    {differences[-1]:.1f}")

base = loralib.Linear(16, 16, r=4)
base.load_state_dict(in_train)
nn.init.zeros_(base.lora_B)
base.eval()
before = base(x)
base.load_state_dict({name: in_train[name] for name in ("lora_A", "lora_B")}, strict=False)
effect = (base(x) - before).abs().max().item()
print(f"{'base, eval(), then the LoRA loaded: effect of it':50s}    {effect:.1f}")
sys.exit(not (differences[0] < 1e-5 and differences[1] > 0.1 and effect == 0))
END
