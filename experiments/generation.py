"""How fast text is written, beside transformers with its cache, and beside what memory allows.

    python -m experiments.generation --out experiments/results/generation     # minutes, on a quiet machine
    python -m experiments.generation --dtype bfloat16 --out experiments/results/generation-bfloat16
    python -m experiments.generation --quick                                  # a small shape, to try it

32 tokens are read and 256 written, greedily, by random weights in the shapes of GPT-2 124M and of SmolLM2-135M, or in
bfloat16 of the latter alone, which was published in it: one row at a time and eight. Ours run with weights as they are
loaded and, as sample.py has them on a CPU in float32, with weights stored column by column. Contestants take turns; a
ratio is taken round by round. To write a token every weight is read once, however few rows there are. So the floor is
the bytes of the weights (an embedding that is only looked up left out) over the memory's bandwidth, measured by summing
a tensor of 1 GiB before each shape; the fastest counts, since whatever else runs can only slow it. Needs requirements-
dev.txt.
"""

import argparse
import copy
import datetime
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common
from experiments import clocks, lab, peers
from ia3 import attach
from merge import merge
from model import GPTConfig
from sample import generate, store_by_columns

SHAPES = {
    "GPT-2 124M": peers.SHAPES["124M"](1024),
    "SmolLM2-135M": peers.SHAPES["SmolLM2"](8192),
    "small": GPTConfig(block_size=1024, vocab_size=257, n_layer=4, n_head=4, n_embd=128),
}
READ, WRITTEN = 32, 256
THEIRS, OURS, MERGED = "transformers", "nanoIA3, with vectors", "nanoIA3, merged"
BY_COLUMNS = ", by columns"  # OURS and MERGED after sample.store_by_columns
CONTESTANTS = {THEIRS, OURS, OURS + BY_COLUMNS, MERGED, MERGED + BY_COLUMNS}


@dataclass
class Row:
    """A line of results.csv: a contestant, and what it shares with the others of its shape."""

    shape: str
    rows: int
    contestant: str
    seconds: float
    over_theirs: float  # the median of the time over transformers', with quartiles
    over_theirs_low: float
    over_theirs_high: float
    tokens_per_second: float
    weight_bytes: int
    bytes_per_second: float  # of this machine's memory
    rounds: int
    hardware: str
    torch: str
    transformers: str
    date: str


def weight_bytes(model):
    """Bytes of the weights that are read for every token: all but GPT-2's positions, which are only looked up."""
    return sum(p.nbytes for name, p in model.named_parameters() if name != "transformer.wpe.weight")


def bandwidth():
    """Bytes a second at which this machine reads memory: the median of sums over a tensor of 1 GiB."""
    big = torch.ones(2**28)
    big.sum()
    return big.nbytes / statistics.median(clocks.seconds(big.sum, big.device) for _ in range(7))


@torch.no_grad()
def measure(shape, n_rows, dtype, about):
    """Return the Rows of a shape. about: a Row's last fields, a dict from bytes_per_second on."""
    config = SHAPES[shape]
    model = peers.our_model(config).to(dtype).eval()
    for l in attach(model).parameters():
        torch.nn.init.normal_(l, mean=1.0, std=0.3)
    merged = merge(model)
    theirs = peers.their_model(config).to(dtype).eval()
    idx = torch.randint(0, config.vocab_size, (n_rows, READ), generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN}
    write = partial(
        theirs.generate, idx, attention_mask=torch.ones_like(idx), do_sample=False, pad_token_id=0, **length
    )
    contestants = {THEIRS: write}
    for name, plain in ((OURS, model), (MERGED, merged)):
        contestants[name] = partial(generate, plain, idx, WRITTEN, temperature=0)
        stored = copy.deepcopy(plain)
        store_by_columns(stored)
        contestants[name + BY_COLUMNS] = partial(generate, stored, idx, WRITTEN, temperature=0)
    times = clocks.interleave(contestants, about["rounds"], idx.device, warmup=1)
    found = []
    for name, took in times.items():
        seconds = statistics.median(took)
        row = Row(
            shape,
            n_rows,
            name,
            seconds,
            **clocks.ratio("over_theirs", took, times[THEIRS]),
            tokens_per_second=n_rows * WRITTEN / seconds,
            weight_bytes=weight_bytes(merged),
            **about,
        )
        found.append(row)
    return found


def read_rows(folder):
    return lab.read_rows(folder / "results.csv", Row)


def tables(folder):
    """Return Markdown, made of results.csv in folder alone."""
    rows = read_rows(folder)
    dtype = lab.read_about(folder)["dtype"]
    first = rows[0]
    fastest = max(row.bytes_per_second for row in rows)
    about = (
        f"{first.hardware}, {dtype}, torch {first.torch}, transformers {first.transformers}, {first.date}; "
        f"{READ} tokens read, {WRITTEN} written; medians (quartiles) of {first.rounds} rounds. "
        f"Memory is read at {fastest / 1e9:.1f} GB a second."
    )
    head = ["shape", "rows", "contestant", "tokens a second", "time over transformers'", "time over the floor"]
    lines = []
    for row in rows:
        over = lab.spread(row.over_theirs, row.over_theirs_low, row.over_theirs_high)
        floor = f"{row.seconds * fastest / (WRITTEN * row.weight_bytes):.2f}"
        lines.append([row.shape, str(row.rows), row.contestant, f"{row.tokens_per_second:.1f}", over, floor])
    return f"{about}\n\n{lab.markdown(head, lines)}"


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant, 2 or more (default: 7)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/generation"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small shape and two rounds, into OUT/quick")
    args = parser.parse_args(argv)
    if args.quick:
        shapes = ["small"]
    elif args.dtype == "bfloat16":
        shapes = ["SmolLM2-135M"]
    else:
        shapes = ["GPT-2 124M", "SmolLM2-135M"]
    rounds = 2 if args.quick else args.rounds
    out = args.out / "quick" if args.quick else args.out
    if not 2 <= rounds <= 1000:
        raise ValueError(f"rounds must be from 2 to 1000, not {rounds}")
    _, transformers = peers.their_packages()
    shared = {"rounds": rounds, "hardware": clocks.device_name(torch.device("cpu")), "torch": torch.__version__}
    shared |= {"transformers": transformers.__version__}
    lab.open_folder(out, shared | {"dtype": args.dtype})
    shared["date"] = datetime.date.today().isoformat()
    rows = read_rows(out)
    for shape in shapes:
        for n_rows in (1, 8):
            there = [row for row in rows if (row.shape, row.rows) == (shape, n_rows)]
            if {row.contestant for row in there} == CONTESTANTS:
                continue
            print(f"{shape}, rows: {n_rows}", flush=True)
            rows = [row for row in rows if row not in there]
            rows += measure(shape, n_rows, getattr(torch, args.dtype), {"bytes_per_second": bandwidth()} | shared)
            lab.write_csv(out / "results.csv", [vars(row) for row in rows])
    text = tables(out)
    lab.save_text(text, out / "table.md")
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("generation.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
