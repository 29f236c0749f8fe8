"""(IA)³'s rivals, each from its paper, added from outside so that model.py stays (IA)³'s alone.

A method is a function that takes a frozen model, adds what it adds, and returns the parameters to train; attach() sees
to the rest, and train.train() needs no more. Where it merges, a second function returns a plain GPT that computes the
same. METHODS, at the end, lists a GPT's. None comes with a learning rate: the published ones are for another optimizer
(docs/training.md), so whoever compares chooses one for each.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import ia3
from merge import merge
from sample import Cache, generate


def attach(model, add):
    """Add a method to model, and let learn only what it trains. add: as Method.add."""
    model.requires_grad_(False)
    for p in add(model):
        p.requires_grad_(True)


# --- the GPT's own parameters ---


def add_nothing(model):
    """The untouched base."""
    return []


def add_full(model):
    """Full fine-tuning: every parameter."""
    return list(model.parameters())


def add_bitfit(model):
    """BitFit: the biases, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199, section 3).

    Of the linear maps 9·n a layer, of the LayerNorms 2·n a layer and n at the end. What the (IA)³ paper's authors ran
    as BitFit trains the LayerNorms' weights as well (github.com/r-three/t-few, configs/bitfit.json). In a GPT-2 the
    value of b_k does not reach the output, so n of a layer's 11·n are idle.
    """
    return [p for name, p in model.named_parameters() if name.endswith(".bias")]


def add_layernorm(model):
    """LayerNorm tuning: gain and bias of every LayerNorm, as in t-few's configs/layernorm.json."""
    return [p for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]


def add_ia3(model, sites=ia3.SITES):
    """(IA)³ itself."""
    return list(ia3.attach(model, sites=sites).parameters())


# --- LoRA ---


class LoRA(nn.Module):
    """The fused c_attn plus a low-rank change of W_q, W_k, W_v: W_m x + B_m A_m x for each map m among 'qkv'.

    Hu et al. 2021, arXiv:2106.09685, section 4.1, with α = r, so the scale α/r is 1. A is Gaussian and B zero, so step
    0 is the base.
    """

    def __init__(self, c_attn, r, maps):
        super().__init__()
        n_embd = c_attn.in_features
        self.c_attn = c_attn
        places = ["qkv".index(m) for m in maps]
        self.rows = [slice(i * n_embd, (i + 1) * n_embd) for i in places]
        self.A = nn.Parameter(torch.randn(len(maps), r, n_embd) / math.sqrt(n_embd))
        self.B = nn.Parameter(torch.zeros(len(maps), n_embd, r))

    def forward(self, x):
        y = self.c_attn(x)  # (B, T, 3C)
        for rows, A, B in zip(self.rows, self.A, self.B, strict=True):
            y[..., rows] += F.linear(F.linear(x, A), B)  # (B, T, C) → (B, T, r) → (B, T, C)
        return y

    def merged(self):
        """W_m ← W_m + B_m A_m, in float64, rounded once."""
        weight = self.c_attn.weight
        for rows, A, B in zip(self.rows, self.A, self.B, strict=True):
            weight[rows] = (weight[rows].double() + B.double() @ A.double()).to(weight.dtype)
        return self.c_attn


def add_lora(model, r, maps):
    trained = []
    for block in model.blocks:
        lora = LoRA(block.attn.c_attn, r, maps)
        block.attn.c_attn = lora
        trained += [lora.A, lora.B]
    return trained


@torch.no_grad()
def merge_c_attn(model):
    """A copy of model whose every c_attn, a LoRA or a VeRA, is a plain one again."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.c_attn = block.attn.c_attn.merged()
    return model


class LoRALinear(nn.Module):
    """A linear map plus a low-rank change, W x + B A x: LoRA on a module as a whole, a GPT's fused c_attn too."""

    def __init__(self, linear, r):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, r))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype))  # (…, in) → (…, r); A and B are float32, the base may be bfloat16
        return self.linear(x) + F.linear(low, self.B.to(x.dtype))  # (…, out)


def add_lora_maps(model, r, names=None):
    """LoRA on those linear maps of a GPT's or a Llama's blocks that names lists, ('q_proj', 'v_proj'); None: on all.

    On all maps of a GPT that is 16·r·n_embd values a layer, c_attn being one map.
    """
    trained = []
    for block in model.blocks:
        linears = {place: module for place, module in block.named_modules() if isinstance(module, nn.Linear)}
        for place, linear in linears.items():
            if names is None or place.split(".")[-1] in names:
                lora = LoRALinear(linear, r)
                block.set_submodule(place, lora)
                trained += [lora.A, lora.B]
    return trained


@torch.no_grad()
def merge_lora_maps(model):
    """W ← W + B A, in float64, rounded once."""
    model = copy.deepcopy(model)
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, lora in loras.items():
        weight = lora.linear.weight
        weight.copy_(weight.double() + lora.B.double() @ lora.A.double())
        model.set_submodule(name, lora.linear)
    return model


class MixedLoRA(nn.Module):
    """A batch of several tasks' rows: W_m x + B_m A_m x with the A and B of each row's task, gathered by task_ids.

    loras: the tasks' LoRA on one c_attn; task_ids (B,) long.
    """

    def __init__(self, loras, task_ids):
        super().__init__()
        self.c_attn = loras[0].c_attn
        self.rows = loras[0].rows
        self.A = nn.Parameter(torch.stack([lora.A.detach() for lora in loras]))  # (n_tasks, maps, r, C)
        self.B = nn.Parameter(torch.stack([lora.B.detach() for lora in loras]))  # (n_tasks, maps, C, r)
        self.task_ids = task_ids

    def forward(self, x):
        y = self.c_attn(x)  # (B, T, 3C)
        A = self.A[self.task_ids]  # (B, maps, r, C)
        B = self.B[self.task_ids]
        for i, rows in enumerate(self.rows):
            y[..., rows] += x @ A[:, i].mT @ B[:, i].mT  # (B, T, C) → (B, T, r) → (B, T, C)
        return y


def mix_lora(models, task_ids):
    """One GPT of several that add_lora made of the same base: row b of its batch is computed as models[task_ids[b]]."""
    mixed = copy.deepcopy(models[0])
    for i, block in enumerate(mixed.blocks):
        block.attn.c_attn = MixedLoRA([model.blocks[i].attn.c_attn for model in models], task_ids)
    return mixed


# --- VeRA ---


class VeRA(nn.Module):
    """The fused c_attn plus b_m ⊙ B (d_m ⊙ A x) for each map m of 'qkv': W_m x + Λ_b B Λ_d A x.

    Kopiczko et al. 2024, arXiv:2310.11454, sections 3.1, 3.2: A and B are random, frozen and the same in every layer;
    b starts as zeros, so step 0 is the base, and d as 0.1.
    """

    def __init__(self, c_attn, A, B):
        super().__init__()
        self.c_attn = c_attn
        self.register_buffer("A", A)  # (r, C)
        self.register_buffer("B", B)  # (C, r)
        self.d = nn.Parameter(torch.full((3, A.size(0)), 0.1))
        self.b = nn.Parameter(torch.zeros(3, B.size(0)))

    def forward(self, x):
        low = F.linear(x, self.A)  # (B, T, r)
        changes = [b * F.linear(d * low, self.B) for d, b in zip(self.d, self.b, strict=True)]  # 3 × (B, T, C)
        return self.c_attn(x) + torch.cat(changes, -1)  # (B, T, 3C)

    def merged(self):
        """W_m ← W_m + diag(b_m) B diag(d_m) A, in float64, rounded once."""
        A, B, d, b = [t.double() for t in (self.A, self.B, self.d, self.b)]
        change = torch.cat([b[i].unsqueeze(1) * B @ (d[i].unsqueeze(1) * A) for i in range(3)])  # (3C, C)
        weight = self.c_attn.weight
        weight.copy_(weight.double() + change)
        return self.c_attn


def add_vera(model, r):
    n_embd = model.config.n_embd
    A = nn.init.kaiming_uniform_(torch.empty(r, n_embd))
    B = nn.init.kaiming_uniform_(torch.empty(n_embd, r))
    trained = []
    for block in model.blocks:
        block.attn.c_attn = VeRA(block.attn.c_attn, A, B)
        trained += [block.attn.c_attn.d, block.attn.c_attn.b]
    return trained


# --- prompt tuning ---


class SoftPrompt(nn.Module):
    """An embedding with tokens more: the id vocab_size + i stands for a learned vector, prompt[i].

    Lester et al. 2021, arXiv:2104.08691, section 2: P learned embeddings before those of the text. Whoever reads a text
    writes the ids vocab_size to vocab_size + P - 1 before it; no target is ever one of them.
    """

    def __init__(self, embedding, n_prompt):
        super().__init__()
        self.embedding = embedding
        ids = torch.randint(embedding.num_embeddings, (n_prompt,))  # they start as any tokens (cf. section 3.2)
        self.prompt = nn.Parameter(embedding.weight[ids].detach().float())  # a copy, also of a base in bfloat16

    def forward(self, idx):
        places = idx - self.embedding.num_embeddings
        soft = self.prompt[places.clamp(min=0)].to(self.embedding.weight.dtype)  # (B, T, C)
        return torch.where((places >= 0).unsqueeze(-1), soft, self.embedding(idx.masked_fill(places >= 0, 0)))


def add_prompt_llama(model, n_prompt):
    model.model.embed_tokens = SoftPrompt(model.model.embed_tokens, n_prompt)
    return [model.model.embed_tokens.prompt]


class PromptBlock(nn.Module):
    """A GPT's first block, with learned vectors before the text.

    They have no place among the base's positions, of which a window takes all: a vector that is learned can hold one.
    """

    def __init__(self, block, prompt):
        super().__init__()
        self.block = block
        self.prompt = nn.Parameter(prompt)  # (P, C)

    def forward(self, x, l_k=None, l_v=None, l_ff=None, cache=None):
        if cache is not None:
            raise ValueError("a prompt is read anew with every token: it has no cache")
        soft = self.prompt.to(x.dtype).expand(x.size(0), -1, -1)
        return self.block(torch.cat((soft, x), 1), l_k, l_v, l_ff)  # (B, P + T, C)


class DropPrompt(nn.Module):
    """The last LayerNorm, of the text only."""

    def __init__(self, ln_f, n_prompt):
        super().__init__()
        self.ln_f = ln_f
        self.n_prompt = n_prompt

    def forward(self, x):
        return self.ln_f(x[:, self.n_prompt :])  # (B, T, C)


def add_prompt(model, n_prompt):
    """Prompt tuning of a GPT. The vectors start as any of the vocabulary's, without positions.

    Lester et al. 2021, section 3.2, draw from frequent tokens; of the bundled base's 257 most are in no text.
    """
    wte = model.transformer.wte
    prompt = wte.weight[torch.randint(wte.num_embeddings, (n_prompt,))].detach().clone()
    model.blocks[0] = PromptBlock(model.blocks[0], prompt)
    model.transformer.ln_f = DropPrompt(model.transformer.ln_f, n_prompt)
    return [model.blocks[0].prompt]


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


def add_adapters(model, width, layernorms=True):
    """An adapter behind each sublayer's projection, before the residual sum; the LayerNorms are trained too (2.1)."""
    trained = add_layernorm(model) if layernorms else []
    for block in model.blocks:
        for sublayer in (block.attn, block.mlp):
            adapter = Adapter(model.config.n_embd, width)
            sublayer.c_proj = nn.Sequential(sublayer.c_proj, adapter)
            trained += adapter.parameters()
    return trained


# --- prefix tuning ---


class PrefixAttention(nn.Module):
    """Attention to learned keys and values before those of the text: softmax(Q [P_k; K]ᵀ / √d_head) [P_v; V].

    Li and Liang 2021, arXiv:2101.00190, section 4, without the MLP that they, and the (IA)³ paper's authors, train the
    prefix through. No merge: the attention is longer.
    """

    def __init__(self, attn, keys, values):
        super().__init__()
        self.attn = attn
        self.keys = nn.Parameter(keys)  # (P, C)
        self.values = nn.Parameter(values)  # (P, C)

    def forward(self, x, l_k=None, l_v=None, cache=None):
        if cache is not None:
            raise ValueError("a prefix is read anew with every token: it has no cache")
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(x).split(C, dim=2)  # 3 × (B, T, C)
        k = torch.cat((self.keys.to(k.dtype).expand(B, -1, -1), k), 1)  # (B, P + T, C)
        v = torch.cat((self.values.to(v.dtype).expand(B, -1, -1), v), 1)
        n_head = self.attn.n_head
        q = q.view(B, -1, n_head, C // n_head).transpose(1, 2)  # (B, n_head, T, d_head)
        k = k.view(B, -1, n_head, C // n_head).transpose(1, 2)  # (B, n_head, P + T, d_head)
        v = v.view(B, -1, n_head, C // n_head).transpose(1, 2)
        seen = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)  # P and the past
        dropout = self.attn.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        return self.attn.resid_dropout(self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C)))


@torch.no_grad()
def add_prefix(model, n_prefix):
    """Start from the keys and values of n_prefix tokens that the base itself writes: real activations, as the paper
    advises (section 7.4). So step 0 is the base behind some text, not the base.
    """
    text = generate(model, torch.zeros(1, 1, dtype=torch.long), n_prefix)[:, 1:]  # (1, P)
    cache = Cache(model, 1, n_prefix)
    model.hidden(text, cache=cache)
    trained = []
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        keys, values = [t[0].transpose(0, 1).flatten(1) for t in (layer.k, layer.v)]  # (P, C)
        block.attn = PrefixAttention(block.attn, keys, values)
        trained += [block.attn.keys, block.attn.values]
    return trained


@dataclass(frozen=True)
class Method:
    title: str  # in tables
    add: Callable  # to a frozen GPT; returns the parameters to train
    merge: Callable | None  # of a GPT, to a plain one
    mixes: str  # how one batch can serve several tasks


METHODS = {
    "base": Method("the untouched base", add_nothing, copy.deepcopy, "is one"),
    "full": Method("full fine-tuning", add_full, copy.deepcopy, "no"),
    "bitfit": Method("BitFit", add_bitfit, copy.deepcopy, "gathered biases"),
    "layernorm": Method("LayerNorm tuning", add_layernorm, copy.deepcopy, "gathered vectors"),
    "lora1": Method("LoRA r = 1 on k, v", partial(add_lora, r=1, maps="kv"), merge_c_attn, "gathered matrices"),
    "lora-qkv": Method("LoRA r = 1 on q, k, v", partial(add_lora, r=1, maps="qkv"), merge_c_attn, "gathered matrices"),
    "lora4": Method("LoRA r = 4 on q, v", partial(add_lora, r=4, maps="qv"), merge_c_attn, "gathered matrices"),
    "lora-all": Method("LoRA r = 1 on all maps", partial(add_lora_maps, r=1), merge_lora_maps, "gathered matrices"),
    "vera": Method("VeRA r = 384 on q, k, v", partial(add_vera, r=384), merge_c_attn, "gathered vectors"),
    "adapters": Method("adapters of 8, and LayerNorms", partial(add_adapters, width=8), None, "gathered matrices"),
    "adapters-only": Method(
        "adapters of 8", partial(add_adapters, width=8, layernorms=False), None, "gathered matrices"
    ),
    "prefix": Method("a prefix of 8, without the MLP", partial(add_prefix, n_prefix=8), None, "gathered keys, values"),
    "prompt": Method("a prompt of 16", partial(add_prompt, n_prompt=16), None, "gathered vectors"),
    "ia3": Method("(IA)³", add_ia3, merge, "gathered vectors: `task_ids=`"),
}
