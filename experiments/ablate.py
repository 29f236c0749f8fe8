"""Which vectors matter, where, and trained how: one axis at a time around one reference, for any base and any data.

    python experiments/ablate.py                              # every axis on folio; goes on where it was stopped
    python experiments/ablate.py --quick                      # the same in small, minutes: to see that it works
    python experiments/ablate.py --subsets --lr 0.03 0.1 0.3  # these two axes, each alone
    python experiments/ablate.py --subsets k,v ff --lr 0.03 0.1 --cross    # every pair of them
    python experiments/ablate.py --init my.pt --data path/to/folder --depth --out out/mine

The reference is (IA)³ in full: k,v,ff in all layers, trained as the --ref flags say. An axis flag varies one setting
around it, over the values named or, with none named, over those that --help lists. Trained on train and measured on all
of val, which ablations may choose by; test stays unread. Every run is compared with the reference's runs of the same
seeds on the same windows: differences and their intervals are paired, by a bootstrap over windows and seeds. With one
seed only, the interval knows nothing of how another would have come out.

--out gets results.csv (a row a run; the base's own row says none), windows.npz (the nats of every run's every window),
about.json (what all runs share), table.md, and a picture an axis.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as datasets
from experiments.runs import measure_all, open_folder, read_csv
from experiments.windows import bootstrap, interval, window_losses
from ia3 import TARGETS, attach, fingerprint
from model import GPT, pick_device
from train import TrainConfig, train

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
SUBSETS = [",".join(some) for n in (1, 2, 3) for some in itertools.combinations(TARGETS, n)]
HALVES = ["all", "first-half", "second-half"]
# what an axis is called in tables and pictures; in this order the axes are a run's name
AXES = {
    "targets": "vectors",
    "depth": "layers",
    "lr": "learning rate",
    "steps": "steps",
    "data_size": "tokens of train",
    "noise": "initial noise",
}
DEFAULTS = {
    "lr": [0.01, 0.03, 0.1, 0.3, 1.0],
    "steps": [25, 50, 100, 200, 400],
    "data_size": [0.001, 0.01, 0.1, 1.0],
    "noise": [0.0, 0.01, 0.1, 0.3],
}
QUICK = {"lr": [0.03, 0.1], "steps": [15, 30], "data_size": [0.01, 1.0], "noise": [0.0, 0.1]}
SEEDS = {"targets": 3, "depth": 3}  # of each point; 1 on the other axes


def subset(text):
    """The same targets in the order of SUBSETS' names."""
    if not set(text.split(",")) <= set(TARGETS):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {' '.join(SUBSETS)}")
    return ",".join(target for target in TARGETS if target in text.split(","))


def layers(depth, n_layer):
    """The layers that 'all', 'first-half', 'second-half' or a number stands for; an odd middle one is in the second."""
    half = n_layer // 2
    names = dict(zip(HALVES, (range(n_layer), range(half), range(half, n_layer)), strict=True))
    chosen = list(names.get(depth, [int(depth)] if depth.isdecimal() else []))
    if not chosen or chosen[-1] >= n_layer:
        raise ValueError(f"depth must be {', '.join(HALVES)}, or a layer from 0 to {n_layer - 1}, not {depth}")
    return chosen


def cut(split, share):
    """The first share of a training split. Raises ValueError where nothing to train on is left."""
    if not 0 < share <= 1:
        raise ValueError(f"data-size must be above 0 and at most 1, not {share}")
    if isinstance(split, datasets.Examples):
        part = datasets.Examples(split.examples[: round(share * len(split))])
        enough = len(part) > 0
    else:
        part = datasets.Stream(split.tokens[: round(share * len(split.tokens))], split.block_size)
        enough = len(part.tokens) > part.block_size
    if not enough:
        raise ValueError(f"data-size {share} of train is too little for one window")
    return part


def prepare(vectors, chosen, noise, seed):
    """Let only the chosen layers' rows learn, and start them at 1 + N(0, noise²). Returns the number of values trained.

    The other rows' gradient is made zero, and of a gradient that was never anything else Adam makes no step: they stay
    ones, that is, no vector at all.
    """
    device = next(vectors.parameters()).device
    mask = torch.zeros(vectors.config.n_layer, 1, device=device)
    mask[chosen] = 1
    dice = torch.Generator().manual_seed(seed)
    for p in vectors.parameters():
        with torch.no_grad():
            p += mask * noise * torch.randn(p.shape, generator=dice).to(device)
        p.register_hook(lambda grad: grad * mask)
    return vectors.count() // len(mask) * len(chosen)


def run_name(job):
    """The key of a run's nats in windows.npz. job: a dict that has the axes and the seed, as a row of results.csv."""
    return "_".join(str(job[key]) for key in (*AXES, "seed"))


def measure(settings, folder, **job):
    """Train as the job says, not at all where its targets are 'none', and write val's nats, float32 (windows,), into
    folder. settings: what all runs share, fields of TrainConfig. Returns the run's results: an infinite loss where
    training diverged.
    """
    device, dtype = pick_device(settings["device"])
    model = GPT.from_pretrained(settings["init"])
    data = datasets.load(settings["data"], model.tokenizer, model.config.vocab_size, settings["block_size"])
    data["train"] = cut(data["train"], job["data_size"])
    model.to(device, getattr(torch, dtype))  # frozen, so it is stored in the dtype in which it computes
    run = {"lr": job["lr"], "steps": job["steps"], "seed": job["seed"], "dtype": dtype}
    config = TrainConfig(**settings, **run, eval_interval=job["steps"], eval_windows=1)  # what counts is measured below
    values = 0
    try:
        if job["targets"] != "none":
            vectors = attach(model, targets=job["targets"].split(","))
            values = prepare(vectors, layers(job["depth"], model.config.n_layer), job["noise"], job["seed"])
            train(model, data, config)
        nats = window_losses(model, data["val"], config)[0]
        diverged = not np.isfinite(nats).all()
    except FloatingPointError:
        diverged = True
    if diverged:
        nats = np.full(len(data["val"]), np.inf)
    np.save(folder / f"{run_name(job)}.npy", nats.astype(np.float32))
    loss = nats.sum() / (data["val"].n_bytes or count_targets(data["val"]).sum())
    return {"values": values, "train_tokens": data["train"].n_tokens, "loss": float(loss)}


def count_targets(split):
    """The number of tokens with a loss in every window, (windows,)."""
    return np.array([(split.windows([i])[1] >= 0).sum().item() for i in range(len(split))], dtype=np.float64)


def plan(axes, reference, seeds=None, cross=False):
    """Every run once, a dict each: the base, then the axes' values, each axis alone or all of them crossed.

    axes: {axis: values}, to which the reference's own is added. seeds: of every point, counted from 1; None for SEEDS.
    """
    axes = {axis: [*values, reference[axis]] for axis, values in axes.items()}
    jobs = [reference | {"targets": "none", "seed": 1}]
    for grid in [axes] if cross else [{axis: values} for axis, values in axes.items()]:
        n = seeds or (1 if cross else SEEDS.get(next(iter(grid)), 1))
        for point in itertools.product(*grid.values()):
            jobs += [reference | dict(zip(grid, point, strict=True)) | {"seed": seed} for seed in range(1, n + 1)]
    return list({run_name(job): job for job in jobs}.values())


def pack(folder, split):
    """Put the runs' nats, a file each, into folder's windows.npz, with the number of targets of every window."""
    path, pieces = folder / "windows.npz", folder / "windows"
    arrays = {}
    if path.exists():
        with np.load(path) as file:
            arrays = dict(file)
    arrays |= {piece.stem: np.load(piece) for piece in sorted(pieces.glob("*.npy"))}
    arrays["targets"] = count_targets(split).astype(np.float32)
    with open(f"{path}.tmp", "wb") as f:
        np.savez_compressed(f, **arrays)
    os.replace(f"{path}.tmp", path)
    shutil.rmtree(pieces)


def read_folder(folder):
    """Return what about.json, results.csv and windows.npz hold; ValueError where a run's nats are missing."""
    about = json.loads((folder / "about.json").read_text())
    rows = [row | {"depth": str(row["depth"])} for row in read_csv(folder / "results.csv")]
    with np.load(folder / "windows.npz") as file:
        nats = {name: file[name].astype(np.float64) for name in file.files}
    for row in rows:
        if run_name(row) not in nats:
            raise ValueError(f"{folder}/windows.npz lacks {run_name(row)}: remove results.csv to measure again")
    return about, rows, nats


def place(axis, value):
    """Where a value stands on its axis: smaller subsets first, all layers, halves, then single layers."""
    if axis == "targets":
        return SUBSETS.index(value)
    if axis == "depth":
        return HALVES.index(value) if value in HALVES else len(HALVES) + int(value)
    return value


def summarize(folder):
    """Compare the points of every axis with the reference. Returns {axes: records}: (axis,), or several if crossed.

    The first record is the base's. A record is a row of results.csv with the mean loss over the seeds, the bootstrap's
    95 % interval of its difference to the reference, (low, high), None where either diverged, the number of seeds and
    of those that diverged. All points of an axis are compared on the seeds that all of them have.
    """
    about, rows, nats = read_folder(folder)
    targets = nats.pop("targets")
    unit = about["val_bytes"] or targets.sum()
    reference = tuple(about[axis] for axis in AXES)
    runs, base = {}, None  # {point: {seed: row}}
    for row in rows:
        if row["targets"] == "none":
            base = row
        else:
            runs.setdefault(tuple(row[axis] for axis in AXES), {})[row["seed"]] = row
    runs = {point: seeds for point, seeds in runs.items() if 1 in seeds}  # others belong to a command that was stopped

    def along(axes):
        """The points that differ from the reference in no other axis."""
        others = [i for i, axis in enumerate(AXES) if axis not in axes]
        found = [point for point in runs if all(point[i] == reference[i] for i in others)]
        return sorted(found, key=lambda point: [place(axis, point[i]) for i, axis in enumerate(AXES) if axis in axes])

    varied = {tuple(axis for i, axis in enumerate(AXES) if point[i] != reference[i]) for point in runs}
    crossed = {axis for axes in varied if len(axes) > 1 for axis in axes}
    wanted = [(axis,) for axis in AXES if (axis,) in varied]
    wanted += [tuple(axis for axis in AXES if axis in crossed)] if crossed else []
    summary = {}
    for axes in wanted:
        points = along(axes)
        seeds = sorted(set.intersection(*(set(runs[point]) for point in points)))
        matrices = {point: np.stack([nats[run_name(runs[point][seed])] for seed in seeds]) for point in points}
        matrices = {"base": nats[run_name(base)][None]} | matrices  # (seeds, windows) each
        finite = {point: matrix for point, matrix in matrices.items() if np.isfinite(matrix).all()}
        draws = bootstrap(finite, targets)  # nats a target
        summary[axes] = []
        for point, matrix in matrices.items():
            row = base if point == "base" else runs[point][seeds[0]]
            found = {"loss": matrix.sum(1).mean() / unit, "difference": math.nan, "interval": None}
            if point in finite and reference in finite:
                found["difference"] = (matrix.sum(1).mean() - matrices[reference].sum(1).mean()) / unit
                found["interval"] = interval((draws[point] - draws[reference]) * targets.sum() / unit)
            found |= {"seeds": len(matrix), "diverged": int((~np.isfinite(matrix).all(1)).sum())}
            summary[axes].append(row | found | {"reference": point == reference})
    return summary


def cell(axis, record):
    """A point's value on an axis, as tables and pictures have it."""
    if axis == "depth" and record["depth"] not in HALVES:
        return f"layer {record['depth']}"
    if axis == "data_size":
        return f"{record['train_tokens']:,}"
    return f"{record[axis]:g}" if isinstance(record[axis], float) else str(record[axis])


def unit_of(about):
    return "nats a byte" if about["val_bytes"] else "nats a token"


def tables(folder):
    """The Markdown tables, one an axis, of the runs in folder, a Path: from results.csv, windows.npz and about.json."""
    about, found = json.loads((folder / "about.json").read_text()), []
    for axes, (base, *records) in summarize(folder).items():
        heads = [*(AXES[axis] for axis in axes), "values trained", unit_of(about), "difference", "95 % interval"]
        lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for record in (base, *records):
            names = [cell(axis, record) for axis in axes] if record is not base else ["the base", *[""] * len(axes[1:])]
            loss, change, spread = f"{record['loss']:.4f}", f"{record['difference']:+.4f}", ""
            if record["diverged"]:
                loss = f"diverged, {record['diverged']} of {record['seeds']}"
            if record["interval"]:
                low, high = record["interval"]
                spread = f"{low:+.4f} to {high:+.4f}" + ", not distinguished" * (low <= 0 <= high)
            else:
                change = ""
            if record["reference"]:
                change, spread = "reference", ""
            lines.append(f"| {' | '.join([*names, format(record['values'], ','), loss, change, spread])} |")
        fixed = [f"{AXES[axis]} {cell(axis, about)}" for axis in AXES if axis not in axes and axis != "data_size"]
        if "data_size" not in axes:
            fixed.append(f"share of train {about['data_size']:g}")
        batch = f"{about['batch_size']} windows of {about['block_size']} tokens a step, {about['schedule']} schedule"
        seeds = f"{records[0]['seeds']} {'seed' if records[0]['seeds'] == 1 else 'seeds'}"
        lines += ["", f"{about['data'].split()[0]}/val, {seeds}; {', '.join(fixed)}; {batch}."]
        found.append("\n".join(lines))
    return "\n\n".join(found)


def draw(axes, records, unit, path):
    """The loss along the last of the axes, a line for every point of the others; bars: 95 % of the difference."""
    (base, *records), (*others, last) = records, axes
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    panel.axhline(base["loss"], color="k", ls="--", lw=1, label="the base")
    lines = {}
    for record in records:
        lines.setdefault(", ".join(cell(axis, record) for axis in others), []).append(record)

    numeric = last in ("lr", "steps", "data_size")

    def at(record):
        """Numbers stand on a log scale; names in the order they come in, and so does noise, which may be 0."""
        return record["train_tokens" if last == "data_size" else last] if numeric else cell(last, record)

    for i, (label, line) in enumerate(lines.items()):
        losses = [record["loss"] if not record["diverged"] else math.nan for record in line]
        bars = np.zeros((2, len(line)))
        for n, record in enumerate(line):
            if record["interval"]:  # around a mean that a skewed bootstrap may leave outside: no bar is below 0
                low, high = (end - record["difference"] for end in record["interval"])
                bars[:, n] = max(-low, 0), max(high, 0)
        style = "o" if last in ("targets", "depth") and not others else "o-"
        panel.errorbar([at(r) for r in line], losses, bars, fmt=style, color=f"C{i}", ms=4, capsize=3, label=label)
        for record in line:
            if record["reference"]:
                panel.plot([at(record)], [record["loss"]], "ko", mfc="none", ms=10, label="the reference")
    diverged = [at(record) for record in records if record["diverged"]]
    if diverged:
        panel.plot(diverged, [0.5] * len(diverged), "kx", transform=panel.get_xaxis_transform(), label="diverged")
    if numeric:
        ticks = {at(record): cell(last, record) for record in records}
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set(xlabel=AXES[last], ylabel=f"loss on val ({unit})")
    panel.grid(alpha=0.3)
    panel.set_title("bars: 95 % interval of the difference to the reference", fontsize=8)
    panel.legend(fontsize=8, **{"loc": "center left", "bbox_to_anchor": (1, 0.5)} if others else {})
    figure.savefig(path, dpi=130)
    plt.close(figure)


def content(split):
    """A split's tokens or examples as bytes to hash."""
    return repr(split.examples).encode() if isinstance(split, datasets.Examples) else split.tokens


def parse(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    axes = parser.add_argument_group("axes", "none named: all of them")

    def axis(name, kind, help, **kwargs):
        axes.add_argument(name, nargs="*", type=kind, metavar="X", help=help, **kwargs)

    axis("--subsets", subset, f"which vectors (default: {' '.join(SUBSETS)})", dest="targets")
    axis("--depth", str, f"vectors in which layers (default: {' '.join(HALVES)}, and every single one, from 0)")
    for name, kind, help in (
        ("lr", float, "peak learning rate"),
        ("steps", int, "optimizer steps"),
        ("data_size", float, "share of train, from its start"),
        ("noise", float, "standard deviation of what is added to the ones at the start"),
    ):
        values = " ".join(f"{value:g}" for value in DEFAULTS[name])
        axis("--" + name.replace("_", "-"), kind, f"{help} (default: {values})")
    axes.add_argument("--cross", action="store_true", help="every combination of the axes named, not each alone")
    axes.add_argument("--seeds", type=int, help="of every point (default: 3 for subsets, depth; 1 for others, crossed)")
    reference = parser.add_argument_group("the reference, and what all runs share")
    reference.add_argument("--ref-lr", type=float, default=0.1, help="(default: %(default)s)")
    reference.add_argument("--ref-steps", type=int, help="(default: 100, and 30 with --quick)")
    reference.add_argument("--ref-data-size", type=float, default=1.0, help="(default: %(default)s)")
    reference.add_argument("--ref-noise", type=float, default=0.0, help="(default: %(default)s)")
    reference.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="(default: %(default)s)")
    reference.add_argument("--batch-size", type=int, default=16, help="windows a step (default: %(default)s)")
    reference.add_argument("--block-size", type=int, help="tokens a window (default: the model's)")
    parser.add_argument("--init", default=str(ROOT / "data/base.pt"), help="the base (default: data/base.pt)")
    parser.add_argument("--data", default="folio", help="a name under data/, or a folder (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each; 1 on a GPU (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, few values, 30 steps; into --out's quick")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    steps = (30 if args.quick else 100) if args.ref_steps is None else args.ref_steps
    reference = {"targets": SUBSETS[-1], "depth": HALVES[0], "lr": args.ref_lr, "steps": steps}
    reference |= {"data_size": args.ref_data_size, "noise": args.ref_noise}
    device, dtype = pick_device(args.device)
    model = GPT.from_pretrained(args.init)
    n_layer, most = model.config.n_layer, model.config.block_size
    block_size = most if args.block_size is None else args.block_size
    if not 1 <= block_size <= most:
        raise ValueError(f"block_size must be from 1 to the model's {most}, not {block_size}")
    for name in ("seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(args, name)}")
    given = {axis: getattr(args, axis) for axis in AXES if getattr(args, axis) is not None}
    if args.cross and len(given) < 2:
        raise ValueError("cross wants two axes or more to be named")
    data = datasets.load(args.data, model.tokenizer, model.config.vocab_size, block_size)
    defaults = {"targets": SUBSETS, "depth": [*(HALVES if n_layer > 1 else HALVES[:1]), *map(str, range(n_layer))]}
    defaults |= QUICK if args.quick else DEFAULTS
    defaults["data_size"] = [share for share in defaults["data_size"] if share * len(data["train"]) >= 2]  # windows
    axes = {axis: given.get(axis) or defaults[axis] for axis in given or AXES}
    jobs = plan(axes, reference, args.seeds or (1 if args.quick else None), args.cross)

    settings = {"init": args.init, "data": args.data, "device": args.device, "schedule": args.schedule}
    settings |= {"batch_size": args.batch_size, "block_size": block_size}
    for job in jobs:  # before the first run, not after an hour
        TrainConfig(**settings, lr=job["lr"], steps=job["steps"])
        layers(job["depth"], n_layer)
        cut(data["train"], job["data_size"])
        if not 0 <= job["noise"] < math.inf:
            raise ValueError(f"noise must be at least 0 and finite, not {job['noise']}")
    if all(set(values) == {reference[axis]} for axis, values in axes.items()):
        raise ValueError("nothing to compare: the axes named have the reference's own values only")
    digest = hashlib.sha256(content(data["train"]))
    digest.update(content(data["val"]))
    about = {"base": fingerprint(model), "data": f"{Path(args.data).name} {digest.hexdigest()[:16]}"}
    about |= {"val_bytes": data["val"].n_bytes, "block_size": block_size, "batch_size": args.batch_size}
    about |= {"schedule": args.schedule, "dtype": dtype} | reference
    out = args.out / "quick" if args.quick else args.out
    open_folder(out, about)
    (out / "windows").mkdir(exist_ok=True)
    workers = 1 if device.type == "cuda" else args.workers
    measure_all(jobs, functools.partial(measure, settings, out / "windows"), out / "results.csv", workers)
    pack(out, data["val"])
    text = tables(out)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    for axes, records in summarize(out).items():
        path = out / f"{'-'.join(axes)}.png"
        draw(axes, records, unit_of(about), path)
        print(path)
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"ablate.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablate.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
