#!/bin/bash
# jax 0.10.2's and flax 0.12.8's FLOP counts: a scan over 12 layers counts as one layer.
#
# cost_analysis()["flops"] comes from XLA, which counts the body of a loop once, however often it runs. jax.lax.scan is
# such a loop, and stacks of equal layers and gradient accumulation are often written with it. Flax's tabulate shows
# the same number. So with the same weights and outputs a model seems to cost a twelfth, and a utilization (MFU)
# computed from that is a twelfth of the true one. The documentation calls the counts estimates which may change with
# the version, but does not mention loops.
#
# Output seen, in million FLOPs (the matrices alone: 100.7 for 12 layers)
#                                                loop     scan
#   12 layers, cost_analysis                    104.4      8.7
#   12 layers, flax's tabulate                  104.4      8.7
#   gradient of 8 micro-batches, summed          16.9      2.1
#   both compute the same outputs: yes
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import re
import sys

import jax
import jax.numpy as jnp
from flax import linen

LAYERS, WIDTH, TOKENS, BATCHES = 12, 64, 128, 8


class Layer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return x + linen.Dense(WIDTH)(linen.gelu(linen.Dense(4 * WIDTH)(x))), None


class Loop(linen.Module):
    @linen.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = Layer(name=f"layer_{i}")(x, None)
        return x


class Scan(linen.Module):
    @linen.compact
    def __call__(self, x):
        layers = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return layers(name="layers")(x, None)[0]


def count(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"] / 1e6


def report(name, loop, scan, times):
    print(f"{name:40s}{loop:9.1f}{scan:9.1f}")
    return abs(loop / scan / times - 1) < 0.1


x = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
scanned = Scan().init(jax.random.key(1), x)
looped = {f"layer_{i}": jax.tree.map(lambda w, i=i: w[i], scanned["params"]["layers"]) for i in range(LAYERS)}
models = (Loop(), {"params": looped}), (Scan(), scanned)
print("                                             loop     scan")
forward = [count(m.apply, weights, x) for m, weights in models]
as_seen = [report("12 layers, cost_analysis", *forward, LAYERS)]
tables = [linen.tabulate(m, jax.random.key(0), compute_flops=True)(x) for m, _ in models]
tabulated = [int(re.search(r"\d{6,}", table)[0]) / 1e6 for table in tables]
as_seen.append(report("12 layers, flax's tabulate", *tabulated, LAYERS))
grad = jax.grad(lambda w, x: jnp.square(x @ w).sum())
w, batches = jnp.zeros((WIDTH, WIDTH)), jnp.zeros((BATCHES, TOKENS, WIDTH))
loop = count(lambda w, batches: sum(grad(w, x) for x in batches), w, batches)
scan = count(lambda w, batches: jax.lax.scan(lambda g, x: (g + grad(w, x), None), w * 0, batches)[0], w, batches)
as_seen.append(report("gradient of 8 micro-batches, summed", loop, scan, BATCHES))
outputs = [m.apply(weights, x) for m, weights in models]
same = bool(jnp.allclose(*outputs, atol=1e-4))
print("both compute the same outputs:", "yes" if same else "no")
sys.exit(not (same and all(as_seen)))
END
