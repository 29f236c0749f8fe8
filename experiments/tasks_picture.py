"""Pictures of several tasks' vectors: side by side, how alike they are by layer, and how far from 1 they went.

    python experiments/tasks_picture.py                                  # the three in data/, into out/tasks.png
    python experiments/tasks_picture.py a.npz b.npz --out assets/ab.png

Prints, as a Markdown table, how many scales are inhibited (from 0 to 1), amplified (above 1) and flipped in sign.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm

sys.path.insert(0, str(Path(__file__).parent.parent))
from ia3 import IA3
from model import GPT
from sample import short_names

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
TASKS = ("folio", "sonnets", "kjv")
ALMOST_1 = 0.01  # a scale this near 1 counts as left alone


def cosines(a, b):
    """Cosine similarity of l - 1 by layer. a, b: (n_layer, width). Returns (n_layer,); 0 where one never moved."""
    a, b = a - 1, b - 1
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


def census(scales):
    """The shares of scales that are left alone, inhibited, amplified, flipped in sign; they sum to 1."""
    alone = np.abs(scales - 1) <= ALMOST_1
    groups = alone, (scales >= 0) & (scales < 1) & ~alone, (scales > 1) & ~alone, scales < 0
    return [group.mean() for group in groups]


def table(tasks):
    """tasks: {name: {'l_k': (n_layer, width), ...}}. Returns Markdown."""
    lines = [f"| scales | within {ALMOST_1} of 1 | inhibited | amplified | flipped | smallest | largest |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for task, matrices in tasks.items():
        for name, l in matrices.items():
            shares = " | ".join(f"{share:.1%}" for share in census(l))
            lines.append(f"| {task} {name} | {shares} | {l.min():.2f} | {l.max():.2f} |")
    return "\n".join(lines)


def draw(tasks, path):
    """Heatmaps, a column a task; below them the cosines by layer, a column a vector; then the histograms."""
    names = list(dict.fromkeys(name for matrices in tasks.values() for name in matrices))  # l_k, l_v, l_ff
    every = np.concatenate([np.abs(l - 1).ravel() for matrices in tasks.values() for l in matrices.values()])
    reach = max(np.quantile(every, 0.99), 1e-3)  # outliers do not fade the rest
    norm = TwoSlopeNorm(vcenter=1, vmin=1 - reach, vmax=1 + reach)
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    top, middle, bottom = figure.subfigures(3, height_ratios=[3, 2, 2])
    axes = top.subplots(len(names), len(tasks), squeeze=False)
    for column, (task, matrices) in enumerate(tasks.items()):
        axes[0, column].set_title(task)
        for row, name in enumerate(names):
            axes[row, column].set(yticks=[], ylabel=f"{name}, layer" if column == 0 else "")
            if name in matrices:
                image = axes[row, column].imshow(
                    matrices[name], aspect="auto", interpolation="none", cmap="RdBu_r", norm=norm
                )
    top.colorbar(image, ax=axes, extend="both", label="scale", fraction=0.02)
    pairs = list(combinations(tasks, 2))
    for name, ax in zip(names, middle.subplots(1, len(names), squeeze=False)[0], strict=True):
        for j, (a, b) in enumerate(pairs):
            if name in tasks[a] and name in tasks[b]:
                similar = cosines(tasks[a][name], tasks[b][name])
                ax.plot(range(len(similar)), similar, f"C{j}", marker=".", label=f"{a}, {b}")
        ax.axhline(0, color="k", lw=0.5)
        ax.set(title=f"cosine of {name} − 1", xlabel="layer", ylim=(-1, 1))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    bins = np.linspace(1 - 3 * reach, 1 + 3 * reach, 61)
    for name, ax in zip(names, bottom.subplots(1, len(names), squeeze=False)[0], strict=True):
        for task, matrices in tasks.items():
            if name in matrices:
                inside = np.clip(matrices[name].ravel(), bins[0], bins[-1])
                ax.hist(inside, bins, histtype="step", label=task, density=True)
        ax.axvline(1, color="k", lw=0.5)
        ax.set(title=f"scales in {name}", yticks=[])
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    shipped = [str(ROOT / f"data/{task}.npz") for task in TASKS]
    parser.add_argument("tasks", nargs="*", default=shipped, metavar="NPZ", help="two or more tasks' vectors")
    parser.add_argument("--base", default=str(ROOT / "data/base.pt"), help="their base (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/tasks.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    names = short_names(args.tasks)
    if len(set(names)) < max(len(names), 2):
        raise ValueError("two or more different tasks are wanted")
    model = GPT.from_pretrained(args.base)
    vectors = [IA3.load(path, model) for path in args.tasks]
    tasks = {
        name: {key: p.detach().numpy() for key, p in v.matrices().items()}
        for name, v in zip(names, vectors, strict=True)
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(tasks, args.out)
    print(table(tasks))
    print(f"\n{args.out}")
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"tasks_picture.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
