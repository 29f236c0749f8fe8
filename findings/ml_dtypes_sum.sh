#!/bin/bash
# ml_dtypes 0.6.0 with numpy 2.4.6: the mean of a thousand ones in bfloat16 is 0.256.
#
# For its own float16, numpy sums pairwise, and its mean accumulates in float32. For a dtype that a package adds, it
# adds one number after the other in that dtype. bfloat16 has 8 significant bits, so 256 + 1 rounds back to 256, where
# every sum of ones ends. No warning is given. torch's sum of the same numbers is right, and so is numpy's own dot.
#
# Output seen:
#   sum of 1000 ones    ml_dtypes 256    dot with ones 1000    torch 1000
#   mean                ml_dtypes 0.256  float16 1             torch 1
#   standard deviation  ml_dtypes 0.504  float16 0             torch 0
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    ml_dtypes==0.6.0 numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" - <<'END'
import sys

import ml_dtypes
import numpy as np
import torch

ones = np.ones(1000, ml_dtypes.bfloat16)
half = np.ones(1000, np.float16)
theirs = torch.ones(1000, dtype=torch.bfloat16)
total = float(ones.sum())
mean = float(ones.mean())
std = float(ones.std())
dot = float(np.dot(ones, ones))
torch_std = theirs.std(correction=0).item()
print(f"sum of 1000 ones    ml_dtypes {total:g}    dot with ones {dot:g}    torch {theirs.sum().item():g}")
print(f"mean                ml_dtypes {mean:.3f}  float16 {half.mean():g}             torch {theirs.mean().item():g}")
print(f"standard deviation  ml_dtypes {std:.3f}  float16 {half.std():g}             torch {torch_std:g}")
right = dot == 1000 and theirs.sum() == 1000 and half.mean() == 1 and torch_std == 0
sys.exit(not (total == 256 and round(mean, 3) == 0.256 and std > 0.5 and right))
END
