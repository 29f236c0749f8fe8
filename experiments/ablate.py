"""Which sites matter, where, and trained how: one axis at a time around one reference, for any base and any data.

    python -m experiments.ablate                              # sites, depth, steps; again: continues
    python -m experiments.ablate --quick                      # the same in small, minutes: to see that it works
    python -m experiments.ablate --sites --lr 0.03 0.1 0.3    # these two axes, each alone
    python -m experiments.ablate --sites k,v ff --lr 0.03 0.1 --cross --out out/crossed    # every pair of them
    python -m experiments.ablate --base my.pt --data path/to/folder --depth --out out/mine

**What is compared.** The reference is (IA)³ in full: k,v,ff in all layers, trained as the --ref flags say. An axis flag
varies one setting around it, over the values named or, with none named, over those that --help lists. Every run is
compared with the reference's run of the same seed on the same works.

**Data.** Runs train on train and are measured on all of val, by which ablations may choose; test stays unread. A loss
is the mean of the works'.

**Interval.** Student's t over the seeds' differences. It says nothing of other works: folio's val is two plays, and the
difference on each stands beside it.

**Other sites at equal count.** The paper (section 3.3) found by experiments that it does not show that keys, values and
the MLP's hidden activations are enough. Here one of the three makes room for another site of the same width (sites.py):
the attention's output behind W_o for values, the MLP before its GELU for the MLP behind it, the residual stream for
keys; then q, o and pre for all three. These four train 6,912 values, as k,v,ff does. The fifth is all seven sites,
whether they add anything. (Queries for keys would be k,v,ff again: on GPT-2 l_q and l_k meet in one product.) Each has
the three rates and the one seed of the crossed ablation of k, v and ff, and is compared at the rate that is best for it
on val. Written down before any of these runs was made:

    python -m experiments.ablate --sites k,o,ff k,v,pre v,ff,x q,o,pre q,k,v,o,pre,ff,x --lr 0.03 0.1 0.3 --cross \
        --out experiments/results/ablation-rates

**Three seeds of the same**, written down when the runs above were known and before any of these was made. 0.1 is the
best rate of k,v,ff and of all four sets of its size, so each set is trained at it with the seeds 1 to 3:

    python -m experiments.ablate --sites k,v,ff k,o,ff k,v,pre v,ff,x q,o,pre q,k,v,o,pre,ff,x --seeds 3 \
        --out experiments/results/ablation-sites

**Files** in --out: what lab.py says of a folder of runs (the base's own row has the sites 'none'), table.md, and a
picture an axis.
"""

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
from experiments import clocks, lab
from experiments.sites import ORDER, attach_sites
from ia3 import attach, fingerprint
from tools.plot import plt, save_picture
from train import TrainConfig, train

AXES = {"sites": "sites", "depth": "layers", "lr": "learning rate", "steps": "steps"}  # and their names in tables
DEPTHS = ["all", "first-half", "second-half"]  # or a layer's number
BATCH_SIZE = 16


# --- a run ---


class Job(NamedTuple):
    """What is known of a run in advance: a value on each of AXES, and the seed.

    A point is a Job of seed 0: it stands for the runs of all seeds.
    """

    sites: str  # 'none': the base, not trained
    depth: str
    lr: float
    steps: int
    seed: int = 0


@dataclass
class Result:
    values: int  # how many are trained
    loss: float  # nats a byte, the mean of val's works; infinite where training diverged


def layers(depth, n_layer):
    """The layers that 'all', 'first-half', 'second-half' or a number stands for; an odd middle one is in the second."""
    half = n_layer // 2
    parts = {"all": range(n_layer), "first-half": range(half), "second-half": range(half, n_layer)}
    parts |= {str(i): [i] for i in range(n_layer)}
    if not parts.get(depth):  # one layer has no first half
        raise ValueError(f"depth must be {', '.join(DEPTHS)}, or a layer from 0 to {n_layer - 1}, not {depth}")
    return list(parts[depth])


def hold(vectors, chosen):
    """Let only the chosen layers of vectors learn. Returns the number of values trained.

    The others' gradient is always zero, so Adam never moves them: they stay ones, that is, no vector at all.
    """
    mask = torch.zeros(vectors.config.n_layer, 1, device=next(vectors.parameters()).device)
    mask[chosen] = 1
    for p in vectors.parameters():
        p.register_hook(lambda grad: grad * mask)
    return vectors.count() * len(chosen) // vectors.config.n_layer


def measure(settings, job):
    """Train as the job says and measure on val. Returns its Result and lab.work_losses' arrays.

    settings: the command line's base, data and device.
    """
    device = common.pick_device(settings["device"])
    dtype = common.pick_dtype(device)
    model = common.load(settings["base"], getattr(torch, dtype)).to(device)  # frozen, so it is stored as it computes
    data = lab.load_data(settings["data"], model, ("train", "val"))
    # what counts is measured below, so the run itself looks at one window of val
    evaluations = {"eval_interval": job.steps, "eval_windows": 1}
    config = TrainConfig(lr=job.lr, steps=job.steps, seed=job.seed, batch_size=BATCH_SIZE, dtype=dtype, **evaluations)
    n_values = 0
    diverged = False
    if job.sites != "none":
        vectors = attach_sites(model, job.sites.split(","))
        n_values = hold(vectors, layers(job.depth, model.config.n_layer))
        try:
            train(model, data, config)
        except FloatingPointError:
            diverged = True
    works = lab.read_works(settings["data"], "val", model)
    found = lab.work_losses(model, works, config, diverged=diverged)
    return Result(n_values, float(lab.stack_works([found]).mean())), found


def all_jobs(values_of_axis, reference, n_seeds, cross):
    """Every run once: the base, then the axes' values, each axis alone or all of them crossed; seed by seed.

    To the values of an axis the reference's own is added. reference: a point.
    """
    with_reference = {axis: [*values, getattr(reference, axis)] for axis, values in values_of_axis.items()}
    grids = [with_reference] if cross else [{axis: values} for axis, values in with_reference.items()]
    jobs = [reference._replace(sites="none", seed=1)]
    for grid in grids:
        for seed in range(1, n_seeds + 1):
            for values in itertools.product(*grid.values()):
                changes = dict(zip(grid, values, strict=True))
                jobs.append(reference._replace(seed=seed, **changes))
    return list(dict.fromkeys(jobs))  # the reference is on every axis


# --- comparing, from the files alone ---


@dataclass
class Record:
    """A point's runs, over the seeds that all points of its axis have."""

    point: Job | None  # None: the base
    is_reference: bool
    n_values: int  # trained
    loss: float  # the mean over works and seeds
    n_seeds: int
    n_diverged: int
    difference: tuple | None  # to the reference, (value, low, high) over the seeds; None where either diverged
    by_work: np.ndarray | None  # (works,) the same by work


def read_points(folder, reference):
    """Return {point: {seed: losses of the works}}, {point: values trained}, and the losses of the base.

    Raises ValueError where the runs are not this command's.
    """
    results, arrays = lab.load_runs(folder, Job, Result)
    base = reference._replace(sites="none", seed=1)
    if base not in results or reference._replace(seed=1) not in results:
        raise ValueError(f"{folder} lacks runs of the base or of the reference: the command measures them")
    stacked = lab.stack_works([lab.arrays_of(job, arrays, folder) for job in results])
    losses = dict(zip(results, stacked, strict=True))
    points = {}
    n_values = {}
    for job in results:
        if job == base:
            continue
        if not set(job.sites.split(",")) <= set(ORDER) or not (job.depth in DEPTHS or job.depth.isdecimal()):
            raise ValueError(f"{folder}/results.csv has a run of sites {job.sites}, depth {job.depth}: remove it")
        point = job._replace(seed=0)
        points.setdefault(point, {})[job.seed] = losses[job]
        n_values[point] = results[job].values
    points = {point: seeds for point, seeds in points.items() if 1 in seeds}  # others: a command that was stopped
    return points, n_values, losses[base]


def summarize(folder):
    """Compare the points of every axis with the reference. Returns {axes: Records}: (axis,), or several if crossed.

    The first Record is the base's.
    """
    about = lab.read_about(folder)
    reference = Job(**about["reference"])
    points, n_values, base = read_points(folder, reference)
    changed = {point: changed_axes(point, reference) for point in points}
    varied = [axis for axis in AXES if axis in set.union(*changed.values())]
    groups = [tuple(varied)] if about["crossed"] else [(axis,) for axis in varied]
    summary = {}
    for axes in groups:
        along = sorted((point for point in points if changed[point] <= set(axes)), key=order)
        seeds = sorted(set.intersection(*[set(points[point]) for point in along]))
        theirs = np.stack([points[reference][seed] for seed in seeds])  # (seeds, works)
        of_base = np.tile(base, (len(seeds), 1))  # not trained: its one run stands for every seed
        records = [record_of(None, False, 0, of_base, theirs)]
        for point in along:
            ours = np.stack([points[point][seed] for seed in seeds])
            records.append(record_of(point, point == reference, n_values[point], ours, theirs))
        summary[axes] = records
    return summary


def changed_axes(point, reference):
    """The axes on which a point has another value than the reference."""
    return {axis for axis in AXES if getattr(point, axis) != getattr(reference, axis)}


def order(point):
    """The key by which points are sorted, axis by axis: fewer sites first; all layers, halves, then single layers."""
    sites = point.sites.split(",")
    depth = DEPTHS.index(point.depth) if point.depth in DEPTHS else len(DEPTHS) + int(point.depth)
    return len(sites), [ORDER.index(site) for site in sites], depth, point.lr, point.steps


def record_of(point, is_reference, n_values, ours, theirs):
    """The Record of a point beside the reference's runs. ours, theirs: losses, (seeds, works)."""
    difference = by_work = None
    if np.isfinite(ours).all() and np.isfinite(theirs).all():
        difference = lab.student((ours - theirs).mean(1))
        by_work = (ours - theirs).mean(0)
    n_diverged = int((~np.isfinite(ours).all(1)).sum())
    return Record(point, is_reference, n_values, ours.mean(), len(ours), n_diverged, difference, by_work)


# --- tables and pictures ---


def value_text(axis, point):
    """A point's value on an axis, as tables and pictures have it."""
    value = getattr(point, axis)
    if axis == "depth" and value not in DEPTHS:
        return f"layer {value}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def cells(axes, record):
    """A record's line in the table of axes."""
    if record.point is None:
        names = ["the base", *[""] * (len(axes) - 1)]
    else:
        names = [value_text(axis, record.point) for axis in axes]
    loss = f"diverged, {record.n_diverged} of {record.n_seeds}" if record.n_diverged else f"{record.loss:.4f}"
    change = interval = by_work = ""
    if record.is_reference:
        change = "reference"
    elif record.difference is not None:
        value, low, high = record.difference
        change = f"{value:+.4f}"
        by_work = ", ".join(f"{of_work:+.4f}" for of_work in record.by_work)
        if record.n_seeds > 1:
            interval = f"{low:+.4f} to {high:+.4f}"
            if low <= 0 <= high:
                interval += ", not distinguished"
    return [*names, f"{record.n_values:,}", loss, change, interval, by_work]


def tables(folder):
    """The Markdown tables, one an axis, of the runs in folder, a Path, from its files alone."""
    about = lab.read_about(folder)
    reference = Job(**about["reference"])
    works = ", ".join(about["works"])
    pieces = []
    for axes, records in summarize(folder).items():
        head = [*[AXES[axis] for axis in axes], "values trained", "nats a byte", "difference", "95 %, over seeds"]
        pieces.append(lab.markdown([*head, "difference, by work"], [cells(axes, record) for record in records]))
        told = [f"{about['data']}/val ({works}), {lab.count_seeds(records[0].n_seeds)}"]
        told += [f"{AXES[axis]} {value_text(axis, reference)}" for axis in AXES if axis not in axes]
        told.append(f"{BATCH_SIZE} windows of {about['block_size']} tokens a step.")
        pieces.append("; ".join(told))
    return "\n\n".join(pieces)


def half_width(record):
    """Half of the difference's interval, which is symmetric; 0 where there is none."""
    if record.difference is None or record.n_seeds == 1:
        return 0.0
    value, low, _ = record.difference
    return value - low


def lines_of(axes, records, numeric):
    """Return {label: [(x, loss, half of the interval)]} and {x: its name}. What diverged has the loss NaN."""
    *others, last = axes
    lines = {}
    ticks = {}
    for record in records:
        label = ", ".join(value_text(axis, record.point) for axis in others)
        name = value_text(last, record.point)
        x = getattr(record.point, last) if numeric else name.replace("-", "\n")  # names stand close together
        loss = math.nan if record.n_diverged else record.loss
        lines.setdefault(label, []).append((x, loss, half_width(record)))
        ticks[x] = name
    return lines, ticks


def draw_picture(axes, records, path):
    """The loss along the last of the axes, a line for every point of the others; bars: 95 % of the difference."""
    base, *records = records
    *others, last = axes
    numeric = last in ("lr", "steps")
    lines, ticks = lines_of(axes, records, numeric)
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    panel.axhline(base.loss, color="k", ls="--", lw=1, label="the base")
    for label, line in lines.items():
        xs, losses, halves = zip(*line, strict=True)
        panel.errorbar(xs, losses, halves, fmt="o-" if numeric or others else "o", ms=4, capsize=3, label=label)
    for x, loss, _ in itertools.chain(*lines.values()):
        if math.isnan(loss):
            panel.plot(x, 0.5, "kx", transform=panel.get_xaxis_transform())
    if numeric:
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set(xlabel=AXES[last], ylabel="loss on val (nats a byte)")
    bars = "bars: 95 % of the difference to the reference, over seeds" if base.n_seeds > 1 else "one seed"
    panel.set_title(f"{bars}; ×: diverged", fontsize=8)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_picture(figure, path)


# --- the command line ---

SUBSETS = ["k", "v", "ff", "k,v", "k,ff", "v,ff", "k,v,ff"]
DEFAULTS = {"lr": [0.01, 0.03, 0.1, 0.3, 1.0], "steps": [25, 50, 100, 200, 400]}
QUICK = {"lr": [0.03, 0.1], "steps": [15, 30]}


def in_order(text):
    """The sites of 'ff,k' in the order of ORDER: 'k,ff'."""
    if not set(text.split(",")) <= set(ORDER):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(ORDER)}")
    return ",".join(site for site in ORDER if site in text.split(","))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("axes", "none named: sites, depth and steps").add_argument
    add("--sites", nargs="*", type=in_order, help=f"(default: {' '.join(SUBSETS)})")
    add("--depth", nargs="*", help=f"which layers (default: {' '.join(DEPTHS)}, and each one, from 0)")
    add("--lr", nargs="*", type=float, help="peak learning rate (default: 0.01 to 1, five)")
    add("--steps", nargs="*", type=int, help="optimizer steps (default: 25 to 400, five)")
    add("--cross", action="store_true", help="every combination of the axes named, not each alone")
    add("--seeds", type=int, help="of every point, at most 10 (default: 3; crossed: 1)")
    add = parser.add_argument
    add("--ref-lr", type=float, default=0.1, help="the reference's (default: %(default)s)")
    add("--ref-steps", type=int, help="the reference's (default: 100, and 30 with --quick)")
    add("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    add("--data", default="folio", help="a name under data/, or a folder (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    add("--workers", type=int, default=2, help="processes, a thread each; 1 on a GPU (default: %(default)s)")
    add("--out", type=Path, default=Path("out/ablation"), help="folder (default: %(default)s)")
    add("--quick", action="store_true", help="one seed, few values, 30 steps; into OUT/quick")
    add("--plan", action="store_true", help="say how many runs and minutes are left, and stop")
    return parser.parse_args(argv)


def choose_axes(args, n_layer):
    """Return {axis: its values}: of those named on the command line, or of all but lr, which compare.py searches."""
    named = [axis for axis in AXES if getattr(args, axis) is not None]
    if args.cross and len(named) < 2:
        raise ValueError("--cross needs two or more named axes")
    parts = DEPTHS if n_layer > 1 else ["all"]  # one layer has no halves
    defaults = {"sites": SUBSETS, "depth": [*parts, *map(str, range(n_layer))]}
    defaults |= QUICK if args.quick else DEFAULTS
    return {axis: getattr(args, axis) or defaults[axis] for axis in named or ("sites", "depth", "steps")}


def choose_jobs(args, values_of_axis, reference, n_layer):
    """The runs that the command line asks for. Raises ValueError for a mistake in any, before the first is made."""
    if all(set(values) == {getattr(reference, axis)} for axis, values in values_of_axis.items()):
        raise ValueError("nothing to compare: the named axes have only the reference's own values")
    jobs = all_jobs(values_of_axis, reference, args.seeds, args.cross)
    for job in jobs:
        TrainConfig(lr=job.lr, steps=job.steps)
        layers(job.depth, n_layer)
    return jobs


def print_plan(left, workers, model, split, works, config):
    """Print how long the jobs left take, by a step and a forward pass timed here, on the model's device."""
    steps = sum(job.steps for job in left if job.sites != "none")
    a_step, a_window = clocks.pace(model, split, config)
    seconds = steps * a_step + len(left) * sum(map(len, works.values())) * a_window
    minutes = seconds / workers / 60
    print(f"{len(left)} runs are left, {steps:,} steps: about {minutes:.0f} minutes, {workers} at once", flush=True)


def run(argv):
    args = parse(argv)
    if args.seeds is None:
        args.seeds = 1 if args.quick or args.cross else 3
    lab.check_counts(args.workers, args.seeds)
    if args.ref_steps is None:
        args.ref_steps = 30 if args.quick else 100
    out = args.out / "quick" if args.quick else args.out
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(device)
    workers = 1 if device.type == "cuda" else args.workers
    model = common.load(args.base, getattr(torch, dtype))
    data = lab.load_data(args.data, model, ("train", "val"))
    works = lab.read_works(args.data, "val", model)
    values_of_axis = choose_axes(args, model.config.n_layer)
    reference = Job("k,v,ff", "all", args.ref_lr, args.ref_steps)
    jobs = choose_jobs(args, values_of_axis, reference, model.config.n_layer)
    about = {
        "fingerprint": fingerprint(model),
        "data": Path(args.data).absolute().name,
        "data_hash": data["train"].data_hash()[:16] + data["val"].data_hash()[:16],
        "works": list(works),
        "block_size": min(model.config.block_size, 256),
        "dtype": dtype,
        "crossed": args.cross,
        "reference": {axis: getattr(reference, axis) for axis in AXES},
    }
    there, _ = lab.load_runs(out, Job, Result)
    left = [job for job in jobs if job not in there]
    config = TrainConfig(lr=args.ref_lr, batch_size=BATCH_SIZE, dtype=dtype)
    attach(model)  # timed as the runs are: with vectors
    print_plan(left, workers, model.to(device), data["train"], works, config)
    if args.plan:
        return 0

    lab.open_folder(out, about)
    settings = {"base": args.base, "data": args.data, "device": args.device}
    done = lab.make_runs(jobs, partial(measure, settings), Result, out, workers)
    text = tables(out)
    lab.save_text(text, out / "table.md")
    arguments = vars(args) | values_of_axis | {"device": device, "dtype": dtype}
    lab.write_runs_json(out, "ablate.py", arguments, model, about["data_hash"], done)
    print(f"\n{text}\n")
    for axes, records in summarize(out).items():
        path = out / f"{'-'.join(axes)}.png"
        draw_picture(axes, records, path)
        print(path)
    return 0


def main(argv=None):
    return common.exit_status("ablate.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
