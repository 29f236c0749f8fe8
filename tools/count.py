"""How many values (IA)³ trains, and what share of the model they are: a table with one line per model."""

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
PUBLISHED = [*SIZES, *LLAMAS]


def count(names):
    """Return the table as text. names: checkpoints, or published models' (PUBLISHED).

    Published models are counted from their sizes, without fetching. The blocks include biases and norms. The formula
    1/(2·n_embd) counts only the matrices of GPT-2's blocks, 6·n_embd values for 12·n_embd² weights, so it is slightly
    larger. Bytes are those of the .npz.
    """
    head = ("model", "layers", "n_embd", "parameters", "trained", "of all", "of the blocks", "1/(2·n_embd)", "bytes")
    rows = [head]
    for name in names:
        rows.append(row(name, find_model(name)))
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
    n_all = sum(p.numel() for p in model.parameters())
    n_blocks = sum(p.numel() for p in model.blocks.parameters())
    vectors = IA3(config)
    n = vectors.count()
    vectors.fingerprint = "0" * 64  # as long as a real one
    with tempfile.TemporaryDirectory() as folder:
        vectors.save(f"{folder}/ia3.npz")
        n_bytes = os.path.getsize(f"{folder}/ia3.npz")
    sizes = (f"{config.n_layer}", f"{config.n_embd}", f"{n_all:,}", f"{n:,}")
    law = f"{1 / (2 * config.n_embd):.4%}" if isinstance(model, GPT) else "-"
    return (name, *sizes, f"{n / n_all:.4%}", f"{n / n_blocks:.4%}", law, f"{n_bytes:,}")
