"""How fast and how heavy (IA)³ is beside full fine-tuning and PEFT: a training step, a forward pass, a mixed batch.

    python -m experiments.bench                         # four shapes on a CPU, all six on a GPU; into out/bench
    python -m experiments.bench --shape base --repeats 9
    python -m experiments.bench --quick                 # three rounds of the smallest shape, to see that it works

A shape has up to four contests. In each the contestants take turns, and every round gives two ratios of times: the
contestant's over the first one's; and ours over the contestant's, which is below 1 where ours is faster. Tables have
medians and quartiles.

**training**: a step is forward, backward, AdamW. The first is full fine-tuning; then (IA)³ here; PEFT's (IA)³ around
our model, which isolates the method; PEFT's (IA)³ and LoRA (r 4, on c_attn) around transformers' GPT-2, once with its
default GELU (gelu_new, written out in elementary operations) and once with the fused one, ours (gelu_pytorch_tanh).
transformers runs without dropout, without a key-value cache and with PyTorch's fused attention, as this GPT does.
SmolLM2's shape is a Llama's: there PEFT's stand around transformers' Llama, LoRA on q_proj and v_proj.

**completions** (a Llama's shape, on a CPU): a step with targets at the end of each row only: 8 rows of 56 tokens with 4
targets each, as batches of data/sentiment/products/completions have on average. Ours applies the head to the positions
with targets only; it is raced against the same with the head applied everywhere, the first, and against PEFT's around
transformers' Llama, whose head is everywhere, too. Peak memory is that of a process of its own which does two such
steps: Python, the libraries and the weights are counted.

**inference**: a forward pass of the base, the first; of the base with vectors, which is ours; and of the merged model.

**mixed**: a forward pass of 16 short rows of 8 tokens: under one task, the first; of several tasks at once (ia3.stack);
and each task's rows by themselves, one after another.

**How they run.** A CPU computes in float32, a GPU in bfloat16: there frozen bases are stored in it, and full
fine-tuning has float32 weights and autocast. In training and inference our own contestants, full fine-tuning among
them, run eagerly and compiled.

**Floor.** The FLOPs of linear maps and of attention over those of full fine-tuning (torch's counter: an elementwise
operation counts nothing, attention counts the whole square that causality halves). "Time ÷ all FLOPs" is the median
ratio of times over that of all FLOPs: at 1.00 time would go with FLOPs alone. Compiled ones are counted as they were
written.

**Saved for backward**: every storage that autograd keeps in a forward pass, weights left out, in float32 numbers of a
token and layer over n_embd. Nothing is subtracted: what embedding, head and loss keep is spread over the layers. On a
GPU full fine-tuning keeps autocast's bfloat16 copies of its weights, too, and they count.

**Files** in --out: results.csv, one row per contestant, and table.md, made of it. A contest that is already there is
not run again.
"""

import argparse
import datetime
import gc
import itertools
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import common
from experiments import clocks, lab, peers
from experiments.edge_contestant import peak_of_process
from ia3 import IA3, attach, stack
from merge import merge
from model import GPTConfig
from train import TrainConfig, autocast


class Work(NamedTuple):
    rows: int
    tokens: int
    rounds: int


WORK = {  # by device and shape
    "cpu": {
        "base": Work(16, 128, 25),
        "6x384": Work(8, 256, 13),
        "124M": Work(2, 256, 15),
        "SmolLM2": Work(2, 256, 15),
    },
    "cuda": {
        "base": Work(16, 128, 51),
        "6x384": Work(8, 256, 51),
        "124M": Work(8, 1024, 31),
        "SmolLM2": Work(8, 1024, 31),
        "350M": Work(8, 1024, 21),
        "1.5B": Work(4, 1024, 11),
    },
}
BASE, UNMERGED, MERGED = "base", "base with vectors", "merged"
INFERENCE = (BASE, UNMERGED, MERGED)
ONE_TASK = "one task"
CONTESTS = ("training", "completions", "inference", "mixed")
COMPLETION_ROWS = 8
COMPLETION_TOKENS = 56
COMPLETION_TARGETS = 4  # in each row
MIXED_ROWS = 16
MIXED_TOKENS = 8


@dataclass
class Row:
    """A line of results.csv: a contestant. None: not counted, or no GPU."""

    shape: str
    what: str  # of CONTESTS
    contestant: str
    values: int | None  # trained
    linear_flops: int | None  # a token
    attention_flops: int | None
    saved_bytes: int | None
    peak_bytes: int | None
    over_plain: float  # the median of the time over the first contestant's, with quartiles
    over_plain_low: float
    over_plain_high: float
    ours_over: float  # of ours over this one's time
    ours_over_low: float
    ours_over_high: float
    seconds: float
    tokens_per_second: float
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int
    tokens: int
    repeats: int
    hardware: str
    dtype: str
    torch: str
    transformers: str
    peft: str
    date: str

    def flops(self):
        return self.linear_flops + self.attention_flops


# --- the contestants ---


class Contestant(NamedTuple):
    call: Callable  # what is timed
    counts: dict  # a Row's fields from values to peak_bytes


def make_batch(config, rows, device):
    """Random tokens and their targets, 2 × (rows, block_size)."""
    rng = torch.Generator().manual_seed(0)
    idx = torch.randint(0, config.vocab_size, (rows, config.block_size + 1), generator=rng).to(device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def make_completions(config, rows, device):
    """make_batch's for peers.COMPLETIONS: the last COMPLETION_TARGETS positions of each row have targets, others -1."""
    x, y = make_batch(config, rows, device)
    y[:, :-COMPLETION_TARGETS] = -1
    return x, y


def variants(name, model, compiled):
    """Return {name: model}, and beside it the same model compiled, where that is wanted."""
    found = {name: model}
    if compiled:
        found[f"{name}, compiled"] = torch.compile(model)
    return found


def trainer(name, config, batch, dtype, compiled):
    """Return {name: Contestant} of a training step: peers.build's, if it is ours also compiled."""
    device = batch[0].device
    before = clocks.allocated(device)
    model, loss_fn = peers.build(name, config, device, dtype)
    settings = TrainConfig(lr=1e-5, dtype=str(dtype).removeprefix("torch."))
    counts = clocks.count_step(model, batch, loss_fn, settings)
    model_bytes = clocks.allocated(device) - before
    found = {}
    for variant, called in variants(name, model, compiled and name in (peers.FULL, peers.OURS)).items():
        without_model = clocks.allocated(device) - model_bytes  # such as AdamW's averages of the variant before
        step = clocks.training_step(called, batch, loss_fn, settings)
        step()  # compiles; makes AdamW's averages
        own = dict(counts)
        if called is not model:  # compiled, it may keep something else
            with autocast(called, settings):
                own["saved_bytes"] = clocks.count_saved(partial(loss_fn, called, *batch), called)
        own["peak_bytes"] = clocks.peak_bytes(step, device, without_model)
        found[variant] = Contestant(step, own)
    return found


def peak_of_steps(name, config):
    """The peak of this process's memory, in bytes, after two steps of one of peers.COMPLETIONS on a CPU, or None."""
    batch = make_completions(config, COMPLETION_ROWS, torch.device("cpu"))
    model, loss_fn = peers.build(name, config, "cpu", torch.float32)
    step = clocks.training_step(model, batch, loss_fn, TrainConfig(lr=1e-5))
    step()
    step()
    return peak_of_process()


def completers(config, batch, dtype):
    """Return {name: Contestant} of peers.COMPLETIONS. Each one's peak is measured in a process of its own."""
    found = {}
    spawn = multiprocessing.get_context("spawn")
    for name in peers.COMPLETIONS:
        found |= trainer(name, config, batch, dtype, compiled=False)
        with ProcessPoolExecutor(1, spawn) as process:
            found[name].counts["peak_bytes"] = process.submit(peak_of_steps, name, config).result()
    return found


def reader(name, config, batch, dtype, compiled):
    """Return {name: Contestant} of a forward pass without gradients: one of INFERENCE, also compiled."""
    idx = batch[0]
    before = clocks.allocated(idx.device)
    with torch.device(idx.device):
        model = peers.our_model(config).to(dtype).eval()
        if name != BASE:
            for l in attach(model).parameters():
                torch.nn.init.normal_(l, mean=1.0, std=0.3)
        if name == MERGED:
            model = merge(model)
    model.requires_grad_(False)

    def forward(called, idx):
        with torch.no_grad():
            return called(idx)[0]

    linear, attention = clocks.count_flops(lambda: forward(model, idx[:1]))
    counts = {"values": 0, "linear_flops": linear // idx.size(1), "attention_flops": attention // idx.size(1)}
    found = {}
    for variant, called in variants(name, model, compiled).items():
        read = partial(forward, called, idx)
        read()  # compiles
        peak = clocks.peak_bytes(read, idx.device, before)
        found[variant] = Contestant(read, counts | {"saved_bytes": 0, "peak_bytes": peak})
    return found


def mixers(config, batch, dtype):
    """Return {name: Contestant} of forward passes of a batch's MIXED_ROWS rows: one task, several at once or in turn.

    Nothing is counted: the linear maps are the same for all.
    """
    idx = batch[0]
    with torch.device(idx.device):
        model = peers.our_model(config).to(dtype).eval()
    tasks = []
    for _ in range(MIXED_ROWS):
        vectors = attach(model, IA3(config))
        for l in vectors.parameters():
            torch.nn.init.normal_(l, mean=1.0, std=0.1)
        tasks.append(vectors)

    @torch.no_grad()
    def forward(vectors, idx, task_ids=None):
        model.ia3 = vectors
        return model(idx, task_ids=task_ids)[0]

    def in_turn(parts):
        return [forward(tasks[i], part) for i, part in enumerate(parts)]

    calls = {ONE_TASK: partial(forward, tasks[0], idx)}
    for n in (4, MIXED_ROWS):
        task_ids = (torch.arange(MIXED_ROWS) % n).to(idx.device)
        calls[f"{n} tasks, mixed"] = partial(forward, stack(tasks[:n]), idx, task_ids)
        calls[f"{n} tasks, one after another"] = partial(in_turn, [idx[task_ids == i] for i in range(n)])
    counts = dict.fromkeys(("values", "linear_flops", "attention_flops", "saved_bytes", "peak_bytes"))
    return {name: Contestant(call, counts) for name, call in calls.items()}


# --- the contests ---


def contests_of(shape, device):
    """Those of CONTESTS that a shape has on a device: completions only a Llama's, on a CPU."""
    is_llama = not isinstance(peers.SHAPES[shape](8), GPTConfig)
    return [contest for contest in CONTESTS if contest != "completions" or (is_llama and device.type == "cpu")]


def size_of(contest, shape, device):
    """Rows and tokens of one of a shape's CONTESTS."""
    if contest == "completions":
        return COMPLETION_ROWS, COMPLETION_TOKENS
    if contest == "mixed":
        return MIXED_ROWS, MIXED_TOKENS
    work = WORK[device.type][shape]
    return work.rows, work.tokens


def make_contestants(contest, config, batch, dtype, compiled):
    """Return {name: Contestant} of one of CONTESTS, and which name is ours. All are compared with the first."""
    found = {}
    if contest == "training":
        for name in peers.TRAINING if isinstance(config, GPTConfig) else peers.TRAINING_LLAMA:
            found |= trainer(name, config, batch, dtype, compiled)
        return found, peers.OURS
    if contest == "completions":
        return completers(config, batch, dtype), peers.OURS
    if contest == "inference":
        for name in INFERENCE:
            found |= reader(name, config, batch, dtype, compiled)
        return found, UNMERGED
    return mixers(config, batch, dtype), ONE_TASK


def measure(shape, contest, rounds, device, dtype, compiled, about):
    """Return the Rows of one of a shape's CONTESTS. about: a Row's last fields, a dict from hardware on."""
    torch.compiler.reset()  # it gives up on a forward that it has compiled for eight models
    print(f"{shape}, {contest}: {rounds} rounds", flush=True)
    n_rows, tokens = size_of(contest, shape, device)
    config = peers.SHAPES[shape](tokens)
    make = make_completions if contest == "completions" else make_batch
    batch = make(config, n_rows, device)
    contestants, ours = make_contestants(contest, config, batch, dtype, compiled)
    times = clocks.interleave({name: contestant.call for name, contestant in contestants.items()}, rounds, device)
    first = next(iter(contestants))
    found = []
    for name, contestant in contestants.items():
        seconds = statistics.median(times[name])
        row = Row(
            shape,
            contest,
            name,
            **contestant.counts,
            **clocks.ratio("over_plain", times[name], times[first]),
            **clocks.ratio("ours_over", times[ours], times[name]),
            seconds=seconds,
            tokens_per_second=n_rows * tokens / seconds,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            rows=n_rows,
            tokens=tokens,
            repeats=rounds,
            **about,
        )
        found.append(row)
    return found


# --- tables, from results.csv alone ---

FLOORS = ("FLOPs: linear maps", "all FLOPs", "time ÷ all FLOPs")
HEADS = {  # the tables' columns
    "training": ("", "time over full's", *FLOORS, "saved", "ours over it"),
    "completions": ("", "time over the first's", "peak memory, MB", "over the first's", "ours over it, time"),
    "inference": ("", "time over the base's", *FLOORS),
    "mixed": ("", "time over one task's", "milliseconds"),
}


def read_rows(folder):
    return lab.read_rows(folder / "results.csv", Row)


def table(rows):
    """Markdown of one of CONTESTS. rows: its Rows, shape by shape."""
    what = rows[0].what
    head = list(HEADS[what])
    if what in ("training", "inference") and rows[0].peak_bytes is not None:
        head += ["tokens/s", "peak GiB"]
    lines = []
    for shape, group in itertools.groupby(rows, key=lambda row: row.shape):
        group = list(group)
        first = group[0]
        about = f"{first.n_layer} layers × {first.n_embd}, {first.rows} × {first.tokens} tokens"
        lines.append([f"**{shape}**: {about}", *[""] * (len(head) - 1)])
        lines += [cells(row, first) for row in group]
    return lab.markdown(head, lines)


def cells(row, first):
    """A contestant's line of the table. first: the Row that it is compared with."""
    ours_over = lab.spread(row.ours_over, row.ours_over_low, row.ours_over_high)
    line = [row.contestant, lab.spread(row.over_plain, row.over_plain_low, row.over_plain_high)]
    if row.what == "mixed":
        return [*line, f"{1000 * row.seconds:.2f}"]
    if row.what == "completions":
        memory = ["", ""]
        if row.peak_bytes and first.peak_bytes:
            memory = [f"{row.peak_bytes / 1e6:.0f}", f"{row.peak_bytes / first.peak_bytes:.2f}"]
        return [*line, *memory, ours_over]
    linear = row.linear_flops / first.linear_flops
    floor = row.flops() / first.flops()
    line += [f"{linear:.3f}", f"{floor:.3f}", f"{row.over_plain / floor:.2f}"]
    if row.what == "training":
        unit = 4 * row.rows * row.tokens * row.n_layer * row.n_embd  # n_embd float32 numbers a token and layer
        line += [f"{row.saved_bytes / unit:.1f}", ours_over]
    if row.peak_bytes is not None:  # of a GPU's memory
        line += [f"{row.tokens_per_second:,.0f}", f"{row.peak_bytes / 2**30:.2f}"]
    return line


def tables(folder):
    """The tables, in Markdown, from results.csv in folder, a Path, alone."""
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"{folder}/results.csv holds no results yet")
    first = rows[0]
    made = f"{first.hardware}, {first.dtype}, torch {first.torch}, transformers {first.transformers}, peft {first.peft}"
    dates = " and ".join(sorted({row.date for row in rows}))
    rounds = ", ".join(str(n) for n in dict.fromkeys(row.repeats for row in rows))
    pieces = [f"{made}, {dates}; medians (quartiles) of {rounds} rounds' ratios"]
    for contest in CONTESTS:
        group = [row for row in rows if row.what == contest]
        if group:
            pieces.append(table(group))
    return "\n\n".join(pieces)


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=peers.SHAPES, help="default: those for the device")
    parser.add_argument("--repeats", type=int, help="rounds of a shape (default: fewer, the larger it is)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out ours compiled, which needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds of the smallest shape, into OUT/quick")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(device)
    compiled = not args.no_compile
    work = WORK[device.type]
    shapes = args.shape or list(work)
    if args.quick:
        shapes = ["base"]
        args.repeats = 3
        args.out = args.out / "quick"
    for shape in shapes:
        if shape not in work:
            raise ValueError(f"shape {shape} is for a GPU; for a CPU there are {', '.join(work)}")
    if args.repeats is not None and args.repeats < 2:
        raise ValueError(f"repeats must be at least 2, for quartiles, not {args.repeats}")
    if compiled and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile needs a C++ compiler (g++, or CXX): --no-compile leaves it out")
    peft, transformers = peers.their_packages()
    about = {"hardware": clocks.device_name(device), "dtype": dtype, "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "peft": peft.__version__}
    lab.open_folder(args.out, about | {"repeats": args.repeats or "by shape", "compiled": compiled})
    about["date"] = datetime.date.today().isoformat()
    rows = read_rows(args.out)
    contests = [(shape, contest) for shape in shapes for contest in contests_of(shape, device)]
    for shape, contest in contests:
        if any((row.shape, row.what) == (shape, contest) for row in rows):
            continue
        rounds = args.repeats or work[shape].rounds
        rows += measure(shape, contest, rounds, device, getattr(torch, dtype), compiled, about)
        gc.collect()  # its models: PEFT's hold themselves in circles
        rows.sort(key=lambda row: (list(peers.SHAPES).index(row.shape), CONTESTS.index(row.what)))
        lab.write_csv(args.out / "results.csv", [vars(row) for row in rows])
    text = tables(args.out)
    lab.save_text(text, args.out / "table.md")
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("bench.py", run, argv, "stopped; the same command continues with this contest")


if __name__ == "__main__":
    sys.exit(main())
