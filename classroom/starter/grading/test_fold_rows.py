"""fold_rows(): the outputs that the rows make come out scaled, biases included, and all others as they were.

What c_attn computes is looked at, not the logits.
"""

import copy

import pytest
import torch

from conftest import check, check_digits, close, draw, draw_scales, draw_short, make_gpt, product, runs
from merge import fold_rows


@pytest.fixture
def c_attn(dice):
    """A c_attn in float64, and a vector (C,)."""
    C = 2 * int(dice.integers(2, 6))
    linear = make_gpt(dice, n_head=2, n_embd=C).double().transformer.h[0].attn.c_attn
    return linear, draw_scales(dice, C)


@torch.no_grad()
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_or_values_come_out_scaled(dice, c_attn, name):
    before, l = c_attn
    C = before.in_features
    rows = slice(C, 2 * C) if name == "k" else slice(2 * C, 3 * C)
    others = [i for i in range(3 * C) if i not in range(3 * C)[rows]]
    after = copy.deepcopy(before)
    weight, bias = after.weight, after.bias
    fold_rows(after, rows, None)
    check(torch.equal(after.weight, before.weight), "l is None, but the weights have changed")
    check(torch.equal(after.bias, before.bias), "l is None, but the bias has changed")
    runs(f"l is (C,), and entry j must meet row j of W_{name}", fold_rows, after, rows, l)
    check(after.weight is weight, "write into linear.weight, rather than putting another Parameter in its place")
    check(after.bias is bias, "write into linear.bias, rather than putting another Parameter in its place")

    x = draw(dice, 5, C)
    zero = torch.zeros(1, C, dtype=torch.float64)
    words = f"with the rows of W_{name}, {rows.start} to {rows.stop}, outputs of other rows have changed"
    check(torch.equal(after(x)[:, others], before(x)[:, others]), words)
    was_bias, now_bias = before(zero)[:, rows], after(zero)[:, rows]
    was, now = before(x)[:, rows] - was_bias, after(x)[:, rows] - now_bias  # W x alone
    columns = before(x * l)[:, rows] - was_bias
    words = f"columns of W_{name} are scaled, l_{name} ⊙ x going in, but its rows make the outputs"
    check(close(now, was * l) or not close(now, columns), words)
    check_digits(now, was * l, f"the rows of W_{name}")
    check(not close(now, was / l), f"the rows of W_{name} are divided by l_{name}, but must be multiplied")
    check(not close(now, was * l.abs()), f"a negative entry of l_{name} must stay negative")
    check(close(now, was * l), f"entry j of W_{name} x must come out l_{name}[j] times what it was")
    words = f"b_{name} must be scaled by l_{name} as well: {name} = W_{name} x + b_{name}, and all of it is"
    check(close(now_bias, was_bias * l), words)


@torch.no_grad()
def test_all_rows(dice):
    before = torch.nn.Linear(4, 7).double()
    after, x, l = copy.deepcopy(before), draw(dice, 3, 4), draw_scales(dice, 7)
    words = "rows may be slice(None), all of them, as in a Llama: index with rows, do not read its start and stop"
    runs(words, fold_rows, after, slice(None), l)
    check(close(after(x), before(x) * l), words)


@torch.no_grad()
def test_without_biases(dice):
    C = 8
    linear = make_gpt(dice, n_head=2, n_embd=C, bias=False).double().transformer.h[0].attn.c_attn
    x, l = draw(dice, 3, C), draw_scales(dice, C)
    was = linear(x)
    words = "a linear map may have no biases (linear.bias is None): look before you scale them"
    runs(words, fold_rows, linear, slice(C, 2 * C), l)
    check(linear.bias is None, "a linear map without biases (bias None) must stay without")
    check(close(linear(x)[:, C : 2 * C], was[:, C : 2 * C] * l), "without biases (bias None) the keys come out wrong")


@torch.no_grad()
def test_in_bfloat16(dice):
    C = 64  # so many, since roundings often agree by chance
    before = make_gpt(dice, n_head=2, n_embd=C).bfloat16().transformer.h[0].attn.c_attn
    after, l, rows = copy.deepcopy(before), draw_short(dice, C), slice(C, 2 * C)
    fold_rows(after, rows, l)
    check(after.weight.dtype == torch.bfloat16, "weights in bfloat16 must stay in bfloat16")
    words = "in bfloat16: round the product once, as scale does it; here the vector is rounded before it"
    check(torch.equal(after.weight[rows], product(l.unsqueeze(1), before.weight[rows])), f"the weight {words}")
    check(torch.equal(after.bias[rows], product(l, before.bias[rows])), f"the bias {words}")
