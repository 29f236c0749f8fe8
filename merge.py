"""Fold the vectors into a copy of the weights, and measure how exact that was.

    python merge.py --base data/base.pt --ia3 out/folio/ia3.npz --out out/folio/merged.pt
    python merge.py --format hf                                 # a folder for transformers' GPT2LMHeadModel instead

    W_k ← diag(l_k) W_k    b_k ← l_k ⊙ b_k       rows n_embd to 2·n_embd of c_attn, which stacks W_q, W_k, W_v
    W_v ← diag(l_v) W_v    b_v ← l_v ⊙ b_v       the rows after them
    W_2 ← W_2 diag(l_ff)   b_2 stays             columns of the MLP's c_proj

(Liu et al. 2022, section 3.3: no cost at inference.) What comes out is a plain GPT: the base's keys, shapes and FLOPs.
"""

import argparse
import copy
import math
import os
import sys
from dataclasses import dataclass

import torch

import data as datasets
from ia3 import IA3
from model import GPT


@torch.no_grad()
def merge(model):
    """Return a plain GPT with model.ia3 folded in; model itself is left as it was, so there is nothing to unmerge.

    Products are taken in float64 and rounded once to the weights' dtype. Raises ValueError where model has no vectors
    or stacked ones, and where a weight, a vector or a product is NaN or infinite, with its name.
    """
    if model.ia3 is None or model.ia3.is_stacked():
        raise ValueError("merge wants a model with one task's vectors: attach them first")
    check_finite(model)
    merged = copy.deepcopy(model)
    merged.ia3 = None
    for block, (l_k, l_v, l_ff) in zip(merged.transformer.h, model.ia3.rows(), strict=True):
        fold_rows(block.attn.c_attn, l_k, l_v)
        fold_columns(block.mlp.c_proj, l_ff)
    check_finite(merged)
    return merged.requires_grad_(True)


def fold_rows(c_attn, l_k, l_v):
    """Fold l_k and l_v, (n_embd,) or None, into the rows of c_attn that make keys and values, biases included."""
    n_embd = c_attn.in_features
    for l, rows in ((l_k, slice(n_embd, 2 * n_embd)), (l_v, slice(2 * n_embd, 3 * n_embd))):
        if l is not None:
            scale(c_attn.weight[rows], l.unsqueeze(1))  # (n_embd, n_embd) by (n_embd, 1): a number a row
            if c_attn.bias is not None:
                scale(c_attn.bias[rows], l)


def fold_columns(c_proj, l_ff):
    """Fold l_ff, (4·n_embd,) or None, into the columns of the MLP's down-projection; its bias stays."""
    if l_ff is not None:
        scale(c_proj.weight, l_ff)  # (n_embd, 4·n_embd) by (4·n_embd,): a number a column


def scale(weights, l):
    """weights ← l · weights in place, in float64, rounded once."""
    weights.copy_(weights.double() * l.double())


def check_finite(model):
    """Raise ValueError with the name of a tensor that holds NaN or infinity."""
    for name, t in model.state_dict().items():
        if not t.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


@dataclass
class Report:
    """How exact a merge was. Distances to the float64 truth are root mean squares over all logits."""

    max_difference: float  # max |Δlogit|, merged against unmerged, in the model's own dtype
    float64_difference: float  # the same for both in float64
    unmerged_distance: float  # from the unmerged weights and vectors, run in float64
    merged_distance: float
    argmax_agreement: float  # share of positions at which both predict the same token

    def is_exact(self):
        """Merged is no more than 1.5 times as far from the truth as unmerged, and within 1e-11 of it in float64."""
        return self.merged_distance <= max(1.5 * self.unmerged_distance, 1e-11) and self.float64_difference <= 1e-11

    def __str__(self):
        return (
            f"max |Δlogit|                 {self.max_difference:.1e}   in float64 {self.float64_difference:.1e}\n"
            f"distance to float64's truth  {self.merged_distance:.1e}   unmerged {self.unmerged_distance:.1e}\n"
            f"same prediction              {self.argmax_agreement:.2%}"
        )


@torch.no_grad()
def verify(model, merged, idx):
    """Compare model with merged on idx (B, T) long. Returns a Report.

    Rounding makes any two ways to compute a logit differ. So the question is not whether merged equals unmerged, but
    whether it is any further from what both approximate: the unmerged weights and vectors, run in float64.
    """
    true_model = copy.deepcopy(model).double()
    models = (true_model, merge(true_model), model, merged)
    maxima, means = [], []
    for row in idx.split(1):  # GPT-2's logits take 0.4 GB a window of 1024 in float64: one window at a time
        truth, b64, a, b = (m(row)[0].double() for m in models)  # (1, T, vocab_size)
        agreement = (a.argmax(-1) == b.argmax(-1)).double().mean()
        maxima.append(torch.stack([(a - b).abs().max(), (b64 - truth).abs().max()]))
        means.append(torch.stack([(a - truth).square().mean(), (b - truth).square().mean(), agreement]))
    max_difference, float64_difference = torch.stack(maxima).amax(0).tolist()
    unmerged, merged_, agreement = torch.stack(means).mean(0).tolist()
    return Report(max_difference, float64_difference, math.sqrt(unmerged), math.sqrt(merged_), agreement)


def run(argv):
    from convert import refuse_overwriting, save_hf  # here, since merging itself needs nothing foreign

    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--base", default="data/base.pt", help="the vectors' base (default: %(default)s)")
    parser.add_argument("--ia3", default="out/folio/ia3.npz", help="the vectors (default: %(default)s)")
    parser.add_argument("--format", choices=("nanogpt", "hf"), default="nanogpt", help="hf: as transformers has it")
    parser.add_argument("--out", help="where it goes (default: out/folio/merged.pt, and out/folio/merged-hf for hf)")
    parser.add_argument("--data", default="folio", help="whose val the merge is verified on (default: %(default)s)")
    args = parser.parse_args(argv)
    args.out = args.out or ("out/folio/merged.pt" if args.format == "nanogpt" else "out/folio/merged-hf")
    for path in (args.base, args.ia3):
        refuse_overwriting(path, args.out)
    if args.format == "nanogpt" and os.path.isdir(args.out):
        raise ValueError(f"--out {args.out} is a folder")
    model = GPT.from_pretrained(args.base)  # float32 on the CPU, wherever the vectors were trained
    model.ia3 = IA3.load(args.ia3, model)
    val = datasets.load(args.data, model.tokenizer, model.config.vocab_size, model.config.block_size, ["val"])["val"]
    merged = merge(model)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    n = min(max(2048 // model.config.block_size, 1), len(val))  # windows: some 2048 tokens
    idx, _ = val.windows(torch.linspace(0, len(val) - 1, n).long().tolist())
    report = verify(model, merged, idx)
    greedy = [m.generate(val.prompt(64), 200, temperature=0) for m in (model, merged)]
    save = save_hf if args.format == "hf" else GPT.save
    save(merged, args.out)
    print(f"{args.base} + {args.ia3} → {args.out}\n{report}")
    print(f"200 tokens of greedy text     {'identical' if torch.equal(*greedy) else 'different'}")
    return 0 if report.is_exact() else 1


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"merge.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
