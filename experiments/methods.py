"""(IA)³'s rivals, each from its paper, attached from outside so that model.py stays (IA)³'s alone.

Every attach function takes a GPT, freezes what its method freezes, adds what it adds, and leaves requires_grad on just
what it trains: train.train() needs no more. Every merge function returns a plain GPT that computes the same. METHODS,
at the end, lists them with the learning rate that the (IA)³ paper's authors ran each with (the configs of their code,
github.com/r-three/t-few) and the number of values as a function of the GPTConfig.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import ia3
from merge import merge


def plain(model):
    """The merge of what changed the GPT's own parameters only: it is a plain GPT already."""
    return copy.deepcopy(model)


# --- the GPT's own parameters ---


def attach_nothing(model):
    """The untouched base."""
    model.requires_grad_(False)


def attach_full(model):
    """Full fine-tuning: every parameter."""
    model.requires_grad_(True)


def attach_bitfit(model):
    """BitFit: the biases, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199, section 3).

    Of the linear maps 9·n a layer, of the LayerNorms 2·n a layer and n at the end. Some codebases (T-Few's is one) call
    BitFit what trains the LayerNorms' weights as well. In a GPT-2 the value of b_k does not reach the output, so n of a
    layer's 11·n are idle.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(".bias"))


def attach_layernorm(model):
    """LayerNorm tuning: gain and bias of every LayerNorm (Zhao et al. 2023, arXiv:2312.11420)."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


# --- LoRA ---


class LoRA(nn.Module):
    """The fused c_attn plus a low-rank change of W_q, W_k, W_v: W_t x + B_t A_t x for each target t of 'qkv'.

    Hu et al. 2021, arXiv:2106.09685, section 4.1, with α = r, so the scale α/r is 1. A is Gaussian and B zero, so step
    0 is the base.
    """

    def __init__(self, c_attn, r, targets):
        super().__init__()
        n_embd = c_attn.in_features
        self.c_attn = c_attn
        self.rows = [slice(i * n_embd, (i + 1) * n_embd) for i in map("qkv".index, targets)]
        self.A = nn.Parameter(torch.randn(len(targets), r, n_embd) / math.sqrt(n_embd))
        self.B = nn.Parameter(torch.zeros(len(targets), n_embd, r))

    def forward(self, x):
        y = self.c_attn(x)  # (B, T, 3C)
        for rows, A, B in zip(self.rows, self.A, self.B, strict=True):
            y[..., rows] += F.linear(F.linear(x, A), B)  # (B, T, C) → (B, T, r) → (B, T, C)
        return y

    def merged(self):
        """W_t ← W_t + B_t A_t, in float64, rounded once."""
        weight = self.c_attn.weight
        for rows, A, B in zip(self.rows, self.A, self.B, strict=True):
            weight[rows] = (weight[rows].double() + B.double() @ A.double()).to(weight.dtype)
        return self.c_attn


def attach_lora(model, r, targets):
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = LoRA(block.attn.c_attn, r, targets)


@torch.no_grad()
def merge_lora(model):
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.attn.c_attn = block.attn.c_attn.merged()
    return model


# --- bottleneck adapters ---


class Adapter(nn.Module):
    """h + W_up γ(W_down h + b_down) + b_up, γ = GELU (Houlsby et al. 2019, arXiv:1902.00751, section 2.1).

    The paper starts both matrices near zero; W_up starts at zero here, so step 0 is the base. γ forbids a merge.
    """

    def __init__(self, n_embd, width):
        super().__init__()
        self.down = nn.Linear(n_embd, width)
        self.up = nn.Linear(width, n_embd)
        nn.init.normal_(self.down.weight, std=0.01)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, h):
        return h + self.up(F.gelu(self.down(h), approximate="tanh"))  # (B, T, C) → (B, T, width) → (B, T, C)


def attach_adapters(model, width):
    """An adapter behind each sublayer's projection, before the residual sum; the LayerNorms are trained too (2.1)."""
    attach_layernorm(model)
    for block in model.transformer.h:
        block.attn.c_proj = nn.Sequential(block.attn.c_proj, Adapter(model.config.n_embd, width))
        block.mlp.c_proj = nn.Sequential(block.mlp.c_proj, Adapter(model.config.n_embd, width))


# --- prefix tuning ---


class PrefixAttention(nn.Module):
    """Attention to learned keys and values before those of the text: softmax(Q [P_k; K]ᵀ / √d_head) [P_v; V].

    Li and Liang 2021, arXiv:2101.00190, section 4, without the MLP that they train the prefix through. No merge: the
    attention is longer.
    """

    def __init__(self, attn, keys, values):
        super().__init__()
        self.attn = attn
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)  # (P, C)

    def forward(self, x, l_k=None, l_v=None):
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(x).split(C, dim=2)  # 3 × (B, T, C)
        k, v = (torch.cat((p.to(t.dtype).expand(B, -1, -1), t), 1) for p, t in ((self.keys, k), (self.values, v)))
        n_head = self.attn.n_head
        q, k, v = (t.view(B, -1, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))  # k, v (B, n_head, P + T, ·)
        seen = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)  # P and the past
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.attn.resid_dropout(self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C)))


@torch.no_grad()
def attach_prefix(model, n_prefix):
    """Start from the keys and values of n_prefix tokens that the base itself writes: real activations, as the paper
    advises (section 7.4). So step 0 is the base behind some text, not the base.
    """
    text = model.generate(torch.zeros(1, 1, dtype=torch.long), n_prefix)[:, 1:]  # (1, P)
    written = []  # (P, 3C) a layer
    c_attns = [block.attn.c_attn for block in model.transformer.h]
    hooks = [c_attn.register_forward_hook(lambda _module, _x, y: written.append(y[0])) for c_attn in c_attns]
    model(text)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    for block, y in zip(model.transformer.h, written, strict=True):
        _, keys, values = y.chunk(3, dim=-1)  # (P, C)
        block.attn = PrefixAttention(block.attn, keys.clone(), values.clone())


@dataclass(frozen=True)
class Method:
    title: str  # in tables
    lr: float  # published
    attach: Callable  # of a GPT
    merge: Callable | None  # of a GPT, to a plain one
    count: Callable  # the number of values, of a GPTConfig
    mixes: str  # how one batch can serve several tasks


def count_full(c):
    vectors = 13 * c.n_layer + 2  # 9 biases and 4 gains and biases a layer
    return (c.vocab_size + c.block_size + 12 * c.n_layer * c.n_embd + vectors) * c.n_embd


METHODS = {
    "base": Method("the untouched base", 0.0, attach_nothing, plain, lambda c: 0, "is one"),
    "full": Method("full fine-tuning", 3e-4, attach_full, plain, count_full, "no"),
    "bitfit": Method(
        "BitFit", 3e-4, attach_bitfit, plain, lambda c: (11 * c.n_layer + 1) * c.n_embd, "gathered biases"
    ),
    "layernorm": Method(
        "LayerNorm tuning", 3e-4, attach_layernorm, plain, lambda c: (4 * c.n_layer + 2) * c.n_embd, "gathered vectors"
    ),
    "lora1": Method(
        "LoRA r = 1 on k, v",
        3e-3,
        lambda model: attach_lora(model, 1, "kv"),
        merge_lora,
        lambda c: 4 * 1 * c.n_layer * c.n_embd,
        "gathered matrices",
    ),
    "lora4": Method(
        "LoRA r = 4 on q, v",
        3e-3,
        lambda model: attach_lora(model, 4, "qv"),
        merge_lora,
        lambda c: 4 * 4 * c.n_layer * c.n_embd,
        "gathered matrices",
    ),
    "adapters": Method(
        "adapters of width 8",
        3e-3,
        lambda model: attach_adapters(model, 8),
        None,
        lambda c: 2 * c.n_layer * ((2 * 8 + 1) * c.n_embd + 8) + (4 * c.n_layer + 2) * c.n_embd,
        "gathered matrices",
    ),
    "prefix": Method(
        "a prefix of 8",
        1e-2,
        lambda model: attach_prefix(model, 8),
        None,
        lambda c: 2 * 8 * c.n_layer * c.n_embd,
        "gathered keys, values",
    ),
    "ia3": Method("(IA)³", 3e-3, ia3.attach, merge, lambda c: 6 * c.n_layer * c.n_embd, "gathered vectors: `tasks=`"),
}
