"""The GPT itself, and what a Llama does alike. Agreement with GPT-2 and LLaMA is shown in tests/oracles/; here is what
needs no oracle. What only a Llama has is in test_llama_model.py."""

import pytest
import torch
from torch.nn import functional as F

import common
from conftest import make_gpt, make_ia3, make_idx
from ia3 import IA3, attach, fingerprint, stack
from merge import merge, verify
from model import GPT, GPTConfig
from sample import Cache, generate


def test_state_dict_has_nanogpts_keys_and_a_tied_head():
    model = make_gpt(n_layer=1)
    modules = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    block = [f"transformer.h.0.{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    others = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert sorted(model.state_dict()) == sorted([*block, *others, "lm_head.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight
    make_ia3(model)
    model.ia3 = None
    assert not [name for name in model.state_dict() if "ia3" in name]


def test_it_starts_as_gpt2_does():
    """N(0, 0.02), what writes into the residual stream N(0, 0.02 / √(2·n_layer)), biases 0, LayerNorms 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=8, n_head=2, n_embd=64))
    for name, p in model.named_parameters():
        std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:  # the standard error of a standard deviation is std / √(2n); 5 of them, n ≥ 4096
            assert abs(p.std().item() / std - 1) < 5 / (2 * p.numel()) ** 0.5, name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_no_position_sees_what_follows(make_model, device):
    model = make_model().to(device)
    make_ia3(model)
    idx = make_idx(model).to(device)
    changed = idx.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 257
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).all(-1).any()


def test_dropout_is_where_gpt2_has_it_and_in_training_only(monkeypatch):
    """On the embeddings and on what attention and MLP add: where all of that is dropped, ln_f's bias is left.
    And on the attention's weights."""
    model = make_gpt(dropout=0.5)
    model.transformer.ln_f.bias.requires_grad_(False)
    idx = make_idx(model)
    weights = []
    sdpa = F.scaled_dot_product_attention

    def watched_sdpa(q, k, v, dropout_p, is_causal):
        weights.append(dropout_p)
        return sdpa(q, k, v, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched_sdpa)
    monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: x * 0 if training and p == 0.5 else x)
    assert torch.equal(model(idx)[0], make_gpt()(idx)[0])
    model.train()
    bias = model.transformer.ln_f.bias
    assert torch.equal(model.hidden(idx), bias.expand(3, 16, 16))
    assert weights == [0.0] * 4 + [0.5] * 2  # two layers of either model in eval, then two in training
    for drop in (model.transformer.drop, model.transformer.h[1].attn.resid_dropout, model.transformer.h[1].mlp.dropout):
        drop.eval()
        assert not torch.equal(model.hidden(idx), bias.expand(3, 16, 16))
        drop.train()


def test_loss_is_the_mean_over_targets_that_are_not_minus_one(make_model, device):
    model = make_model().to(device).double()
    idx = make_idx(model).to(device)
    targets = idx.roll(-1, dims=1)
    targets[0, :5] = -1
    logits = model(idx)[0]
    found, loss = model(idx, targets)
    assert found.shape == (3 * 16 - 5, 257)  # only those that are compared
    assert torch.allclose(found, logits[targets >= 0], rtol=1e-10, atol=1e-12)
    terms = [-F.log_softmax(logits[b, t], 0)[targets[b, t]] for b in range(3) for t in range(16) if targets[b, t] >= 0]
    assert torch.allclose(loss, sum(terms) / len(terms), rtol=1e-12)


def test_a_loss_is_not_rounded_to_the_logits_bfloat16(make_model):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        model = make_model().to(dtype)
        idx = make_idx(model)
        logits, loss = model(idx, idx)
        assert logits.dtype == dtype and loss.dtype == wanted
        true = F.cross_entropy(logits.double().flatten(0, 1), idx.flatten())
        assert abs(loss.item() - true.item()) <= 4 * torch.finfo(wanted).eps * true.item()


def test_token_0_is_a_target_like_others_and_none_at_all_is_refused(make_model):
    model = make_model()
    idx = make_idx(model)
    loss = model(idx, torch.zeros_like(idx))[1]
    assert loss.item() == pytest.approx(-model(idx)[0].log_softmax(-1)[..., 0].mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="every target is -1"):
        model(idx, torch.full_like(idx, -1))


def test_hidden_is_what_the_head_reads(make_model):
    model = make_model()
    make_ia3(model)
    idx = make_idx(model)
    hidden = model.hidden(idx)
    assert hidden.shape == (3, 16, 16) and torch.equal(model.lm_head(hidden), model(idx)[0])


# The cache: keys and values that were read are not read again


def test_with_a_cache_a_token_a_step_or_several_give_the_logits_of_reading_all_at_once(make_model):
    """In float64: kernels for other shapes sum in another order, by at most 1e-12 of the logits' size."""
    model = make_model().double()
    make_ia3(model)
    idx = make_idx(model)
    logits = model(idx)[0]
    with torch.no_grad():
        for pieces in ([16], [1] * 16, [5, 4, 1, 6], [15, 1]):
            cache = Cache(model, batch_size=3, max_tokens=16)
            found = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
            assert (torch.cat(found, dim=1) - logits).abs().max() < 1e-12 * logits.abs().max()
        hidden = model.hidden(idx[:, 9:], cache=fill(Cache(model, 3, 16), model, idx[:, :9]))
        assert torch.allclose(model.lm_head(hidden), logits[:, 9:], rtol=1e-10, atol=1e-10)


def fill(cache, model, idx):
    model.hidden(idx, cache.made_for[2], cache)
    return cache


def test_a_cache_holds_scaled_keys_and_values():
    model = make_gpt()
    vectors = make_ia3(model)
    idx = make_idx(model)
    with torch.no_grad():
        scaled = fill(Cache(model, 3, 16), model, idx).layers[0]
        model.ia3 = None
        plain = fill(Cache(model, 3, 16), model, idx).layers[0]
        for found, base, l in ((scaled.k, plain.k, vectors.l_k[0]), (scaled.v, plain.v, vectors.l_v[0])):
            assert found.shape == (3, 2, 16, 8)
            assert torch.equal(found, base * l.view(1, 2, 1, 8))  # a head is 8 neighbouring channels


@torch.no_grad()
def test_a_cache_takes_no_other_rows_no_more_tokens_and_no_other_model_and_stays_as_it_was(make_model):
    model = make_model()
    idx = make_idx(model)
    cache = fill(Cache(model, 3, 5), model, idx[:, :4])
    with pytest.raises(ValueError, match="made for 5 tokens, not for 6"):
        model(idx[:, 4:6], cache=cache)
    with pytest.raises(ValueError, match="made for 3 rows, not for 1"):
        model(idx[:1, 4:5], cache=cache)
    with pytest.raises(ValueError, match="another model"):  # such as the merged one
        make_model()(idx[:, 4:5], cache=cache)
    assert [layer.length for layer in cache.layers] == [4] * model.config.n_layer
    model(idx[:, 4:5], cache=cache)


@torch.no_grad()
def test_a_cache_is_refused_for_other_vectors_and_other_task_ids(make_model):
    model = make_model()
    a, b = make_ia3(model, seed=1), make_ia3(model, seed=2)
    idx = make_idx(model)
    cache = fill(Cache(model, 3, 16), model, idx[:, :4])
    for other in (a, None):
        model.ia3 = other
        with pytest.raises(ValueError, match="other vectors or other task_ids"):
            model(idx[:, 4:], cache=cache)
    attach(model, stack([a, b]))
    task_ids = torch.tensor([0, 1, 0])
    cache = fill(Cache(model, 3, 16, task_ids), model, idx[:, :4])
    with pytest.raises(ValueError, match="other vectors or other task_ids"):
        model(idx[:, 4:], task_ids=torch.tensor([1, 1, 0]), cache=cache)
    assert cache.layers[0].length == 4  # what is refused has added nothing
    model(idx[:, 4:], task_ids=task_ids, cache=cache)
    assert cache.layers[1].length == 16
    with pytest.raises(ValueError, match=r"17 tokens .*block_size 16"):
        model(idx[:, :1], task_ids=task_ids, cache=cache)


# Generating


@torch.no_grad()
def read_all_again(model, idx, n, task_ids=None):
    """What generate writes greedily, without a cache, and how far the likeliest token was ahead at the closest call."""
    closest = float("inf")
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :], task_ids=task_ids)[0][:, -1]
        first, second = logits.topk(2).values.unbind(-1)
        closest = min(closest, (first - second).min().item())
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx, closest


@pytest.mark.parametrize("length", [1, 5, 15, 16, 20])
def test_greedy_text_is_the_same_with_and_without_a_cache_also_past_block_size(make_model, length):
    model = make_model()
    make_ia3(model)
    idx = make_idx(model).repeat(1, 2)[:, :length]
    expected, closest = read_all_again(model, idx, 20)
    assert closest > 1e-3  # float32's rounding decides nothing here
    assert torch.equal(generate(model, idx, 20, temperature=0), expected)


def test_greedy_text_of_mixed_tasks_is_the_same_with_and_without_a_cache(make_model):
    model = make_model()
    tasks = [make_ia3(model, 1), make_ia3(model, 2), None]
    attach(model, stack(tasks))
    idx, task_ids = make_idx(model, rows=4)[:, :3], torch.tensor([2, 0, 1, 0])
    expected, closest = read_all_again(model, idx, 20, task_ids)
    assert closest > 1e-3
    assert torch.equal(generate(model, idx, 20, temperature=0, task_ids=task_ids), expected)


def test_the_prompt_is_read_once_then_a_token_a_step_until_the_window_moves(monkeypatch):
    model = make_gpt()
    lengths = []
    hidden = model.hidden

    def watched(idx, *others):
        lengths.append(idx.size(1))
        return hidden(idx, *others)

    monkeypatch.setattr(model, "hidden", watched)
    generate(model, make_idx(model)[:, :13], 6)
    assert lengths == [13, 1, 1, 1, 16, 16]


def test_seeds_repeat_and_top_k_of_one_is_greedy():
    model = make_gpt()
    idx = make_idx(model, rows=2)[:, :3]

    def draw(seed, **options):
        return generate(model, idx, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), generate(model, idx, 20, temperature=0))
    assert torch.equal(draw(1, top_k=1000), draw(1))
    assert torch.equal(generate(model, idx, 0), idx)


def test_top_k_draws_from_the_k_likeliest_only():
    model = make_gpt()
    idx = make_idx(model, rows=1)[:, :4].repeat(200, 1)
    likeliest = model(idx[:1])[0][0, -1].topk(3).indices.tolist()
    torch.manual_seed(0)
    assert set(generate(model, idx, 1, temperature=9.0, top_k=3)[:, -1].tolist()) == set(likeliest)


def test_temperature_divides_the_logits():
    """Halved weights of the head halve the logits exactly, so the same numbers are drawn as at temperature 2."""
    model = make_gpt()
    idx = make_idx(model)[:, :4]

    def draw(temperature):
        return generate(model, idx, 12, temperature, generator=torch.Generator().manual_seed(0))

    warm, plain = draw(2.0), draw(1.0)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight / 2)
    assert torch.equal(draw(1.0), warm) and not torch.equal(warm, plain)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, "idx is empty"),
        ({"idx": torch.zeros(0, 3, dtype=torch.long)}, "idx is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"temperature": -1}, "temperature must be 0 or from 1e-4 to 1e4, not -1"),
        ({"temperature": 1e-42}, "temperature must be 0 or from 1e-4 to 1e4, not 1e-42"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_k": -3}, "top_k must be at least 1, not -3"),
    ],
)
def test_what_makes_no_sense_is_not_generated(options, message):
    idx = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        generate(make_gpt(), **({"idx": idx, "max_new_tokens": 1} | options))


def test_logits_that_are_not_finite_are_told(make_model):
    model = make_model()
    model.lm_head.weight.data[0] = float("inf")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generate(model, make_idx(model)[:, :3], 1)


def test_text_is_drawn_without_a_gradient_and_from_float32_probabilities(make_model, monkeypatch):
    """Of a base in bfloat16: rounded to that, probabilities would be others, and so would some of 2,000 draws."""
    model = make_model().bfloat16()
    hidden = model.hidden
    seen = []
    monkeypatch.setattr(model, "hidden", lambda *given: seen.append(hidden(*given)) or seen[-1])
    idx = make_idx(model, rows=1)[:, :3].repeat(2000, 1)
    drawn = generate(model, idx, 1, temperature=0.7, generator=torch.Generator().manual_seed(0))[:, -1:]
    assert not seen[0].requires_grad
    p = (model.lm_head(seen[0][:, -1]).float() / 0.7).softmax(-1)
    assert torch.equal(drawn, torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0)))


# What no GPT can have, or read


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 0},
        {"n_embd": 15},
        {"n_layer": 0},
        {"n_head": 0},
        {"n_embd": 16.0},
        {"n_head": 2.0},
        {"vocab_size": -257},
        {"vocab_size": True},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"bias": "no"},
    ],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        make_gpt(**sizes)


def test_a_sequence_that_is_empty_or_beyond_block_size_is_refused(make_model):
    model = make_model()
    idx = torch.zeros(1, 17, dtype=torch.long)
    cache = Cache(model, 1, 16)
    with torch.no_grad():
        model(idx[:, :9], cache=cache)
        for given in (None, cache):
            with pytest.raises(ValueError, match="idx is empty"):
                model(idx[:, :0], cache=given)
        with pytest.raises(ValueError, match=r"17 tokens .*block_size 16"):
            model(idx[:, :8], cache=cache)
        model(idx[:, :7], cache=cache)
    with pytest.raises(ValueError, match=r"17 tokens .*block_size 16"):
        model(idx)
    model(idx[:, :16])


# torch.compile


def test_a_compiled_model_is_the_model_inside_it(make_model, tmp_path):
    """torch.compile(model) returns a module around it, whose names of weights begin with _orig_mod."""
    model = make_model()
    expected = fingerprint(model)
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == expected
    vectors = attach(compiled)
    assert model.ia3 is vectors and not any(p.requires_grad for p in model.lm_head.parameters())
    vectors.l_v.data *= 2
    vectors.save(tmp_path / "ia3.npz")
    assert torch.equal(IA3.load(tmp_path / "ia3.npz", compiled).l_v, vectors.l_v)
    merged = merge(compiled)
    assert type(merged) is type(model) and torch.equal(merged(make_idx(model))[0], model(make_idx(model))[0])
    assert verify(compiled, merged, make_idx(model)) == verify(model, merged, make_idx(model))
    idx = make_idx(model)[:, :2]
    assert torch.equal(generate(compiled, idx, 5, temperature=0), generate(model, idx, 5, temperature=0))
    common.save(compiled, tmp_path / "base.pt")
    assert fingerprint(common.load(tmp_path / "base.pt")) == expected
