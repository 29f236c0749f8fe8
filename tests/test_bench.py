"""experiments/bench.py: its contestants compute the same thing, what is counted is what formulas say, and the tables
follow from the CSV. No test looks at a clock."""

import sys

import pytest
import torch
from conftest import DEVICES, make_gpt

from experiments import bench
from experiments.clock import count_flops, count_saved
from experiments.runs import read_csv, write_csv
from model import GPTConfig

CPU = torch.device("cpu")
L, H, C, V, T = 3, 2, 16, 61, 8
CONFIG = GPTConfig(T, V, L, H, C)
PEFTS_IA3 = [name for name in bench.TRAINING if name.startswith("PEFT (IA)³")]


def make(name, dtype=torch.float32, base=None, config=CONFIG):
    """A contestant's model and loss; its frozen or trained base holds the weights of base, a GPT of ours, if given."""
    model, loss_fn = bench.build(name, config, CPU, torch.float32)
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
    monkeypatch.setitem(bench.SHAPES, "tiny", (L, H, C, V))
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(bench.WORK[device], "tiny", (3, T, 2))


@pytest.mark.parametrize("name", bench.TRAINING)
def test_every_contestant_starts_from_the_same_loss_and_trains_what_it_should(name, batch):
    base = make_gpt(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C).double()
    model, loss_fn = make(name, torch.float64, base)
    assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])  # the targets are the next tokens
    loss = loss_fn(model, *batch)
    # ones as vectors and zeros as LoRA's second matrix change nothing
    assert abs(loss.item() - base(*batch)[1].item()) <= tolerance(name)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    trained = {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], p) for key, p in frozen.items())
    assert not any(torch.equal(after[key], p) for key, p in trained.items() if "lora_A" not in key)  # its start: B = 0
    if "(IA)³" in name:
        assert all("ia3" in key for key in trained)
    count = {bench.FULL: sum(p.numel() for p in base.parameters()), bench.OURS: 6 * L * C}.get(name, 7 * L * C)
    if "LoRA" in name:
        count = L * 4 * (C + 3 * C)  # r times what c_attn reads and writes
    assert sum(p.numel() for p in trained.values()) == count


@pytest.mark.parametrize("name", PEFTS_IA3)
def test_peft_computes_our_gradients(name, batch):
    """Where the query part of PEFT's vector is ones: so the same thing is raced."""
    base = make_gpt(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)
    ours, loss_fn = make(bench.OURS, torch.float64, base)
    peft, their_loss = make(name, torch.float64, base)
    theirs = [p for p in peft.parameters() if p.requires_grad]  # c_attn's (3C, 1), c_proj's (1, 4C), a layer
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.ia3.parameters():
            p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
        for i, (l_k, l_v, l_ff) in enumerate(ours.ia3.rows()):
            theirs[2 * i].copy_(torch.cat([torch.ones(C), l_k, l_v])[:, None])
            theirs[2 * i + 1].copy_(l_ff[None])
    losses = loss_fn(ours, *batch), their_loss(peft, *batch)
    assert abs(losses[0].item() - losses[1].item()) <= tolerance(name)
    for loss in losses:
        loss.backward()
    grads = {key: p.grad for key, p in ours.ia3.matrices().items()}
    for i in range(L):
        expected = theirs[2 * i].grad[:, 0]
        assert expected.abs().min() > 0 and expected.abs().max() < 2
        assert (torch.cat([grads["l_k"][i], grads["l_v"][i]]) - expected[C:]).abs().max() <= tolerance(name)
        assert (grads["l_ff"][i] - theirs[2 * i + 1].grad[0]).abs().max() <= tolerance(name)


@pytest.mark.parametrize("name", bench.TRAINING)
def test_a_frozen_base_is_kept_in_bfloat16_and_what_is_trained_in_float32(name):
    model, _ = bench.build(name, CONFIG, CPU, torch.bfloat16)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    frozen = {(False, torch.bfloat16)} if name != bench.FULL else set()
    assert dtypes == {(True, torch.float32)} | frozen


def matrices(config):
    """Entries of all matrices that a token is multiplied by."""
    return 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd


@pytest.mark.parametrize("name", bench.TRAINING[:5])
def test_flops_of_a_step(name, batch):
    """Full: two FLOPs an entry forward, two for the input's gradient, two for the weight's. A frozen base has no weight
    gradients, and its first c_attn reads what nothing trained has touched. Attention: two products of T × C forward,
    four backward; ours leaves out the gradient of the first layer's queries.
    """
    counts = bench.trainer(name, CONFIG, batch, torch.float32, False)[name][1]
    full = name == bench.FULL
    assert counts["linear_flops"] == (6 * matrices(CONFIG) if full else 4 * matrices(CONFIG) - 2 * 3 * C**2)
    assert counts["attention_flops"] == 12 * L * T * C - (2 * T * C if name == bench.OURS else 0)
    model, loss_fn = make(name)
    linear, attention = count_flops(lambda: loss_fn(model, *batch).backward())  # all rows, where bench counts one
    assert (linear, attention) == (3 * T * counts["linear_flops"], 3 * T * counts["attention_flops"])


@pytest.mark.parametrize("shape, most", [("base", 0.66), ("6x384", 0.66), ("124M", 2 / 3)])
def test_the_floor_of_the_shapes(shape, most):
    config = GPTConfig(1, *(bench.SHAPES[shape][i] for i in (3, 0, 1, 2)))
    assert (4 * matrices(config) - 6 * config.n_embd**2) / (6 * matrices(config)) <= most


def test_vectors_and_their_merge_add_no_flops_to_a_forward_pass(batch):
    counts = [bench.reader(name, CONFIG, batch, torch.float32, False)[name][1] for name in bench.INFERENCE]
    assert counts[0]["linear_flops"] == 2 * matrices(CONFIG) and counts[0]["attention_flops"] == 4 * L * T * C
    assert counts[0] == counts[1] == counts[2]


# n_embd-floats a token and layer. Both LayerNorms' inputs 2, q, k, v 3, attention's output 1, GELU's input 4: 10.
SAVED = {
    bench.FULL: 16,  # both LayerNorms' outputs 2, GELU's output 4
    bench.OURS: 16,  # l_k ⊙ k and l_v ⊙ v 2, GELU's output 4
    bench.AROUND_OURS: 17,  # the same, and the scaled queries
    "PEFT (IA)³, gelu_pytorch_tanh": 17,
    "PEFT (IA)³, gelu_new": 29,  # and three more of GELU's steps
    "PEFT LoRA, gelu_pytorch_tanh": 11,  # LoRA's input 1
    "PEFT LoRA, gelu_new": 23,
}


@pytest.mark.parametrize("name", bench.TRAINING)
def test_saved_for_backward_by_a_layer(name, batch):
    """Beside those of SAVED, a token: two LayerNorms' means and deviations, a logarithm a head, LoRA's rank. A layer:
    PEFT's product of its active vectors.
    """
    total = []
    for n_layer in (2, 3):
        model, loss_fn = make(name, config=GPTConfig(T, V, n_layer, H, C))
        total.append(count_saved(lambda: loss_fn(model, *batch), model))  # noqa: B023 - called at once
    small = 4 + H + (4 if "LoRA" in name else 0)
    vectors = 7 * C if name in PEFTS_IA3 else 0
    assert total[1] - total[0] == 4 * (3 * T * (SAVED[name] * C + small) + vectors)


def test_saved_for_backward_at_6x384():
    """The table's convention: all that is kept, over the layers."""
    n_layer, n_head, n_embd, vocab_size = bench.SHAPES["6x384"]
    config = GPTConfig(256, vocab_size, n_layer, n_head, n_embd)
    x, y = bench.make_batch(config, 1, CPU)
    for name, floats in ((bench.FULL, 16.5), (bench.OURS, 16.1)):
        model, loss_fn = make(name, config=config)
        saved = count_saved(lambda: loss_fn(model, x, y), model)  # noqa: B023 - called at once
        assert round(saved / (4 * 256 * n_layer * n_embd), 1) == floats


def test_ratios_point_where_the_table_says(tiny, monkeypatch):
    """Over what has no vectors; and ours over the contestant."""
    took = {bench.FULL: 8.0, bench.OURS: 2.0, bench.BASE: 1.0, bench.UNMERGED: 5.0}
    monkeypatch.setattr(bench, "take_turns", lambda steps, *_: {name: [took.get(name, 4.0)] * 3 for name in steps})
    rows = {row["contestant"]: row for row in bench.measure("tiny", 3, CPU, torch.float32, False)}
    assert rows.keys() == {*bench.TRAINING, *bench.INFERENCE}
    assert [rows[bench.OURS][key] for key in ("over_plain", "ours_over")] == [0.25, 1]
    assert [rows[bench.AROUND_OURS][key] for key in ("over_plain", "ours_over")] == [0.5, 0.5]
    assert [rows[bench.MERGED][key] for key in ("over_plain", "ours_over")] == [4, 1.25]
    assert rows[bench.FULL]["tokens_per_second"] == 3 * T / 8


def test_merged_is_merged(batch, monkeypatch):
    """The forward passes that are raced: the base's, with vectors that are not ones, and without them after a merge."""
    models = {}
    monkeypatch.setattr(bench, "variants", lambda name, model, compiled: models.setdefault(name, {name: model}))
    for name in bench.INFERENCE:
        bench.reader(name, CONFIG, batch, torch.float32, False)
    base, unmerged, merged = (models[name][name] for name in bench.INFERENCE)
    assert base.ia3 is None and merged.ia3 is None
    assert all((p - 1).abs().max() > 0.1 for p in unmerged.ia3.parameters())
    assert not any(model.training for model in (base, unmerged, merged))


def command(folder, *flags):
    return ["--shape", "tiny", "--device", "cpu", "--no-compile", "--repeats", "2", "--out", str(folder), *flags]


def test_a_run_its_tables_and_the_same_run_again(tiny, tmp_path, capsys):
    assert bench.main(command(tmp_path)) == 0
    rows = read_csv(tmp_path / "results.csv")
    assert [row["contestant"] for row in rows] == [*bench.TRAINING, *bench.INFERENCE]
    for row in rows:
        assert 0 < row["over_plain_low"] <= row["over_plain"] <= row["over_plain_high"]
        assert {"hardware", "torch", "transformers", "peft", "date", "dtype", "repeats"} <= row.keys()
    assert [row["over_plain"] for row in rows if row["contestant"] in (bench.FULL, bench.BASE)] == [1, 1]
    text = bench.tables(tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text + "\n"
    assert text in capsys.readouterr().out
    before = (tmp_path / "results.csv").read_bytes()
    assert bench.main(command(tmp_path)) == 0  # nothing is measured again
    assert (tmp_path / "results.csv").read_bytes() == before
    assert capsys.readouterr().out == text + "\n"


def test_the_cells_of_a_table(tiny, tmp_path):
    """Ratios, floors and units, from a CSV whose numbers are easy; bytes of GPU memory bring two columns more."""
    assert bench.main(command(tmp_path)) == 0
    rows = read_csv(tmp_path / "results.csv")[:2]
    unit = 4 * 3 * T * L * C  # bytes of an n_embd-float, every token and layer
    full = {"linear_flops": 900, "attention_flops": 100, "saved_bytes": 20 * unit}
    ours = {"linear_flops": 540, "attention_flops": 80, "saved_bytes": 15 * unit}
    for row, counted, time in zip(rows, (full, ours), (1.0, 0.75), strict=True):
        row |= counted | dict.fromkeys(("over_plain", "over_plain_low", "over_plain_high"), time)
        row |= {"ours_over": 0.75 / time, "ours_over_low": 0.5, "ours_over_high": 1.5, "tokens_per_second": 123456.7}
    line = "| (IA)³ | 0.75 (0.75 to 0.75) | 0.600 | 0.620 | 1.21 | 15.0 | 1.00 (0.50 to 1.50) |"
    assert bench.table(rows).splitlines()[-1] == line
    for row in rows:
        row["peak_bytes"] = 3 * 2**29
    assert bench.table(rows).splitlines()[-1] == f"{line} 123,457 | 1.50 |"
    widths = {text.count("|") for text in bench.table(rows).splitlines()}
    assert len(widths) == 1
    write_csv(tmp_path / "results.csv", [*rows, rows[0] | {"what": "inference", "contestant": bench.BASE}])
    assert "123,457" in bench.tables(tmp_path)


def refused(argv, capsys):
    assert bench.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: ") and err.count("\n") == 1, err
    return err


def test_refusals(tiny, tmp_path, capsys, monkeypatch):
    assert bench.main(command(tmp_path)) == 0
    capsys.readouterr()
    assert "holds runs with repeats 2, not 3" in refused(command(tmp_path, "--repeats", "3"), capsys)
    assert "invalid choice: '7B'" in refused(["--shape", "7B"], capsys)
    assert "is for a GPU" in refused(command(tmp_path, "--shape", "1.5B"), capsys)
    assert "at least 2" in refused(command(tmp_path, "--repeats", "1"), capsys)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler" in refused(["--shape", "tiny", "--device", "cpu", "--out", str(tmp_path / "new")], capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["peft", "transformers"])
def test_without_peft_or_transformers(tiny, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    err = refused(command(tmp_path / "new"), capsys)
    assert f"no {name} here" in err and "requirements-dev.txt" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu(tmp_path, capsys):
    assert "'cuda' is not here" in refused(["--device", "cuda", "--out", str(tmp_path)], capsys)


@pytest.mark.slow
def test_compiled_ours_saves_less(batch):
    """The compiler recomputes GELU's output in backward, of all layers (of one less, whatever it does at the ends)."""
    found = bench.trainer(bench.OURS, CONFIG, batch, torch.float32, True)
    (_, eager), (_, compiled) = found.values()
    assert list(found) == [bench.OURS, f"{bench.OURS}, compiled"]
    assert compiled["saved_bytes"] < eager["saved_bytes"] - 4 * 3 * T * (L - 1) * 4 * C


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_a_run_on_a_gpu(device, tiny, tmp_path, capsys):
    """The CPU twin is test_a_run_its_tables_and_the_same_run_again."""
    assert bench.main(["--shape", "tiny", "--device", "cuda", "--repeats", "2", "--out", str(tmp_path)]) == 0
    rows = read_csv(tmp_path / "results.csv")
    assert {row["dtype"] for row in rows} <= {"bfloat16", "float32"}
    assert all(row["peak_bytes"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    compiled = [row["contestant"] for row in rows if row["contestant"].endswith(", compiled")]
    assert len(compiled) == 2 + len(bench.INFERENCE)
    assert "peak GiB" in bench.tables(tmp_path)
