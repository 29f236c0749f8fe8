"""(IA)³ beside its rivals on one base: what each learns, what it costs, how sure that is.

    python experiments/compare.py --quick            # folio, one seed, 60 steps, the rates chosen before: to try it
    python experiments/compare.py                    # everything; Ctrl-C and again: it goes on where it was stopped
    python experiments/compare.py --init gpt2 --data path/to/folder --forget path/to/another --out out/gpt2

Protocol. Every method (experiments/methods.py) trains with train.train() on the same windows in the same order: 1× is
100 steps of 16 windows of block_size tokens, AdamW without weight decay, 6 % warmup, cosine decay, gradient norm 1.
On the first data (folio) (IA)³, full fine-tuning and LoRA r = 4 also train 4×, 400 steps.

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

Writes runs.csv (every run), costs.csv, windows.npz (nats of every test window, for statistics of your own),
curves.csv, table.md, gap.png and curves.png into --out.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as datasets
from experiments.clock import count_flops, count_saved, device_name, interleave, ratio
from experiments.methods import METHODS
from experiments.runs import measure_all, open_folder, read_csv, write_csv
from experiments.windows import bootstrap, interval, window_losses
from ia3 import fingerprint
from model import GPT, pick_device
from train import TrainConfig, autocast, train

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "experiments/results/compare"
STEPS, SEEDS = 100, range(1, 6)
LONG_STEPS, LONG_SEEDS = 400, range(1, 3)
LONG = ("full", "lora4", "ia3")
BATCH_SIZE = 16
VAL_WINDOWS = 256  # to choose a learning rate
CURVE_WINDOWS = 32  # of val, for the curves
FORGET_WINDOWS = 512  # of --forget's test
REPEATS = 25


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    init: str
    forget: str
    device: str
    dtype: str
    out: Path


# --- a run ---


def load_model(settings, method, seed):
    torch.manual_seed(seed)  # initial values, where they are random
    model = GPT.from_pretrained(settings.init)
    METHODS[method].attach(model)
    return model.to(settings.device)


def load_data(name, model, splits):
    return datasets.load(name, model.tokenizer, model.config.vocab_size, model.config.block_size, splits)


def per_byte(split):
    """Tokens a byte: a loss in nats a token times this is in nats a byte; 1 where the text's length is unknown."""
    return split.n_tokens / split.n_bytes if split.n_bytes else 1.0


def config_of(settings, **values):
    """The protocol's settings. Weights stay float32 for everyone; on a GPU with bfloat16 all run under autocast."""
    return TrainConfig(
        batch_size=BATCH_SIZE, weight_decay=0.0, eval_windows=CURVE_WINDOWS, dtype=settings.dtype, **values
    )


def path_of(out, data, method, steps, seed):
    return out / "windows" / f"{Path(data).name}-{method}-{steps}-{seed}.npz"


def measure(settings, stage, data, method, lr, steps, seed):
    """One run: train, then look at val (stage 'lr') or at test and at forgetting (stage 'test').

    Returns the losses in nats a byte; nats of every test window and the curve go to a file of the run's own.
    """
    model = load_model(settings, method, seed)
    splits = load_data(data, model, ("train", "val") if stage == "lr" else ("train", "val", "test"))
    config, history = config_of(settings), []
    try:
        if method != "base":
            every = steps if stage == "lr" else max(steps // 20, 1)
            config = config_of(settings, steps=steps, lr=lr, seed=seed, eval_interval=every)
            history = train(model, splits, config)
    except FloatingPointError:
        return {"loss": math.inf, "forgotten": math.inf}
    if stage == "lr":
        nats, targets = window_losses(model, splits["val"], config, VAL_WINDOWS)
        return {"loss": nats.sum() / targets.sum() * per_byte(splits["val"]), "forgotten": ""}
    nats, targets = window_losses(model, splits["test"], config)
    other = load_data(settings.forget, model, ("train", "test"))["test"]
    other_nats, other_targets = window_losses(model, other, config, FORGET_WINDOWS)
    curve = [(row["step"], row["val_loss"] * per_byte(splits["val"])) for row in history]
    path = path_of(settings.out, data, method, steps, seed)
    path.parent.mkdir(exist_ok=True)
    np.savez(
        path,
        nats=coarse(nats),
        targets=targets,
        per_byte=per_byte(splits["test"]),
        forget_nats=coarse(other_nats),
        forget_targets=other_targets,
        forget_per_byte=per_byte(other),
        curve=np.array(curve, dtype=np.float64).reshape(-1, 2),
    )
    forgotten = other_nats.sum() / other_targets.sum() * per_byte(other)
    return {"loss": nats.sum() / targets.sum() * per_byte(splits["test"]), "forgotten": forgotten}


def coarse(nats):
    """A window's nats, about 200, to 1/64: what is lost is below every digit shown, and the rest packs well."""
    return np.float32(np.round(64 * nats) / 64)


# --- choosing rates ---


def rate(i):
    """The i-th half-decade: 1 at 0, 3 at 1, 10 at 2, 0.3 at -1."""
    return float(f"{(1, 3)[i % 2]}e{i // 2}")


def chosen_rates(rows):
    """Return {method: the learning rate of its lowest loss on val}, from the rows of runs.csv."""
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
        jobs = [
            {"stage": "lr", "data": data, "method": name, "lr": rate(i), "steps": STEPS, "seed": 0}
            for name in lows
            for i in range(lows[name], highs[name] + 1)
        ]
        rates = chosen_rates(measure_jobs(jobs))
        at_low = [name for name in lows if rates[name] == rate(lows[name])]
        at_high = [name for name in lows if rates[name] == rate(highs[name])]
        if not at_low and not at_high:
            return rates
        lows |= {name: lows[name] - 1 for name in at_low}
        highs |= {name: highs[name] + 1 for name in at_high}


def test_jobs(datas, rates, steps, seeds, methods):
    """The base once, and every method with every seed."""
    jobs = []
    for data in datas:
        jobs.append({"stage": "test", "data": data, "method": "base", "lr": 0.0, "steps": 0, "seed": 0})
        for seed in seeds:
            for name in methods:
                job = {"data": data, "method": name, "lr": rates[name], "steps": steps, "seed": seed}
                jobs.append({"stage": "test", **job})
    return jobs


# --- costs ---


def a_step(model, batch, config):
    """Return a call that does one training step, with an optimizer of its own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)

    def step():
        with autocast(model, config):
            loss = model(*batch)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count(settings, name, batch):
    """What a method costs and can be counted. Returns a dict of a row of costs.csv."""
    config = config_of(settings)
    model = load_model(settings, name, 0)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    values = sum(p.numel() for p in trained.values())
    row = {"method": name, "values": values, "percent": 100 * values / METHODS["full"].count(model.config)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "task.npz")
        if name == "ia3":
            model.ia3.save(path)
        else:
            np.savez(path, **{key: p.detach().cpu().numpy() for key, p in trained.items()})
        row["disk"] = path.stat().st_size if trained else 0
    nothing = {"state": 0, "linear_flops": 0, "attention_flops": 0, "saved": 0, "peak": ""}
    if not trained:
        return row | nothing

    def forward():
        with autocast(model, config):
            return model(*batch)[1]

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    row["linear_flops"], row["attention_flops"] = count_flops(lambda: forward().backward())
    row["saved"] = count_saved(forward, model)
    row["peak"] = ""
    if batch[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    row["state"] = sum(p.grad.nbytes for p in trained.values() if p.grad is not None)
    row["state"] += sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim() > 0)
    if batch[0].device.type == "cuda":
        forward().backward()
        row["peak"] = torch.cuda.max_memory_allocated()
    return row


def measure_costs(settings, data, repeats):
    """Return the rows of costs.csv: what is counted, and what is timed in turns."""
    device, config = torch.device(settings.device), config_of(settings)
    split = load_data(data, GPT.from_pretrained(settings.init), ("train", "val"))["train"]
    batch = [t.to(device) for t in split.batch(0, 0, BATCH_SIZE)]
    window = batch[0][:1]  # latency: one window, no gradient
    rows = {name: count(settings, name, batch) for name in METHODS}

    models = {name: load_model(settings, name, 0) for name in METHODS}
    steps = {name: a_step(model, batch, config) for name, model in models.items() if name != "base"}
    step_times = interleave(steps, repeats, device)

    @torch.no_grad()
    def forward(model):
        with autocast(model, config):
            model(window)

    unmerged = {name: partial(forward, model.eval()) for name, model in models.items()}
    merged = {
        (name, "merged"): partial(forward, METHODS[name].merge(model).eval())
        for name, model in models.items()
        if METHODS[name].merge
    }
    times = interleave(unmerged | merged, 8 * repeats, device, warmup=5)
    for name, row in rows.items():
        found = {
            "step": ratio(step_times[name], step_times["full"]) if name in steps else ("", "", ""),
            "unmerged": ratio(times[name], times["base"]),
            "merged": ratio(times[name, "merged"], times["base"]) if METHODS[name].merge else ("", "", ""),
        }
        for what, (middle, low, high) in found.items():
            row |= {what: middle, f"{what}_low": low, f"{what}_high": high}
        row["window_seconds"] = median(times[name, "merged"]) if METHODS[name].merge else ""
        row["device"], row["torch"], row["date"] = device_name(device), torch.__version__, f"{date.today()}"
    return list(rows.values())


# --- tables and pictures, from the files alone ---


def pack(out, rows):
    """Gather the files of the test runs into windows.npz and curves.csv."""
    packed, curves = {}, []
    for row in rows:
        path = path_of(out, *(row[key] for key in ("data", "method", "steps", "seed")))
        if not path.exists():
            raise ValueError(f"{path} is missing, of a run that runs.csv lists: another --out")
        file, data = np.load(path), Path(row["data"]).name
        key = f"{data}/{row['method']}/{row['steps']}"
        for what in ("nats", "forget_nats"):
            packed.setdefault(f"{key}/{what}", []).append(file[what])  # (seeds, windows)
        for what in ("targets", "per_byte", "forget_targets", "forget_per_byte"):
            packed[f"{data}/{what}"] = file[what]
        for step, loss in file["curve"]:
            about = {"data": data, "method": row["method"], "steps": row["steps"], "seed": row["seed"]}
            curves.append(about | {"step": int(step), "val_loss": float(loss)})
    np.savez_compressed(out / "windows.npz", **packed)
    write_csv(out / "curves.csv", curves)


def statistics(out):
    """Return {(data, steps): {method: {'loss', 'gap', 'beside', 'forgotten'}}}, each a value and its 95 % interval.

    From windows.npz. loss in nats a byte; gap: the share closed, in percent; beside: the loss less (IA)³'s; forgotten:
    the loss on --forget less the base's.
    """
    file = np.load(out / "windows.npz")
    runs = [key.split("/") for key in file if key.endswith("/nats")]  # data, method, steps, 'nats'
    found = {}
    for data, steps in sorted({(data, int(steps)) for data, method, steps, _ in runs if method != "base"}):
        keys = {method: f"{data}/{method}/{n}" for d, method, n, _ in runs if d == data and int(n) in (0, steps)}
        means, draws = {}, {}
        for what in ("nats", "forget_nats"):
            targets = file[f"{data}/{what}".replace("nats", "targets")]
            scale = file[f"{data}/{what}".replace("nats", "per_byte")]
            nats = {name: scale * file[f"{keys[name]}/{what}"].astype(np.float64) for name in METHODS if name in keys}
            means[what] = {name: matrix.mean(0).sum() / targets.sum() for name, matrix in nats.items()}
            draws[what] = bootstrap(nats, targets)

        def value(formula, what, name, means=means, draws=draws):
            return formula(means[what], name), *interval(formula(draws[what], name))

        found[data, steps] = {
            name: {
                "loss": value(lambda m, name: m[name], "nats", name),
                "gap": value(lambda m, name: 100 * (m["base"] - m[name]) / (m["base"] - m["full"]), "nats", name),
                "beside": value(lambda m, name: m[name] - m["ia3"], "nats", name),
                "forgotten": value(lambda m, name: m[name] - m["base"], "forget_nats", name),
            }
            for name in METHODS
            if name in keys
        }
    return found


def mean_curves(out):
    """Return {(data, steps, method): [(step, val loss, the mean over seeds)]}, from curves.csv."""
    losses = {}
    for row in read_csv(out / "curves.csv"):
        at = losses.setdefault((row["data"], row["steps"], row["method"]), {})
        at.setdefault(row["step"], []).append(row["val_loss"])
    return {key: [(step, float(np.mean(found))) for step, found in at.items()] for key, at in losses.items()}


def half_gap(curves, data, steps, method):
    """The first step seen at which a method has half of what full fine-tuning gains by its last, or None."""
    full = curves[data, steps, "full"]
    half = (full[0][1] + full[-1][1]) / 2
    return next((step for step, loss in curves[data, steps, method] if loss <= half), None)


def tables(out):
    """The README's tables, in Markdown, from the files of out alone."""
    curves, rows = mean_curves(out), read_csv(out / "runs.csv")
    costs, about = read_csv(out / "costs.csv"), json.loads((out / "about.json").read_text())
    rates, lines = {row["method"]: row["lr"] for row in rows if row["stage"] == "test"}, []
    for (data, steps), found in statistics(out).items():
        seeds = {row["seed"] for row in rows if (Path(row["data"]).name, row["steps"]) == (data, steps)} - {0}
        lines += [
            f"**{data}**, {steps} steps of {BATCH_SIZE} windows, {len(seeds)} seed{'s' * (len(seeds) > 1)}:",
            "",
            f"| method | rate | test loss | gap closed, % | loss less (IA)³'s | half the gap at step |"
            f" {about['forget']} forgotten |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, values in found.items():
            loss, gap, beside, forgotten = (values[key] for key in ("loss", "gap", "beside", "forgotten"))
            equal = beside[1] <= 0 <= beside[2]
            cells = [
                METHODS[name].title,
                f"{rates[name]:g}" if name != "base" else "",
                "{:.4f} ({:.4f} to {:.4f})".format(*loss),
                "{:.1f} ({:.1f} to {:.1f})".format(*gap) if name not in ("base", "full") else "",
                ("{:+.4f} ({:+.4f} to {:+.4f})" + ", no ranking" * equal).format(*beside) if name != "ia3" else "",
                str(half_gap(curves, data, steps, name) or "never") if name != "base" else "",
                "{:+.4f} ({:+.4f} to {:+.4f})".format(*forgotten) if name != "base" else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    full = next(row for row in costs if row["method"] == "full")
    gpu = full["peak"] != ""
    lines += [
        f"What they cost ({costs[0]['device']}, torch {costs[0]['torch']}, {costs[0]['date']}; medians and quartiles):",
        "",
        "| method | values | % | bytes on disk | optimizer and gradients, bytes | FLOPs of a step: linear, attention |"
        f" step time | kept for backward |{' peak memory |' * gpu} forward | forward, merged | a mixed batch |",
        "|" + " --- |" * (11 + gpu),
    ]
    for row in costs:
        times = {
            what: "{:.2f} ({:.2f} to {:.2f})".format(row[what], row[f"{what}_low"], row[f"{what}_high"])
            if row[what] != ""
            else ""
            for what in ("step", "unmerged", "merged")
        }
        trained = row["values"] > 0
        cells = [METHODS[row["method"]].title, f"{row['values']:,}", f"{row['percent']:.3g}", f"{row['disk']:,}"]
        cells += [
            f"{row['state']:,}" if trained else "",
            f"{row['linear_flops'] / full['linear_flops']:.3f}, {row['attention_flops'] / full['attention_flops']:.3f}"
            if trained
            else "",
            times["step"],
            f"{row['saved'] / full['saved']:.3f}" if trained else "",
            *([f"{row['peak'] / full['peak']:.3f}" if trained else ""] if gpu else []),
            times["unmerged"],
            times["merged"] or "does not merge",
            METHODS[row["method"]].mixes,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Steps, memory and FLOPs over full fine-tuning's; forward passes of one window over the base's."]
    return "\n".join(lines)


def draw_gap(out, path):
    """Share of the gap closed against the number of values trained, a panel a data and number of steps."""
    found, values = statistics(out), {row["method"]: row["values"] for row in read_csv(out / "costs.csv")}
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found) + 2, 4), layout="constrained", squeeze=False)
    for ax, ((data, steps), methods) in zip(axes[0], found.items(), strict=True):
        for i, name in enumerate(METHODS):
            if name in methods and name != "base":
                middle, low, high = methods[name]["gap"]
                bars = [[middle - low], [high - middle]]
                ax.errorbar(values[name], middle, bars, fmt="o", color=f"C{i}", capsize=3, label=METHODS[name].title)
        ax.set(xscale="log", title=f"{data}, {steps} steps", xlabel="values trained")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("gap closed on test (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(out, path):
    """Val loss against steps, the mean over seeds, a panel a data and number of steps."""
    curves = mean_curves(out)
    panels = list(dict.fromkeys((data, steps) for data, steps, _ in curves))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained", squeeze=False)
    for ax, (data, steps) in zip(axes[0], panels, strict=True):
        for i, (name, method) in enumerate(METHODS.items()):
            if (data, steps, name) in curves:
                ax.plot(*zip(*curves[data, steps, name], strict=True), f"C{i}", label=method.title)
        ax.set(title=f"{data}, {steps} steps", xlabel="step")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("val loss (nats a byte)")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--init", default=str(ROOT / "data/base.pt"), help="the base (default: data/base.pt)")
    parser.add_argument("--data", nargs="+", default=["folio", "kjv"], help="names under data/ or folders with a test")
    parser.add_argument("--forget", default="plays", help="whose test shows forgetting (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda or cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="see train.py")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first data, one seed, 60 steps; into OUT/quick")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"workers must be at least 1, not {args.workers}")
    out = args.out / "quick" if args.quick else args.out
    device, dtype = pick_device(args.device, args.dtype)
    settings = Settings(args.init, args.forget, str(device), dtype, out)
    base = GPT.from_pretrained(args.init)
    datas = args.data[:1] if args.quick else args.data
    names = [Path(data).name for data in [*datas, args.forget]]
    for data in [*datas, args.forget]:  # a missing file is told now, not after an hour
        load_data(data, base, ("train", "val", "test"))
    about = {"base": fingerprint(base)[:16], "data": " ".join(names[:-1]), "forget": names[-1], "dtype": dtype}
    open_folder(out, about | {"quick": args.quick, "batch_size": BATCH_SIZE, "block_size": base.config.block_size})

    def measure_jobs(jobs):
        return measure_all(jobs, partial(measure, settings), out / "runs.csv", args.workers)

    if args.quick:
        rates = chosen_rates(read_csv(COMMITTED / "runs.csv"))
        jobs = test_jobs(datas, rates, 60, [1], rates)
    else:
        rates = choose_rates(measure_jobs, datas[0])
        jobs = test_jobs(datas, rates, STEPS, SEEDS, rates) + test_jobs(datas[:1], rates, LONG_STEPS, LONG_SEEDS, LONG)
        jobs = list({tuple(job.values()): job for job in jobs}.values())  # the base once
    rows = measure_jobs(jobs)
    if not (out / "costs.csv").exists():
        print("measuring costs", flush=True)
        write_csv(out / "costs.csv", measure_costs(settings, datas[0], REPEATS))
    if (out / "windows").exists():
        pack(out, rows)
    (out / "table.md").write_text(tables(out) + "\n")
    draw_gap(out, out / "gap.png")
    draw_curves(out, out / "curves.png")
    print(tables(out))
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"compare.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
