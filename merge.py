"""Fold the vectors into a copy of the weights, and measure how exact that was.

    python merge.py --base data/base.pt --ia3 out/folio/ia3.npz --out out/folio/merged.pt

    W_k ← diag(l_k) W_k    b_k ← l_k ⊙ b_k       rows n_embd to 2·n_embd of c_attn, which stacks W_q, W_k, W_v
    W_v ← diag(l_v) W_v    b_v ← l_v ⊙ b_v       the rows after them
    W_2 ← W_2 diag(l_ff)   b_2 stays             columns of the MLP's c_proj

(Liu et al. 2022, section 3.3: no cost at inference.) That is GPT-2. In a Llama the rows of k_proj and v_proj take l_k
and l_v, and the rows of up_proj take l_ff: l_ff ⊙ silu(W_gate x) ⊙ (W_up x) = silu(W_gate x) ⊙ (diag(l_ff) W_up x).
The result is a plain model of the same class, with the base's weight names, shapes and FLOPs.
"""

import argparse
import copy
import math
import os
import sys
from dataclasses import dataclass

import torch

import common
import data as datasets
import disk
from ia3 import IA3, fingerprint, unwrap
from model import GPT
from sample import generate


@torch.no_grad()
def merge(model):
    """Return a plain model of model's class with model.ia3 folded in. model stays as it was: there is no unmerge.

    Products are taken in float64, then rounded to the weights' dtype. Raises ValueError if model has no vectors,
    stacked ones, or another base's (vectors without a fingerprint fit any base). It also raises one, with the tensor's
    name, for a weight, vector or product that is not finite.
    """
    model = unwrap(model)
    if model.ia3 is None or model.ia3.is_stacked():
        raise ValueError("merge takes a model with one task's vectors: assign them to model.ia3 first")
    check_finite(model)
    if model.ia3.fingerprint not in (None, fingerprint(model)):
        raise ValueError("these vectors belong to another base; or they are merged into this one already")
    merged = copy.deepcopy(model)
    fold(merged)
    check_finite(merged)
    return merged.requires_grad_(True)  # an attached base is frozen, a plain model is not


def fold(model):
    """Fold model.ia3 into model's own weights, and leave it without vectors. Call it under torch.no_grad."""
    fold_block = fold_gpt2 if isinstance(model, GPT) else fold_llama
    for block, (l_k, l_v, l_ff) in zip(model.blocks, model.ia3.per_layer(), strict=True):
        fold_block(block, l_k, l_v, l_ff)
    model.ia3 = None


def fold_gpt2(block, l_k, l_v, l_ff):
    """A block of GPT-2: c_attn stacks W_q, W_k, W_v, (3·n_embd, n_embd)."""
    n_embd = block.attn.c_attn.in_features
    fold_rows(block.attn.c_attn, slice(n_embd, 2 * n_embd), l_k)  # W_k and b_k
    fold_rows(block.attn.c_attn, slice(2 * n_embd, 3 * n_embd), l_v)  # W_v and b_v
    fold_columns(block.mlp.c_proj, l_ff)  # W_2; its bias stays


def fold_llama(block, l_k, l_v, l_ff):
    """A block of LLaMA: all rows of k_proj, v_proj and up_proj, each (width, n_embd).

    down_proj's columns could take l_ff just as well. Rows also fold into a block-quantized file, where the weights of a
    row share scales: a row's factor moves into them, a column's cannot (docs/edge.md).
    """
    fold_rows(block.self_attn.k_proj, slice(None), l_k)
    fold_rows(block.self_attn.v_proj, slice(None), l_v)
    fold_rows(block.mlp.up_proj, slice(None), l_ff)


def fold_rows(linear, rows, l):
    """l ⊙ (W x + b) = (diag(l) W) x + l ⊙ b, for the rows of W that l scales. l: one entry per row, or None."""
    if l is not None:
        # (rows, columns) by (rows, 1): one number per row. A slice is a view, so linear.weight itself is scaled
        scale(linear.weight[rows], l.unsqueeze(1))
        if linear.bias is not None:
            scale(linear.bias[rows], l)


def fold_columns(linear, l):
    """W (l ⊙ h) + b = (W diag(l)) h + b: the bias stays. l: (columns,) or None."""
    if l is not None:
        scale(linear.weight, l)  # (rows, columns) by (columns,): one number per column


def scale(weights, l):
    """weights ← l · weights in place, computed in float64 and rounded to the weights' dtype."""
    weights.copy_(weights.double() * l.double())


def check_finite(model):
    """Raise ValueError with the name of a tensor that holds NaN or infinity."""
    for name, t in model.state_dict().items():
        if not t.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


@dataclass
class Report:
    """How exact a merge was. A distance to the float64 truth is the root mean square over all logits."""

    max_difference: float  # max |Δlogit|, merged against unmerged, in the model's own dtype
    float64_difference: float  # max |Δlogit| when the same fold is done in float64
    unmerged_distance: float  # of the unmerged model to the truth: itself, run in float64
    merged_distance: float  # of the merged model to the same truth
    argmax_agreement: float  # share of positions at which both predict the same token

    def is_exact(self):
        """Whether merged is at most 10 times as far from the truth as unmerged, and float64 shows nothing but rounding.

        Both distances are rounding noise, most of it at the few tokens where a model magnifies rounding. With large
        vectors either can be over twice the other. A mistake is far larger: one unscaled row of the bundled base's W_k
        comes to hundreds of times or more. From float32 to float64 rounding shrinks 2^29 times, and a mistake not at
        all, so a difference must shrink a million times. A float64 model is its own truth, at distance 0, and has no
        finer copy: there 1e-11 is allowed.
        """
        is_near_truth = self.merged_distance <= max(10 * self.unmerged_distance, 1e-11)
        is_only_rounding = self.float64_difference <= max(1e-6 * self.max_difference, 1e-11)
        return is_near_truth and is_only_rounding

    def __str__(self):
        return (
            f"max |Δlogit|                 {self.max_difference:.1e}   in float64 {self.float64_difference:.1e}\n"
            f"distance to float64's truth  {self.merged_distance:.1e}   unmerged {self.unmerged_distance:.1e}\n"
            f"same prediction              {self.argmax_agreement:.2%}"
        )


@torch.no_grad()
def verify(model, merged, idx, lengths=None):
    """Compare model with merged, both in eval mode, on idx (B, T) long. Returns a Report.

    lengths: how many tokens of each row are text. The rest is padding and is not compared (None: all is text).

    Both models round. The truth that they approximate is the unmerged model run in float64, and the question is whether
    merged is further from it than unmerged is. That float64 copy is then folded itself, which reveals a mistake in
    fold. Memory: the copy, and the float64 logits of idx. tests/test_merge.py has the proof with powers of two, where
    folding rounds nothing.
    """
    model = unwrap(model)
    if lengths is None:
        lengths = [idx.size(1)] * idx.size(0)
    rows = [row[:, :n] for row, n in zip(idx.split(1), lengths, strict=True)]  # (1, n) each
    model64 = copy.deepcopy(model).double()
    truths = [model64(row)[0] for row in rows]  # (1, n, vocab_size) each
    fold(model64)

    # one number per token: the largest, or the mean square, over its vocab_size logits
    differences = []
    float64_differences = []
    unmerged_errors = []
    merged_errors = []
    same_predictions = []
    for row, truth in zip(rows, truths, strict=True):
        unmerged_logits = model(row)[0].double()  # (1, n, vocab_size)
        merged_logits = merged(row)[0].double()
        differences += (unmerged_logits - merged_logits).abs().amax(-1).flatten().tolist()
        float64_differences += (model64(row)[0] - truth).abs().amax(-1).flatten().tolist()
        unmerged_errors += (unmerged_logits - truth).square().mean(-1).flatten().tolist()
        merged_errors += (merged_logits - truth).square().mean(-1).flatten().tolist()
        same_predictions += (unmerged_logits.argmax(-1) == merged_logits.argmax(-1)).flatten().tolist()
    n_tokens = len(differences)
    return Report(
        max_difference=max(differences),
        float64_difference=max(float64_differences),
        unmerged_distance=math.sqrt(sum(unmerged_errors) / n_tokens),
        merged_distance=math.sqrt(sum(merged_errors) / n_tokens),
        argmax_agreement=sum(same_predictions) / n_tokens,
    )


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/base.pt", help="the vectors' base (default: %(default)s)")
    parser.add_argument("--ia3", default="out/folio/ia3.npz", help="the vectors (default: %(default)s)")
    parser.add_argument("--out", help="the merged checkpoint (default: merged.pt beside the vectors)")
    parser.add_argument("--data", default="folio", help="whose val the merge is verified on (default: %(default)s)")
    parser.add_argument("--block-size", type=int, help="of val's windows, in tokens (default: the base's, at most 256)")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = os.path.join(os.path.dirname(args.ia3), "merged.pt")
    files = datasets.find(args.data, ["val"])
    disk.check_output(args.out, inputs=[args.base, args.ia3, *files.values()])
    model = common.load(args.base)  # float32 on the CPU, wherever the vectors were trained
    model.ia3 = IA3.load(args.ia3, model)
    window = min(model.config.block_size, 256) if args.block_size is None else args.block_size
    if not 1 <= window <= model.config.block_size:
        raise ValueError(f"--block-size must be from 1 to the base's {model.config.block_size}, not {window}")
    val = datasets.load(args.data, model.tokenizer, model.config.vocab_size, window, ["val"])["val"]
    merged = merge(model)

    ids = datasets.evenly_spaced(val, max(1024 // window, 1))  # at most 1024 tokens
    idx, targets = val.windows(ids)
    lengths = [int((row >= 0).nonzero().max()) + 1 for row in targets]  # up to the last target; the rest is padding
    report = verify(model, merged, idx, lengths)
    prompt = val.prompt(64)
    unmerged_text = generate(model, prompt, 200, temperature=0)
    merged_text = generate(merged, prompt, 200, temperature=0)
    common.save(merged, args.out)  # even if inexact, so that it can be inspected
    print(f"{args.base} + {args.ia3} → {args.out}\n{report}")
    same = "identical" if torch.equal(unmerged_text, merged_text) else "different"
    print(f"200 tokens of greedy text     {same}")
    if not report.is_exact():
        print("this is more than rounding: do not use what was written (docs/exactness.md)")
        return 1
    return 0


def main(argv=None):
    return common.exit_status("merge.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
