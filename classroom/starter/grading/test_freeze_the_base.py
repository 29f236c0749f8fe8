"""attach(): the base is frozen, the vectors are what is trained, and another base's vectors are refused."""

from dataclasses import replace

import pytest
import torch

from conftest import Other, changed, check, make_gpt, make_vectors, refused, runs, snapshot
from ia3 import IA3, attach, fingerprint


def test_only_the_vectors_are_trained(dice):
    model = make_gpt(dice)
    before = snapshot(model)
    vectors = make_vectors(dice, model.config).requires_grad_(False)
    values = snapshot(vectors)
    check(attach(model, vectors) is vectors, "attach must return the vectors")
    check(model.ia3 is vectors, "attach must set model.ia3 to the vectors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    base = sorted(name for name in trained if not name.startswith("ia3."))
    check(not base, f"the base is left trainable: {len(base)} of its tensors, such as {(base or [''])[0]}")
    check(
        trained == {"ia3.l_k", "ia3.l_v", "ia3.l_ff"}, f"l_k, l_v and l_ff must be trainable, but of them are {trained}"
    )
    check(not changed(model, before) and not changed(vectors, values), "attach must not change a value")
    check(vectors.fingerprint == fingerprint(model), "vectors.fingerprint must be the fingerprint of the base")


def test_vectors_that_were_there_before_stay_trainable(dice):
    model = make_gpt(dice)
    first, second = (make_vectors(dice, model.config) for _ in range(2))
    attach(model, first)
    attach(model, second)
    check(model.ia3 is second, "attaching other vectors must replace those of before")
    words = "vectors attached before belong to their holder: freeze the base, not them"
    check(all(p.requires_grad for p in first.parameters()), words)


@pytest.mark.parametrize("sites", [("k", "v", "ff"), ("v",), ("k", "ff")])
def test_vectors_are_made_where_none_are_given(dice, given_start, sites):
    model = make_gpt(dice)
    vectors = attach(model, sites=sites)
    check(isinstance(vectors, IA3) and model.ia3 is vectors, "attach(model) must make an IA3 and set model.ia3 to it")
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {f"ia3.l_{site}" for site in sites}
    check(found == wanted, f"attach(model, sites={sites}) leaves trainable: {sorted(found)}")


def test_a_base_that_is_not_a_gpt2(dice):
    """A Llama is not, either; here only what attach may know of it is there."""
    model = Other(dice, (6, 6, 11))
    attach(model, make_vectors(dice, model.config))
    free = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("ia3.")]
    check(not free, f"in a base that is not a GPT-2 (a Llama, say) {(free or [''])[0]} is left trainable")
    for widths in ((4, 6, 11), (6, 4, 11), (6, 6, 10)):
        vectors = make_vectors(dice, Other(dice, widths).config)
        words = f"vectors for widths {widths} on a base of {model.config.widths}, both with n_embd 8 (compare widths)"
        refused(words, attach, model, vectors)


def test_what_does_not_belong_to_the_base_is_refused(dice):
    """And nothing is changed: a model that refuses keeps what it had, and so do the vectors."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8}
    model, other = make_gpt(dice, **sizes), make_gpt(dice, **sizes)
    held = model.ia3 = make_vectors(dice, model.config)
    wrong = {
        "vectors of another base of the same shape (vectors.fingerprint tells)": make_vectors(
            dice, other.config, fingerprint=fingerprint(other)
        ),
        "something that is not an IA3 (here a dict of matrices)": snapshot(held),
    }
    for change in ({"n_layer": 3}, {"n_embd": 12}):
        wrong[f"vectors for a base of another shape ({change})"] = make_vectors(
            dice, make_gpt(dice, **(sizes | change)).config
        )
    wrong["a site that there is not, 'q'"] = None
    for what, vectors in wrong.items():
        theirs = getattr(vectors, "fingerprint", None)
        given = {"vectors": vectors} if vectors is not None else {"sites": ("q",)}
        refused(what, lambda given=given: attach(model, **given))
        check(
            model.ia3 is held, f"{what}: refused, but the vectors of before are gone. Look before you change anything"
        )
        words = f"{what}: refused, but the base is frozen. Look before you change anything"
        check(all(p.requires_grad for p in model.parameters()), words)
        words = f"{what}: refused, but they remember this base now. Look before you change anything"
        check(getattr(vectors, "fingerprint", None) == theirs, words)


def test_a_stack_may_be_attached(dice):
    model = make_gpt(dice)
    stacked = make_vectors(dice, model.config, n_tasks=2)
    check(runs("stacked vectors may be attached", attach, model, stacked) is stacked, "attach must return the vectors")


def test_vectors_and_sites_at_once_are_refused(dice):
    model = make_gpt(dice)
    vectors = make_vectors(dice, model.config)
    refused("vectors and sites at once", lambda: attach(model, vectors, sites=("k", "v", "ff")))


def test_another_block_size_or_dropout_is_no_other_base(dice):
    model = make_gpt(dice)
    config = replace(model.config, block_size=4, dropout=0.1)
    words = "refused: vectors of a config with another block_size and dropout. Compare n_layer, widths and fingerprints"
    runs(words, attach, model, make_vectors(dice, config, fingerprint=fingerprint(model)))


def test_vectors_are_float32_whatever_they_were(dice):
    model = make_gpt(dice)
    attach(model, make_vectors(dice, model.config).bfloat16())
    words = "vectors that were given in bfloat16 must become float32"
    check({p.dtype for p in model.ia3.parameters()} == {torch.float32}, words)


def test_vectors_stay_float32_on_a_base_in_bfloat16(dice):
    model = make_gpt(dice).bfloat16()
    attach(model, make_vectors(dice, model.config))
    check({p.dtype for p in model.ia3.parameters()} == {torch.float32}, "vectors stay float32, whatever the base is in")
    check(model.lm_head.weight.dtype == torch.bfloat16, "the base keeps its dtype")
