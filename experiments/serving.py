"""Three tasks on SmolLM2: learned in one batch, served in one batch, folded into the weights. Are the answers the same?

    python -m experiments.serving --out experiments/results/serving

Movies (negative or positive?), the same with the answers exchanged, and source (which of four sets is it from?): no
one set of vectors could do the first two. 32 labelled examples each are learned jointly, 8 a step whatever task they
are of (section 3.3: mixed-task batches). Then, on sentences of val:

- mixed: rows of several tasks in a batch, against each task's vectors for all rows of the same batch, in float32;
- merged: the vectors folded in, against the vectors beside the weights, in float32 and in bfloat16.
"""

import argparse
import sys
from pathlib import Path

import torch

import common
from experiments import lab
from experiments.ranking import SharedPrompts, scores
from experiments.shots import ask, draw, read_task, train_on
from ia3 import IA3, attach, stack, unstack
from merge import merge

TASKS = ("movies", "movies-flipped", "source")
RATE = 3e-3


def questions(tokenizer, folder, split, k, templates):
    """The first k examples of each task, drawn, as SharedPrompts whose tasks take turns."""
    drawn = [draw(read_task(folder, task, split), k, 0) for task in TASKS]
    examples = []
    for rows in zip(*drawn, strict=True):  # one of each task
        for template in templates:
            examples += [ask(tokenizer, "plain", row, template) for row in rows]
    return SharedPrompts(examples, task_ids=torch.arange(len(examples)) % len(TASKS))


def learn(model, folder, k, steps):
    """Train a set of vectors per task, jointly. Returns the sets."""
    vectors = stack([IA3(model.config) for _ in TASKS])
    attach(model, vectors)
    train_on(model, questions(model.tokenizer, folder, "train", k, (0, 1, 2)), RATE, steps)
    return unstack(vectors)


def n_same_merged(model, examples):
    """In how many examples the model answers as before when its vectors are folded in."""
    split = SharedPrompts(examples)
    before = scores(model, split).argmax(-1)
    after = scores(merge(model), split).argmax(-1)
    return (before == after).sum().item()


def serve(args):
    """Learn, serve, fold. Returns the table's rows; the vectors are saved into args.out."""
    narrow = common.load(args.base, torch.bfloat16)
    mixed = questions(narrow.tokenizer, args.data, "val", args.items, (0,))
    alone = SharedPrompts(mixed.examples)  # the same batches, without task_ids
    labels = mixed.labels()
    tasks = learn(narrow, args.data, args.k, args.steps)

    wide = common.load(args.base)
    zero_shot = scores(wide, alone)
    wide.ia3 = stack(tasks)
    together = scores(wide, mixed)
    rows = []
    for task_id, (name, vectors) in enumerate(zip(TASKS, tasks, strict=True)):
        path = args.out / f"{name}.npz"
        vectors.save(path)
        wide.ia3 = IA3.load(path, wide)
        narrow.ia3 = IA3.load(path, narrow)
        own = mixed.task_ids == task_id  # the questions of this task
        examples = [mixed.examples[i] for i in own.nonzero().flatten()]
        found = scores(wide, alone)
        row = {
            "task": name,
            "sentences": len(examples),
            "zero-shot": (zero_shot.argmax(-1) == labels)[own].double().mean().item(),
            "its vectors": (found.argmax(-1) == labels)[own].double().mean().item(),
            "mixed": (together == found)[own].all(-1).sum().item(),  # bit for bit
            "merged": n_same_merged(wide, examples),
            "merged in bfloat16": n_same_merged(narrow, examples),
        }
        rows.append(row)
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
