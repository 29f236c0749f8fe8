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
from experiments.shots import PromptCache, SharedPrompts, ask, draw, read_task, train_on
from ia3 import IA3, attach
from tools.gguf_llama import Tensor, dequantize, from_gguf, import_gguf, scale_rows
from tools.plot import plt, save_picture

TASKS = ("movies", "tweets", "source")
FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WAYS = ("scales", "rows", "columns")
K, RATE, STEPS, N_ITEMS = 32, 1e-2, 16, 24
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Job(NamedTuple):
    """What is known of a run in advance."""

    task: str
    form: str  # of FORMATS, or 'float': not quantized
    seed: int


@dataclass
class Result:
    """What a run found. Of 'float' the base's columns, without vectors; of a format the ways' and the size."""

    unmerged_accuracy: float
    base_accuracy: float | None = None
    base_rms: float | None = None
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


def fold(blocks, vectors, form, way):
    """The matrices that change, {name: Tensor}. blocks: quantized's; way: of WAYS."""
    changed = {}
    for i, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        places = [("self_attn.k_proj", l_k), ("self_attn.v_proj", l_v)]
        if way != "columns":
            places.append(("mlp.up_proj", l_ff))
        for name, l in places:
            name = f"model.layers.{i}.{name}"
            l = l.detach().double()
            if way == "scales":
                rows = scale_rows(blocks[name], l).reshape(blocks[name].data.shape)
                changed[name] = Tensor(form, blocks[name].shape, 0, rows)
            else:
                product = l.unsqueeze(1) * dequantize(blocks[name]).double()
                changed[name] = quantize(product.float(), form)
        if way == "columns":
            name = f"model.layers.{i}.mlp.down_proj"
            product = dequantize(blocks[name]).double() * l_ff.detach().double()
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
    split = SharedPrompts(examples)
    order = sorted(range(len(split)), key=lambda i: len(examples[i][0]))  # little padding
    logits = torch.empty(len(split), model.config.vocab_size)
    for i in range(0, len(split), 10):
        ids = order[i : i + 10]
        prompts, _, padding, _ = split.windows(ids)
        end = model.hidden(prompts, cache=PromptCache(model, padding))[:, -1]  # (10, n_embd)
        logits[ids] = model.lm_head(end)
    return logits


def answers(logits, examples):
    """Which choice is the likeliest in each example, (examples,) long. The choices are single tokens."""
    best = []
    for row, (_, choices, _) in zip(logits, examples, strict=True):
        best.append(row[[choice for (choice,) in choices]].argmax())
    return torch.stack(best)


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

    Returns its Result, and where each answer is right: {'unmerged' or a way: (items,) bool}.
    """
    torch.manual_seed(job.seed)
    vectors = learned(settings, job).requires_grad_(False)
    model = floats(settings["gguf"])
    rows = read_task(settings["data"], job.task, "test")[: settings["items"]]
    examples = [ask(model.tokenizer, "plain", row, 0) for row in rows]
    labels = torch.tensor([label for _, _, label in examples])

    if job.form == "float":
        model.ia3 = vectors
        truth = answer_logits(model, examples)
        model.ia3 = None
        logits = answer_logits(model, examples)
        found = {"unmerged": answers(truth, examples), "base": answers(logits, examples)}
        right = {name: (chosen == labels).numpy() for name, chosen in found.items()}
        rms, _ = distance(logits, truth)
        return Result(float(right["unmerged"].mean()), float(right["base"].mean()), rms), right

    blocks = quantized(settings["gguf"], job.form)
    before = {name: model.get_submodule(name).weight.data for name in blocks}
    put(model, blocks)
    model.ia3 = vectors
    truth = answer_logits(model, examples)
    model.ia3 = None
    expected = answers(truth, examples)
    right = {"unmerged": (expected == labels).numpy()}
    n_bytes = sum(tensor.data.size for tensor in blocks.values())
    result = Result(float(right["unmerged"].mean()), size=n_bytes)
    for way in WAYS:
        changed = fold(blocks, vectors, job.form, way)
        put(model, changed)
        logits = answer_logits(model, examples)
        put(model, {name: blocks[name] for name in changed})
        found = answers(logits, examples)
        right[way] = (found == labels).numpy()
        rms, kl = distance(logits, truth)
        differ = sum((tensor.data != blocks[name].data).sum() for name, tensor in changed.items())
        columns = {
            f"{way}_accuracy": float(right[way].mean()),
            f"{way}_same": (found == expected).double().mean().item(),
            f"{way}_rms": rms,
            f"{way}_kl": kl,
            f"{way}_bytes": float(differ / n_bytes),
        }
        vars(result).update(columns)
    for name, weight in before.items():
        model.get_submodule(name).weight.data = weight
    return result, right


# --- tables and a picture ---


def by_draw(results, form, name):
    """A column's mean over tasks in each draw that has them all, a list. results: {Job: Result}."""
    draws = []
    for seed in sorted({job.seed for job in results}):
        values = [getattr(results[job], name) for job in results if (job.form, job.seed) == (form, seed)]
        if len(values) == len(TASKS):
            draws.append(float(np.mean(values)))
    return draws


def tables(folder):
    """Return Markdown, made of the files in folder alone."""
    results, _ = lab.load_runs(folder, Job, Result)
    for form in ("float", *FORMATS):
        if not by_draw(results, form, "unmerged_accuracy"):
            raise ValueError(f"{folder} has no draw of {form} whole: the command without --tables makes the runs")
    lines = []
    for form in FORMATS:
        unmerged = by_draw(results, form, "unmerged_accuracy")
        for way in WAYS:
            accuracy = by_draw(results, form, f"{way}_accuracy")
            rms, kl, same, changed = [
                np.mean(by_draw(results, form, f"{way}_{name}")) for name in ("rms", "kl", "same", "bytes")
            ]
            less = lab.spread(*lab.student(100 * (np.array(accuracy) - unmerged)), "+.1f")
            cells = [f"{rms:.3f}", f"{kl:.1e}", f"{100 * same:.1f} %", f"{100 * np.mean(accuracy):.1f}"]
            lines.append([form, way, *cells, less, f"{100 * changed:.1f} %"])
    head = ["format", "way", "rms Δlogit", "KL, nats", "same answer", "accuracy", "less unmerged (t, draws)", "bytes"]
    pieces = [about(results), lab.markdown(head, lines), "Accuracy in % by task, means of the draws:"]

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
    return "\n\n".join([*pieces, lab.markdown(["format", "way", *TASKS], lines)])


def about(results):
    """The sentence above the tables."""
    draws = len(by_draw(results, FORMATS[-1], "scales_rms"))
    base, unmerged = [100 * np.mean(by_draw(results, "float", f"{name}_accuracy")) for name in ("base", "unmerged")]
    sizes = {job.form: f"{job.form} {result.size / 1e6:.0f}" for job, result in results.items() if result.size}
    return (
        f"Means of {len(TASKS)} tasks and {draws} draws, {N_ITEMS} questions each. In float32 the vectors move the "
        f"logits by {np.mean(by_draw(results, 'float', 'base_rms')):.2f} rms, and accuracy from {base:.1f} to "
        f"{unmerged:.1f} %. The layers' matrices take, in MB: {', '.join(sizes[form] for form in FORMATS)}."
    )


def draw_picture(folder):
    """KL and accuracy by format, a line a way; the unmerged model's accuracy in gray."""
    results, _ = lab.load_runs(folder, Job, Result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    x = np.arange(len(FORMATS))
    for way, line in zip(WAYS, ("o-", "x--", "s-"), strict=True):
        left.plot(x, [np.mean(by_draw(results, form, f"{way}_kl")) for form in FORMATS], line, label=way)
        accuracy = [100 * np.mean(by_draw(results, form, f"{way}_accuracy")) for form in FORMATS]
        right.plot(x, accuracy, line, label=way)
    accuracy = [100 * np.mean(by_draw(results, form, "unmerged_accuracy")) for form in FORMATS]
    right.plot(x, accuracy, color="gray", ls=":", label="unmerged")
    left.set(yscale="log", ylabel="KL to the unmerged model (nats)")
    right.set(ylabel="accuracy (%)")
    for ax in (left, right):
        ax.set_xticks(x, FORMATS)
        ax.legend(fontsize=8)
    save_picture(figure, folder / "quantized.png")


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
    if not args.tables:
        settings = {"gguf": args.gguf, "data": args.data, "folder": str(out), "steps": STEPS, "items": N_ITEMS}
        tasks, seeds = TASKS, (0, 1, 2)
        if args.quick:
            settings |= {"steps": 2, "items": 4}
            tasks, seeds = TASKS[:1], (0,)
        about = {"k": K, "lr": RATE, "steps": settings["steps"], "items": settings["items"]}
        about["files"] = {"gguf": lab.file_hash(args.gguf)}
        for task, split in itertools.product(tasks, ("train", "test")):
            about["files"][f"{task}-{split}"] = lab.file_hash(f"{args.data}/{task}/choices-1/{split}.jsonl")
        lab.open_folder(out, about)
        end = time.time() + 60 * args.minutes
        for forms in (("float",), FORMATS):  # the vectors first, which the formats share
            jobs = [Job(task, form, seed) for seed in seeds for form in forms for task in tasks]
            minutes = (end - time.time()) / 60
            done = lab.make_runs(jobs, partial(measure, settings), Result, out, args.workers, minutes)
            if len(done) < len(jobs):
                print(f"{len(jobs) - len(done)} runs of {', '.join(forms)} are left: the same command continues")
                return 0
    if args.quick:
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
