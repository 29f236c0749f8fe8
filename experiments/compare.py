"""(IA)³ beside its rivals on one base: what each learns, what it costs, how sure that is.

    python -m experiments.compare --quick    # 5 steps, one rate for all, a few windows: to see that it works
    python -m experiments.compare --plan     # how many runs, how many hours
    python -m experiments.compare --counts   # what a method keeps for backward, by where it stands: counted, no clock
    python -m experiments.compare            # everything; Ctrl-C and again: it goes on where it was stopped
    python -m experiments.compare --base my.pt --data path/to/folder --forget path/to/another --out out/mine
    python -m experiments.compare --base data/smollm2.pt --data folio --out out/compare-smollm2

Protocol. Every method (experiments/rivals.py) trains with train.train() on the same windows in the same order: 1× is
100 steps of 16 windows, AdamW without weight decay, 6 % warmup, cosine decay, gradient norm 1. On the first data
(folio) (IA)³, full fine-tuning and LoRA r = 4 also train 4×, 400 steps, at the rate of 1×.

The learning rate of a method is chosen for each data on its val (256 windows, 1×, the mean of seeds 0 and 1):
half-decades until the best has a worse one on either side, then the quarter-decades beside it. Nothing else is chosen.
The last step is what is reported, on test, by which nothing is chosen, for seeds 1 to 5. A seed draws the batches, and
the initial values where a method has random ones; (IA)³ starts from ones, so for it seeds vary the batches only.

A test is read work by work, and a loss is the mean of the works'. What is claimed is about these works on this base:
the sampling unit is the work, so an interval is Student's t over the works' means (five plays: 4 degrees of freedom).
With fewer than three works there is none, and each is shown by itself. How seeds differ is shown beside it, as t over
the seeds' means. Where either holds 0, no ranking is claimed. Resampled blocks of 32 windows show how far one work's
figure moves with the passages read: in the picture, the thin bar of a dot. A run that diverges counts as infinite.

The gap is what full fine-tuning of as many steps gains over the base. Forgetting is how much the loss on --forget's
test (plays, the base's own text; 256 windows of each work) rises while the task is switched on; switched off, whatever
leaves the base's tensors alone forgets nothing, by construction.

A Llama has (IA)³, LoRA r = 1 on all linear maps and full fine-tuning only, two seeds each, 100 steps of 8 windows of
256 tokens, each at one rate that was not chosen here (LLAMA_RATES) and on 64 windows a work: a look whether the picture
is another on a pretrained model, no ranking. What is frozen is stored in bfloat16; full fine-tuning has float32 weights
and autocast.

Writes into --out what lab.py says of a folder of runs (a run's arrays: nats and bytes of every block of the test, and
the curve of its loss on val), costs.csv, table.md, and pictures: beside.png, rates.png, curves.png.
"""

import argparse
import copy
import math
import sys
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
from experiments import lab, rivals
from experiments.rivals import METHODS
from ia3 import fingerprint, stack
from model import GPT
from tools.plot import plt, save_picture
from train import TrainConfig, autocast, lm_loss, train

STEPS = 100
SEEDS = range(1, 6)
RATE_SEEDS = (0, 1)
LONG = ("full", "lora4", "ia3")
LONG_STEPS = 400
LLAMA_RATES = {"full": 3e-5, "lora-all": 1e-3, "ia3": 3e-3}  # of (IA)³ the paper's; of the others, few-shot's
LLAMA_SEEDS = range(1, 3)
QUICK_RATE = 3e-3
BATCH_SIZE = 16
# windows: of each work, None for all; curve: windows of val, for the curves
GPT_WORK = {"llama": False, "batch_size": BATCH_SIZE, "grad_accum": 1, "curve": 32}
GPT_WORK["windows"] = {"": None, "forget_": 256}
# half the rows of twice the tokens, as many at once as its logits leave room for
LLAMA_WORK = {"llama": True, "batch_size": 8, "grad_accum": 2, "curve": 8, "windows": {"": 64, "forget_": 64}}
VAL_WINDOWS = 256  # to choose a learning rate
REPEATS = 25
PLACES = {  # what --counts sets side by side: title, function
    "full fine-tuning": rivals.add_full,
    "(IA)³ on k, v, ff": rivals.add_ia3,
    "LoRA r = 1 on all maps": partial(rivals.add_lora_all, r=1),
    "(IA)³ on ff": partial(rivals.add_ia3, sites=("ff",)),
    "(IA)³ on k, v": partial(rivals.add_ia3, sites=("k", "v")),
    "LoRA r = 4 on q, v": partial(rivals.add_lora, r=4, maps="qv"),
}
MARGIN = 0.03  # within which two times are called equivalent
MIXED_ROWS = 16
MIXED_TOKENS = 8
RUNS = {"stage": str, "data": str, "method": str, "lr": float, "steps": int, "seed": int}
RUNS |= {"values": int, "loss": float, "forgotten": float}
COSTS = {"method": str, "values": int, "linear_flops": int, "attention_flops": int, "saved_bytes": int}
COSTS |= {"peak_bytes": int, "step": float, "step_low": float, "step_high": float}
COSTS |= {"unmerged": float, "unmerged_low": float, "unmerged_high": float}
COSTS |= {"merged": float, "merged_low": float, "merged_high": float, "equal_low": float, "equal_high": float}
COSTS |= {"mixed": float, "mixed_low": float, "mixed_high": float, "device": str, "torch": str, "date": str}


# --- a run ---


def load_model(settings, method, seed):
    """The base with a method attached. Weights that learn are float32; a Llama's that are frozen are bfloat16."""
    torch.manual_seed(seed)  # initial values, where they are random
    held = torch.bfloat16 if settings["llama"] and method != "full" else torch.float32
    model = common.load(settings["base"], held)
    rivals.attach(model, METHODS[method].add)
    return model.to(settings["device"])


def config_of(settings, **values):
    """The protocol's settings. Where the dtype is bfloat16, weights that are float32 compute under autocast."""
    work = {"batch_size": settings["batch_size"], "grad_accum": settings["grad_accum"], "dtype": settings["dtype"]}
    return TrainConfig(weight_decay=0.0, eval_windows=settings["curve"], **work, **values)


def measure(settings, stage, data, method, lr, steps, seed):
    """One run: train, then look at val (stage 'lr') or at test and at forgetting (stage 'test').

    Returns the losses in nats a byte, of a test the mean of the works, infinite where training diverged; and a test's
    arrays.
    """
    model = load_model(settings, method, seed)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    splits = lab.load_data(settings["folders"][data], model, ("train", "val"))
    config = config_of(settings, lr=0.1)  # the rate is not used here
    history = []
    diverged = False
    try:
        if method != "base":
            every = steps if stage == "lr" else max(steps // 20, 1)
            config = config_of(settings, steps=steps, lr=lr, seed=seed, eval_interval=every)
            history = train(model, splits, config)
    except FloatingPointError:
        diverged = True
    if stage == "lr":
        loss = math.inf
        if not diverged:
            nats, targets = lab.window_losses(model, splits["val"], config, VAL_WINDOWS)
            loss = nats.sum() / targets.sum() * lab.tokens_a_byte(splits["val"])
            loss = loss if math.isfinite(loss) else math.inf
        return {"values": values, "loss": loss, "forgotten": None}, {}
    curve = [(row["step"], row["val_loss"] * lab.tokens_a_byte(splits["val"])) for row in history]
    arrays = {"curve": np.array(curve).reshape(-1, 2)}
    for kind, text in (("", data), ("forget_", settings["forget"])):
        works = lab.read_works(settings["folders"][text], "test", model)
        found = lab.work_losses(model, works, config, settings["windows"][kind], diverged)
        arrays |= {f"{kind}{name}": array for name, array in found.items()}
    means = [float(lab.stack_works([arrays], kind).mean()) for kind in ("", "forget_")]
    return {"values": values, "loss": means[0], "forgotten": means[1]}, arrays


# --- which runs ---


def job(stage, data, method, lr, steps, seed):
    """What is known of a run in advance."""
    return {"stage": stage, "data": data, "method": method, "lr": lr, "steps": steps, "seed": seed}


def rate(i):
    """The i-th quarter-decade: 1 at 0, 1.8 at 1, 3 at 2, 5.6 at 3, 10 at 4, 0.56 at -1."""
    return float(f"{(1, 1.8, 3, 5.6)[i % 4]}e{i // 4}")


def index_of_rate(lr):
    """The i of rate(i)."""
    return round(4 * math.log10(lr))


def mean_losses(rows, data):
    """Return {method: {learning rate: mean loss on data's val}}, rates rising, from the rows of results.csv."""
    found = {}
    for row in rows:
        if row["stage"] == "lr" and row["data"] == data:
            found.setdefault(row["method"], {}).setdefault(row["lr"], []).append(row["loss"])
    return {name: {lr: float(np.mean(of_lr[lr])) for lr in sorted(of_lr)} for name, of_lr in found.items()}


def choose_rates(measure_jobs, data, middles):
    """Return {method: the learning rate that is best on data's val}. measure_jobs(jobs) returns the rows of their runs.

    middles: {method: i}, the rate to look around first, a half-decade (an even i).
    """
    tried = {name: {i - 2, i, i + 2} for name, i in middles.items()}
    while True:
        jobs = []
        for name in tried:
            for i in sorted(tried[name]):
                jobs += [job("lr", data, name, rate(i), STEPS, seed) for seed in RATE_SEEDS]
        losses = mean_losses(measure_jobs(jobs), data)
        best = {name: min(of_lr, key=of_lr.get) for name, of_lr in losses.items()}
        grown = False
        for name, lr in best.items():
            i = index_of_rate(lr)
            beside = {i - 2, i + 2} - tried[name] if i % 2 == 0 else set()
            new = beside or {i - 1, i + 1} - tried[name]
            tried[name] |= new
            grown = grown or bool(new)
        if not grown:
            return best


def test_jobs(data, rates, steps, seeds, methods):
    """Every method with every seed, at its rate."""
    return [job("test", data, name, rates[name], steps, seed) for seed in seeds for name in methods]


def plan(settings, datas, methods, seeds, steps, workers, grid):
    """Print how many runs there will be and how long they take, by a step and a forward pass timed here.

    grid: whether rates are chosen, which takes about 7 of them on the first data and 5 on the others.
    """
    model = load_model(settings, "ia3", 0)
    splits = lab.load_data(settings["folders"][datas[0]], model, ("train", "val"))
    config = config_of(settings, lr=0.1)  # the rate is not used here
    a_step, a_window = lab.pace(model, splits["train"], config)
    lengths = []  # steps of each run
    windows = 0
    for data in datas:
        n_rates = 0
        if grid:
            n_rates = len(methods) * len(RATE_SEEDS) * (7 if data == datas[0] else 5)
        windows += n_rates * (VAL_WINDOWS + 2 * settings["curve"])
        tests = [0] + [steps] * len(methods) * len(seeds)
        if grid and data == datas[0]:
            tests += [LONG_STEPS] * len(LONG) * len(seeds)
        lengths += [STEPS] * n_rates + tests
        read = 21 * settings["curve"]
        for kind, text in (("", data), ("forget_", settings["forget"])):
            works = lab.read_works(settings["folders"][text], "test", model).values()
            read += sum(min(len(work), settings["windows"][kind] or len(work)) for work in works)
        windows += len(tests) * read
    hours = (sum(lengths) * a_step + windows * a_window) / workers / 3600
    told = f"{len(lengths)} runs, {sum(lengths):,} steps, {windows:,} windows read"
    print(f"{told}: about {hours:.1f} hours on {workers} cores", flush=True)


# --- costs ---


def measure_costs(settings, data, methods, repeats):
    """Return the rows of costs.csv: what is counted, and what is timed in turns."""
    device = torch.device(settings["device"])
    config = config_of(settings, lr=0.1)  # the rate is not used here
    split = lab.load_data(settings["folders"][data], common.load(settings["base"]), ("train", "val"))["train"]
    batch = [t.to(device) for t in split.batch(0, 0, BATCH_SIZE)]
    rows = {}
    steps = {}
    passes = {}  # forward passes of one window, no gradient

    def forward(model, idx, task_ids=None):
        with torch.no_grad(), autocast(model, config):
            model(idx, task_ids=task_ids)

    for name in ["base", *methods]:
        method = METHODS[name]
        before = lab.allocated(device)
        model = load_model(settings, name, 0)
        rows[name] = dict.fromkeys(COSTS) | {"method": name, "values": 0}
        if name != "base":
            rows[name] |= lab.count_step(model, batch, lm_loss, config)
            steps[name] = lab.training_step(model, batch, lm_loss, config)
            rows[name]["peak_bytes"] = lab.peak_bytes(steps[name], device, before)
        passes[name, "unmerged"] = partial(forward, model, batch[0][:1])
        if method.merge:
            passes[name, "merged"] = partial(forward, method.merge(model).eval(), batch[0][:1])

    # short rows, each of a task of its own
    short = batch[0][:MIXED_ROWS, :MIXED_TOKENS]
    task_ids = torch.arange(MIXED_ROWS, device=device)
    loras = [load_model(settings, "lora4", seed) for seed in range(MIXED_ROWS)]
    stacked = load_model(settings, "ia3", 0)
    stacked.ia3 = stack([stacked.ia3] * MIXED_ROWS)
    mixed = {
        "base": partial(forward, load_model(settings, "base", 0), short),
        "lora4": partial(forward, rivals.mix_lora(loras, task_ids).eval(), short),
        "ia3": partial(forward, stacked, short, task_ids),
    }

    step_times = lab.interleave(steps, repeats, device)
    times = lab.interleave(passes, 8 * repeats, device, warmup=5)
    mixed_times = lab.interleave(mixed, 8 * repeats, device, warmup=5)
    for name, row in rows.items():
        found = {what: lab.ratio(times[who, what], times["base", "unmerged"]) for who, what in passes if who == name}
        if name in steps:
            found["step"] = lab.ratio(step_times[name], step_times["full"])
        if name in mixed:
            found["mixed"] = lab.ratio(mixed_times[name], mixed_times["base"])
        for what, (middle, low, high) in found.items():
            row |= {what: middle, f"{what}_low": low, f"{what}_high": high}
        if "merged" in found:
            row["equal_low"], row["equal_high"] = lab.equivalence(times[name, "merged"], times["base", "unmerged"])
        row |= {"device": lab.device_name(device), "torch": torch.__version__, "date": f"{date.today()}"}
    return list(rows.values())


def count_places(base, folder):
    """Return {title: lab.count_step's dict} of PLACES, for a step of 16 windows, counted on the CPU in float32."""
    settings = GPT_WORK | {"base": base, "device": "cpu", "dtype": "float32"}
    split = lab.load_data(folder, common.load(base), ("train", "val"))["train"]
    batch = split.batch(0, 0, BATCH_SIZE)
    found = {}
    for title, add in PLACES.items():
        model = load_model(settings, "base", 0)
        rivals.attach(model, add)
        found[title] = lab.count_step(model, batch, lm_loss, config_of(settings, lr=0.1))
    return found


def counts(base, folder):
    """A table of PLACES: what a training step keeps for backward, and its FLOPs, over full fine-tuning's."""
    found = count_places(base, folder)
    full = found["full fine-tuning"]
    lines = []
    for title, row in found.items():
        over_full = [f"{row[what] / full[what]:.3f}" for what in ("saved_bytes", "linear_flops", "attention_flops")]
        lines.append([title, f"{row['values']:,}", *over_full])
    return lab.markdown(["", "values", "kept for backward", "FLOPs: linear", "attention"], lines)


# --- tables and pictures, from the files alone ---


def read_tests(folder):
    """Return {(data, steps): {method: its runs' arrays, a dict each}}, in the order of METHODS, the base in each."""
    rows, arrays = lab.read_runs(folder, RUNS)
    found = {}
    for row in sorted(rows, key=lambda row: row["seed"]):  # they are written as they end, and compared seed by seed
        if row["method"] not in METHODS:
            raise ValueError(f"{folder}/results.csv names a method {row['method']!r} that is not in rivals.py")
        if row["stage"] == "test":
            runs = found.setdefault((row["data"], row["steps"]), {})
            runs.setdefault(row["method"], []).append(lab.arrays_of(row, arrays, folder))
    groups = {}
    for data, steps in sorted(found):
        if steps > 0:
            if not {"base", "full", "ia3"} <= found[data, steps].keys() | found.get((data, 0), {}).keys():
                raise ValueError(f"{folder} lacks runs of the base, of full or of ia3 on {data}: measure them first")
            runs = found[data, 0] | found[data, steps]
            groups[data, steps] = {name: runs[name] for name in METHODS if name in runs}
    if not groups:
        raise ValueError(f"{folder} holds no results yet: the command without --quick measures them")
    return groups


def statistics(folder):
    """Return {(data, steps): {method: {'loss', 'gap', 'beside', 'forgotten'}}}: of each what the works say, (works,).

    loss in nats a byte; gap: the share of full fine-tuning's gain over the base, in percent; beside: the loss less
    (IA)³'s; forgotten: the loss on --forget less the base's. Beside stands 'seeds', (seeds,): 'beside' by seed.
    """
    found = {}
    for key, methods in read_tests(folder).items():
        by_seed = {name: lab.stack_works(runs) for name, runs in methods.items()}  # (seeds, works)
        loss = {name: losses.mean(0) for name, losses in by_seed.items()}
        forget = {name: lab.stack_works(runs, "forget_").mean(0) for name, runs in methods.items()}
        found[key] = {}
        for name in methods:
            row = {"loss": loss[name], "beside": loss[name] - loss["ia3"], "forgotten": forget[name] - forget["base"]}
            row["gap"] = 100 * (loss["base"] - loss[name]) / (loss["base"] - loss["full"])
            row["seeds"] = (by_seed[name] - by_seed["ia3"]).mean(1)
            found[key][name] = row
    return found


def of_works(values, form):
    """A cell: the mean of what the works say and its interval; fewer than three works are shown each by itself."""
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) >= 3:
        return lab.spread(*lab.student(values), form)
    each = " / ".join(f"{value:{form}}" for value in values)
    return each if len(values) == 1 else f"{values.mean():{form}} ({each})"


def is_ranked(row):
    """Whether the difference to (IA)³ is clear of 0 over three works or more, and over the seeds."""
    intervals = [lab.student(row[what])[1:] for what in ("beside", "seeds")]
    return len(row["beside"]) >= 3 and all(low > 0 or high < 0 for low, high in intervals)


def mean_curve(runs):
    """The loss on val while the method learned, the mean of its runs: steps and losses, (evaluations,) each.

    Both are empty where a run diverged.
    """
    curves = [run["curve"] for run in runs]
    if not all(map(len, curves)):
        return np.empty((2, 0))
    return np.mean(curves, axis=0).T  # (2, evaluations)


def half_gap(methods, name):
    """The first step seen at which a method has half of what full fine-tuning gains by its last, or 'never'."""
    _, full = mean_curve(methods["full"])
    if not len(full):
        return "never"
    steps, losses = mean_curve(methods[name])
    reached = steps[losses <= (full[0] + full[-1]) / 2]
    return f"{reached[0]:.0f}" if len(reached) else "never"


def tables(folder):
    """The tables, in Markdown, from the files of folder, a Path, alone; without costs where there is no costs.csv."""
    tests = read_tests(folder)
    about = lab.read_about(folder)
    forget = about["forget"]
    rows = lab.read_csv(folder / "results.csv", RUNS)
    runs = {(row["data"], row["method"]): row for row in rows if row["stage"] == "test"}
    chosen = any(row["stage"] == "lr" for row in rows)  # else each has one rate, and nothing is ranked
    head = ["method", "values", "rate", "test loss", "gap closed, %", "loss less (IA)³'s", "the same, over seeds"]
    head += ["half the gap at step", f"{forget} forgotten"]
    pieces = []
    for (data, steps), found in statistics(folder).items():
        works = about["works"][data]
        lines = []
        for name, values in found.items():
            row = dict.fromkeys(head, "")
            row["method"] = METHODS[name].title
            row["test loss"] = of_works(values["loss"], ".4f")
            if name != "base":
                row["values"] = f"{runs[data, name]['values']:,}"
                row["rate"] = f"{runs[data, name]['lr']:g}"
                row["half the gap at step"] = half_gap(tests[data, steps], name)
                row[f"{forget} forgotten"] = of_works(values["forgotten"], "+.4f")
            if name not in ("base", "full"):
                row["gap closed, %"] = of_works(values["gap"], ".1f")
            if name != "ia3":
                row["loss less (IA)³'s"] = of_works(values["beside"], "+.4f")
                if len(values["seeds"]) > 1 and np.isfinite(values["seeds"]).all():
                    row["the same, over seeds"] = lab.spread(*lab.student(values["seeds"]), "+.4f")
                if not (is_ranked(values) and chosen):
                    row["loss less (IA)³'s"] += ", no ranking"
            lines.append(list(row.values()))
        n = len(tests[data, steps]["ia3"])
        seeds = "1 seed" if n == 1 else f"{n} seeds"
        title = f"**{data}**, {steps} steps of {about['batch_size']} windows, {seeds}, on {', '.join(works)}:"
        pieces.append(title)
        pieces.append(lab.markdown(head, lines))
    pieces += rate_table(rows)
    costs = lab.read_csv(folder / "costs.csv", COSTS)
    if costs:
        pieces.append(cost_table(costs))
    return "\n\n".join(pieces)


def rate_table(rows):
    """Every rate that was tried: the mean loss on val less the best one's, a table a data; none where one was given."""
    pieces = []
    for data in dict.fromkeys(row["data"] for row in rows if row["stage"] == "lr"):
        losses = mean_losses(rows, data)
        rates = sorted({lr for of_lr in losses.values() for lr in of_lr})
        lines = []
        for name, of_lr in losses.items():
            least = min(of_lr.values())
            cells = {lr: "diverged" if math.isinf(loss) else f"{loss - least:.3f}" for lr, loss in of_lr.items()}
            lines.append([METHODS[name].title, *[cells.get(lr, "") for lr in rates]])
        pieces.append(
            f"By how much the loss on {data}'s val is above the best rate's, by rate, {len(RATE_SEEDS)} seeds:"
        )
        pieces.append(lab.markdown(["", *[f"{lr:g}" for lr in rates]], lines))
    return pieces


def cost_table(costs):
    """costs: the rows of costs.csv."""
    rows = {row["method"]: row for row in costs}
    if "full" not in rows or not rows.keys() <= METHODS.keys():
        raise ValueError("costs.csv is not of these methods: remove it to measure again")
    full = rows["full"]
    gpu = full["peak_bytes"] is not None
    head = ["method", "values", "%", "FLOPs of a step: linear, attention", "step time", "kept for backward"]
    if gpu:
        head.append("peak memory")
    head += ["forward", "forward, merged", "90 % interval", "a mixed batch"]
    lines = []
    for name, row in rows.items():
        times = {}
        for what in ("step", "unmerged", "merged", "mixed"):
            times[what] = "" if row[what] is None else lab.spread(row[what], row[f"{what}_low"], row[f"{what}_high"])
        over_full = {}  # what is counted, over full fine-tuning's
        for what in ("linear_flops", "attention_flops", "saved_bytes", "peak_bytes"):
            over_full[what] = "" if row[what] is None else f"{row[what] / full[what]:.3f}"
        flops = "" if name == "base" else f"{over_full['linear_flops']}, {over_full['attention_flops']}"
        equal = ""
        if row["merged"] is not None:
            equal = f"{row['equal_low']:.3f} to {row['equal_high']:.3f}"
            equal += ", equivalent" if is_equivalent(row) else ", not shown to be equivalent"
        line = [METHODS[name].title, f"{row['values']:,}", f"{100 * row['values'] / full['values']:.3g}", flops]
        line += [times["step"], over_full["saved_bytes"]]
        if gpu:
            line.append(over_full["peak_bytes"])
        line += [times["unmerged"], times["merged"] or "does not merge", equal]
        lines.append([*line, times["mixed"] or f"not measured ({METHODS[name].mixes})"])
    made = f"{full['device']}, torch {full['torch']}, {full['date']}"
    return (
        f"What they cost ({made}; medians and quartiles):\n\n{lab.markdown(head, lines)}\n\n"
        "Steps, memory and FLOPs over full fine-tuning's; forward passes of one window over the base's. Merged, a\n"
        "model has the base's keys, shapes, dtype and FLOPs, so no latency is added, by construction. The timing is a\n"
        f"check: equivalent, if the 90 % interval of the median lies within ±{MARGIN:.0%}. A mixed batch:\n"
        f"{MIXED_ROWS} rows of {MIXED_TOKENS} tokens, each of a task of its own, over the base's. Gradients and\n"
        "AdamW's averages take 12 bytes a value, a file 4."
    )


def is_equivalent(row):
    """Whether a row of costs.csv shows the merged pass to be as fast as the base's, within MARGIN."""
    return 1 - MARGIN <= row["equal_low"] <= row["equal_high"] <= 1 + MARGIN


def panels(n):
    """A figure of n panels in a row."""
    figure, axes = plt.subplots(1, n, figsize=(4 * n + 3, 4.5), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    return figure, axes[0]


def style(name):
    """How a method's line looks: (IA)³'s black, ten others by colour, what is more dashed."""
    i = list(METHODS).index(name)
    look = {"color": "k", "lw": 2} if name == "ia3" else {"color": f"C{i % 10}", "ls": ("-", "--")[i // 10]}
    return look | {"label": METHODS[name].title}


def draw_beside(folder):
    """beside.png: the difference to (IA)³ on every work a dot, its thin bar block_noise; thick: t over the works."""
    tests = read_tests(folder)
    found = statistics(folder)
    figure, axes = panels(len(found))
    names = [name for name in METHODS if name not in ("base", "full", "ia3") and name in next(iter(found.values()))]
    for ax, ((data, steps), rows) in zip(axes, found.items(), strict=True):
        for y, name in enumerate(names):
            if name not in rows:
                continue
            nats = [np.mean([run["nats"] for run in tests[data, steps][who]], 0) for who in (name, "ia3")]  # (blocks,)
            run = tests[data, steps][name][0]
            for i, value in enumerate(rows[name]["beside"]):
                at = y + 0.3 * (i / len(rows[name]["beside"]) - 0.5)
                here = run["work"] == i
                low, high = lab.block_noise((nats[0] - nats[1])[here], run["bytes"][here])
                ax.plot([low, high], [at, at], color="C0", lw=0.7)
                ax.plot(value, at, "o", color="C0", ms=3)
            if len(rows[name]["beside"]) >= 3:
                ax.plot(lab.student(rows[name]["beside"])[1:], [y + 0.3] * 2, color="k", lw=3)
        ax.axvline(0, color="k", lw=1)
        ax.set(title=f"{data}, {steps} steps", xlabel="test loss less (IA)³'s (nats a byte)")
        ax.set_yticks(range(len(names)), [METHODS[name].title if ax is axes[0] else "" for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
    save_picture(figure, folder / "beside.png")


def draw_curves(folder):
    """curves.png: the loss on val while each method learned."""
    groups = read_tests(folder)
    figure, axes = panels(len(groups))
    for ax, ((data, steps), methods) in zip(axes, groups.items(), strict=True):
        for name in methods:
            if name != "base":
                ax.plot(*mean_curve(methods[name]), **style(name))
        ax.set(title=f"{data}, {steps} steps", xlabel="step")
    axes[0].set_ylabel("val loss (nats a byte)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, folder / "curves.png")


def draw_rates(folder):
    """rates.png: the loss on val at every rate that was tried; ×: diverged. Nothing where rates were given."""
    rows = lab.read_csv(folder / "results.csv", RUNS)
    datas = list(dict.fromkeys(row["data"] for row in rows if row["stage"] == "lr"))
    if not datas:
        return
    figure, axes = panels(len(datas))
    for ax, data in zip(axes, datas, strict=True):
        losses = mean_losses(rows, data)
        for name, of_lr in losses.items():
            finite = {lr: loss for lr, loss in of_lr.items() if math.isfinite(loss)}
            ax.plot(finite.keys(), finite.values(), marker="o", ms=3, **style(name))
            for lr in of_lr.keys() - finite.keys():
                ax.plot(lr, 0.97, "x", color=style(name)["color"], transform=ax.get_xaxis_transform())
        least = min(min(of_lr.values()) for of_lr in losses.values())
        ax.set(xscale="log", title=data, xlabel="learning rate; ×: diverged", ylim=(least - 0.02, least + 0.5))
    axes[0].set_ylabel(f"loss on val after {STEPS} steps (nats a byte)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, folder / "rates.png")


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--data", nargs="+", default=["folio", "kjv"], help="names under data/ or folders with a test")
    parser.add_argument("--forget", default="plays", help="whose test shows forgetting (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda or cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first data, one seed, 5 steps; into OUT/quick")
    parser.add_argument("--plan", action="store_true", help="say how many runs and hours, and stop")
    parser.add_argument("--counts", action="store_true", help="print what is kept for backward, by place, and stop")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    if args.workers < 1:
        raise ValueError(f"workers must be at least 1, not {args.workers}")
    base = common.load(args.base)
    is_llama = not isinstance(base, GPT)
    device, dtype = common.pick_device(args.device, "bfloat16" if is_llama else "auto")
    names = args.data[:1] if args.quick else args.data
    folders = {Path(name).name: name for name in [*names, args.forget]}
    if len(folders) < len({*names, args.forget}):
        raise ValueError("two of these folders have the same name, and runs go by it: rename one")
    datas = [Path(name).name for name in names]
    settings = {"base": args.base, "folders": folders, "forget": Path(args.forget).name, "device": str(device)}
    settings |= {"dtype": dtype} | (LLAMA_WORK if is_llama else GPT_WORK)
    if args.quick:
        settings |= {"curve": 2, "windows": {"": 8, "forget_": 8}}
    if args.counts:
        if is_llama:
            raise ValueError("counts is for a GPT: a Llama has not all of these places")
        print(counts(args.base, args.data[0]))
        return 0

    about = {"fingerprint": fingerprint(base), "forget": settings["forget"], "dtype": dtype, "quick": args.quick}
    about |= {"batch_size": settings["batch_size"], "data_hash": {}, "works": {}}
    for name, folder in folders.items():  # a missing file is told now, not after an hour
        splits = lab.load_data(folder, base, ("train", "val", "test"))
        about["data_hash"][name] = "".join(split.data_hash()[:16] for split in splits.values())
        about["works"][name] = list(lab.read_works(folder, "test", base))
    methods = [name for name in METHODS if name in LLAMA_RATES or (not is_llama and name != "base")]
    methods = [name for name in methods if METHODS[name].add(copy.deepcopy(base))]  # BitFit wants biases
    given = dict(LLAMA_RATES) if is_llama else {}
    seeds = LLAMA_SEEDS if is_llama else SEEDS
    steps = STEPS
    if args.quick:
        given = given or dict.fromkeys(methods, QUICK_RATE)
        seeds, steps = [1], 5
    plan(settings, datas, methods, seeds, steps, args.workers, not given)
    if args.plan:
        return 0
    out = args.out / "quick" if args.quick else args.out
    lab.open_folder(out, about)

    def measure_jobs(jobs):
        return lab.measure_all(jobs, partial(measure, settings), RUNS, out, args.workers)

    middles = dict.fromkeys(methods, index_of_rate(0.03))
    for data in datas:
        rates = given or choose_rates(measure_jobs, data, middles)
        middles = {name: 2 * round(index_of_rate(lr) / 2) for name, lr in rates.items()}  # half-decades again
        jobs = [job("test", data, "base", 0.0, 0, 0), *test_jobs(data, rates, steps, seeds, methods)]
        if data == datas[0] and not given:
            jobs += test_jobs(data, rates, LONG_STEPS, seeds, LONG)
        measure_jobs(jobs)
    if not is_llama and not (out / "costs.csv").exists():
        print("measuring costs", flush=True)
        lab.write_csv(out / "costs.csv", measure_costs(settings, datas[0], methods, 2 if args.quick else REPEATS))
    with np.errstate(invalid="ignore"):  # differences of losses that are infinite
        text = tables(out)
        lab.save_text(text, out / "table.md")
        draw_beside(out)
        draw_curves(out)
        draw_rates(out)
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("compare.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
