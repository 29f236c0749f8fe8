"""The GPT itself. Its agreement with GPT-2 is shown in tests/oracles/; here is what needs no oracle."""

import pytest
import torch
from conftest import make_gpt, make_ia3, make_idx
from torch.nn import functional as F

from model import GPT, GPTConfig


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


def test_no_position_sees_what_follows(device):
    model = make_gpt().to(device)
    make_ia3(model)
    idx = make_idx(model).to(device)
    changed = idx.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 257
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).all(-1).any()


def test_loss_is_the_mean_over_targets_that_are_not_minus_one(device):
    model = make_gpt().to(device).double()
    idx = make_idx(model).to(device)
    targets = idx.roll(-1, dims=1)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    terms = [-F.log_softmax(logits[b, t], 0)[targets[b, t]] for b in range(3) for t in range(16) if targets[b, t] >= 0]
    assert torch.allclose(loss, sum(terms) / len(terms), rtol=1e-12)


def test_a_loss_is_not_rounded_to_the_logits_bfloat16():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        model = make_gpt().to(dtype)
        idx = make_idx(model)
        logits, loss = model(idx, idx)
        assert logits.dtype == dtype and loss.dtype == wanted
        true = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), idx.flatten())
        assert abs(loss.item() - true.item()) <= 4 * torch.finfo(wanted).eps * true.item()


def test_generate_greedy_is_the_argmax_and_seeds_repeat():
    model = make_gpt()
    idx = make_idx(model, rows=2)[:, :3]
    greedy = model.generate(idx, 20, temperature=0)  # runs past block_size 16
    for t in range(3, 23):
        assert torch.equal(greedy[:, t], model(greedy[:, max(0, t - 16) : t])[0][:, -1].argmax(-1))

    def draw(seed, **options):
        return model.generate(idx, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), greedy)
    assert model.generate(idx, 0).shape == idx.shape


def test_top_k_draws_from_the_k_likeliest_only():
    model = make_gpt()
    idx = make_idx(model, rows=1)[:, :4].repeat(200, 1)
    likeliest = model(idx[:1])[0][0, -1].topk(3).indices.tolist()
    assert set(model.generate(idx, 1, top_k=3)[:, -1].tolist()) == set(likeliest)
    model.lm_head.weight.data.zero_()  # all are equally likely: still no more than k are drawn
    assert len(set(model.generate(idx, 1, top_k=3)[:, -1].tolist())) == 3


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_checkpoints_come_back_bit_for_bit_nanogpts_too(tmp_path, prefix):
    model = make_gpt(dropout=0.1, bias=False)
    model.save(tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["tokenizer"] == "bytes"
    nano = {
        "model": {prefix + k: v for k, v in saved["model"].items()},
        "model_args": saved["model_args"],
        "iter_num": 7,
    }
    torch.save(nano, tmp_path / "b.pt")  # nanoGPT's has no tokenizer
    again = GPT.from_pretrained(tmp_path / "b.pt")
    assert again.config == model.config and again.tokenizer == "bytes" and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_16_bit_checkpoint_loads_as_float32(tmp_path):
    model = make_gpt().bfloat16()
    model.save(tmp_path / "a.pt")
    again = GPT.from_pretrained(tmp_path / "a.pt")
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())


@pytest.mark.parametrize(
    "sizes", [{"block_size": 0}, {"n_embd": 15}, {"n_layer": 0}, {"n_head": 0}, {"dropout": 1.0}, {"dropout": -0.1}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        make_gpt(**sizes)


def test_a_sequence_beyond_block_size_is_refused():
    model = make_gpt()
    with pytest.raises(ValueError, match="block_size 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
