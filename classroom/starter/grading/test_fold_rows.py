"""fold_rows(): c_attn's keys and values come out scaled, biases included, and its queries as they were.

What c_attn computes is looked at, not the logits, since those do not see everything: b_k never reaches them.
"""

import copy

import pytest
import torch
from conftest import check, close, draw, make_gpt

from merge import fold_rows


@pytest.fixture
def c_attn(dice):
    """A c_attn, and l_k, l_v (C,)."""
    C = 2 * int(dice.integers(2, 6))
    return make_gpt(dice, n_head=2, n_embd=C).double().transformer.h[0].attn.c_attn, draw(
        dice, 2, C, mean=1, spread=0.7
    )


def outputs(linear, x):
    """q, k, v of linear, each (T, C)."""
    return linear(x).split(linear.in_features, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("given", ["l_k", "l_v", "l_k and l_v"])
def test_keys_and_values_come_out_scaled(dice, c_attn, given):
    before, (l_k, l_v) = c_attn
    after, C = copy.deepcopy(before), before.in_features
    scales = l_k, l_v
    l_k, l_v = (l if name in given else None for name, l in (("l_k", l_k), ("l_v", l_v)))
    weight = after.weight
    fold_rows(after, l_k, l_v)
    check(after.weight is weight, "write into c_attn.weight, rather than putting another Parameter in its place")
    x, zero = draw(dice, 5, C), torch.zeros(1, C, dtype=torch.float64)
    was, now = outputs(before, x), outputs(after, x)
    was_bias, now_bias = outputs(before, zero), outputs(after, zero)
    check(torch.equal(was[0], now[0]), "the queries have changed: rows 0 to n_embd, W_q and b_q, have no vector")
    for name, l, other, i in (("k", l_k, scales[1], 1), ("v", l_v, scales[0], 2)):
        if l is None:
            check(torch.equal(was[i], now[i]), f"l_{name} is None, but the rows of W_{name} or b_{name} have changed")
            continue
        linear = now[i] - now_bias[i]  # W x alone
        check(
            not close(linear, (was[i] - was_bias[i]) * other),
            f"W_{name} is scaled by the other vector",
        )
        right_rows = all(close(linear[:, j], (was[i] - was_bias[i])[:, j] * l[j]) for j in range(C))
        words = f"with {given}: entry j of W_{name} x must come out l_{name}[j] times what it was"
        if not right_rows and close(linear, outputs(before, x * l)[i] - was_bias[i]):
            words = f"columns of W_{name} are scaled, l_{name} ⊙ x going in, but its rows make the outputs"
        check(right_rows, words)
        right_bias = close(now_bias[i], was_bias[i] * l)
        check(
            right_bias, f"b_{name} must be scaled by l_{name} as well: {name} = W_{name} x + b_{name}, and all of it is"
        )


@torch.no_grad()
def test_without_biases(dice):
    C = 8
    c_attn = make_gpt(dice, n_head=2, n_embd=C, bias=False).transformer.h[0].attn.c_attn
    x, l = draw(dice, 3, C).float(), draw(dice, C, mean=1.0).float()
    q, k, v = outputs(c_attn, x)
    fold_rows(c_attn, l, None)
    now = outputs(c_attn, x)
    check(c_attn.bias is None, "a c_attn without biases (bias None) must stay without")
    check(torch.equal(now[0], q) and torch.equal(now[2], v), "with l_k alone, queries or values have changed")
    check(torch.allclose(now[1], k * l, rtol=1e-4, atol=1e-5), "without biases (bias None) the keys come out wrong")


@torch.no_grad()
def test_dtypes_stay(dice, c_attn):
    linear, (l_k, l_v) = c_attn
    linear = linear.bfloat16()
    fold_rows(linear, l_k.float(), l_v.float())
    check(linear.weight.dtype == torch.bfloat16, "weights in bfloat16 must stay in bfloat16")
