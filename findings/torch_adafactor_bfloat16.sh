#!/bin/bash
# torch 2.13.0's Adafactor does not move bfloat16 weights whose gradients are small; transformers 5.23.0's does.
#
# Adafactor divides a gradient by its own size, so steps should not depend on that size. torch.optim.Adafactor never
# divides by less than eps[0]. By default that is None, which means the dtype's machine epsilon: 0.0078 in bfloat16.
# With a gradient norm of 1, a model of 100 million weights has gradients near 0.0001. Its steps are then 78 times too
# small, and bfloat16 rounds them away. The documentation says that epsilon is not used as in the paper (where it is
# 1e-30 and added to squares), but not that it depends on the dtype.
# The first parameter sets the epsilon of its whole group, so a float32 vector behind a bfloat16 one suffers too.
#
# Output seen: change of the weights after 50 steps at learning rate 0.01, as a share of their size
#                        gradients of size     1    0.01   0.001  0.0001
#   vector, torch float32                    30%     30%     30%     30%
#   vector, torch bfloat16                   30%     29%      2%      0%
#   vector, transformers bfloat16            30%     30%     30%     30%
#   vector, torch bfloat16, eps 1e-10        30%     30%     30%     30%
#   matrix, torch float32                    36%     36%     36%     36%
#   matrix, torch bfloat16                   36%     37%      3%      0%
#   matrix, transformers bfloat16            36%     36%     36%     36%
#   matrix, torch bfloat16, eps 1e-10        36%     36%     36%     36%
#   a float32 vector with gradients of size 0.0001: 30% listed before a bfloat16 vector, 0% behind it
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 numpy==2.4.6
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'END'
import sys

import torch
import transformers


def train(adafactor, weights, size, **settings):
    """Return each tensor's change after 50 steps, as a share of its size."""
    before = [w.float() for w in weights]
    weights = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = adafactor(weights, lr=0.01, **settings)
    for _ in range(50):
        for w in weights:
            w.grad = (size * (1 + torch.randn(w.shape)) / 2**0.5).to(w.dtype)
        optimizer.step()
    return [((w.detach() - b).norm() / b.norm()).item() for w, b in zip(weights, before, strict=True)]


torch.manual_seed(0)
shapes = {"vector": 1 + 0.02 * torch.randn(512), "matrix": 0.02 * torch.randn(256, 256)}
absolute = {"relative_step": False, "scale_parameter": True}  # the same method and learning rate as torch's
kinds = {
    "torch float32": (torch.optim.Adafactor, torch.float32, {}),
    "torch bfloat16": (torch.optim.Adafactor, torch.bfloat16, {}),
    "transformers bfloat16": (transformers.Adafactor, torch.bfloat16, absolute),
    "torch bfloat16, eps 1e-10": (torch.optim.Adafactor, torch.bfloat16, {"eps": (1e-10, 1e-3)}),
}
as_seen = []
print("                     gradients of size     1    0.01   0.001  0.0001")
for shape, w in shapes.items():
    for kind, (adafactor, dtype, settings) in kinds.items():
        found = [train(adafactor, [w.to(dtype)], size, **settings)[0] for size in (1, 0.01, 0.001, 0.0001)]
        print(f"{shape + ', ' + kind:38s}" + "".join(f"{change:8.0%}" for change in found))
        small = found[3] < 0.01 and found[2] < 0.05 if kind == "torch bfloat16" else found[3] > 0.2
        as_seen.append(found[0] > 0.2 and found[1] > 0.2 and small)

wide, narrow = torch.ones(512), torch.ones(512, dtype=torch.bfloat16)
before, _ = train(torch.optim.Adafactor, [wide, narrow], 0.0001)
_, behind = train(torch.optim.Adafactor, [narrow, wide], 0.0001)
print("a float32 vector with gradients of size 0.0001: ", end="")
print(f"{before:.0%} listed before a bfloat16 vector, {behind:.0%} behind it")
sys.exit(not (all(as_seen) and before > 0.2 and behind < 0.01))
END
