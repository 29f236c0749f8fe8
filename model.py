"""GPT-2 with (IA)³ in plain sight: one file, one class per concept, the parts before what they are parts of.

(IA)³ (Liu et al. 2022, arXiv:2205.05638, section 3.3) rescales three activations of every block by learned vectors:

    attention   softmax(Q (l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V)       CausalSelfAttention.forward
    MLP         W_2 (l_ff ⊙ γ(W_1 x + b_1)) + b_2               MLP.forward

The vectors are a value that this file only reads: GPT.ia3 is None (the plain base) or an ia3.IA3. Once assigned, its
matrices are parameters of the model, by the names ia3.l_k, ia3.l_v and ia3.l_ff.

The rest is GPT-2 exactly (Radford et al. 2019), with nanoGPT's names: learned positions, LayerNorm before each
sublayer, GELU in its tanh form as γ, and one matrix for the embedding and the head.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ia3 import layers_of


@dataclass
class GPTConfig:
    """The sizes of a GPT. Raises ValueError for sizes that no GPT can have."""

    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True  # in the linear maps and the LayerNorms, as in GPT-2

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if type(self.bias) is not bool:
            raise ValueError(f"bias must be True or False, not {self.bias!r}")

    @property
    def widths(self):
        """How many entries l_k, l_v and l_ff have in a layer."""
        return self.n_embd, self.n_embd, 4 * self.n_embd


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # W_q, W_k, W_v, stacked
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, l_k=None, l_v=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 × (B, T, C)

        # (IA)³: queries stay as they are. l_k and l_v are (C,), or (B, 1, C) in a batch of several tasks. They are
        # float32 even if the base is bfloat16: multiply in the wider dtype, then round once.
        if l_k is not None:
            k = (l_k * k).to(k.dtype)  # l_k ⊙ K
        if l_v is not None:
            v = (l_v * v).to(v.dtype)  # l_v ⊙ V

        # a head is d_head neighbouring channels
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, d_head)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            k, v, seen = cache.append(k, v)  # sample.LayerCache: those of all tokens so far, all scaled
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, attn_mask=seen)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)  # W_1, up
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)  # W_2, down
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, l_ff=None):
        h = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        if l_ff is not None:
            h = (l_ff * h).to(h.dtype)  # (IA)³: l_ff ⊙ γ(W_1 x + b_1), after the GELU and before the down-projection
        return self.dropout(self.c_proj(h))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, l_k=None, l_v=None, l_ff=None, cache=None):
        x = x + self.attn(self.ln_1(x), l_k, l_v, cache)
        x = x + self.mlp(self.ln_2(x), l_ff)
        return x


class GPT(nn.Module):
    """A GPT-2. `ia3` holds the vectors of a task, or None.

    Assign an IA3 to switch tasks, None for the base. Assigning freezes nothing: ia3.attach does.
    `tokenizer` is a data.tokenizer.Tokenizer, or None; the model only carries it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.ia3 = None
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied

        # GPT-2's initialization: N(0, 0.02), and 0.02 / √(2·n_layer) for maps that write into the residual stream
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def blocks(self):
        return self.transformer.h

    def forward(self, idx, targets=None, task_ids=None, cache=None):
        """Predict the next token at every position.

        idx (B, T) long, T ≤ block_size; targets (B, T) long, -1 where there is none; task_ids (B,) long, the task of
        each row when self.ia3 is stacked (ia3.stack); cache: see hidden.

        Returns the logits, (B, T, vocab_size), and the mean cross-entropy in nats per target, or None without targets.
        If some targets are -1, the logits are those of the n positions that have one, (n, vocab_size). Raises
        ValueError for a sequence that is empty or too long, task_ids that do not fit the vectors, or targets all -1.
        """
        x = self.hidden(idx, task_ids, cache)  # (B, T, n_embd)
        if targets is None:
            return self.lm_head(x), None

        has_target = targets >= 0  # (B, T)
        if not has_target.any():
            raise ValueError("every target is -1: there is nothing to take the mean of")
        if not has_target.all():  # the logits are most of a step's memory: compute them only where they are compared
            x = x[has_target]  # (n, n_embd)
            targets = targets[has_target]  # (n,)
        logits = self.lm_head(x)  # (B, T, vocab_size), or (n, vocab_size)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 becomes float32; float64 stays
        return logits, F.cross_entropy(wide.flatten(0, -2), targets.flatten())

    def hidden(self, idx, task_ids=None, cache=None):
        """Everything but the head: (B, T, n_embd), for callers that need logits at a few positions only.

        cache: a sample.Cache that holds the tokens before idx and is extended by idx; None if there are none.
        """
        layers = layers_of(self, task_ids, len(idx))  # n_layer × (l_k, l_v, l_ff)
        start = 0  # tokens that the cache holds
        caches = [None] * self.config.n_layer
        if cache is not None:
            start = cache.n_read(self, task_ids)  # refuses a cache that was made for something else
            caches = cache.layers
        end = start + idx.size(1)
        if idx.size(1) == 0:
            raise ValueError("idx is empty: there is nothing to predict from")
        if end > self.config.block_size:
            raise ValueError(f"a sequence of {end} tokens does not fit block_size {self.config.block_size}")

        pos = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for block, (l_k, l_v, l_ff), layer_cache in zip(self.blocks, layers, caches, strict=True):
            x = block(x, l_k, l_v, l_ff, layer_cache)
        return self.transformer.ln_f(x)  # (B, T, C)
