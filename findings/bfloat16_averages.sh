#!/bin/bash
# torch 2.13.0 and optax 0.2.8: in bfloat16, averages with a decay of 0.999 never forget.
#
# Both keep an average in the dtype of the weights. bfloat16's neighbours are 0.4 to 0.8% apart, so 0.999 times a number
# rounds back to that number. AdamW's second moment can rise, but never fall: one large gradient, as at the start of
# training, makes all later steps too small. Without one they are too large, since the average stops at half its value.
# An average of the weights (EMA) stays at the first ones, so an untrained model is evaluated. In float32 all is right,
# and so it is with a beta2 of 0.95. Neither documentation says so; optax's mu_dtype is for the first moment only.
#
# Output seen
#                                                             float32   bfloat16
#   torch AdamW, 6,000 gradients of 1: last step / lr            1.00       1.39
#   torch AdamW, after one of 100: last step / lr                0.99       0.33
#   optax adamw, 6,000 gradients of 1: last step / lr            1.00       1.38
#   optax adamw, after one of 100: last step / lr                0.99       0.32
#   torch AdamW, after one of 100, beta2 0.95                    1.00       1.01
#   torch AveragedModel: 1 at first, then 6,000 times 2          2.00       1.00
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import sys

import jax
import jax.numpy as jnp
import optax
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = 6000


def torch_adamw(dtype, first, beta2=0.999):
    """Return the last step over the learning rate. The weight is 0 before every step, so no step is rounded away."""
    w = torch.nn.Parameter(torch.zeros(1, dtype=getattr(torch, dtype)))
    optimizer = torch.optim.AdamW([w], lr=1.0, betas=(0.9, beta2))
    for gradient in [first] + STEPS * [1.0]:
        w.data.zero_()
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    return -w.item()


def optax_adamw(dtype, first):
    w = jnp.zeros(1, dtype)
    optimizer = optax.adamw(1.0)
    state, update = optimizer.init(w), jax.jit(optimizer.update)
    for gradient in [first] + STEPS * [1.0]:
        change, state = update(jnp.full(1, gradient, dtype), state, w)
    return -float(change[0])


def averaged_model(dtype):
    model = torch.nn.Linear(1, 1, bias=False, dtype=getattr(torch, dtype))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for value in [1.0] + STEPS * [2.0]:
        model.weight.data.fill_(value)
        average.update_parameters(model)
    return average.module.weight.item()


def report(name, f, *args):
    found = f("float32", *args), f("bfloat16", *args)
    print(f"{name:54s}{found[0]:11.2f}{found[1]:11.2f}")
    return round(found[0], 1), round(found[1], 1)


print("                                                          float32   bfloat16")
found = [
    report("torch AdamW, 6,000 gradients of 1: last step / lr", torch_adamw, 1.0),
    report("torch AdamW, after one of 100: last step / lr", torch_adamw, 100.0),
    report("optax adamw, 6,000 gradients of 1: last step / lr", optax_adamw, 1.0),
    report("optax adamw, after one of 100: last step / lr", optax_adamw, 100.0),
    report("torch AdamW, after one of 100, beta2 0.95", torch_adamw, 100.0, 0.95),
    report("torch AveragedModel: 1 at first, then 6,000 times 2", averaged_model),
]
sys.exit(found != [(1, 1.4), (1, 0.3), (1, 1.4), (1, 0.3), (1, 1), (2, 1)])
END
