"""Few-shot (IA)³ against in-context learning: the paper's title, rerun on SmolLM2-135M and rated sentences.

    python data/prepare.py sentiment && python -m tools.convert smollm2 --out data/smollm2.pt
    python -m experiments.fewshot --stage formats             # how to ask in context: chosen on products' val
    python -m experiments.fewshot --stage rates               # learning rates: chosen there, too
    python -m experiments.fewshot --stage runs --minutes 60   # on test; again and again until it says that all is done
    python -m experiments.fewshot --stage costs
    python -m experiments.fewshot --stage report

This page is the protocol. It was committed before any test split was read.

**Tasks.** Reported: movies, tweets, news (is a sentence negative or positive?), source (which of four sets is it
from?), movies-ab (answers A and B) and movies-flipped (answers exchanged). Products is the development task: choices
are made on its val, its test is never read, and it has no reported row, except as a source of labels in transfer.
(Noted later: and in source, one of whose four sets it is: 200 sentences of its test are in source's.) The model may
have read the movie sentences, and such questions, before: only source, A/B and flipped are free of that. Before this
protocol, a pilot tried rates on movie sentences, which are in train here, and scored 200 product sentences and 200
tweets zero-shot. Nothing was chosen by them.

**Scoring.** One rule for every row: a choice's log-likelihood after the prompt, divided by its number of tokens; the
best choice is the answer. A prompt, and what stands before it, is read once through the cache. There are three
templates. The accuracy of a draw is the median of its three; a row's is the mean over draws. The base is
SmolLM2-135M-Instruct, Q4_1 dequantized. For every row, weights and computation are bfloat16, in which it was published;
what is trained, logits and log-likelihoods are float32.

**Draws.** K training examples, equally many per label, from train; draws 0 to 4, or 0 to 2 where it says three. Smaller
K are parts of larger ones. Every method sees the same K examples in a draw; no label of val is used.

**(IA)³.** As in the paper (3.2, 3.5), but with AdamW and fewer steps: rate 3e-3, batches of 8, 6 % warmup, linear
decay, clip 1, L_LM + L_UL + L_LN. The 3K pairs of example and template are passed through in a random order, again and
again. 100 steps, a tenth of the paper's. Plain format.

**In-context learning.** The K examples, in the template of the question, before it: plain (an empty line between) or
as a chat. Raw, or with contextual calibration (Zhao et al. 2021, arXiv:2102.09690, section 5): the choices'
probabilities divided by their mean over the content-free sentences N/A, [MASK] and an empty one.

**Chosen on products** (val; K = 32; highest mean accuracy, the first of equals): in-context learning's format and
whether it is calibrated (five draws), used at every K; (IA)³'s rate of RATES (three draws); each rival's of its rates
(two draws). Formats come first; what needs no rate of theirs may run before the rates are chosen.

**Primary comparison, one difference per task**: (IA)³ at K = 32, 100 steps, 3e-3, less in-context learning at K = 32,
first order, as chosen; paired on draw and item. All else is descriptive.

**Runs on test**, in this order; table.md says which are made. (1) The primary comparison: five draws of (IA)³ and of
in-context learning at K = 32; beside it zero-shot, plain and chat, and two floors at every K: one bias per label added
to the zero-shot scores, and logistic regression (L2 penalty 1, standardized) on the last hidden state of the prompt.
(2) Movies and news, K = 32, 100 steps, three draws: full fine-tuning, LoRA r = 4 on q and v, LoRA r = 1 on all linear
maps, a soft prompt of 16; BitFit has nothing to train in this model. (3) Both at K = 4, 16, 64, five draws: movies,
tweets and news. (4) (IA)³ at the rate that products chose, K = 32, five draws, where it is another than 3e-3. (5)
Movies, K = 32, three draws: L_LM, L_LN, L_LM + L_UL, L_LM + L_LN. (6) Transfer, movies, tweets and news, three draws:
vectors trained 100 steps on 192 labels of the other three sets, then on 0 or 32 of the target; beside it 32 in-context
examples from those sets. (Noted later: they are pooled, so the largest, movies, is most of them.) This is not the
paper's 3.4: same labels, other text. (7) 1000 steps, K = 32, three draws, movies only. (Noted later, when all else was
known: and movies-ab.) (8) As (3), source. (9) In-context learning at K = 32 in two other orders, three draws.

**Departures.** Four runs with 4 labels came before (2), and (4) before the rest of (3). Full fine-tuning was run again:
the first time it was trained on logits rounded to bfloat16. Calibration by the questions themselves (Zhou et al. 2023,
arXiv:2309.17249) and the paper's own summary, medians over templates and draws, were added when all was known.

**Intervals.** The middle 95 % of 2000 bootstrap resamples of draws and items, crossed (the median over templates is
taken in each), and beside it Student's t over the draws' differences. No interval over tasks: these are not a sample of
tasks.

**Reported** whatever comes out: results.csv (every run), windows.npz (the score of every choice of every prediction),
costs.csv, table.md, accuracy.png, costs.png. A training that diverges is scored as it then stands, and marked.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
import data as datasets
from experiments import clocks, fewshot_tables, lab, ranking
from experiments.shots import (
    BATCH_SIZE,
    LOSSES,
    N_TEMPLATES,
    RIVALS,
    Result,
    Run,
    Settings,
    accuracy_of,
    ask,
    choice_log_likelihoods,
    context,
    draw,
    measure,
    pairs_to_learn,
    read_task,
    right,
)
from ia3 import attach, fingerprint

FORMS = ("plain", "chat")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


# --- which runs ---


def runs_of_formats(settings):
    """On products' val: how in-context learning is asked, with zero-shot beside it."""
    runs = [Run("val", "products", "zero", form) for form in FORMS]
    for seed in settings.seeds:
        runs += [Run("val", "products", "icl", form, settings.k, seed=seed) for form in FORMS]
    return runs


def runs_of_rates(settings):
    """On products' val: how fast each method learns."""
    tried = [("ia3", rate, seed) for rate in RATES for seed in settings.seeds[:3]]
    for name, (_, rates) in RIVALS.items():
        tried += [(name, rate, seed) for rate in rates for seed in settings.seeds[:2]]
    runs = []
    for method, rate, seed in tried:
        runs.append(Run("val", "products", method, "plain", settings.k, rate, settings.steps, seed=seed))
    return runs


def runs_to_report(settings, chosen):
    """On test, in the protocol's order; without those whose rate is not chosen yet. chosen: a Choice."""
    seeds, three, k, steps = settings.seeds, settings.seeds[:3], settings.k, settings.steps
    runs = []

    def in_context(task, k, seeds, method="icl", order=0):
        runs.extend([Run("test", task, method, chosen.form, k, order=order, seed=seed) for seed in seeds])

    def learned(task, method, seeds, k=k, rate=settings.rate, steps=steps):
        runs.extend([Run("test", task, method, "plain", k, rate, steps, seed=seed) for seed in seeds])

    def other_ks(task):
        for other in settings.ks:
            if other != k:
                learned(task, "ia3", seeds, other)
                in_context(task, other, seeds)

    for task in settings.tasks:  # (1)
        learned(task, "ia3", seeds)
        in_context(task, k, seeds)
        runs.extend([Run("test", task, "zero", form) for form in FORMS])
    for method in RIVALS:  # (2)
        if method in chosen.rates:
            learned("movies", method, three, rate=chosen.rates[method])
            learned("news", method, three, rate=chosen.rates[method])
    for task in ("movies", "tweets", "news"):  # (3)
        other_ks(task)
    if chosen.rates.get("ia3", settings.rate) != settings.rate:  # (4)
        for task in settings.tasks:
            learned(task, "ia3", seeds, rate=chosen.rates["ia3"])
    for method in LOSSES:  # (5)
        if method != "ia3":
            learned("movies", method, three)
    for task in ("movies", "tweets", "news"):  # (6)
        learned(task, "transfer", three, k=0)
        learned(task, "transfer", three)
        in_context(task, k, three, "icl-other")
    for task in ("movies", "movies-ab"):  # (7)
        learned(task, "ia3", three, steps=10 * steps)
    other_ks("source")  # (8)
    for task in settings.tasks:  # (9)
        in_context(task, k, three, order=1)
        in_context(task, k, three, order=2)
    return [run for run in runs if run.task in settings.tasks]


def read_runs(folder):
    """Return the runs that folder holds: {Run: its arrays}, and a list of the Runs whose training diverged."""
    results, arrays = lab.load_runs(folder, Run, Result)
    found = {run: lab.arrays_of(run, arrays, folder) for run in results}
    diverged = [run for run, result in results.items() if result.diverged]
    return found, diverged


# --- what products chose ---


@dataclass
class Choice:
    """What products chose."""

    form: str  # of in-context learning
    by: str  # what calibrates it: 'free', or '' for nothing
    rates: dict  # {method: its rate}, of the methods whose rates are all tried


def tried_on_products(found, settings):
    """What products choose among: {method: {a rate, or (form, by) for 'icl': [right, one per draw]}}.

    found: of read_runs. A method with a run missing is left out.
    """
    tried = {}
    missing = set()
    for run in runs_of_formats(settings) + runs_of_rates(settings):
        options = tried.setdefault(run.method, {})
        if run not in found:
            missing.add(run.method)
        elif run.method == "icl":
            for by in ("", "free"):
                options.setdefault((run.form, by), []).append(right(found[run], by))
        else:
            options.setdefault(run.lr, []).append(right(found[run]))
    del tried["zero"]  # it stands beside them: there is nothing to choose
    return {method: options for method, options in tried.items() if method not in missing}


def choose(found, settings):
    """Return the Choice that the runs on products make. Raises ValueError before the formats are run."""
    best = {}
    for method, options in tried_on_products(found, settings).items():
        best[method] = max(options, key=lambda option: accuracy_of(options[option]))
    if "icl" not in best:
        raise ValueError("in-context learning's runs on products are missing: --stage formats makes them")
    form, by = best.pop("icl")
    return Choice(form, by, best)


# --- what a prediction costs ---


class Cost(NamedTuple):
    """A row of costs.csv: a prediction after k examples that are kept in a cache. k = 0 is (IA)³'s prediction, too.

    FLOPs are of matrix products (clocks.count_flops); by_2n is the paper's count, 2 per parameter and token. prefix_
    are those of reading the examples.
    """

    k: int
    prefix_tokens: int
    flops: int
    prefix_flops: int
    by_2n: int
    prefix_by_2n: int
    cache_bytes: int
    seconds: float
    training_flops: int
    task_bytes: int


def measure_costs(settings, chosen):
    """Return the Costs after 0 and after each K examples: means over templates and 16 questions of products."""
    model = common.load(settings.base, getattr(torch, settings.dtype)).to(settings.device)
    pool = read_task(settings.data, "products", "train")
    n_parameters = sum(p.numel() for p in model.parameters())
    vectors = attach(model)
    training_flops = settings.steps * count_a_step(model, draw(pool, settings.k, 0))
    model.requires_grad_(False)
    costs = []
    for k in (0, *settings.ks):
        model.ia3 = None if k else vectors
        form = chosen.form if k else "plain"
        examples = draw(pool, k, 0) if k else []
        found = [cost_in(model, form, pool[:16], examples, template) for template in range(N_TEMPLATES)]
        tokens, prefix_tokens, flops, prefix_flops, seconds = np.mean(found, 0).tolist()
        numbers = model.config.n_layer * sum(model.config.widths[:2])  # of a token's keys and values
        cost = Cost(
            k=k,
            prefix_tokens=round(prefix_tokens),
            flops=round(flops),
            prefix_flops=round(prefix_flops),
            by_2n=round(2 * n_parameters * tokens),
            prefix_by_2n=round(2 * n_parameters * prefix_tokens),
            cache_bytes=round(model.lm_head.weight.itemsize * numbers * prefix_tokens),
            seconds=seconds,
            training_flops=training_flops,
            task_bytes=4 * vectors.count(),
        )
        costs.append(cost)
    return costs


def count_a_step(model, examples):
    """FLOPs of a training step: the mean over the batches of an epoch."""
    split = pairs_to_learn(model.tokenizer, examples)
    loss_fn = ranking.make_loss(log_likelihoods_of=choice_log_likelihoods)
    n_batches = math.ceil(len(split) / BATCH_SIZE)

    def backward(step):
        batch = datasets.to_device(split.batch(0, step, BATCH_SIZE), model.lm_head.weight.device)
        loss_fn(model, *batch).backward()

    return sum(sum(clocks.count_flops(partial(backward, step))) for step in range(n_batches)) // n_batches


def cost_in(model, form, questions, examples, template):
    """What a question takes in one template: its tokens, the examples', its FLOPs, the examples', and its seconds."""
    prefix = context(model.tokenizer, form, examples, template)
    asked = [ask(model.tokenizer, form, question, template) for question in questions]
    n_tokens = sum(len(prompt) + sum(map(len, choices)) for prompt, choices, _ in asked)
    all_of_it = partial(ranking.scores, model, ranking.Choices(asked), prefix)
    prefix_alone = partial(ranking.scores, model, ranking.Choices([([0], [[0]], 0)]), prefix)  # and one token
    flops = sum(clocks.count_flops(all_of_it))
    prefix_flops = sum(clocks.count_flops(prefix_alone))
    times = clocks.interleave({"all": all_of_it, "prefix": prefix_alone}, 5, model.lm_head.weight.device)
    seconds = np.median(times["all"]) - np.median(times["prefix"])
    n = len(questions)
    return n_tokens / n, len(prefix), (flops - prefix_flops) / n, prefix_flops if prefix else 0, seconds / n


# --- the stages ---


def make(runs, settings, folder, args):
    """Make the runs that folder lacks, for as long as the flags say, and print where it stands."""
    model = common.load(settings.base).to(settings.device)
    data_hash = {}  # of what a task's runs read
    for task, split in sorted({(run.task, run.split) for run in runs}):
        parts = [pairs_to_learn(model.tokenizer, read_task(settings.data, task, name)) for name in ("train", split)]
        data_hash[task] = "".join(part.data_hash()[:16] for part in parts)
    lab.open_folder(folder, lab.read_about(folder) | {"data_hash": data_hash})
    done = lab.make_runs(runs, partial(measure, settings), Result, folder, args.workers, args.minutes)
    lab.write_run_json(folder, "fewshot.py", vars(args), model, data_hash, done)
    n_left = len(set(runs)) - len(done)
    if n_left:
        print(f"{n_left} runs of {len(set(runs))} are left: the same command continues")
    else:
        print("all runs are done")


def report(settings, folder, out):
    """Write table.md and the pictures into out, from the runs in folder. Returns the tables."""
    found, diverged = read_runs(folder)
    chosen = choose(found, settings)
    tried = tried_on_products(found, settings)
    wanted = runs_of_rates(settings) + runs_to_report(settings, chosen)
    costs = lab.read_rows(folder / "costs.csv", Cost)
    text = fewshot_tables.tables(found, diverged, wanted, tried, chosen, settings, costs)
    lab.save_text(text, out / "table.md")
    fewshot_tables.draw_pictures(found, wanted, chosen, settings, costs, out)
    return text


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("formats", "rates", "runs", "costs", "report")
    parser.add_argument("--stage", choices=stages, required=True, help="see above")
    parser.add_argument("--base", default=Settings.base, help="a Llama (default: %(default)s)")
    parser.add_argument("--data", default=Settings.data, help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--out", type=Path, default=Path("out/fewshot"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one draw, 2 steps, 8 items of movies; into OUT/quick")
    args = parser.parse_args(argv)
    device, dtype = common.pick_device(args.device, args.dtype)
    settings = Settings(args.base, args.data, str(device), dtype)
    out = args.out
    if args.quick:
        settings = replace(settings, tasks=("movies",), seeds=(0,), ks=(2, 4, 6), k=4, steps=2, n_source=6, items=8)
        out = args.out / "quick"
    lab.open_folder(out, {"fingerprint": fingerprint(common.load(args.base)), "dtype": dtype, "quick": args.quick})

    if args.stage == "formats":
        make(runs_of_formats(settings), settings, out, args)
        return 0
    if args.stage == "rates":
        make(runs_of_rates(settings), settings, out, args)
        return 0
    chosen = choose(read_runs(out)[0], settings)
    if args.stage == "runs":
        make(runs_to_report(settings, chosen), settings, out, args)
    elif args.stage == "costs":
        lab.write_csv(out / "costs.csv", [cost._asdict() for cost in measure_costs(settings, chosen)])
    else:
        print(report(settings, out, out))
    return 0


def main(argv=None):
    return common.exit_status("fewshot.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
