"""What articles say of (IA)³: a verdict and a source for each claim, and their comparison table with figures from here.

    python -m experiments.claims > experiments/results/claims.md

Figures come from what is committed in experiments/results, or are counted on the spot.
"""

import argparse
import sys
from functools import partial

import common
from experiments import analysis, bench, compare, lab, rivals
from experiments.rivals import METHODS
from ia3 import IA3
from tools.count import T0, find_model, row, row_of_t0

# --- figures ---


def figures_of_comparison(folder, data="folio"):
    """{name: text} of compare's runs at 1× and, where they are measured, its costs."""
    key = (data, compare.STEPS)
    found = compare.statistics(folder)[key]
    tests = compare.read_tests(folder)[key]
    figures = {}
    for name in found.keys() - {"base"}:
        method = name.replace("-", "_")
        figures[f"gap_{method}"] = f"{compare.of_works(found[name]['gap'], '.1f')} %"
        figures[f"half_{method}"] = compare.half_gap(tests, name)
    for cells in lab.read_csv(folder / "costs.csv", compare.COSTS):
        method = cells["method"].replace("-", "_")
        for what, column in (("forward", "unmerged"), ("merged", "merged"), ("mixed", "mixed")):
            if cells[column] is not None:
                figures[f"{what}_{method}"] = f"{cells[column]:.2f}"
        if cells["method"] == "ia3":
            ends = f"{cells['equal_low']:.3f} to {cells['equal_high']:.3f}"
            figures["equal"] = f"{ends}, {'equivalent' if compare.is_equivalent(cells) else 'inconclusive'}"
    return figures


def times_over_plain(rows, name):
    """A contestant's time over that of the first of its contest, shape by shape. rows: bench's."""
    return ", ".join(f"{row['over_plain']:.2f} ({row['shape']})" for row in rows if row["contestant"] == name)


def small_heads(results):
    """How many heads have scales of a mean below a half, and all heads' means, of both analyses."""
    found = []
    for name, where in (("heads", "folio"), ("heads-smollm2", "movie reviews, SmolLM2")):
        rows = lab.read_csv(results / "analysis" / name / "results.csv", analysis.HEADS)
        means = [row[mean] for row in rows for mean in ("l_k_mean", "l_v_mean")]
        small = sum(min(row["l_k_mean"], row["l_v_mean"]) < 0.5 for row in rows)
        found.append(f"{small} of {len(rows)} on {where} ({min(means):.2f} to {max(means):.2f})")
    return ", ".join(found)


def count_values(add, model):
    """How many values a method trains. add: as Method.add."""
    model.requires_grad_(False)
    return sum(p.numel() for p in add(model))


def megabytes(values):
    return f"{4 * values / 1e6:.3g} MB"


def read_figures(results):
    """Return {name: text}. results: the folder of committed results."""
    figures = figures_of_comparison(results / "compare")
    counts = {name: count_values(METHODS[name].add, common.load(lab.BASE)) for name in METHODS}
    for name, n in counts.items():
        key = name.replace("-", "_")
        figures[f"n_{key}"] = f"{n:,}"
        figures[f"share_{key}"] = f"{n / counts['full']:.2%}"
        figures[f"bytes_{key}"] = megabytes(n)
        figures[f"optimizer_{key}"] = f"{12 * n / 1e6:.3g} MB"
    figures["heads"] = small_heads(results)
    for name in ("gpt2", "LLaMA-7B", "Llama-3-8B"):
        figures[f"of_{name}"] = row(name, find_model(name))[5]
    for name in T0:
        figures[f"of_{name}"] = row_of_t0(name)[5]
    llama = find_model("LLaMA-7B")
    total = sum(p.numel() for p in llama.parameters())
    n_lora = count_values(partial(rivals.add_lora_llama, r=4, names=("q_proj", "v_proj")), llama)
    figures |= {"share_lora_7b": f"{n_lora / total:.3%}", "bytes_lora_7b": megabytes(n_lora)}
    figures["bytes_7b"] = megabytes(IA3(llama.config).count())
    kept = compare.count_places(lab.BASE, "folio")
    for title, name in (("(IA)³ on k, v, ff", "all"), ("(IA)³ on k, v", "kv"), ("(IA)³ on ff", "ff")):
        figures[f"kept_{name}"] = f"{kept[title]['saved_bytes'] / kept['full fine-tuning']['saved_bytes']:.2f}"
    cpu, gpu = [lab.read_csv(results / f"{name}/results.csv", bench.RESULTS) for name in ("bench", "bench-h200")]
    figures["steps"] = times_over_plain(cpu, bench.OURS)
    figures["steps_gpu"] = times_over_plain(gpu, bench.OURS)
    figures["unmerged_gpu"] = times_over_plain(gpu, bench.UNMERGED)
    full = {row["shape"]: row["peak_bytes"] for row in gpu if row["contestant"] == bench.FULL}
    ours = [row for row in gpu if row["contestant"] == bench.OURS]
    (tokens,) = {row["rows"] * row["tokens"] for row in ours}
    figures["tokens_gpu"] = f"{tokens:,}"
    (largest,) = [row for row in cpu if (row["shape"], row["contestant"]) == ("124M", bench.OURS)]
    figures["tokens_cpu"] = str(largest["rows"] * largest["tokens"])
    figures["peaks"] = ", ".join(f"{row['peak_bytes'] / full[row['shape']]:.2f} ({row['shape']})" for row in ours)
    figures["gap_smollm2"] = figures_of_comparison(results / "compare-smollm2")["gap_ia3"]
    return figures


# --- words, with the figures' names in braces ---

CLAIMS = (  # the claim, the verdict, where to look
    (
        "three vectors a layer rescale keys, values and the MLP's hidden activations; output l ⊙ Wx",
        "holds for a decoder-only model; a layer with cross-attention has five, and the MLP's is l ⊙ γ(Wx)",
        "[model.py](../../model.py), [paper.md](../../docs/paper.md)",
    ),
    (
        "less than 0.01 % of the parameters, or 0.01 to 0.1 %; fewer than LoRA, comparable to BitFit",
        "depends on the model: {of_gpt2} of GPT-2 124M, {of_LLaMA-7B} of LLaMA-7B, {of_Llama-3-8B} of Llama-3-8B, "
        "{of_T0-11B} of T0-11B, {of_T0-3B} of T0-3B. On the bundled base {n_ia3} values; LoRA r = 1 on k, v has "
        "{n_lora1}, r = 4 on q, v {n_lora4}, BitFit {n_bitfit}",
        "`python -m tools.convert count`",
    ),
    (
        "a vector can suppress heads that do not matter and amplify those that do",
        "it has a scale a channel, so it can. Heads whose keys or values are scaled by less than a half in the mean: "
        "{heads}",
        "[analysis](../README.md#analysis)",
    ),
    (
        "the MLP's vector acts behind the activation, before the up-projection",
        "behind the activation holds; what follows is the down-projection",
        "[model.py](../../model.py), [llama.md](../../docs/llama.md)",
    ),
    (
        "only the vectors and their optimizer state need training memory",
        "does not hold: gradients and AdamW's averages do shrink, to {optimizer_ia3} from {optimizer_full}; the "
        "weights stay, and of the activations {kept_all} of what full fine-tuning keeps, {kept_ff} with ff alone, "
        "{kept_kv} with k, v. Measured on an H200, all in all, the base in bfloat16 where full fine-tuning's weights "
        "are float32: {peaks} of full fine-tuning's peak",
        "`python -m experiments.compare --counts`, [H200](bench-h200/table.md)",
    ),
    (
        "no added inference latency: the vectors fold into the weights",
        "holds by construction: merged, the keys, shapes, dtype and FLOPs are the base's. As a check, the 90 % "
        "interval of its time over the base's: {equal}",
        "[merge.py](../../merge.py), compare's costs",
    ),
    (
        "fast training: few parameters, rapid convergence",
        "not more rapid than full fine-tuning: the step where it has half of what that gains on folio is {half_ia3}, "
        "full fine-tuning's {half_full}, of evaluations every five. A step does take less, over full fine-tuning's "
        "time: {steps}; on an H200, with {tokens_gpu} tokens a step, {steps_gpu}. Of the FLOPs it saves a third; it is "
        "spared AdamW's pass over all weights, too, which tells where tokens are few: 124M has {tokens_cpu} on the CPU",
        "[bench](bench/table.md), [H200](bench-h200/table.md), compare",
    ),
    (
        "against LoRA: rescales activations, where LoRA adds a low-rank change of weights; often fewer parameters",
        "holds until they are merged: then both are a change of weights, (IA)³'s diag(l)W - W, of no low rank. How "
        "many values LoRA has is a choice of r and of the maps",
        "[paper.md](../../docs/paper.md)",
    ),
    (
        "against adapters: element-wise, no added depth, no serial bottleneck",
        "holds. A forward pass over the base's time, with adapters: {forward_adapters_only}; with vectors: "
        "{forward_ia3} (one row on 2.7 M; less with more on a CPU, see bench; on an H200, in bfloat16, "
        "{unmerged_gpu}); merged: {merged_ia3}",
        "compare's costs, [bench](bench/table.md), [H200](bench-h200/table.md)",
    ),
    (
        "many tasks on one frozen base, a set of vectors each",
        "holds, within one batch too. 16 tasks in 16 short rows, over the base's time: {mixed_ia3}; with LoRA, "
        "gathered likewise: {mixed_lora4}",
        "[tasks.md](../../docs/tasks.md), compare's costs",
    ),
    (
        "rapid adaptation of large models to new domains with little data",
        "with few labels: [measured](fewshot/table.md). Share of full fine-tuning's gain on 1623 spelling, 100 steps: "
        "{gap_ia3}; on SmolLM2, two seeds, rates not chosen, {gap_smollm2}. Large models: not tried",
        "compare",
    ),
    (
        "edge and on-device, thanks to size and folding",
        "merged it is its base, so what runs the base runs it. A task is {bytes_ia3} on the bundled base, {bytes_7b} "
        "for LLaMA-7B",
        "[formats.md](../../docs/formats.md)",
    ),
    (
        "instruction tuning",
        "not tried: prompts with completions can be learned",
        "[training.md](../../docs/training.md)",
    ),
)
ROWS = (  # what, then by method: what articles say, and what is found here
    (
        "core mechanism",
        "vectors rescale: holds",
        "low-rank matrices added to weights: holds",
        "bottlenecks between layers: behind both projections, within a layer",
        "vectors before the input, or before keys and values: holds",
    ),
    (
        "what changes",
        "activation scales; merged, weights",
        "weights, by BA: holds",
        "new modules; in the paper the LayerNorms, too",
        "the context: holds",
    ),
    (
        "trained, of the base",
        "about 0.01 %: {share_ia3}; LLaMA-7B {of_LLaMA-7B}",
        "0.1 to 1 %: {share_lora1} (r = 1 on k, v), {share_lora4} (r = 4 on q, v), {share_lora_all} (r = 1 on all); "
        "LLaMA-7B {share_lora_7b} (r = 4 on q, v)",
        "0.5 to 5 %: {share_adapters_only}; with LayerNorms {share_adapters}",
        "under 0.1 %: {share_prompt} (prompt), {share_prefix} (prefix)",
    ),
    (
        "inference time, over the base's",
        "none, merged: {merged_ia3}; unmerged {forward_ia3}",
        "minimal, or merged: {merged_lora4}; unmerged {forward_lora4}",
        "a little a layer: {forward_adapters_only}",
        "longer context: {forward_prompt} (prompt), {forward_prefix} (prefix)",
    ),
    (
        "memory a task",
        "about 0.01 MB: {bytes_ia3}; LLaMA-7B {bytes_7b}",
        "1 to 100 MB: {bytes_lora4}; LLaMA-7B {bytes_lora_7b} (r = 4 on q, v)",
        "10 to 200 MB: {bytes_adapters_only}",
        "0.1 to 10 MB: {bytes_prompt} (prompt), {bytes_prefix} (prefix)",
    ),
    (
        "several tasks at once",
        "yes: 16 in a batch, over the base's time: {mixed_ia3}",
        "by merging and unmerging: no need, matrices can be gathered: {mixed_lora4}",
        "a conditional pass: gathered likewise; not tried",
        "by swapping the prompt: each row has its own; not tried",
    ),
    (
        "gain, of full fine-tuning's (folio, 100 steps)",
        "{gap_ia3}",
        "{gap_lora1} (r = 1 on k, v), {gap_lora_qkv} (r = 1 on q, k, v: as many values as (IA)³), "
        "{gap_lora4} (r = 4 on q, v), {gap_lora_all} (r = 1 on all)",
        "{gap_adapters_only}; with LayerNorms {gap_adapters}",
        "{gap_prompt} (prompt), {gap_prefix} (prefix)",
    ),
    ("typical use", *["advice, which nothing here measures"] * 4),
    (
        "changes the FFN / the attention",
        "yes / keys and values: holds",
        "typically no / q, k, v, o: a choice; r = 1 on all maps changes both",
        "yes / no: the paper's stand behind both",
        "no / context: holds",
    ),
)


def text(figures):
    """The two tables, in Markdown."""
    claims = [
        [f"{n}", claim, verdict.format(**figures), source] for n, (claim, verdict, source) in enumerate(CLAIMS, 1)
    ]
    rows = [[cell.format(**figures) for cell in cells] for cells in ROWS]
    methods = ["(IA)³", "LoRA", "adapters of 8", "a prompt of 16, a prefix of 8"]
    return "\n\n".join(
        [
            "What articles say of (IA)³. *(`python -m experiments.claims`)*",
            lab.markdown(["", "they say", "verdict", "where to look"], claims),
            "Their comparison table, row by row: what they say, and what is found here, on the bundled base of 2.7 M "
            "parameters where no other is named. Its own shares and bytes are large since the base is small.",
            lab.markdown(["", *methods], rows),
        ]
    )


def run(argv):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(text(read_figures(lab.RESULTS)))
    return 0


def main(argv=None):
    return common.exit_status("claims.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
