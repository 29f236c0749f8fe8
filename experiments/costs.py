"""What a method costs: values, FLOPs and memory, which are counted, and times, taken in turns. For compare.py."""

from dataclasses import dataclass
from datetime import date
from functools import partial

import torch

from experiments import clocks, lab, rivals
from experiments.rivals import METHODS
from ia3 import stack
from train import autocast, lm_loss

PLACES = {  # what `compare --counts` sets side by side: title, function
    "full fine-tuning": rivals.add_full,
    "(IA)³ on k, v, ff": rivals.add_ia3,
    "LoRA r = 1 on all maps": partial(rivals.add_lora_maps, r=1),
    "(IA)³ on ff": partial(rivals.add_ia3, sites=("ff",)),
    "(IA)³ on k, v": partial(rivals.add_ia3, sites=("k", "v")),
    "LoRA r = 4 on q, v": partial(rivals.add_lora, r=4, maps="qv"),
}
MARGIN = 0.03  # within which two times are called equivalent
MIXED_ROWS = 16
MIXED_TOKENS = 8


@dataclass
class Cost:
    """A line of costs.csv. Times are medians of ratios, low and high their quartiles; None: not measured."""

    method: str
    values: int = 0
    linear_flops: int | None = None
    attention_flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    step: float | None = None  # over full fine-tuning's
    step_low: float | None = None
    step_high: float | None = None
    unmerged: float | None = None  # a forward pass, over the base's
    unmerged_low: float | None = None
    unmerged_high: float | None = None
    merged: float | None = None  # the same
    merged_low: float | None = None
    merged_high: float | None = None
    equal_low: float | None = None  # the 90 % interval of merged
    equal_high: float | None = None
    mixed: float | None = None  # a batch of several tasks, over the base's
    mixed_low: float | None = None
    mixed_high: float | None = None
    device: str = ""
    torch: str = ""
    date: str = ""

    def is_equivalent(self):
        """Whether the merged pass is shown to be as fast as the base's, within MARGIN."""
        return 1 - MARGIN <= self.equal_low <= self.equal_high <= 1 + MARGIN


def measure(build, batch, config, methods, repeats):
    """Return the Costs of the base and of methods, names in METHODS.

    build(method, seed) returns a GPT with the method attached; batch: a training step's; config: a TrainConfig.
    """
    device = batch[0].device
    about = {"device": clocks.device_name(device), "torch": torch.__version__, "date": f"{date.today()}"}
    costs = {name: {"method": name, **about} for name in ["base", *methods]}  # of each the fields of its Cost

    steps = {}  # training steps
    passes = {}  # forward passes of one window

    def forward(model, idx, task_ids=None):
        with torch.no_grad(), autocast(model, config):
            model(idx, task_ids=task_ids)

    for name, cost in costs.items():
        before = clocks.allocated(device)
        model = build(name, 0)
        if name != "base":
            cost.update(clocks.count_step(model, batch, lm_loss, config))
            steps[name] = clocks.training_step(model, batch, lm_loss, config)
            cost["peak_bytes"] = clocks.peak_bytes(steps[name], device, before)
        passes["unmerged", name] = partial(forward, model, batch[0][:1])
        if METHODS[name].merge:
            passes["merged", name] = partial(forward, METHODS[name].merge(model).eval(), batch[0][:1])
    mixed = mixed_batches(build, batch[0], forward)

    # their times, in turns
    times = clocks.interleave(steps, repeats, device)
    for name in steps:
        costs[name].update(clocks.ratio("step", times[name], times["full"]))
    times = clocks.interleave(passes, 8 * repeats, device, warmup=5)
    base = times["unmerged", "base"]
    for what, name in passes:
        costs[name].update(clocks.ratio(what, times[what, name], base))
        if what == "merged":
            costs[name]["equal_low"], costs[name]["equal_high"] = clocks.equivalence(times[what, name], base)
    times = clocks.interleave(mixed, 8 * repeats, device, warmup=5)
    for name in mixed:
        costs[name].update(clocks.ratio("mixed", times[name], times["base"]))
    return [Cost(**cost) for cost in costs.values()]


def mixed_batches(build, idx, forward):
    """Forward passes of one batch of short rows, each of a task of its own: {method: call}, and the base's."""
    short = idx[:MIXED_ROWS, :MIXED_TOKENS]
    task_ids = torch.arange(MIXED_ROWS, device=idx.device)
    loras = [build("lora4", seed) for seed in range(MIXED_ROWS)]
    stacked = build("ia3", 0)
    stacked.ia3 = stack([stacked.ia3] * MIXED_ROWS)
    return {
        "base": partial(forward, build("base", 0), short),
        "lora4": partial(forward, rivals.mix_lora(loras, task_ids).eval(), short),
        "ia3": partial(forward, stacked, short, task_ids),
    }


def table(costs):
    """Markdown of Costs, the base's and full fine-tuning's among them."""
    by_method = {cost.method: cost for cost in costs}
    if "full" not in by_method or not by_method.keys() <= METHODS.keys():
        raise ValueError("costs.csv is not of these methods: remove it to measure again")
    full = by_method["full"]
    gpu = full.peak_bytes is not None

    def over_full(cost, what):
        """What is counted, over full fine-tuning's."""
        value = getattr(cost, what)
        return "" if value is None else f"{value / getattr(full, what):.3f}"

    def ratio(cost, what):
        value = getattr(cost, what)
        return "" if value is None else lab.spread(value, getattr(cost, f"{what}_low"), getattr(cost, f"{what}_high"))

    head = ["method", "values", "%", "FLOPs of a step: linear, attention", "step time", "kept for backward"]
    if gpu:
        head.append("peak memory")
    head += ["forward", "forward, merged", "90 % interval", "a mixed batch"]
    lines = []
    for name, cost in by_method.items():
        flops = ""
        if name != "base":
            flops = f"{over_full(cost, 'linear_flops')}, {over_full(cost, 'attention_flops')}"
        equal = ""
        if cost.merged is not None:
            verdict = "equivalent" if cost.is_equivalent() else "not shown to be equivalent"
            equal = f"{cost.equal_low:.3f} to {cost.equal_high:.3f}, {verdict}"
        line = [METHODS[name].title, f"{cost.values:,}", f"{100 * cost.values / full.values:.3g}", flops]
        line += [ratio(cost, "step"), over_full(cost, "saved_bytes")]
        if gpu:
            line.append(over_full(cost, "peak_bytes"))
        line += [ratio(cost, "unmerged"), ratio(cost, "merged") or "does not merge", equal]
        lines.append([*line, ratio(cost, "mixed") or f"not measured ({METHODS[name].mixes})"])
    return (
        f"What they cost ({full.device}, torch {full.torch}, {full.date}; medians and quartiles):\n\n"
        f"{lab.markdown(head, lines)}\n\n"
        "Steps, memory and FLOPs over full fine-tuning's; forward passes of one window over the base's. Merged, a\n"
        "model has the base's keys, shapes, dtype and FLOPs, so no latency is added, by construction. The timing is a\n"
        f"check: equivalent, if the 90 % interval of the median lies within ±{MARGIN:.0%}. A mixed batch:\n"
        f"{MIXED_ROWS} rows of {MIXED_TOKENS} tokens, each of a task of its own, over the base's. Gradients and\n"
        "AdamW's averages take 12 bytes a value, a file 4."
    )


def places(build, batch, config):
    """A table of PLACES: what a training step keeps for backward, and its FLOPs, over full fine-tuning's."""
    found = {}
    for title, add in PLACES.items():
        model = build("base", 0)
        rivals.attach(model, add)
        found[title] = clocks.count_step(model, batch, lm_loss, config)
    full = found["full fine-tuning"]
    lines = []
    for title, counted in found.items():
        over_full = [f"{counted[what] / full[what]:.3f}" for what in ("saved_bytes", "linear_flops", "attention_flops")]
        lines.append([title, f"{counted['values']:,}", *over_full])
    return lab.markdown(["", "values", "kept for backward", "FLOPs: linear", "attention"], lines)
