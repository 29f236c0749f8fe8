"""The paper's title in five minutes: SmolLM2-135M asked as it is, after 16 examples, and with (IA)³ learned from them.

    make fewshot                          # fetches the model and the sentences first
    python -m experiments.fewshot_demo    # where data/smollm2.pt and data/sentiment are made

Is a sentence from a movie review negative or positive? 200 sentences of val, half of each, asked in one template, for
one draw of examples: a demonstration. ((IA)³ learns from them in all three templates.) fewshot.py measures the same on
test, on six tasks, over five draws.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import common
import disk
from experiments import lab
from experiments.shots import context, draw, pairs_to_learn, read_task, score_template, train_on
from ia3 import attach
from merge import merge, verify
from tools.plot import plt, save_picture

RATE = 3e-3  # the paper's
PLACE = 0  # of the template: "Sentence: ...\nSentiment: negative"


def share_right(model, rows, examples=()):
    """The share of rows that the model answers rightly, behind the examples."""
    best = score_template(model, rows, PLACE, examples=examples).argmax(-1).tolist()
    return sum(answer == row.label for answer, row in zip(best, rows, strict=True)) / len(rows)


def draw_picture(bars, base, path):
    """bars: [(words, what it takes, share right)]. A picture of a card's size."""
    figure, ax = plt.subplots(figsize=(10, 4.2), layout="constrained")
    for place, (words, takes, share) in enumerate(reversed(bars)):
        ax.barh(place, 100 * share, color="tab:red" if words.startswith("(IA)³") else "tab:gray")
        ax.text(1, place, f"{words}   {takes}", va="center", color="white", fontsize=12)
        ax.text(100 * share + 0.5, place, f"{100 * share:.1f} %", va="center", fontsize=13)
    ax.axvline(50, color="black", lw=0.8, ls=":", zorder=0)
    ax.set(xlim=(0, 108), yticks=[], xlabel="movie sentences told apart, % (chance: 50)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    where = f"{Path(base).stem}, {torch.get_num_threads()} CPU threads"
    ax.set_title(f"{where}: (IA)³ beside in-context learning", loc="left", fontsize=14)
    save_picture(figure, path)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(lab.ROOT / "data/smollm2.pt"), help="a Llama (default: %(default)s)")
    parser.add_argument("--data", default=str(lab.ROOT / "data/sentiment"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of 8 examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/fewshot"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"steps must be at least 1, not {args.steps}")
    return args


def run(argv):
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("ia3.npz", "merged.pt", "fewshot.png"):
        disk.check_output(args.out / name, inputs=[args.base])
    model = common.load(args.base, dtype=None)
    device = common.pick_device("cpu")
    dtype = common.pick_dtype(device, model)
    model.to(device, getattr(torch, dtype))  # bfloat16, as it was published, where the CPU multiplies it
    val = read_task(args.data, "movies", "val")
    negative = [row for row in val if row.label == 0]
    positive = [row for row in val if row.label == 1]
    rows = negative[:100] + positive[:100]
    train_rows = read_task(args.data, "movies", "train")
    bars = []

    def report(words, takes, share):
        print(f"{words:<28} {100 * share:5.1f} %   {takes}", flush=True)
        bars.append((words, takes, share))

    # the base, asked as it is and behind 16 examples
    print(f"{args.base} in {dtype}: {len(rows)} sentences of movie reviews, negative or positive", flush=True)
    report("zero-shot", "no labels", share_right(model, rows))
    sixteen = draw(train_rows, 16, args.seed)
    n_tokens = len(context(model.tokenizer, "plain", sixteen, PLACE))
    report("16 examples in context", f"{n_tokens:,} tokens before every question", share_right(model, rows, sixteen))

    # (IA)³ from the same 16 and from 32, of which these are the first
    for k, words in ((16, "(IA)³ from the same 16"), (32, "(IA)³ from 32")):
        vectors = attach(model)  # ones again
        start = time.time()
        split = pairs_to_learn(model.tokenizer, draw(train_rows, k, args.seed))
        train_on(model, split, RATE, args.steps, args.seed)
        minutes = (time.time() - start) / 60
        report(words, f"{vectors.count():,} numbers, {minutes:.1f} minutes", share_right(model.eval(), rows))
    vectors.save(args.out / "ia3.npz")

    # folded in
    merged = merge(model.float())
    common.save(merged, args.out / "merged.pt")
    report("(IA)³ from 32, merged", "no added cost", share_right(merged, rows))
    draw_picture(bars, args.base, args.out / "fewshot.png")
    found = verify(model, merged, torch.tensor([model.tokenizer.encode_ordinary(rows[0].prompts[PLACE])]))
    print(found)
    size = (args.out / "ia3.npz").stat().st_size
    print(f"{args.out}: ia3.npz ({size / 1000:,.0f} kB), merged.pt, fewshot.png")
    return 0 if found.is_exact() else 1


def main(argv=None):
    return common.exit_status("fewshot_demo.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
