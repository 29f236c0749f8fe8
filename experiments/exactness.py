"""How exact the merge is: the README's table, on real text, for the embedded base.

    python experiments/exactness.py --ia3 out/demo/ia3.npz

Three kinds of vectors (powers of two with signs; trained; random) in three dtypes. Distances are root mean squares
over all logits to the float64 truth: the unmerged weights and vectors, run in float64.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
from ia3 import IA3, attach
from merge import merge, verify
from model import GPT


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=ROOT / "data/base.pt", help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--ia3", default=ROOT / "out/demo/ia3.npz", help="vectors for it (default: out/demo/ia3.npz)")
    args = parser.parse_args(argv)
    try:
        base = GPT.from_pretrained(args.base)
        trained = IA3.load(args.ia3, base)
        val = data.load("folio", base.tokenizer, base.config.vocab_size, base.config.block_size, ["val"])["val"]
    except (ValueError, OSError) as e:
        print(f"exactness.py: {e}", file=sys.stderr)
        return 2
    idx, _ = val.windows(range(0, len(val), len(val) // 32))
    torch.manual_seed(0)
    powers, random = IA3(base.config), IA3(base.config)
    with torch.no_grad():
        for p in powers.parameters():
            p.copy_((torch.randint(0, 2, p.shape) * 2 - 1) * 2.0 ** torch.randint(-1, 2, p.shape))
        for p in random.parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape))
    print("| vectors | dtype | max abs Δlogit | unmerged to truth | merged to truth | ratio | same prediction |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, vectors in (("powers of two, ±", powers), ("trained on folio", trained), ("random, N(1, 0.3)", random)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = copy.deepcopy(base).to(dtype)
            vectors.base = None  # the same base, cast
            attach(model, vectors)
            r = verify(model, merge(model), idx)
            ratio = f"{r.merged_distance / r.unmerged_distance:.2f}" if r.unmerged_distance > 0 else ""
            row = [name, str(dtype).removeprefix("torch."), f"{r.max_difference:.1e}" if r.max_difference else "0"]
            row += [f"{d:.1e}" if d else "0" for d in (r.unmerged_distance, r.merged_distance)]
            print("| " + " | ".join([*row, ratio, f"{r.argmax_agreement:.2%}"]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
