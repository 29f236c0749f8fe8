"""Draw where the three vectors sit in a GPT-2 block.

python -m tools.architecture     # writes assets/architecture.png
"""

import argparse
import sys
from pathlib import Path

from matplotlib.patches import FancyBboxPatch

import common
from tools.plot import plt, save_picture

FROZEN, LEARNED, PLAIN = "#dbe4ee", "#f2a65a", "#ffffff"


def box(axes, x, y, text, color=FROZEN, width=1.5, height=0.5):
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 1, "edgecolor": "#33415c"}
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc=color, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(axes, *points):
    """A line through points with a head at the last."""
    xs, ys = zip(*points[:-1], strict=True)
    axes.plot(xs, ys, color="#33415c", lw=1.1, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "color": "#33415c", "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def draw(path):
    figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
    axes.set(xlim=(-0.4, 15.1), ylim=(-0.4, 5.6), aspect="equal")
    axes.axis("off")

    # attention: x → ln_1 → c_attn → q, l_k ⊙ k, l_v ⊙ v → softmax → c_proj → +
    axes.text(3.6, 5.3, "CausalSelfAttention", fontsize=11, weight="bold", ha="center")
    box(axes, 0.3, 2, "x", PLAIN, width=0.6)
    box(axes, 1.9, 2, "ln_1, c_attn")
    arrow(axes, (0.6, 2), (1.15, 2))
    for y, name in ((3.3, "q"), (2, "k"), (0.7, "v")):
        box(axes, 3.6, y, name, PLAIN, width=0.6)
        arrow(axes, (2.65, 2), (2.9, 2), (2.9, y), (3.3, y))
    box(axes, 5, 2, "$l_k \\odot k$", LEARNED, width=1.1)
    box(axes, 5, 0.7, "$l_v \\odot v$", LEARNED, width=1.1)
    arrow(axes, (3.9, 2), (4.45, 2))
    arrow(axes, (3.9, 0.7), (4.45, 0.7))
    box(axes, 6.9, 2.65, "softmax$(qk^T/\\sqrt{d})$", PLAIN, width=1.9)
    arrow(axes, (3.9, 3.3), (6.9, 3.3), (6.9, 2.9))
    arrow(axes, (5.55, 2), (6.3, 2), (6.3, 2.4))
    box(axes, 6.9, 0.7, "attention · v", PLAIN, width=1.5)
    arrow(axes, (5.55, 0.7), (6.15, 0.7))
    arrow(axes, (6.9, 2.4), (6.9, 0.95))
    box(axes, 8.5, 2, "c_proj", width=1)
    arrow(axes, (7.65, 0.7), (8.5, 0.7), (8.5, 1.75))
    axes.text(9.5, 2, "+", fontsize=15, ha="center", va="center")
    arrow(axes, (9, 2), (9.3, 2))
    arrow(axes, (0.3, 2.25), (0.3, 4.6), (9.5, 4.6), (9.5, 2.3))
    axes.text(4.9, 4.72, "residual", fontsize=9, ha="center", color="#33415c")

    # MLP: ln_2 → c_fc → GELU → l_ff ⊙ h → c_proj → +
    axes.text(12, 5.3, "MLP", fontsize=11, weight="bold", ha="center")
    box(axes, 10.9, 3.6, "ln_2, c_fc", width=1.3)
    arrow(axes, (9.7, 2), (10.0, 2), (10.0, 3.6), (10.25, 3.6))
    box(axes, 12.6, 3.6, "GELU", PLAIN, width=1)
    arrow(axes, (11.55, 3.6), (12.1, 3.6))
    box(axes, 12.6, 2, "$l_{ff} \\odot h$", LEARNED, width=1.2)
    arrow(axes, (12.6, 3.35), (12.6, 2.25))
    box(axes, 12.6, 0.7, "c_proj", width=1)
    arrow(axes, (12.6, 1.75), (12.6, 0.95))
    axes.text(14.4, 2, "+", fontsize=15, ha="center", va="center")
    arrow(axes, (13.1, 0.7), (14.4, 0.7), (14.4, 1.7))
    arrow(axes, (10.0, 3.6), (10.0, 4.6), (14.4, 4.6), (14.4, 2.3))
    arrow(axes, (14.6, 2), (15, 2))

    for x, color, text in ((1.15, FROZEN, "frozen weights"), (4.6, LEARNED, "learned: one vector each")):
        box(axes, x - 0.9, -0.1, "", color, width=0.35, height=0.25)
        axes.text(x - 0.6, -0.1, text, fontsize=9, va="center")
    save_picture(figure, path)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "assets/architecture.png"
    parser.add_argument("--out", default=default, help="the picture (default: assets/architecture.png)")
    args = parser.parse_args(argv)
    draw(args.out)
    print(args.out)
    return 0


def main(argv=None):
    return common.exit_status("architecture.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
