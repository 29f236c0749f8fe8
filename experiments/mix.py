"""What a batch of mixed tasks costs: one forward pass with gathered rows, beside the ways to do without it.

    python experiments/mix.py                       # data/base.pt on whatever is here
    python experiments/mix.py --tokens 8            # short rows
    python experiments/mix.py --device cuda --repeats 50

Prints a Markdown table. Every figure is a median over repeats in which all contestants take turns, so that whatever
else the machine does falls on all of them alike.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.clock import device_name, interleave
from ia3 import IA3, attach, stack
from model import GPT, pick_device

ROOT = Path(__file__).parent.parent
BATCH_SIZE = 16
N_TASKS = (1, 4, 16)


def make_tasks(model, n):
    """n tasks' vectors around 1, attached to model's base: their values do not matter for time."""
    tasks = []
    for seed in range(n):
        vectors = attach(model, IA3(model.config))
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in vectors.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=dice).to(p.device))
        tasks.append(vectors)
    return tasks


@torch.no_grad()
def measure(model, path, n_tokens, repeats):
    """Return {contestant: median seconds} for forward passes of BATCH_SIZE rows of n_tokens.

    path: where a task's file is written, whose size tells the bytes of a task.
    """
    device = model.lm_head.weight.device
    idx = torch.randint(0, model.config.vocab_size, (BATCH_SIZE, n_tokens), device=device)
    tasks = make_tasks(model, max(N_TASKS))
    tasks[0].save(path)
    stacks = {n: stack(tasks[:n]) for n in N_TASKS}
    ids = {n: (torch.arange(BATCH_SIZE) % n).to(device) for n in N_TASKS}

    def forward(vectors, idx, tasks=None):
        model.ia3 = vectors
        return model(idx, tasks=tasks)[0]

    def one_after_another(n):
        return [forward(tasks[i], idx[ids[n] == i]) for i in range(n)]

    def swap():
        model.ia3 = tasks[1]

    def load():
        model.ia3 = IA3.load(path, model)

    contestants = {"base": lambda: forward(None, idx), "single": lambda: forward(tasks[0], idx)}
    contestants |= {("mixed", n): lambda n=n: forward(stacks[n], idx, ids[n]) for n in N_TASKS}
    contestants |= {("in turn", n): lambda n=n: one_after_another(n) for n in N_TASKS}
    contestants |= {"swap": swap, "load": load, "stack": lambda: stack(tasks)}
    times = interleave(contestants, repeats, device)
    return {name: statistics.median(found) for name, found in times.items()}


def table(times, n_tokens, bytes_of_a_task, bytes_of_base):
    """The README's table, in Markdown."""
    tokens = f"{BATCH_SIZE} × {n_tokens} tokens"
    lines = [
        f"| forward pass, {tokens} | " + " | ".join(f"{n} tasks" for n in N_TASKS).replace("1 tasks", "1 task") + " |"
    ]
    lines.append("| --- |" + " --- |" * len(N_TASKS))
    mixed = [times["mixed", n] for n in N_TASKS]
    rows = {
        "mixed batch, ms": [f"{1000 * t:.2f}" for t in mixed],
        "over the same batch under one task": [f"{t / times['single']:.3f}" for t in mixed],
        "over the base without vectors": [f"{t / times['base']:.3f}" for t in mixed],
        "over each task's rows one after another": [f"{times['mixed', n] / times['in turn', n]:.3f}" for n in N_TASKS],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += [
        "",
        f"Swapping the task: {1e6 * times['swap']:.0f} µs by assignment, {1e3 * times['load']:.1f} ms from its file,"
        f" fingerprint of the base checked. Stacking {max(N_TASKS)} tasks: {1e3 * times['stack']:.1f} ms.",
        f"A task: {bytes_of_a_task:,} bytes on disk. The base: {bytes_of_base:,}.",
    ]
    return "\n".join(lines)


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--base", default=str(ROOT / "data/base.pt"), help="a checkpoint (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="length of a row (default: the model's block_size)")
    parser.add_argument("--repeats", type=int, default=21, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {args.repeats}")
    device, dtype = pick_device(args.device)
    model = GPT.from_pretrained(args.base).to(device, getattr(torch, dtype))
    n_tokens = model.config.block_size if args.tokens is None else args.tokens
    if not 1 <= n_tokens <= model.config.block_size:
        raise ValueError(f"tokens must be from 1 to the model's {model.config.block_size}, not {n_tokens}")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/task.npz"
        times = measure(model, path, n_tokens, args.repeats)
        size = os.path.getsize(path)
    print(f"{device_name(device)}, {dtype}, torch {torch.__version__}; medians of {args.repeats}\n")
    print(table(times, n_tokens, size, os.path.getsize(args.base)))
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"mix.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
