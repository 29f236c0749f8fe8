"""Pictures of runs: the loss curves of all of them together, and of each the vectors as heatmaps.

python plot.py out/folio                 # writes out/folio/loss.png and out/folio/vectors.png
python plot.py out/folio out/full        # both curves in out/folio/loss.png
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt


def plot_losses(runs, path):
    """Draw val loss, and the train loss thinner, of every run that has a metrics.csv. runs: folders."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, run in enumerate(runs):
        try:
            with open(run / "metrics.csv", newline="") as f:
                rows = [(int(r["step"]), float(r["val_loss"]), float(r["train_loss"])) for r in csv.DictReader(f)]
            steps, val, train = zip(*rows, strict=True)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{run}/metrics.csv is not what train.py writes ({type(e).__name__})") from None
        axes.plot(steps, val, f"C{i}", marker=".", label=f"{run.name}, val")
        axes.plot(steps, train, f"C{i}", lw=0.7, alpha=0.6, label=f"{run.name}, train")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_vectors(npz, path):
    """Draw l_k, l_v and l_ff as layers × channels: white is 1, blue is inhibited, red amplified.

    Channels keep their order, so a head is a run of n_embd / n_head columns. Raises ValueError for another file.
    """
    with open(npz, "rb") as f:
        try:
            arrays = np.load(f, allow_pickle=False)
            matrices = {name: arrays[name] for name in ("l_k", "l_v", "l_ff") if name in arrays.files}
            if not matrices or any(m.ndim != 2 or not np.isfinite(m).all() for m in matrices.values()):
                raise ValueError
        except Exception:  # a damaged file makes zipfile and numpy raise nearly anything
            raise ValueError(f"{npz} is no file of (IA)³ vectors") from None
    reach = max(max(np.quantile(np.abs(m - 1), 0.99) for m in matrices.values()), 1e-3)  # outliers do not fade the rest
    norm = TwoSlopeNorm(vcenter=1, vmin=1 - reach, vmax=1 + reach)
    figure, rows = plt.subplots(len(matrices), figsize=(9, 1.6 * len(matrices)), layout="constrained", squeeze=False)
    for axes, (name, matrix) in zip(rows[:, 0], matrices.items(), strict=True):
        image = axes.imshow(matrix, aspect="auto", interpolation="none", cmap="RdBu_r", norm=norm)
        axes.set(ylabel=f"{name}\nlayer", yticks=range(len(matrix)))
    rows[-1, 0].set_xlabel("channel")
    figure.colorbar(image, ax=rows[:, 0], extend="both", label="scale", fraction=0.03)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py wrote")
    parser.add_argument("--out", type=Path, help="folder of the loss curves (default: the first RUN)")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not (folder / "metrics.csv").is_file():
            raise FileNotFoundError(f"{folder} holds no metrics.csv: it is no run of train.py")
    pictures = [(args.out or args.runs[0]) / "loss.png"]
    pictures[0].parent.mkdir(parents=True, exist_ok=True)
    plot_losses(args.runs, pictures[0])
    for folder in args.runs:
        if (folder / "ia3.npz").is_file():
            plot_vectors(folder / "ia3.npz", folder / "vectors.png")
            pictures.append(folder / "vectors.png")
    print("\n".join(map(str, pictures)))
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"plot.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
