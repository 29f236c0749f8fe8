"""How exact the merge is, on real text: a table in Markdown.

    python -m experiments.exactness > experiments/results/exactness/table.md     # with data/folio.npz
    python -m experiments.exactness --ia3 out/demo/ia3.npz

Three kinds of vectors (powers of two with signs; trained; random) in three dtypes. Distances are root mean squares
over all logits to the float64 truth: the unmerged weights and vectors, run in float64.
"""

import argparse
import copy
import sys

import torch

import common
from experiments import clocks, lab
from ia3 import IA3, attach
from merge import merge, verify

HEAD = ["vectors", "dtype", "max abs Δlogit", "unmerged to truth", "merged to truth", "ratio", "same prediction"]


def small(x):
    """A difference as the table has it: a zero stands out."""
    return f"{x:.1e}" if x else "0"


def measure(base, trained, idx):
    """Return the table's rows. base: a GPT; trained: vectors for it; idx (B, T) long."""
    torch.manual_seed(0)
    powers = IA3(base.config)
    random = IA3(base.config)
    with torch.no_grad():
        for p in powers.parameters():
            p.copy_((torch.randint(0, 2, p.shape) * 2 - 1) * 2.0 ** torch.randint(-1, 2, p.shape))
        for p in random.parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape))
    rows = []
    for name, vectors in (("powers of two, ±", powers), ("trained", trained), ("random, N(1, 0.3)", random)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = copy.deepcopy(base).to(dtype)
            attach(model, vectors)
            r = verify(model, merge(model), idx)
            ratio = f"{r.merged_distance / r.unmerged_distance:.2f}" if r.unmerged_distance > 0 else ""
            row = [name, str(dtype).removeprefix("torch."), small(r.max_difference), small(r.unmerged_distance)]
            rows.append([*row, small(r.merged_distance), ratio, f"{r.argmax_agreement:.2%}"])
    return rows


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--ia3", default=lab.ROOT / "data/folio.npz", help="its vectors (default: data/folio.npz)")
    args = parser.parse_args(argv)
    base = common.load(args.base)
    trained = IA3.load(args.ia3, base)
    val = lab.load_data("folio", base, ["val"])["val"]
    idx, _ = val.windows(range(0, len(val), max(len(val) // 32, 1)))
    about = f"{clocks.device_name(torch.device('cpu'))}, torch {torch.__version__}; {len(idx)} windows of folio/val."
    print(f"{about}\n\n{lab.markdown(HEAD, measure(base, trained, idx))}")
    return 0


def main(argv=None):
    return common.exit_status("exactness.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
