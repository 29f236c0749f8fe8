"""bench.py, generation.py and exactness.py: the same thing is raced, and what is counted has closed forms."""

import copy
import sys
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from here import Here
from torch import nn

from conftest import make_gpt, make_ia3, make_idx
from data import Stream
from experiments import bench, clocks, costs, exactness, generation, lab, peers
from ia3 import attach
from llama import LlamaConfig
from model import GPTConfig
from train import TrainConfig, lm_loss

CPU = torch.device("cpu")
L, H, C, V, TOKENS = 3, 2, 16, 61, 8
CONFIG = GPTConfig(TOKENS, V, L, H, C)
LLAMA_CONFIG = LlamaConfig(TOKENS, V, L, 4, 2, C, 40, 1e5, 1e-5, tied=True)
ABOUT = dict.fromkeys(("hardware", "dtype", "torch", "transformers", "peft", "date"), "")
PEFTS_IA3 = [name for name in peers.TRAINING if name.startswith("PEFT (IA)³")]


def make(name, dtype=torch.float32, base=None, config=CONFIG):
    """A contestant's model and loss; its frozen or trained base holds the weights of base, one of ours, if given."""
    model, loss_fn = peers.build(name, config, CPU, torch.float32)
    if base is not None:
        weights = base.state_dict()
        with torch.no_grad():
            for key, p in model.named_parameters():
                key = key.removeprefix("base_model.model.").replace(".base_layer", "")
                if not key.startswith("ia3.") and "ia3_l" not in key and "lora_" not in key:
                    conv1d = "gelu" in name and p.dim() == 2 and ".h." in key  # transformers' keeps (in, out)
                    p.copy_(weights[key].t() if conv1d else weights[key])
    return model.to(dtype), loss_fn


def tolerance(name):
    """For losses near 5 and gradients near 1 in float64. transformers takes its loss in float32: eight roundings of 5
    by 2^-24.
    """
    return 8 * 5 * 2**-24 if "gelu" in name else 1e-10


@pytest.fixture
def batch():
    return bench.make_batch(CONFIG, 3, CPU)


@pytest.fixture
def tiny(monkeypatch):
    """A shape called tiny, and what a run of it takes on either device."""
    monkeypatch.setitem(peers.SHAPES, "tiny", lambda block_size: CONFIG)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(bench.WORK[device], "tiny", bench.Work(3, TOKENS, 2))


@pytest.mark.parametrize("name", peers.TRAINING)
def test_every_contestant_starts_from_the_same_loss_and_trains_what_it_should(name, batch):
    base = make_gpt(block_size=TOKENS, vocab_size=V, n_layer=L, n_head=H, n_embd=C).double()
    model, loss_fn = make(name, torch.float64, base)
    loss = loss_fn(model, *batch)
    # ones as vectors and zeros as LoRA's second matrix change nothing
    assert abs(loss.item() - base(*batch)[1].item()) <= tolerance(name)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    if "(IA)³" in name:
        assert all("ia3" in key for key in names)
    count = {peers.FULL: sum(p.numel() for p in base.parameters()), peers.OURS: 6 * L * C}.get(name, 7 * L * C)
    if "LoRA" in name:
        count = L * 4 * (C + 3 * C)  # r times what c_attn reads and writes
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("name", peers.TRAINING_LLAMA)
def test_every_contestant_of_a_llamas_shape_too(name, batch):
    base = peers.our_model(LLAMA_CONFIG).double()
    model, loss_fn = make(name, torch.float64, base, LLAMA_CONFIG)
    # transformers takes the RMSNorms, the angles and its loss in float32
    assert abs(loss_fn(model, *batch).item() - base(*batch)[1].item()) <= (8 * 5 * 2**-24 if "PEFT" in name else 0)
    count = {peers.FULL: sum(p.numel() for p in base.parameters()), "PEFT LoRA": L * 4 * (C + C + C + C // 2)}
    vectors = L * (C // 2 + C // 2 + 40)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count.get(name, vectors)


@pytest.mark.parametrize("name", PEFTS_IA3)
def test_peft_computes_our_gradients(name, batch):
    """Where the query part of PEFT's vector is ones: so the same thing is raced."""
    base = make_gpt(block_size=TOKENS, vocab_size=V, n_layer=L, n_head=H, n_embd=C).double()
    ours = copy.deepcopy(base)
    make_ia3(ours)
    peft, their_loss = make(name, torch.float64, base)
    theirs = [p for key, p in peft.named_parameters() if "ia3_l" in key]
    with torch.no_grad():
        for i, (l_k, l_v, l_ff) in enumerate(ours.ia3.per_layer()):
            theirs[2 * i].copy_(torch.cat([torch.ones(C), l_k, l_v])[:, None])
            theirs[2 * i + 1].copy_(l_ff[None])
    found = ours(*batch)[1], their_loss(peft, *batch)
    assert abs(found[0].item() - found[1].item()) <= tolerance(name)
    for loss in found:
        loss.backward()
    grads = {key: p.grad for key, p in ours.ia3.matrices().items()}
    for i in range(L):
        expected = theirs[2 * i].grad[:, 0]
        # our vectors are float32, and so are their gradients: 2^-24 of numbers below 2
        bound = max(tolerance(name), 2 * 2**-24)
        assert expected.abs().min() > 0 and expected.abs().max() < 2
        assert (torch.cat([grads["l_k"][i], grads["l_v"][i]]) - expected[C:]).abs().max() <= bound
        assert (grads["l_ff"][i] - theirs[2 * i + 1].grad[0]).abs().max() <= bound


def matrices(config):
    """Entries of all matrices that a token is multiplied by."""
    return 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd


@pytest.mark.parametrize("name", peers.TRAINING[:5])
def test_flops_of_a_step(name, batch):
    """Full: two FLOPs an entry forward, two for the input's gradient, two for the weight's. A frozen base has no weight
    gradients, and its first c_attn reads what nothing trained has touched. Attention: two products of T × C forward,
    four backward; ours leaves out the gradient of the first layer's queries.
    """
    model, loss_fn = make(name)
    counts = clocks.count_step(model, batch, loss_fn, TrainConfig(lr=0.1))
    full = name == peers.FULL
    assert counts["linear_flops"] == (6 * matrices(CONFIG) if full else 4 * matrices(CONFIG) - 2 * 3 * C**2)
    assert counts["attention_flops"] == 12 * L * TOKENS * C - (2 * TOKENS * C if name == peers.OURS else 0)
    linear, attention = clocks.count_flops(lambda: loss_fn(model, *batch).backward())  # all rows, where lab counts one
    per_token = counts["linear_flops"], counts["attention_flops"]
    assert (linear, attention) == (3 * TOKENS * per_token[0], 3 * TOKENS * per_token[1])


def test_vectors_and_their_merge_add_no_flops_to_a_forward_pass(batch):
    counts = [bench.reader(name, CONFIG, batch, torch.float32, False)[name].counts for name in bench.INFERENCE]
    assert counts[0]["linear_flops"] == 2 * matrices(CONFIG) and counts[0]["attention_flops"] == 4 * L * TOKENS * C
    assert counts[0] == counts[1] == counts[2]


# n_embd-floats a token and layer. Both LayerNorms' inputs 2, q, k, v 3, attention's output 1, GELU's input 4: 10.
SAVED = {
    peers.FULL: 16,  # both LayerNorms' outputs 2, GELU's output 4
    peers.OURS: 16,  # l_k ⊙ k and l_v ⊙ v 2, GELU's output 4
    peers.AROUND_OURS: 17,  # the same, and the scaled queries
    "PEFT (IA)³, gelu_pytorch_tanh": 17,
    "PEFT (IA)³, gelu_new": 29,  # and three more of GELU's steps
    "PEFT LoRA, gelu_pytorch_tanh": 11,  # LoRA's input 1
    "PEFT LoRA, gelu_new": 23,
}


@pytest.mark.parametrize("name", peers.TRAINING)
def test_saved_for_backward_by_a_layer(name, batch):
    """Beside those of SAVED, a token: two LayerNorms' means and deviations, a logarithm a head, LoRA's rank. A layer:
    PEFT's product of its active vectors.
    """
    total = []
    for n_layer in (2, 3):
        model, loss_fn = make(name, config=GPTConfig(TOKENS, V, n_layer, H, C))
        total.append(clocks.count_saved(partial(loss_fn, model, *batch), model))
    small = 4 + H + (4 if "LoRA" in name else 0)
    vectors = 7 * C if name in PEFTS_IA3 else 0
    assert total[1] - total[0] == 4 * (3 * TOKENS * (SAVED[name] * C + small) + vectors)


def test_counting_what_is_saved_keeps_none_of_it():
    x = torch.ones(3, requires_grad=True)
    made = []

    def forward():
        y = x.exp()  # its backward wants y itself
        made.append(weakref.ref(y))
        return y.sum()

    assert clocks.count_saved(forward, nn.Module()) == 12
    assert made[0]() is None


def test_a_training_step_is_forward_backward_adamw(batch):
    """Three steps of lab's against the same by hand: bit for bit."""
    one = make_gpt(block_size=TOKENS, vocab_size=V)
    other = copy.deepcopy(one)
    start = attach(one).l_k.clone()
    attach(other)
    step = clocks.training_step(one, batch, lm_loss, TrainConfig(lr=0.1))
    optimizer = torch.optim.AdamW(other.ia3.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        step()
        other(*batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.ia3.l_k, start)


def test_a_gpus_step_is_timed_until_the_gpu_is_done(device, monkeypatch):
    waited = []

    def seconds(call, where):
        waited.append(where.type)
        return 2.0

    monkeypatch.setattr(clocks, "seconds", seconds)
    model = make_gpt().to(device)
    split = Stream(np.arange(200) % 257, 16)
    a_step, a_window = clocks.pace(model, split, TrainConfig(lr=0.1, batch_size=4))
    assert waited == (["cuda"] * 6 if device == "cuda" else [])
    if device == "cuda":
        assert (a_step, a_window) == (2.0, 0.5)


def test_ratios_point_where_the_table_says(tiny, monkeypatch):
    """Over what has no vectors; and ours over the contestant."""
    took = {peers.FULL: 8.0, peers.OURS: 2.0, bench.BASE: 1.0, bench.UNMERGED: 5.0, bench.ONE_TASK: 2.0}

    def times(calls, *_):
        return {name: [took.get(name, 4.0)] * 3 for name in calls}

    monkeypatch.setattr(clocks, "interleave", times)
    rows = {}
    for what in ("training", "inference", "mixed"):
        rows |= {row.contestant: row for row in bench.measure("tiny", what, 3, CPU, torch.float32, False, ABOUT)}
    assert rows.keys() > {*peers.TRAINING, *bench.INFERENCE}
    assert (rows[peers.OURS].over_plain, rows[peers.OURS].ours_over) == (0.25, 1)
    assert (rows[peers.AROUND_OURS].over_plain, rows[peers.AROUND_OURS].ours_over) == (0.5, 0.5)
    assert (rows[bench.MERGED].over_plain, rows[bench.MERGED].ours_over) == (4, 1.25)
    assert rows["16 tasks, mixed"].over_plain == 2
    assert rows[peers.FULL].tokens_per_second == 3 * TOKENS / 8
    assert (rows[peers.FULL].rows, rows[peers.FULL].tokens) == (3, TOKENS)
    assert (rows[bench.ONE_TASK].rows, rows[bench.ONE_TASK].tokens) == (bench.MIXED_ROWS, bench.MIXED_TOKENS)


def test_a_llamas_shape_has_contestants_of_its_own(tiny, monkeypatch):
    monkeypatch.setitem(peers.SHAPES, "tiny", lambda block_size: LLAMA_CONFIG)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Here)
    found = [bench.measure("tiny", what, 2, CPU, torch.float32, False, ABOUT) for what in bench.CONTESTS]
    names = [row.contestant for rows in found for row in rows]
    assert names[:11] == [*peers.TRAINING_LLAMA, *peers.COMPLETIONS, *bench.INFERENCE] and len(names) == 16
    everywhere, ours, _ = found[1]
    # the head's input and logits (B, T, V) are kept where they are computed
    assert everywhere.saved_bytes - ours.saved_bytes >= 4 * 8 * (TOKENS - bench.COMPLETION_TARGETS) * V
    line = bench.table([replace(everywhere, peak_bytes=4 * 10**8), replace(ours, peak_bytes=3 * 10**8)]).splitlines()[
        -1
    ]
    assert line.startswith("| (IA)³ | ") and " | 300 | 0.75 | 1.00 (1.00 to 1.00) |" in line


@pytest.mark.parametrize("name", peers.COMPLETIONS)
def test_where_the_head_is_applied_changes_no_loss_and_no_gradient(name):
    batch = bench.make_completions(LLAMA_CONFIG, bench.COMPLETION_ROWS, CPU)
    base = peers.our_model(LLAMA_CONFIG).double()
    attach(base)
    model, loss_fn = make(name, torch.float64, base, LLAMA_CONFIG)
    losses = loss_fn(model, *batch), lm_loss(base, *batch)
    # loss_by_all_logits and transformers take the loss in float32
    bound = 8 * 5 * 2**-24
    assert abs(losses[0].item() - losses[1].item()) <= bound
    for loss in losses:
        loss.backward()
    gradients = [p.grad for key, p in model.named_parameters() if p.requires_grad and ("l_v" in key or "v_proj" in key)]
    found = torch.stack([grad.flatten() for grad in gradients]).flatten()
    assert (found - base.ia3.l_v.grad.flatten()).abs().max() <= bound and found.abs().max() > 100 * bound


def test_what_is_raced_is_what_its_name_says(batch):
    """The merged is merged, with vectors that are not ones; a mixed batch has the rows of each task by itself."""
    base, unmerged, merged = (
        bench.reader(name, CONFIG, batch, torch.float32, False)[name].call.args[0] for name in bench.INFERENCE
    )
    assert base.ia3 is None and merged.ia3 is None
    assert all((p - 1).abs().max() > 0.1 for p in unmerged.ia3.parameters())
    short = bench.make_batch(CONFIG, bench.MIXED_ROWS, CPU)
    calls = {name: contestant.call for name, contestant in bench.mixers(CONFIG, short, torch.float32).items()}
    for n in (4, 16):
        mixed = calls[f"{n} tasks, mixed"]()  # (rows, tokens, vocab_size)
        in_turn = calls[f"{n} tasks, one after another"]()  # a tensor a task
        for i, rows in enumerate(in_turn):
            # another number of rows may sum in another order: float32's 1e-6 of logits around 1
            assert (mixed[torch.arange(16) % n == i] - rows).abs().max() <= 1e-5
        assert (calls[bench.ONE_TASK]() - mixed).abs().max() > 1e-3


def command(folder, *flags, device="cpu"):
    return ["--shape", "tiny", "--device", device, "--no-compile", "--repeats", "2", "--out", str(folder), *flags]


def test_a_bench_its_tables_and_the_same_run_again(device, tiny, tmp_path, capsys):
    assert bench.main(command(tmp_path, device=device)) == 0
    rows = bench.read_rows(tmp_path)
    assert [row.contestant for row in rows[:10]] == [*peers.TRAINING, *bench.INFERENCE] and len(rows) == 15
    for row in rows:
        assert (row.peak_bytes is not None) == (device == "cuda" and row.what != "mixed")
        assert 0 < row.over_plain_low <= row.over_plain <= row.over_plain_high
    text = bench.tables(tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text + "\n"
    assert text in capsys.readouterr().out
    before = (tmp_path / "results.csv").read_bytes()
    assert bench.main(command(tmp_path, device=device)) == 0  # nothing is measured again
    assert (tmp_path / "results.csv").read_bytes() == before
    assert capsys.readouterr().out == text + "\n"
    lab.write_csv(tmp_path / "results.csv", [vars(row) for row in rows if row.what != "training"])  # it was stopped
    assert bench.main(command(tmp_path, device=device)) == 0
    assert capsys.readouterr().out.count(": 2 rounds\n") == 1
    again = bench.read_rows(tmp_path)
    assert [row.contestant for row in again] == [row.contestant for row in rows]
    assert again[len(peers.TRAINING) :] == rows[len(peers.TRAINING) :] and again[1] != rows[1]
    assert bench.main(command(tmp_path, "--repeats", "3", device=device)) == 2
    assert "repeats 2, not 3" in capsys.readouterr().err

    # the cells, from numbers that are easy; bytes of GPU memory bring two columns more
    unit = 4 * 3 * TOKENS * L * C  # bytes of an n_embd-float, every token and layer
    full, ours = [replace(row, peak_bytes=None, tokens_per_second=123456.7) for row in rows[:2]]
    vars(full).update(linear_flops=900, attention_flops=100, saved_bytes=20 * unit)
    vars(ours).update(linear_flops=540, attention_flops=80, saved_bytes=15 * unit)
    for row, time in ((full, 1.0), (ours, 0.75)):
        vars(row).update(over_plain=time, over_plain_low=time, over_plain_high=time)
        vars(row).update(ours_over=0.75 / time, ours_over_low=0.5, ours_over_high=1.5)
    line = "| (IA)³ | 0.75 (0.75 to 0.75) | 0.600 | 0.620 | 1.21 | 15.0 | 1.00 (0.50 to 1.50) |"
    assert bench.table([full, ours]).splitlines()[-1] == line
    full.peak_bytes = ours.peak_bytes = 3 * 2**29
    assert bench.table([full, ours]).splitlines()[-1] == f"{line} 123,457 | 1.50 |"


@pytest.mark.parametrize("flags, message", [("--shape 1.5B --device cpu", "1.5B"), ("--repeats 1", "not 1")])
def test_mistakes_are_told_in_one_line(flags, message, tmp_path, capsys):
    assert bench.main([*flags.split(), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["peft", "transformers"])
def test_without_peft_or_transformers(tiny, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert bench.main(command(tmp_path / "new")) == 2
    err = capsys.readouterr().err
    assert name in err and "requirements-dev.txt" in err and not (tmp_path / "new").exists()


# --- the small tables ---


def test_two_times_are_called_equivalent_within_the_margin_only():
    cost = costs.Cost("ia3", equal_low=0.98, equal_high=1.02)
    assert cost.is_equivalent()
    assert not replace(cost, equal_low=0.96).is_equivalent() and not replace(cost, equal_high=1.04).is_equivalent()


def test_the_table_of_exactness():
    base = make_gpt()
    rows = exactness.measure(base, make_ia3(copy.deepcopy(base)), make_idx(base))
    assert len(rows) == 9 and {len(row) for row in rows} == {len(exactness.HEAD)}
    assert [row[2] for row in rows[:3]] == ["0"] * 3 and all(row[2] != "0" for row in rows[3:])


def test_generation_writes_its_table_and_goes_on(tmp_path, monkeypatch, capsys):
    """What is raced writes the same text; the floor reads every weight once, but those that are only looked up."""
    monkeypatch.setattr(generation, "WRITTEN", 4)
    assert generation.main(["--quick", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "quick/table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith(table)
    rows = generation.read_rows(tmp_path / "quick")
    names = [generation.THEIRS]
    for name in (generation.OURS, generation.MERGED):
        names += [name, name + generation.BY_COLUMNS]
    assert [(row.rows, row.contestant) for row in rows] == [(n, name) for n in (1, 8) for name in names]
    model = make_gpt()
    everything = sum(p.numel() for p in model.parameters())
    assert generation.weight_bytes(model) == 4 * (everything - model.transformer.wpe.weight.numel())
    halves = ["--quick", "--dtype=bfloat16", "--out"]
    assert generation.main([*halves, str(tmp_path)]) == 2 and "dtype float32" in capsys.readouterr().err
    assert generation.main([*halves, str(tmp_path / "halves")]) == 0 and "bfloat16" in capsys.readouterr().out
    assert 2 * generation.read_rows(tmp_path / "halves/quick")[0].weight_bytes == rows[0].weight_bytes
    before = (tmp_path / "quick/results.csv").read_bytes()
    assert generation.main(["--quick", "--out", str(tmp_path)]) == 0  # nothing is left to measure
    assert (tmp_path / "quick/results.csv").read_bytes() == before
    lab.write_csv(tmp_path / "quick/results.csv", [vars(row) for row in rows[:-1]])  # of fewer contestants
    assert generation.main(["--quick", "--out", str(tmp_path)]) == 0
    again = generation.read_rows(tmp_path / "quick")
    assert again[:5] == rows[:5] and [row.contestant for row in again[5:]] == names and again[5:9] != rows[5:9]
