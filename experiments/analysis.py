"""What the vectors do to heads, how much they can hold, and how small they can be: three questions, three commands.

    python -m experiments.analysis heads --out experiments/results/analysis/heads
    python -m experiments.analysis capacity --out experiments/results/analysis/capacity
    python -m experiments.analysis size --out experiments/results/analysis/size

heads: articles say that a vector can suppress heads that do not matter. Of every head: mean and spread of its entries
of l_k and l_v, and how the loss on val rises when they are reset to ones. --data may be a folder of choices, too.

capacity: N random pairs, four letters and the two that belong to them (log2(26²) = 9.4 bits), learned by heart, N = 8
to 4,096; for each method the better of its two rates. Recalled are 9.4 bits a pair less what the answer still costs, in
bits, and nothing where that is less than nothing. Beside it the effective rank of what merging changes: exp of the
entropy of ΔW's singular values, normalized (Roy and Vetterli 2007), the mean over the changed matrices.

size: data/folio.npz's vectors in float32, bfloat16 and int8 (one scale a vector and layer), and with the smallest
|l - 1| reset to ones; and whether scales turn negative, and how good a small rate is, given ten times the steps.

Each writes results.csv, table.md and a picture into --out. capacity and size go on where they were stopped.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import common
import data as datasets
from experiments import lab, ranking, rivals
from ia3 import IA3, attach, fingerprint
from tools.plot import plt, save_picture
from train import TrainConfig, evaluate, train

N_WINDOWS = 256
BITS = math.log2(26**2)
CAPACITY_RATES = {"ia3": (0.03, 0.1), "lora-all": (0.01, 0.03), "full": (1e-3, 3e-3)}
NS = [2**i for i in range(3, 13)]
SIZE_RATES = {200: (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 2000: (3e-3, 1e-2, 3e-2)}  # by steps


# --- heads ---


@dataclass
class Head:
    """A head of keys and values: its entries of l_k and l_v, and what the loss rises by when they are reset to ones."""

    layer: int
    head: int
    l_k_mean: float
    l_k_std: float
    l_v_mean: float
    l_v_std: float
    rise: float
    standard_error: float


def losses_of(model, data, items):
    """The loss in nats of up to so many windows or choices of val, (items,), as a call that measures it now."""
    if (Path(data) / "val.jsonl").exists():
        split = ranking.load_choices(Path(data) / "val.jsonl", model.tokenizer, model.config.block_size)
        n = min(items, len(split))
        split = ranking.Choices([split.examples[i * len(split) // n] for i in range(n)])  # from all over the file

        def measure():
            beta = ranking.scores(model, split)
            return F.cross_entropy(beta, split.labels(), reduction="none").double().numpy()  # L_LN (section 3.2)

        return measure
    split = lab.load_data(data, model, ("val",))["val"]

    def measure():
        nats, targets = lab.window_losses(model, split, TrainConfig(lr=1e-3, batch_size=32), items)
        return nats / targets

    return measure


@torch.no_grad()
def heads(args):
    """A line per head into results.csv; the table and the picture."""
    model = common.load(args.base)
    vectors = IA3.load(args.ia3, model)
    if vectors.l_k is None or vectors.l_v is None:
        raise ValueError(f"{args.ia3} scales no keys, or no values: heads needs both")
    model.ia3 = vectors
    measure = losses_of(model, args.data, args.items)
    before = measure()
    d_head = model.config.n_embd // model.config.n_head
    found = []
    for layer in range(model.config.n_layer):
        for head in range(model.config.widths[0] // d_head):
            entries = slice(head * d_head, (head + 1) * d_head)
            found.append(reset_head(vectors, layer, head, entries, measure, before))
            print(f"layer {layer}, head {head}: {found[-1].rise:+.4f} nats", flush=True)
    lab.write_csv(args.out / "results.csv", [vars(head) for head in found])
    where = f"{len(before)} windows or choices of {args.data}, loss {before.mean():.4f}"
    lab.save_text(table_of_heads(found, where), args.out / "table.md")
    draw_heads(found, args.out / "heads.png")


def reset_head(vectors, layer, head, entries, measure, before):
    """A Head: measure() with its entries at ones, less before. The vectors are left as they were."""
    l_k = vectors.l_k[layer, entries]
    l_v = vectors.l_v[layer, entries]
    spreads = l_k.mean().item(), l_k.std().item(), l_v.mean().item(), l_v.std().item()
    kept = l_k.clone(), l_v.clone()
    l_k.fill_(1)
    l_v.fill_(1)
    rise = measure() - before
    l_k.copy_(kept[0])
    l_v.copy_(kept[1])
    return Head(layer, head, *spreads, rise.mean(), rise.std(ddof=1) / math.sqrt(len(rise)))


def table_of_heads(found, where):
    """Markdown of Heads. where: what the loss was measured on, and the loss."""
    lines = []
    for name in ("l_k", "l_v"):
        means = [getattr(head, f"{name}_mean") for head in found]
        stds = [getattr(head, f"{name}_std") for head in found]
        low = sum(mean < 0.5 for mean in means)
        lines.append([name, f"{min(means):.2f} to {max(means):.2f}", f"{min(stds):.2f} to {max(stds):.2f}", f"{low}"])
    table = lab.markdown(["", "means of the heads", "spread within a head", "heads of mean below 0.5"], lines)
    rises = sorted(head.rise for head in found)
    n_falling = sum(head.rise + 2 * head.standard_error < 0 for head in found)
    return (
        f"{table}\n\n{len(found)} heads, {where}. Resetting one head's entries to ones changes it by "
        f"{rises[0]:+.4f} to {rises[-1]:+.4f} nats, {np.median(rises):+.4f} in the middle; it falls by more than two "
        f"standard errors for {n_falling}."
    )


def draw_heads(found, path):
    """found: the Heads, layer by layer."""
    n_layer = found[-1].layer + 1
    panels = {"l_k_mean": "mean of l_k", "l_v_mean": "mean of l_v", "rise": "nats lost when both are reset"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 1.5 + n_layer / 4), layout="constrained")
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        grid = np.array([getattr(head, name) for head in found]).reshape(n_layer, -1)
        middle = 0 if name == "rise" else 1
        most = np.abs(grid - middle).max() or 1
        shown = ax.imshow(grid, cmap="RdBu_r", vmin=middle - most, vmax=middle + most, aspect="auto")
        ax.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(shown, ax=ax)
    save_picture(figure, path)


# --- capacity ---


class PairsJob(NamedTuple):
    method: str
    n: int  # pairs to learn
    lr: float
    steps: int
    seed: int


@dataclass
class Recalled:
    values: int  # trained
    bits: float
    rank: float  # of what merging changes


def random_pairs(n, seed):
    """n different prompts of four letters and their answers of two: (n, 6) uint8."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice(26**4, n, replace=False)
    letters = [prompts // 26**i % 26 for i in range(4)] + [rng.integers(26, size=n) for _ in range(2)]
    return np.stack(letters, 1).astype(np.uint8) + ord("a")


def effective_rank(before, after):
    """exp of the entropy of the singular values of what changed, the mean over the matrices that did; 0 for none."""
    ranks = []
    for old, new in zip(before.blocks.parameters(), after.blocks.parameters(), strict=True):
        if old.dim() == 2:
            s = torch.linalg.svdvals((new - old).double())
            if s.sum() > 0:
                p = s[s > 0] / s.sum()
                ranks.append((-(p * p.log()).sum()).exp().item())
    return float(np.mean(ranks)) if ranks else 0.0


def memorize(base, job):
    """Learn job.n pairs by heart. Returns what is Recalled, and the nats of each pair."""
    torch.manual_seed(job.seed)  # initial values, where they are random
    model = common.load(base)
    rivals.attach(model, rivals.METHODS[job.method].add)
    pairs = random_pairs(job.n, job.seed).tolist()
    split = datasets.Examples([(pair[:4], pair[4:]) for pair in pairs])
    batch = {"batch_size": min(job.n, 256), "eval_interval": job.steps, "eval_windows": 1}
    config = TrainConfig(steps=job.steps, lr=job.lr, seed=job.seed, weight_decay=0.0, **batch)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        train(model, {"train": split, "val": split}, config)
    except FloatingPointError:  # it diverged: nothing is recalled
        return Recalled(values, 0.0, 0.0), {}
    nats, _ = lab.window_losses(model, split, config)
    bits = max(BITS * job.n - nats.sum() / math.log(2), 0.0)
    rank = effective_rank(common.load(base), rivals.METHODS[job.method].merge(model))
    return Recalled(values, bits, rank), {"nats": nats}


def capacity(args):
    model = common.load(args.base)
    if model.config.vocab_size <= ord("z") or model.config.block_size < 5:
        raise ValueError(f"{args.base} is too small: a pair is five ids up to {ord('z')} to read, and one to predict")
    lab.open_folder(args.out, {"fingerprint": fingerprint(model), "quick": args.quick})
    ns, steps = ((8, 16), 5) if args.quick else (NS, 1000)
    jobs = []
    for n in ns:
        for method, rates in CAPACITY_RATES.items():
            jobs += [PairsJob(method, n, lr, steps, seed=1) for lr in rates]
    found = lab.make_runs(jobs, partial(memorize, args.base), Recalled, args.out, args.workers)
    best = {}  # {(method, n): Recalled at the better rate}
    for job, recalled in found.items():
        key = job.method, job.n
        if key not in best or recalled.bits > best[key].bits:
            best[key] = recalled
    lab.save_text(table_of_capacity(best, ns, steps), args.out / "table.md")
    draw_capacity(best, ns, args.out / "capacity.png")


def table_of_capacity(best, ns, steps):
    """Markdown. best: {(method, pairs): Recalled}; ns: numbers of pairs."""
    head = ["pairs", "bits"]
    for method in CAPACITY_RATES:
        head += [f"{method}: recalled", "a number", "rank"]
    lines = []
    for n in ns:
        line = [f"{n:,}", f"{BITS * n:,.0f}"]
        for method in CAPACITY_RATES:
            recalled = best[method, n]
            share = recalled.bits / (BITS * n)
            line += [f"{share:.0%}", f"{recalled.bits / recalled.values:.3f}", f"{recalled.rank:.1f}"]
        lines.append(line)
    values = ", ".join(f"{method} {best[method, ns[0]].values:,}" for method in CAPACITY_RATES)
    text = f"Numbers trained: {values}. {steps} steps of up to 256 pairs, one seed, the better of two rates."
    return f"{lab.markdown(head, lines)}\n\n{text}"


def draw_capacity(best, ns, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in CAPACITY_RATES:
        left.plot(ns, [best[method, n].bits / (BITS * n) for n in ns], "o-", label=method)
        right.plot(ns, [best[method, n].bits / best[method, n].values for n in ns], "o-", label=method)
    left.set(xscale="log", xlabel="random pairs", ylabel="share of their bits recalled")
    right.set(xscale="log", yscale="log", xlabel="random pairs", ylabel="bits recalled a trained number")
    left.legend()
    save_picture(figure, path)


# --- size ---


class RateJob(NamedTuple):
    lr: float
    steps: int
    seed: int


@dataclass
class Learned:
    loss: float  # nats a token
    negative: int  # how many scales are
    values: int


def to_int8(l):
    """What comes back of a (n_layer, width) matrix kept as int8, (l - 1) / scale, with a float32 scale a layer."""
    scale = (l - 1).abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return 1 + scale * ((l - 1) / scale).round()


def small_versions(vectors):
    """{how vectors are kept: (bytes that takes, {name: the matrix that comes back})}; in float32 they are unchanged."""
    matrices = {name: p.detach().clone() for name, p in vectors.matrices().items()}
    coarse = {name: l.bfloat16().float() for name, l in matrices.items()}
    n = vectors.count()
    place = 2 if n <= 2**16 else 4  # bytes that say which of n values
    n_scales = len(matrices) * vectors.config.n_layer
    versions = {"float32": (4 * n, matrices), "bfloat16": (2 * n, coarse)}
    versions["int8"] = (n + 4 * n_scales, {name: to_int8(l) for name, l in matrices.items()})
    distances = torch.cat([(l - 1).abs().flatten() for l in matrices.values()]).sort().values
    for share in (0.5, 0.75, 0.9, 0.95, 0.99):
        least = distances[round(share * n)]
        version = {}
        for name, l in matrices.items():
            version[name] = torch.where((l - 1).abs() >= least, coarse[name], 1.0)
        kept = (distances >= least).sum().item()
        versions[f"{share:.0%} reset"] = ((2 + place) * kept, version)  # a bfloat16 and its place
    return versions


def learn_once(settings, job):
    """(IA)³ at a rate, for so many steps. settings: base, data, items."""
    model = common.load(settings["base"])
    vectors = attach(model)
    data = lab.load_data(settings["data"], model, ("train", "val"))
    run = {"batch_size": 16, "eval_interval": job.steps, "eval_windows": 1}
    config = TrainConfig(steps=job.steps, lr=job.lr, seed=job.seed, **run)
    try:
        train(model, data, config)
        loss = evaluate(model, data["val"], config, n_windows=settings["items"])
    except FloatingPointError:
        loss = math.inf
    return Learned(loss, n_negative(vectors), vectors.count()), {}


def n_negative(vectors):
    return sum((p < 0).sum().item() for p in vectors.parameters())


@torch.no_grad()
def size(args):
    model = common.load(args.base)
    vectors = IA3.load(args.ia3, model)
    data = lab.load_data(args.data, model, ("train", "val"))
    about = {"fingerprint": fingerprint(model), "data": args.data, "items": args.items, "quick": args.quick}
    about["data_hash"] = data["train"].data_hash()[:16] + data["val"].data_hash()[:16]
    lab.open_folder(args.out, about)

    # the same vectors, kept in fewer and fewer bytes
    negative = n_negative(vectors)
    config = TrainConfig(lr=1e-3, batch_size=32)
    kept = {"the base": (0, evaluate(model, data["val"], config, n_windows=args.items))}  # bytes and loss
    model.ia3 = vectors
    for words, (n_bytes, matrices) in small_versions(vectors).items():
        for name, p in vectors.matrices().items():
            p.data = matrices[name]
        kept[words] = n_bytes, evaluate(model, data["val"], config, n_windows=args.items)

    # vectors that were learned at other rates
    rates = {2: (0.1,), 4: (0.1,)} if args.quick else SIZE_RATES
    jobs = [RateJob(lr, steps, seed=1) for steps, some in rates.items() for lr in some]
    settings = {"base": args.base, "data": args.data, "items": args.items}
    found = lab.make_runs(jobs, partial(learn_once, settings), Learned, args.out, args.workers)

    text = f"{Path(args.ia3).name} on {args.data}'s val, {args.items} windows. {negative:,} of its {vectors.count():,}"
    text += " scales are negative. Below, runs of 1 seed at other rates:"
    lab.save_text(f"{table_of_sizes(kept)}\n\n{text}\n\n{table_of_rates(found)}", args.out / "table.md")
    draw_size(kept, found, args.out / "size.png")


def table_of_sizes(kept):
    """Markdown. kept: {how vectors are kept: (bytes, loss)}, the base first, then float32."""
    base = kept["the base"][1]
    gain = base - kept["float32"][1]
    lines = []
    for words, (n_bytes, loss) in kept.items():
        lines.append([words, f"{n_bytes:,}", f"{loss:.4f}", f"{(base - loss) / gain:.1%}"])
    return lab.markdown(["kept", "bytes", "nats a token", "of the gain"], lines)


def table_of_rates(found):
    """Markdown of {RateJob: Learned}."""
    lines = []
    for job, learned in found.items():
        loss = "diverged" if math.isinf(learned.loss) else f"{learned.loss:.4f}"
        lines.append([f"{job.steps:,}", f"{job.lr:g}", loss, f"{learned.negative:,} of {learned.values:,}"])
    return lab.markdown(["steps", "rate", "nats a token", "negative scales"], lines)


def draw_size(kept, found, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for words, (n_bytes, loss) in kept.items():
        if words == "the base":
            left.axhline(loss, color="gray", ls=":", label=words)
        else:
            left.plot(n_bytes, loss, "o", color="C0")
            left.annotate(f" {words}", (n_bytes, loss), fontsize=7)
    left.set(xscale="log", xlabel="bytes of a task", ylabel="nats a token")
    for steps in dict.fromkeys(job.steps for job in found):
        losses = {job.lr: learned.loss for job, learned in found.items() if job.steps == steps}
        right.plot(losses.keys(), losses.values(), "o-", label=f"{steps:,} steps")
    right.set(xscale="log", xlabel="learning rate", ylabel="nats a token")
    for ax in (left, right):
        ax.legend()
    save_picture(figure, path)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("heads", "capacity", "size"), help="see above")
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--ia3", default=str(lab.ROOT / "data/folio.npz"), help="vectors (default: data/folio.npz)")
    parser.add_argument("--data", default="folio", help="whose val is read (default: %(default)s)")
    parser.add_argument("--items", type=int, default=N_WINDOWS, help="windows or choices of val (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder (default: out/analysis/QUESTION)")
    parser.add_argument("--quick", action="store_true", help="capacity, size: few and short runs; into OUT/quick")
    args = parser.parse_args(argv)
    if args.items < 2:
        raise ValueError(f"--items must be at least 2, not {args.items}")
    lab.check_counts(args.workers)
    if args.out is None:
        args.out = Path("out/analysis") / args.question
    if args.quick:
        args.out /= "quick"
    {"heads": heads, "capacity": capacity, "size": size}[args.question](args)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def main(argv=None):
    return common.exit_status("analysis.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
