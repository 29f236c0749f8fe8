"""Hugging Face's folders of a GPT-2 and of a LLaMA: what comes in and goes out, and what is refused.

That the numbers are GPT-2's and LLaMA's is shown in tests/oracles/.
"""

import json
import os
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from helpers import change_json, cut, is_same, read_json
from safetensors.torch import save_file as save_safe

import common
from conftest import LLAMA3, make_gpt, make_ia3, make_llama, make_llama_with_bpe
from tools import convert, files
from tools.convert import from_hf, to_hf

BIN = "hf/pytorch_model.bin"
SAFE = "hf/model.safetensors"
INDEX = "hf/model.safetensors.index.json"


@pytest.fixture
def gpt(tmp_path, monkeypatch):
    """A tiny random GPT. The working directory holds hf/, a folder of it."""
    monkeypatch.chdir(tmp_path)
    to_hf(make_gpt(), "hf")
    return make_gpt()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """The same of a LLaMA with a tokenizer of its own."""
    monkeypatch.chdir(tmp_path)
    to_hf(make_llama_with_bpe(), "hf")
    return make_llama_with_bpe()


def read_bin():
    return torch.load(BIN, weights_only=True)


def to_shards(change=None):
    """Put the weights into two .safetensors and an index, the norms into the second; change: of {name: shard}."""
    weights = read_bin()
    os.remove(BIN)
    where = {name: f"model-{1 + ('norm' in name)}.safetensors" for name in weights}
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        tensors = {name: t for name, t in weights.items() if where[name] == shard}
        save_safe(tensors | {"model.not.in.the.index": torch.ones(1)}, f"hf/{shard}")
    Path(INDEX).write_text(json.dumps({"weight_map": where | (change or {})}))


def check_refused(message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as e:
        from_hf("hf")
    assert "\n" not in str(e.value)


# --- there and back ---


@pytest.mark.parametrize("source, is_safe", [("hf", False), (BIN, False), ("hf", True), (SAFE, True)])
def test_a_folder_or_a_file_becomes_our_checkpoint(gpt, source, is_safe, capsys):
    if is_safe:  # which goes before the other file
        save_safe({name: t.contiguous() for name, t in read_bin().items()}, SAFE)
        Path(BIN).write_bytes(b"another model")
    assert convert.main(["hf", source, "--out", "new/base.pt"]) == 0
    assert "10,960 parameters in float32, tokenizer bytes" in capsys.readouterr().out
    for model in (common.load("new/base.pt"), from_hf(Path(source))):
        assert is_same(model, gpt) and model.config == gpt.config and model.tokenizer.about == "bytes"
        assert not model.training and model.lm_head.weight is model.transformer.wte.weight  # tied
        assert all(p.is_contiguous() and p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tied": False, "attention_bias": False, "mlp_bias": False},
        {"rope_scaling": LLAMA3, "rope_base": 5e5, "norm_eps": 1e-6, "mlp_bias": False},
        {"n_kv_head": 4, "attention_bias": False},
    ],
    ids=["gqa", "untied", "llama3", "mha"],
)
def test_a_llama_goes_out_and_comes_back(tmp_path, monkeypatch, capsys, sizes, dtype):
    """Bit for bit, in the dtype that is stored, with its tokenizer."""
    monkeypatch.chdir(tmp_path)
    model = make_llama_with_bpe(**sizes).to(dtype)
    common.save(model, "base.pt")
    assert convert.main("to-hf --base base.pt --out hf".split()) == 0
    assert sorted(os.listdir("hf")) == ["config.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"]
    assert convert.main("hf hf --out new.pt".split()) == 0
    assert f"parameters in {str(dtype)[6:]}, tokenizer a byte-level BPE of 265 ids" in capsys.readouterr().out
    back = common.load("new.pt", dtype=None)
    assert is_same(back, model) and {p.dtype for p in back.parameters()} == {dtype}
    assert back.config == model.config and back.tokenizer.about == model.tokenizer.about
    read = from_hf("hf")
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == model.config.tied and not read.training


def test_a_bin_file_needs_no_safetensors_package(gpt, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert is_same(from_hf("hf"), gpt)
    os.rename(BIN, SAFE)
    check_refused("pip install safetensors")


def test_shards_are_read_one_at_a_time(llama, monkeypatch):
    to_shards()
    read = files.read_tensors
    mapped = []  # the tensors of the shard before

    def watch(path):
        assert sum(t() is not None for t in mapped) <= 1  # the last, which the reader still has in its hand
        tensors, about = read(path)
        mapped[:] = [weakref.ref(t) for t in tensors.values()]
        return tensors, about

    monkeypatch.setattr(files, "read_tensors", watch)
    for source in ("hf", INDEX):
        assert is_same(from_hf(source), llama)
    assert len(mapped) == 6  # two norms in each of two layers, the last norm, and one that is not in the index


def test_shards_of_the_older_kind(llama):
    """pytorch_model.bin.index.json and .bin files, as Llama 2 was published."""
    weights = read_bin()
    os.remove(BIN)
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
    for shard in set(where.values()):
        torch.save({name: t for name, t in weights.items() if where[name] == shard}, f"hf/{shard}")
    Path(f"{BIN}.index.json").write_text(json.dumps({"weight_map": where}))
    for source in ("hf", f"{BIN}.index.json"):
        assert is_same(from_hf(source), llama)


def test_what_older_versions_and_wrapped_models_store(llama):
    weights = read_bin() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied, and stored all the same
    for prefix in ("", "module._orig_mod.", "_orig_mod.module."):
        torch.save({prefix + name: t for name, t in weights.items()}, BIN)
        assert is_same(from_hf("hf"), llama)
    del weights["lm_head.weight"]
    torch.save({name.removeprefix("model."): t for name, t in weights.items()}, BIN)  # LlamaModel's, without a head
    assert is_same(from_hf("hf"), llama)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_the_same_model_under_another_name(tmp_path, monkeypatch, kind):
    """A Mistral without a window, and a Qwen2, whose biases are random here; both compute in float32, and in another
    order, so that logits of size 1 may differ by some units of 1e-7. A wrong bias moves them by 0.1."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"tie_word_embeddings": True} if kind == "Qwen2" else {"sliding_window": None}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if name.endswith("bias") else 0.2)
    theirs.save_pretrained("hf")
    ours = from_hf("hf")
    to_hf(ours, "home")
    home = transformers.LlamaForCausalLM.from_pretrained("home", dtype=torch.float32)
    idx = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        expected = theirs(idx).logits
        for logits in (ours(idx, idx)[0], home(idx).logits):
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    change_json("hf/config.json", **{"sliding_window": 16, "use_sliding_window": True})
    check_refused("sliding_window")


@pytest.mark.parametrize("make_mixed", [make_gpt, make_llama])
def test_config_names_the_widest_dtype_since_transformers_casts_to_it(tmp_path, make_mixed):
    model = make_mixed().bfloat16()
    name = "transformer.ln_f.weight" if make_mixed is make_gpt else "model.norm.weight"
    model.get_parameter(name).data = torch.rand(16)
    to_hf(model, tmp_path)
    assert torch.equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(name), model.get_parameter(name)
    )


def test_both_spellings_of_the_rotary_parameters(llama):
    about = read_json("hf/config.json")
    del about["rope_theta"], about["rope_scaling"]
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_type"}
    spellings = [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}}, 5e5, LLAMA3),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, LLAMA3),
    ]
    for spelling, base, expected in spellings:
        Path("hf/config.json").write_text(json.dumps(about | spelling))
        config = from_hf("hf").config
        assert (config.rope_base, config.rope_scaling) == (base, expected)


# --- what is refused ---


def test_a_model_and_an_adapter_share_no_folder(gpt):
    """Else transformers opens the merged model and puts the adapter on it as well."""
    vectors = make_ia3(gpt)
    with pytest.raises(ValueError, match="merge them first"):
        to_hf(gpt, "new")
    with pytest.raises(ValueError, match="hf holds a model"):
        convert.to_peft(vectors, "hf", "base.pt")
    to_hf(make_gpt(), "hf")  # a model is written anew
    for name in ("adapter_config.json", "model.safetensors", "tokenizer.json", "added_tokens.json", "chat.jinja"):
        Path(f"hf/{name}").write_text("{}")
        with pytest.raises(ValueError, match=f"another model's {name}"):
            to_hf(make_gpt(), "hf")
        os.remove(f"hf/{name}")


@pytest.mark.parametrize(
    "path, raw, message",
    [
        ("hf/config.json", None, "hf/config.json"),
        ("hf/config.json", b"{", "hf/config.json is not JSON"),
        ("hf/config.json", b"[]", "hf/config.json holds no JSON object"),
        ("hf/config.json", b"[" * 100_000, "hf/config.json is not JSON"),
        ("hf/config.json", b"\xff\xfe", "hf/config.json is not JSON"),
        (BIN, None, "hf holds no model.safetensors or"),
        (BIN, b"", "hf/pytorch_model.bin is truncated"),
    ],
    ids=["none", "cut", "list", "deep", "bytes", "no weights", "empty weights"],
)
def test_files_that_are_none(gpt, path, raw, message):
    os.remove(path)
    if raw is not None:
        Path(path).write_bytes(raw)
    check_refused(message)


def test_a_file_without_names(gpt):
    torch.save([1], BIN)
    check_refused("holds no tensors by name")


# what real folders ask for and ours do not compute, and sizes that are not those of the weights
@pytest.mark.parametrize(
    "make_model, name, value, message",
    [
        (make_gpt, "model_type", "bert", "hf/config.json describes a model of type 'bert': known are gpt2, llama"),
        (make_gpt, "model_type", ["gpt2"], "of type ['gpt2']"),
        (make_gpt, "n_layer", None, "hf/config.json: n_layer must be a whole number"),
        (make_gpt, "n_layer", 3, "h.2.ln_1.weight is missing"),
        (make_gpt, "n_layer", 1, "h.1.ln_1.weight is not GPT-2's"),
        (make_gpt, "n_layer", 10**9, "n_layer is 1000000000, but there are only 29"),
        (make_gpt, "n_embd", 32, "wte.weight has shape (257, 16), not (257, 32)"),
        (make_gpt, "n_embd", 2**70, "hf/pytorch_model.bin"),
        (make_gpt, "n_embd", 2**40, "hf/pytorch_model.bin"),
        (make_gpt, "activation_function", "relu", "activation_function is 'relu'"),
        (make_gpt, "layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06"),
        (make_gpt, "n_inner", 32, "n_inner is 32"),
        (make_gpt, "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer"),
        (make_llama_with_bpe, "num_hidden_layers", 10**9, "n_layer is 1000000000, but there are only"),
        (make_llama_with_bpe, "num_hidden_layers", 1, "model.layers.1.input_layernorm.weight is not LLaMA's"),
        (make_llama_with_bpe, "num_hidden_layers", 3, "model.layers.2."),
        (make_llama_with_bpe, "num_key_value_heads", None, "k_proj"),
        (make_llama_with_bpe, "head_dim", 8, "head_dim is 8, and this LLaMA has only 4"),
        (make_llama_with_bpe, "hidden_act", "gelu", "hidden_act is 'gelu', and this LLaMA has only 'silu'"),
        (make_llama_with_bpe, "sliding_window", 4096, "sliding_window is 4096"),
        (make_llama_with_bpe, "use_sliding_window", True, "use_sliding_window is True"),
        (make_llama_with_bpe, "layer_types", ["full_attention", "sliding_attention"], "a layer is 'sliding_attention'"),
        (make_llama_with_bpe, "num_local_experts", 8, "num_local_experts is 8"),
        (make_llama_with_bpe, "num_experts", 8, "num_experts is 8"),
        (make_llama_with_bpe, "quantization_config", {"quant_method": "fp8"}, "quantization_config is {'quant_method'"),
        (make_llama_with_bpe, "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling of type 'linear'"),
        (make_llama_with_bpe, "rope_scaling", LLAMA3 | {"type": "linear"}, "'llama3' by rope_type and 'linear'"),
        (make_llama_with_bpe, "rope_scaling", {"rope_type": "llama3"}, "hf/config.json: rope_scaling needs"),
        (make_llama_with_bpe, "rope_parameters", {"rope_type": "dynamic"}, "rope_scaling of type 'dynamic'"),
        (make_llama_with_bpe, "rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (make_llama_with_bpe, "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        (make_llama_with_bpe, "rope_theta", 10**400, "hf/config.json: "),
        (make_llama_with_bpe, "rms_norm_eps", None, "hf/config.json: "),
        (make_llama_with_bpe, "tie_word_embeddings", False, "lm_head.weight is missing"),
        (make_llama_with_bpe, "attention_bias", False, "is not LLaMA's"),
        (make_llama_with_bpe, "vocab_size", 264, "tokenizer.json: a tokenizer's ids must be whole numbers from 0"),
        (make_llama_with_bpe, "vocab_size", 281, "(280, 16), not (281, 16)"),
    ],
)
def test_configs_that_are_not_ours(tmp_path, monkeypatch, make_model, name, value, message):
    monkeypatch.chdir(tmp_path)
    to_hf(make_model(), "hf")
    change_json("hf/config.json", **{name: value})
    check_refused(message)


@pytest.mark.parametrize(
    "make_model, name, value, message",
    [
        (make_gpt, "transformer.h.1.ln_2.bias", None, "h.1.ln_2.bias is missing"),
        (make_gpt, "transformer.h.1.attn.rotary", torch.ones(1), "h.1.attn.rotary is not GPT-2's"),
        (make_gpt, "transformer.h.0.mlp.c_fc.weight", torch.ones(64, 16), "has shape (64, 16), not (16, 64)"),
        (make_gpt, "transformer.wpe.weight", torch.ones(1).expand(10**6, 10**6), "its tensors claim 4,000,000"),
        (make_gpt, "transformer.wpe.weight", torch.full((16, 16), torch.nan), "wpe.weight holds NaN or infinity"),
        (make_gpt, "lm_head.weight", torch.ones(257, 16), "the head differs"),
        (make_llama, "model.layers.1.mlp.up_proj.weight", None, "model.layers.1.mlp.up_proj.weight is missing"),
        (make_llama, "model.layers.1.mlp.experts", torch.ones(1), "model.layers.1.mlp.experts is not LLaMA's"),
        (make_llama, "model.norm.weight", torch.ones(17), "model.norm.weight has shape (17,), not (16,)"),
        (make_llama, "model.norm.weight", torch.full((16,), torch.nan), "model.norm.weight holds NaN or infinity"),
        (make_llama, "lm_head.weight", torch.ones(257, 16), "the head differs"),
    ],
)
def test_weights_that_are_not_ours(tmp_path, monkeypatch, make_model, name, value, message):
    monkeypatch.chdir(tmp_path)
    to_hf(make_model(), "hf")
    weights = read_bin() | {name: value}
    if value is None:
        del weights[name]
    torch.save(weights, BIN)
    check_refused(message)


def test_safetensors_with_lying_headers(gpt):
    save_safe({name: t.contiguous() for name, t in read_bin().items()}, SAFE)
    whole = Path(SAFE).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + header])
    lies = [(2**63).to_bytes(8, "little") + whole[8:], whole[: len(whole) // 2], b"", b"\xff" * 99]
    for lie in ({"data_offsets": [0, 10**12]}, {"shape": [10**6, 16]}):
        text = json.dumps(about | {"transformer.wpe.weight": about["transformer.wpe.weight"] | lie}).encode()
        lies.append(len(text).to_bytes(8, "little") + text + whole[8 + header :])
    for lie in lies:
        Path(SAFE).write_bytes(lie)
        check_refused("hf/model.safetensors is damaged")


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("file", ["../hf/model-2.safetensors", "/hf/model-2.safetensors", "model-2.pt", "", 2])
def test_an_index_names_files_of_its_folder_only(llama, file):
    to_shards({NORM: file})
    check_refused(f"{file!r} is not a .safetensors or .bin file of its folder")


def test_missing_and_damaged_shards_and_an_index_of_nothing(llama):
    to_shards()
    weight_map = read_json(INDEX)["weight_map"]
    for file in ("model-3.safetensors", "model-1.safetensors"):  # not there; there, without this tensor
        change_json(INDEX, weight_map=weight_map | {NORM: file})
        check_refused(f"hf/{file}")
    change_json(INDEX, weight_map=weight_map)
    cut("hf/model-2.safetensors")
    check_refused("hf/model-2.safetensors is damaged")
    for nothing in ([], {}):
        change_json(INDEX, weight_map=nothing)
        check_refused("has no weight_map")
