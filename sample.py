"""Text from a base, from a base with vectors, from a merged model, and from several tasks in one batch.

python sample.py --prompt "To be"                                      # the base
python sample.py --ia3 out/folio/ia3.npz --prompt "To be"              # with vectors
python sample.py --base out/folio/merged.pt --prompt "To be"           # merged
python sample.py --ia3 a.npz b.npz c.npz --prompt "To be"              # three tasks, one batch, side by side
"""

import argparse
import sys
import textwrap
from pathlib import Path

import torch

import data as datasets
from ia3 import IA3, attach, stack
from model import GPT, pick_device


def complete(model, prompt, n_tokens=200, temperature=0.8, top_k=50, seed=0, tasks=None):
    """Return prompt (B, T) long and what model writes after it, as B strings; token ids where it has no tokenizer."""
    device = model.lm_head.weight.device
    dice = torch.Generator(device).manual_seed(seed)
    tasks = None if tasks is None else tasks.to(device)
    rows = model.generate(prompt.to(device), n_tokens, temperature, top_k, tasks, dice).tolist()
    if model.tokenizer is None:
        return [str(row) for row in rows]
    tokenizer = datasets.get_tokenizer(model.tokenizer)
    return [tokenizer.decode([t for t in row if t < tokenizer.n_vocab]) for row in rows]  # 50304 is padded gpt2


def short_names(paths):
    """What tells the paths apart: without .npz, and without the folders and the file name that all of them share."""
    names = [Path(path).with_suffix("").parts for path in paths]
    for end, rest in ((0, slice(1, None)), (-1, slice(-1))):
        while all(len(name) > 1 for name in names) and len({name[end] for name in names}) == 1:
            names = [name[rest] for name in names]
    return ["/".join(name) for name in names]


def side_by_side(names, texts, width=38):
    """Return the texts as columns under their names, each line folded to width."""
    columns = []
    for name, text in zip(names, texts, strict=True):
        lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, width) or [""]]
        columns.append([name[:width], "-" * len(name[:width]), *lines])
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in zip(*padded, strict=True))


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--base", default="data/base.pt", help="a checkpoint, merged or not (default: %(default)s)")
    parser.add_argument("--ia3", nargs="+", default=[], metavar="NPZ", help="vectors; several are sampled side by side")
    parser.add_argument("--prompt", default="\n", help="the text to go on from (default: an empty line)")
    parser.add_argument("--tokens", type=int, default=300, help="how many to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    args = parser.parse_args(argv)
    if args.tokens < 0 or args.top_k < 1 or args.seed < 0:
        raise ValueError("tokens and seed must be at least 0 and top_k at least 1")
    if args.temperature != 0 and not 1e-4 <= args.temperature <= 1e4:
        raise ValueError(f"temperature must be 0 or from 1e-4 to 1e4, not {args.temperature}")
    device, dtype = pick_device(args.device)
    model = GPT.from_pretrained(args.base)
    if model.tokenizer is None:
        raise ValueError(
            f"{args.base} names no tokenizer, and its vocabulary of {model.config.vocab_size} tells of none"
        )
    prompt = datasets.get_tokenizer(model.tokenizer).encode_ordinary(args.prompt)
    if not prompt:
        raise ValueError("the prompt is empty")
    model.to(device, getattr(torch, dtype))
    tasks = [IA3.load(path, model) for path in args.ia3]
    if len(tasks) == 1:
        model.ia3 = tasks[0]
    elif tasks:
        attach(model, stack(tasks))
    ids = torch.tensor([prompt] * max(len(tasks), 1))
    which = torch.arange(len(tasks)) if len(tasks) > 1 else None
    texts = complete(model, ids, args.tokens, args.temperature, args.top_k, args.seed, which)
    print(texts[0] if len(texts) == 1 else side_by_side(short_names(args.ia3), texts))
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
