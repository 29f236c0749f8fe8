"""GGUF, the file that llama.cpp runs: a LLaMA read from it, and (IA)³'s vectors folded into its quantized weights.

    header   magic, version, counts; then the metadata, a key and a value each; then every tensor's name, shape, type
             and place
    data     the tensors, one after the other. A row of a weight is made of blocks, of 32 or 256 neighbouring entries.
             In Q4_1, 32 of them are two float16, d and m, and 32 integers of 4 bits, q: the weights are d·q + m

The entries of a block lie along the input axis, so they all belong to one row. A row's factor l therefore moves into
the scales, l·(d·q + m) = (l·d)·q + (l·m), and not one integer changes. A column's factor has no such place.
"""

import shutil
import struct
import sys
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch

import common
import disk
from data.tokenizer import GPT2, LLAMA3, SMOLLM2, Tokenizer
from ia3 import fingerprint
from llama import Llama, LlamaConfig, pair_speeds
from merge import scale
from tools import bpe
from tools.files import check_names

NAMES = {  # transformers' name: GGUF's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SCALES = {  # type: the bytes of a block at which its float16 scales begin; what they scale are small integers
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
VALUES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # no blocks: every weight is a float
# GGUF's code of a type: struct's letter
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
PATTERNS = {"gpt-2": GPT2, "smollm": SMOLLM2, "llama-bpe": LLAMA3}  # how tokenizer.ggml.pre says a text is cut
ORDINARY = 1  # the token_type of plain tokens; all others are special
USER_DEFINED = 4  # and of the special ones that a text can spell
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


# --- the file ---


class Header:
    """Reads a GGUF file's bytes from the front. Raises ValueError where a length goes beyond the last byte."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def take(self, n):
        if n > len(self.data) - self.at:
            raise ValueError("it ends within its header: is it truncated?")
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def number(self, form):
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self):
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        entry = self.number("I")
        n = self.number("Q")
        if entry == TEXT:
            return [self.text() for _ in range(n)]
        if entry not in NUMBERS:
            raise ValueError(f"a list of the unknown type {entry}")
        raw = self.take(n * struct.calcsize(f"<{NUMBERS[entry]}"))
        return list(struct.unpack(f"<{n}{NUMBERS[entry]}", raw))


class Tensor(NamedTuple):
    kind: str  # GGUF's name of its type, such as Q4_1
    shape: list  # as PyTorch has it
    start: int  # where its bytes begin in the file
    data: np.ndarray  # its bytes: (rows, bytes of a row), or (bytes,) of a vector


def read_header(path):
    """Return the metadata of a GGUF file, {key: value}, and its tensors, {name: Tensor}; their data stays on the disk.

    Raises OSError where there is no such file and ValueError, with its name, for one that is damaged or no GGUF.
    """
    import_gguf()  # here, so that a missing package is not told as a damaged file
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
    try:
        header = Header(np.memmap(path, mode="r"))
        about, infos = read_infos(header)
        return about, place_tensors(header, infos, about)
    except ValueError as e:  # also of text that is no UTF-8
        raise ValueError(f"{path} is damaged, or a GGUF that is not known here: {e}") from None


def read_infos(header):
    """Return the metadata and, of every tensor, {name: (type, shape, place)}."""
    types = import_gguf().GGMLQuantizationType
    header.take(4)  # GGUF
    version = header.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, but only 2 and 3 are known")
    n_tensors = header.number("Q")
    n_keys = header.number("Q")
    about = {}
    for _ in range(n_keys):
        key = header.text()
        if key in about:
            raise ValueError(f"{key[:80]!r} is there twice")
        about[key] = header.value(header.number("I"))
    infos = {}
    for _ in range(n_tensors):
        name = header.text()
        n_dims = header.number("I")
        if name in infos:
            raise ValueError(f"the tensor {name[:80]!r} is there twice")
        if not 1 <= n_dims <= 2:
            raise ValueError(f"the tensor {name[:80]!r} has {n_dims} axes")
        shape = [header.number("Q") for _ in range(n_dims)][::-1]  # GGUF names the input axis first
        infos[name] = (types(header.number("I")), shape, header.number("Q"))
    return about, infos


def place_tensors(header, infos, about):
    """Return {name: Tensor}. header has been read to its end; from there the tensors must follow one another."""
    sizes = import_gguf().GGML_QUANT_SIZES
    data = header.data
    alignment = about.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    data_start = aligned(header.at, alignment)
    start = data_start
    tensors = {}
    for name, (kind, shape, offset) in infos.items():  # offset: from data_start
        n_weights, n_bytes = sizes[kind]  # of a block
        if data_start + offset != start:
            raise ValueError(f"{name[:80]!r} is not where the tensor before it ends")
        if shape[-1] % n_weights:
            raise ValueError(f"{name[:80]!r} has a row of {shape[-1]}, not of whole blocks of {n_weights}")
        row_bytes = shape[-1] // n_weights * n_bytes
        end = start + prod(shape[:-1]) * row_bytes
        if end > len(data):
            raise ValueError(f"it ends before {name[:80]!r} does: is it truncated?")
        tensors[name] = Tensor(kind.name, shape, start, data[start:end].reshape(*shape[:-1], row_bytes))
        start = aligned(end, alignment)
    return tensors


def aligned(at, alignment):
    """The next multiple of alignment."""
    return -(-at // alignment) * alignment


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise ValueError("the gguf package is missing: python -m pip install -r requirements-llama.txt") from None
    return gguf


def dequantize(tensor):
    """The values of a Tensor, float32, in its own order. ValueError for a type that gguf does not dequantize."""
    gguf = import_gguf()
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused by whoever reads the values, in one line
            values = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind])
    except NotImplementedError:
        raise ValueError(f"type {tensor.kind}, which the gguf package does not dequantize") from None
    return torch.from_numpy(values.copy())  # nothing stays on the disk


# --- in: a Llama ---


def from_gguf(path):
    """Read a LLaMA's GGUF file. Returns a Llama in float32, on the CPU, in eval mode.

    Where its tokenizer is not one that Tokenizer computes, the model has none, and a line on stderr says why.
    Raises OSError where there is no such file and ValueError, with its name, for what is no LLaMA or not ours.
    """
    model, about = read_llama(path)
    bos = about.get("tokenizer.ggml.bos_token_id")
    eos = about.get("tokenizer.ggml.eos_token_id")
    eos = [] if eos is None else [eos]
    template = about.get("tokenizer.chat_template")
    try:
        model.tokenizer = Tokenizer(byte_level_bpe(about), model.config.vocab_size, bos, eos, template)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
        why = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        print(f"{path}: without a tokenizer, since {why}", file=sys.stderr)
    return model


def read_llama(path):
    """from_gguf without the tokenizer: return the model and the file's metadata."""
    about, tensors = read_header(path)
    try:
        return build_llama(about, tensors), about
    except (ValueError, TypeError, OverflowError, RuntimeError) as e:  # the latter of sizes that no tensor can have
        raise ValueError(f"{path}: {str(e).splitlines()[0]}") from None


def build_llama(about, tensors):
    """The Llama that a header and its tensors describe."""
    config = llama_config(about, tensors)
    model = common.empty_model(Llama, config, len(tensors))
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    ours_of = {gguf_name(name): name for name in shapes}
    if config.tied:
        del ours_of["output.weight"]
    tensors = {name: t for name, t in tensors.items() if name != "rope_freqs.weight"}  # llama_config has read it
    check_names(tensors, ours_of, "LLaMA", config.n_layer)
    heads = {"attn_q": config.n_head, "attn_k": config.n_kv_head}  # of the sites whose rows GGUF has in another order
    weights = {}
    for theirs, tensor in tensors.items():
        ours = ours_of[theirs]
        if tensor.shape != list(shapes[ours]):  # before it is unpacked: a small file may claim any shape
            raise ValueError(f"{theirs} is {tuple(tensor.shape)}, not {tuple(shapes[ours])}")
        t = disk.check_weight(dequantize(tensor), theirs)
        site = theirs.split(".")[-2]  # of blk.0.attn_q.weight: attn_q
        weights[ours] = from_interleaved(t, heads[site]) if site in heads else t
    if config.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    common.load_weights(model, weights)
    return model.eval()


def gguf_name(name):
    """GGUF's name of one of our weights: model.layers.0.mlp.up_proj.weight is blk.0.ffn_up.weight."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    layer, _, stem = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def llama_config(about, tensors):
    """The LlamaConfig that a header describes. Raises ValueError for what ours does not compute."""
    architecture = about.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}, not 'llama'")
    if about.get("split.count", 1) != 1:
        raise ValueError(f"it is one of {about['split.count']} parts: llama.cpp's llama-gguf-split joins them")
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    own = {key.removeprefix("llama."): value for key, value in about.items() if key.startswith("llama.")}
    n_head = own.get("attention.head_count")
    config = LlamaConfig(
        block_size=own.get("context_length"),
        vocab_size=tensors["token_embd.weight"].shape[0],
        n_layer=own.get("block_count"),
        n_head=n_head,
        n_kv_head=own.get("attention.head_count_kv", n_head),
        n_embd=own.get("embedding_length"),
        n_hidden=own.get("feed_forward_length"),
        rope_base=own.get("rope.freq_base", 10000.0),
        norm_eps=float(str(np.float32(own.get("attention.layer_norm_rms_epsilon")))),  # 1e-5, as typed
        tied="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
    )
    d_head = config.n_embd // config.n_head
    computed = {  # what our Llama computes, which is also LLaMA's default
        "rope.dimension_count": d_head,
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        "attention.sliding_window": 0,
        "expert_count": 0,
        "rope.scaling.type": "none",  # Llama 3's is a tensor, rope_freqs
        "rope.scaling.factor": 1.0,  # llama.cpp scales by it where no type is given
        "rope.scale_linear": 1.0,
    }
    for key, value in computed.items():
        if own.get(key, value) != value:
            raise ValueError(f"llama.{key} is {own[key]!r}, and this LLaMA has only {value!r}")
    if "rope_freqs.weight" in tensors:
        config = with_rope_scaling(config, dequantize(tensors["rope_freqs.weight"]))
    return config


def with_rope_scaling(config, slower):
    """config with the rope_scaling of rope_freqs: slower, (d_head/2,), says how many times slower each pair turns.

    The file holds what comes out of Llama 3's rule, not its numbers. All that was published with it has LLAMA3_ROPE's,
    and the factor is the slowest pair's. ValueError where the rule, with these, gives other speeds.
    """
    scaled = replace(config, rope_scaling={"rope_type": "llama3", "factor": float(slower.max())} | LLAMA3_ROPE)
    expected = pair_speeds(config) / pair_speeds(scaled)
    if slower.shape != expected.shape or not torch.allclose(slower, expected, rtol=1e-4):  # float32, and a power
        raise ValueError("its rope_freqs are not those of Llama 3's rotation")
    return scaled


def byte_level_bpe(about):
    """A header's vocabulary as Tokenizer takes it. ValueError where it is another kind of tokenizer."""
    kind = str(about.get("tokenizer.ggml.model"))
    cut = str(about.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or cut not in PATTERNS:
        raise ValueError(f"its tokenizer is {kind[:40]!r}, {cut[:40]!r}: known is 'gpt2', {', '.join(PATTERNS)}")
    vocabulary = {token: i for i, token in enumerate(about["tokenizer.ggml.tokens"])}
    kinds = about["tokenizer.ggml.token_type"]
    special = {token: i for token, i in vocabulary.items() if kinds[i] != ORDINARY}
    merges = [merge.split(" ") for merge in about["tokenizer.ggml.merges"]]
    plain = [token for token, i in vocabulary.items() if kinds[i] == USER_DEFINED]
    return bpe.from_merges(PATTERNS[cut], vocabulary, merges, special, whole_pieces=cut == "llama-bpe", plain=plain)


# --- the order of rotated channels ---


def from_interleaved(t, n_head):
    """q's or k's rows, or a bias, in our order: the two channels of a rotated pair d_head/2 apart.

    GGUF has them side by side, head by head: rows 0, 1 are pair 0.
    """
    pairs = t.view(n_head, len(t) // n_head // 2, 2, -1)  # head, pair, which of the two
    return pairs.transpose(1, 2).reshape(t.shape)


def interleaved(t, n_head):
    """The way back, to GGUF's order."""
    halves = t.view(n_head, 2, len(t) // n_head // 2, -1)  # head, which of the two, pair
    return halves.transpose(1, 2).reshape(t.shape)


# --- out: the vectors in the file's scales ---


@torch.no_grad()
def to_gguf(source, vectors, path):
    """Write a copy of the GGUF file source in which vectors, an IA3, are folded in: what runs source runs it as well.

    Only the scales of attn_k, attn_v and ffn_up change, or the values of those in floats. Held in memory: the model,
    for its fingerprint, then a tensor at a time. Raises OSError where source is not there or path cannot be written,
    and ValueError as from_gguf does, for vectors of another base, for stacked ones, and as scale_rows does.
    """
    disk.check_output(path, [source])
    model, _ = read_llama(source)
    fits = (vectors.config.n_layer, vectors.config.widths) == (model.config.n_layer, model.config.widths)
    if not fits or vectors.fingerprint not in (None, fingerprint(model)):
        raise ValueError(f"these vectors are of another base than {source}")
    del model
    _, tensors = read_header(source)
    with disk.replace_file(path) as out:
        with open(source, "rb") as f:
            shutil.copyfileobj(f, out)
        for name, l in row_factors(vectors):
            if name not in tensors:  # no bias
                continue
            try:
                scaled = scale_rows(tensors[name], l.double().cpu())
            except ValueError as e:
                raise ValueError(f"{source}: {name}: {e}") from None
            out.seek(tensors[name].start)
            out.write(scaled.tobytes())


def row_factors(vectors):
    """Yield (name, l) of every weight and bias whose rows the vectors scale, with GGUF's names and order of rows."""
    for layer, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        if l_k is not None:
            l_k = interleaved(l_k, vectors.config.n_kv_head)
        for site, l in (("attn_k", l_k), ("attn_v", l_v), ("ffn_up", l_ff)):
            if l is not None:
                yield f"blk.{layer}.{site}.weight", l
                yield f"blk.{layer}.{site}.bias", l


def scale_rows(tensor, l):
    """The bytes of a Tensor whose every row is multiplied by l (rows,) float64, rounded once.

    Raises ValueError for a type without float scales, and where a scale, or a value, becomes infinite or is lost.
    """
    rows = tensor.data.reshape(len(l), -1).copy()  # (rows, bytes)
    if tensor.kind in VALUES:
        values = torch.from_numpy(rows).view(VALUES[tensor.kind])  # (rows, columns), the same memory
        scale(values, l.unsqueeze(1))
        if not values.isfinite().all():
            raise ValueError(f"a product does not fit into {tensor.kind}")
        return rows
    if tensor.kind not in SCALES or len(tensor.shape) != 2:
        raise ValueError(f"type {tensor.kind} has no scales that take a row's factor in full")
    gguf = import_gguf()
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    blocks = rows.reshape(len(l), -1, size)  # (rows, blocks of a row, bytes), the same memory
    for at in SCALES[tensor.kind]:
        before = blocks[..., at : at + 2].copy().view(np.float16).astype(np.float64)  # (rows, blocks, 1)
        product = l.numpy().reshape(-1, 1, 1) * before
        with np.errstate(over="ignore"):
            after = product.astype(np.float16)
        check_scales(before, product, after.astype(np.float64))
        blocks[..., at : at + 2] = after.view(np.uint8)
    return rows


def check_scales(before, product, after):
    """Raise ValueError where a product overflows, or that of a scale of at least 2^-14 is rounded by over 2^-8 of it.

    Below 2^-14 float16's numbers are 2^-24 apart, so a smaller one is rounded by up to 2^-25. Many scales of K-quants
    of small weights are that small in the base, and were rounded as much when its file was made. So those pass.
    """
    if not np.isfinite(after).all():
        raise ValueError(f"the scale {np.abs(product).max():.3g} is beyond float16, whose largest number is 65504")
    lost = (np.abs(before) >= 2**-14) & (np.abs(after - product) > 2**-8 * np.abs(product))
    if lost.any():
        raise ValueError(f"the scale {np.abs(product[lost]).min():.3g} is too small for float16")
