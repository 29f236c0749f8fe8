"""W_2 (l_ff ⊙ γ(W_1 x + b_1)) + b_2, against the formula, one number at a time."""

import math

import pytest
import torch

from conftest import check, check_digits, close, draw, draw_scales, draw_short, make_gpt, product, runs


def gelu(u):
    return 0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def paper(mlp, x, before, after):
    """The MLP's output (B, T, C) with scales before and after the GELU, each (B, 4C)."""
    up, before, after = (t.tolist() for t in (mlp.c_fc(x), before, after))
    h = [
        [[gelu(u * l) * m for u, l, m in zip(us, ls, ms, strict=True)] for us in row]
        for row, ls, ms in zip(up, before, after, strict=True)
    ]
    return mlp.c_proj(torch.tensor(h, dtype=x.dtype))


@pytest.fixture
def mlp(dice):
    """An MLP, its input (B, T, C), and a vector (B, 4C)."""
    model = make_gpt(dice, n_head=2, n_embd=2 * int(dice.integers(2, 5))).double()
    C = model.config.n_embd
    return model.transformer.h[0].mlp, draw(dice, 2, 3, C), draw_scales(dice, 2, 4 * C)


def compare(mlp, x, l, out, what):
    ones = torch.ones_like(l)
    right = paper(mlp, x, ones, l)
    if close(out, right):
        return
    check_digits(out, right, what)
    scales = {
        "nothing is scaled": (ones, ones),
        "l_ff acts before the GELU, but γ(l_ff ⊙ u) is not l_ff ⊙ γ(u)": (l, ones),
        "l_ff acts twice": (l, l),
        "l_ff acts twice, after the GELU": (ones, l * l),
        "1 is added to l_ff": (ones, 1 + l),
        "the activations are divided by l_ff": (ones, 1 / l),
        "a negative entry of l_ff must stay negative": (ones, l.abs()),
    }
    why = [words for words, both in scales.items() if close(out, paper(mlp, x, *both))]
    check(False, f"{what}: {(why or ['the output is not W_2 (l_ff ⊙ γ(W_1 x + b_1)) + b_2'])[0]}")


@torch.no_grad()
def test_the_formula(mlp):
    mlp, x, l_ff = mlp
    check(close(mlp(x), paper(mlp, x, *[torch.ones_like(l_ff)] * 2)), "without a vector it is no longer the base")
    row = l_ff[:1].expand(len(x), -1)
    compare(mlp, x, row, mlp(x, l_ff[0]), "with l_ff")
    compare(mlp, x, row, mlp.train()(x, l_ff[0]), "with l_ff, in train mode")
    compare(mlp, x, l_ff, mlp(x, l_ff.unsqueeze(1)), "with l_ff of shape (B, 1, 4·n_embd), one task per row")


def test_gradients_flow_and_nothing_given_is_changed(mlp):
    mlp, x, l_ff = mlp
    l = l_ff[0].clone().requires_grad_()
    given = x.clone(), l.clone()
    runs("make a new tensor: do not change h in place", lambda: mlp(x, l).square().sum().backward())
    check(all(map(torch.equal, given, (x, l))), "the input or the vector was changed in place")
    check(l.grad is not None and bool(l.grad.abs().max() > 0), "no gradient reaches l_ff")


@torch.no_grad()
def test_a_base_in_bfloat16(dice, mlp):
    """The down-projection is made to hand on C of the 4·C channels as they are."""
    mlp = mlp[0].bfloat16()
    C = mlp.c_proj.out_features
    first = C * int(dice.integers(4))
    mlp.c_proj.weight.zero_()
    mlp.c_proj.weight[:, first : first + C] = torch.eye(C)
    mlp.c_proj.bias.zero_()
    x, l = draw(dice, 32, 1, C).bfloat16(), draw_short(dice, 4 * C)  # so many, since roundings often agree by chance
    before = mlp(x)
    words = "on a base in bfloat16 the scaled activations must be bfloat16 again: c_proj takes only its own dtype"
    after = runs(words, mlp, x, l)
    check(after.dtype == torch.bfloat16, words)
    words = "take the product in the wider dtype, float32, and round that, once: here the vector itself is rounded"
    right = torch.equal(after, product(l[first : first + C], before))
    check(right, f"on a base in bfloat16: {words}, or the product twice")
