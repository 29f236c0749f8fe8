#!/bin/bash
# optax 0.2.8's Muon on flax 0.12.8's attention: it trains the biases, and leaves the matrices to Adam.
#
# optax.contrib.muon takes every array with two axes for a matrix and gives all others to AdamW, as documented. Flax's
# attention stores its matrices with three axes, such as (width, heads, head's width), and the biases of queries, keys
# and values with two. So Muon orthogonalizes and decays the biases, as if heads were a matrix's rows, while all four
# matrices get Adam at Muon's learning rate and no weight decay. Nothing warns, and who compares Muon with Adam on such
# a model compares Adam with a mixture. muon_weight_dimension_numbers, which names a matrix's axes, puts it right.
#
# Output seen: a step's singular values, which Muon makes nearly equal, and whether weight_decay moves the weights
#                                 shape    largest / median singular value    weight decay
#   linen, query, kernel      (64, 4, 16)                              30.8              no
#   linen, query, bias            (4, 16)                               1.3             yes
#   linen, out, kernel        (4, 16, 64)                              30.8              no
#   linen, mlp, kernel          (64, 256)                               1.2             yes
#   nnx, query, kernel        (64, 4, 16)                              30.8              no
#   nnx, query, bias              (4, 16)                               1.3             yes
#   nnx, out, kernel          (4, 16, 64)                              30.8              no
#   query, its axes named     (64, 4, 16)                               1.3             yes
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    optax==0.2.8 flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from optax.contrib import MuonDimensionNumbers, muon

WIDTH = 64
x = jnp.zeros((1, 8, WIDTH))
of_linen = dict(linen.MultiHeadDotProductAttention(num_heads=4).init(jax.random.key(0), x)["params"])
of_linen["mlp"] = linen.Dense(4 * WIDTH).init(jax.random.key(0), x)["params"]
of_nnx = nnx.MultiHeadAttention(num_heads=4, in_features=WIDTH, decode=False, rngs=nnx.Rngs(0))
of_nnx = nnx.to_pure_dict(nnx.state(of_nnx, nnx.Param))


def step(shape, **settings):
    """Return the largest singular value of Muon's step over the median, and whether weight decay moves the weights."""
    optimizer = muon(0.1, weight_decay=0.1, **settings)
    weights = {"w": jnp.ones(shape)}
    state = optimizer.init(weights)
    decay, _ = optimizer.update({"w": jnp.zeros(shape)}, state, weights)
    update, _ = optimizer.update({"w": 2 + jax.random.normal(jax.random.key(1), shape)}, state, weights)
    update = np.asarray(update["w"] - decay["w"])
    sizes = np.linalg.svd(update if update.ndim == 2 else update.reshape(WIDTH, WIDTH))[1]
    return sizes.max() / np.median(sizes), bool(jnp.any(decay["w"] != 0))


def report(name, shape, **settings):
    ratio, decays = step(shape, **settings)
    print(f"{name:24s}{shape!s:>13s}{ratio:34.1f}{'yes' if decays else 'no':>16s}")
    return ratio < 3 and decays


print("                                shape    largest / median singular value    weight decay")
by_muon = {}
for library, weights in (("linen", of_linen), ("nnx", of_nnx)):
    for names in (("query", "kernel"), ("query", "bias"), ("out", "kernel"), ("mlp", "kernel")):
        if names[0] in weights:
            name = ", ".join((library, *names))
            by_muon[name] = report(name, weights[names[0]][names[1]].shape)
axes = {"w": MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))}
named = report("query, its axes named", of_linen["query"]["kernel"].shape, muon_weight_dimension_numbers=axes)
wanted = {name for name in by_muon if "bias" in name or "mlp" in name}
sys.exit(not (named and len(by_muon) == 7 and {name for name, found in by_muon.items() if found} == wanted))
END
