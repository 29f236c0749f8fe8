"""Few-shot (IA)³ against in-context learning: the paper's title, rerun on SmolLM2-135M and rated sentences.

    python data/prepare.py sentiment && python -m tools.convert smollm2 --out data/smollm2.pt
    python -m experiments.fewshot --stage plan                # how many runs and hours; reads no test
    python -m experiments.fewshot --stage formats             # how to ask in context: chosen on products' val
    python -m experiments.fewshot --stage rates               # learning rates: chosen there, too
    python -m experiments.fewshot --stage runs --minutes 60   # on test; again and again until it says that all is done
    python -m experiments.fewshot --stage costs
    python -m experiments.fewshot --stage report

This page is the protocol. It was committed before any test split was read.

**Tasks.** Reported: movies, tweets, news (is a sentence negative or positive?), source (which of four sets is it
from?), movies-ab (answers A and B) and movies-flipped (answers exchanged). Products is the development task: what is
chosen is chosen on its val, its test is never read, and it stands in no reported row, except as a source of labels in
transfer. (Noted later: and in source, one of whose four sets it is; 200 sentences of its test are in source's.) The
model may have read the movie sentences, and such questions, before: only source, A/B and flipped are free of that.
Before this protocol, a pilot tried rates on movie sentences, which are in train here, and scored 200 product sentences
and 200 tweets zero-shot, choosing nothing by them.

**Scoring.** One rule for every row: a choice's log-likelihood after the prompt, divided by its number of tokens, and
the best choice is the answer. A prompt, and what stands before it, is read once through the cache. Three templates.
The accuracy of a draw is the median of its three; a row's is the mean over draws. The base is
SmolLM2-135M-Instruct, Q4_1 dequantized. Weights and what is computed are bfloat16, in which it was published, for every
row; what is trained, logits and log-likelihoods are float32.

**Draws.** K training examples, as many of each label, from train; draws 0 to 4, or 0 to 2 where it says three. Smaller
K are parts of larger ones. Every method sees the same K examples in a draw; no label of val is used.

**(IA)³.** As in the paper (3.2, 3.5), but with AdamW and fewer steps: rate 3e-3, batches of 8, 6 % warmup, linear
decay, clip 1, L_LM + L_UL + L_LN. The 3K pairs of example and template are passed through in a random order, again and
again. 100 steps, a tenth of the paper's. Plain format.

**In-context learning.** The K examples, in the template of the question, before it: plain (an empty line between) or
as a chat. Raw, or with contextual calibration (Zhao et al. 2021, arXiv:2102.09690): the choices' probabilities divided
by their mean over the content-free sentences N/A, [MASK] and an empty one.

**Chosen on products** (val; K = 32; highest mean accuracy, the first of equals): in-context learning's format and
whether it is calibrated (five draws), used at every K; (IA)³'s rate of RATES (three draws); each rival's of its rates
(two draws). Formats come first; what needs no rate of theirs may run before the rates are chosen.

**Primary comparison, one difference a task**: (IA)³ at K = 32, 100 steps, 3e-3, less in-context learning at K = 32,
first order, as chosen; paired on draw and item. All else is descriptive.

**Runs on test**, in this order; table.md says which are made. (1) The primary comparison: five draws of (IA)³ and of
in-context learning at K = 32; beside it zero-shot, plain and chat, and two floors at every K: one bias a label added to
the zero-shot scores, and logistic regression (L2 penalty 1, standardized) on the last hidden state of the prompt. (2)
Movies and news, K = 32, 100 steps, three draws: full fine-tuning, LoRA r = 4 on q and v, LoRA r = 1 on all linear maps,
a soft prompt of 16; BitFit has nothing to train in this model. (3) Both at K = 4, 16, 64, five draws: movies, tweets
and news. (4) (IA)³ at the rate that products chose, K = 32, five draws, where it is another than 3e-3. (5) Movies, K =
32, three draws: L_LM, L_LN, L_LM + L_UL, L_LM + L_LN. (6) Transfer, movies, tweets and news, three draws: vectors
trained 100 steps on 192 labels of the other three sets, then on 0 or 32 of the target; beside it 32 in-context examples
from those sets. (Noted later: they are pooled, so the largest, movies, is most of them.) This is not the paper's 3.4:
same labels, other text. (7) 1000 steps, K = 32, three draws, movies only. (Noted later, when all else was known: and
movies-ab.) (8) As (3), source. (9) In-context learning at K = 32 in two other orders, three draws.

**Intervals.** The middle 95 % of 2000 bootstrap resamples of draws and items, crossed (the median over templates is
taken in each), and beside it Student's t over the draws' differences. No interval over tasks: these are no sample of
tasks.

**Reported** whatever comes out: results.csv (every run), windows.npz (the score of every choice of every prediction),
costs.csv, table.md, accuracy.png, costs.png. A training that diverges is scored as it then stands, and marked.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data as datasets
from experiments import lab, ranking
from experiments.shots import (
    BATCH_SIZE,
    RIVALS,
    SharedPrompts,
    accuracy_of,
    ask,
    choice_log_likelihoods,
    context,
    draw,
    measure,
    pairs_to_learn,
    read_task,
    right,
    scores,
)
from ia3 import attach, fingerprint
from tools.plot import plt, save_picture

TASKS = ("movies", "tweets", "news", "source", "movies-ab", "movies-flipped")
KS = (4, 16, 32, 64)
RATE = 3e-3
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS = 100
N_SOURCE = 192  # labels of other sets in transfer
SUBSETS = ("lm", "ln", "lm-ul", "lm-ln")  # of (IA)³'s three losses
JOB = {"split": str, "task": str, "method": str, "form": str, "k": int, "lr": float, "steps": int, "order": int}
RUNS = JOB | {"seed": int, "accuracy": float, "diverged": int, "seconds": float}
COSTS = {"k": int, "prefix_tokens": int, "flops": int, "prefix_flops": int, "by_2n": int, "prefix_by_2n": int}
COSTS |= {"cache_bytes": int, "seconds": float, "training_flops": int, "task_bytes": int}


# --- which runs ---


def job(split, task, method, seed=0, form="plain", k=0, lr=0.0, steps=0, order=0):
    """What is known of a run in advance."""
    found = {"split": split, "task": task, "method": method, "form": form, "k": k, "lr": lr, "steps": steps}
    return found | {"order": order, "seed": seed}


def main_k(settings):
    """The K of the primary comparison: 32."""
    return settings["ks"][-2]


def jobs_of_formats(settings):
    """On products' val: how in-context learning is asked."""
    jobs = [job("val", "products", "zero", form=form) for form in ("plain", "chat")]
    k = main_k(settings)
    return jobs + [job("val", "products", "icl", s, form, k) for s in settings["seeds"] for form in ("plain", "chat")]


def jobs_of_rates(settings):
    """On products' val: how fast each method learns."""
    seeds, k, steps = settings["seeds"], main_k(settings), settings["steps"]
    jobs = [job("val", "products", "ia3", s, "plain", k, rate, steps) for rate in RATES for s in seeds[:3]]
    for name, (_, rates) in RIVALS.items():
        jobs += [job("val", "products", name, s, "plain", k, rate, steps) for rate in rates for s in seeds[:2]]
    return jobs


def jobs_of_other_ks(settings, form, task):
    """Both sides of the primary comparison at the other K."""
    jobs = []
    others = [k for k in settings["ks"] if k != main_k(settings)]
    for k in others:
        jobs += [job("test", task, "ia3", s, "plain", k, RATE, settings["steps"]) for s in settings["seeds"]]
        jobs += [job("test", task, "icl", s, form, k) for s in settings["seeds"]]
    return jobs


def jobs_to_report(settings, chosen):
    """On test, in the order of the protocol's list; without those whose rate is not chosen (by chosen_on_products)."""
    seeds, k32, steps = settings["seeds"], main_k(settings), settings["steps"]
    form = chosen["form"]
    jobs = []
    for task in settings["tasks"]:
        for s in seeds:
            jobs.append(job("test", task, "ia3", s, "plain", k32, RATE, steps))
            jobs.append(job("test", task, "icl", s, form, k32))
        jobs += [job("test", task, "zero", form=f) for f in ("plain", "chat")]
    rivals = [name for name in RIVALS if name in chosen]
    for name in rivals:
        for task in ("movies", "news"):
            jobs += [job("test", task, name, s, "plain", k32, chosen[name], steps) for s in seeds[:3]]
    for task in ("movies", "tweets", "news"):
        jobs += jobs_of_other_ks(settings, form, task)
    if chosen.get("ia3", RATE) != RATE:
        for task in settings["tasks"]:
            jobs += [job("test", task, "ia3", s, "plain", k32, chosen["ia3"], steps) for s in seeds]
    for losses in SUBSETS:
        jobs += [job("test", "movies", f"ia3-{losses}", s, "plain", k32, RATE, steps) for s in seeds[:3]]
    for task in ("movies", "tweets", "news"):
        for s in seeds[:3]:
            jobs += [job("test", task, "transfer", s, "plain", k, RATE, steps) for k in (0, k32)]
            jobs.append(job("test", task, "icl-other", s, form, k32))
    for task in ("movies", "movies-ab"):
        jobs += [job("test", task, "ia3", s, "plain", k32, RATE, 10 * steps) for s in seeds[:3]]
    jobs += jobs_of_other_ks(settings, form, "source")  # the costliest: late
    for task in settings["tasks"]:
        jobs += [job("test", task, "icl", s, form, k32, order=order) for s in seeds[:3] for order in (1, 2)]
    return [row for row in jobs if row["task"] in settings["tasks"]]


def tried_on_products(folder, settings):
    """The draws of what products chose among, {method: {what: [right, a draw each]}}, and the methods that lack a run.

    what: a rate; for 'icl', (form, whether calibrated).
    """
    rows, arrays = lab.read_runs(folder, RUNS)
    runs = {lab.run_name(row): lab.arrays_of(row, arrays, folder) for row in rows}
    tried = {}
    missing = set()
    for row in jobs_of_formats(settings) + jobs_of_rates(settings):
        name, method = lab.run_name(row), row["method"]
        if method == "zero":
            continue  # it stands beside them: nothing to choose
        found = tried.setdefault(method, {})
        if name not in runs:
            missing.add(method)
        elif method == "icl":
            for how in (False, True):
                found.setdefault((row["form"], how), []).append(right(runs[name], "free" if how else None))
        else:
            found.setdefault(row["lr"], []).append(right(runs[name]))
    return tried, missing


def chosen_on_products(folder, settings):
    """What products chose: {'form', 'calibrated', and the rate of 'ia3' and of each rival whose rates are all tried}.

    Raises ValueError before the formats are chosen.
    """
    tried, missing = tried_on_products(folder, settings)
    if "icl" in missing:
        raise ValueError("in-context learning's runs on products are missing: --stage formats makes them")
    best = {}
    for method in sorted(tried.keys() - missing):
        best[method] = max(tried[method], key=lambda what: accuracy_of(tried[method][what]))
    form, how = best.pop("icl")
    return {"form": form, "calibrated": how} | best


def make(jobs, settings, folder, args):
    """Make the jobs that folder lacks, as the flags say. Prints where it stands."""
    done = lab.measure_all(jobs, partial(measure, settings), RUNS, folder, args.workers, args.minutes)
    n = len(jobs) - len(done)
    print(f"{n} runs of {len(jobs)} are left: the same command goes on" if n else "all runs are done")


# --- what it takes ---


def n_tokens(examples):
    """How many tokens these (prompt, choices, label) hold."""
    return sum(len(prompt) + sum(map(len, choices)) for prompt, choices, _ in examples)


def plan(settings):
    """Print how many runs there are, their tokens, and the hours that one core takes. Reads val, as long as test."""
    torch.set_num_threads(1)
    model = common.load(settings["base"], getattr(torch, settings["dtype"])).to(settings["device"])
    supposed = {"form": "chat", "ia3": None} | {name: rates[0] for name, (_, rates) in RIVALS.items()}
    jobs = jobs_of_formats(settings) + jobs_of_rates(settings) + jobs_to_report(settings, supposed)
    asked, learned = {}, {}  # tokens of a task's val as questions, of one of them
    for task in {row["task"] for row in jobs}:
        val = read_task(settings["data"], task, "val")
        rows = [ask(model.tokenizer, "plain", row, t) for row in val for t in range(3)]
        asked[task] = n_tokens(rows)
        learned[task] = asked[task] / len(rows)
    to_read = sum(asked[row["task"]] for row in jobs)
    to_learn = sum(row["steps"] * BATCH_SIZE * learned[row["task"]] for row in jobs)

    # the pace, in the processor's time, which other programs do not lengthen
    rows = read_task(settings["data"], "products", "val")[:64]
    split = SharedPrompts([ask(model.tokenizer, "plain", row, 1) for row in rows])
    scores(model, split)  # the first time is slower
    start = time.process_time()
    scores(model, split)
    read_pace = n_tokens(split.examples) / (time.process_time() - start)
    attach(model)
    batch = datasets.to_device(split.windows(range(BATCH_SIZE)), model.lm_head.weight.device)
    loss_fn = ranking.make_loss(log_likelihoods_of=choice_log_likelihoods)
    with sdpa_kernel(SDPBackend.MATH):  # as shots.train_on does
        loss_fn(model, *batch).backward()
        start = time.process_time()
        loss_fn(model, *batch).backward()
    learn_pace = BATCH_SIZE * learned["products"] / (time.process_time() - start)
    hours = (to_read / read_pace + to_learn / learn_pace) / 3600
    print(f"{len(jobs)} runs: {to_read:,} tokens of questions to read, {to_learn:,.0f} to learn from, and the contexts")
    print(f"{read_pace:.0f} tokens a second read, {learn_pace:.0f} learned from: {hours:.1f} hours of one core")


def measure_costs(settings, chosen):
    """The rows of costs.csv: a prediction after K examples in a cache; K = 0 is (IA)³'s, too.

    Means over the three templates, and training's over an epoch of its batches. Counted are matrix products
    (lab.count_flops); by_2n is the paper's 2N a token, N all parameters.
    """
    model = common.load(settings["base"], getattr(torch, settings["dtype"])).to(settings["device"])
    pool = read_task(settings["data"], "products", "train")
    two_n = 2 * sum(p.numel() for p in model.parameters())
    vectors = attach(model)
    split = pairs_to_learn(model.tokenizer, draw(pool, main_k(settings), 0))
    loss_fn = ranking.make_loss(log_likelihoods_of=choice_log_likelihoods)
    n_batches = math.ceil(len(split) / BATCH_SIZE)

    def backward(step):
        batch = datasets.to_device(split.batch(0, step, BATCH_SIZE), model.lm_head.weight.device)
        loss_fn(model, *batch).backward()

    flops = sum(sum(lab.count_flops(partial(backward, step))) for step in range(n_batches))
    training = settings["steps"] * flops // n_batches
    model.requires_grad_(False)
    rows = []
    for k in (0, *settings["ks"]):
        model.ia3 = None if k else vectors
        form = chosen["form"] if k else "plain"
        examples = draw(pool, k, 0) if k else []
        costs = [cost_of_a_prediction(model, form, pool[:16], examples, t, two_n) for t in range(3)]
        row = {"k": k}
        for name in costs[0]:
            mean = np.mean([cost[name] for cost in costs])
            row[name] = round(mean) if COSTS[name] is int else mean
        rows.append(row | {"training_flops": training, "task_bytes": 4 * vectors.count()})
    return rows


def cost_of_a_prediction(model, form, asked, examples, template, two_n):
    """{column of COSTS: value} of a prediction in one template, the mean of asked, behind examples in a cache."""
    prefix = context(model.tokenizer, form, examples, template)
    split = ranking.Choices([ask(model.tokenizer, form, row, template) for row in asked])
    alone = ranking.Choices([([0], [[0]], 0)])  # a token: what the prefix alone costs
    calls = [partial(ranking.scores, model, some, prefix) for some in (split, alone)]
    flops, before = [sum(lab.count_flops(call)) for call in calls]
    times = lab.interleave(dict(enumerate(calls)), 5, model.lm_head.weight.device)
    row = {"prefix_tokens": len(prefix), "flops": (flops - before) / len(asked)}
    row["prefix_flops"] = before if prefix else 0
    row |= {"by_2n": two_n * n_tokens(split.examples) / len(asked), "prefix_by_2n": two_n * len(prefix)}
    config = model.config
    row["cache_bytes"] = model.lm_head.weight.itemsize * len(prefix) * config.n_layer * sum(config.widths[:2])
    return row | {"seconds": (np.median(times[0]) - np.median(times[1])) / len(asked)}


# --- tables and a picture, from the files alone ---


def results(folder):
    """Return {row's name: {task: [right, a draw each]}} of the runs on test, and the names of what diverged."""
    rows, arrays = lab.read_runs(folder, RUNS)
    found = {}
    for row in sorted((row for row in rows if row["split"] == "test"), key=lambda row: row["seed"]):
        run = lab.arrays_of(row, arrays, folder)
        name = row_name(row)
        draws = {name: right(run)}
        if "free" in run:
            draws[f"{name}, calibrated"] = right(run, "free")
            draws[f"{name}, batch-calibrated"] = right(run, "beta")
        for name, value in draws.items():
            found.setdefault(name, {}).setdefault(row["task"], []).append(value)
        for floor in run:
            if floor.startswith(("biases", "probe")):
                method, k, _ = floor.split("-")
                of_task = found.setdefault(f"{method}, plain, K = {k}", {})
                of_task.setdefault(row["task"], []).append(run[floor] == run["labels"])
    return found, [lab.run_name(row) for row in rows if row["diverged"]]


def row_name(row):
    """The row of the tables in which this run is a draw."""
    if row["steps"]:
        return name_of_trained(row["method"], row["k"], row["steps"], row["lr"])
    return name_of_asked(row["method"], row["form"], row["k"], row["order"])


def name_of_trained(method, k, steps, rate):
    """The row of what is trained so: row_name and the tables name it alike."""
    return f"{method}, plain, K = {k}, {steps} steps at {rate:g}"


def name_of_asked(method, form, k, order=0, calibrated=False):
    """The row of what is asked so, without training."""
    name = f"{method}, {form}, K = {k}"
    if order:
        name += f", order {order}"
    return f"{name}, calibrated" if calibrated else name


def all_run(found, settings, chosen):
    """found, of results(), without what lacks a draw yet: only then are the first draws of two rows the same."""
    wanted = Counter((row_name(row), row["task"]) for row in jobs_to_report(settings, chosen))
    whole = {}
    for name, of_task in found.items():
        for task, draws in of_task.items():
            run = name.removesuffix(", calibrated").removesuffix(", batch-calibrated")
            if len(draws) >= wanted[run, task]:
                whole.setdefault(name, {})[task] = draws
    return whole


def paired(whole, pair, task):
    """The draws of two rows, as many as both have, or None. whole: of all_run().

    Zero-shot has no draws: the same stands beside each.
    """
    ours, theirs = [whole.get(name, {}).get(task, []) for name in pair]
    if len(theirs) == 1:
        theirs = theirs * len(ours)
    n = min(len(ours), len(theirs))
    return (ours[:n], theirs[:n]) if n else None


def names_at(k, settings, chosen):
    """The rows that are compared: (IA)³'s at 3e-3, and in-context learning's as products chose it."""
    in_context = name_of_asked("icl", chosen["form"], k, calibrated=chosen["calibrated"])
    return name_of_trained("ia3", k, settings["steps"], RATE), in_context


def difference(ours, theirs, templates=slice(None)):
    """The cells of a comparison, of the same draws: both accuracies, their difference, and its interval over draws.

    templates: all, or a part.
    """
    ours, theirs = [[draw[templates] for draw in side] for side in (ours, theirs)]
    value, low, high, t_low, t_high = [100 * x for x in lab.accuracy_difference(ours, theirs)]
    cells = [f"{100 * accuracy_of(draws):.1f}" for draws in (ours, theirs)]
    return [*cells, lab.spread(value, low, high, "+.1f"), f"{t_low:+.1f} to {t_high:+.1f}"]


def beside_rivals(whole, settings, chosen):
    """A table of (IA)³, at 3e-3 and at the rate that products chose, less every rival. whole: of all_run()."""
    k, steps = main_k(settings), settings["steps"]
    lines = []
    for rate in dict.fromkeys((RATE, chosen.get("ia3", RATE))):
        for rival in [name for name in RIVALS if name in chosen]:
            pair = (name_of_trained("ia3", k, steps, rate), name_of_trained(rival, k, steps, chosen[rival]))
            for task in settings["tasks"]:
                sides = paired(whole, pair, task)
                if sides:
                    first = difference(*sides, slice(1))[2:]
                    lines.append([f"{rate:g}", rival, task, *difference(*sides), *first])
    head = ["(IA)³ at", "rival", "task", "(IA)³", "rival", "difference (95 %, draws and items)", "t, over draws"]
    return lab.markdown([*head, "first template (95 %, draws and items)", "t, over draws"], lines)


def comparison(whole, settings, chosen, templates=slice(None)):
    """A table of the primary comparison's two sides, a line a task. whole: of all_run(). templates: all, or a part."""
    lines = []
    for task in settings["tasks"]:
        sides = paired(whole, names_at(main_k(settings), settings, chosen), task)
        if sides:
            lines.append([task, *difference(*sides, templates)])
        else:
            lines.append([task, "not all draws are run", "", "", ""])
    head = ["task", "(IA)³", "in-context", "difference (95 %, draws and items)", "t, over draws"]
    return lab.markdown(head, lines)


def other_differences(whole, settings, chosen):
    """A table of what else can be compared, a line a task: over all templates, and on the first alone.

    whole: of all_run().
    """
    k, steps = main_k(settings), settings["steps"]
    papers, in_context = names_at(k, settings, chosen)
    best = name_of_trained("ia3", k, steps, chosen.get("ia3", RATE))
    probe = f"probe, plain, K = {k}"
    form, calibrated = chosen["form"], chosen["calibrated"]
    zero = name_of_asked("zero", form, 0, calibrated=calibrated)
    pairs = [(papers, probe), (best, probe), (best, papers), (papers, f"biases, plain, K = {k}")]
    raw = name_of_asked("zero", form, 0)
    pairs += [(in_context, zero), (in_context, raw), (papers, raw), (best, in_context)]
    by_batch, zero_by_batch = [f"{name}, batch-calibrated" for name in (name_of_asked("icl", form, k), raw)]
    pairs += [(papers, by_batch), (best, by_batch), (by_batch, zero_by_batch)]
    for other in [n for n in settings["ks"] if n != k]:
        pair = names_at(other, settings, chosen)
        pairs += [pair, (pair[0], f"probe, plain, K = {other}")]
    fewest, *_, most = [names_at(n, settings, chosen)[1] for n in settings["ks"]]
    pairs.append((most, fewest))
    others = [name_of_asked("icl", form, k, order, calibrated) for order in (1, 2)]
    pairs += [(in_context, other) for other in others] + [(papers, other) for other in others]
    pairs += [(papers, name_of_trained(f"ia3-{losses}", k, steps, RATE)) for losses in SUBSETS]
    from_others = [name_of_trained("transfer", n, steps, RATE) for n in (0, k)]
    of_others = name_of_asked("icl-other", form, k, calibrated=calibrated)
    pairs += [(from_others[0], of_others), (from_others[1], papers), (from_others[1], best)]
    long = name_of_trained("ia3", k, 10 * steps, RATE)
    pairs += [(long, other) for other in (papers, best, in_context, by_batch, probe)]
    lines = []
    for pair in dict.fromkeys(pairs):
        for task in settings["tasks"]:
            sides = paired(whole, pair, task)
            if sides and pair[0] != pair[1]:
                line = [*pair, task, f"{len(sides[0])}"]
                for part in (slice(None), slice(1)):
                    line += difference(*sides, part)[2:]
                lines.append(line)
    interval = "(95 %, draws and items)"
    head = ["row", "less row", "task", "draws", f"difference {interval}", "t, over draws"]
    return lab.markdown([*head, f"first template {interval}", "t, over draws"], lines)


def by_order(whole, settings, chosen):
    """A table of how far the order of the examples moves a draw's accuracy in context. whole: of all_run()."""
    how = chosen["form"], main_k(settings)
    names = [name_of_asked("icl", *how, order, chosen["calibrated"]) for order in (0, 1, 2)]
    lines = []
    for task in settings["tasks"]:
        rows = [whole.get(name, {}).get(task, []) for name in names]
        orders_of_draws = list(zip(*rows, strict=False))  # the first order has more draws than the others
        cells = [" / ".join(f"{100 * accuracy_of([draw]):.1f}" for draw in orders) for orders in orders_of_draws]
        if cells:
            lines.append([task, *cells])
    return lab.markdown(["task", *[f"draw {s}" for s in settings["seeds"][:3]]], lines)


def range_of_draws(draws):
    """A cell: the mean accuracy of the draws, the lowest and the highest, and how many there are."""
    each = [100 * accuracy_of([draw]) for draw in draws]
    return f"{lab.spread(100 * accuracy_of(draws), min(each), max(each), '.1f')}, {len(each)}"


def templates_of_draws(draws):
    """A cell: the mean accuracy of the draws by template."""
    means = np.mean([draw.mean(-1) for draw in draws], 0)  # (templates,)
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


def choices_on_products(tried):
    """A table of what products chose among: the mean accuracy of the draws. tried: of tried_on_products."""
    lines = []
    for method, draws_of in tried.items():
        cells = []
        for what, draws in draws_of.items():
            if method == "icl":
                form, how = what
                name = f"{form}, calibrated" if how else form
            else:
                name = f"at {what:g}"
            cells.append(f"{100 * accuracy_of(draws):.1f} {name}")
        if cells:
            lines.append([method, "; ".join(cells)])
    return lab.markdown(["", "accuracy in %, means of the draws"], lines)


def tables(folder, settings, chosen):
    """The tables, in Markdown."""
    found, diverged = results(folder)
    whole = all_run(found, settings, chosen)
    tasks = settings["tasks"]
    rows, _ = lab.read_runs(folder, RUNS)
    done = {lab.run_name(row) for row in rows}
    wanted = [lab.run_name(row) for row in jobs_of_rates(settings) + jobs_to_report(settings, chosen)]
    made = f"{sum(name in done for name in wanted)} of {len(wanted)} runs are made, the formats' apart."
    pieces = [f"Chosen on products: {json.dumps(chosen)}. {made}", comparison(whole, settings, chosen)]
    pieces.append("The same on the first template alone, whose answers are single tokens; descriptive:")
    pieces.append(comparison(whole, settings, chosen, slice(1)))
    pieces.append(
        "Beside the rivals, each at the rate that products chose, on the same draws; descriptive. Neither interval "
        "covers all: the first is too narrow for few draws, the second takes test's sentences as given. A difference "
        "is clear where both leave out 0:"
    )
    pieces.append(beside_rivals(whole, settings, chosen))
    pieces.append(
        "Other differences between rows of the tables below, in points; descriptive, and corrected for nothing. "
        "Batch-calibrated: divided, without labels, by the mean over the questions themselves; tried afterwards:"
    )
    pieces.append(other_differences(whole, settings, chosen))
    pieces.append(
        f"In context, K = {main_k(settings)}, accuracy in %: a draw's examples in one order / in another / in a third:"
    )
    pieces.append(by_order(whole, settings, chosen))
    captions = {
        range_of_draws: "Accuracy in %, the mean of the draws (lowest to highest), number of draws:",
        templates_of_draws: "The same by template, means of the draws:",
    }
    for cell, caption in captions.items():
        lines = []
        for name, of_task in found.items():
            lines.append([name, *[cell(of_task[task]) if task in of_task else "" for task in tasks]])
        pieces += [caption, lab.markdown(["", *tasks], lines)]
    pieces.append(f"What products chose by, on its val, K = {main_k(settings)}:")
    pieces.append(choices_on_products(tried_on_products(folder, settings)[0]))
    pieces.append(f"Training diverged in: {', '.join(diverged) or 'no run'}.")
    return "\n\n".join(pieces + cost_table(lab.read_csv(folder / "costs.csv", COSTS)))


def cost_table(costs):
    """costs: costs.csv's rows, none where it is not measured."""
    if not costs:
        return []
    head = ["K in context", "tokens", "FLOPs of a prediction, cached", "read anew", "by 2N", "read anew, by 2N"]
    head += ["seconds", "cache, bytes", "(IA)³ cheaper after, cached", "read anew"]
    lines = []
    for row in costs:
        anew = row["flops"] + row["prefix_flops"]
        counts = [row["flops"], anew, row["by_2n"], row["by_2n"] + row["prefix_by_2n"]]
        line = [f"{row['k']}", f"{row['prefix_tokens']:,}", *[f"{n:.2e}" for n in counts], f"{row['seconds']:.3f}"]
        more = [n - costs[0]["flops"] for n in (row["flops"], anew)]
        after = [f"{math.ceil(row['training_flops'] / n):,} predictions" if n > 0 else "" for n in more]
        lines.append([*line, f"{row['cache_bytes']:,}", *after])
    row = costs[0]
    text = (
        f"(IA)³'s prediction is that of K = 0. Its training: {row['training_flops']:.2e} FLOPs. A task: "
        f"{row['task_bytes']:,} bytes; a thousand, {row['task_bytes'] / 1e3:,.0f} MB. The paper's setting (its table "
        "1): T-Few 1.1e12 FLOPs a prediction, by N a token, 2.7e16 to train, by 3N, 4.2 MB; GPT-3 175B in context "
        "1.4e15, by 2N (section 4.2)."
    )
    return [lab.markdown(head, lines), text]


def draw_pictures(folder, settings, chosen):
    """Accuracy against K and, where costs.csv is measured, against the FLOPs of a prediction; a panel a task.

    A point is the mean of all draws, its bar the lowest and the highest; where draws are not made yet, there is none.
    """
    found = all_run(results(folder)[0], settings, chosen)
    costs = {row["k"]: row for row in lab.read_csv(folder / "costs.csv", COSTS)}
    labels = {
        "accuracy": ("(IA)³", "in context", "logistic regression"),
        "costs": ("(IA)³", "in context, from a cache", "in context, read anew"),
    }
    n_columns = min(len(settings["tasks"]), 3)
    n_rows = math.ceil(len(settings["tasks"]) / n_columns)
    for name in ("accuracy", "costs") if costs else ("accuracy",):
        size = {
            "figsize": (3.4 * n_columns + 1.8, 3 * n_rows),
            "layout": "constrained",
            "squeeze": False,
            "sharey": True,
        }
        figure, axes = plt.subplots(n_rows, n_columns, **size)
        for ax, task in zip(axes.flat, settings["tasks"], strict=True):
            for label in labels[name]:
                each = {}  # {K: accuracy of every draw}
                for k in settings["ks"]:
                    ours, theirs = names_at(k, settings, chosen)
                    name_of = {"(IA)³": ours, "logistic regression": f"probe, plain, K = {k}"}
                    draws = found.get(name_of.get(label, theirs), {}).get(task)
                    if draws:
                        each[k] = [100 * accuracy_of([draw]) for draw in draws]
                means = [np.mean(draws) for draws in each.values()]
                lows = [min(draws) for draws in each.values()]
                highs = [max(draws) for draws in each.values()]
                bars = [np.subtract(means, lows), np.subtract(highs, means)]
                x = list(each)
                if name == "costs":
                    of_k = [costs[0 if label == "(IA)³" else k] for k in each]
                    x = [row["flops"] for row in of_k]
                    if label == "in context, read anew":
                        x = [row["flops"] + row["prefix_flops"] for row in of_k]
                    for k, flops, mean in zip(each, x, means, strict=True):
                        ax.annotate(f" {k}", (flops, mean), fontsize=7)
                ax.errorbar(x, means, bars, fmt="o-", ms=4, capsize=2, label=label)
            zero = found.get("zero, plain, K = 0", {}).get(task)
            if zero:
                ax.axhline(100 * accuracy_of(zero), color="gray", ls=":", label="zero-shot, uncalibrated")
            ax.set(xscale="log", title=task, xlabel="labelled examples" if name == "accuracy" else "FLOPs a prediction")
            if name == "accuracy":
                ax.minorticks_off()
                ax.set_xticks(settings["ks"], [str(k) for k in settings["ks"]])
        for ax in axes[:, 0]:
            ax.set_ylabel("accuracy (%)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        save_picture(figure, folder / f"{name}.png")


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("plan", "formats", "rates", "runs", "costs", "report")
    parser.add_argument("--stage", choices=stages, required=True, help="see above")
    parser.add_argument("--base", default=str(lab.ROOT / "data/smollm2.pt"), help="a Llama (default: %(default)s)")
    parser.add_argument("--data", default=str(lab.ROOT / "data/sentiment"), help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/fewshot"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one draw, 2 steps, 8 items of movies; into OUT/quick")
    args = parser.parse_args(argv)
    device, dtype = common.pick_device(args.device, args.dtype)
    settings = {"base": args.base, "data": args.data, "device": str(device), "dtype": dtype}
    settings |= {"items": None, "tasks": TASKS}
    settings |= {"seeds": [0, 1, 2, 3, 4], "ks": KS, "steps": STEPS, "n_source": N_SOURCE}
    if args.quick:
        settings |= {"items": 8, "tasks": ("movies",), "seeds": [0], "ks": (2, 4, 6), "steps": 2, "n_source": 6}
    if args.stage == "plan":
        plan(settings)
        return 0
    out = args.out / "quick" if args.quick else args.out
    lab.open_folder(out, {"fingerprint": fingerprint(common.load(args.base)), "dtype": dtype, "quick": args.quick})
    if args.stage in ("formats", "rates"):
        make({"formats": jobs_of_formats, "rates": jobs_of_rates}[args.stage](settings), settings, out, args)
        return 0
    chosen = chosen_on_products(out, settings)
    if args.stage == "runs":
        make(jobs_to_report(settings, chosen), settings, out, args)
    elif args.stage == "costs":
        lab.write_csv(out / "costs.csv", measure_costs(settings, chosen))
    else:
        lab.save_text(tables(out, settings, chosen), out / "table.md")
        draw_pictures(out, settings, chosen)
        print((out / "table.md").read_text(encoding="utf-8"))
    return 0


def main(argv=None):
    return common.exit_status("fewshot.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
