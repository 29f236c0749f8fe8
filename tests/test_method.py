"""The method (Liu et al. 2022, section 3.3): the start, the equations, the gradient, the cost.

Then what does not matter, and what does: a vector in another place may be the same function, or a different one.
"""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import make_gpt, make_ia3, make_idx, make_llama
from ia3 import IA3, SITES, attach
from llama import LlamaConfig
from model import GPT, GPTConfig
from sample import Cache

# The start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ones_are_the_base_bit_for_bit(make_model, device, dtype):
    model = make_model().to(device, dtype)
    idx = make_idx(model).to(device)
    base = model(idx)[0]
    for sites in (("k",), ("v",), ("ff",), SITES):
        vectors = attach(model, sites=sites)
        assert list(vectors.matrices()) == [f"l_{site}" for site in sites]
        assert all((p == 1).all() for p in vectors.parameters())
        assert torch.equal(model(idx)[0], base)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_excess_of_a_thousandth_is_lost_in_bfloat16_and_not_in_float32(make_model, dtype):
    """Half of bfloat16's step is at least 2⁻⁹ of a number, so a product that is nearer is rounded back."""
    model = make_model().to(dtype)
    idx = make_idx(model)
    base = model(idx)[0]
    vectors = attach(model)
    for low, high in ((1e-3, 1e-3), (-0.99 * 2**-9, 0.99 * 2**-9)):  # the same everywhere; random
        for p in vectors.parameters():
            p.uniform_(1 + low, 1 + high)
        assert torch.equal(model(idx)[0], base) == (dtype == torch.bfloat16)


def test_attach_freezes_the_base_and_only_the_base(make_model):
    model = make_model()
    vectors = attach(model, sites=("k", "ff"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"ia3.l_k", "ia3.l_ff"}
    assert model.ia3 is vectors and vectors.l_v is None
    model(make_idx(model), make_idx(model, seed=1))[1].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"ia3.l_k", "ia3.l_ff"}
    vectors.bfloat16()  # as model.to(torch.bfloat16) casts them, too
    again = attach(model, vectors.requires_grad_(False))
    assert {p.dtype for p in vectors.parameters()} == {torch.float32}
    assert again is vectors and all(p.requires_grad for p in vectors.parameters())
    other = attach(model)
    assert model.ia3 is other and all(p.requires_grad for p in vectors.parameters())  # they are their holder's


# The equations


def reference(model, idx):
    """The paper's equations on GPT-2, one position, head and layer at a time, in plain tensor algebra."""
    state, config, v = model.state_dict(), model.config, model.ia3
    C, d = config.n_embd, config.n_embd // config.n_head

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][: len(idx)]
    for i in range(config.n_layer):
        h = f"transformer.h.{i}"
        W, b = state[f"{h}.attn.c_attn.weight"], state[f"{h}.attn.c_attn.bias"]
        y = norm(x, f"{h}.ln_1")
        Q, K, V = y @ W[:C].T + b[:C], y @ W[C : 2 * C].T + b[C : 2 * C], y @ W[2 * C :].T + b[2 * C :]
        out = torch.zeros_like(Q)
        for head in range(config.n_head):
            c = slice(head * d, (head + 1) * d)
            for t in range(len(idx)):
                scores = torch.stack([Q[t, c] @ (v.l_k[i, c] * K[s, c]) / d**0.5 for s in range(t + 1)])
                out[t, c] = sum(a * (v.l_v[i, c] * V[s, c]) for s, a in enumerate(scores.softmax(0)))
        x = x + out @ state[f"{h}.attn.c_proj.weight"].T + state[f"{h}.attn.c_proj.bias"]
        u = norm(x, f"{h}.ln_2") @ state[f"{h}.mlp.c_fc.weight"].T + state[f"{h}.mlp.c_fc.bias"]
        gelu = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        x = x + (v.l_ff[i] * gelu) @ state[f"{h}.mlp.c_proj.weight"].T + state[f"{h}.mlp.c_proj.bias"]
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def test_the_forward_pass_is_the_papers_equations():
    """Two orders of summation in float64 over at most 64 terms: 1e-12 of the logits' size."""
    model = make_gpt().double()
    make_ia3(model).double()
    idx = make_idx(model, rows=1)
    with torch.no_grad():
        truth = reference(model, idx[0])
        assert (model(idx)[0][0] - truth).abs().max() < 1e-12 * truth.abs().max()


@torch.no_grad()
def test_the_product_is_taken_in_float32_and_rounded_once(make_model, device):
    """Seen where the vectors change nothing else: in the first layer, a cache's values and its keys of token 0 (which
    no rotation turns), and what the down-projection is given."""
    model = make_model().to(device, torch.bfloat16)
    idx = make_idx(model).to(device)
    given = {}
    mlp = model.blocks[0].mlp
    down = mlp.c_proj if isinstance(model, GPT) else mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: given.update(h=inputs[0]))

    def first_layer():
        cache = Cache(model, 3, 16)
        model(idx, cache=cache)
        k, v = cache.layers[0].k[:, :, 0], cache.layers[0].v[:, :, 0]  # (B, heads of keys, d_head)
        return k.flatten(1), v.flatten(1), given["h"]

    k, v, _ = first_layer()
    vectors = make_ia3(model, sites=("k", "v"))
    scaled_k, scaled_v, _ = first_layer()
    assert torch.equal(scaled_k, (vectors.l_k[0] * k.float()).bfloat16())
    assert torch.equal(scaled_v, (vectors.l_v[0] * v.float()).bfloat16())
    model.ia3 = None
    h = first_layer()[2]
    vectors = make_ia3(model, sites=("ff",))
    assert torch.equal(first_layer()[2], (vectors.l_ff[0] * h.float()).bfloat16())


def test_a_base_in_bfloat16_takes_float32_vectors(make_model, device):
    model = make_model().to(device, torch.bfloat16)
    vectors = attach(model)
    assert {p.dtype for p in vectors.parameters()} == {torch.float32}
    logits, loss = model(make_idx(model).to(device), make_idx(model, seed=1).to(device))
    assert logits.dtype == torch.bfloat16
    loss.backward()
    assert {p.grad.dtype for p in vectors.parameters()} == {torch.float32}


# The gradient


def test_gradients_are_the_closed_form(make_model):
    """For l_k the sum over batch and time of ∂L/∂(l_k ⊙ k) ⊙ k, where ∂L/∂k = l_k ⊙ ∂L/∂(l_k ⊙ k); l_v, l_ff alike."""
    model = make_model().double()
    vectors = make_ia3(model).double()
    keys_and_values, hidden = [], []  # a layer's c_attn, or k_proj and v_proj; and l_ff ⊙ h

    def watch(kept, tensor):
        tensor.requires_grad_().retain_grad()
        kept.append(tensor)

    for block in model.blocks:
        if isinstance(model, GPT):
            linears, down = [block.attn.c_attn], block.mlp.c_proj
        else:
            linears, down = [block.self_attn.k_proj, block.self_attn.v_proj], block.mlp.down_proj
        for linear in linears:
            linear.register_forward_hook(lambda module, inputs, out: watch(keys_and_values, out))
        down.register_forward_pre_hook(lambda module, inputs: watch(hidden, inputs[0]))
    model(make_idx(model), make_idx(model, seed=1))[1].backward()
    for i, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        if isinstance(model, GPT):
            (_, k, v), (_, k_grad, v_grad) = keys_and_values[i].split(16, 2), keys_and_values[i].grad.split(16, 2)
        else:
            k, v = keys_and_values[2 * i : 2 * i + 2]
            k_grad, v_grad = k.grad, v.grad
        h, h_grad = hidden[i] / l_ff, hidden[i].grad
        cases = [(vectors.l_k, k, k_grad / l_k), (vectors.l_v, v, v_grad / l_v), (vectors.l_ff, h, h_grad)]
        for matrix, plain, upstream in cases:
            expected = (upstream * plain).sum((0, 1))  # ∂L/∂l, for y = l ⊙ x and ∂L/∂y
            assert torch.allclose(matrix.grad[i], expected, rtol=1e-10, atol=1e-14)


def test_gradients_are_finite_differences(make_model):
    """Central differences with step ε = 1e-6 in float64 are off by O(ε²) + rounding/ε, about 1e-9."""
    model = make_model().double()
    vectors = make_ia3(model).double()
    idx, targets = make_idx(model), make_idx(model, seed=1)
    model(idx, targets)[1].backward()
    for p in vectors.parameters():
        for place in [(0, 0), (1, 7), (1, p.size(1) - 1)]:
            losses = []
            for step in (1e-6, -2e-6):  # above the entry, then as far below it
                with torch.no_grad():
                    p[place] += step
                losses.append(model(idx, targets)[1].item())
            with torch.no_grad():
                p[place] += 1e-6
            slope = (losses[0] - losses[1]) / 2e-6
            assert abs(slope - p.grad[place].item()) < 1e-7


# What it costs


def test_the_fraction_trained_is_one_in_two_n_embd():
    """6·n_layer·n_embd values over 12·n_layer·n_embd² weights in the blocks' matrices."""
    model = make_gpt(n_layer=3, n_embd=32)
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.dim() == 2)
    assert attach(model).count() * 2 * 32 == matrices


def test_count():
    gpt2 = GPTConfig(1024, 50257, 12, 12, 768)
    assert gpt2.widths == (768, 768, 3072)
    assert IA3(gpt2).count() == 55_296
    assert IA3(gpt2, ["k"]).count() == IA3(gpt2, ["v"]).count() == 12 * 768
    assert IA3(gpt2, ["ff"]).count() == 12 * 4 * 768
    assert IA3(make_gpt(n_layer=3).config, ["k", "ff"]).count() == 3 * 5 * 16


@pytest.mark.parametrize(
    "n_layer, n_embd, n_head, n_kv_head, n_hidden, widths, count",
    [
        (32, 4096, 32, 32, 11008, (4096, 4096, 11008), 614_400),  # LLaMA-7B
        (32, 4096, 32, 8, 14336, (1024, 1024, 14336), 524_288),  # Llama-3-8B
        (30, 576, 9, 3, 1536, (192, 192, 1536), 57_600),  # SmolLM2-135M
    ],
)
def test_count_on_a_llama(n_layer, n_embd, n_head, n_kv_head, n_hidden, widths, count):
    """l_k and l_v are as wide as the keys and values are, which several heads of queries may share."""
    config = LlamaConfig(2048, 32000, n_layer, n_head, n_kv_head, n_embd, n_hidden, 1e4, 1e-5, tied=False)
    assert config.widths == widths and IA3(config).count() == count


def test_a_step_needs_two_thirds_of_the_matrix_products():
    """No gradient of a weight: 4 of the 6 units of full fine-tuning, and the first layer's input needs none either."""
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=6, n_head=2, n_embd=96))

    def flops():
        with FlopCounterMode(display=False) as counter:
            idx = make_idx(model, rows=2)
            model(idx, idx)[1].backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "mm" in str(op))

    full = flops()
    attach(model)
    assert 0.60 < flops() / full <= 2 / 3


# What does not matter, and what does


def test_moving_l_k_to_q_or_l_v_behind_the_attention_is_the_same_function():
    """(l_k ⊙ K) q = K (l_k ⊙ q), and attention mixes positions, not channels. Only rounding differs."""
    model = make_gpt().double()
    make_ia3(model, sites=("k", "v"))
    moved = copy.deepcopy(model)
    C = model.config.n_embd
    with torch.no_grad():
        for block, (l_k, l_v, _) in zip(moved.transformer.h, model.ia3.per_layer(), strict=True):
            block.attn.c_attn.weight[:C] *= l_k[:, None]
            block.attn.c_attn.bias[:C] *= l_k
            block.attn.c_proj.weight *= l_v  # columns: what comes out of the attention
    moved.ia3 = None
    idx = make_idx(model)
    assert torch.allclose(model(idx)[0], moved(idx)[0], rtol=1e-11, atol=1e-11)


def test_scaling_before_the_gelu_is_another_function():
    model = make_gpt().double()
    make_ia3(model, sites=("ff",))
    before = copy.deepcopy(model)
    with torch.no_grad():
        for block, (_, _, l_ff) in zip(before.transformer.h, model.ia3.per_layer(), strict=True):
            block.mlp.c_fc.weight *= l_ff[:, None]
            block.mlp.c_fc.bias *= l_ff
    before.ia3 = None
    idx = make_idx(model)
    assert (model(idx)[0] - before(idx)[0]).abs().max() > 0.1


# What is refused


@pytest.mark.parametrize("sites", [(), ("q",), ("k", "q"), ["k", ""], "kv", "k", None])
def test_sites_that_there_are_not_are_refused(sites):
    with pytest.raises(ValueError, match="sites must be a list of some of k, v, ff"):
        IA3(make_gpt().config, sites)


def test_vectors_of_another_base_and_what_are_no_vectors_are_not_attached(make_model, tmp_path):
    (another,) = {make_gpt, make_llama} - {make_model}
    others = [IA3(make_model(n_layer=1).config), IA3(make_model(n_embd=32).config), attach(make_model(seed=1))]
    for other in [*others, IA3(another().config)]:
        model = make_model()
        with pytest.raises(ValueError, match="another base"):
            attach(model, other)
        assert model.ia3 is None and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="vectors or sites"):
        attach(model, IA3(model.config), sites=["k"])
    with pytest.raises(ValueError, match=r"not str: IA3\.load"):
        attach(make_model(), f"{tmp_path}/ia3.npz")
