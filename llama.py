"""A LLaMA with (IA)³ in plain sight: model.py's shape, class by class, with today's block in it.

(IA)³ (Liu et al. 2022, arXiv:2205.05638, section 3.3) rescales the same three activations; R is the rotation:

    attention   softmax(R(Q) R(l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V)                    CausalSelfAttention.forward
    MLP         W_down (l_ff ⊙ silu(W_gate x) ⊙ W_up x)                          MLP.forward

The vectors are a value that this file only reads: Llama.ia3 is None (the plain base) or an ia3.IA3.

What differs from GPT-2 (Touvron et al. 2023, arXiv:2302.13971), with transformers' names: positions rotate the queries
and keys of every layer and are not added to the embedding; several heads of queries share one of keys and values;
RMSNorm, which subtracts no mean; a gated MLP; as a rule no biases; no dropout. The head may be its own matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ia3 import layers_of

# the names of a rope_scaling's numbers
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LlamaConfig:
    """The sizes of a Llama. Raises ValueError for sizes that no Llama can have."""

    block_size: int  # the longest sequence, in tokens
    vocab_size: int
    n_layer: int
    n_head: int  # of queries
    n_kv_head: int  # of keys and values, each for n_head / n_kv_head neighbouring heads of queries
    n_embd: int
    n_hidden: int  # channels of the MLP
    rope_base: float  # θ of the rotation: pair i turns by rope_base^(-2i/d_head) radians a token
    norm_eps: float
    tied: bool  # whether the head is the embedding
    rope_scaling: dict | None = None  # {'rope_type': 'llama3', ...} with ROPE_NUMBERS; None: the plain rotation
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd {self.n_embd} does not give n_head {self.n_head} an even number of channels each")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
            setattr(self, name, float(getattr(self, name)))  # 10000 and 10000.0 are one base, with one fingerprint
        for name in ("tied", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            if kind != "llama3":
                raise ValueError(f"rope_scaling of type {kind!r} is unknown: it must be 'llama3' or None")
            factor, low, high, length = [float(self.rope_scaling.get(name, math.nan)) for name in ROPE_NUMBERS]
            if not (0 < factor < math.inf and 0 < low < high < math.inf and 0 < length < math.inf):
                raise ValueError(f"rope_scaling needs {', '.join(ROPE_NUMBERS)}, not {self.rope_scaling}")
            self.rope_scaling = {"rope_type": kind} | dict(zip(ROPE_NUMBERS, (factor, low, high, length), strict=True))

    @property
    def widths(self):
        """How many entries l_k, l_v and l_ff have in a layer."""
        d_head = self.n_embd // self.n_head
        return self.n_kv_head * d_head, self.n_kv_head * d_head, self.n_hidden


def pair_speeds(config, device=None, dtype=torch.float32):
    """The angle, in radians, by which each pair of channels turns per token, (d_head/2,).

    Pair i turns by rope_base^(-2i/d_head) (Su et al. 2021, arXiv:2104.09864, section 3.2.2), unless rope_scaling slows
    it down.
    """
    d_head = config.n_embd // config.n_head
    two_i = torch.arange(0, d_head, 2, device=device, dtype=dtype)
    speed = 1 / config.rope_base ** (two_i / d_head)
    if config.rope_scaling is not None:
        # Llama 3.1 reads longer texts with its slow pairs slowed down. What counts is how often a pair turns in the
        # original length: below low_freq_factor it is slowed down by factor, above high_freq_factor not at all, and in
        # between by a mix of both
        factor, low, high, length = [config.rope_scaling[name] for name in ROPE_NUMBERS]
        turns = length / (2 * math.pi / speed)
        mix = ((turns - low) / (high - low)).clamp(0, 1)
        speed = (1 - mix) * speed / factor + mix * speed
    return speed


def rotary_table(config, pos, dtype):
    """cos and sin, both (T, d_head/2), of the angle by which each pair of channels turns at positions pos (T,).

    Computed in float32 or, for a dtype of float64, in that: bfloat16 could not tell position 257 from 256.
    """
    speed = pair_speeds(config, pos.device, torch.promote_types(dtype, torch.float32))
    angles = pos.unsqueeze(1) * speed  # (T, d_head/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn x (B, heads, T, d_head): channels i and i + d_head/2 of a head are a pair, a point in the plane."""
    a, b = x.chunk(2, dim=-1)  # 2 × (B, heads, T, d_head/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)  # in the wider dtype, rounded once


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        k_width, v_width, _ = config.widths
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.n_embd, k_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.n_embd, v_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.attention_bias)
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head

    def forward(self, x, cos, sin, l_k=None, l_v=None, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x)  # (B, T, C)
        k = self.k_proj(x)  # (B, T, n_kv_head · d_head)
        v = self.v_proj(x)

        # (IA)³: scale the keys before the rotation, which mixes channels: after it l_k would not fold into W_k. Queries
        # stay as they are. l_k and l_v are (width,), or (B, 1, width) in a batch of several tasks. They are float32
        # even if the base is bfloat16: multiply in the wider dtype, then round once.
        if l_k is not None:
            k = (l_k * k).to(k.dtype)  # l_k ⊙ K
        if l_v is not None:
            v = (l_v * v).to(v.dtype)  # l_v ⊙ V

        # a head is d_head neighbouring channels
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, d_head)
        k = k.view(B, T, self.n_kv_head, C // self.n_head).transpose(1, 2)  # (B, n_kv_head, T, d_head)
        v = v.view(B, T, self.n_kv_head, C // self.n_head).transpose(1, 2)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v, seen = cache.append(k, v)  # sample.LayerCache: of all tokens so far, scaled and rotated when added
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.mlp_bias)

    def forward(self, x, l_ff=None):
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, n_hidden)
        if l_ff is not None:
            h = (l_ff * h).to(h.dtype)  # (IA)³: l_ff ⊙ silu(W_gate x) ⊙ W_up x, before the down-projection
        return self.down_proj(h)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = CausalSelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, l_k=None, l_v=None, l_ff=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, l_k, l_v, cache)
        x = x + self.mlp(self.post_attention_layernorm(x), l_ff)
        return x


class Llama(nn.Module):
    """A LLaMA. `ia3` holds the vectors of a task, or None.

    Assign an IA3 to switch tasks, None for the base. Assigning freezes nothing: ia3.attach does.
    `tokenizer` is a data.tokenizer.Tokenizer, or None; the model only carries it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.ia3 = None
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
                "layers": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "norm": nn.RMSNorm(config.n_embd, eps=config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.model.embed_tokens.weight = self.lm_head.weight

        # transformers' start: N(0, 0.02), also for what writes into the residual stream
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def blocks(self):
        return self.model.layers

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

        x = self.model.embed_tokens(idx)  # (B, T, C)
        pos = torch.arange(start, end, device=idx.device)
        cos, sin = rotary_table(self.config, pos, x.dtype)  # one table for all layers
        for block, (l_k, l_v, l_ff), layer_cache in zip(self.blocks, layers, caches, strict=True):
            x = block(x, cos, sin, l_k, l_v, l_ff, layer_cache)
        return self.model.norm(x)  # (B, T, C)
