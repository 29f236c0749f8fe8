"""Pictures of runs: the loss curves of all of them together, and of each the vectors as heatmaps.

    python -m tools.plot out/folio              # writes out/folio/loss.png and out/folio/vectors.png
    python -m tools.plot out/folio out/full     # both curves in out/folio/loss.png
    python -m tools.plot --tasks a.npz b.npz    # several tasks' vectors side by side in out/tasks.png

--tasks also prints, as a Markdown table, how many scales are inhibited, amplified and flipped in sign.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm

import common
import disk
from ia3 import check_arrays, read_npz
from sample import task_name

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt

NAMES = ("l_k", "l_v", "l_ff")
ALMOST_1 = 0.01  # a scale this near 1 counts as left alone


def read_metrics(path):
    """Return a run's steps, val losses and train losses. Raises ValueError for what train.py would not write."""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            rows = [(int(r["step"]), float(r["val_loss"]), float(r["train_loss"])) for r in csv.DictReader(f)]
    except (KeyError, TypeError, ValueError, csv.Error) as e:
        raise ValueError(f"{path} is not what train.py writes ({type(e).__name__})") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    steps, val, train = zip(*rows, strict=True)
    if not all(0 <= step <= 10**9 for step in steps):
        raise ValueError(f"{path} has steps beyond 0 to a billion")
    losses = [*val, *(loss for loss in train if not math.isnan(loss))]  # at step 0 no train loss is known: it is NaN
    if not all(0 <= loss <= 10**6 for loss in losses):
        raise ValueError(f"{path} has losses that are not numbers from 0 to a million")
    return steps, val, train


def plot_losses(runs, path):
    """Draw val loss, and the train loss thinner, of every run. runs: folders with a metrics.csv."""
    metrics = [read_metrics(run / "metrics.csv") for run in runs]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = labels([run.resolve() for run in runs])
    for i, (name, (steps, val, train)) in enumerate(zip(names, metrics, strict=True)):
        # "val" comes first: matplotlib leaves a label that begins with _ out of the legend
        axes.plot(steps, val, f"C{i}", marker=".", label=f"val, {name}")
        axes.plot(steps, train, f"C{i}", lw=0.7, alpha=0.6, label=f"train, {name}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(figure, path)


def read_vectors(path):
    """Read an .npz of vectors without its base. Returns {'l_k': (n_layer, width), ...} and d_head.

    Raises ValueError for another file.
    """
    about, matrices = read_npz(path, most=10**7)  # no model has more
    try:
        check_arrays(matrices)
        if not matrices or not matrices.keys() <= set(NAMES):
            raise ValueError(f"it holds {list(matrices)}")
        d_head = int(about["config"]["n_embd"] // about["config"]["n_head"])
        for n_layer, width in [matrix.shape for matrix in matrices.values()]:
            if not 1 <= n_layer <= 1000 or not 1 <= d_head <= width <= 1000 * d_head:  # more takes too long to draw
                raise ValueError(f"{n_layer} layers of {width} in heads of {d_head} are no model's")
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{path} is not a file of (IA)³ vectors: {e}") from None
    return matrices, d_head


def plot_vectors(paths, path):
    """Draw the vectors in the .npz files paths, a column a task: l_k, l_v and l_ff as layers × channels.

    White is 1, blue is inhibited, red amplified, on one scale for all. Thin lines part the heads of l_k and l_v.
    """
    tasks = [read_vectors(p) for p in paths]
    names = [name for name in NAMES if any(name in matrices for matrices, _ in tasks)]
    distances = [np.abs(m - 1).ravel() for matrices, _ in tasks for m in matrices.values()]
    reach = max(np.quantile(np.concatenate(distances), 0.99), 1e-3)  # outliers do not fade the rest
    norm = TwoSlopeNorm(vcenter=1, vmin=1 - reach, vmax=1 + reach)
    size = (max(9, 4 * len(tasks)), 1.6 * len(names))
    figure, grid = plt.subplots(len(names), len(tasks), figsize=size, layout="constrained", squeeze=False)
    for column, (title, (matrices, d_head)) in enumerate(zip(labels(paths), tasks, strict=True)):
        if len(tasks) > 1:
            grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("channel")
        for axes, name in zip(grid[:, column], names, strict=True):
            if column == 0:
                axes.set_ylabel(f"{name}\nlayer")
            if name not in matrices:
                continue  # a site without a vector
            n_layer, width = matrices[name].shape
            image = axes.imshow(matrices[name], aspect="auto", interpolation="none", cmap="RdBu_r", norm=norm)
            axes.set_yticks(range(n_layer))
            if name != "l_ff":  # hidden channels belong to no head
                for channel in range(d_head, width, d_head):
                    axes.axvline(channel - 0.5, color="tab:green", lw=0.8)  # no scale has this colour
    figure.colorbar(image, ax=grid, extend="both", label="scale", fraction=0.03)
    save_picture(figure, path)


def labels(paths):
    """task_names in which matplotlib sees no formulas."""
    return [name.replace("$", r"\$") for name in map(task_name, paths)]


def save_picture(figure, path):
    with disk.replace_file(path) as f:
        figure.savefig(f, format="png", dpi=130)
    plt.close(figure)


def census(scales):
    """The shares of scales that are left alone, inhibited, amplified, flipped in sign; they sum to 1."""
    alone = np.abs(scales - 1) <= ALMOST_1
    inhibited = (scales >= 0) & (scales < 1) & ~alone
    amplified = (scales > 1) & ~alone
    return alone.mean(), inhibited.mean(), amplified.mean(), (scales < 0).mean()


def table(paths):
    """The census of every vector in the .npz files paths, as Markdown."""
    lines = [f"| scales | within {ALMOST_1} of 1 | inhibited | amplified | flipped | smallest | largest |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for task, path in zip(map(task_name, paths), paths, strict=True):
        for name, scales in read_vectors(path)[0].items():
            shares = " | ".join(f"{share:.1%}" for share in census(scales))
            lines.append(f"| {task} {name} | {shares} | {scales.min():.2f} | {scales.max():.2f} |")
    return "\n".join(lines)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--tasks", nargs="+", metavar="NPZ", help="vectors to draw side by side instead")
    parser.add_argument("--out", help="the picture of --tasks (default: out/tasks.png); a run's stand in its folder")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.tasks):
        raise ValueError("name folders of runs, or vectors with --tasks")
    if args.runs and args.out is not None:
        raise ValueError("--out goes with --tasks: a run's pictures are written into its folder")
    if args.tasks:
        out = "out/tasks.png" if args.out is None else args.out
        disk.check_output(out, args.tasks)
        plot_vectors(args.tasks, out)
        print(f"{table(args.tasks)}\n\n{out}")
        return 0
    for folder in args.runs:
        if not (folder / "metrics.csv").is_file():
            raise FileNotFoundError(f"{folder} holds no metrics.csv: it is not a run of train.py")
    tasks = [folder / "ia3.npz" for folder in args.runs if (folder / "ia3.npz").is_file()]
    for path in tasks:
        read_vectors(path)  # refused, if it is damaged, before the first picture is written
    pictures = [args.runs[0] / "loss.png"]
    plot_losses(args.runs, pictures[0])
    for path in tasks:
        pictures.append(path.with_name("vectors.png"))
        plot_vectors([path], pictures[-1])
    print("\n".join(map(str, pictures)))
    return 0


def main(argv=None):
    return common.exit_status("plot.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
