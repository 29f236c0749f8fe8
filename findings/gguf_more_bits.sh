#!/bin/bash
# gguf 0.19.0's quantizers, the same bytes as llama.cpp's: more bits a weight can mean a larger error.
#
# Q4_0 keeps a block of 32 weights as a float16 scale and 4 bits each, and one of its 16 levels is 0. Q4_1 and Q5_1
# spread their levels from the block's smallest weight to its largest, and 0 need not be among them: of a matrix of
# which nine tenths are pruned to 0, they make every zero a small number.
# Q8_0's scale is the largest weight over 127, Q4_0's is that weight over 8. So Q8_0's falls below what float16 can
# hold first: of weights of 1e-6 it keeps nothing, where Q4_0 still keeps their sizes.
#
# Output seen (errors as a share of the weights' own root mean square):
#   format  bits    pruned: error  zeros kept    N(0, 1e-6): error
#   Q4_0    4.5             5.0%        100%                10.5%
#   Q4_1    5.0            11.1%         21%                16.5%
#   Q5_0    5.5             2.4%        100%                12.5%
#   Q5_1    6.0             5.4%         21%                29.0%
#   Q8_0    8.5             0.3%        100%                99.9%
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

dice = np.random.default_rng(0)
weights = dice.standard_normal((256, 1024)).astype(np.float32)
pruned = np.where(dice.random(weights.shape) < 0.9, 0, weights).astype(np.float32)
small = weights * np.float32(1e-6)


def error(before, after):
    """The root mean square error, as a share of the weights' own root mean square."""
    return np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))


found = {}
print("format  bits    pruned: error  zeros kept    N(0, 1e-6): error")
for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
    kind = GGMLQuantizationType[name]
    n_weights, n_bytes = GGML_QUANT_SIZES[kind]
    after = dequantize(quantize(pruned, kind), kind)
    kept = np.mean(after[pruned == 0] == 0)
    errors = error(pruned, after), error(small, dequantize(quantize(small, kind), kind))
    found[name] = errors
    print(f"{name}    {8 * n_bytes / n_weights:.1f}    {errors[0]:13.1%}  {kept:10.0%}    {errors[1]:17.1%}")
worse_pruned = found["Q4_1"][0] > 1.5 * found["Q4_0"][0] and found["Q5_1"][0] > found["Q5_0"][0]
sys.exit(not (worse_pruned and found["Q8_0"][1] > 0.9 and found["Q4_0"][1] < 0.2))
END
