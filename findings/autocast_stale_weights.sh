#!/bin/bash
# torch 2.13.0: a training loop inside one autocast block never sees its own updates.
#
# Autocast casts a weight once and keeps the copy until the outermost block ends. An optimizer's step changes the
# weight, but not the copy. So every forward pass computes with the first weights, while the gradient of those first
# weights is applied again and again: the loss stays what it was and the weights run away. With one block a step, the
# same loop learns. Frozen weights are not kept, so they are read anew.
#
# Output seen (the target of every weight is 1):
#   one block around the loop    loss 15.72 then 15.72, mean weight 3.71
#   one block around each step   loss 15.72 then 0.15, mean weight 0.90
#   a frozen weight, doubled inside a block: the output doubles
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import contextlib
import sys

import torch
from torch import nn


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def train(around_loop, around_step):
    torch.manual_seed(0)
    linear = nn.Linear(16, 1)
    x = torch.randn(64, 16)
    y = x.sum(1, keepdim=True)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    losses = []
    with around_loop():
        for _ in range(20):
            with around_step():
                loss = (linear(x).float() - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    weight = linear.weight.mean().item()
    return losses[0], losses[-1], weight


outside = train(bfloat16, contextlib.nullcontext)
inside = train(contextlib.nullcontext, bfloat16)
print("one block around the loop    loss {:.2f} then {:.2f}, mean weight {:.2f}".format(*outside))
print("one block around each step   loss {:.2f} then {:.2f}, mean weight {:.2f}".format(*inside))

frozen = nn.Linear(16, 1, bias=False).requires_grad_(False)
x = torch.randn(64, 16)
with bfloat16():
    before = frozen(x)
    frozen.weight.mul_(2)
    doubled = torch.equal(frozen(x), 2 * before)
print("a frozen weight, doubled inside a block: the output", "doubles" if doubled else "does not change")
sys.exit(not (outside[0] == outside[1] and outside[2] > 2 and inside[1] < 1 and doubled))
END
