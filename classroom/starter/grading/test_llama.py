"""A LLaMA's block against the formula, softmax(R(Q) R(l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V), and how it is folded."""

import math

import pytest
import torch
from torch.nn import functional as F

import llama
import merge
from conftest import check, check_digits, close, draw, draw_scales, draw_short, product, runs


def make_config(dice, group):
    """group heads of queries share one of keys and values; and biases, which no Llama has to have."""
    n_kv_head = int(dice.integers(1, 4))
    n_head = group * n_kv_head
    return llama.LlamaConfig(
        block_size=8,
        vocab_size=31,
        n_layer=1,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_head * 2 * int(dice.integers(1, 4)),
        n_hidden=8 * n_head + int(dice.integers(1, 9)),
        rope_base=100.0,
        norm_eps=1e-5,
        tied=True,
        attention_bias=True,
        mlp_bias=True,
    )


@pytest.fixture
def sizes(dice, monkeypatch):
    """A config; and Llamas can be made, whether or not widths is done: it has a test of its own."""
    config = make_config(dice, group=int(dice.integers(2, 4)))
    width = config.n_kv_head * (config.n_embd // config.n_head)
    monkeypatch.setattr(llama.LlamaConfig, "widths", (width, width, config.n_hidden))
    return config


def fill(dice, module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(dice, *p.shape, spread=0.5))
    return module.double().eval()


@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_widths(dice, group):
    config = make_config(dice, group)
    d_head = config.n_embd // config.n_head
    heads = f"{config.n_head} heads of queries and {config.n_kv_head} of keys and values, {d_head} channels each"
    found = tuple(config.widths)
    words = (
        f"widths of l_k, l_v, l_ff: with n_embd = {config.n_embd}, {heads}, and an MLP of {config.n_hidden} channels,"
    )
    right = (config.n_kv_head * d_head, config.n_kv_head * d_head, config.n_hidden)
    check(found == right, f"{words} {found} cannot meet keys, values and hidden activations")
    whole = all(type(width) is int for width in found)
    check(whole, f"widths must be ints, to make tensors of, and {found} are not: divide by //")


def turn(x, cos, sin):
    """x (B, heads, T, d_head) turned: channels i and i + d_head/2 are a complex number, times cos + i·sin."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


def paper(attn, x, cos, sin, l_k, l_v, l_after):
    """The attention's output (B, T, C) by the formula, each head by itself; l_after scales keys after the rotation."""
    B, T, C = x.shape
    d = C // attn.n_head
    q = attn.q_proj(x).view(B, T, -1, d).transpose(1, 2)
    k, v = (t.view(B, T, -1, d).transpose(1, 2) for t in (l_k * attn.k_proj(x), l_v * attn.v_proj(x)))
    q, k = turn(q, cos, sin), turn(k, cos, sin) * l_after.view(-1, 1, d)
    future = torch.ones(T, T).triu(1).bool()
    heads = []
    for head in range(attn.n_head):
        theirs = head // (attn.n_head // attn.n_kv_head)  # the head of keys and values that it reads
        scores = (q[:, head] @ k[:, theirs].mT / math.sqrt(d)).masked_fill(future, -math.inf)
        heads.append(scores.softmax(-1) @ v[:, theirs])
    return attn.o_proj(torch.cat(heads, -1))


class NewCache:
    """A cache that holds nothing yet: attention sees the tokens that it is given, each up to itself."""

    def append(self, k, v):
        T = k.size(2)
        return k, v, torch.ones(T, T, dtype=torch.bool).tril()


@torch.no_grad()
@pytest.mark.parametrize("given", ["l_k alone", "l_v alone", "l_k and l_v"])
def test_the_attention(dice, sizes, given):
    attn = fill(dice, llama.CausalSelfAttention(sizes))
    x = draw(dice, 2, 5, sizes.n_embd)
    cos, sin = llama.rotary_table(sizes, torch.arange(5), torch.float64)
    width = attn.k_proj.out_features
    vectors = draw_scales(dice, 2, width)
    k, v = (l if name in given else None for name, l in zip(("l_k", "l_v"), vectors, strict=True))
    outputs = {
        f"with {given}": attn(x, cos, sin, k, v),
        f"with {given}, where there is a cache": attn(x, cos, sin, k, v, NewCache()),
        f"with {given}, in train mode": attn.train()(x, cos, sin, k, v),
    }
    ones = torch.ones(width, dtype=torch.float64)
    k, v = (ones if l is None else l for l in (k, v))
    right = paper(attn, x, cos, sin, k, v, ones)
    mistakes = {
        "nothing is scaled": (ones, ones, ones),
        "l_k acts after the rotation, and it must act before": (ones, v, k),
        "l_k and l_v are mixed up": (v, k, ones),
        "the keys are divided by l_k": (1 / k, v, ones),
        "the values are divided by l_v": (k, 1 / v, ones),
        "a negative entry of l_k must stay negative": (k.abs(), v, ones),
        "a negative entry of l_v must stay negative": (k, v.abs(), ones),
        "negative entries of l_k and l_v must stay negative": (k.abs(), v.abs(), ones),
    }
    for what, out in outputs.items():
        if close(out, right):
            continue
        check_digits(out, right, what)
        why = [words for words, scales in mistakes.items() if close(out, paper(attn, x, cos, sin, *scales))]
        check(False, f"{what}: {(why or ['the output is not softmax(R(Q) R(l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V)'])[0]}")


@torch.no_grad()
def test_the_mlp(dice, sizes):
    mlp = fill(dice, llama.MLP(sizes))
    x, l_ff = draw(dice, 2, 3, sizes.n_embd), draw_scales(dice, sizes.n_hidden)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)

    def scaled(l, before=1):
        return mlp.down_proj(before * gate * torch.sigmoid(before * gate) * up * l)

    right = scaled(l_ff)
    mistakes = {
        "nothing is scaled": scaled(1),
        "l_ff acts before the silu, but it must act after it": scaled(1, before=l_ff),
        "the activations are divided by l_ff": scaled(1 / l_ff),
        "a negative entry of l_ff must stay negative": scaled(l_ff.abs()),
        "l_ff acts twice": scaled(l_ff * l_ff),
    }
    for what, out in {"with l_ff": mlp(x, l_ff), "with l_ff, in train mode": mlp.train()(x, l_ff)}.items():
        if close(out, right):
            continue
        check_digits(out, right, what)
        why = [words for words, wrong in mistakes.items() if close(out, wrong)]
        check(False, f"{what}: {(why or ['the output is not W_down (l_ff ⊙ silu(W_gate x) ⊙ W_up x)'])[0]}")


def test_gradients_flow_and_a_row_may_have_vectors_of_its_own(dice, sizes):
    attn, mlp = fill(dice, llama.CausalSelfAttention(sizes)), fill(dice, llama.MLP(sizes))
    x = draw(dice, 2, 4, sizes.n_embd)
    cos, sin = llama.rotary_table(sizes, torch.arange(4), torch.float64)
    vectors = [draw(dice, 2, 1, width, mean=1.0, spread=0.7).requires_grad_() for width in sizes.widths]
    l_k, l_v, l_ff = vectors
    words = "a vector may be (B, 1, width), one task per row"
    attended = runs(words, attn, x, cos, sin, l_k, l_v)
    hidden = runs(words, mlp, x, l_ff)
    for b in range(2):
        alone = attn(x[b : b + 1], cos, sin, l_k[b, 0], l_v[b, 0])[0], mlp(x[b : b + 1], l_ff[b, 0])[0]
        right = close(attended[b], alone[0]) and close(hidden[b], alone[1])
        check(right, "where vectors are (B, 1, width), one task per row, row b of the batch must have those of b")
    total = attended.square().sum() + hidden.square().sum()
    check(total.requires_grad, "no gradient reaches the vectors")
    runs("make new tensors: do not change k, v or h in place", total.backward)
    for name, l in zip(("l_k", "l_v", "l_ff"), vectors, strict=True):
        check(l.grad is not None and bool(l.grad.abs().max() > 0), f"no gradient reaches {name}")


@torch.no_grad()
def test_a_base_in_bfloat16(dice, sizes, monkeypatch):
    """A single token's attention hands on its value, and an o_proj of the identity, too; down_proj, n_embd channels.

    At position 0 nothing is turned, so the keys that the attention is given are l_k ⊙ K. l_ff may scale the product of
    gate and up or either factor: the three are one function, and in bfloat16 they round at different places.
    """
    C, width = sizes.n_embd, sizes.n_kv_head * (sizes.n_embd // sizes.n_head)
    attn, mlp = fill(dice, llama.CausalSelfAttention(sizes)).bfloat16(), fill(dice, llama.MLP(sizes)).bfloat16()
    for linear in (attn.o_proj, mlp.down_proj):
        linear.weight.copy_(torch.eye(*linear.weight.shape))
        linear.bias.zero_()
    x = draw(dice, 32, 1, C).bfloat16()  # so many, since roundings often agree by chance
    cos, sin = llama.rotary_table(sizes, torch.arange(1), torch.bfloat16)
    l_k, l_v, l_ff = draw_short(dice, width), draw_short(dice, width), draw_short(dice, sizes.n_hidden)
    attention = F.scaled_dot_product_attention
    keys = []  # (B, 1, width) each

    def spy(q, k, v, **options):
        keys.append(k.transpose(1, 2).flatten(2))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    words = "on a base in bfloat16 {} must be taken in float32 and rounded once, to bfloat16"
    runs(words.format("products"), attn, x, cos, sin, l_k)
    values = runs(words.format("products"), attn, x, cos, sin, None, l_v)  # and keys that are not scaled
    hidden = runs(words.format("products"), mlp, x, l_ff)
    d = C // sizes.n_head
    each = l_v.view(-1, 1, d).expand(-1, sizes.n_head // sizes.n_kv_head, d).flatten()
    check(torch.equal(keys[0], product(l_k, keys[1])), words.format("l_k ⊙ K"))
    check(torch.equal(values, product(each, attn(x, cos, sin))), words.format("l_v ⊙ V"))
    gate, up = F.silu(mlp.gate_proj(x)), mlp.up_proj(x)
    places = (product(l_ff, gate * up), product(l_ff, gate) * up, gate * product(l_ff, up))
    check(any(torch.equal(hidden, mlp.down_proj(h)) for h in places), words.format("l_ff's product"))


def test_the_fold(dice, sizes, monkeypatch):
    """fold_rows and fold_columns only note what they are called with: they are other exercises."""
    block = llama.Block(sizes)
    calls = []
    monkeypatch.setattr(merge, "fold_rows", lambda linear, rows, l: calls.append(("fold_rows", linear, rows, l)))
    monkeypatch.setattr(merge, "fold_columns", lambda linear, l: calls.append(("fold_columns", linear, l)))
    l_k, l_v, l_ff = (draw(dice, width) for width in sizes.widths)
    merge.fold_llama(block, l_k, l_v, l_ff)
    names = {module: name for name, module in block.named_modules()}
    found = {}
    for function, linear, *rows, l in calls:
        whole = not rows or range(linear.out_features)[rows[0]] == range(linear.out_features)
        check(whole, f"{names[linear]} makes only what is scaled: fold all of its rows, slice(None)")
        found[names[linear]] = function, id(l)
    places = [("self_attn.k_proj", "fold_rows", l_k), ("self_attn.v_proj", "fold_rows", l_v)]
    if "mlp.down_proj" in found:  # the same function
        places.append(("mlp.down_proj", "fold_columns", l_ff))
    else:
        places.append(("mlp.up_proj", "fold_rows", l_ff))
    for name, function, l in places:
        right = found.get(name) == (function, id(l))
        words = f"{name} needs a call of {function} with the vector of what it makes (rows) or takes (columns)"
        check(right, words)
    check(len(calls) == 3, f"three maps take a vector, and {len(calls)} calls were made, for {sorted(found)}")
