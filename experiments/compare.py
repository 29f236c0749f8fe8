"""(IA)³ beside its rivals on one base: what each learns, what it costs, how sure that is.

    python -m experiments.compare --quick    # folio, one seed, 60 steps, the rates chosen before: to try it
    python -m experiments.compare            # everything; Ctrl-C and again: it goes on where it was stopped
    python -m experiments.compare --base my.pt --data path/to/folder --forget path/to/another --out out/mine

Protocol. Every method (experiments/rivals.py) trains with train.train() on the same windows in the same order: 1× is
100 steps of 16 windows, AdamW without weight decay, 6 % warmup, cosine decay, gradient norm 1. On the first data
(folio) (IA)³, full fine-tuning and LoRA r = 4 also train 4×, 400 steps.

The learning rate of a method is chosen on the first data's val (256 windows, seed 0, 1×) among five half-decades
around the one it was published with; while the best stands at the grid's edge, the grid grows by one. It is used
everywhere. Nothing else is chosen. The last step is what is reported, on test, which nothing else reads: seeds 1 to 5,
and 1 and 2 at 4×. A seed draws the batches, and the initial values where a method has any that are random; (IA)³ starts
from ones, so for it seeds vary the batches only. It is one base model: no interval here says anything about others.

Intervals are the middle 95 % of 2000 bootstrap resamples of test windows and of seeds, the same for all methods, so
that differences are paired. With few seeds a bootstrap is a little too sure of itself. Where an interval of a
difference holds 0, no ranking is claimed. The gap is what full fine-tuning of as many steps gains over the base.
Forgetting is how much the test loss of --forget (plays, the base's own text) rises while the task is switched on;
switched off, whatever leaves the base's tensors alone forgets nothing, by construction.

Writes into --out what lab.py says of a folder of runs (a run's arrays: nats and targets of every test window, and the
curve of its loss on val), and costs.csv, table.md, gap.png and curves.png.
"""

import argparse
import math
import sys
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
from experiments import lab
from experiments.lab import plt
from experiments.rivals import METHODS, attach
from ia3 import fingerprint
from train import TrainConfig, autocast, lm_loss, train

COMMITTED = lab.RESULTS / "compare"
STEPS = 100
SEEDS = range(1, 6)
LONG = ("full", "lora4", "ia3")
LONG_STEPS = 400
LONG_SEEDS = range(1, 3)
BATCH_SIZE = 16
VAL_WINDOWS = 256  # to choose a learning rate
CURVE_WINDOWS = 32  # of val, for the curves
FORGET_WINDOWS = 512  # of --forget's test
REPEATS = 25
RUNS = {"stage": str, "data": str, "method": str, "lr": float, "steps": int, "seed": int}
RUNS |= {"loss": float, "forgotten": float}
COSTS = {"method": str, "values": int, "linear_flops": int, "attention_flops": int, "saved_bytes": int}
COSTS |= {"peak_bytes": int, "step": float, "step_low": float, "step_high": float}
COSTS |= {"unmerged": float, "unmerged_low": float, "unmerged_high": float}
COSTS |= {"merged": float, "merged_low": float, "merged_high": float, "device": str, "torch": str, "date": str}


# --- a run ---


def load_model(settings, method, seed):
    torch.manual_seed(seed)  # initial values, where they are random
    model = common.load(settings["base"])
    attach(model, method)
    return model.to(settings["device"])


def config_of(settings, **values):
    """The protocol's settings. Weights stay float32 for everyone; on a GPU with bfloat16 all run under autocast."""
    return TrainConfig(
        batch_size=BATCH_SIZE, weight_decay=0.0, eval_windows=CURVE_WINDOWS, dtype=settings["dtype"], **values
    )


def measure(settings, stage, data, method, lr, steps, seed):
    """One run: train, then look at val (stage 'lr') or at test and at forgetting (stage 'test').

    Returns the losses in nats a byte, infinite where training diverged, and the arrays of a test.
    """
    model = load_model(settings, method, seed)
    names = ("train", "val") if stage == "lr" else ("train", "val", "test")
    splits = lab.load_data(settings["folders"][data], model, names)
    config = config_of(settings)
    history = []
    try:
        if method != "base":
            every = steps if stage == "lr" else max(steps // 20, 1)
            config = config_of(settings, steps=steps, lr=lr, seed=seed, eval_interval=every)
            history = train(model, splits, config)
    except FloatingPointError:
        return {"loss": math.inf, "forgotten": math.inf}, {}
    if stage == "lr":
        nats, targets = lab.window_losses(model, splits["val"], config, VAL_WINDOWS)
        return {"loss": nats.sum() / targets.sum() * lab.tokens_a_byte(splits["val"]), "forgotten": None}, {}
    curve = [(row["step"], row["val_loss"] * lab.tokens_a_byte(splits["val"])) for row in history]
    arrays = {"curve": np.array(curve).reshape(-1, 2)}
    arrays["nats"], arrays["targets"] = lab.window_losses(model, splits["test"], config)
    other = lab.load_data(settings["folders"][settings["forget"]], model, ("train", "test"))["test"]
    arrays["forget_nats"], arrays["forget_targets"] = lab.window_losses(model, other, config, FORGET_WINDOWS)
    loss = arrays["nats"].sum() / arrays["targets"].sum() * lab.tokens_a_byte(splits["test"])
    forgotten = arrays["forget_nats"].sum() / arrays["forget_targets"].sum() * lab.tokens_a_byte(other)
    return {"loss": loss, "forgotten": forgotten}, arrays


# --- which runs ---


def rate(i):
    """The i-th half-decade: 1 at 0, 3 at 1, 10 at 2, 0.3 at -1."""
    return float(f"{(1, 3)[i % 2]}e{i // 2}")


def chosen_rates(rows):
    """Return {method: the learning rate of its lowest loss on val}, from the rows of results.csv."""
    best = {}
    for row in rows:
        if row["stage"] == "lr" and (row["method"] not in best or row["loss"] < best[row["method"]]["loss"]):
            best[row["method"]] = row
    return {name: row["lr"] for name, row in best.items()}


def choose_rates(measure_jobs, data):
    """Return {method: learning rate}, the best on data's val. measure_jobs(jobs) returns the rows of their runs."""
    lows = {name: round(2 * math.log10(method.lr)) - 2 for name, method in METHODS.items() if name != "base"}
    highs = {name: low + 4 for name, low in lows.items()}
    while True:
        jobs = []
        for name in lows:
            for i in range(lows[name], highs[name] + 1):
                job = {"stage": "lr", "data": data, "method": name, "lr": rate(i), "steps": STEPS, "seed": 0}
                jobs.append(job)
        rates = chosen_rates(measure_jobs(jobs))
        grown = False
        for name in lows:
            if rates[name] == rate(lows[name]):
                lows[name] -= 1
                grown = True
            elif rates[name] == rate(highs[name]):
                highs[name] += 1
                grown = True
        if not grown:
            return rates


def base_job(data):
    return {"stage": "test", "data": data, "method": "base", "lr": 0.0, "steps": 0, "seed": 0}


def test_jobs(data, rates, steps, seeds, methods):
    """Every method with every seed, at its rate."""
    jobs = []
    for seed in seeds:
        for name in methods:
            job = {"data": data, "method": name, "lr": rates[name], "steps": steps, "seed": seed}
            jobs.append({"stage": "test", **job})
    return jobs


# --- costs ---


def measure_costs(settings, data):
    """Return the rows of costs.csv: what is counted, and what is timed in turns."""
    device = torch.device(settings["device"])
    config = config_of(settings)
    split = lab.load_data(settings["folders"][data], common.load(settings["base"]), ("train", "val"))["train"]
    batch = [t.to(device) for t in split.batch(0, 0, BATCH_SIZE)]
    rows = {}
    steps = {}
    passes = {}  # forward passes of one window, no gradient

    def forward(model):
        with torch.no_grad(), autocast(model, config):
            model(batch[0][:1])

    for name, method in METHODS.items():
        before = lab.allocated(device)
        model = load_model(settings, name, 0)
        rows[name] = dict.fromkeys(COSTS) | {"method": name, "values": 0}
        if name != "base":
            rows[name] |= lab.count_step(model, batch, lm_loss, config)
            steps[name] = lab.training_step(model, batch, lm_loss, config)
            rows[name]["peak_bytes"] = lab.peak_bytes(steps[name], device, before)
        passes[name, "unmerged"] = partial(forward, model)
        if method.merge:
            passes[name, "merged"] = partial(forward, method.merge(model).eval())
    step_times = lab.interleave(steps, REPEATS, device)
    times = lab.interleave(passes, 8 * REPEATS, device, warmup=5)
    for name, row in rows.items():
        found = {what: lab.ratio(times[who, what], times["base", "unmerged"]) for who, what in passes if who == name}
        if name in steps:
            found["step"] = lab.ratio(step_times[name], step_times["full"])
        for what, (middle, low, high) in found.items():
            row |= {what: middle, f"{what}_low": low, f"{what}_high": high}
        row |= {"device": lab.device_name(device), "torch": torch.__version__, "date": f"{date.today()}"}
    return list(rows.values())


# --- tables and pictures, from the files alone ---


def loss_of(name, means):
    return means[name]


def gap_of(name, means):
    """The share of what full fine-tuning gains over the base, in percent."""
    return 100 * (means["base"] - means[name]) / (means["base"] - means["full"])


def beside_ia3(name, means):
    return means[name] - means["ia3"]


def over_base(name, means):
    return means[name] - means["base"]


def read_tests(folder):
    """Return {(data, steps): {method: its runs' arrays, a dict each}}, in the order of METHODS, the base in each."""
    rows, arrays = lab.read_runs(folder, RUNS)
    found = {}
    for row in rows:
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
    """Return {(data, steps): {method: {'loss', 'gap', 'beside', 'forgotten'}}}, each a value and its 95 % interval.

    loss in nats a byte; gap: the share closed, in percent; beside: the loss less (IA)³'s; forgotten: the loss on
    --forget less the base's.
    """
    about = lab.read_about(folder)
    found = {}
    for (data, steps), methods in read_tests(folder).items():
        found[data, steps] = {name: {} for name in methods}
        on_test = {"loss": loss_of, "gap": gap_of, "beside": beside_ia3}
        for kind, text, formulas in (("", data, on_test), ("forget_", about["forget"], {"forgotten": over_base})):
            targets = methods["base"][0][f"{kind}targets"]
            nats = {}  # (seeds, windows), such that the mean is in nats a byte
            for name, runs in methods.items():
                nats[name] = about["tokens_a_byte"][text] * lab.stack_runs(runs, f"{kind}nats", targets)
            keyed = {(name, what): partial(f, name) for what, f in formulas.items() for name in methods}
            for (name, what), value in lab.estimates(nats, targets, keyed).items():
                found[data, steps][name][what] = value
    return found


def mean_curve(runs):
    """The loss on val while the method learned, the mean of its runs: steps and losses, (evaluations,) each."""
    steps, losses = np.mean([run["curve"] for run in runs], axis=0).T
    return steps, losses


def half_gap(methods, name):
    """The first step seen at which a method has half of what full fine-tuning gains by its last, or 'never'."""
    _, full = mean_curve(methods["full"])
    steps, losses = mean_curve(methods[name])
    reached = steps[losses <= (full[0] + full[-1]) / 2]
    return f"{reached[0]:.0f}" if len(reached) else "never"


def tables(folder):
    """The tables, in Markdown, from the files of folder, a Path, alone."""
    tests = read_tests(folder)
    forget = lab.read_about(folder)["forget"]
    rates = {row["method"]: row["lr"] for row in lab.read_csv(folder / "results.csv", RUNS) if row["stage"] == "test"}
    head = ["method", "rate", "test loss", "gap closed, %", "loss less (IA)³'s", "half the gap at step"]
    head.append(f"{forget} forgotten")
    pieces = []
    for (data, steps), found in statistics(folder).items():
        n_seeds = len(tests[data, steps]["ia3"])
        rows = []
        for name, values in found.items():
            row = dict.fromkeys(head, "")
            row["method"] = METHODS[name].title
            row["test loss"] = lab.spread(*values["loss"], ".4f")
            if name != "base":
                row["rate"] = f"{rates[name]:g}"
                row["half the gap at step"] = half_gap(tests[data, steps], name)
                row[f"{forget} forgotten"] = lab.spread(*values["forgotten"], "+.4f")
            if name not in ("base", "full"):
                row["gap closed, %"] = lab.spread(*values["gap"], ".1f")
            if name != "ia3":
                _, low, high = values["beside"]
                row["loss less (IA)³'s"] = lab.spread(*values["beside"], "+.4f")
                if low <= 0 <= high:
                    row["loss less (IA)³'s"] += ", no ranking"
            rows.append(list(row.values()))
        seeds = "1 seed" if n_seeds == 1 else f"{n_seeds} seeds"
        pieces.append(f"**{data}**, {steps} steps of {BATCH_SIZE} windows, {seeds}:")
        pieces.append(lab.markdown(head, rows))
    return "\n\n".join([*pieces, cost_table(lab.read_csv(folder / "costs.csv", COSTS))])


def cost_table(costs):
    """costs: the rows of costs.csv."""
    rows = {row["method"]: row for row in costs}
    if "full" not in rows or not rows.keys() <= METHODS.keys():
        raise ValueError("costs.csv is not of these methods: remove it to measure again")
    full = rows["full"]
    gpu = full["peak_bytes"] is not None
    head = ["method", "values", "%", "FLOPs of a step: linear, attention", "step time", "kept for backward"]
    head += ["peak memory"] * gpu + ["forward", "forward, merged", "a mixed batch"]
    lines = []
    for name, row in rows.items():
        times = {}
        for what in ("step", "unmerged", "merged"):
            times[what] = "" if row[what] is None else lab.spread(row[what], row[f"{what}_low"], row[f"{what}_high"])
        over_full = {}  # what is counted, over full fine-tuning's
        for what in ("linear_flops", "attention_flops", "saved_bytes", "peak_bytes"):
            over_full[what] = "" if row[what] is None else f"{row[what] / full[what]:.3f}"
        flops = "" if name == "base" else f"{over_full['linear_flops']}, {over_full['attention_flops']}"
        line = [METHODS[name].title, f"{row['values']:,}", f"{100 * row['values'] / full['values']:.3g}", flops]
        line += [times["step"], over_full["saved_bytes"]] + [over_full["peak_bytes"]] * gpu
        lines.append([*line, times["unmerged"], times["merged"] or "does not merge", METHODS[name].mixes])
    made = f"{full['device']}, torch {full['torch']}, {full['date']}"
    return (
        f"What they cost ({made}; medians and quartiles):\n\n{lab.markdown(head, lines)}\n\n"
        "Steps, memory and FLOPs over full fine-tuning's; forward passes of one window over the base's. Gradients and\n"
        "AdamW's averages take 12 bytes a value, a file 4."
    )


def draw(folder):
    """Write gap.png, the gap closed against values trained, and curves.png, val loss against steps; panels by data."""
    values = {row["method"]: row["values"] for row in lab.read_csv(folder / "costs.csv", COSTS)}
    tests = read_tests(folder)
    found = statistics(folder)
    size = (4 * len(found) + 2, 4)
    gaps, gap_axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    curves, curve_axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    for column, (data, steps) in enumerate(found):
        for i, (name, method) in enumerate(METHODS.items()):
            if name != "base" and name in found[data, steps]:
                middle, low, high = found[data, steps][name]["gap"]
                bars = [[middle - low], [high - middle]]
                style = {"color": f"C{i}", "label": method.title}
                gap_axes[0, column].errorbar(values[name], middle, bars, fmt="o", capsize=3, **style)
                curve_axes[0, column].plot(*mean_curve(tests[data, steps][name]), **style)
        gap_axes[0, column].set(xscale="log", title=f"{data}, {steps} steps", xlabel="values trained")
        curve_axes[0, column].set(title=f"{data}, {steps} steps", xlabel="step")
    gap_axes[0, 0].set_ylabel("gap closed on test (%)")
    curve_axes[0, 0].set_ylabel("val loss (nats a byte)")
    for figure, axes, name in ((gaps, gap_axes, "gap.png"), (curves, curve_axes, "curves.png")):
        for ax in axes[0]:
            ax.grid(alpha=0.3)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        lab.save_picture(figure, folder / name)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--data", nargs="+", default=["folio", "kjv"], help="names under data/ or folders with a test")
    parser.add_argument("--forget", default="plays", help="whose test shows forgetting (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda or cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first data, one seed, 60 steps; into OUT/quick")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"workers must be at least 1, not {args.workers}")
    device, dtype = common.pick_device(args.device)
    base = common.load(args.base)
    names = args.data[:1] if args.quick else args.data
    folders = {Path(name).name: name for name in [*names, args.forget]}
    if len(folders) < len({*names, args.forget}):
        raise ValueError("two of these folders have the same name, and runs go by it: rename one")
    datas = [Path(name).name for name in names]
    forget = Path(args.forget).name
    about = {"fingerprint": fingerprint(base), "forget": forget, "dtype": dtype, "quick": args.quick}
    about |= {"data_hash": {}, "tokens_a_byte": {}}
    for name, folder in folders.items():  # a missing file is told now, not after an hour
        splits = lab.load_data(folder, base, ("train", "val", "test"))
        about["data_hash"][name] = splits["train"].data_hash()[:16] + splits["test"].data_hash()[:16]
        about["tokens_a_byte"][name] = lab.tokens_a_byte(splits["test"])
    out = args.out / "quick" if args.quick else args.out
    lab.open_folder(out, about)
    settings = {"base": args.base, "folders": folders, "forget": forget, "device": str(device), "dtype": dtype}

    def measure_jobs(jobs):
        return lab.measure_all(jobs, partial(measure, settings), RUNS, out, args.workers)

    if args.quick:
        rates = chosen_rates(lab.read_csv(COMMITTED / "results.csv", RUNS))
        measure_jobs([base_job(datas[0]), *test_jobs(datas[0], rates, 60, [1], rates)])
    else:
        rates = choose_rates(measure_jobs, datas[0])
        jobs = []
        for data in datas:
            jobs += [base_job(data), *test_jobs(data, rates, STEPS, SEEDS, rates)]
        measure_jobs(jobs + test_jobs(datas[0], rates, LONG_STEPS, LONG_SEEDS, LONG))
    if not (out / "costs.csv").exists():
        print("measuring costs", flush=True)
        lab.write_csv(out / "costs.csv", measure_costs(settings, datas[0]))
    text = tables(out)
    lab.save_text(text, out / "table.md")
    draw(out)
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("compare.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
