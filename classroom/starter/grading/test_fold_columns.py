"""fold_columns() and merge(): the down-projection takes unscaled activations; a copy is merged, not the model."""

import copy

import pytest
import torch

import merge
from conftest import (
    SUBSETS,
    changed,
    check,
    check_digits,
    close,
    draw,
    draw_scales,
    draw_short,
    make_gpt,
    make_vectors,
    product,
    refused,
    runs,
    snapshot,
)
from ia3 import fingerprint
from model import GPT


@torch.no_grad()
def test_the_down_projection_scales_what_goes_in(dice):
    C = int(dice.integers(3, 9))
    before = torch.nn.Linear(4 * C, C).double()
    after = copy.deepcopy(before)
    weight, bias = after.weight, after.bias
    l_ff = draw_scales(dice, 4 * C)
    merge.fold_columns(after, None)
    check(torch.equal(after.weight, before.weight), "l_ff is None, but the weights have changed")
    words = "W_2' h must be W_2 (l_ff ⊙ h): entry j of h meets column j of W_2"
    runs(words, merge.fold_columns, after, l_ff)
    check(after.weight is weight, "write into c_proj.weight, rather than putting another Parameter in its place")
    stays = "b_2 must stay: it is added after the scaled activations went through W_2"
    check(torch.equal(after.bias, before.bias), stays)
    check(after.bias is bias, "leave linear.bias as it is, rather than putting another Parameter in its place")
    h = draw(dice, 5, 4 * C)
    check(not close(after(h), before(h)), "nothing is folded")
    check_digits(after(h), before(h * l_ff), "the columns of W_2")
    check(not close(after(h), before(h / l_ff)), "the columns of W_2 are divided by l_ff, but must be multiplied")
    check(not close(after(h), before(h * l_ff.abs())), "a negative entry of l_ff must stay negative")
    check(close(after(h), before(h * l_ff)), words)


@torch.no_grad()
def test_the_down_projection_in_bfloat16(dice):
    before = torch.nn.Linear(64, 16).bfloat16()  # so large, since roundings often agree by chance
    after, l_ff = copy.deepcopy(before), draw_short(dice, 64)
    merge.fold_columns(after, l_ff)
    check(after.weight.dtype == torch.bfloat16, "weights in bfloat16 must stay in bfloat16")
    words = "in bfloat16: round the product once, as scale does it; here the vector is rounded before it"
    check(torch.equal(after.weight, product(l_ff, before.weight)), words)


@pytest.fixture
def calls(monkeypatch):
    """fold_rows only notes what it was called with: the exercise in which it is written is another one."""
    calls = []
    monkeypatch.setattr(merge, "fold_rows", lambda linear, rows, l: calls.append((linear, rows, l)))
    return calls


def rows_folded(calls, c_attn):
    """What fold_rows was called with for c_attn: {the first row and the one after the last: l}."""
    found = {}
    for linear, rows, l in calls:
        if linear is c_attn:
            check(isinstance(rows, slice), f"fold_rows takes a slice of rows, not {rows!r}")
            part = range(c_attn.out_features)[rows]
            found[part.start, part.stop] = l
    return found


def make_task(dice):
    model = make_gpt(dice).double()
    model.ia3 = make_vectors(dice, model.config).requires_grad_()
    model.transformer.requires_grad_(False)
    model.ia3.fingerprint = fingerprint(model)
    model.tokenizer = "its tokenizer"
    return model


def state(model):
    """What merge must leave as it was in the model that it is given, by the words for it."""
    return {
        "its vectors": id(model.ia3),
        "its vectors' fingerprint": getattr(model.ia3, "fingerprint", None),
        "its mode, train or eval": [module.training for module in model.modules()],
        "which of its tensors are trainable": [p.requires_grad for p in model.parameters()],
        "its weights": [t.numpy().tobytes() for t in model.state_dict().values()],
    }


def check_left(model, before, what):
    now = state(model)
    other = [words for words in before if now[words] != before[words]]
    check(not other, f"{what} changed the model given, {(other or [''])[0]}: change a copy")


def test_merge(dice, calls):
    model = make_task(dice)
    vectors, before, was = model.ia3, snapshot(model), state(model)
    try:
        merged = merge.merge(model)
    except AttributeError:  # what comes of vectors that are gone
        check(model.ia3 is vectors, "merge took the vectors off the model given: take them off a copy")
        raise
    check(isinstance(merged, GPT) and merged is not model, "merge must return another GPT, a copy with l_ff folded in")
    check_left(model, was, "merge")
    check(merged.ia3 is None, "what comes out is a plain GPT: its ia3 must be None")
    check(all(p.requires_grad for p in merged.parameters()), "every weight of the merged model must be trainable again")
    check(merged.tokenizer == model.tokenizer, "the merged model has lost the tokenizer")
    check(not merged.training, "the model was in eval mode, and what comes of merging it must be, too")
    C = model.config.n_embd
    h = draw(dice, 3, 4 * C)
    touched = set()
    for i, (ours, theirs) in enumerate(zip(merged.transformer.h, model.transformer.h, strict=True)):
        with torch.no_grad():
            out = ours.mlp.c_proj(h)
            right = [j for j, l in enumerate(vectors.l_ff) if close(out, theirs.mlp.c_proj(h * l))]
        words = f"layer {i} got the l_ff of layer {right[0]}" if right else f"l_ff[{i}] is not folded into layer {i}"
        check(right == [i], words)
        touched.add(f"transformer.h.{i}.mlp.c_proj.weight")
        folded = rows_folded(calls, ours.attn.c_attn)
        for name, rows, l in (("k", (C, 2 * C), vectors.l_k[i]), ("v", (2 * C, 3 * C), vectors.l_v[i])):
            words = f"block {i}: fold_rows must be called with the merged block's attn.c_attn, the rows of W_{name}"
            check(rows in folded, f"{words} ({rows[0]} to {rows[1]} here, where n_embd is {C}) and l_{name}")
            given = folded[rows]
            check(given is not None and torch.equal(given, l), f"block {i}: the rows of W_{name} get another vector")
        check(len(folded) == 2, f"block {i}: only the rows of W_k and W_v have a vector, not the queries'")
    n_layer = model.config.n_layer
    words = "fold_rows must be called twice per block, with c_attn, for W_k and for W_v (their biases go along)"
    check(len(calls) == 2 * n_layer, f"{words}: in {n_layer} blocks it was called {len(calls)} times")
    other = set(changed(merged, {name: t for name, t in before.items() if not name.startswith("ia3.")})) - touched
    check(not other, f"merging l_ff changes W_2 of every block, and nothing else: but {sorted(other)[:1]} has changed")
    check(merged.lm_head.weight is merged.transformer.wte.weight, "the head must still be tied to the embedding")


def test_a_model_in_train_mode(dice, calls):
    model = make_task(dice).train()
    was = state(model)
    merged = merge.merge(model)
    check_left(model, was, "merge")
    check(merged.training, "the model was in train mode, and what comes of merging it must be, too")


@pytest.mark.parametrize("sites", SUBSETS)
def test_merge_with_sites_left_out(dice, calls, sites):
    model = make_gpt(dice)
    model.ia3 = make_vectors(dice, model.config, sites)
    before = {name: t for name, t in snapshot(model).items() if not name.startswith("ia3.")}
    merged = runs(f"vectors of the sites {sites}: the others are None", merge.merge, model)
    if "ff" not in sites:
        check(not changed(merged, before), "without l_ff W_2 must stay")
    C = model.config.n_embd
    for block in merged.transformer.h:
        folded = rows_folded(calls, block.attn.c_attn)
        for site, rows in (("k", (C, 2 * C)), ("v", (2 * C, 3 * C))):
            words = f"l_{site} is None where it is left out, but the rows of W_{site} get a vector"
            check(site in sites or folded.get(rows) is None, words)


def test_what_cannot_be_merged_is_refused(dice, calls):
    """And the model given is left as it was."""
    wrong = {}
    wrong["a model without vectors"] = make_gpt(dice)
    model = wrong["a model with stacked vectors"] = make_gpt(dice)
    model.ia3 = make_vectors(dice, model.config, n_tasks=2)
    model = wrong["a model with another base's vectors (their fingerprint tells)"] = make_gpt(dice)
    model.ia3 = make_vectors(dice, model.config, fingerprint="0" * 64)
    for tensor in ("transformer.h.1.mlp.c_proj.weight", "ia3.l_ff"):
        model = wrong[f"NaN in {tensor}"] = make_task(dice)
        model.state_dict()[tensor].view(-1)[3] = float("nan")
    model = wrong["a product that overflows float32"] = make_task(dice).float()
    model.transformer.h[1].mlp.c_proj.weight[0, 0] = 1e38
    model.ia3.l_ff.data[1, 0] = 100
    model.ia3.fingerprint = fingerprint(model)
    for what, model in wrong.items():
        was = state(model)
        said = refused(what, merge.merge, model)
        check_left(model, was, f"{what} is refused, but merge")
        tensor = what.removeprefix("NaN in ")
        check(tensor == what or tensor in said, f"{what}: the error must name the tensor (check_finite does)")
