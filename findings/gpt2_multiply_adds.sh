#!/bin/bash
# torchinfo 1.8.0, thop 0.1.1.post2209072238 and torch 2.13.0's own counter on transformers 5.23.0's GPT-2.
#
# GPT-2's matrices are transformers' Conv1D, which is no torch.nn.Linear, and its head is tied to its embedding.
# thop counts layers that it knows by class: it leaves every matrix of the blocks out. torchinfo takes Conv1D's matrix
# for a convolution's and counts the head's matrix a second time among the parameters. torch's counter has the matrices
# right, but on a CPU it counts 0 for scaled_dot_product_attention: the same model in eager mode costs more.
# None of them says that it left something out.
#
# Output seen, for a 124M GPT-2 and 128 tokens:
#   by hand                      15.8 billion     124.4 million parameters
#   thop                          5.0 billion      38.6 million parameters
#   torchinfo                   163.3 billion     163.0 million parameters
#   torch, sdpa                  15.8 billion
#   torch, eager                 16.1 billion, of which attention 0.3
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torchinfo==1.8.0 thop==0.1.1.post2209072238 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'END'
import sys

import thop
import torch
import torchinfo
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

TOKENS = 128
idx = torch.zeros(1, TOKENS, dtype=torch.long)


def make(attention="sdpa"):
    return GPT2LMHeadModel(GPT2Config(use_cache=False, attn_implementation=attention)).eval()


def count_by_torch(attention):
    with FlopCounterMode(display=False) as counter:
        make(attention)(idx)
    return counter.get_total_flops() / 2e9  # a multiply-add is two FLOPs


model = make()
config = model.config
n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
matrices = TOKENS * (12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size) / 1e9
attention = 2 * config.n_layer * TOKENS**2 * config.n_embd / 1e9
print(f"by hand                    {matrices:6.1f} billion    {n_parameters:6.1f} million parameters")
with torch.no_grad():
    summary = torchinfo.summary(model, input_data=idx, verbose=0)
    by_thop, of_thop = thop.profile(make(), inputs=(idx,), verbose=False)
    sdpa = count_by_torch("sdpa")
    eager = count_by_torch("eager")
print(f"thop                       {by_thop / 1e9:6.1f} billion    {of_thop / 1e6:6.1f} million parameters")
info = summary.total_mult_adds / 1e9, summary.total_params / 1e6
print(f"torchinfo                  {info[0]:6.1f} billion    {info[1]:6.1f} million parameters")
print(f"torch, sdpa                {sdpa:6.1f} billion")
print(f"torch, eager               {eager:6.1f} billion, of which attention {attention:.1f}")
thop_is_low = by_thop / 1e9 < 0.5 * matrices and of_thop / 1e6 < 0.5 * n_parameters
info_is_high = info[0] > 1.5 * matrices and info[1] > 1.2 * n_parameters
torch_differs = abs(sdpa - matrices) < 1e-3 and abs(eager - matrices - attention) < 1e-3
sys.exit(not (thop_is_low and info_is_high and torch_differs))
END
