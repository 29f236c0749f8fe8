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
    found = {}
    for job in sorted(results, key=lambda job: job.lr):
        if (job.stage, job.data, job.steps) == ("lr", data, steps):
            found.setdefault(job.method, {}).setdefault(job.lr, []).append(results[job].loss)
    means = {}
    for job in results:  # methods in the order in which they were tried
        if job.method in found:
            of_lr = found[job.method].items()
            means[job.method] = {lr: float(np.mean(losses)) for lr, losses in of_lr if len(losses) == len(RATE_SEEDS)}
    return means


# --- comparing, from the files alone ---


@dataclass
class Row:
    """What a method's runs say beside the base's, full fine-tuning's and (IA)³'s, which may be missing: None."""

    values: int
    lr: float
    loss: np.ndarray  # (works,) nats a byte, the mean of its seeds
    forgotten: np.ndarray  # (forget's works,) the loss there less the base's
    gap: np.ndarray | None  # (works,) the share of full fine-tuning's gain over the base, in percent
    beside: np.ndarray | None  # (works,) the loss less (IA)³'s, over the seeds that both have
    seeds: np.ndarray | None  # (seeds,) the same by seed
    n_seeds: int

    def is_ranked(self):
        """Whether the difference to (IA)³ is clear of 0 over three works or more, and over the seeds."""
        intervals = [lab.student(values)[1:] for values in (self.beside, self.seeds)]
        return len(self.beside) >= 3 and all(low > 0 or high < 0 for low, high in intervals)


def read_tests(folder):
    """Return {(data, steps): {method: {Job: its arrays}}}, methods in the order of METHODS, the base in each."""
    results, arrays = lab.load_runs(folder, Job, Result)
    tests = [job for job in results if job.stage == "test"]
    for job in results:
        if job.method not in METHODS:
            raise ValueError(f"{folder}/results.csv names a method {job.method!r} that is not in rivals.py")
    groups = {}
    for data, steps in sorted({(job.data, job.steps) for job in tests if job.method != "base"}):
        methods = {}
        for name in METHODS:
            runs = [job for job in tests if job.data == data and job.method == name and job.steps in (0, steps)]
            if runs:  # seeds rising: they are written as they end
                runs.sort(key=lambda job: job.seed)
                methods[name] = {job: lab.arrays_of(job, arrays, folder) for job in runs}
        if "base" not in methods:
            raise ValueError(f"{folder} lacks the run of the base on {data}: the command measures it")
        groups[data, steps] = methods
    if not groups:
        raise ValueError(f"{folder} holds no results yet: the command without --quick measures them")
    return groups


def compare(folder):
    """Return {(data, steps): {method: its Row}}."""
    results, _ = lab.load_runs(folder, Job, Result)
    found = {}
    for key, methods in read_tests(folder).items():
        by_seed = {}  # {method: {seed: (works,)}}
        forgotten = {}
        for name, runs in methods.items():
            losses = lab.stack_works(list(runs.values()))
            by_seed[name] = {job.seed: of_works for job, of_works in zip(runs, losses, strict=True)}
            forgotten[name] = lab.stack_works(list(runs.values()), "forget_").mean(0)
        loss = {name: np.mean(list(of_seed.values()), 0) for name, of_seed in by_seed.items()}
        found[key] = {}
        for name, runs in methods.items():
            job = next(iter(runs))
            gap = beside = seeds = None
            if "full" in methods:
                gain = loss["base"] - loss["full"]  # infinite where it diverged: then there is no share of it
                gap = 100 * (loss["base"] - loss[name]) / np.where(np.isfinite(gain), gain, np.nan)
            if "ia3" in methods:
                ours = by_seed["ia3"]
                theirs = dict.fromkeys(ours, loss["base"]) if name == "base" else by_seed[name]  # it is not trained
                both = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
                if both:
                    beside = np.mean(both, 0)
                    seeds = np.mean(both, 1)
            found[key][name] = Row(
                values=results[job].values,
                lr=job.lr,
                loss=loss[name],
                forgotten=forgotten[name] - forgotten["base"],
                gap=gap,
                beside=beside,
                seeds=seeds,
                n_seeds=len(runs),
            )
    return found


def mean_curve(runs):
    """The loss on val while the method learned, the mean of its runs: steps and losses, (evaluations,) each.

    runs: {Job: arrays}. Both are empty where a run diverged.
    """
    curves = [arrays["curve"] for arrays in runs.values()]
    if not all(map(len, curves)):
        return np.empty((2, 0))
    return np.mean(curves, axis=0).T  # (2, evaluations)


def half_gap(methods, name):
    """The first step seen at which a method has half of what full fine-tuning gains by its last, or 'never'."""
    _, full = mean_curve(methods["full"])
    if not len(full):
        return "never"
    steps, losses = mean_curve(methods[name])
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


def tables(folder):
    """The tables, in Markdown, from the files of folder, a Path, alone; without costs where there is no costs.csv."""
    results, _ = lab.load_runs(folder, Job, Result)
    about = lab.read_about(folder)
    tests = read_tests(folder)
    chosen = any(job.stage == "lr" for job in results)  # else each has one rate, and nothing is ranked
    head = ["method", "values", "rate", "test loss", "gap closed, %", "loss less (IA)³'s", "the same, over seeds"]
    head += ["half the gap at step", f"{about['forget']} forgotten"]
    pieces = []
    for (data, steps), rows in compare(folder).items():
        methods = tests[data, steps]
        most = max(row.n_seeds for row in rows.values())
        lines = []
        for name, row in rows.items():
            values = lr = gap = beside = seeds = half = forgotten = ""
            title = METHODS[name].title
            if name != "base":
                values = f"{row.values:,}"
                lr = f"{row.lr:g}"
                half = half_gap(methods, name) if "full" in methods else ""
                forgotten = of_works(row.forgotten, "+.4f")
                if row.n_seeds < most:
                    title += f" ({n_seeds(row.n_seeds)})"
            if name not in ("base", "full"):
                gap = of_works(row.gap, ".1f")
            if name != "ia3" and row.beside is not None:
                beside = of_works(row.beside, "+.4f")
                if len(row.seeds) > 1 and np.isfinite(row.seeds).all():
                    seeds = lab.spread(*lab.student(row.seeds), "+.4f")
                if not (row.is_ranked() and chosen):
                    beside += ", no ranking"
            lines.append([title, values, lr, of_works(row.loss, ".4f"), gap, beside, seeds, half, forgotten])
        works = ", ".join(about["works"][data])
        pieces.append(f"**{data}**, {steps} steps of {about['batch_size']} windows, {n_seeds(most)}, on {works}:")
        pieces.append(lab.markdown(head, lines))
    pieces += rate_tables(results)
    measured = lab.read_rows(folder / "costs.csv", costs.Cost)
    if measured:
        pieces.append(costs.table(measured))
    return "\n\n".join(pieces)


def n_seeds(n):
    return "1 seed" if n == 1 else f"{n} seeds"


def searches(results):
    """The (data, steps) for which rates were tried."""
    return list(dict.fromkeys((job.data, job.steps) for job in results if job.stage == "lr"))


def rate_tables(results):
    """Every rate that was tried: the mean loss on val less the best one's, a table a data; none where one was given."""
    pieces = []
    for data, steps in searches(results):
        losses = mean_losses(results, data, steps)
        rates = sorted({lr for of_lr in losses.values() for lr in of_lr})
        lines = []
        for name, of_lr in losses.items():
            cells = dict.fromkeys(rates, "")
            for lr, loss in of_lr.items():
                cells[lr] = "diverged" if math.isinf(loss) else f"{loss - min(of_lr.values()):.3f}"
            lines.append([METHODS[name].title, *cells.values()])
        pieces.append(
            f"By how much the loss on {data}'s val is above the best rate's, by rate, after {steps} steps, "
            f"{len(RATE_SEEDS)} seeds:"
        )
        pieces.append(lab.markdown(["", *[f"{lr:g}" for lr in rates]], lines))
    return pieces


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
    """beside.png: the difference to (IA)³ on every work a dot, its thin bar block_noise; thick: t over the works.

    Nothing where no method stands beside (IA)³.
    """
    tests = read_tests(folder)
    found = compare(folder)
    shown = set()
    for rows in found.values():
        shown |= {name for name, row in rows.items() if row.beside is not None}
    names = [name for name in METHODS if name in shown - {"base", "full", "ia3"}]
    if not names:
        return
    figure, axes = panels(len(found))
    for ax, ((data, steps), rows) in zip(axes, found.items(), strict=True):
        for y, name in enumerate(names):
            if name not in rows or rows[name].beside is None:
                continue
            both = [{job.seed: run for job, run in tests[data, steps][of].items()} for of in (name, "ia3")]
            seeds = both[0].keys() & both[1].keys()
            runs, ours = [[of_seed[seed] for seed in sorted(seeds)] for of_seed in both]
            change = np.mean([run["nats"] for run in runs], 0) - np.mean([run["nats"] for run in ours], 0)  # (blocks,)
            values = rows[name].beside
            for i, value in enumerate(values):
                at = y + 0.3 * (i / len(values) - 0.5)
                here = runs[0]["work"] == i
                low, high = lab.block_noise(change[here], runs[0]["bytes"][here])
                ax.plot([low, high], [at, at], color="C0", lw=0.7)
                ax.plot(value, at, "o", color="C0", ms=3)
            if len(values) >= 3:
                ax.plot(lab.student(values)[1:], [y + 0.3] * 2, color="k", lw=3)
        ax.axvline(0, color="k", lw=1)
        ax.set(title=f"{data}, {steps} steps", xlabel="test loss less (IA)³'s (nats a byte)")
        ax.set_yticks(range(len(names)), [METHODS[name].title if ax is axes[0] else "" for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
    save_picture(figure, folder / "beside.png")


def draw_curves(folder):
    """curves.png: the loss on val while each method learned."""
    groups = read_tests(folder)
    figure, axes = panels(len(groups))
    for ax, ((data, steps), methods) in zip(axes, groups.items(), strict=True):
        for name in methods:
            if name != "base":
                ax.plot(*mean_curve(methods[name]), **style(name))
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
        least = min(min(of_lr.values()) for of_lr in losses.values())
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
