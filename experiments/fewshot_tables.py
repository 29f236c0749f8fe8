"""The tables and pictures of fewshot.py, made from its runs alone.

A draw is an array (templates, sentences) bool: where the answers of one run are right. The draws of a row in a task are
a list of such arrays, by seed.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from experiments import lab
from experiments.shots import LOSSES, RIVALS, accuracy_of, right
from tools.plot import plt, save_picture

DIFFERENCE = ["difference (95 %, draws and items)", "t, over draws"]  # the heads of difference's cells
ON_FIRST = ["first template (95 %, draws and items)", "t, over draws"]
CALIBRATED = {"": "", "free": ", calibrated", "beta": ", batch-calibrated"}
# table 1 and section 4.2 of the (IA)³ paper: 11e9 parameters, 41 examples of 98 tokens in context
PAPER_TRAINING = 2.7e16
PAPER_PREDICTION = 1.1e12
PAPER_IN_CONTEXT = 1.4e15
PAPER_CONTEXT_AT_EQUAL_SIZE = 41 * 98 * 11e9


# --- rows: runs that differ only in their draw are one row of a table, with a cell per task ---


class Row(NamedTuple):
    method: str  # a Run's, or 'biases' or 'probe', the two floors
    form: str = "plain"
    k: int = 0
    lr: float = 0.0
    steps: int = 0
    order: int = 0
    by: str = ""  # what calibrates it: see shots.right

    def words(self):
        text = f"{self.method}, {self.form}, K = {self.k}"
        if self.steps:
            text += f", {self.steps} steps at {self.lr:g}"
        if self.order:
            text += f", order {self.order}"
        return text + CALIBRATED[self.by]


def row_of(run, by=""):
    """The row in which a Run is a draw."""
    return Row(run.method, run.form, run.k, run.lr, run.steps, run.order, by)


def rows_of(runs_made, settings):
    """Return {Row: {task: draws}} of the runs on test. runs_made: {Run: its arrays}."""
    rows = {}

    def add(row, task, draw):
        rows.setdefault(row, {}).setdefault(task, []).append(draw)

    for run in sorted(runs_made, key=lambda run: run.seed):
        arrays = runs_made[run]
        if run.split != "test":
            continue
        add(row_of(run), run.task, right(arrays))
        if "free" in arrays:
            add(row_of(run, "free"), run.task, right(arrays, "free"))
            add(row_of(run, "beta"), run.task, right(arrays, "beta"))
        if run.method == "zero" and run.form == "plain":  # the floors' answers are kept beside it
            for k in settings.ks:
                for floor in ("biases", "probe"):
                    for seed in settings.seeds:
                        answers = arrays[f"{floor}-{k}-{seed}"]
                        add(Row(floor, k=k), run.task, answers == arrays["labels"])
    return rows


def only_whole(rows, wanted):
    """rows without the cells that lack a draw: only then are the first draws of two rows the same examples.

    wanted: all Runs of the protocol.
    """
    n_draws = Counter((row_of(run), run.task) for run in wanted if run.split == "test")
    whole = {}
    for row, of_task in rows.items():
        made = row._replace(by="")  # calibration needs no runs of its own
        for task, draws in of_task.items():
            if len(draws) >= n_draws[made, task]:
                whole.setdefault(row, {})[task] = draws
    return whole


def draws_of(whole, row, task):
    """The draws of a cell; none where there is no such cell."""
    return whole.get(row, {}).get(task, [])


def paired(whole, ours, theirs, task):
    """The draws that both rows have, as two lists of equal length: empty where one row has none.

    Zero-shot has a single draw: it is compared with each.
    """
    our_draws = draws_of(whole, ours, task)
    their_draws = draws_of(whole, theirs, task)
    if len(their_draws) == 1:
        their_draws = their_draws * len(our_draws)
    n = min(len(our_draws), len(their_draws))
    return our_draws[:n], their_draws[:n]


def primary(settings, chosen, k=None):
    """The two rows that are compared: (IA)³ at the paper's rate, and in-context learning as products chose it."""
    k = k or settings.k
    return Row("ia3", k=k, lr=settings.rate, steps=settings.steps), Row("icl", chosen.form, k, by=chosen.by)


def best_rate(settings, chosen):
    """The rate that products chose for (IA)³; the paper's before they have."""
    return chosen.rates.get("ia3", settings.rate)


# --- cells ---


def percent(draws):
    """The mean accuracy of the draws."""
    return f"{100 * accuracy_of(draws):.1f}"


def difference(ours, theirs):
    """Two cells: the accuracy of ours less theirs, of the same draws, with each of its intervals."""
    value, low, high, t_low, t_high = [100 * x for x in lab.accuracy_difference(ours, theirs)]
    return [lab.spread(value, low, high, "+.1f"), f"{t_low:+.1f} to {t_high:+.1f}"]


def on_first(draws):
    """The draws on the first template alone, whose answers are single tokens."""
    return [draw[:1] for draw in draws]


def range_of_draws(draws):
    """The mean accuracy of the draws, the lowest and the highest, and how many there are."""
    each = [100 * accuracy_of([draw]) for draw in draws]
    return f"{lab.spread(100 * accuracy_of(draws), min(each), max(each), '.1f')}, {len(each)}"


def templates_of_draws(draws):
    """The mean accuracy of the draws by template."""
    means = np.mean([draw.mean(-1) for draw in draws], 0)  # (templates,)
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


def quartiles(draws):
    """The paper's summary, in %: the median over templates and draws, and a cell of it with the quartiles."""
    accuracies = 100 * np.stack(draws).mean(-1)  # (draws, templates)
    low, median, high = np.quantile(accuracies, (0.25, 0.5, 0.75))
    return median, lab.spread(median, low, high, ".1f")


# --- tables ---


def comparison(whole, settings, chosen, first=False):
    """The primary comparison, one line per task; first: on the first template alone."""
    lines = []
    for task in settings.tasks:
        ours, theirs = paired(whole, *primary(settings, chosen), task)
        if first:
            ours, theirs = on_first(ours), on_first(theirs)
        if ours:
            lines.append([task, percent(ours), percent(theirs), *difference(ours, theirs)])
        else:
            lines.append([task, "not all draws are run", "", "", ""])
    return lab.markdown(["task", "(IA)³", "in-context", *DIFFERENCE], lines)


def other_counts(whole, settings, chosen):
    """The primary difference beside what it would be if it were counted otherwise, one line per task."""
    ours, in_context = primary(settings, chosen)
    by_batch = in_context._replace(by="beta")
    lines = []
    for task in settings.tasks:
        our_draws, their_draws = paired(whole, ours, in_context, task)
        if not our_draws:
            continue
        as_compared, _ = difference(our_draws, their_draws)
        first, _ = difference(on_first(our_draws), on_first(their_draws))
        batch_calibrated, _ = difference(*paired(whole, ours, by_batch, task))
        our_median, our_cell = quartiles(our_draws)
        their_median, their_cell = quartiles(their_draws)
        medians = f"{our_median - their_median:+.1f}"
        lines.append([task, as_compared, first, batch_calibrated, our_cell, their_cell, medians])
    head = ["task", "as compared", "first template alone", "in context batch-calibrated"]
    head += ["(IA)³, median over templates and draws (quartiles)", "in context, likewise", "their difference"]
    return lab.markdown(head, lines)


def beside_rivals(whole, settings, chosen):
    """(IA)³, at the paper's rate and at the one that products chose, less every rival."""
    rates = [settings.rate]
    if best_rate(settings, chosen) != settings.rate:
        rates.append(best_rate(settings, chosen))
    lines = []
    for rate in rates:
        ours = Row("ia3", k=settings.k, lr=rate, steps=settings.steps)
        for rival in RIVALS:
            theirs = Row(rival, k=settings.k, lr=chosen.rates.get(rival), steps=settings.steps)
            for task in settings.tasks:
                our_draws, their_draws = paired(whole, ours, theirs, task)
                if our_draws:
                    line = [f"{rate:g}", rival, task, percent(our_draws), percent(their_draws)]
                    line += difference(our_draws, their_draws)
                    line += difference(on_first(our_draws), on_first(their_draws))
                    lines.append(line)
    return lab.markdown(["(IA)³ at", "rival", "task", "(IA)³", "rival", *DIFFERENCE, *ON_FIRST], lines)


def pairs_to_compare(settings, chosen):
    """The pairs of rows whose differences are shown, in the order in which they are shown."""
    k = settings.k
    at_paper_rate, in_context = primary(settings, chosen)
    at_chosen_rate = at_paper_rate._replace(lr=best_rate(settings, chosen))  # that products chose
    batch_calibrated = in_context._replace(by="beta")
    probe = Row("probe", k=k)
    zero = Row("zero", chosen.form)

    # the floors, zero-shot, the other rate, the other calibration
    pairs = [
        (at_paper_rate, probe),
        (at_chosen_rate, probe),
        (at_chosen_rate, at_paper_rate),
        (at_paper_rate, Row("biases", k=k)),
        (in_context, zero._replace(by=chosen.by)),
        (in_context, zero),
        (at_paper_rate, zero),
        (at_chosen_rate, in_context),
        (at_paper_rate, batch_calibrated),
        (at_chosen_rate, batch_calibrated),
        (batch_calibrated, zero._replace(by="beta")),
    ]

    # other K
    for other in settings.ks:
        if other != k:
            ours, theirs = primary(settings, chosen, other)
            pairs += [(ours, theirs), (ours, Row("probe", k=other))]
    largest_k = in_context._replace(k=max(settings.ks))
    smallest_k = in_context._replace(k=min(settings.ks))
    pairs.append((largest_k, smallest_k))

    # other orders
    orders = [in_context._replace(order=order) for order in (1, 2)]
    pairs += [(in_context, other) for other in orders]
    pairs += [(at_paper_rate, other) for other in orders]

    # losses, transfer, more steps
    pairs += [(at_paper_rate, at_paper_rate._replace(method=method)) for method in LOSSES]
    transfer = at_paper_rate._replace(method="transfer")
    pairs.append((transfer._replace(k=0), in_context._replace(method="icl-other")))
    pairs += [(transfer, at_paper_rate), (transfer, at_chosen_rate)]
    ten_times_longer = at_paper_rate._replace(steps=10 * settings.steps)
    pairs += [
        (ten_times_longer, other) for other in (at_paper_rate, at_chosen_rate, in_context, batch_calibrated, probe)
    ]
    return [
        (ours, theirs) for ours, theirs in dict.fromkeys(pairs) if ours != theirs
    ]  # the chosen rate may be the paper's


def other_differences(whole, settings, chosen):
    """Whatever else can be compared, one line per pair and task: over all templates, and on the first alone."""
    lines = []
    for ours, theirs in pairs_to_compare(settings, chosen):
        for task in settings.tasks:
            our_draws, their_draws = paired(whole, ours, theirs, task)
            if our_draws:
                line = [ours.words(), theirs.words(), task, f"{len(our_draws)}"]
                line += difference(our_draws, their_draws)
                line += difference(on_first(our_draws), on_first(their_draws))
                lines.append(line)
    return lab.markdown(["row", "less row", "task", "draws", *DIFFERENCE, *ON_FIRST], lines)


def by_order(whole, settings, chosen):
    """How far the order of the examples moves a draw's accuracy in context: a table, and a line on all of it."""
    _, in_context = primary(settings, chosen)
    lines = []
    ranges = []
    for task in settings.tasks:
        orders = [draws_of(whole, in_context._replace(order=order), task) for order in (0, 1, 2)]
        cells = []
        for draws in zip(*orders, strict=False):  # the first order has more draws than the others
            accuracies = [100 * accuracy_of([draw]) for draw in draws]
            cells.append(" / ".join(f"{accuracy:.1f}" for accuracy in accuracies))
            ranges.append(max(accuracies) - min(accuracies))
        if cells:
            lines.append([task, *cells])
    pieces = [lab.markdown(["task", *[f"draw {seed}" for seed in settings.seeds[:3]]], lines)]
    if ranges:
        low, middle, high = np.quantile(ranges, (0, 0.5, 1))
        pieces.append(
            f"The best of the three orders is {low:.1f} to {high:.1f} points above the worst of the same draw, "
            f"{middle:.1f} in the median."
        )
    return pieces


def all_rows(rows, settings, cell):
    """A line per row and a column per task; cell: a function of the draws."""
    lines = []
    for row, of_task in rows.items():
        lines.append([row.words(), *[cell(of_task[task]) if task in of_task else "" for task in settings.tasks]])
    return lab.markdown(["", *settings.tasks], lines)


def choices_on_products(tried):
    """What products chose among: the mean accuracy of the draws. tried: of fewshot.tried_on_products."""
    lines = []
    for method, options in tried.items():
        cells = []
        for option, draws in options.items():
            if method == "icl":
                form, by = option
                name = form + CALIBRATED[by]
            else:
                name = f"at {option:g}"
            cells.append(f"{percent(draws)} {name}")
        lines.append([method, "; ".join(cells)])
    return lab.markdown(["", "accuracy in %, means of the draws"], lines)


def paid_back(once, each):
    """After how many predictions something that costs once and then saves each time is paid back; '' for never."""
    return f"{math.ceil(once / each):,} predictions" if each > 0 else ""


def cost_table(costs):
    """What a prediction costs: a table, and what it means. costs: fewshot's Costs, the first of K = 0."""
    ours = costs[0]
    lines = []
    for cost in costs:
        anew = cost.flops + cost.prefix_flops
        counts = [cost.flops, anew, cost.by_2n, cost.by_2n + cost.prefix_by_2n]
        line = [f"{cost.k}", f"{cost.prefix_tokens:,}", *[f"{n:.2e}" for n in counts]]
        line += [f"{cost.seconds:.3f}", f"{cost.cache_bytes:,}"]
        # training costs FLOPs once, as filling the cache does
        line.append(paid_back(ours.training_flops - cost.prefix_flops, cost.flops - ours.flops))
        line.append(paid_back(ours.training_flops, anew - ours.flops))
        lines.append(line)
    head = ["K in context", "tokens", "FLOPs of a prediction, cached", "read anew", "by 2N", "read anew, by 2N"]
    head += ["seconds", "cache, bytes", "(IA)³ cheaper after, cached", "read anew"]
    paper = math.ceil(PAPER_TRAINING / (PAPER_IN_CONTEXT - PAPER_PREDICTION))
    at_equal_size = math.ceil(PAPER_TRAINING / PAPER_CONTEXT_AT_EQUAL_SIZE)
    return [
        lab.markdown(head, lines),
        f"(IA)³'s prediction is that of K = 0. Its training: {ours.training_flops:.2e} FLOPs. A task: "
        f"{ours.task_bytes:,} bytes; a thousand, {ours.task_bytes / 1e3:,.0f} MB. FLOPs and seconds are those of "
        "products' questions. With a cache that is kept, filling it once is counted on in-context learning's side.",
        f"The paper (table 1, section 4.2): T-Few takes {PAPER_PREDICTION:.1e} FLOPs per prediction, counted as N per "
        f"token, {PAPER_TRAINING:.1e} to train, as 3N, and 4.2 MB; GPT-3 175B in context {PAPER_IN_CONTEXT:.1e}, as "
        f"2N. By these figures training is paid back after {paper} predictions. That compares models of 11e9 and "
        f"175e9 parameters: with in-context learning on the same 11e9, read anew, it would be {at_equal_size}. "
        "Section 4.2 discusses keeping a cache, too.",
    ]


def tables(rows, whole, settings, chosen):
    """The tables of the runs on test, and the lines between them. rows, whole: of rows_of and only_whole."""
    return [
        comparison(whole, settings, chosen),
        "This was the comparison planned. The tasks come from four sets of sentences: movies, movies-ab and "
        "movies-flipped ask the same sentences, and source asks some of each set.",
        "The same on the first template alone, whose answers are single tokens; descriptive:",
        comparison(whole, settings, chosen, first=True),
        "The same difference, counted otherwise; descriptive. Batch-calibrated: in-context learning's probabilities "
        "are divided, without labels, by their mean over the questions themselves. This was tried afterwards; it needs "
        "many questions at once, and here these are balanced. The last three columns are the paper's summary. Unlike "
        "the paper's, our draws are balanced by label, and an epoch of training passes through all templates:",
        other_counts(whole, settings, chosen),
        "Beside the rivals, each at the rate that products chose, on the same draws; descriptive. Each interval "
        "leaves something out: the first is too narrow for few draws, the second takes test's sentences as given. A "
        "difference is clear where both exclude 0. (IA)³'s rate was chosen among four, by three draws, the rivals' "
        "among three, by two:",
        beside_rivals(whole, settings, chosen),
        "Other differences between rows of the tables below, in points; descriptive. Nothing is corrected for their "
        "number, so some intervals exclude 0 by chance:",
        other_differences(whole, settings, chosen),
        f"In context, K = {settings.k}, accuracy in %: a draw's examples in one order / in another / in a third:",
        *by_order(whole, settings, chosen),
        "Accuracy in %, the mean of the draws (lowest to highest), number of draws:",
        all_rows(rows, settings, range_of_draws),
        "The same by template, means of the draws. The answers of two templates are of unequal length:",
        all_rows(rows, settings, templates_of_draws),
    ]


# --- pictures ---


def draw_panel(ax, whole, task, curves):
    """The curves of a task, and zero-shot's line. Where a row is not whole there is no point."""
    for label, points in curves.items():
        found = []  # x, the mean of the draws, the lowest, the highest
        for x, row, name in points:
            accuracies = [100 * accuracy_of([draw]) for draw in draws_of(whole, row, task)]
            if accuracies:
                found.append((x, np.mean(accuracies), min(accuracies), max(accuracies)))
                ax.annotate(name, (x, np.mean(accuracies)), fontsize=7)
        xs, means, low, high = np.array(found).reshape(-1, 4).T
        ax.errorbar(xs, means, [means - low, high - means], fmt="o-", ms=4, capsize=2, label=label)
    for draw in draws_of(whole, Row("zero"), task):
        ax.axhline(100 * accuracy_of([draw]), color="gray", ls=":", label="zero-shot, uncalibrated")


def draw_picture(whole, settings, curves, xlabel, path, ticks=()):
    """A panel per task. curves: {label: [(x, Row, the point's name)]}; ticks: of x, if not powers of ten."""
    n_columns = min(len(settings.tasks), 3)
    n_rows = math.ceil(len(settings.tasks) / n_columns)
    size = (3.4 * n_columns + 1.8, 3 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, task in zip(axes.flat, settings.tasks, strict=True):
        draw_panel(ax, whole, task, curves)
        ax.set(xscale="log", xlabel=xlabel, title=task)
        if ticks:
            ax.minorticks_off()
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, path)


def draw_pictures(whole, settings, chosen, costs, folder):
    """Accuracy against K and, where costs are measured, against the FLOPs of a prediction."""
    curves = {"(IA)³": [], "in context": [], "logistic regression": []}
    for k in settings.ks:
        ours, in_context = primary(settings, chosen, k)
        curves["(IA)³"].append((k, ours, ""))
        curves["in context"].append((k, in_context, ""))
        curves["logistic regression"].append((k, Row("probe", k=k), ""))
    draw_picture(whole, settings, curves, "labelled examples", folder / "accuracy.png", settings.ks)
    if not costs:
        return
    curves = {"(IA)³": [], "in context, from a cache": [], "in context, read anew": []}
    for cost in costs[1:]:
        ours, in_context = primary(settings, chosen, cost.k)
        curves["(IA)³"].append((costs[0].flops, ours, f" {cost.k}"))
        curves["in context, from a cache"].append((cost.flops, in_context, f" {cost.k}"))
        curves["in context, read anew"].append((cost.flops + cost.prefix_flops, in_context, f" {cost.k}"))
    draw_picture(whole, settings, curves, "FLOPs of a prediction", folder / "costs.png")
