"""What the oracle tests share: a small random GPT-2 of transformers' own, and ours with the same weights."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tools.convert import from_hf

SIZES = {"vocab_size": 61, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
ENDS = {"bos_token_id": 60, "eos_token_id": 60}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_theirs(seed=0, **sizes):
    """A GPT2LMHeadModel in float32, its biases and LayerNorms random too. Logits are of the order of 1."""
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(GPT2Config(activation_function="gelu_new", **SIZES | ENDS | NO_DROPOUT | sizes))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.15)
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return theirs.eval()


def make_both(folder, dtype=torch.float64, seed=0):
    """The same weights twice: transformers' model, and ours read from the folder that transformers wrote."""
    theirs = make_theirs(seed)
    theirs.save_pretrained(folder)
    return theirs.to(dtype), from_hf(folder).to(dtype)


def make_batch(rows=3, seed=0):
    dice = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, SIZES["vocab_size"], (rows, SIZES["n_positions"] + 1), generator=dice)
    return idx[:, :-1], idx[:, 1:]


def as_ours(name, t):
    """A tensor of transformers' GPT-2 in our orientation: its Conv1D keeps (in, out)."""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return t.t() if name.endswith(conv1d) else t
