"""Two questions that fewshot.py left open: other sites on a real model, and full fine-tuning and LoRA at their best.

    python -m experiments.fewshot_followup --stage sites      # question 1
    python -m experiments.fewshot_followup --stage rates      # question 2: each method's rate, chosen on products' val
    python -m experiments.fewshot_followup --stage runs --minutes 60    # on test; again until it says that all is done
    python -m experiments.fewshot_followup --stage report

This page is the protocol, committed before any of its runs was made. Tasks, draws, scoring, training and the two
intervals are fewshot.py's: 32 labels, 100 steps, the paper's three losses, SmolLM2 in bfloat16. A run that
results/fewshot holds, of the same base and dtype, is taken from there and not made again. All of it is descriptive, and
whatever comes out is printed.

**1. Are the paper's three sites the right ones?** On movies' test, draws 0 to 2, at the paper's rate of 3e-3: k,v,ff
beside k,o,ff (the attention's output instead of the values), k,v,pre (the gate before its SiLU instead of the MLP's
hidden activations), v,ff,x (the residual stream instead of the keys) and q,o,pre (all three replaced). They are
ablate.py's sets, where each has as many values as k,v,ff; here keys and values are narrower than n_embd, so the other
sets have more. No set's rate is chosen.

**2. Is (IA)³ ahead of full fine-tuning and of LoRA, or behind?** fewshot.py's three draws were too few to rank them.
Here: ten draws (0 to 9) on the test of movies and of news; LoRA r = 1 on the queries' and the values' maps, which has
exactly (IA)³'s 57,600 values; and one grid for all: four rates, each about three times the one before (GRID), and three
draws on products' val. The highest mean accuracy chooses, the first of equals; a rate at an end of its grid is taken as
it is. A method is called ahead on a task where both intervals exclude 0. If not all runs are made, the draws that all
three methods have are compared, and table.md says how many.

Known beforehand, from results/fewshot: what (IA)³ does at each of its four rates on products and, at 3e-3 and 1e-2,
with draws 0 to 4 on both tests; what full fine-tuning does at three of its rates on products with draws 0 and 1 and, at
3e-5, with draws 0 to 2 on both tests. Nothing was known of LoRA r = 1 or of the other sites.

Writes results.csv, windows.npz, table.md and draws.png into --out.
"""

import copy
import sys
from dataclasses import replace

import common
from experiments import fewshot, fewshot_tables, lab, rivals, shots
from experiments.fewshot import learned
from tools.plot import plt, save_picture

EARLIER = lab.RESULTS / "fewshot"
GRID = {  # the rates that products chooses from
    "ia3": (1e-3, 3e-3, 1e-2, 3e-2),
    "lora1": (1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
}
TITLES = {"ia3": "(IA)³", "lora1": "LoRA r = 1 on q, v", "full": "full fine-tuning"}
TASKS = ("movies", "news")
SEEDS = tuple(range(10))  # of the draws in question 2


# --- which runs ---


def runs_of_sites(settings):
    """On movies' test: (IA)³ and the other sets of sites."""
    runs = []
    for method in ("ia3", *shots.OTHER_SITES):
        runs += learned("test", "movies", method, settings.k, settings.rate, settings.steps, settings.seeds[:3])
    return runs


def runs_of_rates(settings):
    """On products' val: every method at every rate."""
    runs = []
    for method, rates in GRID.items():
        for rate in rates:
            runs += learned("val", "products", method, settings.k, rate, settings.steps, settings.seeds[:3])
    return runs


def runs_of_draws(settings, rates):
    """On test: every method at its rate, one draw after the other, so that whenever it stops the draws are whole."""
    tasks = [task for task in TASKS if task in settings.tasks]
    runs = []
    for seed in settings.seeds:
        for task in tasks:
            for method, rate in rates.items():
                runs += learned("test", task, method, settings.k, rate, settings.steps, [seed])
    return runs


# --- what products chose ---


def accuracies_on_products(runs_made, settings):
    """Return {method: {rate: its accuracies, one per draw}}. Raises ValueError where a run is missing."""
    tried = {}
    for run in runs_of_rates(settings):
        if run not in runs_made:
            raise ValueError("runs on products are missing: --stage rates makes them")
        accuracy = shots.accuracy_of([shots.right(runs_made[run])])
        tried.setdefault(run.method, {}).setdefault(run.lr, []).append(accuracy)
    return tried


def choose(tried):
    """Return {method: the rate with the highest mean accuracy}. tried: accuracies_on_products'."""
    return {method: max(of_rate, key=lambda rate: sum(of_rate[rate])) for method, of_rate in tried.items()}


# --- tables ---


def draws_of(runs_made, runs, task, method):
    """Where a method's answers on a task are right: {seed: (templates, sentences) bool} of those runs that are made."""
    own = [run for run in runs if (run.task, run.method) == (task, method)]
    return {run.seed: shots.right(runs_made[run]) for run in own if run in runs_made}


def compared(draws, reference):
    """Cells of draws less reference, both draws_of's, over the draws both have: all templates, then the first alone."""
    seeds = sorted(draws.keys() & reference.keys())
    ours = [draws[seed] for seed in seeds]
    theirs = [reference[seed] for seed in seeds]
    on_first = fewshot_tables.difference(fewshot_tables.on_first(ours), fewshot_tables.on_first(theirs))
    return fewshot_tables.difference(ours, theirs) + on_first


def site_table(runs_made, settings, n_values):
    """One line per set of sites. n_values: {method: how many it trains}."""
    runs = runs_of_sites(settings)
    reference = draws_of(runs_made, runs, "movies", "ia3")
    lines = []
    for method in ("ia3", *shots.OTHER_SITES):
        draws = draws_of(runs_made, runs, "movies", method)
        if draws:
            line = ["k,v,ff" if method == "ia3" else method, f"{n_values[method]:,}"]
            line.append(fewshot_tables.range_of_draws(draws.values()))
            line += [""] * 4 if method == "ia3" else compared(draws, reference)
            lines.append(line)
    head = ["sites", "values", "accuracy (lowest to highest draw), draws"]
    head += [f"less k,v,ff: {name}" for name in fewshot_tables.DIFFERENCE] + fewshot_tables.ON_FIRST
    return lab.markdown(head, lines)


def rate_table(tried, rates):
    """One line per method and rate tried on products."""
    lines = []
    for method, of_rate in tried.items():
        for rate, accuracies in of_rate.items():
            each = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
            mean = f"{100 * sum(accuracies) / len(accuracies):.1f}"
            lines.append([TITLES[method], f"{rate:g}", mean, each, "chosen" if rate == rates[method] else ""])
    return lab.markdown(["method", "rate", "accuracy on products' val", "by draw", ""], lines)


def whole_draws(runs_made, runs):
    """The draws that every method has: {task: {method: {seed: (templates, sentences) bool}}}. runs: runs_of_draws'."""
    whole = {}
    for task in TASKS:
        by_method = {method: draws_of(runs_made, runs, task, method) for method in TITLES}
        seeds = set.intersection(*[set(draws) for draws in by_method.values()])
        if seeds:
            whole[task] = {method: {seed: draws[seed] for seed in seeds} for method, draws in by_method.items()}
    return whole


def rival_table(whole, rates, n_values):
    """One line per task and method; (IA)³'s difference from each rival. whole: whole_draws'."""
    lines = []
    for task, by_method in whole.items():
        for method, draws in by_method.items():
            line = [task, TITLES[method], f"{n_values[method]:,}", f"{rates[method]:g}"]
            line.append(fewshot_tables.range_of_draws(draws.values()))
            line += [""] * 4 if method == "ia3" else compared(by_method["ia3"], draws)
            lines.append(line)
    head = ["task", "method", "values", "rate", "accuracy (lowest to highest draw), draws"]
    head += [f"(IA)³ less it: {name}" for name in fewshot_tables.DIFFERENCE] + fewshot_tables.ON_FIRST
    return lab.markdown(head, lines)


def picture(whole, path):
    """A dot per draw, lines between the same draw's, a panel per task. whole: whole_draws'."""
    figure, panels = plt.subplots(1, len(whole), figsize=(5 * len(whole), 3.2), squeeze=False, layout="constrained")
    for panel, (task, by_method) in zip(panels[0], whole.items(), strict=True):
        for seed in by_method["ia3"]:
            accuracies = [100 * shots.accuracy_of([draws[seed]]) for draws in by_method.values()]
            panel.plot(list(TITLES.values()), accuracies, "o-", color="tab:blue", alpha=0.4)
        panel.set_title(task)
    panels[0][0].set_ylabel("accuracy, %; a line per draw")
    save_picture(figure, path)


def tables(runs_made, settings, n_values):
    """Return the text of table.md, and whole_draws' draws for the picture: none before the rates are chosen."""
    pieces = [
        "**Other sites**, movies, each at the paper's rate:",
        site_table(runs_made, settings, n_values),
    ]
    if any(run not in runs_made for run in runs_of_rates(settings)):
        return "\n\n".join(pieces), {}
    tried = accuracies_on_products(runs_made, settings)
    rates = choose(tried)
    wanted = runs_of_draws(settings, rates)
    whole = whole_draws(runs_made, wanted)
    pieces += [
        "**The rivals at their best**, each at the rate that products chose; a difference is clear where both of its "
        f"intervals exclude 0. {sum(run in runs_made for run in wanted)} of {len(wanted)} runs are made.",
        rival_table(whole, rates, n_values),
        "What products chose by:",
        rate_table(tried, rates),
    ]
    return "\n\n".join(pieces), whole


# --- the command line ---


def count_values(base):
    """How many values each method trains on base: {method: a count}."""
    counts = {}
    for method in (*TITLES, *shots.OTHER_SITES):
        model = copy.deepcopy(base)
        rivals.attach(model, shots.ADD.get(method, rivals.add_ia3))
        counts[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts


def read_folder(folder):
    """Return about.json's dict, and {Run: its arrays} of folder and of EARLIER, where it is of the same base and dtype.

    Raises ValueError for a folder of other runs.
    """
    about = lab.read_about(folder)
    if "values" not in about:
        raise ValueError(f"{folder} holds no runs of this command: its other stages make them")
    runs_made, _ = fewshot.read_runs(folder)
    earlier = lab.read_about(EARLIER)
    if all(about.get(name) == earlier[name] for name in ("fingerprint", "dtype", "quick")):
        earlier_runs, _ = fewshot.read_runs(EARLIER)
        runs_made = earlier_runs | runs_made
    return about, runs_made


def run(argv):
    stages = ("sites", "rates", "runs", "report")
    args, settings, out = fewshot.parse(argv, __doc__, stages, "out/fewshot-followup")
    if not args.quick:
        settings = replace(settings, seeds=SEEDS)
    if args.stage == "report":
        about, runs_made = read_folder(out)
        text, whole = tables(runs_made, settings, about["values"])
        lab.save_text(text, out / "table.md")
        if whole:
            picture(whole, out / "draws.png")
        print(text)
        return 0
    base = common.load(settings.base)
    lab.open_folder(out, fewshot.describe(settings, base, args.quick) | {"values": count_values(base)})
    _, runs_made = read_folder(out)
    if args.stage == "sites":
        runs = runs_of_sites(settings)
    elif args.stage == "rates":
        runs = runs_of_rates(settings)
    else:
        runs = runs_of_draws(settings, choose(accuracies_on_products(runs_made, settings)))
    left = [one for one in runs if one not in runs_made]
    if left:
        fewshot.make(left, settings, base, out, args, "fewshot_followup.py")
    else:
        print("all runs are done")
    return 0


def main(argv=None):
    return common.exit_status("fewshot_followup.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
