"""Few-shot (IA)³ against in-context learning: the paper's title, rerun on SmolLM2-135M and rated sentences.

    python data/prepare.py sentiment && python -m tools.convert smollm2 --out data/smollm2.pt
    python -m experiments.fewshot --stage formats             # how to ask in context: chosen on products' val
    python -m experiments.fewshot --stage rates               # learning rates: chosen there, too
    python -m experiments.fewshot --stage runs --minutes 60   # on test; again and again until it says that all is done
    python -m experiments.fewshot --stage costs
    python -m experiments.fewshot --stage report

This page is the protocol, committed before any test split was read. What was added or done otherwise later stands in
results/fewshot/notes.md.

**Tasks.** Reported: movies, tweets, news (is a sentence negative or positive?), source (which of four sets is it
from?), movies-ab (answers A and B) and movies-flipped (answers exchanged). Products is the development task: choices
are made on its val, its test is never read, and it has no reported row, except as a source of labels in transfer. The
model may have read the movie sentences, and such questions, before: only source, A/B and flipped are free of that.
Before this protocol, a pilot tried rates on movie sentences, which are in train here, and scored 200 product sentences
and 200 tweets zero-shot. Nothing was chosen by them.

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

**Runs on test**: what runs_to_report lists, in its order; table.md says which are made. In (1) there are two floors at
every K beside zero-shot: one bias per label added to the zero-shot scores, and logistic regression (L2 penalty 1,
standardized) on the last hidden state of the prompt. BitFit is not among the rivals of (2): it has nothing to train in
this model. (6) is not the paper's 3.4: same labels, other text.

**Intervals.** The middle 95 % of 2000 bootstrap resamples of draws and items, crossed (the median over templates is
taken in each), and beside it Student's t over the draws' differences. No interval over tasks: these are not a sample of
tasks.

**Reported** whatever comes out: results.csv (every run), windows.npz (the score of every choice of every prediction),
costs.csv, table.md, accuracy.png, costs.png. A training that diverges is scored as it then stands, and marked.
"""

import argparse
import copy
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
from experiments import clocks, fewshot_tables, lab, ranking, shots
from experiments.shots import LOSSES, RIVALS, Result, Run, Settings, accuracy_of, draw, measure, read_task, right
from ia3 import attach, fingerprint

FORMS = ("plain", "chat")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


# --- which runs ---


def in_context(split, task, form, k, seeds, method="icl", order=0):
    """The runs, one per draw, of a method that learns nothing: the k examples stand before the question."""
    return [Run(split, task, method, form, k, order=order, seed=seed) for seed in seeds]


def learned(split, task, method, k, rate, steps, seeds):
    """The runs, one per draw, of a method that learns from k examples."""
    return [Run(split, task, method, "plain", k, rate, steps, seed=seed) for seed in seeds]


def runs_of_formats(settings):
    """On products' val: how in-context learning is asked, with zero-shot beside it."""
    runs = []
    for form in FORMS:
        runs.append(Run("val", "products", "zero", form))
        runs += in_context("val", "products", form, settings.k, settings.seeds)
    return runs


def runs_of_rates(settings):
    """On products' val: how fast each method learns."""
    runs = []
    for rate in RATES:
        runs += learned("val", "products", "ia3", settings.k, rate, settings.steps, settings.seeds[:3])
    for method, rates in RIVALS.items():
        for rate in rates:
            runs += learned("val", "products", method, settings.k, rate, settings.steps, settings.seeds[:2])
    return runs


def runs_at_other_ks(settings, chosen, task):
    """On test: (IA)³ and in-context learning at every K but the primary comparison's."""
    runs = []
    for k in settings.ks:
        if k != settings.k:
            runs += learned("test", task, "ia3", k, settings.rate, settings.steps, settings.seeds)
            runs += in_context("test", task, chosen.form, k, settings.seeds)
    return runs


def runs_to_report(settings, chosen):
    """On test, in the protocol's order; without those whose rate is not chosen yet. chosen: a Chosen."""
    k = settings.k
    rate = settings.rate
    steps = settings.steps
    seeds = settings.seeds
    three = seeds[:3]
    runs = []
    # (1) the primary comparison, and zero-shot
    for task in settings.tasks:
        runs += learned("test", task, "ia3", k, rate, steps, seeds)
        runs += in_context("test", task, chosen.form, k, seeds)
        runs += [Run("test", task, "zero", form) for form in FORMS]
    # (2) full fine-tuning, LoRA and prompt tuning, at the rates that products chose
    for method in RIVALS:
        if method in chosen.rates:
            for task in ("movies", "news"):
                runs += learned("test", task, method, k, chosen.rates[method], steps, three)
    # (3) other K
    for task in ("movies", "tweets", "news"):
        runs += runs_at_other_ks(settings, chosen, task)
    # (4) (IA)³ at the rate that products chose
    best = chosen.rates.get("ia3", rate)
    if best != rate:
        for task in settings.tasks:
            runs += learned("test", task, "ia3", k, best, steps, seeds)
    # (5) some of the three losses
    for method in LOSSES:
        runs += learned("test", "movies", method, k, rate, steps, three)
    # (6) transfer: trained on the other three sets, then on 0 or 32 of the task; beside it, the other sets in context
    for task in ("movies", "tweets", "news"):
        runs += learned("test", task, "transfer", 0, rate, steps, three)
        runs += learned("test", task, "transfer", k, rate, steps, three)
        runs += in_context("test", task, chosen.form, k, three, "icl-other")
    # (7) 1000 steps; movies-ab was added later
    for task in ("movies", "movies-ab"):
        runs += learned("test", task, "ia3", k, rate, 10 * steps, three)
    # (8) as (3)
    runs += runs_at_other_ks(settings, chosen, "source")
    # (9) two other orders of the examples in context
    for task in settings.tasks:
        for order in (1, 2):
            runs += in_context("test", task, chosen.form, k, three, order=order)
    return [run for run in runs if run.task in settings.tasks]


def read_runs(folder):
    """Return the runs that folder holds: {Run: its arrays}, and a list of the Runs whose training diverged."""
    results, arrays = lab.load_runs(folder, Run, Result)
    runs_made = {run: lab.arrays_of(run, arrays, folder) for run in results}
    diverged = [run for run, result in results.items() if result.diverged]
    return runs_made, diverged


# --- what products chose ---


@dataclass
class Chosen:
    """What products chose."""

    form: str  # of in-context learning
    by: str  # what calibrates it: 'free', or '' for nothing
    rates: dict  # {method: its rate}, of the methods whose rates are all tried


def tried_on_products(runs_made, settings):
    """What products choose among: {method: {a rate, or (form, by) for 'icl': [right, one per draw]}}.

    runs_made: of read_runs. A method with a run missing is left out.
    """
    runs = [run for run in runs_of_formats(settings) + runs_of_rates(settings) if run.method != "zero"]
    missing = {run.method for run in runs if run not in runs_made}
    tried = {}
    for run in runs:
        if run.method in missing:
            continue
        options = tried.setdefault(run.method, {})
        if run.method == "icl":
            for by in ("", "free"):
                options.setdefault((run.form, by), []).append(right(runs_made[run], by))
        else:
            options.setdefault(run.lr, []).append(right(runs_made[run]))
    return tried


def choose(tried):
    """Return the Chosen: the most accurate options of tried_on_products. ValueError before the formats are run."""
    if "icl" not in tried:
        raise ValueError("in-context learning's runs on products are missing: --stage formats makes them")
    best = {}
    for method, options in tried.items():
        best[method] = max(options, key=lambda option: accuracy_of(options[option]))
    form, by = best.pop("icl")
    return Chosen(form, by, best)


# --- what a prediction costs ---


class Cost(NamedTuple):
    """A row of costs.csv: a prediction after k examples that are kept in a cache. k = 0 is (IA)³'s prediction, too.

    FLOPs are of matrix products (clocks.count_flops); by_2n is the paper's count, 2 per parameter and token. prefix_
    are those of reading the examples. prefix_flops is counted with a question of one token behind them, so for k > 0 it
    has that token's pass too many. The same pass is subtracted from all 16 questions together: flops and seconds lack a
    sixteenth of it.
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


def measure_costs(settings, base, chosen):
    """Return the Costs after 0 and after each K examples: means over templates and 16 questions of products."""
    model = copy.deepcopy(base).to(settings.device, getattr(torch, settings.dtype))
    pool = read_task(settings.data, "products", "train")
    n_parameters = sum(p.numel() for p in model.parameters())
    vectors = attach(model)
    training_flops = settings.steps * flops_of_a_step(model, draw(pool, settings.k, 0))
    model.requires_grad_(False)
    # a token's keys and values
    bytes_a_token = model.lm_head.weight.itemsize * model.config.n_layer * sum(model.config.widths[:2])
    costs = []
    for k in (0, *settings.ks):
        model.ia3 = None if k else vectors
        form = chosen.form if k else "plain"
        examples = draw(pool, k, 0) if k else []
        found = [cost_in(model, form, pool[:16], examples, template) for template in range(shots.N_TEMPLATES)]
        tokens, prefix_tokens, flops, prefix_flops, seconds = np.mean(found, 0).tolist()
        cost = Cost(
            k=k,
            prefix_tokens=round(prefix_tokens),
            flops=round(flops),
            prefix_flops=round(prefix_flops),
            by_2n=round(2 * n_parameters * tokens),
            prefix_by_2n=round(2 * n_parameters * prefix_tokens),
            cache_bytes=round(bytes_a_token * prefix_tokens),
            seconds=seconds,
            training_flops=training_flops,
            task_bytes=4 * vectors.count(),
        )
        costs.append(cost)
    return costs


def flops_of_a_step(model, examples):
    """FLOPs of a training step: the mean over the batches of an epoch."""
    split = shots.pairs_to_learn(model.tokenizer, examples)
    loss_fn = ranking.make_loss(log_likelihoods_of=ranking.choice_log_likelihoods)

    def backward(batch):
        loss_fn(model, *batch).backward()

    n_batches = math.ceil(len(split) / shots.BATCH_SIZE)
    flops = 0
    for step in range(n_batches):
        batch = datasets.to_device(split.batch(0, step, shots.BATCH_SIZE), model.lm_head.weight.device)
        flops += sum(clocks.count_flops(partial(backward, batch)))
    return flops // n_batches


def cost_in(model, form, questions, examples, template):
    """What a question costs in one template, behind the examples in a cache.

    Returns its tokens, the examples' tokens, its FLOPs, the examples' FLOPs, and its seconds.
    """
    prefix = shots.context(model.tokenizer, form, examples, template)
    asked = ranking.SharedPrompts([shots.ask(model.tokenizer, form, question, template) for question in questions])
    one_token = ranking.SharedPrompts([([0], [[0]], 0)])
    score_all = partial(ranking.scores, model, asked, prefix)
    read_prefix = partial(ranking.scores, model, one_token, prefix)
    flops = sum(clocks.count_flops(score_all))
    prefix_flops = sum(clocks.count_flops(read_prefix))
    times = clocks.interleave({"all": score_all, "prefix": read_prefix}, 5, model.lm_head.weight.device)
    seconds = np.median(times["all"]) - np.median(times["prefix"])
    n_tokens = sum(len(prompt) + sum(map(len, choices)) for prompt, choices, _ in asked.examples)
    n = len(questions)
    return n_tokens / n, len(prefix), (flops - prefix_flops) / n, prefix_flops if prefix else 0, seconds / n


# --- the stages ---


def describe(settings, base, quick):
    """What the runs of a folder must agree on, for about.json."""
    return {"fingerprint": fingerprint(base), "dtype": settings.dtype, "quick": quick}


def hash_data(runs, settings, tokenizer):
    """Return {task: the hashes of what its runs read}: of train, then of each split that they score."""
    data_hash = {}
    for task in sorted({run.task for run in runs}):
        scored = sorted({run.split for run in runs if run.task == task})
        for split in ("train", *scored):
            pairs = shots.pairs_to_learn(tokenizer, read_task(settings.data, task, split))
            data_hash[task] = data_hash.get(task, "") + pairs.data_hash()[:16]
    return data_hash


def make(runs, settings, base, folder, args, script="fewshot.py"):
    """Make the runs that folder lacks, for as long as the flags say, and print where it stands."""
    data_hash = hash_data(runs, settings, base.tokenizer)
    lab.open_folder(folder, lab.read_about(folder) | {"data_hash": data_hash})
    done = lab.make_runs(runs, partial(measure, settings), Result, folder, args.workers, args.minutes)
    lab.write_runs_json(folder, script, vars(args), base.to(settings.device), data_hash, done)
    n_left = len(set(runs)) - len(done)
    if n_left:
        print(f"{n_left} runs of {len(set(runs))} are left: the same command continues")
    else:
        print("all runs are done")


def report(settings, folder, out):
    """Write table.md and the pictures into out, from the runs in folder. Returns the tables."""
    runs_made, diverged = read_runs(folder)
    tried = tried_on_products(runs_made, settings)
    chosen = choose(tried)
    wanted = runs_of_rates(settings) + runs_to_report(settings, chosen)
    n_made = sum(run in runs_made for run in wanted)
    rows = fewshot_tables.rows_of(runs_made, settings)
    whole = fewshot_tables.only_whole(rows, wanted)
    costs = lab.read_rows(folder / "costs.csv", Cost)
    form = chosen.form + fewshot_tables.CALIBRATED[chosen.by]
    rates = ", ".join(f"{method} {rate:g}" for method, rate in chosen.rates.items())
    pieces = [
        f"Chosen on products: in context {form}; rates {rates or 'not yet'}. {n_made} of {len(wanted)} runs are made, "
        "not counting those that chose the format.",
        *fewshot_tables.tables(rows, whole, settings, chosen),
        f"What products chose by, on its val, K = {settings.k}:",
        fewshot_tables.choices_on_products(tried),
        f"Training diverged in: {', '.join(str(run) for run in diverged) or 'no run'}.",
    ]
    if costs:
        pieces += fewshot_tables.cost_table(costs)
    text = "\n\n".join(pieces)
    lab.save_text(text, out / "table.md")
    fewshot_tables.draw_pictures(whole, settings, chosen, costs, out)
    return text


def parse(argv, description, stages, out):
    """Read a command line. Returns the flags, the Settings and the folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=stages, required=True, help="see above")
    parser.add_argument("--base", default=Settings.base, help="a Llama (default: %(default)s)")
    parser.add_argument("--data", default=Settings.data, help="folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base's weights")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one draw, 2 steps, 8 items of movies; into OUT/quick")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    settings = Settings(args.base, args.data, str(device), args.dtype)
    folder = args.out
    if args.quick:
        settings = replace(settings, tasks=("movies",), seeds=(0,), ks=(2, 4, 6), k=4, steps=2, n_source=6, items=8)
        folder = args.out / "quick"
    return args, settings, folder


def run(argv):
    stages = ("formats", "rates", "runs", "costs", "report")
    args, settings, out = parse(argv, __doc__, stages, "out/fewshot")
    if args.stage == "report":
        print(report(settings, out, out))
        return 0
    base = common.load(settings.base)
    lab.open_folder(out, describe(settings, base, args.quick))
    if args.stage == "formats":
        make(runs_of_formats(settings), settings, base, out, args)
        return 0
    if args.stage == "rates":
        make(runs_of_rates(settings), settings, base, out, args)
        return 0
    runs_made, _ = read_runs(out)
    chosen = choose(tried_on_products(runs_made, settings))
    if args.stage == "runs":
        make(runs_to_report(settings, chosen), settings, base, out, args)
    else:
        lab.write_csv(out / "costs.csv", [cost._asdict() for cost in measure_costs(settings, base, chosen)])
    return 0


def main(argv=None):
    return common.exit_status("fewshot.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
