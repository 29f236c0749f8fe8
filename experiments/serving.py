"""Three tasks on SmolLM2: learned in one batch, served in one batch, folded into the weights. Are the answers the same?

    python -m experiments.serving --out experiments/results/serving

Movies (negative or positive?), the same with the answers exchanged, and source (which of four sets is it from?): no
one set of vectors could do the first two. 32 labelled examples each are learned jointly, 8 a step whatever task they
are of (section 3.3: mixed-task batches). Then, on sentences of val:

- mixed: rows of three tasks in a batch, against each task's vectors for all rows of the same batch, in float32;
- merged: the vectors folded in, against the vectors beside the weights, in float32 and in bfloat16.
"""

import argparse
import sys
from pathlib import Path

import torch

import common
from experiments import lab
from experiments.shots import SharedPrompts, ask, draw, read_task, scores, train_on
from ia3 import IA3, attach, stack, unstack
from merge import merge

TASKS = ("movies", "movies-flipped", "source")
RATE = 3e-3


class MixedPrompts(SharedPrompts):
    """Examples of several tasks: windows tells each row's task, too. examples: [(prompt, choices, label, task id)]."""

    def __init__(self, examples):
        super().__init__([example[:3] for example in examples])
        self.task_ids = torch.tensor([example[3] for example in examples])

    def windows(self, ids):
        *inputs, labels = super().windows(ids)
        return *inputs, self.task_ids[ids], labels


def mixed(tokenizer, folder, split, k, templates):
    """The first k examples of each task, drawn, as MixedPrompts whose tasks take turns."""
    drawn = [draw(read_task(folder, task, split), k, 0) for task in TASKS]
    examples = []
    for rows in zip(*drawn, strict=True):
        for t in templates:
            examples += [(*ask(tokenizer, "plain", row, t), task_id) for task_id, row in enumerate(rows)]
    return MixedPrompts(examples)


def learn(model, folder, k, steps):
    """Train a set of vectors a task, jointly. Returns the sets."""
    vectors = stack([IA3(model.config) for _ in TASKS])
    split = mixed(model.tokenizer, folder, "train", k, (0, 1, 2))
    attach(model, vectors)
    train_on(model, split, RATE, steps)
    return unstack(vectors)


def serve(args):
    """Learn, serve, fold. Returns the table's rows; the vectors are saved into args.out."""
    narrow = common.load(args.base, torch.bfloat16)
    split = mixed(narrow.tokenizer, args.data, "val", args.items, (0,))
    labels = split.labels()
    tasks = learn(narrow, args.data, args.k, args.steps)
    wide = common.load(args.base)
    zero = scores(wide, split).argmax(-1)
    wide.ia3 = stack(tasks)
    together = scores(wide, split, split.task_ids)
    rows = []
    for task_id, (name, vectors) in enumerate(zip(TASKS, tasks, strict=True)):
        own = split.task_ids == task_id
        vectors.save(args.out / f"{name}.npz")
        wide.ia3 = IA3.load(args.out / f"{name}.npz", wide)
        alone = scores(wide, split)[own]
        same = {"mixed": (together[own] == alone).all(-1)}  # bit for bit
        narrow.ia3 = IA3.load(args.out / f"{name}.npz", narrow)
        part = SharedPrompts([split.examples[i] for i in own.nonzero().flatten()])
        for words, model in (("merged", wide), ("merged in bfloat16", narrow)):
            answers, folded = [scores(m, part).argmax(-1) for m in (model, merge(model))]
            same[words] = answers == folded
        row = {"task": name, "sentences": len(alone)}
        row["zero-shot"] = (zero[own] == labels[own]).double().mean().item()
        row["its vectors"] = (alone.argmax(-1) == labels[own]).double().mean().item()
        rows.append(row | {words: found.sum().item() for words, found in same.items()})
    return rows


def table(rows, args):
    head = ["task", "zero-shot", "its vectors", "mixed, the same bits", "merged, the same answers", "in bfloat16"]
    lines = []
    for row in rows:
        counts = [f"{row[words]} of {row['sentences']}" for words in ("mixed", "merged", "merged in bfloat16")]
        lines.append([row["task"], f"{row['zero-shot']:.1%}", f"{row['its vectors']:.1%}", *counts])
    text = f"Three tasks of {args.k} labels each, learned jointly in {args.steps} steps; accuracy on sentences of val."
    return f"{text}\n\n{lab.markdown(head, lines)}"


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(lab.ROOT / "data/smollm2.pt"), help="a Llama (default: %(default)s)")
    parser.add_argument("--data", default=str(lab.ROOT / "data/sentiment"), help="folder (default: %(default)s)")
    parser.add_argument("--k", type=int, default=32, help="labelled examples a task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--items", type=int, default=96, help="sentences of val a task (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/serving"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.items < 1:
        raise ValueError(f"items must be at least 1, not {args.items}")
    rows = serve(args)
    lab.write_csv(args.out / "results.csv", rows)
    lab.save_text(table(rows, args), args.out / "table.md")
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


def main(argv=None):
    return common.exit_status("serving.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
