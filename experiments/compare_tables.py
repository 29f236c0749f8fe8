"""What a folder of compare.py's runs says: tables and pictures, from its files alone."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments import costs, lab
from experiments.rivals import METHODS
from tools.plot import plt, save_picture

RATE_SEEDS = (0, 1)  # by which a learning rate is chosen


# --- what a run is ---


class Job(NamedTuple):
    """What is known of a run in advance."""

    stage: str  # 'lr': a rate is tried, on val; 'test'
    data: str
    method: str
    lr: float
    steps: int
    seed: int


@dataclass
class Result:
    """What a run found: losses in nats a byte, of a test the mean of its works'; infinite where training diverged."""

    values: int  # trained
    loss: float
    forgotten: float | None  # the loss on the other text


def mean_losses(results, data, steps):
    """Return {method: {learning rate: mean loss on data's val}}, rates rising; of rates that all RATE_SEEDS tried."""
    tried = [job for job in results if (job.stage, job.data, job.steps) == ("lr", data, steps)]
    means = {}
    for job in sorted(tried, key=lambda job: job.lr):
        runs = [job._replace(seed=seed) for seed in RATE_SEEDS]
        if all(run in results for run in runs):
            means.setdefault(job.method, {})[job.lr] = float(np.mean([results[run].loss for run in runs]))
    in_order = dict.fromkeys(job.method for job in results)  # of the file
    return {method: means[method] for method in in_order if method in means}


# --- comparing, from the files alone ---


@dataclass
class Runs:
    """A method's runs on the test of one data, after so many steps."""

    job: Job  # of the first seed
    values: int  # trained
    by_seed: dict  # {seed: {array's name: array}}, seeds rising

    def losses(self, kind=""):
        """Nats a byte, (seeds, works). kind: 'forget_', or '' for what was learned."""
        return lab.stack_works(list(self.by_seed.values()), kind)

    def curve(self):
        """The loss on val while the method learned, the mean over seeds: steps and losses, (evaluations,) each.

        Both are empty where a run diverged.
        """
        curves = [arrays["curve"] for arrays in self.by_seed.values()]
        if not all(map(len, curves)):
            return np.empty((2, 0))
        return np.mean(curves, axis=0).T  # (2, evaluations)


@dataclass
class Row:
    """What a method's runs say beside the base's, full fine-tuning's and (IA)³'s, which may be missing: None."""

    loss: np.ndarray  # (works,) nats a byte, the mean of its seeds
    forgotten: np.ndarray  # (forget's works,) the loss there less the base's
    gap: np.ndarray | None = None  # (works,) the share of full fine-tuning's gain over the base, in percent
    beside: np.ndarray | None = None  # (works,) the loss less (IA)³'s, over the seeds that both have
    seeds: np.ndarray | None = None  # (seeds,) the same by seed

    def is_ranked(self):
        """Whether the difference to (IA)³ is clear of 0 over three works or more, and over the seeds."""
        intervals = [lab.student(values)[1:] for values in (self.beside, self.seeds)]
        return len(self.beside) >= 3 and all(low > 0 or high < 0 for low, high in intervals)


def read_tests(folder):
    """Return {(data, steps): {method: Runs}}, methods in the order of METHODS, the base in each."""
    results, arrays = lab.load_runs(folder, Job, Result)
    groups = {}
    for job in sorted(results, key=lambda job: (job.data, job.steps)):
        if job.method not in METHODS:
            raise ValueError(f"{folder}/results.csv names a method {job.method!r} that is not in rivals.py")
        if job.stage == "test" and job.method != "base":
            groups[job.data, job.steps] = {}
    if not groups:
        raise ValueError(f"{folder} holds no results yet: the command without --quick measures them")
    for (data, steps), methods in groups.items():
        for name in METHODS:
            wanted = ("test", data, name, 0 if name == "base" else steps)
            jobs = [job for job in results if (job.stage, job.data, job.method, job.steps) == wanted]
            jobs.sort(key=lambda job: job.seed)  # they are written as they end
            if jobs:
                by_seed = {job.seed: lab.arrays_of(job, arrays, folder) for job in jobs}
                methods[name] = Runs(jobs[0], results[jobs[0]].values, by_seed)
        if "base" not in methods:
            raise ValueError(f"{folder} lacks the run of the base on {data}: the command measures it")
    return groups


def pairs(methods, name):
    """The arrays of a method's runs and those of (IA)³'s, of the seeds that both have: two lists."""
    ours = methods["ia3"].by_seed
    theirs = methods[name].by_seed
    if name == "base":  # it is not trained: its one run stands for every seed
        theirs = dict.fromkeys(ours, theirs[methods["base"].job.seed])
    seeds = [seed for seed in ours if seed in theirs]
    return [theirs[seed] for seed in seeds], [ours[seed] for seed in seeds]


def row_of(methods, name):
    """The Row of a method. methods: {name: Runs} of the same data and steps."""
    loss = methods[name].losses().mean(0)
    base = methods["base"].losses().mean(0)
    row = Row(loss, methods[name].losses("forget_").mean(0) - methods["base"].losses("forget_").mean(0))
    if "full" in methods:
        gain = base - methods["full"].losses().mean(0)
        row.gap = 100 * (base - loss) / np.where(np.isfinite(gain), gain, np.nan)  # no share of what diverged
    if "ia3" in methods:
        theirs, ours = pairs(methods, name)
        if ours:
            difference = lab.stack_works(theirs) - lab.stack_works(ours)  # (seeds, works)
            row.beside = difference.mean(0)
            row.seeds = difference.mean(1)
    return row


def half_gap(methods, name):
    """The first step seen at which a method has half of what full fine-tuning gains by its last, or 'never'."""
    _, full = methods["full"].curve()
    if not len(full):
        return "never"
    steps, losses = methods[name].curve()
    reached = steps[losses <= (full[0] + full[-1]) / 2]
    return f"{reached[0]:.0f}" if len(reached) else "never"


# --- tables ---


def of_works(values, form):
    """A cell: the mean of what the works say and its interval; fewer than three works are shown each by itself."""
    if values is None:
        return ""
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) >= 3:
        return lab.spread(*lab.student(values), form)
    each = " / ".join(f"{value:{form}}" for value in values)
    return each if len(values) == 1 else f"{values.mean():{form}} ({each})"


def cells_beside(row, is_chosen):
    """The loss less (IA)³'s, over the works and over the seeds. Nothing is ranked where no rate was chosen."""
    if row.beside is None:
        return "", ""
    over_works = of_works(row.beside, "+.4f")
    if not (is_chosen and row.is_ranked()):
        over_works += ", no ranking"
    over_seeds = ""
    if len(row.seeds) > 1 and np.isfinite(row.seeds).all():
        over_seeds = lab.spread(*lab.student(row.seeds), "+.4f")
    return over_works, over_seeds


def table_of_tests(methods, forget, is_chosen):
    """A line per method: what it learned, beside (IA)³, and what it forgot. methods: {name: Runs}."""
    head = ["method", "values", "rate", "test loss", "gap closed, %", "loss less (IA)³'s", "the same, over seeds"]
    head += ["half the gap at step", f"{forget} forgotten"]
    most = most_seeds(methods)
    lines = []
    for name, runs in methods.items():
        row = row_of(methods, name)
        title = METHODS[name].title
        values = lr = gap = beside = over_seeds = half = forgotten = ""
        if name != "base":
            values = f"{runs.values:,}"
            lr = f"{runs.job.lr:g}"
            half = half_gap(methods, name) if "full" in methods else ""
            forgotten = of_works(row.forgotten, "+.4f")
            if len(runs.by_seed) < most:
                title += f" ({lab.count_seeds(len(runs.by_seed))})"
        if name not in ("base", "full"):
            gap = of_works(row.gap, ".1f")
        if name != "ia3":
            beside, over_seeds = cells_beside(row, is_chosen)
        lines.append([title, values, lr, of_works(row.loss, ".4f"), gap, beside, over_seeds, half, forgotten])
    return lab.markdown(head, lines)


def most_seeds(methods):
    return max(len(runs.by_seed) for runs in methods.values())


def tables(folder):
    """The tables, in Markdown, from the files of folder, a Path, alone; without costs where there is no costs.csv."""
    results, _ = lab.load_runs(folder, Job, Result)
    about = lab.read_about(folder)
    is_chosen = any(job.stage == "lr" for job in results)
    pieces = []
    for (data, steps), methods in read_tests(folder).items():
        works = ", ".join(about["works"][data])
        seeds = lab.count_seeds(most_seeds(methods))
        pieces.append(f"**{data}**, {steps} steps of {about['batch_size']} windows, {seeds}, on {works}:")
        pieces.append(table_of_tests(methods, about["forget"], is_chosen))
    for data, steps in searches(results):
        pieces.append(
            f"By how much the loss on {data}'s val is above the best rate's, by rate, after {steps} steps, "
            f"{len(RATE_SEEDS)} seeds:"
        )
        pieces.append(table_of_rates(mean_losses(results, data, steps)))
    measured = lab.read_rows(folder / "costs.csv", costs.Cost)
    if measured:
        pieces.append(costs.table(measured))
    return "\n\n".join(pieces)


def searches(results):
    """The (data, steps) for which rates were tried."""
    return list(dict.fromkeys((job.data, job.steps) for job in results if job.stage == "lr"))


def table_of_rates(losses):
    """Every rate that was tried: the mean loss on val less the best one's. losses: mean_losses'."""
    rates = sorted({lr for of_lr in losses.values() for lr in of_lr})
    lines = []
    for name, of_lr in losses.items():
        cells = dict.fromkeys(rates, "")
        for lr, loss in of_lr.items():
            cells[lr] = "diverged" if math.isinf(loss) else f"{loss - min(of_lr.values()):.3f}"
        lines.append([METHODS[name].title, *cells.values()])
    return lab.markdown(["", *[f"{lr:g}" for lr in rates]], lines)


# --- pictures ---


def panels(n):
    """A figure of n panels in a row."""
    figure, axes = plt.subplots(1, n, figsize=(4 * n + 3, 4.5), layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
    return figure, axes[0]


def style(name):
    """How a method's line looks: (IA)³'s black, ten others by colour, what is more dashed."""
    i = list(METHODS).index(name)
    look = {"color": "k", "lw": 2} if name == "ia3" else {"color": f"C{i % 10}", "ls": ("-", "--")[i // 10]}
    return look | {"label": METHODS[name].title}


def draw_beside(folder):
    """beside.png: a method's loss less (IA)³'s on every work. Nothing where no method stands beside (IA)³."""
    groups = read_tests(folder)
    shown = set()
    for methods in groups.values():
        shown |= {name for name in methods if row_of(methods, name).beside is not None}
    names = [name for name in METHODS if name in shown - {"base", "full", "ia3"}]
    if not names:
        return
    figure, axes = panels(len(groups))
    for ax, ((data, steps), methods) in zip(axes, groups.items(), strict=True):
        for y, name in enumerate(names):
            if name in methods and row_of(methods, name).beside is not None:
                draw_works(ax, y, methods, name)
        ax.axvline(0, color="k", lw=1)
        ax.set(title=f"{data}, {steps} steps", xlabel="test loss less (IA)³'s (nats a byte)")
        ax.set_yticks(range(len(names)), [METHODS[name].title if ax is axes[0] else "" for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
    save_picture(figure, folder / "beside.png")


def draw_works(ax, y, methods, name):
    """A dot per work, its thin bar lab.block_noise; below them a thick bar, Student's t over the works."""
    theirs, ours = pairs(methods, name)
    change = np.mean([run["nats"] for run in theirs], 0) - np.mean([run["nats"] for run in ours], 0)  # (blocks,)
    values = row_of(methods, name).beside
    for i, value in enumerate(values):
        height = y + 0.3 * (i / len(values) - 0.5)
        blocks = ours[0]["work"] == i
        ends = lab.block_noise(change[blocks], ours[0]["bytes"][blocks])
        ax.plot(ends, [height, height], color="C0", lw=0.7)
        ax.plot(value, height, "o", color="C0", ms=3)
    if len(values) >= 3:
        ax.plot(lab.student(values)[1:], [y + 0.3, y + 0.3], color="k", lw=3)


def draw_curves(folder):
    """curves.png: the loss on val while each method learned."""
    groups = read_tests(folder)
    figure, axes = panels(len(groups))
    for ax, ((data, steps), methods) in zip(axes, groups.items(), strict=True):
        for name, runs in methods.items():
            if name != "base":
                ax.plot(*runs.curve(), **style(name))
        ax.set(title=f"{data}, {steps} steps", xlabel="step")
    axes[0].set_ylabel("val loss (nats a byte)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, folder / "curves.png")


def draw_rates(folder):
    """rates.png: the loss on val at every rate that was tried; ×: diverged. Nothing where rates were given."""
    results, _ = lab.load_runs(folder, Job, Result)
    groups = searches(results)
    if not groups:
        return
    figure, axes = panels(len(groups))
    for ax, (data, steps) in zip(axes, groups, strict=True):
        losses = mean_losses(results, data, steps)
        for name, of_lr in losses.items():
            finite = {lr: loss for lr, loss in of_lr.items() if math.isfinite(loss)}
            ax.plot(finite.keys(), finite.values(), marker="o", ms=3, **style(name))
            for lr in of_lr.keys() - finite.keys():
                ax.plot(lr, 0.97, "x", color=style(name)["color"], transform=ax.get_xaxis_transform())
        least = min((min(of_lr.values()) for of_lr in losses.values()), default=0.0)
        ax.set(xscale="log", title=data, xlabel="learning rate; ×: diverged", ylim=(least - 0.02, least + 0.5))
    axes[0].set_ylabel(f"loss on val after {groups[0][1]} steps (nats a byte)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save_picture(figure, folder / "rates.png")


def write(folder):
    """Write table.md and the pictures into folder, from its files alone. Returns the tables."""
    with np.errstate(invalid="ignore"):  # differences of losses that are infinite
        text = tables(folder)
        lab.save_text(text, folder / "table.md")
        draw_beside(folder)
        draw_curves(folder)
        draw_rates(folder)
    return text
