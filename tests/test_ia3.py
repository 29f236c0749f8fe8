"""The vectors: where they act, what they cost, what they leave alone, and their file."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import make_gpt, make_ia3, make_idx
from torch.nn import functional as F

import ia3
from classroom.gradient import central_difference, gradient_of_l
from ia3 import IA3, attach, fingerprint
from model import GPT, GPTConfig

SUBSETS = [("k",), ("v",), ("ff",), ("k", "v"), ("k", "ff"), ("v", "ff"), ("k", "v", "ff")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("targets", SUBSETS)
def test_ones_are_the_base_bit_for_bit(device, dtype, targets):
    model = make_gpt().to(device, dtype)
    idx = make_idx(model).to(device)
    base = model(idx)[0]
    attach(model, targets=targets)
    assert torch.equal(model(idx)[0], base)


def reference(model, idx):
    """The paper's equations, one position, head and layer at a time, in plain tensor algebra."""
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
    """Section 3.3. Two orders of summation in float64 over at most 64 terms: 1e-12 of the logits' size."""
    model = make_gpt().double()
    make_ia3(model).double()
    idx = make_idx(model, rows=1)
    with torch.no_grad():
        truth = reference(model, idx[0])
        assert (model(idx)[0][0] - truth).abs().max() < 1e-12 * truth.abs().max()


def test_moving_l_k_to_q_or_l_v_behind_the_attention_is_the_same_function():
    """(l_k ⊙ K) q = K (l_k ⊙ q), and attention mixes positions, not channels. Only rounding differs."""
    model = make_gpt().double()
    make_ia3(model, targets=("k", "v"))
    moved = copy.deepcopy(model)
    C = model.config.n_embd
    with torch.no_grad():
        for block, (l_k, l_v, _) in zip(moved.transformer.h, model.ia3.rows(), strict=True):
            block.attn.c_attn.weight[:C] *= l_k[:, None]
            block.attn.c_attn.bias[:C] *= l_k
            block.attn.c_proj.weight *= l_v  # columns: what comes out of the attention
    moved.ia3 = None
    idx = make_idx(model)
    assert torch.allclose(model(idx)[0], moved(idx)[0], rtol=1e-11, atol=1e-11)


def test_scaling_before_the_gelu_is_another_function():
    model = make_gpt().double()
    make_ia3(model, targets=("ff",))
    before = copy.deepcopy(model)
    with torch.no_grad():
        for block, (_, _, l_ff) in zip(before.transformer.h, model.ia3.rows(), strict=True):
            block.mlp.c_fc.weight *= l_ff[:, None]
            block.mlp.c_fc.bias *= l_ff
    before.ia3 = None
    idx = make_idx(model)
    assert (model(idx)[0] - before(idx)[0]).abs().max() > 0.1


def test_a_base_in_bfloat16_takes_float32_vectors(device):
    model = make_gpt().to(device, torch.bfloat16)
    vectors = attach(model)
    assert {p.dtype for p in vectors.parameters()} == {torch.float32}
    logits, loss = model(make_idx(model).to(device), make_idx(model, seed=1).to(device))
    assert logits.dtype == torch.bfloat16
    loss.backward()
    assert {p.grad.dtype for p in vectors.parameters()} == {torch.float32}


def test_the_product_is_taken_in_float32_and_rounded_once(device):
    """1 + 2^-8 + 2^-12 is no bfloat16 number: rounded before the product it would be 1, or 1 + 2^-7."""
    block = make_gpt().to(device, torch.bfloat16).transformer.h[0]
    l = torch.full((64,), 1 + 2**-8 + 2**-12, device=device)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    with torch.no_grad():
        qkv = block.attn.c_attn(x)
        for rows, l_k, l_v in ((slice(16, 32), l[:16], None), (slice(32, 48), None, l[:16])):
            scaled = qkv.clone()
            scaled[..., rows] = (qkv[..., rows].float() * l[:16]).bfloat16()
            expected = run_with_output(block.attn.c_attn, scaled, lambda: block.attn(x))
            assert torch.equal(block.attn(x, l_k, l_v), expected)
        h = F.gelu(block.mlp.c_fc(x), approximate="tanh")
        assert torch.equal(block.mlp(x, l), block.mlp.c_proj((h.float() * l).bfloat16()))


def run_with_output(module, output, call):
    """Return call(), with module returning output."""
    hook = module.register_forward_hook(lambda *_: output)
    result = call()
    hook.remove()
    return result


@pytest.mark.parametrize("targets", SUBSETS)
@pytest.mark.parametrize("n_layer, n_embd", [(1, 8), (3, 24), (12, 768)])
def test_count(n_layer, n_embd, targets):
    config = GPTConfig(block_size=4, vocab_size=5, n_layer=n_layer, n_head=2, n_embd=n_embd)
    widths = {"k": 1, "v": 1, "ff": 4}
    assert IA3(config, targets).count() == sum(widths[t] for t in targets) * n_layer * n_embd


def test_the_fraction_trained_is_one_in_two_n_embd():
    """6·n_layer·n_embd vectors over 12·n_layer·n_embd² weights in the blocks' matrices; GPT-2 124M: 55,296."""
    model = make_gpt(n_layer=3, n_embd=32)
    matrices = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.dim() == 2)
    assert attach(model).count() * 2 * 32 == matrices
    assert IA3(GPTConfig(1024, 50257, 12, 12, 768)).count() == 55_296


def test_attach_freezes_the_base_and_only_the_base():
    model = make_gpt()
    vectors = attach(model, targets=("k", "ff"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"ia3.l_k", "ia3.l_ff"}
    assert model.ia3 is vectors and vectors.l_v is None
    model(make_idx(model), make_idx(model, seed=1))[1].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"ia3.l_k", "ia3.l_ff"}


def test_gradients_are_the_closed_form(monkeypatch):
    """For l_k the sum over batch and time of ∂L/∂(l_k ⊙ k) ⊙ k; for l_v and l_ff alike."""
    model = make_gpt().double()
    vectors = make_ia3(model).double()
    scaled = {"k": [], "v": [], "ff": []}  # what reaches the attention and the down-projection, a tensor a layer
    plain = {"k": [], "v": [], "ff": []}
    sdpa = F.scaled_dot_product_attention

    def watch(target, tensor):
        tensor.retain_grad()
        scaled[target].append(tensor)

    def watched_sdpa(q, k, v, **options):
        watch("k", k)
        watch("v", v)
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched_sdpa)
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda m, i, out: plain["k"].append(out[..., 16:32].detach()))
        block.attn.c_attn.register_forward_hook(lambda m, i, out: plain["v"].append(out[..., 32:].detach()))
        block.mlp.c_fc.register_forward_hook(
            lambda m, i, out: plain["ff"].append(F.gelu(out.detach(), approximate="tanh"))
        )
        block.mlp.c_proj.register_forward_pre_hook(lambda m, i: watch("ff", i[0]))
    model(make_idx(model), make_idx(model, seed=1))[1].backward()
    for target in ("k", "v", "ff"):
        for i in range(model.config.n_layer):
            upstream = scaled[target][i].grad
            if target != "ff":
                upstream = upstream.transpose(1, 2).flatten(2)  # (B, n_head, T, d_head) → (B, T, C)
            expected = gradient_of_l(plain[target][i], upstream)
            assert torch.allclose(vectors.matrices()[f"l_{target}"].grad[i], expected, rtol=1e-10, atol=1e-14)


def test_gradients_are_finite_differences():
    """Central differences with step ε = 1e-6 in float64 are off by O(ε²) + rounding/ε, about 1e-9."""
    model = make_gpt().double()
    vectors = make_ia3(model).double()
    idx, targets = make_idx(model), make_idx(model, seed=1)
    model(idx, targets)[1].backward()
    for p in vectors.parameters():
        for place in [(0, 0), (1, 7), (1, p.size(1) - 1)]:
            before = p.detach().clone()
            slope = central_difference(lambda: model(idx, targets)[1].item(), p, place)
            assert abs(slope - p.grad[place].item()) < 1e-7
            assert torch.equal(p, before)


@pytest.mark.parametrize("targets", SUBSETS)
def test_save_and_load_are_bitwise(tmp_path, targets, device):
    model = make_gpt().to(device)
    vectors = make_ia3(model, targets=targets)
    vectors.save(tmp_path / "a.npz")
    again = IA3.load(tmp_path / "a.npz", model)
    assert again.matrices().keys() == vectors.matrices().keys() and again.base == vectors.base == fingerprint(model)
    assert all(torch.equal(again.matrices()[name], p) for name, p in vectors.matrices().items())
    assert (tmp_path / "a.npz").stat().st_size <= 4 * vectors.count() + 2048
    with np.load(tmp_path / "a.npz") as file:
        assert set(file.files) == {"about", *vectors.matrices()}
        assert json.loads(file["about"].item())["config"]["n_embd"] == 16
    assert not list(tmp_path.glob("*.tmp"))


def test_the_fingerprint_knows_values_keys_and_shapes_not_dtype_vectors_or_tying():
    model = make_gpt()
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == first
    make_ia3(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] *= 1.01  # one weight, by more than bfloat16's 2^-8
    assert fingerprint(model) != first
    assert fingerprint(make_gpt(n_layer=1)) != fingerprint(make_gpt(n_layer=2))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(257, 16))
    untied = fingerprint(model)
    model.lm_head.weight = model.transformer.wte.weight
    assert fingerprint(model) == untied  # the duplicate is not read


def test_swapping_tasks_is_an_assignment():
    model = make_gpt()
    idx = make_idx(model)
    base = model(idx)[0]
    a = make_ia3(model, seed=1)
    with_a = model(idx)[0]
    b = make_ia3(model, seed=2)
    assert not torch.equal(model(idx)[0], with_a)
    model.ia3 = a
    assert torch.equal(model(idx)[0], with_a)
    model.ia3 = None
    assert torch.equal(model(idx)[0], base)
    assert b.base == a.base


def test_the_repr_says_what_matters():
    model = make_gpt()
    text = repr(attach(model))
    assert "l_ff (2, 64)" in text and "192 values" in text and fingerprint(model)[:8] in text
    assert "unknown" in repr(IA3(model.config))


@pytest.mark.parametrize("targets", [(), ("q",), ("k", "q"), ["k", ""]])
def test_unknown_targets_are_refused(targets):
    with pytest.raises(ValueError, match="targets must be some of k, v, ff"):
        IA3(make_gpt().config, targets)


def test_unattached_and_stacked_vectors_are_not_saved(tmp_path):
    model = make_gpt()
    loose = IA3(model.config)
    with pytest.raises(ValueError, match="attach"):
        loose.save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="one task"):
        ia3.stack([attach(model), None]).save(tmp_path / "a.npz")
    assert ia3.stack([loose, None]).base is None
    assert not list(tmp_path.iterdir())


def test_vectors_of_another_base_are_not_attached():
    with pytest.raises(ValueError, match="another base"):
        attach(make_gpt(n_layer=1), IA3(make_gpt().config))
    with pytest.raises(ValueError, match="another base"):
        attach(make_gpt(seed=1), attach(make_gpt(seed=0)))


def write_npz(path, **changes):
    """Save good vectors to path, then change arrays (None: leave out)."""
    model = make_gpt()
    make_ia3(model).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return model


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"l_k": None}, "but this base takes"),
        ({"l_q": np.ones((2, 16), np.float32)}, "but this base takes"),
        ({"l_v": np.ones((16, 2), np.float32)}, "but this base takes"),
        ({"l_v": np.full((2, 16), np.nan, np.float32)}, "l_v holds NaN"),
        ({"l_ff": np.full((2, 64), np.inf, np.float32)}, "l_ff holds NaN or inf"),
        ({"l_k": np.array([{"code": 1}], dtype=object)}, "truncated, or no file"),
        ({"about": None}, "truncated, or no file"),
        ({"about": np.bytes_("{}")}, "truncated, or no file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    model = write_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=message):
        IA3.load(tmp_path / "a.npz", model)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    model = write_npz(tmp_path / "a.npz")
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    with pytest.raises(ValueError, match="truncated, or no file"):
        IA3.load(tmp_path / "a.npz", model)


def test_files_for_another_base_are_refused(tmp_path):
    make_ia3(make_gpt()).save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="another base of this shape"):
        IA3.load(tmp_path / "a.npz", make_gpt(seed=1))
    with pytest.raises(ValueError, match="but this base takes"):
        IA3.load(tmp_path / "a.npz", make_gpt(n_layer=3))
    with pytest.raises(FileNotFoundError):
        IA3.load(tmp_path / "b.npz", make_gpt())


def test_the_embedded_base_is_what_the_readme_says():
    model = GPT.from_pretrained("data/base.pt")
    assert model.tokenizer == "bytes" and attach(model).count() == 6 * 6 * 192
