"""Learn 1623 spelling from 8, 32 or 128 labelled pairs: the few-shot benchmark on data/fewshot (experiments/pairs.py).

    python experiments/fewshot.py              # everything; goes on where it was stopped; into out/fewshot
    python experiments/fewshot.py --quick      # two runs, to see that it works

A learning rate is chosen on val under the paper's loss, one for all K and all losses. Then ten seeds draw K of the
training pairs each, and the vectors learned from them rank test, which is read here only. Writes results.csv, table.md
and fewshot.png.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as datasets
from experiments.pairs import NGrams
from experiments.ranking import ROOT, accuracy, draw, load_choices, make_loss, scores
from experiments.runs import measure_all, open_folder
from ia3 import IA3, attach, fingerprint
from model import GPT
from train import TrainConfig, train

matplotlib.use("agg")  # files only, no screen needed
import matplotlib.pyplot as plt

DATA = ROOT / "data/fewshot"
KS = (8, 32, 128)
SEEDS = range(10)
STEPS, BATCH_SIZE = 60, 8
LEARNING_RATES = (0.01, 0.03, 0.1)
CHOOSING_SEEDS = range(3)  # of each K, on val
PAPER = "lm,ul,ln"
LOSSES = (PAPER, "lm", "lm,ul", "lm,ln")


def read_split(split, model):
    return load_choices(DATA / f"{split}.jsonl", datasets.get_tokenizer(model.tokenizer), model.config.block_size)


def measure(base, split, losses, lr, k, seed):
    """Train on K pairs drawn from the seed. Returns the accuracy on split."""
    model = GPT.from_pretrained(base)
    pairs = draw(read_split("train", model), k, seed)
    attach(model)
    # train() wants a val to look at: the pairs themselves, so that nothing is learned about any other
    settings = {"steps": STEPS, "lr": lr, "schedule": "linear", "batch_size": BATCH_SIZE, "seed": seed}
    config = TrainConfig(**settings, eval_interval=STEPS, eval_windows=1, device="cpu", dtype="float32")
    train(model, {"train": pairs, "val": pairs}, config, make_loss(losses.split(",")))
    return {"accuracy": accuracy(model, read_split(split, model))}


def baselines(base, folio):
    """Return {name: accuracy on test} of what has seen no pair."""
    rows = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]

    def rank(score):
        """Ties count half."""
        signs = []
        for row in rows:
            true, decoy = row["choices"][row["label"]], row["choices"][1 - row["label"]]
            signs.append((score(true) > score(decoy)) + 0.5 * (score(true) == score(decoy)))
        return sum(signs) / len(signs)

    model = GPT.from_pretrained(base)
    test = read_split("test", model)
    beta, labels = scores(model, test)
    found = {
        "the untouched base": (beta.argmax(-1) == labels).double().mean().item(),
        "its inverted answer": (beta.argmin(-1) == labels).double().mean().item(),
        "the longer line": rank(len),
    }
    for name in ("plays", "folio"):
        text = (ROOT / f"data/{name}/train.txt").read_text(encoding="utf-8")
        found[f"byte trigrams of {name}/train"] = rank(NGrams(text, 3).log_likelihood)
    if folio.exists():
        attach(model, IA3.load(folio, model))
        found["vectors trained on all of folio"] = accuracy(model, test)
    return found


def table(measured, around, lr):
    """The README's table, in Markdown. measured: {(split, losses, lr, k, seed): accuracy}; around: baselines()."""
    lines = ["| test accuracy, % | K | median | quartiles | mean | runs |", "| --- | --- | --- | --- | --- | --- |"]
    for name, share in around.items():
        lines.append(f"| {name} | | {share:.1%} | | | |".replace("%", ""))
    for losses, k in sorted({(job[1], job[3]) for job in measured}, key=lambda v: (len(v[0]), v)):
        found = [100 * share for job, share in measured.items() if (job[1], job[3]) == (losses, k)]
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        name = "(IA)³, " + " + ".join(f"L_{loss.upper()}" for loss in losses.split(","))
        numbers = f"{middle:.1f} | {low:.1f} to {high:.1f} | {statistics.mean(found):.1f} | {len(found)}"
        lines.append(f"| {name} | {k} | {numbers} |")
    return "\n".join([*lines, "", f"{STEPS} steps of {BATCH_SIZE}, linear decay from {lr}, chosen on val."])


def draw_picture(measured, around, path):
    """Every run a dot, the medians a line, the baselines dashed."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    variants = sorted({job[1] for job in measured}, key=lambda v: (len(v), v))
    for i, losses in enumerate(variants):
        ks = sorted({job[3] for job in measured if job[1] == losses})
        at = {k: [100 * share for job, share in measured.items() if (job[1], job[3]) == (losses, k)] for k in ks}
        shift = 1.06 ** (i - (len(variants) - 1) / 2)
        label = " + ".join(f"$L_{{{loss.upper()}}}$" for loss in losses.split(","))
        axes.plot([k * shift for k in ks], [statistics.median(at[k]) for k in ks], f"C{i}", label=label)
        for k in ks:
            axes.plot([k * shift] * len(at[k]), at[k], f"C{i}.", alpha=0.5, ms=5)
    for i, (name, share) in enumerate(around.items()):
        if name in ("the untouched base", "vectors trained on all of folio"):
            axes.axhline(100 * share, color="k", ls="--" if i else ":", lw=1, label=name)
    axes.set(xscale="log", xlabel="K, labelled pairs", ylabel="test accuracy (%)", xticks=KS, xticklabels=KS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--base", default=str(ROOT / "data/base.pt"), help="a checkpoint (default: %(default)s)")
    parser.add_argument("--folio", type=Path, default=ROOT / "data/folio.npz", help="vectors that have read all of it")
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/fewshot"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two runs, to see that it works; no table for the README")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise ValueError(f"workers must be at least 1, not {args.workers}")
    out = args.out / "quick" if args.quick else args.out
    open_folder(out, {"base": fingerprint(GPT.from_pretrained(args.base))})

    def accuracies(jobs):
        """{(split, losses, lr, k, seed): accuracy} of every job."""
        jobs = [dict(zip(("split", "losses", "lr", "k", "seed"), job, strict=True)) for job in jobs]
        rows = measure_all(jobs, functools.partial(measure, args.base), out / "results.csv", args.workers)
        return {tuple(job.values()): row["accuracy"] for job, row in zip(jobs, rows, strict=True)}

    rates, ks, seeds, variants = LEARNING_RATES, KS, SEEDS, LOSSES
    if args.quick:
        rates, ks, seeds, variants = (0.03,), (8,), range(2), (PAPER,)
    lr = rates[0]
    if len(rates) > 1:
        jobs = [("val", PAPER, lr, k, seed) for lr in rates for k in ks for seed in CHOOSING_SEEDS]
        chosen = accuracies(jobs)
        on_val = {lr: statistics.mean(chosen[job] for job in jobs if job[2] == lr) for lr in rates}
        print("  ".join(f"lr {lr}: {share:.1%} on val" for lr, share in on_val.items()))
        lr = max(on_val, key=on_val.get)
    jobs = [("test", losses, lr, k, seed) for losses in variants for seed in seeds for k in ks]
    measured = accuracies(jobs)
    around = baselines(args.base, args.folio)
    text = table(measured, around, lr)
    (out / "table.md").write_text(text + "\n")
    draw_picture(measured, around, out / "fewshot.png")
    print(text)
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"fewshot.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fewshot.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
