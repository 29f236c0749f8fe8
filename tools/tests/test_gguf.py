"""GGUF in and out: a Llama read from any type, vectors folded into the scales, and what is refused, and how.

Files are written by llama.cpp's own gguf package, of tiny random models. That the weights of a real file are those
that transformers reads is shown in test_smollm2.py; what llama.cpp itself makes of a merged file in test_llama_cpp.py.
"""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from helpers import check_refused

import common
from conftest import make_bpe, make_gpt, make_ia3, make_idx, make_llama
from ia3 import IA3
from tools import bpe, convert
from tools.gguf_llama import (
    SCALES,
    VALUES,
    Tensor,
    dequantize,
    gguf_name,
    interleaved,
    read_header,
    scale_rows,
    to_gguf,
)

TYPES = gguf.GGMLQuantizationType
SIZES = {"n_embd": 256, "n_hidden": 256, "n_head": 4, "n_kv_head": 2, "n_layer": 1, "vocab_size": 280, "block_size": 8}
SITES = ("attn_k", "attn_v", "ffn_up")  # what l_k, l_v and l_ff scale
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # of the types in SCALES, those that gguf's Python can make


def blocks_of(kind, weight, seed=0):
    """The bytes of a weight in a type: gguf's own, or random ones with scales that are ordinary float16 numbers."""
    if kind in VALUES or kind in QUANTIZED:
        return gguf.quants.quantize(weight.detach().numpy(), TYPES[kind]).view(np.uint8)
    dice = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    rows, columns = weight.shape
    raw = dice.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = dice.uniform(0.5, 2, (rows, columns // block, 1)) * dice.choice([-0.01, 0.01], (rows, 1, 1))
        raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(path, model, kind="F32", change=None):
    """Write model as llama.cpp's converter would, the layers' matrices in kind. change: {key: value, or None}."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    rope = config.rope_scaling
    keys = {
        "llama.context_length": config.block_size,
        "llama.embedding_length": config.n_embd,
        "llama.block_count": config.n_layer,
        "llama.feed_forward_length": config.n_hidden,
        "llama.attention.head_count": config.n_head,
        "llama.attention.head_count_kv": config.n_kv_head,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.freq_base": float(config.rope_base),
        "llama.rope.dimension_count": config.n_embd // config.n_head,
    }
    for key, value in (keys | (change or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if model.tokenizer is not None and isinstance(model.tokenizer.about, dict):
        add_tokenizer(writer, model.tokenizer.about)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", slower(config).numpy())
    for name, t in model.state_dict().items():
        if config.tied and name == "lm_head.weight":
            continue
        theirs = gguf_name(name)
        if ".attn_q." in theirs or ".attn_k." in theirs:
            t = interleaved(t, config.n_head if ".attn_q." in theirs else config.n_kv_head)
        if theirs.startswith("blk.") and t.dim() == 2:
            writer.add_tensor(theirs, blocks_of(kind, t.contiguous()), raw_dtype=TYPES[kind])
        else:
            writer.add_tensor(theirs, t.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, about):
    tokens = {bpe.as_letters(token): i for token, i in about["ranks"].items()} | about["special_tokens"]
    merges = [bpe.split(token, about["ranks"]) for token in about["ranks"] if len(token) > 1]
    names = sorted(tokens, key=tokens.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    plain = about.get("plain_tokens", [])
    writer.add_token_types([4 if name in plain else 3 if name in about["special_tokens"] else 1 for name in names])
    writer.add_token_merges([" ".join(bpe.as_letters(part) for part in parts) for parts in merges])


def slower(config):
    """rope_freqs as llama.cpp's converter computes it, pair by pair (Llama 3.1's rule)."""
    rope, d_head = config.rope_scaling, config.n_embd // config.n_head
    factors = []
    for i in range(0, d_head, 2):
        wavelength = 2 * np.pi * config.rope_base ** (i / d_head)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            mix = (turns - low) / (high - low)
            factors.append(1 / ((1 - mix) / rope["factor"] + mix))
    return torch.tensor(factors, dtype=torch.float32)


def make_model(**sizes):
    model = make_llama(**(SIZES | sizes))
    model.tokenizer = None
    return model


@pytest.fixture
def small(tmp_path):
    """base.gguf of a tiny model in Q4_1, and ia3.npz: vectors of it. Returns the folder."""
    write_gguf(tmp_path / "base.gguf", make_model(n_embd=32, n_hidden=32), "Q4_1")
    model = convert.from_gguf(tmp_path / "base.gguf")
    make_ia3(model).save(tmp_path / "ia3.npz")
    return tmp_path


def weights_of(path):
    _, tensors = read_header(path)
    return {name: dequantize(tensor) for name, tensor in tensors.items()}


def changed_places(a, b):
    """The places in two files of one length at which their bytes differ."""
    a, b = [np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in (a, b)]
    assert len(a) == len(b)
    return set(np.flatnonzero(a != b).tolist())


# --- in ---


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_in_as_gguf_dequantizes_it(tmp_path, kind, tied):
    model = make_model(tied=tied)
    write_gguf(tmp_path / "base.gguf", model, kind)
    found = convert.from_gguf(tmp_path / "base.gguf")
    assert dataclasses.asdict(found.config) == dataclasses.asdict(model.config)
    for name, t in model.state_dict().items():
        if "layers" in name and t.dim() == 2:  # rows change places, so their blocks stay the same
            t = torch.from_numpy(gguf.quants.dequantize(blocks_of(kind, t), TYPES[kind]).reshape(t.shape))
        assert torch.equal(found.state_dict()[name], t), name
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied


def test_no_biases_and_llama_3s_rotation(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192.0
    sizes = {"rope_scaling": scaling, "rope_base": 5e5, "attention_bias": False, "mlp_bias": False}
    model = make_model(**sizes)
    assert len(set(slower(model.config).tolist())) > 3  # kept, slowed, and in between
    write_gguf(tmp_path / "base.gguf", model)
    found = convert.from_gguf(tmp_path / "base.gguf")
    assert found.config == model.config
    idx = make_idx(model)
    assert torch.equal(found(idx)[0], model(idx)[0])


def test_the_tokenizer_comes_in_or_a_line_says_why_not(tmp_path, capsys):
    model = make_model()
    write_gguf(tmp_path / "none.gguf", model)
    assert convert.main(["gguf", f"{tmp_path}/none.gguf", "--out", f"{tmp_path}/none.pt"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert common.load(tmp_path / "none.pt").tokenizer is None
    model.tokenizer = common.Tokenizer(make_bpe() | {"plain_tokens": ["<start>"]}, 280)  # a text can spell it
    assert model.tokenizer.encode_ordinary("<start>the") == [264, 259]
    write_gguf(tmp_path / "base.gguf", model)
    assert convert.main(["gguf", f"{tmp_path}/base.gguf", "--out", f"{tmp_path}/base.pt"]) == 0
    assert not capsys.readouterr().err
    assert common.load(tmp_path / "base.pt").tokenizer.about == model.tokenizer.about


# --- out: the vectors in the scales ---


@pytest.mark.parametrize("kind", [*VALUES, *SCALES])
def test_powers_of_two_are_exact_and_only_scales_change(tmp_path, kind):
    base, merged = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_gguf(base, make_model(), kind)
    model = convert.from_gguf(base)
    vectors = make_ia3(model, powers_of_two=True)
    to_gguf(base, vectors, merged)
    expected = weights_of(base)
    for layer, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        l_k = interleaved(l_k, 2)
        for site, l in zip(SITES, (l_k, l_v, l_ff), strict=True):
            expected[f"blk.{layer}.{site}.weight"] *= l.detach().unsqueeze(1)
            expected[f"blk.{layer}.{site}.bias"] *= l.detach()
    found = weights_of(merged)
    for name, t in expected.items():
        if kind == "F16" and name.startswith("blk.") and t.dim() == 2:
            t = t.half().float()  # a value may become too small for float16's full precision
        assert torch.equal(found[name], t), name

    allowed = set()
    _, tensors = read_header(base)
    for site in SITES:
        for name in (f"blk.0.{site}.weight", f"blk.0.{site}.bias"):
            tensor = tensors[name]
            n = tensor.data.size
            size = gguf.GGML_QUANT_SIZES[TYPES[tensor.kind]][1]
            offsets = range(size) if tensor.kind in VALUES else [i + at for at in SCALES[tensor.kind] for i in (0, 1)]
            for offset in offsets:
                allowed.update(range(tensor.start + offset, tensor.start + n, size))
    changed = changed_places(base, merged)
    assert changed and changed <= allowed


@pytest.mark.parametrize("kind", SCALES)
def test_other_vectors_round_each_scale_once(tmp_path, kind):
    """With a scale s rounded to s(1 + e), |e| ≤ 2^-11, an entry is off by 2^-11 times the sum of its parts' sizes."""
    model = make_model()
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    tensor = Tensor(kind, list(weight.shape), 0, blocks_of(kind, weight))
    l = 1 + 0.3 * torch.randn(len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = scale_rows(tensor, l)
    found = dequantize(Tensor(kind, tensor.shape, 0, scaled)).double()
    exact = l.unsqueeze(1) * dequantize(tensor).double()
    parts = exact.abs()
    if len(SCALES[kind]) == 2:  # d·q and m: the second part by itself is what is left without d
        _, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
        without = tensor.data.copy().reshape(len(weight), -1, size)
        at = SCALES[kind][0]
        without[..., at : at + 2] = 0
        offset = dequantize(Tensor(kind, tensor.shape, 0, without.reshape(len(weight), -1))).double()
        offset = l.unsqueeze(1) * offset
        parts = offset.abs() + (exact - offset).abs()
    assert ((found - exact).abs() <= 2**-11 * parts * (1 + 1e-4)).all()  # dequantizing rounds to float32 as well


def test_sites_left_out_stay(small):
    model = convert.from_gguf(small / "base.gguf")
    vectors = make_ia3(model, sites=("v",))
    to_gguf(small / "base.gguf", vectors, small / "merged.gguf")
    before, after = weights_of(small / "base.gguf"), weights_of(small / "merged.gguf")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "blk.0.attn_v.weight",
        "blk.0.attn_v.bias",
    }


def test_the_command_writes_what_the_model_with_vectors_computes(small, capsys):
    flags = f"to-gguf --gguf {small}/base.gguf --ia3 {small}/ia3.npz --out {small}/merged.gguf"
    assert convert.main(flags.split()) == 0
    model = convert.from_gguf(small / "base.gguf")
    model.ia3 = IA3.load(small / "ia3.npz", model)
    idx = make_idx(model)
    with torch.no_grad():
        expected, found = model(idx)[0], convert.from_gguf(small / "merged.gguf")(idx)[0]
        model.ia3 = None
        moved = (model(idx)[0] - expected).square().mean().sqrt()
    # rounding a scale by 2^-11 moves the logits by a hundredth of what the vectors move, or less
    assert (found - expected).square().mean().sqrt() < 0.01 * moved


# --- what is refused ---


def check(folder, capsys, flags, word):
    check_refused(convert, capsys, flags, word, folder)


def test_vectors_of_another_base_and_vectors_twice(small, capsys):
    flags = f"to-gguf --gguf {small}/base.gguf --ia3 {small}/ia3.npz --out {small}/merged.gguf"
    assert convert.main(flags.split()) == 0
    again = f"to-gguf --gguf {small}/merged.gguf --ia3 {small}/ia3.npz --out {small}/twice.gguf"
    check(small, capsys, again, "another base")
    vectors = make_ia3(make_model(n_embd=32, n_hidden=32))
    with pytest.raises(ValueError, match="another base"):
        to_gguf(small / "base.gguf", vectors, small / "other.gguf")
    base = convert.from_gguf(small / "base.gguf")
    deeper = dataclasses.replace(base.config, n_layer=base.config.n_layer + 1)
    with pytest.raises(ValueError, match="another base"):  # of no known base, and a layer too many
        to_gguf(small / "base.gguf", IA3(deeper), small / "other.gguf")
    vectors = IA3.load(small / "ia3.npz", base)
    with pytest.raises(ValueError, match="would replace"):
        to_gguf(small / "base.gguf", vectors, small / "base.gguf")


@pytest.mark.parametrize("factor, word", [(1e9, "65504"), (1e-6, "too small")])
def test_scales_that_float16_does_not_hold(small, capsys, factor, word):
    model = convert.from_gguf(small / "base.gguf")
    vectors = make_ia3(model)
    with torch.no_grad():
        vectors.l_v[0, 3] = factor
    vectors.save(small / "far.npz")
    flags = f"to-gguf --gguf {small}/base.gguf --ia3 {small}/far.npz --out {small}/merged.gguf"
    check(small, capsys, flags, word)
    check(small, capsys, flags, "blk.0.attn_v.weight")


def test_zeros_switch_a_channel_off_and_small_scales_of_the_base_stay_in_use():
    tensor = Tensor("Q8_0", [2, 32], 0, blocks_of("Q8_0", torch.tensor([[0.1] * 32, [1e-4] * 32])))
    scaled = scale_rows(tensor, torch.tensor([0.0, 0.7], dtype=torch.float64))
    found = dequantize(Tensor("Q8_0", [2, 32], 0, scaled))
    assert (found[0] == 0).all()
    # the second row's scale is 1e-4 / 127, where float16's numbers are 2^-24 apart: half of that, times q = 127
    assert (found[1] - 0.7 * dequantize(tensor)[1]).abs().max() <= 127 * 2**-25


def test_a_type_without_float_scales(tmp_path, capsys):
    model = make_model(n_embd=32, n_hidden=32)
    write_gguf(tmp_path / "base.gguf", model)
    blocks = gguf.quants.quantize(torch.randn(4, 32).numpy(), TYPES.MXFP4)
    with pytest.raises(ValueError, match="MXFP4"):
        scale_rows(Tensor("MXFP4", [4, 32], 0, blocks), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"general.architecture": "qwen2"}, "qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.scaling.factor": 2.0}, "scaling.factor"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.attention.key_length": 64}, "key_length"),
        ({"llama.block_count": 2}, "blk.1"),
        ({"llama.block_count": 10**9}, "1000000000"),
        ({"llama.embedding_length": None}, "n_embd"),
        ({"llama.feed_forward_length": 64}, "ffn_gate"),
        ({"llama.attention.head_count": [4, 4]}, "n_head"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "base.gguf"),
        ({"split.count": 3}, "3 parts"),
    ],
)
def test_headers_that_are_not_our_llamas(tmp_path, capsys, change, word):
    architecture = change.pop("general.architecture", None)
    write_gguf(tmp_path / "base.gguf", make_model(n_embd=32, n_hidden=32), change=change)
    if architecture:
        raw = (tmp_path / "base.gguf").read_bytes()
        (tmp_path / "base.gguf").write_bytes(raw.replace(b"llama", architecture.encode(), 2))
    check(tmp_path, capsys, f"gguf {tmp_path}/base.gguf --out {tmp_path}/base.pt", word)


def test_a_rotation_that_is_not_llama_3s(tmp_path, capsys):
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    model = make_model(rope_scaling=scaling | {"original_max_position_embeddings": 64})
    write_gguf(tmp_path / "base.gguf", model)
    check(tmp_path, capsys, f"gguf {tmp_path}/base.gguf --out {tmp_path}/base.pt", "rope_freqs")


def test_files_that_are_no_gguf(small, capsys):
    for path, raw in (("empty.gguf", b""), ("text.gguf", b"no such thing"), ("short.gguf", b"GGUF")):
        (small / path).write_bytes(raw)
        check(small, capsys, f"gguf {small}/{path} --out {small}/base.pt", path)
    common.save(make_gpt(), small / "base.pt")
    check(small, capsys, f"gguf {small}/base.pt --out {small}/new.pt", "base.pt")
    check(small, capsys, f"gguf {small}/none.gguf --out {small}/new.pt", "none.gguf")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_infinite_scale_is_one_line_without_numpys_warnings(small, capsys):
    raw = bytearray((small / "base.gguf").read_bytes())
    start = read_header(small / "base.gguf")[1]["blk.0.attn_v.weight"].start
    raw[start : start + 2] = np.float16(np.inf).tobytes()
    (small / "bad.gguf").write_bytes(raw)
    check(small, capsys, f"gguf {small}/bad.gguf --out {small}/base.pt", "blk.0.attn_v.weight")


def test_a_tensor_that_is_not_where_the_one_before_it_ends(small, capsys):
    raw = bytearray((small / "base.gguf").read_bytes())
    name = b"blk.0.attn_v.bias"
    at = raw.index(name) + len(name) + 4 + 8 + 4  # after the number of its axes, its length, its type
    place = int.from_bytes(raw[at : at + 8], "little")
    raw[at : at + 8] = (place - 32).to_bytes(8, "little")
    (small / "bad.gguf").write_bytes(raw)
    check(small, capsys, f"gguf {small}/bad.gguf --out {small}/base.pt", name.decode())
