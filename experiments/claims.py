"""What articles say of (IA)³, beside what was measured here: the README's table, from the files that compare.py wrote.

python experiments/claims.py                    # experiments/results/compare
python experiments/claims.py --results out/compare
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import convert
from experiments.compare import COMMITTED, ROOT, half_gap, mean_curves, statistics
from experiments.runs import read_csv
from model import GPT


def claims(results, init):
    """Return the table in Markdown. results: compare.py's folder, a Path; init: the base it was run on."""
    costs = {row["method"]: row for row in read_csv(results / "costs.csv")}
    curves, config = mean_curves(results), GPT.from_pretrained(init).config
    (data, steps), learned = next(iter(statistics(results).items()))
    gap = {name: f"{values['gap'][0]:.0f} %" for name, values in learned.items()}
    half = {name: half_gap(curves, data, steps, name) or "no" for name in ("ia3", "full")}
    values = {name: f"{row['values']:,}" for name, row in costs.items()}
    ours, full, base = costs["ia3"], costs["full"], costs["base"]
    floor = (ours["linear_flops"] + ours["attention_flops"]) / (full["linear_flops"] + full["attention_flops"])
    saved = {name: f"{row['saved'] / full['saved']:.2f}" for name, row in costs.items()}
    tokens_per_second = config.block_size / base["window_seconds"]
    shares, sizes = [], []  # of GPT-2's four sizes
    for line in convert.count(convert.SIZES).splitlines()[1:]:
        *_, share, _, _, size = line.split()
        shares.append(share.rstrip("%"))
        sizes.append(size)

    def took(name, what):
        """A time over full fine-tuning's or the base's: the median, and the quartiles."""
        row = costs[name]
        return f"{row[what]:.2f} ({row[f'{what}_low']:.2f} to {row[f'{what}_high']:.2f})"

    def verdict(holds):
        return "Holds" if holds else "**Does not hold** here"

    by = "`python experiments/compare.py`"
    rows = [
        (
            "three vectors a layer",
            f"Holds: l_k and l_v of {config.n_embd} and l_ff of {4 * config.n_embd}, {values['ia3']} values in"
            f" {config.n_layer} layers. (A decoder layer with cross-attention has five.)",
            "`python convert.py count`",
        ),
        (
            "less than 0.01 % of the parameters; 0.01 to 0.1 %",
            f"{ours['percent']:.2f} % here, {', '.join(shares)} % of GPT-2's four sizes. Of the blocks it is"
            " 1/(2·n_embd): less than 0.01 % takes n_embd above 5000.",
            "`python convert.py count`",
        ),
        (
            "about 0.01 MB a task",
            f"**Does not hold**: {ours['disk']:,} bytes here, {sizes[0]} for GPT-2 124M. 0.01 MB is 2,500 values.",
            "`python convert.py count`",
        ),
        (
            "no added latency once merged",
            f"{verdict(ours['merged_low'] <= 1)}: a forward pass takes {took('ia3', 'merged')} of the base's, with the"
            f" same keys, shapes and FLOPs. Not merged, {took('ia3', 'unmerged')}.",
            by,
        ),
        (
            "less memory",
            f"Optimizer and gradients take {ours['state']:,} bytes, full fine-tuning's {full['state']:,}: holds. But"
            f" activations kept for backward are {saved['ia3']} of full fine-tuning's (BitFit {saved['bitfit']}, LoRA"
            f" {saved['lora4']}): the gradient of l ⊙ h needs h.",
            by,
        ),
        (
            "fast training",
            f"{verdict(ours['step_high'] < 1)}: a step takes {took('ia3', 'step')} of full fine-tuning's. The floor is"
            f" {floor:.2f}, its FLOPs: the gradient still goes through every layer.",
            by,
        ),
        (
            "rapid convergence",
            f"Half of what full fine-tuning gains in {steps} steps on {data} is there by step {half['ia3']} (full"
            f" fine-tuning: {half['full']}); at the end, {gap['ia3']} is.",
            by,
        ),
        (
            "fewer parameters than LoRA, comparable to BitFit",
            f"{values['ia3']}, and {gap['ia3']} of the gap on {data}; LoRA r = 4 on q, v {values['lora4']} and"
            f" {gap['lora4']}; LoRA r = 1 on k, v {values['lora1']} and {gap['lora1']}; BitFit {values['bitfit']} and"
            f" {gap['bitfit']}.",
            by,
        ),
        (
            "adapters add serial depth",
            f"{verdict(costs['adapters']['unmerged_low'] > 1)}: a forward pass takes {took('adapters', 'unmerged')}"
            " of the base's, and they do not merge.",
            by,
        ),
        (
            "prefix tuning lengthens attention",
            f"{verdict(costs['prefix']['unmerged_low'] > 1)}: 8 more keys before {config.block_size} take"
            f" {took('prefix', 'unmerged')}, and they do not merge.",
            by,
        ),
        (
            "many tasks on one backbone",
            f"Holds: {ours['disk']:,} bytes a task, swapped by an assignment, mixed in a batch by gathering rows"
            " ([figures](#many-tasks-on-one-frozen-base)).",
            "`python experiments/mix.py`",
        ),
        (
            "suits edge deployment",
            f"As well as its base does: merged it is the base's {values['full']} parameters, {full['disk']:,} bytes"
            f" in float32, which read {tokens_per_second:,.0f} tokens a second, a window at a time ({base['device']}).",
            by,
        ),
    ]
    lines = ["| they say | measured here | by |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def run(argv):
    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--results", type=Path, default=COMMITTED, help="compare.py's folder (default: the committed)")
    parser.add_argument(
        "--init", default=str(ROOT / "data/base.pt"), help="the base it was run on (default: data/base.pt)"
    )
    args = parser.parse_args(argv)
    print(claims(args.results, args.init))
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"claims.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
