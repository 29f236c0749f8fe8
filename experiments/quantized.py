"""Vectors folded into quantized weights: by the scales in the file, or by floats that are quantized again?

    python -m tools.convert smollm2 && python data/prepare.py sentiment
    python -m experiments.quantized --out experiments/results/quantized              # about an hour
    python -m experiments.quantized --out experiments/results/quantized --tables     # again from the results alone

This page is the protocol. It was committed before any run.

**The question.** In a format such as Q4_0 a block of 32 weights along the input axis shares a float16 scale. A row's
factor can move into the scales; a column's cannot. Of the vectors' three places l_k and l_v are row factors. l_ff is
one in W_up, and a column's factor in W_down. How near to the unmerged model is a merged one, by the way it was made?

**Formats**: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, by the gguf package's own code. Every matrix of the layers is quantized to
the format; embedding and norms stay. The weights come from SmolLM2's GGUF file, which is Q4_1: in that format they are
the file's own, and in the others they are rounded a second time. So formats are not compared with each other.

**Ways**, each against the unmerged model on the same quantized weights with the vectors beside them:

- scales: k, v and up's rows, in the scales of the file (tools/gguf_llama.py's scale_rows);
- rows: the same products taken in floats, and quantized again;
- columns: l_ff in W_down's columns instead, and quantized again.

**Vectors.** Movies, tweets and source, 32 labels, draws 0, 1, 2, learned on the file's weights in float32, as in
fewshot.py, but shorter: the first template only, 16 steps at 1e-2 (the rate that products chose there), so that all
of it takes about an hour of a slow processor. The same vectors serve every format.

**Measured** after the first 24 questions of test in the first template, whose answers are single tokens: each question
is read once, and the logits that follow it are kept. From them come the root mean square of Δlogit over the vocabulary,
KL(unmerged ‖ merged) in nats, the share of questions with the same answer, and the accuracy. Of the files: the share
of the layers' bytes that differ from the base's, and the size.

**Intervals.** Student's over the three draws, of the mean over tasks. Nothing is chosen by these figures, and whatever
comes out is reported.
"""

import argparse
import copy
import itertools
import math
import sys
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import common
from experiments import lab
from experiments.ranking import SharedPrompts
from experiments.shots import ask, draw, read_task, train_on
from ia3 import IA3, attach
from tools.gguf_llama import Tensor, dequantize, from_gguf, import_gguf, scale_rows
from tools.plot import plt, save_picture

TASKS = ("movies", "tweets", "source")
SEEDS = (0, 1, 2)
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WAYS = ("scales", "rows", "columns")
K = 32  # labelled examples
RATE = 1e-2
STEPS = 16
N_ITEMS = 24  # questions
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Job(NamedTuple):
    """What is known of a run in advance."""

    task: str
    form: str  # of FORMATS, or 'float': not quantized
    seed: int


@dataclass
class Result:
    """What a run found. Against the unmerged model: same, the share of questions with the same answer; rms, of Δlogit;
    kl, in nats. bytes: the share of the layers' bytes that differ from the base's.
    """

    unmerged_accuracy: float
    # of 'float': the base
    base_accuracy: float | None = None
    base_rms: float | None = None
    # of a format: the ways
    scales_accuracy: float | None = None
    scales_same: float | None = None
    scales_rms: float | None = None
    scales_kl: float | None = None
    scales_bytes: float | None = None
    rows_accuracy: float | None = None
    rows_same: float | None = None
    rows_rms: float | None = None
    rows_kl: float | None = None
    rows_bytes: float | None = None
    columns_accuracy: float | None = None
    columns_same: float | None = None
    columns_rms: float | None = None
    columns_kl: float | None = None
    columns_bytes: float | None = None
    size: int | None = None  # bytes of the layers' matrices


# --- weights in a format, and vectors folded into them ---


def quantize(weight, form):
    """A weight (rows, columns) as a Tensor of the format: blocks of bytes."""
    gguf = import_gguf()
    blocks = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[form])
    return Tensor(form, list(weight.shape), 0, blocks)


@lru_cache(1)
def floats(path):
    """The file's model in float32, one for all jobs of a process."""
    return from_gguf(path).requires_grad_(False)


@lru_cache(1)
def quantized(path, form):
    """Every matrix of the layers in the format: {name: Tensor}."""
    model = floats(path)
    names = [f"model.layers.{i}.{name}" for i in range(model.config.n_layer) for name in MATRICES]
    return {name: quantize(model.get_submodule(name).weight, form) for name in names}


@torch.no_grad()
def fold(blocks, vectors, form, way):
    """The matrices that change, {name: Tensor}. blocks: quantized's; way: of WAYS, whose 'columns' folds l_k and l_v as
    'rows' does.
    """
    changed = {}
    for i, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        layer = f"model.layers.{i}"
        rows = {f"{layer}.self_attn.k_proj": l_k, f"{layer}.self_attn.v_proj": l_v}
        if way == "columns":
            down = f"{layer}.mlp.down_proj"
            product = l_ff.double() * dequantize(blocks[down]).double()
            changed[down] = quantize(product.float(), form)
        else:
            rows[f"{layer}.mlp.up_proj"] = l_ff
        for name, l in rows.items():
            if way == "scales":
                data = scale_rows(blocks[name], l.double()).reshape(blocks[name].data.shape)
                changed[name] = Tensor(form, blocks[name].shape, 0, data)
            else:
                product = l.double().unsqueeze(1) * dequantize(blocks[name]).double()
                changed[name] = quantize(product.float(), form)
    return changed


def put(model, blocks):
    """Put Tensors into the model's weights. blocks: {name: Tensor}."""
    for name, tensor in blocks.items():
        model.get_submodule(name).weight.data = dequantize(tensor)


# --- a run ---


@torch.no_grad()
def answer_logits(model, examples):
    """The logits that follow each prompt, (examples, vocab_size)."""
    return torch.stack([model(torch.tensor([prompt]))[0][0, -1] for prompt, _, _ in examples])


def answers(logits, examples):
    """Which choice is the likeliest in each example, an array (examples,). The choices are single tokens."""
    best = []
    for row, (_, choices, _) in zip(logits, examples, strict=True):
        tokens = [choice[0] for choice in choices]
        best.append(row[tokens].argmax().item())
    return np.array(best)


def distance(logits, truth):
    """Root mean square of Δlogit, and the mean KL(truth ‖ logits) in nats. Both (examples, vocab_size)."""
    logits, truth = logits.double(), truth.double()
    kl = F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), reduction="batchmean", log_target=True)
    return (logits - truth).square().mean().sqrt().item(), kl.item()


def learned(settings, job):
    """The vectors of a task and draw. 'float' learns them where the folder has none yet; a format must find them."""
    model = floats(settings["gguf"])
    path = Path(settings["folder"]) / f"vectors/{job.task}-{job.seed}.npz"
    if path.exists() or job.form != "float":  # formats that learned the same would write one file at once
        return IA3.load(path, model)
    vectors = attach(model)
    rows = draw(read_task(settings["data"], job.task, "train"), K, job.seed)
    split = SharedPrompts([ask(model.tokenizer, "plain", row, 0) for row in rows])
    train_on(model, split, RATE, settings["steps"], job.seed)
    model.ia3 = None
    vectors.save(path)
    return vectors


def measure(settings, job):
    """One run: 'float' learns the vectors and compares them with the base; a format compares the ways to fold them.

    Returns its Result, and where each answer is right: {'unmerged', 'base' or a way: (items,) bool}.
    """
    torch.manual_seed(job.seed)
    vectors = learned(settings, job)
    model = copy.deepcopy(floats(settings["gguf"]))
    rows = read_task(settings["data"], job.task, "test")[: settings["items"]]
    examples = [ask(model.tokenizer, "plain", row, 0) for row in rows]
    labels = np.array([row.label for row in rows])

    if job.form == "float":
        base = answer_logits(model, examples)
        model.ia3 = vectors
        unmerged = answer_logits(model, examples)
        right = {"unmerged": answers(unmerged, examples) == labels, "base": answers(base, examples) == labels}
        rms, _ = distance(base, unmerged)
        return Result(float(right["unmerged"].mean()), float(right["base"].mean()), rms), right

    blocks = quantized(settings["gguf"], job.form)
    n_bytes = sum(tensor.data.size for tensor in blocks.values())
    put(model, blocks)
    model.ia3 = vectors
    unmerged = answer_logits(model, examples)
    model.ia3 = None
    expected = answers(unmerged, examples)
    right = {"unmerged": expected == labels}
    columns = {"unmerged_accuracy": float(right["unmerged"].mean()), "size": n_bytes}
    for way in WAYS:
        changed = fold(blocks, vectors, job.form, way)
        put(model, blocks | changed)
        merged = answer_logits(model, examples)
        found = answers(merged, examples)
        right[way] = found == labels
        differ = sum((tensor.data != blocks[name].data).sum() for name, tensor in changed.items())
        columns[f"{way}_accuracy"] = float(right[way].mean())
        columns[f"{way}_same"] = float((found == expected).mean())
        columns[f"{way}_rms"], columns[f"{way}_kl"] = distance(merged, unmerged)
        columns[f"{way}_bytes"] = float(differ / n_bytes)
    return Result(**columns), right


# --- tables and a picture ---


def by_draw(results, form, name):
    """A column's mean over tasks in each draw that has them all, an array. results: {Job: Result}."""
    draws = []
    for seed in sorted({job.seed for job in results}):
        values = [getattr(results[job], name) for job in results if (job.form, job.seed) == (form, seed)]
        if len(values) == len(TASKS):
            draws.append(np.mean(values))
    return np.array(draws)


def tables(folder):
    """Return Markdown, made of the files in folder alone."""
    results, _ = lab.load_runs(folder, Job, Result)
    for form in ("float", *FORMATS):
        if len(by_draw(results, form, "unmerged_accuracy")) == 0:
            raise ValueError(f"{folder} has no draw of {form} whole: the command without --tables makes the runs")
    pieces = [about(results), way_table(results), "Accuracy in % by task, means of the draws:", task_table(results)]
    return "\n\n".join(pieces)


def about(results):
    """The sentence above the tables."""
    n_draws = len(by_draw(results, FORMATS[-1], "scales_rms"))
    moved = by_draw(results, "float", "base_rms").mean()
    base = 100 * by_draw(results, "float", "base_accuracy").mean()
    unmerged = 100 * by_draw(results, "float", "unmerged_accuracy").mean()
    sizes = {job.form: f"{job.form} {result.size / 1e6:.0f}" for job, result in results.items() if result.size}
    return (
        f"Means of {len(TASKS)} tasks and {n_draws} draws, {N_ITEMS} questions each. In float32 the vectors move the "
        f"logits by {moved:.2f} rms, and accuracy from {base:.1f} to {unmerged:.1f} %. The layers' matrices take, in "
        f"MB: {', '.join(sizes[form] for form in FORMATS)}."
    )


def way_table(results):
    """A line per format and way: means of tasks and draws."""
    lines = []
    for form in FORMATS:
        for way in WAYS:
            rms, kl, same, changed = [
                by_draw(results, form, f"{way}_{name}").mean() for name in ("rms", "kl", "same", "bytes")
            ]
            accuracy = by_draw(results, form, f"{way}_accuracy")
            less = lab.student(100 * (accuracy - by_draw(results, form, "unmerged_accuracy")))
            cells = [f"{rms:.3f}", f"{kl:.1e}", f"{100 * same:.1f} %", f"{100 * accuracy.mean():.1f}"]
            lines.append([form, way, *cells, lab.spread(*less, "+.1f"), f"{100 * changed:.1f} %"])
    head = ["format", "way", "rms Δlogit", "KL, nats", "same answer", "accuracy", "less unmerged (t, draws)", "bytes"]
    return lab.markdown(head, lines)


def task_table(results):
    """Accuracy by task: a line per format, and way or base."""
    lines = []
    for form in ("float", *FORMATS):
        for way in ("base", "unmerged", *WAYS):
            cells = []
            for task in TASKS:
                jobs = [job for job in results if (job.task, job.form) == (task, form)]
                values = [getattr(results[job], f"{way}_accuracy") for job in jobs]
                cells.append("" if None in values or not values else f"{100 * np.mean(values):.1f}")
            if any(cells):
                lines.append([form, way, *cells])
    return lab.markdown(["format", "way", *TASKS], lines)


def draw_picture(folder):
    """KL and accuracy by format, a line a way; the unmerged model's accuracy in gray."""
    results, _ = lab.load_runs(folder, Job, Result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for way, line in zip(WAYS, ("o-", "x--", "s-"), strict=True):
        left.plot(FORMATS, [by_draw(results, form, f"{way}_kl").mean() for form in FORMATS], line, label=way)
        accuracy = [100 * by_draw(results, form, f"{way}_accuracy").mean() for form in FORMATS]
        right.plot(FORMATS, accuracy, line, label=way)
    accuracy = [100 * by_draw(results, form, "unmerged_accuracy").mean() for form in FORMATS]
    right.plot(FORMATS, accuracy, color="gray", ls=":", label="unmerged")
    left.set(yscale="log", ylabel="KL to the unmerged model (nats)")
    right.set(ylabel="accuracy (%)")
    for ax in (left, right):
        ax.legend(fontsize=8)
    save_picture(figure, folder / "quantized.png")


# --- the command ---


def make_runs(args, out):
    """Make the runs that out lacks, for as long as --minutes says. Returns whether all are made."""
    settings = {"gguf": args.gguf, "data": args.data, "folder": str(out), "steps": STEPS, "items": N_ITEMS}
    tasks = TASKS
    seeds = SEEDS
    if args.quick:
        settings |= {"steps": 2, "items": 4}
        tasks = TASKS[:1]
        seeds = SEEDS[:1]
    files = {"gguf": lab.file_hash(args.gguf)}
    for task, split in itertools.product(tasks, ("train", "test")):
        files[f"{task}-{split}"] = lab.file_hash(f"{args.data}/{task}/choices-1/{split}.jsonl")
    lab.open_folder(out, {"k": K, "lr": RATE, "steps": settings["steps"], "items": settings["items"], "files": files})
    end = time.time() + 60 * args.minutes
    for forms in (("float",), FORMATS):  # the vectors first, which the formats share
        jobs = [Job(task, form, seed) for seed in seeds for form in forms for task in tasks]
        minutes = (end - time.time()) / 60
        done = lab.make_runs(jobs, partial(measure, settings), Result, out, args.workers, minutes)
        if len(done) < len(jobs):
            print(f"{len(jobs) - len(done)} runs of {', '.join(forms)} are left: the same command continues")
            return False
    return True


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gguf = str(lab.ROOT / "data/smollm2.gguf")
    parser.add_argument("--gguf", default=gguf, help="a Llama's GGUF file (default: %(default)s)")
    parser.add_argument("--data", default=str(lab.ROOT / "data/sentiment"), help="folder (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/quantized"), help="folder (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="make the tables and the picture, and run nothing")
    parser.add_argument("--quick", action="store_true", help="movies, one draw, 2 steps, 4 questions; into OUT/quick")
    args = parser.parse_args(argv)
    out = args.out / "quick" if args.quick else args.out
    all_made = args.tables or make_runs(args, out)
    if args.quick or not all_made:
        return 0
    text = tables(out)
    lab.save_text(text, out / "table.md")
    draw_picture(out)
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("quantized.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
