"""What a Llama has that a GPT-2 has not: positions that turn, shared keys, a gate, a head of its own.

What both do alike is tested on both, in the other files; agreement with transformers is shown in tests/oracles/.
"""

import copy

import pytest
import torch
from torch import nn

from conftest import LLAMA3, make_ia3, make_idx, make_llama
from ia3 import fingerprint
from llama import Llama, LlamaConfig, rotary_table, rotate
from merge import fold_rows, merge
from sample import Cache

# --- the config ---


@torch.no_grad()
def test_what_the_config_says_is_what_is_computed():
    norms = [module for module in make_llama(norm_eps=0.5).modules() if isinstance(module, nn.RMSNorm)]
    assert {norm.eps for norm in norms} == {0.5} and len(norms) == 5
    idx = make_idx(make_llama())
    for other in ({"norm_eps": 0.5}, {"rope_base": 100.0}):
        assert (make_llama(**other)(idx)[0] - make_llama()(idx)[0]).abs().max() > 0.1


@pytest.mark.parametrize("bias, sublayer", [("attention_bias", "self_attn"), ("mlp_bias", "mlp")])
def test_a_kind_of_bias_is_that_of_its_sublayer(bias, sublayer):
    for block in make_llama(**{"attention_bias": False, "mlp_bias": False} | {bias: True}).blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                assert (module.bias is not None) == name.startswith(sublayer), name


# --- the gate ---


def test_l_ff_folds_into_the_columns_of_w_down_or_the_rows_of_w_up_alike_and_not_into_w_gate():
    model = make_llama().double()
    vectors = make_ia3(model, sites=("ff",))
    plain = copy.deepcopy(model)
    plain.ia3 = None
    into_up, into_gate = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        for i, l_ff in enumerate(vectors.l_ff):
            fold_rows(into_up.model.layers[i].mlp.up_proj, slice(None), l_ff)
            fold_rows(into_gate.model.layers[i].mlp.gate_proj, slice(None), l_ff)
        idx = make_idx(model)
        wanted = model(idx)[0]
        assert (merge(model)(idx)[0] - wanted).abs().max() <= 1e-11
        assert (into_up(idx)[0] - wanted).abs().max() <= 1e-11
        assert (into_gate(idx)[0] - wanted).abs().max() > 0.1


# --- the rotation: what a vector on either side of it can do ---

D_HEAD = 8
ONES = torch.ones(D_HEAD, dtype=torch.float64)
ANY = 1 + 0.5 * torch.randn(D_HEAD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PAIRED = ANY[: D_HEAD // 2].repeat(2)  # channels i and i + d_head/2 agree


def scores(shift=0, l_q=ONES, l_k=ONES, after=ONES):
    """Q Kᵀ of 12 random positions from shift on, (12, 12). l_q, l_k scale before the rotation, after scales keys
    after it."""
    config = make_llama(n_embd=4 * D_HEAD).config
    dice = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 12, D_HEAD, generator=dice, dtype=torch.float64)
    cos, sin = rotary_table(config, torch.arange(shift, shift + 12), torch.float64)
    q, k = rotate(l_q * q, cos, sin), rotate(l_k * k, cos, sin)
    return (q @ (after * k).transpose(-1, -2))[0, 0]


def distance(a, b):
    return (a - b).abs().max()


def test_whatever_is_folded_into_w_k_scores_depend_on_how_far_apart_two_tokens_are_only():
    assert distance(scores(), scores(shift=100)) <= 1e-12
    assert distance(scores(l_k=ANY), scores(shift=100, l_k=ANY)) <= 1e-12


def test_a_vector_after_the_rotation_folds_only_where_its_entries_agree_within_each_pair():
    """Where they do not agree, scores depend on where the two tokens are, and by the test above no W_k gives that."""
    assert distance(scores(after=PAIRED), scores(l_k=PAIRED)) <= 1e-12
    assert distance(scores(after=PAIRED), scores()) > 0.1
    assert distance(scores(after=ANY), scores(shift=100, after=ANY)) > 0.1


def test_l_k_moves_to_the_queries_only_where_its_entries_agree_within_each_pair():
    """A token's score with itself, where nothing turns, is the same with l_k on its query and with no other vector for
    any query; but then its score with another token differs."""
    assert distance(scores(l_q=PAIRED), scores(l_k=PAIRED)) <= 1e-12
    on_queries, on_keys = scores(l_q=ANY), scores(l_k=ANY)
    assert distance(on_queries.diagonal(), on_keys.diagonal()) <= 1e-12
    assert distance(on_queries, on_keys) > 0.1


def test_the_rotary_table_is_float32_at_least_and_no_part_of_the_state():
    config = make_llama().config
    pos = torch.arange(300)
    exact = rotary_table(config, pos, torch.float64)
    assert {t.dtype for t in exact} == {torch.float64}
    for t, wanted in zip(rotary_table(config, pos, torch.bfloat16), exact, strict=True):
        assert t.dtype == torch.float32 and t.shape == (300, 2)
        assert distance(t, wanted) <= 300 * 2**-23  # the angle, below 300, rounded to float32
    assert not list(make_llama().buffers())


def test_rmsnorm_of_bfloat16_is_computed_in_float32():
    norm = make_llama().model.norm
    x = torch.randn(64, 16).bfloat16()
    weight = norm.weight.detach().bfloat16().float()
    wide = x.float()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    # rounded once: half a step, and a little for float32's own rounding next to a tie
    assert ((norm.bfloat16()(x).float() - wanted).abs() <= 0.51 * 2**-7 * wanted.abs()).all()


@torch.no_grad()
def test_b_k_reaches_the_logits_so_that_a_merge_must_scale_it():
    """In GPT-2 it never does: q · b_k is one number for all keys. Turned by each key's position it is not."""
    model = make_llama().double()
    make_ia3(model, sites=("k",))
    merged = merge(model)
    for ours, theirs in zip(merged.model.layers, model.model.layers, strict=True):
        ours.self_attn.k_proj.bias.copy_(theirs.self_attn.k_proj.bias)
    idx = make_idx(model)
    assert distance(merged(idx)[0], model(idx)[0]) > 0.1


# --- grouped keys ---


@torch.no_grad()
def test_an_entry_of_l_v_behind_the_attention_stands_once_for_each_head_of_queries():
    """Attention mixes positions, not channels, so l_v may move; there every head of queries has its channels."""
    model = make_llama().double()
    vectors = make_ia3(model, sites=("v",))
    moved = copy.deepcopy(model)
    moved.ia3 = None
    for layer, l_v in zip(moved.model.layers, vectors.l_v, strict=True):
        per_head = l_v.view(2, 4)  # heads of values, channels
        layer.self_attn.o_proj.weight *= per_head.repeat_interleave(2, dim=0).flatten()  # 2 heads of queries for each
    idx = make_idx(model)
    assert distance(moved(idx)[0], model(idx)[0]) <= 1e-11


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_a_cache_holds_heads_of_keys_not_of_queries(n_kv_head):
    model = make_llama(n_kv_head=n_kv_head, rope_scaling=LLAMA3).double()
    make_ia3(model)
    idx = make_idx(model)
    cache = Cache(model, 3, 16)
    assert cache.layers[0].k.shape == (3, n_kv_head, 16, 4)
    with torch.no_grad():
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([1, 6, 1, 8], dim=1)]
        assert distance(torch.cat(pieces, dim=1), model(idx)[0]) <= 1e-12


# --- the fingerprint ---


def with_config(model, **changed):
    """model's own weights under another config, one that changes no shape."""
    other = copy.deepcopy(model)
    other.config = LlamaConfig(**(vars(model.config) | changed))
    return other


def test_the_fingerprint_sees_every_field_that_changes_the_function():
    model = make_llama(n_kv_head=4, rope_scaling=LLAMA3)
    ours = fingerprint(model)
    assert fingerprint(with_config(model, rope_base=5000.0)) != ours
    assert fingerprint(with_config(model, norm_eps=1e-6)) != ours
    assert fingerprint(with_config(model, n_head=2, n_kv_head=2)) != ours
    assert fingerprint(with_config(model, rope_scaling=None)) != ours
    assert fingerprint(with_config(model, rope_scaling=LLAMA3 | {"factor": 4})) != ours
    assert fingerprint(with_config(model, rope_base=10000)) == ours
    assert fingerprint(with_config(model, rope_scaling=dict(reversed(LLAMA3.items())))) == ours
    untied = make_llama(tied=False)
    ours = fingerprint(untied)
    untied.lm_head.weight.data[3, 5] += 1
    assert fingerprint(untied) != ours


# --- the config and the start ---


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling .*None"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling .*factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "rope_scaling .*factor"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_embd": 20}, "an even number"),
        ({"n_hidden": 0}, "n_hidden must be"),
        ({"n_head": True}, "n_head must be"),
        ({"rope_base": 0}, "rope_base must be"),
        ({"norm_eps": float("nan")}, "norm_eps must be"),
    ],
)
def test_configs_that_no_llama_can_have_are_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_llama(**sizes)


def test_it_starts_as_transformers_does():
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "n_hidden": 128, "block_size": 8}
    sizes |= {"vocab_size": 257, "rope_base": 1e4, "norm_eps": 1e-5, "tied": True, "attention_bias": True}
    for name, p in Llama(LlamaConfig(**sizes)).named_parameters():
        if p.dim() == 2:  # the standard error of a standard deviation is std / √(2n); 5 of them
            assert abs(p.std().item() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5, name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
