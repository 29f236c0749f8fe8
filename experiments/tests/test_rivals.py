"""The rivals of (IA)³, each held to its paper: what it trains, where it starts, what its merge computes."""

import copy
import math

import pytest
import torch
from torch import nn

from conftest import make_gpt, make_idx, make_llama
from experiments import rivals
from experiments.rivals import METHODS, Adapter
from sample import generate

TRAINED = [name for name in METHODS if name != "base"]


def make_method(name, moved=True, **sizes):
    """The tiny GPT with a method attached; moved: what it trains, pushed off its start."""
    model = make_gpt(**sizes)
    torch.manual_seed(0)
    rivals.attach(model, METHODS[name].add)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if moved and p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=dice))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_embd": 24, "vocab_size": 300, "block_size": 20}])
def test_each_trains_as_many_values_as_its_formula_says(sizes):
    """n layers of width C; a LayerNorm has 2·C, a c_attn's bias 3·C, a c_fc's 4·C, a projection's C."""
    c = make_gpt(**sizes).config
    n, C = c.n_layer, c.n_embd
    formulas = {
        "base": 0,
        "full": (c.vocab_size + c.block_size) * C + 12 * n * C**2 + (13 * n + 2) * C,
        "bitfit": (11 * n + 1) * C,
        "layernorm": (4 * n + 2) * C,
        "lora1": 2 * 2 * 1 * n * C,
        "lora-qkv": 3 * 2 * 1 * n * C,  # as many as (IA)³
        "lora4": 2 * 2 * 4 * n * C,
        "lora-all": (4 + 2 + 5 + 5) * n * C,  # what each of the four maps reads and writes: as many as lora4
        "vera": n * (3 * C + 3 * 384),
        "adapters": 2 * n * ((2 * 8 + 1) * C + 8) + (4 * n + 2) * C,
        "adapters-only": 2 * n * ((2 * 8 + 1) * C + 8),
        "prefix": 2 * 8 * n * C,
        "prompt": 16 * C,
        "ia3": 6 * n * C,
    }
    counts = {name: sum(p.numel() for p in trained(make_method(name, **sizes)).values()) for name in METHODS}
    assert counts == formulas


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("prefix", "prompt")])
def test_step_0_is_the_base_bit_for_bit(name):
    base, model = make_gpt(), make_method(name, moved=False)
    idx = make_idx(base)
    assert torch.equal(model(idx)[0], base(idx)[0])
    if name != "base":
        assert not torch.equal(make_method(name)(idx)[0], base(idx)[0])


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_what_is_trained_and_nothing_else(name):
    model = make_method(name)
    before = copy.deepcopy(model.state_dict())
    idx = make_idx(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(idx, idx)[1].backward()
    optimizer.step()
    names = {key for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad}
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert moved == names


@pytest.mark.parametrize("name", METHODS)
def test_merging_changes_nothing_and_leaves_a_plain_gpt(name):
    model = make_method(name)
    before = copy.deepcopy(model.state_dict())
    idx = make_idx(model)
    if METHODS[name].merge is None:
        assert name in ("adapters", "adapters-only", "prefix", "prompt")
        return
    merged = METHODS[name].merge(model)
    assert merged.state_dict().keys() == make_gpt().state_dict().keys()
    # float64: some 200 additions of numbers around 10, each good to 1e-16
    double = copy.deepcopy(model).double()
    assert (METHODS[name].merge(double)(idx)[0] - double(idx)[0]).abs().max() <= 1e-11
    truth = double(idx)[0]
    distances = [(m(idx)[0].double() - truth).square().mean().sqrt() for m in (merged, model)]
    assert distances[0] <= max(1.5 * distances[1], 1e-11)  # both are rounding noise
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_bitfit_trains_biases_and_layernorm_tuning_every_layernorm():
    model = make_method("bitfit")
    assert trained(model).keys() == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    model = make_method("layernorm")
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert trained(model).keys() == {f"{name}.{what}" for name in norms for what in ("weight", "bias")}


@pytest.mark.parametrize("name, r, maps", [("lora1", 1, "kv"), ("lora-qkv", 1, "qkv"), ("lora4", 4, "qv")])
def test_lora_changes_its_maps_by_a_matrix_of_rank_r(name, r, maps):
    base, merged = make_gpt(), METHODS[name].merge(make_method(name))
    changed = {key for key, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[key])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    for ours, theirs in zip(merged.transformer.h, base.transformer.h, strict=True):
        change = (ours.attn.c_attn.weight - theirs.attn.c_attn.weight).double().chunk(3)
        for m, matrix in zip("qkv", change, strict=True):
            # float32's rounding of the sum leaves singular values of some 1e-7
            assert torch.linalg.matrix_rank(matrix, atol=1e-5).item() == (r if m in maps else 0)


def test_lora_is_pefts():
    """PEFT has one A for the whole of c_attn: ours for q and v stack to one of rank 2r, with zeros in B."""
    from peft import LoraConfig, get_peft_model

    model, base = make_method("lora4"), make_gpt()
    C, r = 16, 4
    theirs = get_peft_model(base, LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=["c_attn"]))
    with torch.no_grad():
        for ours, block in zip(model.transformer.h, theirs.base_model.model.transformer.h, strict=True):
            lora = block.attn.c_attn
            lora.lora_A["default"].weight.copy_(ours.attn.c_attn.A.flatten(0, 1))
            lora.lora_B["default"].weight.zero_()
            for i, rows in enumerate((slice(0, C), slice(2 * C, 3 * C))):
                lora.lora_B["default"].weight[rows, i * r : (i + 1) * r] = ours.attn.c_attn.B[i]
    idx = make_idx(model)
    difference = theirs.double()(idx)[0] - model.double()(idx)[0]
    assert difference.abs().max() <= 1e-11


def test_lora_on_all_maps_is_pefts():
    from peft import LoraConfig, get_peft_model

    model, base = make_method("lora-all"), make_gpt()
    theirs = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["c_attn", "c_fc", "c_proj"]))
    with torch.no_grad():
        for name, ours in model.named_modules():
            if isinstance(ours, rivals.LoRALinear):
                lora = theirs.get_submodule(f"base_model.model.{name}")
                lora.lora_A["default"].weight.copy_(ours.A)
                lora.lora_B["default"].weight.copy_(ours.B)
    idx = make_idx(model)
    assert (theirs.double()(idx)[0] - model.double()(idx)[0]).abs().max() <= 1e-11


def test_a_llama_has_the_same_lora():
    model = make_llama()
    before = set(dict(model.named_parameters()))
    rows = sum(p.numel() for p in rivals.add_lora_maps(model, 1))
    C, kv, hidden = 16, 8, 40
    assert rows == 2 * (2 * (C + C) + 2 * (C + kv) + 3 * (C + hidden))
    assert len(set(dict(model.named_parameters())) - before) == 2 * 7 * 2 + 2 * 7 * 2  # A, B; weight and bias renamed


def test_vera_is_pefts():
    """PEFT has one A and one B for the whole of c_attn: ours stand in a pile and on a diagonal."""
    from peft import VeraConfig, get_peft_model

    model = make_method("vera")
    theirs = get_peft_model(make_gpt(), VeraConfig(r=3 * 384, target_modules=["c_attn"]))
    first = model.blocks[0].attn.c_attn
    for ours, block in zip(model.blocks, theirs.base_model.model.blocks, strict=True):
        ours, vera = ours.attn.c_attn, block.attn.c_attn
        assert ours.A is first.A and ours.B is first.B  # shared, and no parameters
        with torch.no_grad():
            vera.vera_A["default"].copy_(torch.cat([ours.A] * 3))
            vera.vera_B["default"].copy_(torch.block_diag(*[ours.B] * 3))
            vera.vera_lambda_d["default"].copy_(ours.d.flatten())
            vera.vera_lambda_b["default"].copy_(ours.b.flatten())
    idx = make_idx(model)
    # float64: some 1000 additions of numbers around 10
    assert (theirs.double()(idx)[0] - model.double()(idx)[0]).abs().max() <= 1e-11


def test_a_mixed_batch_is_each_row_under_its_own_lora():
    models = []
    for seed in range(3):
        model = make_method("lora4").double()
        torch.manual_seed(seed)
        for p in trained(model).values():
            nn.init.normal_(p)
        models.append(model)
    idx, task_ids = make_idx(models[0])[:3], torch.tensor([2, 0, 2])
    found = rivals.mix_lora(models, task_ids)(idx)[0]
    for row, task in enumerate(task_ids):
        assert (found[row] - models[task](idx[row : row + 1])[0][0]).abs().max() <= 1e-11
    assert (found[0] - models[1](idx[:1])[0][0]).abs().max() > 1e-2


def test_an_adapter_is_its_formula_behind_both_projections():
    adapter = Adapter(5, 3).double()
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    u = h @ adapter.down.weight.T + adapter.down.bias
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    expected = h + gelu @ adapter.up.weight.T + adapter.up.bias
    assert (adapter(h) - expected).abs().max() <= 1e-13
    places = [name for name, m in make_method("adapters").named_modules() if isinstance(m, Adapter)]
    assert places == [f"transformer.h.{i}.{sub}.c_proj.1" for i in range(2) for sub in ("attn", "mlp")]


def test_a_fresh_prefix_is_the_text_whose_keys_and_values_it_holds():
    """Without positions, the base that has read the prefix's text and the base with the prefix predict the same."""
    base = make_gpt().double()
    nn.init.zeros_(base.transformer.wpe.weight)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    rivals.attach(model, METHODS["prefix"].add)
    torch.manual_seed(0)
    text = generate(base, torch.zeros(1, 1, dtype=torch.long), 8)[:, 1:]
    idx = make_idx(base)[:, :8]
    expected = base(torch.cat((text.expand(3, -1), idx), 1))[0][:, 8:]
    assert (model(idx)[0] - expected).abs().max() <= 1e-11


def test_a_prefixs_attention_has_the_bases_dropout():
    model = make_gpt(dropout=0.5)
    rivals.attach(model, METHODS["prefix"].add)
    attn = model.transformer.h[0].attn
    attn.attn.resid_dropout.p = 0  # so that the attention's is left
    x = torch.randn(1, 8, model.config.n_embd)
    assert torch.equal(attn.eval()(x), attn(x)) and not torch.equal(attn.train()(x), attn(x))


def test_a_prompt_is_a_text_before_the_text():
    """Without positions, the base that has read the prompt's tokens and the base with the prompt predict the same."""
    base = make_gpt(block_size=32).double()
    nn.init.zeros_(base.transformer.wpe.weight)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    rivals.attach(model, METHODS["prompt"].add)
    torch.manual_seed(0)
    text = torch.randint(257, (16,))
    idx = make_idx(base)[:, :8]
    expected = base(torch.cat((text.expand(len(idx), -1), idx), 1))[0][:, 16:]
    assert (model(idx)[0] - expected).abs().max() <= 1e-11
    with pytest.raises(ValueError, match="has no cache"):
        generate(model, idx[:1], 2)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_what_stands_before_the_text_lets_no_position_see_the_future(name):
    model = make_method(name)
    idx = make_idx(model)
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % 257
    assert torch.equal(model(idx)[0][:, :-1], model(other)[0][:, :-1])
