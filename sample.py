"""Text from a base, from a base with vectors, from a merged model, and from several tasks in one batch.

python sample.py --prompt "To be"                                  # the base
python sample.py --ia3 out/folio/ia3.npz --prompt "To be"          # with vectors
python sample.py --base out/folio/merged.pt --prompt "To be"       # merged
python sample.py --ia3 a.npz b.npz c.npz --prompt "To be"          # three tasks, one batch, side by side
"""

import argparse
import math
import sys
import textwrap
from itertools import takewhile, zip_longest
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common
from ia3 import IA3, stack, unwrap


class Cache:
    """The keys and values of all tokens read so far, so that only new tokens are read. Allocated once.

    Keys and values are cached after they are scaled (and in a Llama rotated). So a cache belongs to one model, one IA3
    and one task_ids, the very objects that it was made for. It is written in place, so use it under torch.no_grad.
    """

    def __init__(self, model, batch_size, max_tokens, task_ids=None):
        config = model.config
        weight = model.lm_head.weight
        d_head = config.n_embd // config.n_head
        n_kv_head = config.widths[0] // d_head  # heads of keys and values: in GPT-2 as many as of queries
        shape = (batch_size, n_kv_head, max_tokens, d_head)
        self.made_for = (model, model.ia3, task_ids)
        self.layers = [LayerCache(shape, weight.device, weight.dtype) for _ in range(config.n_layer)]

    def n_read(self, model, task_ids):
        """The number of tokens read so far. Raises ValueError for another model, other vectors or other task_ids."""
        given = (model, model.ia3, task_ids)
        if any(a is not b for a, b in zip(self.made_for, given, strict=True)):
            raise ValueError("this cache was made for another model, other vectors or other task_ids")
        return self.layers[0].length


class LayerCache:
    """One layer's part of a Cache, k and v (B, n_kv_head, max_tokens, d_head), of which length tokens are filled."""

    def __init__(self, shape, device, dtype):
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k, v):
        """Add T tokens' k and v, (B, n_kv_head, T, d_head).

        Returns k and v of all tokens so far, and which of them each new token sees: (T, length) bool, None for all.
        Raises ValueError for another number of rows, or more tokens, than the cache was made for.
        """
        T = k.size(2)
        end = self.length + T
        if k.size(0) != self.k.size(0):
            raise ValueError(f"this cache was made for {self.k.size(0)} rows, not for {k.size(0)}")
        if end > self.k.size(2):
            raise ValueError(f"this cache was made for {self.k.size(2)} tokens, not for {end}")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        seen = None
        if T > 1:  # row i, one of the last T tokens, sees columns 0 to end - T + i
            seen = torch.ones(T, end, dtype=torch.bool, device=k.device).tril(end - T)
        return self.k[:, :, :end], self.v[:, :, :end], seen


@torch.no_grad()
def store_by_columns(model):
    """Lay the weights of all linear maps out in memory column by column: the same values, shapes and names.

    On a CPU in float32 this writes a single text faster. Eight at once took longer on SmolLM2
    (experiments/results/generation), and in bfloat16 nothing is gained (generation-bfloat16).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, task_ids=None, generator=None, end=()):
    """Continue idx (B, T) long by max_new_tokens, each drawn from the prediction of the last block_size tokens.

    temperature 0 takes the likeliest token; top_k draws among the k likeliest only. task_ids (B,) long: the task of
    each row if the vectors are stacked. end: ids that end a text; generating stops once every row has written one. A
    row's tokens after its first end id are not part of its text.

    Returns (B, T + max_new_tokens) or fewer columns. Raises ValueError for an empty idx and for numbers that make no
    sense, and, on a CPU, FloatingPointError for logits that are not finite.
    """
    if idx.numel() == 0:
        raise ValueError("idx is empty: there is nothing to continue")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if temperature != 0 and not 1e-4 <= temperature <= 1e4:
        raise ValueError(f"temperature must be 0 or from 1e-4 to 1e4, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if task_ids is not None and model.ia3 is not None and model.ia3.is_stacked():
        model.ia3.check_task_ids(task_ids)  # once, also on a GPU
    model = unwrap(model)
    block_size = model.config.block_size
    cache = Cache(model, idx.size(0), min(idx.size(1) + max_new_tokens, block_size), task_ids)
    ended = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)  # rows that hold one of end
    for _ in range(max_new_tokens):
        if idx.size(1) <= block_size:
            n_read = cache.n_read(model, task_ids)
            hidden = model.hidden(idx[:, n_read:], task_ids, cache)  # (B, new tokens, n_embd)
        else:  # every step moves the window, so all positions change and all of it is read again
            hidden = model.hidden(idx[:, -block_size:], task_ids)  # (B, block_size, n_embd)
        logits = model.lm_head(hidden[:, -1]).float()  # (B, vocab_size), of the last position only
        if logits.device.type == "cpu" and not logits.isfinite().all():  # on a GPU this check would stall every token
            raise FloatingPointError("the logits are not finite: weights or vectors are far too large")
        if top_k is not None:
            kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]  # (B, 1)
            logits[logits < kth] = -math.inf
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            new = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        idx = torch.cat((idx, new), dim=1)
        if end:
            ended |= torch.isin(new.squeeze(1), torch.tensor(end, device=idx.device))
            if ended.all():
                break
    return idx


def complete(model, prompt, n_tokens=200, temperature=0.8, top_k=50, seed=0, task_ids=None):
    """Continue prompt, (B, T) long. Returns B strings, each the prompt and what follows; ids if there is no tokenizer.

    A text stops before the token that ends it.
    """
    device = model.lm_head.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    if task_ids is not None:
        task_ids = task_ids.to(device)
    end = [] if model.tokenizer is None else model.tokenizer.eos
    rows = generate(model, prompt.to(device), n_tokens, temperature, top_k, task_ids, rng, end).tolist()
    if model.tokenizer is None:
        return [str(row) for row in rows]
    n_prompt = prompt.size(1)
    texts = []
    for row in rows:
        written = takewhile(lambda i: i not in end, row[n_prompt:])
        texts.append(model.tokenizer.decode([*row[:n_prompt], *written]))
    return texts


def chat_turn(tokenizer, text):
    """Return the ids of text as a user's turn in ChatML, up to where the answer begins. No system message is added.

    Only the two markers are control tokens: what looks like one in text stays text. Raises ValueError for a base whose
    chat template is not ChatML.
    """
    template = tokenizer.chat_template or ""
    encoding = tokenizer.encoding
    if "<|im_start|>" not in template or not {"<|im_start|>", "<|im_end|>"} <= encoding.special_tokens_set:
        raise ValueError(f"--chat writes ChatML, but this base's chat template is {template[:60]!r}")
    start = encoding.encode_single_token("<|im_start|>")
    end = encoding.encode_single_token("<|im_end|>")
    encode = tokenizer.encode_ordinary
    return [start, *encode(f"user\n{text}"), end, *encode("\n"), start, *encode("assistant\n")]


def task_name(path):
    """What a file of vectors is called beside others: data/kjv.npz and out/kjv/ia3.npz are both kjv."""
    path = Path(path)
    if path.stem == "ia3" and path.parent.name:
        return path.parent.name
    return path.stem


def side_by_side(names, texts, width=38):
    """Return the texts as columns under their names, each line folded to width."""
    columns = []
    for name, text in zip(names, texts, strict=True):
        column = [name[:width], "-" * len(name[:width])]
        for line in text.splitlines():
            column += textwrap.wrap(line, width) or [""]
        columns.append(column)
    lines = []
    for row in zip_longest(*columns, fillvalue=""):
        lines.append("  ".join(cell.ljust(width) for cell in row).rstrip())
    return "\n".join(lines)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/base.pt", help="a checkpoint, merged or not (default: %(default)s)")
    parser.add_argument("--ia3", nargs="+", default=[], metavar="NPZ", help="vectors; several are sampled side by side")
    parser.add_argument("--prompt", default="\n", help="the text to continue (default: an empty line)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model (SmolLM2)")
    parser.add_argument("--tokens", type=int, default=300, help="how many to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    args = parser.parse_args(argv)
    if not 0 <= args.tokens <= 10**6:
        raise ValueError(f"--tokens must be from 0 to a million, not {args.tokens}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, not {args.seed}")
    model = common.load(args.base, dtype=None)
    if model.tokenizer is None:
        vocab_size = model.config.vocab_size
        raise ValueError(f"{args.base} names no tokenizer, and none is known for its vocabulary of {vocab_size}")
    device = common.pick_device(args.device)
    model.to(device, getattr(torch, common.pick_dtype(device, model)))
    if device.type == "cpu" and model.lm_head.weight.dtype == torch.float32:
        store_by_columns(model)
    if args.chat:
        prompt = chat_turn(model.tokenizer, args.prompt)
    else:
        prompt = model.tokenizer.encode_ordinary(args.prompt)
        control = model.tokenizer.encoding.special_tokens_set - model.tokenizer.plain
        spelled = [token for token in sorted(control) if token in args.prompt]
        if spelled:
            print(f"sample.py: {', '.join(spelled)} in the prompt is text, not a control token", file=sys.stderr)
    if not prompt:
        raise ValueError("the prompt is empty")

    tasks = [IA3.load(path, model) for path in args.ia3]
    prompts = torch.tensor([prompt] * max(len(tasks), 1))
    task_ids = None
    if len(tasks) == 1:
        model.ia3 = tasks[0]
    elif tasks:
        model.ia3 = stack(tasks)
        task_ids = torch.arange(len(tasks))  # one row per task
    texts = complete(model, prompts, args.tokens, args.temperature, args.top_k, args.seed, task_ids)
    if len(texts) == 1:
        print(texts[0])
    else:
        print(side_by_side([task_name(path) for path in args.ia3], texts))
    return 0


def main(argv=None):
    return common.exit_status("sample.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
