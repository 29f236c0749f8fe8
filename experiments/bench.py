"""How fast and how heavy: a training step and a forward pass, beside PEFT's on the same shapes.

    python experiments/bench.py                         # the three shapes for a CPU, all five on a GPU; into out/bench
    python experiments/bench.py --shape base --repeats 9
    python experiments/bench.py --quick                 # three rounds of the smallest shape, to see that it works

A training step is forward, backward, AdamW. Its contestants: full fine-tuning and (IA)³ here; PEFT's (IA)³ around this
GPT, which isolates the method; PEFT's (IA)³ and LoRA (r 4, on c_attn) around transformers' GPT-2, once with its default
GELU (gelu_new, written out in elementary operations) and once with the fused one that we use (gelu_pytorch_tanh).
transformers runs without dropout, without a key-value cache and with PyTorch's fused attention, as this GPT does.
A forward pass is the base's, the base's with vectors, and the merged model's. Ours run eagerly and compiled. A CPU
computes in float32, a GPU in bfloat16: there frozen bases are stored in it, and full fine-tuning has float32 weights
and autocast.

Clock. The contestants take turns, and every round gives a ratio: over what has no vectors (full fine-tuning; the base's
forward), and of our (IA)³ over the contestant, so that below 1 means that ours is faster. Medians and quartiles.

Floor. The FLOPs of linear maps and of attention over those of full fine-tuning (torch's counter: an elementwise
operation counts nothing, attention counts the whole square that causality halves). Clock over floor is the median ratio
over that of all FLOPs: at 1.00 time would go with FLOPs alone. Compiled ones are counted as they were written.

Saved for backward: every storage that autograd keeps in a forward pass, weights left out, in float32 numbers of a token
and layer over n_embd. Nothing is subtracted: what embedding, head and loss keep is spread over the layers.

Writes results.csv, a row a contestant, and table.md, made of it. A shape that is already there is not measured again.
"""

import argparse
import datetime
import gc
import os
import shutil
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments.clock import count_flops, count_saved, device_name, interleave, ratio
from experiments.runs import open_folder, read_csv, write_csv
from ia3 import attach
from merge import merge
from model import GPT, GPTConfig, pick_device
from train import TrainConfig, autocast, lm_loss

SHAPES = {  # n_layer, n_head, n_embd, vocab_size
    "base": (6, 6, 192, 257),
    "6x384": (6, 6, 384, 257),
    "124M": (12, 12, 768, 50257),
    "350M": (24, 16, 1024, 50257),
    "1.5B": (48, 25, 1600, 50257),
}
WORK = {  # rows and tokens a step, and rounds
    "cpu": {"base": (16, 128, 25), "6x384": (8, 256, 13), "124M": (2, 256, 15)},
    "cuda": {
        "base": (16, 128, 51),
        "6x384": (8, 256, 51),
        "124M": (8, 1024, 31),
        "350M": (8, 1024, 21),
        "1.5B": (4, 1024, 11),
    },
}
FULL, OURS = "full fine-tuning", "(IA)³"
AROUND_OURS = "PEFT (IA)³ around this GPT"
BASE, UNMERGED, MERGED = "base", "base with vectors", "merged"
TRAINING = (
    FULL,
    OURS,
    AROUND_OURS,
    "PEFT (IA)³, gelu_pytorch_tanh",
    "PEFT (IA)³, gelu_new",
    "PEFT LoRA, gelu_pytorch_tanh",
    "PEFT LoRA, gelu_new",
)
INFERENCE = (BASE, UNMERGED, MERGED)


def rivals():
    """Return the modules (peft, transformers). Raises ValueError where they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as e:
        raise ValueError(f"no {e.name} here: pip install -r requirements-dev.txt") from None
    transformers.logging.set_verbosity_error()  # of a vocabulary of 257, it misses GPT-2's last token
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT still calls there
    return peft, transformers


def their_gpt2(config, activation):
    """transformers' GPT-2 of the same shape, random weights."""
    _, transformers = rivals()
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = transformers.GPT2Config(
        n_positions=config.block_size,
        activation_function=activation,
        use_cache=False,
        attn_implementation="sdpa",
        **sizes | no_dropout,
    )
    return transformers.GPT2LMHeadModel(theirs)


def their_loss(model, x, y):
    return model(input_ids=x, labels=y, shift_labels=y).loss


def build(name, config, device, dtype):
    """Return a contestant of TRAINING: its model, random weights and vectors of ones, and its loss(model, x, y).

    A frozen base is stored in dtype; vectors, LoRA's matrices and what is trained in full are float32.
    """
    with torch.device(device):
        if name == FULL:
            return GPT(config), lm_loss
        if name == OURS:
            model = GPT(config).to(dtype)
            attach(model)
            return model, lm_loss
        peft, _ = rivals()
        targets = {"target_modules": ["attn.c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
        if name == AROUND_OURS:
            return peft.get_peft_model(GPT(config).to(dtype), peft.IA3Config(**targets)), lm_loss
        method, activation = name.split(", ")
        conv1d = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}  # transformers' GPT-2 keeps weights as (in, out)
        if method == "PEFT (IA)³":
            adapter = peft.IA3Config(**targets | conv1d)
        else:
            adapter = peft.LoraConfig(r=4, target_modules=["attn.c_attn"], **conv1d)
        return peft.get_peft_model(their_gpt2(config, activation).to(dtype), adapter).train(), their_loss


def make_batch(config, rows, device):
    """Random tokens and their targets, 2 × (rows, block_size)."""
    dice = torch.Generator().manual_seed(0)
    idx = torch.randint(0, config.vocab_size, (rows, config.block_size + 1), generator=dice).to(device)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(step, device, own):
    """Bytes of GPU memory that a contestant takes at most in a step; own: bytes that it holds between steps."""
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    step()
    return own + torch.cuda.max_memory_allocated(device) - held


def flops_a_token(call, tokens):
    linear, attention = count_flops(call)
    return {"linear_flops": linear // tokens, "attention_flops": attention // tokens}


def variants(name, model, compiled):
    """Return {name: model}, and beside it the same model compiled, where that is wanted."""
    return {name: model} | ({f"{name}, compiled": torch.compile(model)} if compiled else {})


def trainer(name, config, batch, dtype, compiled):
    """Return {contestant: (a training step, its counts)}: one of TRAINING, if it is ours also compiled.

    The counts: values trained, FLOPs a token of linear maps and of attention, bytes saved for backward, and bytes of
    GPU memory at most.
    """
    device = batch[0].device
    before = allocated(device)
    model, loss_fn = build(name, config, device, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.99), fused=device.type == "cuda")
    amp = autocast(model, TrainConfig(dtype=str(dtype).removeprefix("torch.")))

    def loss(called, batch):
        with amp:
            return loss_fn(called, *batch)

    def step(called):
        loss(called, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # of one row: FLOPs grow with the rows, and counting attention wants memory for its square
    flops = flops_a_token(lambda: loss(model, [t[:1] for t in batch]).backward(), config.block_size)
    found = {}
    for variant, called in variants(name, model, compiled and name in (FULL, OURS)).items():
        step(called)  # compiles; makes AdamW's averages
        counts = {"trained": sum(p.numel() for p in trained)} | flops
        counts["saved_bytes"] = count_saved(partial(loss, called, batch), model)
        counts["peak_bytes"] = peak_memory(partial(step, called), device, allocated(device) - before)
        found[variant] = partial(step, called), counts
    return found


def reader(name, config, batch, dtype, compiled):
    """Return {contestant: (a forward pass without gradients, its counts)}: one of INFERENCE, also compiled."""
    idx = batch[0]
    before = allocated(idx.device)
    with torch.device(idx.device):
        model = GPT(config).to(dtype).eval()
        if name != BASE:
            for l in attach(model).parameters():
                torch.nn.init.normal_(l, mean=1.0, std=0.3)
        if name == MERGED:
            model = merge(model)
    model.requires_grad_(False)

    def forward(called, idx):
        with torch.no_grad():
            return called(idx)[0]

    flops = flops_a_token(lambda: forward(model, idx[:1]), config.block_size)
    found = {}
    for variant, called in variants(name, model, compiled).items():
        forward(called, idx)  # compiles
        counts = {"trained": 0} | flops | {"saved_bytes": 0}
        counts["peak_bytes"] = peak_memory(partial(forward, called, idx), idx.device, allocated(idx.device) - before)
        found[variant] = partial(forward, called, idx), counts
    return found


def take_turns(steps, rounds, device, title):
    """Time the contestants round by round, with a progress line every ten seconds. Returns {contestant: seconds}."""
    times = {name: [] for name in steps}
    start = said = time.time()
    for done in range(1, rounds + 1):
        for name, took in interleave(steps, 1, device, warmup=2 if done == 1 else 0).items():
            times[name] += took
        if done == rounds or time.time() - said > 10:
            said = time.time()
            left = (said - start) / (done + 2) * (rounds - done)
            print(f"{title}: round {done}/{rounds}, {left:.0f} s left", flush=True)
    return times


def measure(shape, rounds, device, dtype, compiled):
    """Return the rows of a shape, dicts: training's contestants, then inference's."""
    n_layer, n_head, n_embd, vocab_size = SHAPES[shape]
    n_rows, tokens, _ = WORK[device.type][shape]
    config = GPTConfig(tokens, vocab_size, n_layer, n_head, n_embd)
    batch = make_batch(config, n_rows, device)
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    sizes |= {"rows": n_rows, "tokens": tokens, "repeats": rounds}
    found = []
    for what, names, make in (("training", TRAINING, trainer), ("inference", INFERENCE, reader)):
        torch.compiler.reset()  # it gives up on a forward that it has compiled for eight models
        contestants = {}
        for name in names:
            print(f"{shape}, {what}: {name}", flush=True)
            contestants |= make(name, config, batch, dtype, compiled)
        steps = {name: step for name, (step, _) in contestants.items()}
        times = take_turns(steps, rounds, device, f"{shape}, {what}")
        plain, ours = names[:2]
        for name, (_, counts) in contestants.items():
            row = {"shape": shape, "what": what, "contestant": name} | counts
            for column, over in (("over_plain", (name, plain)), ("ours_over", (ours, name))):
                middle, low, high = ratio(*(times[who] for who in over))
                row |= {column: middle, f"{column}_low": low, f"{column}_high": high}
            row["seconds"] = statistics.median(times[name])
            row["tokens_per_second"] = n_rows * tokens / row["seconds"]
            found.append(row | sizes)
        del contestants, steps
        gc.collect()  # the models, before the next ones are made: PEFT's hold themselves in circles
    return found


def spread(row, column):
    return f"{row[column]:.2f} ({row[f'{column}_low']:.2f} to {row[f'{column}_high']:.2f})"


def table(rows):
    """Markdown of one kind of contest, training's or inference's, all shapes. rows: results.csv's, of that kind."""
    training, gpu = rows[0]["what"] == "training", rows[0]["peak_bytes"] != ""
    head = ["", "time over full's" if training else "time over the base's", "FLOPs: linear maps", "and attention"]
    head += ["clock over floor"] + ["saved", "ours over it"] * training + ["tokens/s", "peak GiB"] * gpu
    lines = []
    for row in rows:
        if row["contestant"] in (FULL, BASE):  # the first of its shape
            plain = row
            about = f"{row['n_layer']} layers × {row['n_embd']}, {row['rows']} × {row['tokens']} tokens"
            lines.append([f"**{row['shape']}**: {about}", *[""] * (len(head) - 1)])
        linear = row["linear_flops"] / plain["linear_flops"]
        floor = (row["linear_flops"] + row["attention_flops"]) / (plain["linear_flops"] + plain["attention_flops"])
        cells = [row["contestant"], spread(row, "over_plain"), f"{linear:.3f}", f"{floor:.3f}"]
        cells.append(f"{row['over_plain'] / floor:.2f}")
        if training:
            unit = 4 * row["rows"] * row["tokens"] * row["n_layer"] * row["n_embd"]
            cells += [f"{row['saved_bytes'] / unit:.1f}", spread(row, "ours_over")]
        if gpu:
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**30:.2f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def tables(folder):
    """Return the README's Markdown, made of results.csv in folder alone."""
    rows = read_csv(Path(folder) / "results.csv")
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "peft"))
    dates = " and ".join(sorted({row["date"] for row in rows}))
    rounds = ", ".join(str(n) for n in dict.fromkeys(row["repeats"] for row in rows))
    about = (
        f"{first['hardware']}, {first['dtype']}, {versions}, {dates}; medians (quartiles) of {rounds} rounds' ratios"
    )
    contests = [[row for row in rows if row["what"] == what] for what in ("training", "inference")]
    return "\n\n".join([about, *map(table, contests)])


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: those for the device")
    parser.add_argument("--repeats", type=int, help="rounds of a shape (default: fewer, the larger it is)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out ours compiled; it wants a C++ compiler")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds of the smallest shape, into OUT/quick")
    args = parser.parse_args(argv)
    device, dtype = pick_device(args.device)
    work = WORK[device.type]
    shapes = args.shape or list(work)
    if args.quick:
        shapes, args.repeats, args.out = ["base"], 3, args.out / "quick"
    for shape in shapes:
        if shape not in work:
            raise ValueError(f"shape {shape} is for a GPU; for a CPU there are {', '.join(work)}")
    if args.repeats is not None and args.repeats < 2:
        raise ValueError(f"repeats must be at least 2, for quartiles, not {args.repeats}")
    if not args.no_compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile wants a C++ compiler (g++, or CXX): --no-compile leaves it out")
    about = {"hardware": device_name(device), "dtype": dtype, "torch": torch.__version__}
    about |= {module.__name__: module.__version__ for module in rivals()[::-1]}
    open_folder(args.out, about | {"repeats": args.repeats or "by shape", "compiled": not args.no_compile})
    path = args.out / "results.csv"
    for shape in shapes:
        rows = read_csv(path)
        if any(row["shape"] == shape for row in rows):
            continue
        today = {"date": datetime.date.today().isoformat()}
        rounds = args.repeats or work[shape][2]
        found = measure(shape, rounds, device, getattr(torch, dtype), not args.no_compile)
        rows += [row | about | today for row in found]
        write_csv(path, sorted(rows, key=lambda row: list(SHAPES).index(row["shape"])))
    text = tables(args.out)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"bench.py: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: stopped; the same command goes on with the shape that it was at", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
