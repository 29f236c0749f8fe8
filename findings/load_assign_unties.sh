#!/bin/bash
# torch 2.13.0: load_state_dict(assign=True) unties a tied head, in a way that still looks tied.
#
# A GPT's head and embedding are one Parameter. Loading with assign=True, the usual way to fill a model that was made
# on the device "meta", wraps the two names' tensors in a Parameter each. When the file was saved from a tied model,
# both Parameters stand on the same memory: the values stay equal, so no comparison shows it. But the model counts the
# matrix twice, each Parameter gets only its own part of the gradient, and the optimizer moves the shared memory twice:
# plain SGD ends at the same place, Adam does not, since it divides each part by its own size.
#
# Output seen:
#   tied             one Parameter: True    40 values   largest step of Adam at rate 0.1: 0.10
#   assign=True      one Parameter: False   80 values   largest step of Adam at rate 0.1: 0.20   same memory: True
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/tied.pt" <<'END'
import sys

import torch
from torch import nn
from torch.nn import functional as F


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, idx):
        return self.head(self.embedding(idx))


def step(model):
    """The largest change of an entry in one step of Adam at rate 0.1, which moves an entry by 0.1 at first."""
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    idx = torch.arange(10)
    F.cross_entropy(model(idx), idx.roll(1)).backward()
    optimizer.step()
    return (model.head.weight - before).abs().max().item()


torch.manual_seed(0)
tied = Tied()
torch.save(tied.state_dict(), sys.argv[1])
with torch.device("meta"):
    assigned = Tied()
assigned.load_state_dict(torch.load(sys.argv[1]), assign=True)
sizes = []
steps = []
for name, model in (("tied       ", tied), ("assign=True", assigned)):
    one = model.head.weight is model.embedding.weight
    sizes.append(sum(p.numel() for p in model.parameters()))
    same = model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    steps.append(step(model))
    told = f"one Parameter: {one!s:5}   {sizes[-1]} values   largest step of Adam at rate 0.1: {steps[-1]:.2f}"
    print(f"{name}      {told}" + (f"   same memory: {same}" if not one else ""))
sys.exit(not (sizes == [40, 80] and round(steps[0], 2) == 0.1 and round(steps[1], 2) == 0.2 and same and not one))
END
