"""tools/convert.py: what it reads, writes and refuses; published weights, from a small local server; and the count.

That the numbers are GPT-2's, LLaMA's and PEFT's is shown in tests/oracles/, that the ids are the tokenizers library's
in test_tokenizer.py.
"""

import hashlib
import http.client
import http.server
import json
import os
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file as save_safe

import common
from conftest import make_gpt, make_ia3, make_llama, make_llama_with_bpe
from data.tokenizer import GPT2
from ia3 import IA3
from merge import merge
from tools import bpe, convert, files, hf_gpt2

ADAPTER = "adapter/adapter_model.safetensors"


def write_all(model):
    common.save(model, "base.pt")
    convert.to_hf(model, "hf")
    vectors = make_ia3(model)
    vectors.save("ia3.npz")
    convert.to_peft(vectors, "adapter", "base.pt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with base.pt, hf/, ia3.npz and adapter/, all of one random tiny GPT."""
    monkeypatch.chdir(tmp_path)
    write_all(make_gpt())
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(folder, capsys, flags, message):
    """One line that holds message, status 2, and not a byte of the folder changed. Returns the line."""
    before = snapshot(folder)
    capsys.readouterr()
    assert convert.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("convert.py: ") and err.count("\n") == 1 and not out, err
    assert message in err, err
    assert snapshot(folder) == before
    return err


def change_json(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def change(tensors, prefix, changes):
    """Put tensors in, or take them out (None); __ stands for a dot."""
    for name, t in changes.items():
        name = prefix + name.replace("__", ".")
        tensors.pop(name, None)
        if t is not None:
            tensors[name] = t
    return tensors


def change_weights(prefix="transformer.", **changes):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    torch.save(change(weights, prefix, changes), "hf/pytorch_model.bin")


def change_safe(prefix="transformer.", **changes):
    """The adapter's vectors, under the names that PEFT uses."""
    save_safe(change(load_safe(ADAPTER), f"base_model.model.{prefix}", changes), ADAPTER, {"format": "pt"})


change_llama = partial(change_weights, "model.")
change_adapter = partial(change_safe, "model.")


def cut(path):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


def is_same(model, expected):
    theirs = expected.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items() if not name.startswith("ia3."))


# --- there and back ---


@pytest.mark.parametrize("source", ["hf", "hf/pytorch_model.bin", "hf/model.safetensors"])
def test_hf_makes_our_checkpoint_of_a_folder_or_a_file(folder, source, capsys):
    if source.endswith("safetensors"):
        weights = torch.load("hf/pytorch_model.bin", weights_only=True)
        save_safe({name: t.contiguous() for name, t in weights.items()}, source)
    assert convert.main(["hf", source, "--out", "new/base.pt"]) == 0
    assert "10,960 parameters in float32, tokenizer bytes" in capsys.readouterr().out
    model = common.load("new/base.pt")
    assert is_same(model, make_gpt()) and model.config == make_gpt().config and model.tokenizer.about == "bytes"
    model = convert.from_hf(Path(source))
    assert is_same(model, make_gpt()) and not model.training
    assert model.lm_head.weight is model.transformer.wte.weight  # tied
    assert all(p.is_contiguous() and p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_safetensors_goes_before_the_other_file(folder):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    save_safe({name: t.contiguous() + 1 for name, t in weights.items()}, "hf/model.safetensors")
    expected = make_gpt().transformer.wpe.weight + 1
    assert torch.equal(convert.from_hf("hf").transformer.wpe.weight, expected)


def test_vectors_and_bases_go_out_and_come_back(folder, capsys):
    assert convert.main("to-peft --base base.pt --ia3 ia3.npz --out a".split()) == 0
    assert convert.main("from-peft --base base.pt --adapter a --out back.npz".split()) == 0
    assert "folded" not in capsys.readouterr().out
    base = common.load("base.pt")
    first, back = IA3.load("ia3.npz", base).matrices(), IA3.load("back.npz", base).matrices()
    assert all(torch.equal(t, back[name]) for name, t in first.items())
    assert convert.main("to-hf --base base.pt --out home".split()) == 0
    assert is_same(convert.from_hf("home"), make_gpt())
    assert not list(folder.rglob("*.tmp"))


def test_to_hf_merges_vectors_first(folder):
    assert convert.main("to-hf --base base.pt --ia3 ia3.npz --out home".split()) == 0
    model = common.load("base.pt")
    model.ia3 = IA3.load("ia3.npz", model)
    assert is_same(convert.from_hf("home"), merge(model)) and not is_same(convert.from_hf("home"), model)
    with pytest.raises(ValueError, match="merge them first"):
        convert.to_hf(model, "home")


def test_a_model_and_an_adapter_share_no_folder(folder, capsys):
    """Else transformers opens the merged model and puts the adapter on it as well."""
    check(
        folder, capsys, "to-hf --base base.pt --ia3 ia3.npz --out adapter", "adapter_config.json, which would be opened"
    )
    check(folder, capsys, "to-peft --base base.pt --ia3 ia3.npz --out hf", "hf holds a model")
    assert convert.main("to-hf --base base.pt --ia3 ia3.npz --out hf".split()) == 0  # written anew
    for name in ("added_tokens.json", "chat_template.jinja"):
        Path(f"hf/{name}").write_text("{}")
        check(folder, capsys, "to-hf --base base.pt --out hf", name)
        Path(f"hf/{name}").unlink()


def test_a_gpt2_with_a_tokenizer_of_its_own(folder):
    """Also where its vocabulary has the size of GPT-2's."""
    convert.to_hf(make_gpt(vocab_size=50257), "own")
    assert convert.from_hf("own").tokenizer.about == "gpt2"
    about = make_llama_with_bpe().tokenizer.about
    bpe.write_tokenizer(about, "own")
    model = convert.from_hf("own")
    assert model.tokenizer.about == about and model.tokenizer.decode(model.tokenizer.encode_ordinary("the")) == "the"
    convert.to_hf(model, "again")
    assert convert.from_hf("again").tokenizer.about == about


def test_a_gpt2s_own_vocab_and_merges_are_read_and_never_guessed(folder):
    """As many ids as GPT-2's, another vocabulary. The ids and what ends a text are transformers'."""
    convert.to_hf(make_gpt(vocab_size=50257), "own")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["the King's 1623 the thee th"] * 9, vocab_size=290, special_tokens=["<|endoftext|>"])
    theirs.save_model("own")
    assert not Path("own/tokenizer.json").exists()
    ours = convert.from_hf("own").tokenizer
    for text in ("the King's  1623\n\nthee é", "<|endoftext|> the"):
        cut = transformers.GPT2Tokenizer("own/vocab.json", "own/merges.txt", split_special_tokens=True)
        assert ours.encode_ordinary(text) == cut.encode(text)
    assert ours.about["special_tokens"] == {"<|endoftext|>": 0} and ours.decode([0]) == "<|endoftext|>"
    assert ours.eos == [cut.eos_token_id] == [0]
    n = len(ours.ids)
    Path("own/added_tokens.json").write_text(json.dumps({"<new>": n, "<pad>": n + 1}))
    Path("own/special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    tokens = {n: {"content": "<new>", "special": False}, n + 1: {"content": "<pad>", "special": True}}
    for settings in ({}, {"added_tokens_decoder": tokens}):
        Path("own/tokenizer_config.json").write_text(json.dumps(settings))
        cut = transformers.AutoTokenizer.from_pretrained("own", split_special_tokens=True)
        ids = convert.from_hf("own").tokenizer.encode_ordinary("the <new> King <pad>")
        assert ids == cut("the <new> King <pad>").input_ids and n in ids and n + 1 not in ids
    os.rename("own/vocab.json", "own/vocab.json.off")
    assert convert.from_hf("own").tokenizer is None


def test_what_begins_and_ends_a_text_comes_in_and_goes_home(folder):
    """transformers stops where ours does, and AutoTokenizer has the names and the chat template."""
    model = make_llama_with_bpe()
    convert.to_hf(model, "one")
    change_json("one/config.json", bos_token_id=264, eos_token_id=[0, 20])
    change_json("one/tokenizer_config.json", eos_token={"content": "<start>"})
    Path("one/generation_config.json").write_text(json.dumps({"eos_token_id": [20, 0, 10**6]}))
    Path("one/chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    read = convert.from_hf("one")
    assert (read.tokenizer.bos, read.tokenizer.eos) == (264, [264, 20, 0])  # the tokenizer's own first, no id it lacks
    convert.to_hf(read, "two")
    auto = transformers.AutoTokenizer.from_pretrained("two")
    assert (auto.bos_token_id, auto.eos_token_id) == (264, 264)
    assert auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    theirs = transformers.LlamaForCausalLM.from_pretrained("two", dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == [264, 20, 0]
    again = convert.from_hf("two").tokenizer
    assert (again.bos, again.eos, again.chat_template) == (264, [264, 20, 0], "{{ messages[0]['content'] }}!")
    model.tokenizer = None
    convert.to_hf(model, "unknown")  # transformers' defaults are sentencepiece's
    assert transformers.LlamaConfig.from_pretrained("unknown").eos_token_id == 2


def test_a_gpt2_of_mixed_dtypes_names_the_widest(folder):
    model = make_gpt()
    model.transformer.wte.weight.data = model.transformer.wte.weight.data.bfloat16()
    convert.to_hf(model, "mixed")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("mixed")
    assert torch.equal(theirs.transformer.wpe.weight, model.transformer.wpe.weight)


def test_a_vocabulary_that_tells_of_no_tokenizer(folder, capsys):
    model = make_gpt(vocab_size=61)
    convert.to_hf(model, "other")
    assert json.loads(Path("hf/config.json").read_text())["eos_token_id"] == 256  # of the bytes, what ends a text
    assert json.loads(Path("other/config.json").read_text())["eos_token_id"] is None
    assert convert.main("hf other --out other.pt".split()) == 0
    assert "tokenizer unknown" in capsys.readouterr().out and common.load("other.pt").tokenizer is None


def test_without_the_safetensors_package(folder, capsys, monkeypatch):
    Path("safe").mkdir()
    save_safe({"wte.weight": torch.ones(2)}, "safe/model.safetensors")
    Path("safe/config.json").write_bytes(Path("hf/config.json").read_bytes())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert is_same(convert.from_hf("hf"), make_gpt())  # a .bin needs none
    check(folder, capsys, "hf safe --out new.pt", "pip install safetensors")
    check(folder, capsys, "to-peft --base base.pt --ia3 ia3.npz --out new", "pip install safetensors")
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out new.npz", "pip install safetensors")


# --- what is refused ---


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


NAN = torch.full((16, 16), torch.nan)
W = torch.ones(16, 16)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: os.remove("hf/config.json"), "hf/config.json"),
        (lambda: Path("hf/config.json").write_text("{"), "hf/config.json is not JSON"),
        (lambda: Path("hf/config.json").write_text("[]"), "no JSON object"),
        (lambda: Path("hf/config.json").write_text("[" * 100_000), "hf/config.json is not JSON"),
        (lambda: Path("hf/config.json").write_bytes(b"\xff\xfe"), "hf/config.json is not JSON"),
        (lambda: change_json("hf/config.json", model_type="bert"), "of type 'bert': known are"),
        (lambda: change_json("hf/config.json", n_layer=None), "n_layer must be a whole number"),
        (lambda: change_json("hf/config.json", n_head=2.0), "n_head must be a whole number of at least 1, not 2.0"),
        (lambda: change_json("hf/config.json", n_head=3), "n_embd 16 is not divisible by n_head 3"),
        (lambda: change_json("hf/config.json", n_layer=3), "h.2."),
        (lambda: change_json("hf/config.json", n_layer=1), "h.1.ln_1.weight is not GPT-2's"),
        (lambda: change_json("hf/config.json", n_layer=10**9), "n_layer is 1000000000, but there are only 29"),
        (lambda: change_json("hf/config.json", n_embd=32), "wte.weight has shape (257, 16), not (257, 32)"),
        (lambda: change_json("hf/config.json", n_positions=8), "wpe.weight has shape (16, 16), not (8, 16)"),
        (lambda: change_json("hf/config.json", n_embd=2**70), "hf/pytorch_model.bin"),
        (lambda: change_json("hf/config.json", n_embd=2**40), "hf/pytorch_model.bin"),
        (lambda: change_json("hf/config.json", activation_function="relu"), "activation_function is 'relu'"),
        (lambda: change_json("hf/config.json", layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (lambda: change_json("hf/config.json", n_inner=32), "n_inner is 32"),
        (lambda: change_json("hf/config.json", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer"),
        (
            lambda: os.remove("hf/pytorch_model.bin"),
            "hf holds no model.safetensors or",
        ),
        (lambda: cut("hf/pytorch_model.bin"), "hf/pytorch_model.bin is truncated"),
        (lambda: torch.save({"wte.weight": Code()}, "hf/pytorch_model.bin"), "carries code"),
        (lambda: torch.save([1], "hf/pytorch_model.bin"), "holds no tensors by name"),
        (lambda: torch.save({"model.layers.0.q_proj.weight": W}, "hf/pytorch_model.bin"), "only 1 tensors"),
        (lambda: change_weights(h__1__ln_2__bias=None), "h.1.ln_2.bias"),
        (lambda: change_weights(h__1__attn__rotary=torch.ones(1)), "h.1.attn.rotary is not GPT-2's"),
        (
            lambda: change_weights(h__0__mlp__c_fc__weight=torch.ones(64, 16)),
            "c_fc.weight has shape (64, 16), not (16, 64)",
        ),
        (
            lambda: change_weights(wpe__weight=torch.ones(1).expand(10**6, 10**6)),
            "its tensors claim 4,000,000",
        ),
        (lambda: change_weights(wpe__weight=NAN), "wpe.weight holds NaN or infinity"),
        (lambda: change_weights(wpe__weight=W.long()), "wpe.weight is not a plain tensor of floats, but torch.int64"),
        (lambda: change_weights(wpe__weight=W.to(torch.float8_e4m3fn)), "but torch.float8_e4m3fn"),
        (lambda: change_weights(wpe__weight=W.to_sparse()), "torch.sparse_coo"),
        (lambda: change_weights(wpe__weight=W.to("meta")), "on meta"),
        (lambda: change_weights(wpe__weight=torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)), "but torch.qint8"),
        (lambda: change_weights(wpe__weight="words"), "wpe.weight is a str"),
        (lambda: Path("hf/model.safetensors").write_bytes(b"\xff" * 99), "hf/model.safetensors is damaged"),
    ],
)
def test_folders_that_are_not_gpt2s(folder, capsys, spoil, message):
    spoil()
    check(folder, capsys, "hf hf --out new.pt", message)
    assert not os.path.exists("code-was-run")


def test_safetensors_with_lying_headers(folder, capsys):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    save_safe({name: t.contiguous() for name, t in weights.items()}, "whole.safetensors")
    whole = Path("whole.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + header])
    moved = about | {"transformer.wpe.weight": about["transformer.wpe.weight"] | {"data_offsets": [0, 10**12]}}
    taller = about | {"transformer.wpe.weight": about["transformer.wpe.weight"] | {"shape": [10**6, 16]}}

    def file(about):
        text = json.dumps(about).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + header :]

    lies = [(2**63).to_bytes(8, "little") + whole[8:], whole[: len(whole) // 2], whole[:5], b"", file(moved)]
    for lie in [*lies, file(taller)]:
        Path("hf/model.safetensors").write_bytes(lie)
        check(folder, capsys, "hf hf --out new.pt", "hf/model.safetensors is damaged")


def test_an_untied_head_is_refused(folder, capsys):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    torch.save(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, "hf/pytorch_model.bin")
    check(folder, capsys, "hf hf --out new.pt", "the head differs")


def test_only_our_checkpoints_are_bases(folder, capsys):
    for flags in ("count hf", "count hf/pytorch_model.bin", "to-hf --base hf/pytorch_model.bin --out new"):
        check(folder, capsys, flags, "hf")
    check(folder, capsys, "count gpt3", "gpt3")
    check(folder, capsys, "hf gpt3 --out new.pt", "no file or folder gpt3")
    checkpoint = torch.load("base.pt", weights_only=True)
    for tokenizer in ("gpt2", "", 5):
        torch.save(checkpoint | {"tokenizer": tokenizer}, "other.pt")
        check(folder, capsys, "to-hf --base other.pt --out new", "tokenizer")
    checkpoint["model"]["transformer.wpe.weight"] = torch.ones(1).expand(10**6, 10**6)  # four bytes, of a terabyte
    torch.save(checkpoint, "other.pt")
    check(folder, capsys, "count other.pt", "its tensors claim 4,000,000")


def test_a_command_that_is_none(capsys):
    for flags in ([], ["to-onnx"], ["hf", "hf"], ["to-peft", "--base"]):
        with pytest.raises(SystemExit) as e:
            convert.main(flags)
        assert e.value.code == 2


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: os.remove("adapter/adapter_config.json"), "adapter/adapter_config.json"),
        (lambda: change_json("adapter/adapter_config.json", peft_type="LORA"), "of type 'LORA', not 'IA3'"),
        (lambda: os.remove(ADAPTER), "adapter holds no adapter_model.safetensors or adapter_model.bin"),
        (lambda: cut(ADAPTER), "is damaged"),
        (lambda: change_safe(h__2__attn__c_attn__ia3_l=torch.ones(48, 1)), "h.2.attn.c_attn.ia3_l is no"),
        (lambda: change_safe(h__0__mlp__c_fc__ia3_l=torch.ones(64, 1)), "h.0.mlp.c_fc.ia3_l"),
        (lambda: change_safe(h__0__attn__c_attn__ia3_l=torch.ones(96, 1)), "(96, 1), not (48, 1)"),
        (lambda: change_safe(h__0__mlp__c_proj__ia3_l=torch.ones(16, 1)), "(16, 1), not (1, 64)"),
        (lambda: change_safe(h__1__mlp__c_proj__ia3_l=torch.full((1, 64), torch.nan)), "ia3_l holds NaN"),
        (lambda: change_safe(h__1__mlp__c_proj__ia3_l=torch.ones(1, 64).long()), "not a plain tensor of floats"),
        # 1e30 as l_q and as l_k: each is a float32, and their product is none
        (lambda: change_safe(h__0__attn__c_attn__ia3_l=torch.full((48, 1), 1e30)), "l_k holds NaN or infinity"),
        (lambda: save_safe({}, ADAPTER), "nothing in it"),
    ],
)
def test_adapters_that_do_not_fit(folder, capsys, spoil, message):
    spoil()
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out new.npz", message)


def test_layers_without_vectors_are_told(folder, capsys):
    change_safe(h__1__attn__c_attn__ia3_l=None, h__1__mlp__c_proj__ia3_l=None)
    assert convert.main("from-peft --base base.pt --adapter adapter --out back.npz".split()) == 0
    assert "1 of the base's 2 layers" in capsys.readouterr().out
    vectors = IA3.load("back.npz", common.load("base.pt"))
    assert all((l[1] == 1).all() and (l[0] != 1).any() for l in vectors.matrices().values())


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(folder, capsys):
    for sizes in ({"seed": 1}, {"n_head": 4}, {"n_layer": 3}):
        common.save(make_gpt(**sizes), "other.pt")
        check(folder, capsys, "from-peft --base other.pt --adapter adapter --out new.npz", "another base of this shape")


@pytest.mark.parametrize(
    "flags",
    [
        "from-peft --base base.pt --adapter adapter --out base.pt",
        f"from-peft --base base.pt --adapter adapter --out {ADAPTER}",
        "from-peft --base base.pt --adapter adapter --out adapter/adapter_config.json",
        "from-peft --base new.npz.tmp --adapter adapter --out new.npz",
        "hf hf --out hf/pytorch_model.bin",
        "hf hf --out hf/../hf/config.json",
        "hf hf/config.json.tmp --out hf/config.json",
        "to-hf --base base/pytorch_model.bin --out base",
        "to-hf --base base.pt --ia3 base/config.json --out base",
        "to-hf --base base.pt --ia3 base/pytorch_model.bin.tmp --out base",
        "to-peft --base base.pt --ia3 adapter/adapter_config.json.tmp --out adapter",
        "to-peft --base adapter/adapter_model.safetensors --ia3 ia3.npz --out adapter",
        "smollm2 --out new.gguf",
    ],
)
def test_no_output_replaces_what_the_command_reads(folder, capsys, monkeypatch, flags):
    monkeypatch.setattr(convert.smollm2, "fetch", lambda path: Path(path).write_bytes(b""))
    Path("new.npz.tmp").write_bytes(Path("base.pt").read_bytes())
    Path("hf/config.json.tmp").write_bytes(Path("hf/pytorch_model.bin").read_bytes())
    Path("base").mkdir()
    Path("base/pytorch_model.bin").write_bytes(Path("base.pt").read_bytes())
    check(folder, capsys, flags, "which this command reads")


def test_outputs_that_cannot_be(folder, capsys):
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out hf", "hf exists and is not a regular file")
    check(folder, capsys, "to-hf --base base.pt --out base.pt", "base.pt")
    for flags in ("hf hf", "to-hf --base base.pt", "to-peft --base base.pt --ia3 ia3.npz"):
        check(folder, capsys, f"{flags} --out=", "the name of the output is empty")
    Path("hf/model.safetensors").write_bytes(b"another model")
    check(folder, capsys, "to-hf --base base.pt --out hf", "which would be opened instead")


def test_ctrl_c_is_one_line_and_130(folder, capsys, monkeypatch):
    def press(model, f):
        f.write(b"half")
        raise KeyboardInterrupt

    before = snapshot(folder)
    monkeypatch.setattr(torch, "save", press)
    assert convert.main("hf hf --out base.pt".split()) == 130
    assert capsys.readouterr().err == "convert.py: stopped\n"
    assert snapshot(folder) == before


# --- LLaMA ---


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A working directory with hf/, a folder of a random tiny LLaMA, base.pt of it, ia3.npz and adapter/."""
    monkeypatch.chdir(tmp_path)
    write_all(make_llama_with_bpe())
    return tmp_path


def make_shards(change=None):
    """Put hf's weights into two .safetensors and an index, the norms into the second; change: of {name: shard}."""
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    os.remove("hf/pytorch_model.bin")
    where = {name: f"model-{1 + ('norm' in name)}.safetensors" for name in weights}
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        tensors = {name: t for name, t in weights.items() if where[name] == shard}
        save_safe(tensors | {"model.not.in.the.index": torch.ones(1)}, f"hf/{shard}")
    where |= change or {}
    Path("hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32.0


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
    read = convert.from_hf("hf")
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == model.config.tied and not read.training


def test_config_names_the_widest_dtype_since_transformers_casts_to_it(llama):
    model = make_llama_with_bpe().bfloat16()
    model.model.norm.float()
    convert.to_hf(model, "mixed")
    assert json.loads(Path("mixed/config.json").read_text())["torch_dtype"] == "float32"
    assert is_same(convert.from_hf("mixed"), model)


def test_a_llamas_vectors_are_merged_in_float32_and_its_adapter_comes_back(llama, capsys):
    model = make_llama_with_bpe().bfloat16()
    common.save(model, "base.pt")
    make_ia3(model).save("ia3.npz")
    assert convert.main("to-hf --base base.pt --ia3 ia3.npz --out home".split()) == 0
    base = common.load("base.pt")
    base.ia3 = IA3.load("ia3.npz", base)
    home = convert.from_hf("home")
    assert is_same(home, merge(base)) and home.lm_head.weight.dtype == torch.float32
    capsys.readouterr()
    assert convert.main("to-peft --base base.pt --ia3 ia3.npz --out a".split()) == 0
    assert convert.main("from-peft --base base.pt --adapter a --out back.npz".split()) == 0
    assert "queries" not in (out := capsys.readouterr().out) and "folded" not in out
    back = IA3.load("back.npz", base).matrices()
    assert all(torch.equal(t, back[name]) for name, t in base.ia3.matrices().items())


def test_shards_are_read_one_at_a_time(llama, monkeypatch):
    make_shards()
    read = files.read_tensors
    mapped = []  # the tensors of the shard before

    def watch(path):
        assert sum(t() is not None for t in mapped) <= 1  # the last, which the reader still has in its hand
        tensors, about = read(path)
        mapped[:] = [weakref.ref(t) for t in tensors.values()]
        return tensors, about

    monkeypatch.setattr(files, "read_tensors", watch)
    for source in ("hf", "hf/model.safetensors.index.json"):
        assert is_same(convert.from_hf(source), make_llama_with_bpe())
    assert len(mapped) == 6  # two norms in each of two layers, the last norm, and one that is not in the index


def test_shards_of_the_older_kind(llama):
    """pytorch_model.bin.index.json and .bin files, as Llama 2 was published."""
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    os.remove("hf/pytorch_model.bin")
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
    for shard in set(where.values()):
        torch.save({name: t for name, t in weights.items() if where[name] == shard}, f"hf/{shard}")
    Path("hf/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for source in ("hf", "hf/pytorch_model.bin.index.json"):
        assert is_same(convert.from_hf(source), make_llama_with_bpe())


def test_a_single_safetensors_file_and_what_older_versions_stored(llama):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    weights |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # tied, and stored all the same
    save_safe(weights, "hf/model.safetensors")
    os.remove("hf/pytorch_model.bin")
    assert is_same(convert.from_hf("hf"), make_llama_with_bpe())
    os.remove("hf/tokenizer.json")
    assert convert.from_hf("hf").tokenizer is None


def test_names_of_a_wrapped_model_and_of_one_without_a_head(llama):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    for prefix, keep in (("module.", "model."), ("_orig_mod.", "model."), ("", "")):
        renamed = {prefix + keep + name.removeprefix("model."): t for name, t in weights.items()}
        torch.save(renamed, "hf/pytorch_model.bin")
        assert is_same(convert.from_hf("hf"), make_llama_with_bpe())


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_the_same_model_under_another_name(folder, kind):
    """A Mistral without a window, and a Qwen2, whose biases are random here; both compute in float32, and in another
    order, so that logits of size 1 may differ by some units of 1e-7. A wrong bias moves them by 0.1."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"tie_word_embeddings": True} if kind == "Qwen2" else {"sliding_window": None}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, std=1.0 if name.endswith("bias") else 0.2)
    theirs.save_pretrained("theirs")
    ours = convert.from_hf("theirs")
    idx = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        assert (ours(idx, idx)[0] - theirs(idx).logits).abs().max() < 1e-5 * theirs(idx).logits.abs().max()
    convert.to_hf(ours, "home")
    home = transformers.LlamaForCausalLM.from_pretrained("home", dtype=torch.float32)
    with torch.no_grad():
        assert (home(idx).logits - theirs(idx).logits).abs().max() < 1e-5 * theirs(idx).logits.abs().max()
    change = {"Mistral": {"sliding_window": 16}, "Qwen2": {"use_sliding_window": True}}
    change_json("theirs/config.json", **change[kind])
    with pytest.raises(ValueError, match="sliding_window"):
        convert.from_hf("theirs")


def test_an_unknown_token_where_every_byte_has_one(llama):
    change_tokenizer("model.unk_token", "<unk>")
    assert convert.from_hf("hf").tokenizer.encode_ordinary("the") == make_llama_with_bpe().tokenizer.encode_ordinary(
        "the"
    )


def test_both_spellings_of_the_rotary_parameters(llama):
    about = json.loads(Path("hf/config.json").read_text())
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
        config = convert.from_hf("hf").config
        assert (config.rope_base, config.rope_scaling) == (base, expected)


def change_config(**changes):
    change_json("hf/config.json", **changes)


def change_head():
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    torch.save(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, "hf/pytorch_model.bin")


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: change_config(model_type="phi"), "of type 'phi'"),
        (lambda: change_config(model_type=["llama"]), "of type ['llama']"),
        (lambda: change_config(num_hidden_layers=None), "n_layer must be a whole number"),
        (lambda: change_config(num_hidden_layers=10**9), "n_layer is 1000000000, but there are only"),
        (lambda: change_config(num_hidden_layers=1), "is not LLaMA's"),
        (lambda: change_config(num_hidden_layers=3), "model.layers.2."),
        (lambda: change_config(num_attention_heads=4.0), "n_head must be a whole number of at least 1, not 4.0"),
        (lambda: change_config(num_key_value_heads=3), "n_head 4 is not divisible by n_kv_head 3"),
        (lambda: change_config(num_key_value_heads=0), "n_kv_head must be a whole number"),
        (lambda: change_config(num_key_value_heads=None), "k_proj"),
        (lambda: change_config(hidden_size=2**70), "hf/pytorch_model.bin"),
        (lambda: change_config(hidden_size=2**40), "hf/pytorch_model.bin"),
        (lambda: change_config(head_dim=8), "head_dim is 8, and this LLaMA has only 4"),
        (lambda: change_config(hidden_act="gelu"), "hidden_act is 'gelu', and this LLaMA has only 'silu'"),
        (lambda: change_config(sliding_window=4096), "sliding_window is 4096"),
        (lambda: change_config(use_sliding_window=True), "use_sliding_window is True"),
        (lambda: change_config(num_local_experts=8), "num_local_experts is 8"),
        (lambda: change_config(num_experts=8), "num_experts is 8"),
        (lambda: change_config(quantization_config={"quant_method": "fp8"}), "quantization_config is {'quant_method'"),
        (lambda: change_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling of type 'linear'"),
        (
            lambda: change_config(rope_scaling=LLAMA3 | {"type": "default"}),
            "'llama3' by rope_type and 'default'",
        ),
        (lambda: change_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling of type 'yarn'"),
        (lambda: change_config(rope_parameters={"rope_type": "dynamic"}), "rope_scaling of type 'dynamic'"),
        (lambda: change_config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (lambda: change_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (lambda: change_config(rope_scaling={"rope_type": "llama3"}), "rope_scaling"),
        (lambda: change_config(rope_scaling=LLAMA3 | {"factor": "8"}, rope_theta=-1), "rope_base must be above 0"),
        (lambda: change_config(rope_scaling=LLAMA3 | {"factor": []}), "hf/config.json: "),
        (lambda: change_config(rope_scaling="llama3"), "hf/config.json: "),
        (lambda: change_config(rope_theta="10000"), "hf/config.json: "),
        (lambda: change_config(rope_theta=10**400), "hf/config.json: "),
        (lambda: change_config(rms_norm_eps=None), "hf/config.json: "),
        (lambda: change_config(tie_word_embeddings="no"), "hf/config.json: tied must be True or False, not 'no'"),
        (lambda: change_config(mlp_bias=1), "hf/config.json: mlp_bias must be True or False, not 1"),
        (lambda: change_config(tie_word_embeddings=False), "lm_head.weight"),
        (lambda: change_config(attention_bias=False), "is not LLaMA's"),
        (
            lambda: change_config(vocab_size=264),
            "tokenizer.json: a tokenizer's ids must be whole numbers from 0",
        ),
        (lambda: change_config(vocab_size=281), "(280, 16), not (281, 16)"),
        (change_head, "the head differs"),
        (lambda: change_llama(layers__1__mlp__up_proj__weight=None), "model.layers.1.mlp.up_proj.weight"),
        (lambda: change_llama(layers__1__mlp__experts=W), "model.layers.1.mlp.experts is not LLaMA's"),
        (lambda: change_llama(norm__weight=torch.ones(17)), "model.norm.weight has shape (17,), not (16,)"),
        (lambda: change_llama(norm__weight=torch.full((16,), torch.nan)), "model.norm.weight holds NaN or infinity"),
        (
            lambda: change_llama(norm__weight=torch.ones(1).expand(10**12)),
            "its tensors claim 4,000,000",
        ),
        (lambda: change_llama(norm__weight=torch.ones(16).to(torch.float8_e4m3fn)), "but torch.float8_e4m3fn"),
        (lambda: change_llama(norm__weight=torch.ones(16).to_sparse()), "torch.sparse_coo"),
        (lambda: change_llama(norm__weight=torch.ones(16, device="meta")), "on meta"),
        (lambda: change_llama(norm__weight="words"), "model.norm.weight is a str"),
        (lambda: torch.save({NORM: Code()}, "hf/pytorch_model.bin"), "carries code"),
        (lambda: os.remove("hf/pytorch_model.bin"), "hf holds no model.safetensors or"),
        (lambda: make_shards({NORM: "../hf/model-2.safetensors"}), "'../hf/model-2.safetensors' is not a .safetensors"),
        (lambda: make_shards({NORM: f"{os.getcwd()}/hf/model-2.safetensors"}), "is not a .safetensors"),
        (lambda: make_shards({NORM: "model-2.pt"}), "'model-2.pt' is not a .safetensors"),
        (lambda: make_shards({NORM: ""}), "'' is not a .safetensors"),
        (lambda: make_shards({NORM: 2}), "2 is not a .safetensors"),
        (lambda: make_shards({NORM: "model-3.safetensors"}), "hf/model-3.safetensors"),
        (lambda: make_shards({NORM: "model-1.safetensors"}), f"model-1.safetensors has no {NORM}"),
        (lambda: (make_shards(), cut("hf/model-2.safetensors")), "hf/model-2.safetensors is damaged"),
        (lambda: (make_shards(), change_json("hf/model.safetensors.index.json", weight_map=[])), "has no weight_map"),
        (lambda: (make_shards(), change_json("hf/model.safetensors.index.json", weight_map={})), "has no weight_map"),
        (lambda: (make_shards(), cut("hf/model.safetensors.index.json")), "index.json is not JSON"),
    ],
)
def test_folders_that_are_not_llamas(llama, capsys, spoil, message):
    spoil()
    check(llama, capsys, "hf hf --out new.pt", message)
    assert not os.path.exists("code-was-run")


def change_tokenizer(key, value):
    """Set a place in hf/tokenizer.json, such as model.type."""
    about = json.loads(Path("hf/tokenizer.json").read_text())
    node = about
    *way, last = key.split(".")
    for step in way:
        node = node[step]
    node[last] = value
    Path("hf/tokenizer.json").write_text(json.dumps(about))


def change_vocab(change):
    vocab = json.loads(Path("hf/tokenizer.json").read_text())["model"]["vocab"]
    change_tokenizer("model.vocab", {token: i for token, i in (vocab | change).items() if i is not None})


def change_merges(change):
    merges = json.loads(Path("hf/tokenizer.json").read_text())["model"]["merges"]
    assert merges[:3] == [["t", "h"], ["Ġ", "th"], ["th", "e"]]
    change_tokenizer("model.merges", change(merges))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
PLAIN_TOKEN = {"id": 0, "content": "<end>", "special": False}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: Path("hf/tokenizer.json").write_text("{"), "hf/tokenizer.json is not JSON"),
        (lambda: Path("hf/tokenizer.json").write_text("{}"), "hf/tokenizer.json: KeyError: 'model'"),
        (lambda: change_tokenizer("model", []), "hf/tokenizer.json: AttributeError"),
        (lambda: change_tokenizer("model.type", "Unigram"), "a tokenizer of type 'Unigram'"),
        (lambda: change_tokenizer("model.type", "WordPiece"), "a tokenizer of type 'WordPiece'"),
        (lambda: change_tokenizer("model.byte_fallback", True), "byte_fallback is True"),
        (lambda: (change_tokenizer("model.unk_token", "a"), change_vocab({"b": None})), "unk_token is 'a'"),
        (lambda: change_tokenizer("model.dropout", 0.1), "dropout is 0.1"),
        (lambda: change_tokenizer("model.end_of_word_suffix", "</w>"), "end_of_word_suffix is '</w>'"),
        (lambda: change_tokenizer("normalizer", {"type": "NFC"}), 'the normalizer {"type": "NFC"} is not known'),
        (lambda: change_tokenizer("pre_tokenizer", None), "the pre_tokenizer null is not known"),
        (lambda: change_tokenizer("pre_tokenizer", {"type": "Metaspace"}), 'pre_tokenizer {"type": "Metaspace"}'),
        (
            lambda: change_tokenizer("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}),
            '"add_prefix_space": true',
        ),
        (lambda: change_tokenizer("pre_tokenizer", BYTE_LEVEL | {"use_regex": False}), '"use_regex": false'),
        (lambda: change_tokenizer("pre_tokenizer.pretokenizers", [SPLIT, BYTE_LEVEL]), '"Regex": "'),
        (lambda: change_tokenizer("pre_tokenizer.pretokenizers", [{"type": "Digits"}, BYTE_LEVEL]), '"Digits"'),
        (lambda: change_tokenizer("pre_tokenizer.pretokenizers", 5), "hf/tokenizer.json: TypeError"),
        (lambda: change_tokenizer("added_tokens", [PLAIN_TOKEN | {"id": 9}]), "'<end>' has id 9"),
        (lambda: change_tokenizer("added_tokens", [PLAIN_TOKEN | {"lstrip": True}]), "'<end>' has lstrip"),
        (lambda: change_tokenizer("added_tokens", [{"id": 0}]), "'content'"),
        (
            lambda: change_tokenizer("added_tokens", [{"id": 98, "content": "a", "special": True}]),
            "'a' is a special token and a byte's own",
        ),
        (lambda: change_tokenizer("added_tokens", [PLAIN_TOKEN | {"id": 1, "special": True}]), "'<end>' has id 1"),
        (lambda: change_tokenizer("added_tokens", [{"id": 265, "content": "", "special": True}]), "special_tokens"),
        (lambda: change_merges(lambda m: [m[1], m[0], *m[2:]]), "the merges are not in the order of the ids"),
        (lambda: change_merges(lambda m: [m[0], *m[2:]]), "the merges do not make the token b' th' as the ids do"),
        (lambda: change_merges(lambda m: [*m[:2], ["t", "he"], *m[3:]]), "b't' and b'he'"),
        (lambda: change_merges(lambda m: [*m, ["x", "y"]]), "b'x' and b'y'"),
        (lambda: change_merges(lambda m: [*m, "xyz"]), "hf/tokenizer.json: "),
        (lambda: change_merges(lambda m: [*m, 5]), "hf/tokenizer.json: TypeError"),
        (lambda: change_vocab({"th": None}), "b't' and b'h'"),
        (lambda: change_vocab({"日": 270}), "the token '日' is not in the spelling of byte-level BPE"),
        (lambda: change_vocab({"th": "257"}), "hf/tokenizer.json: TypeError"),
        (lambda: change_vocab({"x": 10**6}), "hf/tokenizer.json: a tokenizer's ids must be whole numbers"),
        (lambda: change_vocab({"x": -1}), "a tokenizer's ids must be whole numbers"),
        (lambda: change_vocab({"x": 5.0}), "a tokenizer's ids must be whole numbers"),
        (lambda: change_vocab({"": 270}), "hf/tokenizer.json: "),
    ],
)
def test_tokenizers_that_are_another_kind(llama, capsys, spoil, message):
    spoil()
    check(llama, capsys, "hf hf --out new.pt", message)


def test_a_pre_tokenizer_as_older_files_have_it(llama):
    """Without use_regex, which is then true; trim_offsets is of places in the text, not of ids."""
    change_tokenizer("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False})
    assert convert.from_hf("hf").tokenizer.about["pattern"] == GPT2


def test_a_tokenizer_that_is_a_name_needs_no_file(llama, capsys):
    common.save(make_llama(), "bytes.pt")  # but another's would be read
    check(llama, capsys, "to-hf --base bytes.pt --out hf", "another model's tokenizer.json")
    assert convert.main("to-hf --base bytes.pt --out new".split()) == 0
    assert sorted(os.listdir("new")) == ["config.json", "pytorch_model.bin"]
    assert json.loads(Path("new/config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda: change_adapter(layers__2__self_attn__v_proj__ia3_l=torch.ones(8, 1)),
            "layers.2.self_attn.v_proj.ia3_l",
        ),
        (lambda: change_adapter(layers__0__self_attn__q_proj__ia3_l=torch.ones(16, 1)), "q_proj.ia3_l"),
        (lambda: change_adapter(layers__0__mlp__gate_proj__ia3_l=torch.ones(40, 1)), "gate_proj.ia3_l"),
        (
            lambda: change_adapter(layers__0__self_attn__k_proj__ia3_l=torch.ones(1, 8)),
            "(1, 8), not (8, 1)",
        ),
        (lambda: change_adapter(layers__0__self_attn__v_proj__ia3_l=torch.ones(16, 1)), "(16, 1), not (8, 1)"),
        (lambda: change_adapter(layers__0__mlp__down_proj__ia3_l=torch.ones(16, 1)), "(16, 1), not (1, 40)"),
        (lambda: change_adapter(layers__0__mlp__down_proj__ia3_l=torch.full((1, 40), torch.inf)), "ia3_l holds NaN"),
        (lambda: common.save(make_llama_with_bpe(seed=1), "base.pt"), "another base of this shape"),
        (lambda: common.save(make_gpt(), "base.pt"), "another base of this shape"),
        (lambda: (change_adapter(), common.save(make_gpt(), "base.pt")), "ia3_l"),
    ],
)
def test_a_llamas_adapters_that_do_not_fit(llama, capsys, spoil, message):
    spoil()
    check(llama, capsys, "from-peft --base base.pt --adapter adapter --out new.npz", message)


@pytest.mark.parametrize(
    "flags",
    [
        "hf hf --out hf/tokenizer.json",
        "hf hf --out hf/model-2.safetensors",
        "hf hf --out hf/model.safetensors.index.json",
        "hf hf/model.safetensors.index.json --out hf/model-1.safetensors",
        "to-hf --base out/tokenizer.json --out out",
        "to-hf --base base.pt --ia3 out/tokenizer_config.json --out out",
    ],
)
def test_no_output_replaces_a_part_of_a_llama(llama, capsys, flags):
    make_shards()
    os.mkdir("out")
    Path("out/tokenizer.json").write_bytes(Path("base.pt").read_bytes())
    Path("out/tokenizer_config.json").write_bytes(Path("ia3.npz").read_bytes())
    check(llama, capsys, flags, "which this command reads")


def test_sizes_of_a_llamas_checkpoint_that_are_none(llama, capsys):
    for name, value in (("rope_base", 10**400), ("attention_bias", b"yes"), ("tied", 1)):
        checkpoint = torch.load("base.pt", weights_only=True)
        checkpoint["model_args"][name] = value
        torch.save(checkpoint, "other.pt")
        check(llama, capsys, "to-hf --base other.pt --out new", "other.pt is not a checkpoint: ")


# --- published weights ---


class Server(http.server.BaseHTTPRequestHandler):
    """A hub: announces the SHA-256 of self.server.body, and leads to /cdn/…, where the body is."""

    def do_GET(self):
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        is_file = self.path.startswith("/cdn/")
        self.send_response(hub.status if is_file or hub.status != 200 else 302)
        self.send_header("Content-Length", str(len(hub.body) if is_file else 0))
        if not is_file:
            self.send_header("Location", hub.redirect + self.path)
            if hub.sha256:
                self.send_header("X-Linked-ETag", f'"{hub.sha256}"')
        self.end_headers()
        if is_file:
            self.wfile.write(hub.body[: hub.cut])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub that publishes a tiny 'gpt2', an empty cache, and an empty working directory."""
    monkeypatch.setitem(convert.SIZES, "gpt2", (2, 2, 16))
    model = make_gpt(vocab_size=50257, block_size=1024)
    weights = {name.removeprefix("transformer."): t for name, t in hf_gpt2.describe(model)[1].items()}  # as in 2019
    torch.save(weights, tmp_path / "published.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.body = (tmp_path / "published.bin").read_bytes()
        server.sha256 = hashlib.sha256(server.body).hexdigest()
        server.asked, server.cut, server.status, server.redirect = [], None, 200, "/cdn"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        server.path = tmp_path / "cache/hub/checkpoints/gpt2/pytorch_model.bin"
        yield server
        server.shutdown()


def refused(hub, capsys, message):
    """The command fails with one last line that holds message, and nothing is in the cache or the working directory."""
    capsys.readouterr()
    assert convert.main(["gpt2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("convert.py: ") and message in line and str(hub.path) in line, line
    assert not list(hub.path.parent.glob("*")) and not os.listdir()


def test_published_weights_are_fetched_once(hub):
    for _ in range(2):
        assert convert.main("gpt2 --out gpt2.pt".split()) == 0
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    assert hub.asked == [f"HEAD {path}", f"GET {path}", f"GET /cdn{path}"]
    model = common.load("gpt2.pt")
    assert is_same(model, make_gpt(vocab_size=50257, block_size=1024)) and model.tokenizer.about == "gpt2"


def test_what_is_not_the_announced_file_leaves_nothing_and_the_next_run_fetches_again(hub, capsys):
    sha256, hub.sha256 = hub.sha256, "0" * 64
    refused(hub, capsys, "hash")
    hub.sha256 = sha256
    for cut in (0, len(hub.body) // 2):
        hub.cut = cut
        refused(hub, capsys, "hash")
    hub.cut = None
    assert convert.main(["gpt2"]) == 0


def test_a_server_that_announces_no_sha256_is_refused(hub, capsys):
    for sha256 in (None, "0" * 40):  # git's hash, which the hub announces for small files
        hub.sha256 = sha256
        refused(hub, capsys, "SHA-256")
    assert not any(line.startswith("GET") for line in hub.asked)


def test_no_network_says_what_was_tried_and_what_would_do(hub, capsys, monkeypatch):
    hub.status = 503
    refused(hub, capsys, "HTTP Error 503")
    # 9: no one listens there
    for endpoint in ("hub", "http://127.0.0.1:port", "http://127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused(hub, capsys, f"{endpoint}/openai-community/gpt2/resolve")


def test_a_damaged_file_in_the_cache_is_named_and_stays(hub, tmp_path, capsys):
    hub.path.parent.mkdir(parents=True)
    for damaged in (hub.body[:-1000], b"<html>Sign in to this network</html>", b""):
        hub.path.write_bytes(damaged)
        check(tmp_path, capsys, "gpt2", str(hub.path))
    check(tmp_path, capsys, f"gpt2 --out {hub.path}", "which this command reads")
    assert not hub.asked


def test_memory_that_is_short_costs_no_cached_file(hub, tmp_path, capsys, monkeypatch):
    hub.path.parent.mkdir(parents=True)
    hub.path.write_bytes(hub.body)
    for short in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):

        def load(*_, short=short, **__):
            raise short

        monkeypatch.setattr(torch, "load", load)
        check(tmp_path, capsys, "gpt2", "memory")


def test_ctrl_c_while_fetching_leaves_nothing(hub, capsys, monkeypatch):
    def press(response, amount=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(http.client.HTTPResponse, "read", press)
    assert convert.main(["gpt2"]) == 130
    assert capsys.readouterr().err.splitlines()[1:] == ["convert.py: stopped"]
    assert not list(hub.path.parent.glob("*"))


# --- the count ---


def test_the_count(folder, capsys):
    assert convert.main(["count", *convert.SIZES, "base.pt"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    rows = [row.split() for row in rows]
    assert head.split()[0] == "model" and [row[0] for row in rows] == [*convert.SIZES, "base.pt"]
    # values trained, from the paper's formula n_layer · (2·n_embd + d_ff); parameters as GPT-2's are known to have
    assert [row[4] for row in rows] == ["55,296", "147,456", "276,480", "460,800", "192"]
    assert [row[3] for row in rows[:4]] == ["124,439,808", "354,823,168", "774,030,080", "1,557,611,200"]
    base = make_gpt()
    blocks = sum(p.numel() for p in base.transformer.h.parameters())
    assert rows[4][5:8] == [f"{192 / sum(p.numel() for p in base.parameters()):.4%}", f"{192 / blocks:.4%}", "3.1250%"]
    assert rows[4][1:3] == ["2", "16"] and rows[0][7] == "0.0651%"
    assert rows[4][8] == f"{os.path.getsize('ia3.npz'):,}"


def test_the_count_of_llamas(llama, capsys):
    """Under a hundredth of a percent at a width of 4096, where GPT-2's block needs more than 5000."""
    assert convert.main("count LLaMA-7B Llama-3-8B SmolLM2-135M base.pt".split()) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[1:]]
    assert [row[4] for row in rows] == ["614,400", "524,288", "57,600", "112"]
    assert [row[5] for row in rows[:3]] == ["0.0091%", "0.0065%", "0.0428%"]
    base = make_llama_with_bpe()
    blocks = sum(p.numel() for p in base.model.layers.parameters())
    assert rows[3][3:7] == [f"{sum(p.numel() for p in base.parameters()):,}", "112", rows[3][5], f"{112 / blocks:.4%}"]
    assert [row[7] for row in rows] == ["-"] * 4  # the formula is GPT-2's
    assert rows[3][8] == f"{os.path.getsize('ia3.npz'):,}"
