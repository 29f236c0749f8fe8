"""How many values (IA)³ trains, and of how many: a table, a line a model."""

import os
import tempfile

import torch

import common
from ia3 import IA3
from llama import Llama, LlamaConfig
from model import GPT
from tools.hf_gpt2 import SIZES, published

LLAMAS = {  # (n_layer, n_head, n_kv_head, n_embd, n_hidden), vocabulary, tied
    # Touvron et al. 2023, arXiv:2302.13971, table 2; the MLP is 8/3 as wide, rounded up to a multiple of 256
    "LLaMA-7B": ((32, 32, 32, 4096, 11008), 32000, False),
    # Dubey et al. 2024, arXiv:2407.21783, table 3; its 128,000 tokens and 256 special ones
    "Llama-3-8B": ((32, 32, 8, 4096, 14336), 128256, False),
    # its config.json on the hub
    "SmolLM2-135M": ((30, 9, 3, 576, 1536), 49152, True),
}
# T0 (Sanh et al. 2021, arXiv:2110.08207) has the shape of T5 1.1 XL and XXL: an encoder and a decoder, no biases, a
# gated MLP, an embedding apart from the head. These are its config.json's sizes on the hub, bigscience/T0_3B and T0
T0 = {  # n_embd, n_hidden, n_head
    "T0-3B": (2048, 5120, 32),
    "T0-11B": (4096, 10240, 64),
}
T0_LAYERS, T0_D_HEAD, T0_VOCAB, T0_BUCKETS = 24, 64, 32128, 32  # layers of each; buckets of relative positions
PUBLISHED = [*SIZES, *LLAMAS, *T0]
EMPTY = "-"  # a column that holds for other models only


def count(names):
    """Return the table as text. names: checkpoints, or published models' (PUBLISHED).

    Published models are counted from their sizes; nothing is fetched. The blocks are all that stands in the layers,
    biases and norms too. The law 1/(2·n_embd) is of the matrices of GPT-2's blocks alone, 6·n_embd of 12·n_embd² a
    layer, so it is a little larger. Bytes are those of the .npz.
    """
    head = ("model", "layers", "n_embd", "parameters", "trained", "of all", "of the blocks", "1/(2·n_embd)", "bytes")
    rows = [head]
    for name in names:
        rows.append(row_of_t0(name) if name in T0 else row(name, find_model(name)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        cells[0] = cells[0].strip().ljust(widths[0])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def find_model(name):
    """The model of a name of PUBLISHED, without memory for its weights, or of a checkpoint."""
    with torch.device("meta"):
        if name in SIZES:
            return GPT(published(name))
        if name in LLAMAS:
            (n_layer, n_head, n_kv_head, n_embd, n_hidden), vocab_size, tied = LLAMAS[name]
            # the block size, the base and the eps do not count
            return Llama(LlamaConfig(1, vocab_size, n_layer, n_head, n_kv_head, n_embd, n_hidden, 10000, 1e-5, tied))
    return common.load(name, dtype=None)


def row(name, model):
    """A line of the table, as its cells."""
    config = model.config
    is_gpt2 = isinstance(model, GPT)
    blocks = model.transformer.h if is_gpt2 else model.model.layers
    n_all = sum(p.numel() for p in model.parameters())
    n_blocks = sum(p.numel() for p in blocks.parameters())
    vectors = IA3(config)
    n = vectors.count()
    vectors.fingerprint = "0" * 64  # as long as a real one
    with tempfile.TemporaryDirectory() as folder:
        vectors.save(f"{folder}/ia3.npz")
        n_bytes = os.path.getsize(f"{folder}/ia3.npz")
    sizes = (f"{config.n_layer}", f"{config.n_embd}", f"{n_all:,}", f"{n:,}")
    law = f"{1 / (2 * config.n_embd):.4%}" if is_gpt2 else EMPTY
    return (name, *sizes, f"{n / n_all:.4%}", f"{n / n_blocks:.4%}", law, f"{n_bytes:,}")


def row_of_t0(name):
    """The line of a T0, by arithmetic: no model here has its shape."""
    n_embd, n_hidden, n_head = T0[name]
    inner = n_head * T0_D_HEAD  # the width of keys and of values
    attention = 4 * n_embd * inner  # W_q, W_k, W_v, W_o
    mlp = 3 * n_embd * n_hidden  # two up, one of them the gate, and one down
    encoder_layer = attention + mlp + 2 * n_embd  # a norm before each
    decoder_layer = 2 * attention + mlp + 3 * n_embd  # attention to itself and to the encoder
    positions = 2 * T0_BUCKETS * n_head  # in the first layer of each
    n_blocks = T0_LAYERS * (encoder_layer + decoder_layer) + positions
    n_all = n_blocks + 2 * T0_VOCAB * n_embd + 2 * n_embd  # embedding and head; the last norms
    n = T0_LAYERS * (2 * inner + n_hidden) + T0_LAYERS * (4 * inner + n_hidden)  # l_k, l_v of each attention, and l_ff
    sizes = (f"{T0_LAYERS}+{T0_LAYERS}", f"{n_embd}", f"{n_all:,}", f"{n:,}")
    return (name, *sizes, f"{n / n_all:.4%}", f"{n / n_blocks:.4%}", EMPTY, EMPTY)
