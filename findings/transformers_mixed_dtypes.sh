#!/bin/bash
# transformers 5.23.0: where config.json names no dtype, one tensor decides the dtype of the whole checkpoint.
#
# from_pretrained loads with dtype "auto". A config without a dtype, as the ones of older checkpoints are, leaves it to
# the tensors, and the first floating one by name decides. So a bfloat16 LLaMA with its norms kept in float32 loses
# them to bfloat16, and the same file with only its head in float32 becomes float32 throughout, twice the memory. In
# neither case is a word said.
#
# Output seen:
#   float32: only the norms      loaded all as bfloat16, norms rounded
#   float32: only the head       loaded all as float32
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
TRANSFORMERS_VERBOSITY=warning "$folder/venv/bin/python" - "$folder" <<'END'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
folder = Path(sys.argv[1]) / "model"
sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, bos_token_id=1, eos_token_id=2, **sizes))
for key, p in model.named_parameters():
    if "norm" in key:
        p.data += 0.1 * torch.randn_like(p)
model.save_pretrained(folder)
config = json.loads((folder / "config.json").read_text())
del config["dtype"]
(folder / "config.json").write_text(json.dumps(config))

found = []
for name, part in (("norms", "norm"), ("head", "lm_head")):
    saved = {}
    for key, t in model.state_dict().items():
        saved[key] = t.float() if part in key else t.bfloat16()
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = LlamaForCausalLM.from_pretrained(folder)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in loaded.parameters()}
    rounded = any(not torch.equal(p.float(), saved[key].float()) for key, p in loaded.named_parameters())
    print(f"float32: only the {name:10s} loaded all as {'/'.join(dtypes)}{', norms rounded' if rounded else ''}")
    found.append((dtypes, rounded))
sys.exit(found != [({"bfloat16"}, True), ({"float32"}, False)])
END
