"""Files: vectors in one .npz, checkpoints like nanoGPT's, and that a file is written whole or not at all.

A damaged or foreign file is one ValueError that names it, and no code of a file ever runs.
"""

import argparse
import copy
import json
import os
import pickle
import runpy
import sys
import tracemalloc
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import disk
import ia3
from conftest import make_gpt, make_ia3, make_llama
from ia3 import IA3, SITES, attach, fingerprint

ROOT = Path(__file__).parents[1]

# Vectors


def test_vectors_come_back_bit_for_bit(make_model, tmp_path, device):
    model = make_model().to(device)
    for sites in (("k",), ("v",), ("ff",), SITES):
        vectors = make_ia3(model, sites=sites)
        vectors.save(tmp_path / "a.npz")
        again = IA3.load(tmp_path / "a.npz", model)
        assert again.matrices().keys() == vectors.matrices().keys()
        assert again.fingerprint == vectors.fingerprint == fingerprint(model)
        for name, p in vectors.matrices().items():
            assert torch.equal(again.matrices()[name], p) and again.matrices()[name].device == p.device
        assert (tmp_path / "a.npz").stat().st_size <= 4 * vectors.count() + 2048
        with np.load(tmp_path / "a.npz") as file:
            assert set(file.files) == {"about", *vectors.matrices()}
            assert json.loads(file["about"].item())["config"]["n_embd"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_file_holds_float32_whatever_the_vectors_are_held_in(tmp_path, dtype):
    make_ia3(make_gpt()).to(dtype).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert {file[name].dtype for name in ("l_k", "l_v", "l_ff")} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["folio", "sonnets", "kjv"])
def test_the_bundled_vectors_are_the_bundled_bases(name):
    """So what a fingerprint is taken of has not changed since they were saved."""
    IA3.load(ROOT / f"data/{name}.npz", common.load(ROOT / "data/base.pt"))


def test_unattached_stacked_and_not_finite_vectors_are_not_saved(tmp_path):
    model = make_gpt()
    loose = IA3(model.config)
    with pytest.raises(ValueError, match="attach"):
        loose.save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="one task"):
        ia3.stack([attach(model), None]).save(tmp_path / "a.npz")
    assert ia3.stack([loose, None]).fingerprint is None
    vectors = make_ia3(model)
    vectors.l_v.data[1, 3] = torch.nan
    with pytest.raises(ValueError, match="l_v holds NaN"):
        vectors.save(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def write_npz(path, **changes):
    """Save good vectors to path, then change arrays (None: leave out). Returns their model."""
    model = make_gpt()
    make_ia3(model).save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez_compressed(path, **{name: a for name, a in arrays.items() if a is not None})
    return model


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


# all that is wanted, and 128 KiB of spaces in each gap between
LONG = json.dumps({"vectors": ["l_k", "l_v", "l_ff"], "fingerprint": fingerprint(make_gpt())}).replace(" ", " " * 2**17)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"l_k": None}, "this base takes"),
        ({"l_q": np.ones((2, 16), np.float32)}, "this base takes"),
        ({"l_v": np.ones((16, 2), np.float32)}, "this base takes"),
        ({"l_v": np.full((2, 16), np.nan, np.float32)}, "l_v holds NaN"),
        ({"l_ff": np.full((2, 64), np.inf, np.float32)}, "l_ff holds NaN or inf"),
        ({"l_v": np.full((2, 16), 1j, np.complex64)}, "truncated"),
        ({"l_k": np.full((2, 16), Code(), dtype=object)}, "truncated"),
        ({"about": np.array(Code(), dtype=object)}, "truncated"),
        ({"about": None}, "truncated"),
        ({"about": np.bytes_("{}")}, "names no vectors"),
        ({"about": np.bytes_(LONG)}, "truncated"),
    ],
)
def test_damaged_vectors_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    model = write_npz("a.npz", **changes)
    with pytest.raises(ValueError, match=rf"a\.npz.*{message}"):
        IA3.load("a.npz", model)
    assert not os.path.exists("ran")


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.99])
def test_truncated_vectors_are_refused(tmp_path, keep):
    model = write_npz(tmp_path / "a.npz")
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(ValueError, match="truncated"):
        IA3.load(tmp_path / "a.npz", model)


@pytest.mark.parametrize(
    "changes",
    [
        {"l_k": np.zeros((2**12, 2**11), np.float32)},
        {"l_k": np.zeros((2, 16), f"S{2**20}")},  # as many values as there should be, each a mebibyte of text
        {"about": np.zeros(2**25, "S1")},
        {"about": np.bytes_("x" * 2**25)},
    ],
)
def test_a_small_file_that_unfolds_to_much_is_refused_unread(tmp_path, changes):
    """32 MiB of one byte are 32 KiB in the file: headers are compared first."""
    model = write_npz(tmp_path / "a.npz", **changes)
    assert (tmp_path / "a.npz").stat().st_size < 2**17
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.npz"):
        IA3.load(tmp_path / "a.npz", model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.mark.parametrize("make_model, same_weights", [(make_gpt, {"n_head": 4}), (make_llama, {"rope_base": 5000.0})])
def test_vectors_for_another_base_are_refused(tmp_path, make_model, same_weights):
    make_ia3(make_model()).save(tmp_path / "a.npz")
    for other in ({"seed": 1}, same_weights):  # the latter with no other weight, yet another function
        with pytest.raises(ValueError, match="another base of this shape"):
            IA3.load(tmp_path / "a.npz", make_model(**other))
    with pytest.raises(ValueError, match="this base takes"):
        IA3.load(tmp_path / "a.npz", make_model(n_layer=3))
    with pytest.raises(FileNotFoundError):
        IA3.load(tmp_path / "b.npz", make_model())


def test_a_gpts_vectors_are_no_llamas_also_where_the_widths_agree(tmp_path):
    llama = make_llama(n_kv_head=4, n_hidden=64)
    assert llama.config.widths == make_gpt().config.widths
    make_ia3(make_gpt()).save(tmp_path / "gpt.npz")
    make_ia3(llama).save(tmp_path / "llama.npz")
    for name, other in (("gpt", llama), ("llama", make_gpt())):
        with pytest.raises(ValueError, match="another base of this shape"):
            IA3.load(tmp_path / f"{name}.npz", other)


@pytest.mark.parametrize("stamp", [{}, {"base": "0123abcd"}, {"fingerprint": 7}])
def test_a_file_that_names_no_base_is_refused(tmp_path, stamp):
    about = {"config": {}, "vectors": ["l_k", "l_v", "l_ff"], **stamp}
    model = write_npz(tmp_path / "a.npz", about=np.bytes_(json.dumps(about)))
    with pytest.raises(ValueError, match="was made for another base"):
        IA3.load(tmp_path / "a.npz", model)


# The fingerprint


def test_the_fingerprint_knows_the_weights_and_neither_dtype_nor_vectors_nor_block_size(make_model):
    model = make_model()
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == fingerprint(copy.deepcopy(model).double()) == first
    make_ia3(model)
    assert fingerprint(model) == first
    shorter = make_model()
    shorter.config.block_size = 8  # of the config alone: GPT-2's table of positions is a weight
    assert fingerprint(shorter) == first
    for p in [*model.blocks[1].parameters(), model.lm_head.weight]:
        before = p.detach().clone()
        p.data.view(-1)[3] *= 1.01  # one weight, by more than bfloat16's 2^-8
        assert fingerprint(model) != first
        p.data.copy_(before)
    assert fingerprint(model) == first


def test_the_fingerprint_of_a_gpt_knows_its_heads_and_not_its_dropout():
    first = fingerprint(make_gpt())
    assert fingerprint(make_gpt(dropout=0.5)) == first
    assert fingerprint(make_gpt(n_head=4)) != first  # the same weights


def test_the_fingerprint_reads_names_and_shapes_and_a_tied_head_once():
    model = make_gpt()
    first = fingerprint(model)
    positions = model.transformer.wpe.weight
    model.transformer.wpe.weight = torch.nn.Parameter(positions.detach().view(8, 32))  # the same values, cut elsewhere
    assert fingerprint(model) != first
    model.transformer.wpe.weight = positions
    assert fingerprint(model) == first
    model.transformer["ln_g"] = model.transformer.pop("ln_f")
    assert fingerprint(model) != first
    model = make_gpt()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied, though equal
    assert fingerprint(model) != first


# Checkpoints


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize(
    "make_model, shape",
    [(make_gpt, {"dropout": 0.1, "bias": False}), (make_llama, {}), (make_llama, {"tied": False, "n_kv_head": 1})],
)
def test_checkpoints_come_back_bit_for_bit_nanogpts_too(tmp_path, make_model, shape, prefix):
    model = make_model(**shape)
    make_ia3(model)  # which the file leaves out: a base stays a base
    common.save(model, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["tokenizer"] == "bytes"
    nano = {"model": {prefix + name: t for name, t in saved["model"].items()}, "model_args": saved["model_args"]}
    nano["model"][f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # nanoGPT's mask without flash
    nano |= {"iter_num": 7, "best_val_loss": torch.tensor(1.5), "optimizer": {}, "config": {"seed": 1}}
    torch.save(nano, tmp_path / "b.pt")  # nanoGPT's names no tokenizer
    for name in ("a.pt", "b.pt"):
        again = common.load(tmp_path / name)
        assert type(again) is type(model) and again.config == model.config and again.tokenizer.about == "bytes"
        assert not again.training and again.ia3 is None
        model.ia3 = None
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
        # a tied head is one parameter, an untied one is two
        assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert all(p.requires_grad for p in again.parameters())


def test_a_checkpoint_is_what_nanogpt_reads(tmp_path):
    """Its sample.py builds GPTConfig(**model_args), then load_state_dict(model), strictly."""
    common.save(make_gpt(), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    nanogpts = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"}
    assert saved["model_args"].keys() == nanogpts and saved["model_args"] == asdict(make_gpt().config)
    assert saved["model"].keys() == make_gpt().state_dict().keys()


def test_a_checkpoint_is_read_into_the_dtype_that_is_asked_for(make_model, tmp_path):
    model = make_model().bfloat16()
    common.save(model, tmp_path / "a.pt")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        again = common.load(tmp_path / "a.pt", dtype)
        assert {t.dtype for t in again.state_dict().values()} == {dtype}
        assert torch.equal(again.lm_head.weight, model.lm_head.weight.to(dtype))
    assert common.load(tmp_path / "a.pt").lm_head.weight.dtype == torch.float32
    assert common.load(tmp_path / "a.pt", dtype=None).lm_head.weight.dtype == torch.bfloat16  # as it is in the file


def test_what_is_loaded_does_not_stay_on_the_disk(tmp_path):
    common.save(make_gpt(), tmp_path / "a.pt")
    model = common.load(tmp_path / "a.pt")
    size = (tmp_path / "a.pt").stat().st_size
    with open(tmp_path / "a.pt", "r+b") as f:
        f.write(bytes(size))
    assert torch.equal(model.lm_head.weight, make_gpt().lm_head.weight)


@pytest.mark.parametrize("vocab_size, tokenizer", [(257, "bytes"), (50257, "gpt2"), (50304, "gpt2"), (300, None)])
def test_the_vocabulary_tells_the_tokenizer_where_the_file_does_not(tmp_path, vocab_size, tokenizer):
    model = make_gpt(n_layer=1, n_embd=2, vocab_size=vocab_size)
    torch.save({"model": model.state_dict(), "model_args": asdict(model.config)}, tmp_path / "a.pt")
    found = common.load(tmp_path / "a.pt").tokenizer
    assert (None if found is None else found.about) == tokenizer


def test_a_tokenizer_is_kept_and_so_is_having_none(tmp_path):
    model = make_gpt()
    common.save(model, tmp_path / "a.pt")
    assert common.load(tmp_path / "a.pt").tokenizer.about == "bytes"
    model.tokenizer = None
    common.save(model, tmp_path / "a.pt")
    assert common.load(tmp_path / "a.pt").tokenizer is None


def test_the_bundled_base_is_what_the_readme_says():
    model = common.load(ROOT / "data/base.pt")
    assert model.tokenizer.about == "bytes" and attach(model).count() == 6 * 6 * 192


def test_another_model_py_before_ours_is_refused(monkeypatch):
    theirs = types.ModuleType("model")
    theirs.GPT = theirs.GPTConfig = object  # without blocks, as nanoGPT's: it would ignore the vectors in silence
    monkeypatch.setitem(sys.modules, "model", theirs)
    with pytest.raises(ImportError, match=r"model\.py"):
        runpy.run_path(common.__file__)


def test_damaged_checkpoints_and_those_that_carry_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.save(make_gpt(), "base.pt")
    raw = (tmp_path / "base.pt").read_bytes()
    for keep in (0, 10, len(raw) // 2, len(raw) - 10):
        (tmp_path / "cut.pt").write_bytes(raw[:keep])
        with pytest.raises(ValueError, match=r"cut\.pt is truncated, carries code"):
            common.load("cut.pt")
    for thing, name in ((Code(), "system"), (np.float64(1), "numpy"), (argparse.Namespace(lr=1), "argparse.Namespace")):
        for place in ("config", "model"):
            torch.save({"model": {}, "model_args": {}} | {place: thing}, "code.pt")
            with pytest.raises(ValueError, match=rf"carries code \(.*{name}"):
                common.load("code.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match="carries code"):
        common.load("code.pt")
    assert not os.path.exists("ran")


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt", "ia3.npz"])
def test_whatever_is_damaged_about_a_file_it_is_refused_or_read(tmp_path, file):
    model = make_gpt()
    common.save(model, tmp_path / "zip.pt")
    torch.save(torch.load(tmp_path / "zip.pt"), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    make_ia3(model).save(tmp_path / "ia3.npz")
    assert torch.equal(common.load(tmp_path / "legacy.pt").lm_head.weight, model.lm_head.weight)
    raw, dice = (tmp_path / file).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = np.frombuffer(raw, np.uint8).copy()
        near = 2000 if file == "legacy.pt" else len(raw)  # a legacy file's pickles stand at its head
        damaged[dice.integers(0, near, 20)] = dice.integers(0, 256, 20)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            IA3.load(tmp_path / "damaged", model) if file == "ia3.npz" else disk.load_file(tmp_path / "damaged")
        except ValueError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "make_model, change, message",
    [
        (make_gpt, lambda c: c.pop("model"), "nanoGPT"),
        (make_gpt, lambda c: c.pop("model_args"), "nanoGPT"),
        (make_gpt, lambda c: c.update(model=[1]), "'list' object"),
        (make_gpt, lambda c: c["model"].pop("transformer.h.1.ln_1.bias"), "transformer.h.1.ln_1.bias"),
        (make_gpt, lambda c: c["model"].update(extra=torch.ones(1)), "extra"),
        (make_gpt, lambda c: c["model"].update({"lm_head.weight": torch.ones(257, 16)}), "the head differs"),
        (make_gpt, lambda c: c["model"]["transformer.ln_f.bias"].fill_(torch.nan), "ln_f.bias holds NaN or inf"),
        (make_gpt, lambda c: c["model_args"].update(n_embd=32), r"\.weight"),
        (make_gpt, lambda c: c["model_args"].update(n_head=3), "not divisible"),
        (make_gpt, lambda c: c["model_args"].update(n_head=2.0), "n_head must be a whole number"),
        (make_gpt, lambda c: c["model_args"].update(block_size=0), "block_size must be"),
        (make_gpt, lambda c: c["model_args"].update(n_layer=10**9), "n_layer is 1000000000, but there are only"),
        (make_gpt, lambda c: c["model_args"].update(rotary=True), "rotary"),
        (make_gpt, lambda c: c.update(tokenizer="words"), "unknown tokenizer 'words'"),
        (make_gpt, lambda c: c.update(tokenizer=""), "unknown tokenizer ''"),
        (make_gpt, lambda c: c.update(tokenizer="gpt2"), "tokenizer gpt2 has 50257 ids, but the vocabulary only 257"),
        (make_llama, lambda c: c["model"].pop("model.layers.1.mlp.up_proj.bias"), "model.layers.1.mlp.up_proj.bias"),
        (make_llama, lambda c: c["model"].update({"lm_head.weight": torch.ones(257, 16)}), "the head differs"),
        (make_llama, lambda c: c["model_args"].update(n_kv_head=1), r"k_proj\.\w+ has shape"),
        (make_llama, lambda c: c["model_args"].update(n_kv_head=3), "not divisible by n_kv_head 3"),
        (make_llama, lambda c: c["model_args"].pop("n_kv_head"), "n_kv_head|n_hidden"),  # then it is taken for a GPT's
        (make_llama, lambda c: c["model_args"].update(rope_scaling={"rope_type": "yarn"}), "'yarn'"),
    ],
)
def test_checkpoints_of_something_else_are_refused(tmp_path, make_model, change, message):
    common.save(make_model(), tmp_path / "a.pt")
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt .*{message}"):
        common.load(tmp_path / "a.pt")


def test_other_libraries_files_name_the_command_that_converts_them(tmp_path):
    w = torch.ones(2, 2)
    torch.save(w, tmp_path / "a.pt")  # no dict
    torch.save({"model": {"_orig_mod.layers.0.attention.wq.weight": w}, "model_args": {"dim": 2}}, tmp_path / "c.pt")
    torch.save({"lm_head.weight": w, "transformer.h.0.attn.qkv.weight": w}, tmp_path / "lit_model.pth")
    for name in ("model.safetensors", "a.gguf"):
        (tmp_path / name).write_bytes(b"")
    for name, words in [
        ("a.pt", "not our checkpoint or nanoGPT's: .*tools.convert"),
        ("c.pt", "llama2.c.* tools.convert hf"),
        ("lit_model.pth", "LitGPT.* tools.convert hf"),
        ("model.safetensors", "tools.convert hf"),
        ("", "tools.convert hf"),
    ]:
        with pytest.raises(ValueError, match=words):
            common.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"a\.gguf .*gguf"):
        common.load(tmp_path / "a.gguf")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match="from-peft"):
            IA3.load(path, make_gpt())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, dtype=torch.int64),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: torch.ones(3).to(torch.float8_e4m3fn),
        lambda: torch.ones(3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),  # its layout is strided, as a plain one's
        lambda: [1.0, 2.0],
    ],
)
def test_what_is_no_plain_tensor_of_floats_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"lm_head.weight is (a|not a)"):
        disk.check_weight(make(), "lm_head.weight")


def test_a_plain_tensor_of_finite_floats_passes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        t = torch.ones(3, dtype=dtype)
        assert disk.check_weight(t, "t") is t
        with pytest.raises(ValueError, match="t holds NaN or infinity"):
            disk.check_weight(t / 0, "t")


@pytest.mark.parametrize("kind", ["expanded", "shared"])
def test_a_small_file_that_claims_to_be_large_is_refused(tmp_path, kind):
    """One number expanded to a matrix, and one matrix under many names, are small in a file and large once copied."""
    model = make_gpt(n_layer=12)
    numbers = torch.ones(1) if kind == "expanded" else torch.ones(257 * 16)
    weights = {}
    for name, p in model.state_dict().items():
        weights[name] = numbers.expand(p.shape) if kind == "expanded" else numbers[: p.numel()].view(p.shape)
    torch.save({"model": weights, "model_args": asdict(model.config)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt is not a checkpoint: its tensors claim"):
        common.load(tmp_path / "a.pt")


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_another_file(tmp_path, monkeypatch):
    common.save(make_gpt(), tmp_path / "a.pt")

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(common, "checked_copies", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        common.load(tmp_path / "a.pt")


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path, share):
    """torch.load reads no checksum; each flip is one that it would load."""
    common.save(make_gpt(), tmp_path / "a.pt")
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    place = next(
        i for i in range(int(share * len(raw)), len(raw)) if raw[i] and raw[i - 1] and raw[i + 1]
    )  # in a float
    raw[place] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.pt is damaged: .* fails its checksum"):
        common.load(tmp_path / "a.pt")


@pytest.mark.parametrize("native", [True, False])
def test_a_base_in_bfloat16_stays_in_it_on_a_cpu_that_multiplies_it(monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    expected = "bfloat16" if native else "float32"
    cpu = torch.device("cpu")
    llama = make_llama()
    assert common.pick_dtype(cpu, llama) == "float32"
    assert common.pick_dtype(cpu, llama.bfloat16()) == expected
    assert common.pick_dtype(cpu) == "float32"
    assert common.pick_dtype(cpu, make_gpt().bfloat16()) == "float32"  # data/base.pt is stored in bfloat16


# A file is replaced whole, or not at all


def test_replace_file_leaves_the_old_file_or_the_new_one_and_nothing_behind(tmp_path):
    path = tmp_path / "no/such/folder/a.txt"
    with disk.replace_file(path) as f:
        f.write(b"old")
        assert not path.exists()  # not before it is whole
    assert path.read_bytes() == b"old"
    for trouble in (ValueError, KeyboardInterrupt, OSError):
        with pytest.raises(trouble), disk.replace_file(path) as f:
            f.write(b"half of the ne")
            raise trouble
        assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
    with disk.replace_file(str(path), text=True) as f:
        f.write("new ³\n")
    assert path.read_bytes() == "new ³\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_disk_that_torch_finds_full_is_an_oserror(tmp_path):
    with (
        pytest.raises(OSError, match=r"a\.pt could not be written: unexpected pos"),
        disk.replace_file(tmp_path / "a.pt"),
    ):
        raise RuntimeError("unexpected pos 64 vs 0\nstack")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    common.save(make_gpt(), tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def half(state, f):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        common.save(make_gpt(seed=1), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_an_output_is_a_new_name_or_a_regular_file(tmp_path):
    disk.check_output(tmp_path / "new")
    (tmp_path / "old").write_text("")
    disk.check_output(tmp_path / "old")
    (tmp_path / "b.tmp").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "b", tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="regular file"):
            disk.check_output(wrong)
        with pytest.raises(ValueError, match="regular file"), disk.replace_file(wrong):
            pass
    with pytest.raises(ValueError, match="empty"):
        disk.check_output("")


def test_an_output_is_no_input_nor_its_temporary_name_one_by_whatever_path(tmp_path):
    (tmp_path / "base.pt").write_text("")
    (tmp_path / "m.pt.tmp").write_text("")
    (tmp_path / "link.pt").symlink_to(tmp_path / "base.pt")
    (tmp_path / "sub").mkdir()
    for output, read in [
        ("base.pt", "base.pt"),
        ("sub/../base.pt", "base.pt"),
        ("link.pt", "base.pt"),
        ("base.pt", "link.pt"),
        ("m.pt", "m.pt.tmp"),
    ]:
        with pytest.raises(ValueError, match=r"would replace .*, which this command reads"):
            disk.check_output(tmp_path / output, inputs=["other", tmp_path / read])
    disk.check_output(tmp_path / "m.pt", inputs=[tmp_path / "base.pt"])
