"""softmax(Q (l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V), against the formula, one number at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from conftest import check, check_digits, close, draw, draw_scales, draw_short, make_gpt, product, runs


def paper(attn, x, l_q, l_k, l_v):
    """The attention's output (B, T, C) by the formula, with a scale for the queries too. l_*: (B, C)."""
    B, T, C = x.shape
    d = C // attn.n_head
    qkv, l_q, l_k, l_v = (t.tolist() for t in (attn.c_attn(x), l_q, l_k, l_v))
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for head in (range(h * d, h * d + d) for h in range(attn.n_head)):
                scores = []
                for s in range(t + 1):
                    score = sum(qkv[b][t][i] * l_q[b][i] * (qkv[b][s][C + i] * l_k[b][i]) for i in head)
                    scores.append(score / math.sqrt(d))
                e = [math.exp(score - max(scores)) for score in scores]  # exp overflows at 710
                for i in head:
                    y[b, t, i] = sum(a / sum(e) * (qkv[b][s][2 * C + i] * l_v[b][i]) for s, a in enumerate(e))
    return attn.c_proj(y)


@pytest.fixture
def attn(dice):
    """An attention, its input (B, T, C), and two vectors (B, C)."""
    model = make_gpt(dice, n_head=2, n_embd=2 * int(dice.integers(2, 5))).double()
    C = model.config.n_embd
    return model.transformer.h[0].attn, draw(dice, 2, 4, C), *draw_scales(dice, 2, 2, C)


def compare(attn, x, l_k, l_v, out, what):
    ones = torch.ones(len(x), x.size(-1), dtype=x.dtype)
    k, v = (ones if l is None else l for l in (l_k, l_v))
    right = paper(attn, x, ones, k, v)
    if close(out, right):
        return
    check_digits(out, right, what)
    negative = "a negative entry of {} must stay negative"
    scales = {
        "nothing is scaled": (ones, ones, ones),
        "the queries are scaled too, but only keys and values have a vector": (k, k, v),
        "l_k and l_v are mixed up": (ones, v, k),
        "the keys are scaled twice": (ones, k * k, v),
        "the queries are scaled by l_v": (v, k, v),
        "the keys are divided by l_k": (ones, 1 / k, v),
        "the values are divided by l_v": (ones, k, 1 / v),
        negative.format("l_k"): (ones, k.abs(), v),
        negative.format("l_v"): (ones, k, v.abs()),
        negative.format("l_k and of l_v"): (ones, k.abs(), v.abs()),
    }
    why = [words for words, (q, k, v) in scales.items() if close(out, paper(attn, x, q, k, v))]
    check(False, f"{what}: {(why or ['the output is not softmax(Q (l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V)'])[0]}")


class NewCache:
    """A cache that holds nothing yet: attention sees the tokens that it is given, each up to itself."""

    def append(self, k, v):
        T = k.size(2)
        return k, v, torch.ones(T, T, dtype=torch.bool).tril()


@torch.no_grad()
@pytest.mark.parametrize("given", ["l_k alone", "l_v alone", "l_k and l_v"])
def test_the_formula(attn, given):
    attn, x, l_k, l_v = attn
    check(close(attn(x), paper(attn, x, *[torch.ones_like(l_k)] * 3)), "without vectors it is no longer the base")
    k, v = (l if name in given else None for name, l in (("l_k", l_k), ("l_v", l_v)))
    rows = [None if l is None else l[:1].expand(len(x), -1) for l in (k, v)]
    each = [None if l is None else l[0] for l in (k, v)]
    compare(attn, x, *rows, attn(x, *each), f"with {given}")
    compare(attn, x, *rows, attn(x, *each, NewCache()), f"with {given}, where there is a cache")
    compare(attn, x, *rows, attn.train()(x, *each), f"with {given}, in train mode")
    rows = [None if l is None else l.unsqueeze(1) for l in (k, v)]  # (B, 1, C): one task per row of the batch
    compare(attn, x, k, v, attn(x, *rows), f"with {given} of shape (B, 1, n_embd), one task per row")


def test_gradients_flow_and_nothing_given_is_changed(attn):
    attn, x, l_k, l_v = attn
    vectors = [l[0].clone().requires_grad_() for l in (l_k, l_v)]
    given = [t.clone() for t in (x, *vectors)]
    runs("make a new tensor: do not change k or v in place", lambda: attn(x, *vectors).square().sum().backward())
    check(all(map(torch.equal, given, (x, *vectors))), "the input or a vector was changed in place")
    for name, l in zip(("l_k", "l_v"), vectors, strict=True):
        check(l.grad is not None and bool(l.grad.abs().max() > 0), f"no gradient reaches {name}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["l_k", "l_v"])
def test_a_base_in_bfloat16(dice, attn, monkeypatch, name):
    """One token attends to itself alone, so the attention hands on its value, and so does a c_proj of the identity."""
    attn = attn[0].bfloat16()
    C = attn.c_proj.in_features
    attn.c_proj.weight.copy_(torch.eye(C))
    attn.c_proj.bias.zero_()
    attention = F.scaled_dot_product_attention
    seen = []

    def spy(q, k, v, **options):
        seen.append([t.transpose(1, 2).flatten(2) for t in (q, k)])  # (B, 1, C)
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x, l = draw(dice, 32, 1, C).bfloat16(), draw_short(dice, C)  # so many, since roundings often agree by chance
    before = attn(x)
    words = "on a base in bfloat16 the scaled keys and values must have the keys' and values' dtype, bfloat16 again"
    after = runs(words, lambda: attn(x, **{name: l}))
    check(after.dtype == torch.bfloat16, words)
    if name == "l_v":
        right = torch.equal(after, product(l, before))
    else:  # or on the queries
        (q, k), (q_now, k_now) = seen
        right = torch.equal(k_now, product(l, k)) or torch.equal(q_now, product(l, q))
    words = "take the product in the wider dtype, float32, and round that, once: here the vector itself is rounded"
    check(right, f"on a base in bfloat16, with {name}: {words}, or the product twice")
