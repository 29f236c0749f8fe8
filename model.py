"""GPT-2 with (IA)³ in plain sight: one file, one class per concept, in the order data meets them.

(IA)³ (Liu et al. 2022, arXiv:2205.05638, section 3.3) rescales three activations of every block by learned vectors:

    attention   softmax(Q (l_k ⊙ K)ᵀ / √d_head) (l_v ⊙ V)       CausalSelfAttention.forward
    MLP         W_2 (l_ff ⊙ γ(W_1 x + b_1)) + b_2                MLP.forward

The vectors are a value that this file only reads: GPT.ia3 is None (the plain base) or an ia3.IA3.

The rest is GPT-2 exactly (Radford et al. 2019), with nanoGPT's names: learned positions, LayerNorm before each
sublayer, GELU in its tanh form, and one matrix for the embedding and the head.
"""

import math
import os
import zipfile
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F


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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # W_q, W_k, W_v, stacked
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, l_k=None, l_v=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 × (B, T, C)
        # (IA)³: queries stay as they are. The product is taken in the wider dtype and rounded once to the activation's.
        if l_k is not None:
            k = (l_k * k).to(k.dtype)  # l_k ⊙ K
        if l_v is not None:
            v = (l_v * v).to(v.dtype)  # l_v ⊙ V
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))  # 3 × (B, n_head, T, d_head)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
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

    def forward(self, x, l_k=None, l_v=None, l_ff=None):
        x = x + self.attn(self.ln_1(x), l_k, l_v)
        x = x + self.mlp(self.ln_2(x), l_ff)
        return x


class GPT(nn.Module):
    """A GPT-2. `ia3` holds the vectors of a task, or None; assigning it switches the task, assigning None undoes it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(config.vocab_size)  # as data/ calls it
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
        # GPT-2's start: N(0, 0.02); what writes into the residual stream is smaller, for its 2·n_layer additions
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, tasks=None):
        """Predict the next token at every position.

        idx (B, T) long, T ≤ block_size; targets (B, T) long, -1 where no loss is wanted; tasks (B,) long, the task
        of each row when self.ia3 is stacked (ia3.stack). Returns logits (B, T, vocab_size) and the mean
        cross-entropy in nats a target token, or None without targets. Raises ValueError for a sequence too long, or
        tasks that do not fit the vectors.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size {self.config.block_size}")
        if tasks is not None and tasks.shape != (B,):
            raise ValueError(f"tasks must hold one id a row, shape ({B},), not {tuple(tasks.shape)}")
        if self.ia3 is not None:
            rows = self.ia3.rows(tasks)  # n_layer × (l_k, l_v, l_ff)
        elif tasks is None:
            rows = [(None, None, None)] * self.config.n_layer
        else:
            raise ValueError("tasks were given, but the model has no vectors")
        pos = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))  # (B, T, C)
        for block, (l_k, l_v, l_ff) in zip(self.transformer.h, rows, strict=True):
            x = block(x, l_k, l_v, l_ff)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 has steps of 1/64 in a loss of 2
        return logits, F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, tasks=None, generator=None):
        """Continue idx (B, T) long by max_new_tokens, each drawn from the last block_size tokens' prediction.

        temperature 0 takes the likeliest token; top_k draws among the k likeliest only.
        Returns (B, T + max_new_tokens).
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :], tasks=tasks)
            logits = logits[:, -1].float()  # (B, vocab_size)
            if top_k is not None:
                top = torch.topk(logits, min(top_k, logits.size(-1)))  # k of them, also where some are equal
                logits = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def save(self, path):
        """Write nanoGPT's checkpoint, the vectors left out: under a temporary name, then renamed into place."""
        model = {name: t for name, t in self.state_dict().items() if not name.startswith("ia3.")}
        with open(f"{path}.tmp", "wb") as f:
            torch.save({"model": model, "model_args": asdict(self.config), "tokenizer": self.tokenizer}, f)
        os.replace(f"{path}.tmp", path)

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Read a checkpoint file of ours or nanoGPT's; else what convert.read takes: 'gpt2', a Hugging Face folder.

        Returns a GPT in float32, on the CPU, in eval mode. Raises OSError where there is no such file and ValueError
        where it holds no such model.
        """
        is_torch = os.path.isfile(name_or_path) and not str(name_or_path).endswith(".safetensors")
        checkpoint = load_file(name_or_path, mmap=True) if is_torch else None
        if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
            import convert  # here, since convert imports us

            return convert.read(name_or_path, checkpoint)
        try:
            config = GPTConfig(**checkpoint["model_args"])
            weights = {
                name.removeprefix("_orig_mod."): t  # torch.compile's prefix
                for name, t in checkpoint["model"].items()
                if not name.endswith(".attn.bias")  # the causal mask, which nanoGPT keeps without flash attention
            }
            model = cls(config)
            model.load_state_dict(weights)
            tied = torch.equal(weights["transformer.wte.weight"], weights["lm_head.weight"])
        except (TypeError, AttributeError, RuntimeError) as e:
            raise ValueError(f"{name_or_path} is not a GPT checkpoint: {str(e).splitlines()[-1].strip()}") from None
        for name, t in weights.items():
            if not t.isfinite().all():
                raise ValueError(f"{name_or_path}: {name} holds NaN or infinity")
        if not tied:
            raise ValueError(f"{name_or_path}: the head is not the embedding, and here they are one matrix")
        model.tokenizer = checkpoint.get("tokenizer", model.tokenizer)
        return model.eval()


def load_file(path, mmap=False):
    """torch.load onto the CPU, running no code of the file's. Raises ValueError for a damaged file or one with code.

    mmap: leave the tensors on disk until they are used, in the zip format that PyTorch has written since 1.6.
    """
    with open(path, "rb") as f:
        try:
            mmap = mmap and zipfile.is_zipfile(path)
            return torch.load(path if mmap else f, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as e:  # a damaged file makes torch raise nearly anything
            raise ValueError(f"{path} is truncated, carries code, or is no PyTorch file ({type(e).__name__})") from None


def pick_device(name="auto", dtype="auto"):
    """Return the torch.device and the name of the dtype that 'auto' stands for. Raises ValueError for one not here.

    A device is cpu, cuda, cuda:1, mps; auto is cuda or cpu, and bfloat16 on a GPU that has it, else float32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's: a GPU a process
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {name!r} is not here: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # torchrun's processes meet on their own
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return device, ("bfloat16" if bfloat16 else "float32") if dtype == "auto" else dtype
