"""fold_columns() and merge(): the down-projection takes unscaled activations; a copy is merged, not the model."""

import copy

import pytest
import torch
from conftest import changed, check, close, draw, make_gpt, make_vectors, refused, snapshot

import merge
from model import GPT


@torch.no_grad()
def test_the_down_projection_scales_what_goes_in(dice):
    C = int(dice.integers(3, 9))
    before = torch.nn.Linear(4 * C, C).double()
    after, weight, l_ff = copy.deepcopy(before), None, draw(dice, 4 * C, mean=1.0, spread=0.7)
    weight = after.weight
    merge.fold_columns(after, None)
    check(torch.equal(after.weight, before.weight), "l_ff is None, but the weights have changed")
    merge.fold_columns(after, l_ff)
    check(after.weight is weight, "write into c_proj.weight, rather than putting another Parameter in its place")
    check(
        torch.equal(after.bias, before.bias), "b_2 must stay: it is added after the scaled activations went through W_2"
    )
    h = draw(dice, 5, 4 * C)
    check(not close(after(h), before(h)), "nothing is folded")
    words = "W_2' h must be W_2 (l_ff ⊙ h): entry j of h meets column j of W_2"
    check(close(after(h), before(h * l_ff)), words)


@pytest.fixture
def rows(monkeypatch):
    """fold_rows only notes what it was called with: the exercise in which it is written is another one."""
    calls = []
    monkeypatch.setattr(merge, "fold_rows", lambda *given: calls.append(given))
    return calls


def make_task(dice, **sizes):
    model = make_gpt(dice, **sizes).double()
    model.ia3 = make_vectors(dice, model.config).requires_grad_()
    model.transformer.requires_grad_(False)
    return model


def test_merge(dice, rows):
    model = make_task(dice)
    vectors, before = model.ia3, snapshot(model)
    try:
        merged = merge.merge(model)
    except AttributeError:  # what comes of vectors that are gone
        check(model.ia3 is vectors, "merge took the vectors off the model given: take them off a copy")
        raise
    check(isinstance(merged, GPT) and merged is not model, "merge must return another GPT, a copy with l_ff folded in")
    check(model.ia3 is vectors, "merge took the vectors off the model given: take them off a copy")
    words = "merge changed the model given in place"
    check(not changed(model, before), f"{words}, {(changed(model, before) or [''])[0]}: fold into a copy")
    check(merged.ia3 is None, "what comes out is a plain GPT: its ia3 must be None")
    check(all(p.requires_grad for p in merged.parameters()), "every weight of the merged model must be trainable again")
    touched, h = set(), draw(dice, 3, 4 * model.config.n_embd)
    for i, (ours, theirs) in enumerate(zip(merged.transformer.h, model.transformer.h, strict=True)):
        with torch.no_grad():
            out = ours.mlp.c_proj(h)
            right = [j for j, l in enumerate(vectors.l_ff) if close(out, theirs.mlp.c_proj(h * l))]
        words = f"layer {i} got the l_ff of layer {right[0]}" if right else f"l_ff[{i}] is not folded into layer {i}"
        check(right == [i], words)
        touched.add(f"transformer.h.{i}.mlp.c_proj.weight")
        call = [given for given in rows if given[0] is ours.attn.c_attn]
        check(len(call) == 1, f"fold_rows must be called once with the merged block {i}'s attn.c_attn")
        k, v = call[0][1:]
        words = f"fold_rows gets the wrong vectors for block {i}"
        check(torch.equal(k, vectors.l_k[i]) and torch.equal(v, vectors.l_v[i]), words)
    other = set(changed(merged, {name: t for name, t in before.items() if not name.startswith("ia3.")})) - touched
    check(not other, f"merging l_ff changes W_2 of every block, and nothing else: but {sorted(other)[:1]} has changed")
    check(merged.lm_head.weight is merged.transformer.wte.weight, "the head must still be tied to the embedding")


def test_merge_with_targets_left_out(dice, rows):
    model = make_gpt(dice)
    model.ia3 = make_vectors(dice, model.config, ("k",))
    before = snapshot(model)
    merged = merge.merge(model)
    check(
        not changed(merged, {n: t for n, t in before.items() if not n.startswith("ia3.")}), "without l_ff W_2 must stay"
    )
    check(
        all(given[2] is None for given in rows) and len(rows) == model.config.n_layer,
        "l_v is None where it is no target",
    )


def test_what_cannot_be_merged_is_refused(dice, rows):
    refused("a model without vectors", merge.merge, make_gpt(dice))
    model = make_gpt(dice)
    model.ia3 = make_vectors(dice, model.config, tasks=(2,))
    refused("a model with stacked vectors", merge.merge, model)
    for tensor in ("transformer.h.1.mlp.c_proj.weight", "ia3.l_ff"):
        model = make_task(dice)
        model.state_dict()[tensor].view(-1)[3] = float("nan")
        words = f"NaN in {tensor}"
        said = refused(words, merge.merge, model)
        check(tensor in said, f"{words}: the error must name the tensor (check_finite does)")
    model = make_task(dice).float()
    model.transformer.h[1].mlp.c_proj.weight[0, 0] = 1e38
    model.ia3.l_ff.data[1, 0] = 100
    refused("a product that overflows float32", merge.merge, model)
