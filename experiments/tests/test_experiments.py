"""The experiments: the rivals, each held to its paper; what lab.py promises; and every command, whole on a tiny base.

No test looks at a clock, and none asserts which method wins.
"""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
from conftest import make_gpt, make_ia3, make_idx, make_llama
from data import Stream
from experiments import ablate, bench, compare, exactness, generation, lab, rivals
from experiments.rivals import METHODS, Adapter
from ia3 import attach
from llama import LlamaConfig
from model import GPTConfig
from sample import generate
from train import TrainConfig, evaluate, train

ROOT = Path(__file__).parents[2]
TRAINED = [name for name in METHODS if name != "base"]


# --- the rivals ---


def make_method(name, moved=True, **sizes):
    """The tiny GPT with a method attached; moved: what it trains, pushed off its start."""
    model = make_gpt(**sizes)
    torch.manual_seed(0)
    rivals.attach(model, METHODS[name].add)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if moved and p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=dice))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_embd": 24, "vocab_size": 300, "block_size": 20}])
def test_each_trains_as_many_values_as_its_formula_says(sizes):
    """n layers of width C; a LayerNorm has 2·C, a c_attn's bias 3·C, a c_fc's 4·C, a projection's C."""
    c = make_gpt(**sizes).config
    n, C = c.n_layer, c.n_embd
    formulas = {
        "base": 0,
        "full": (c.vocab_size + c.block_size) * C + 12 * n * C**2 + (13 * n + 2) * C,
        "bitfit": (11 * n + 1) * C,
        "layernorm": (4 * n + 2) * C,
        "lora1": 2 * 2 * 1 * n * C,
        "lora-qkv": 3 * 2 * 1 * n * C,  # as many as (IA)³
        "lora4": 2 * 2 * 4 * n * C,
        "lora-all": (4 + 2 + 5 + 5) * n * C,  # what each of the four maps reads and writes: as many as lora4
        "adapters": 2 * n * ((2 * 8 + 1) * C + 8) + (4 * n + 2) * C,
        "adapters-only": 2 * n * ((2 * 8 + 1) * C + 8),
        "prefix": 2 * 8 * n * C,
        "prompt": 16 * C,
        "ia3": 6 * n * C,
    }
    counts = {name: sum(p.numel() for p in trained(make_method(name, **sizes)).values()) for name in METHODS}
    assert counts == formulas


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("prefix", "prompt")])
def test_step_0_is_the_base_bit_for_bit(name):
    base, model = make_gpt(), make_method(name, moved=False)
    idx = make_idx(base)
    assert torch.equal(model(idx)[0], base(idx)[0])
    if name != "base":
        assert not torch.equal(make_method(name)(idx)[0], base(idx)[0])


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_what_is_trained_and_nothing_else(name):
    model = make_method(name)
    before = copy.deepcopy(model.state_dict())
    idx = make_idx(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(idx, idx)[1].backward()
    optimizer.step()
    names = {key for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad}
    moved = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert moved == names


@pytest.mark.parametrize("name", METHODS)
def test_merging_changes_nothing_and_leaves_a_plain_gpt(name):
    model = make_method(name)
    before = copy.deepcopy(model.state_dict())
    idx = make_idx(model)
    if METHODS[name].merge is None:
        assert name in ("adapters", "adapters-only", "prefix", "prompt")
        return
    merged = METHODS[name].merge(model)
    assert merged.state_dict().keys() == make_gpt().state_dict().keys()
    # float64: some 200 additions of numbers around 10, each good to 1e-16
    double = copy.deepcopy(model).double()
    assert (METHODS[name].merge(double)(idx)[0] - double(idx)[0]).abs().max() <= 1e-11
    truth = double(idx)[0]
    distances = [(m(idx)[0].double() - truth).square().mean().sqrt() for m in (merged, model)]
    assert distances[0] <= max(1.5 * distances[1], 1e-11)  # merge.Report's own bound
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_bitfit_trains_biases_and_layernorm_tuning_every_layernorm():
    model = make_method("bitfit")
    assert trained(model).keys() == {name for name, _ in model.named_parameters() if name.endswith("bias")}
    model = make_method("layernorm")
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert trained(model).keys() == {f"{name}.{what}" for name in norms for what in ("weight", "bias")}


@pytest.mark.parametrize("name, r, maps", [("lora1", 1, "kv"), ("lora-qkv", 1, "qkv"), ("lora4", 4, "qv")])
def test_lora_changes_its_maps_by_a_matrix_of_rank_r(name, r, maps):
    base, merged = make_gpt(), METHODS[name].merge(make_method(name))
    changed = {key for key, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[key])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    for ours, theirs in zip(merged.transformer.h, base.transformer.h, strict=True):
        change = (ours.attn.c_attn.weight - theirs.attn.c_attn.weight).double().chunk(3)
        for m, matrix in zip("qkv", change, strict=True):
            # float32's rounding of the sum leaves singular values of some 1e-7
            assert torch.linalg.matrix_rank(matrix, atol=1e-5).item() == (r if m in maps else 0)


def test_lora_is_pefts():
    """PEFT has one A for the whole of c_attn: ours for q and v stack to one of rank 2r, with zeros in B."""
    from peft import LoraConfig, get_peft_model

    model, base = make_method("lora4"), make_gpt()
    C, r = 16, 4
    theirs = get_peft_model(base, LoraConfig(r=2 * r, lora_alpha=2 * r, target_modules=["c_attn"]))
    with torch.no_grad():
        for ours, block in zip(model.transformer.h, theirs.base_model.model.transformer.h, strict=True):
            lora = block.attn.c_attn
            lora.lora_A["default"].weight.copy_(ours.attn.c_attn.A.flatten(0, 1))
            lora.lora_B["default"].weight.zero_()
            for i, rows in enumerate((slice(0, C), slice(2 * C, 3 * C))):
                lora.lora_B["default"].weight[rows, i * r : (i + 1) * r] = ours.attn.c_attn.B[i]
    idx = make_idx(model)
    difference = theirs.double()(idx)[0] - model.double()(idx)[0]
    assert difference.abs().max() <= 1e-11


def test_lora_on_all_maps_is_pefts():
    from peft import LoraConfig, get_peft_model

    model, base = make_method("lora-all"), make_gpt()
    theirs = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["c_attn", "c_fc", "c_proj"]))
    with torch.no_grad():
        for name, ours in model.named_modules():
            if isinstance(ours, rivals.LoRALinear):
                lora = theirs.get_submodule(f"base_model.model.{name}")
                lora.lora_A["default"].weight.copy_(ours.A)
                lora.lora_B["default"].weight.copy_(ours.B)
    idx = make_idx(model)
    assert (theirs.double()(idx)[0] - model.double()(idx)[0]).abs().max() <= 1e-11


def test_a_llama_has_the_same_lora():
    model = make_llama()
    before = set(dict(model.named_parameters()))
    rows = sum(p.numel() for p in rivals.add_lora_all(model, 1))
    C, kv, hidden = 16, 8, 40
    assert rows == 2 * (2 * (C + C) + 2 * (C + kv) + 3 * (C + hidden))
    assert len(set(dict(model.named_parameters())) - before) == 2 * 7 * 2 + 2 * 7 * 2  # A, B; weight and bias renamed


def test_a_mixed_batch_is_each_row_under_its_own_lora():
    models = []
    for seed in range(3):
        model = make_method("lora4").double()
        torch.manual_seed(seed)
        for p in trained(model).values():
            nn.init.normal_(p)
        models.append(model)
    idx, task_ids = make_idx(models[0])[:3], torch.tensor([2, 0, 2])
    found = rivals.mix_lora(models, task_ids)(idx)[0]
    for row, task in enumerate(task_ids):
        assert (found[row] - models[task](idx[row : row + 1])[0][0]).abs().max() <= 1e-11
    assert (found[0] - models[1](idx[:1])[0][0]).abs().max() > 1e-2


def test_an_adapter_is_its_formula_behind_both_projections():
    adapter = Adapter(5, 3).double()
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    u = h @ adapter.down.weight.T + adapter.down.bias
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    expected = h + gelu @ adapter.up.weight.T + adapter.up.bias
    assert (adapter(h) - expected).abs().max() <= 1e-13
    places = [name for name, m in make_method("adapters").named_modules() if isinstance(m, Adapter)]
    assert places == [f"transformer.h.{i}.{sub}.c_proj.1" for i in range(2) for sub in ("attn", "mlp")]


def test_a_fresh_prefix_is_the_text_whose_keys_and_values_it_holds():
    """Without positions, the base that has read the prefix's text and the base with the prefix predict the same."""
    base = make_gpt().double()
    nn.init.zeros_(base.transformer.wpe.weight)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    rivals.attach(model, METHODS["prefix"].add)
    torch.manual_seed(0)
    text = generate(base, torch.zeros(1, 1, dtype=torch.long), 8)[:, 1:]
    idx = make_idx(base)[:, :8]
    expected = base(torch.cat((text.expand(3, -1), idx), 1))[0][:, 8:]
    assert (model(idx)[0] - expected).abs().max() <= 1e-11


def test_a_prefixs_attention_has_the_bases_dropout():
    model = make_gpt(dropout=0.5)
    rivals.attach(model, METHODS["prefix"].add)
    attn = model.transformer.h[0].attn
    attn.attn.resid_dropout.p = 0  # so that the attention's is left
    x = torch.randn(1, 8, model.config.n_embd)
    assert torch.equal(attn.eval()(x), attn(x)) and not torch.equal(attn.train()(x), attn(x))


def test_a_prompt_is_a_text_before_the_text():
    """Without positions, the base that has read the prompt's tokens and the base with the prompt predict the same."""
    base = make_gpt(block_size=32).double()
    nn.init.zeros_(base.transformer.wpe.weight)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    rivals.attach(model, METHODS["prompt"].add)
    torch.manual_seed(0)
    text = torch.randint(257, (16,))
    idx = make_idx(base)[:, :8]
    expected = base(torch.cat((text.expand(len(idx), -1), idx), 1))[0][:, 16:]
    assert (model(idx)[0] - expected).abs().max() <= 1e-11
    with pytest.raises(ValueError, match="has no cache"):
        generate(model, idx[:1], 2)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_what_stands_before_the_text_lets_no_position_see_the_future(name):
    model = make_method(name)
    idx = make_idx(model)
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % 257
    assert torch.equal(model(idx)[0][:, :-1], model(other)[0][:, :-1])


# --- lab.py: losses and intervals ---


def test_window_losses_are_evaluates():
    model, config = make_gpt(), TrainConfig(lr=0.1, batch_size=4)
    val = Stream(np.random.default_rng(0).integers(0, 3, 205), 16)  # token 0 is a target like any other
    nats, targets = lab.window_losses(model, val, config)
    assert len(nats) == len(val) and targets.sum() == val.n_tokens
    for i in (0, len(val) - 1):  # the last is short
        x, y = val.windows([i])
        assert targets[i] == (y >= 0).sum().item()
        assert nats[i] == pytest.approx(model(x, y)[1].item() * targets[i], rel=1e-5)
    # float32 means of batches against sums of windows
    assert nats.sum() / targets.sum() == pytest.approx(evaluate(model, val, config), rel=1e-6)
    nats, targets = lab.window_losses(model, val, config, 3)
    assert nats.sum() / targets.sum() == pytest.approx(evaluate(model, val, config, n_windows=3), rel=1e-6)


def test_an_interval_over_works_is_students():
    """Of 1 to 5: mean 3, deviation √2.5; 2.776 is the 97.5 % point of 4 degrees of freedom."""
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert lab.student([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    value, low, high = lab.student([7])
    assert value == 7 and math.isnan(low) and math.isnan(high)


def test_the_noise_of_blocks_is_the_textbooks():
    """The standard error of a mean of 400 blocks: s / √n, in nats a byte where a block has two."""
    nats = np.random.default_rng(1).normal(1, 2, 400)
    low, high = lab.block_noise(nats, np.full(400, 2.0))
    error = nats.std() / math.sqrt(400) / 2
    # ends from 2000 draws are off by some 6 % of the standard error
    assert low == pytest.approx(nats.mean() / 2 - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(nats.mean() / 2 + 1.96 * error, abs=0.25 * error)


@pytest.mark.parametrize("n", [16, 50, 100, 200])
def test_two_times_are_equivalent_by_the_sign_test(n):
    """The k-th of n ratios is below the median's interval where fewer than k of n heads come in at most 5 %."""
    low, high = lab.equivalence(list(range(1, n + 1)), [1] * n)
    tail = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in (int(low), int(low) + 1)]
    assert tail[0] <= 0.05 < tail[1] and high == n + 1 - low


def test_a_loss_is_read_work_by_work(tmp_path):
    """Each work whole and by itself: cut at its title, the same title again begins nothing, and no window has two."""
    pieces = {"Julius Caesar, 1623": "The Tragedie of Julius Caesar\n" + 30 * "ab cd " + "\n"}
    pieces["Luke"] = "Luke 1\n\n" + 20 * "x\nThe Tragedie of Julius Caesar\n"
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("".join(pieces.values()))
    model = make_gpt()
    works = lab.read_works(tmp_path, "test", model)
    assert {name: bytes(work.tokens).decode() for name, work in works.items()} == pieces
    found = lab.work_losses(model, works, TrainConfig(lr=0.1))
    losses = [evaluate(model, work, TrainConfig(lr=0.1)) * work.n_tokens / work.n_bytes for work in works.values()]
    assert lab.stack_works([found])[0] == pytest.approx(losses, rel=1e-6)  # float32 means of batches against sums
    assert found["bytes"].sum() == pytest.approx(sum(map(len, pieces.values())))
    assert len(found["work"]) == sum(-(-len(work) // lab.BLOCK) for work in works.values())
    (tmp_path / "test.txt").write_text("Prologue\n" + "".join(pieces.values()))
    assert list(lab.read_works(tmp_path, "test", model)) == [tmp_path.name, *pieces]
    many = "".join(f"{title}\n{'x' * 20}\n" for title in lab.TITLES)
    for text, message in (("\n" + "".join(pieces.values()), "too short"), (many, "holds 14 works, and .* at most 10")):
        (tmp_path / "test.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            lab.read_works(tmp_path, "test", model)


def test_what_is_bundled_has_its_works():
    model = common.load(lab.BASE)
    counts = {"plays": (2, 2), "folio": (2, 5), "sonnets": (1, 1), "kjv": (1, 2)}
    for name in counts:
        found = [lab.read_works(name, split, model) for split in ("val", "test")]
        assert tuple(map(len, found)) == counts[name]
        assert name == "sonnets" or name not in {*found[0], *found[1]}  # nothing stands before the first title


# --- lab.py: runs ---

COLUMNS = {"name": str, "seed": int, "loss": float}


def half(name, seed):
    return {"loss": seed / 2}, {"nats": np.full(3, seed)}


def die(name, seed):
    os.kill(os.getpid(), signal.SIGKILL)


def test_runs_go_on_where_they_were_stopped(tmp_path, capsys):
    jobs = [{"name": "x_y", "seed": seed} for seed in range(3)]
    rows = lab.measure_all(jobs[:2], half, COLUMNS, tmp_path, 1)
    assert rows == [job | {"loss": job["seed"] / 2} for job in jobs[:2]]
    capsys.readouterr()
    assert lab.measure_all(jobs, half, COLUMNS, tmp_path, 1)[:2] == rows
    assert capsys.readouterr().out.startswith("1/1 ")
    rows, arrays = lab.read_runs(tmp_path, COLUMNS)
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert all((lab.arrays_of(row, arrays, tmp_path)["nats"] == row["seed"]).all() for row in rows)
    with pytest.raises(OSError, match="a worker was killed"):
        lab.measure_all([*jobs, {"name": "z", "seed": 0}], die, COLUMNS, tmp_path, 1)
    assert lab.read_runs(tmp_path, COLUMNS)[0] == rows


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: other columns"),
        ("a,b\n1,2\n", "line 1: other columns"),
        ("name,seed,loss\nx,1,many\n", "line 2: could not convert"),
        ("name,seed,loss\nx,1\n", "line 2: "),
        ("name,seed,loss\nx,1,2,3\n", "line 2: too many cells"),
        ("name,seed,loss\nx,1.5,2\n", "line 2: invalid literal"),
        (b"\xff\xfe\x00", "remove it to measure again"),
    ],
)
def test_a_csv_that_is_edited_empty_or_foreign_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "results.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"results\.csv is not what this command wrote") as e:
        lab.read_runs(tmp_path, COLUMNS)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_other_files_that_are_foreign_are_one_clear_line(tmp_path):
    (tmp_path / "windows.npz").write_text("x")
    with pytest.raises(ValueError, match=r"windows\.npz is damaged"):
        lab.read_runs(tmp_path, COLUMNS)
    with pytest.raises(ValueError, match="lacks x_1"):
        lab.arrays_of({"name": "x", "seed": 1}, {}, tmp_path)
    for other in (np.zeros(4), np.array([0, 0, 1])):
        with pytest.raises(ValueError, match="different texts"):
            lab.stack_works([{"work": work, "nats": work, "bytes": work + 1} for work in (np.zeros(3), other)])
    for text in ("", "[1]", "{"):
        (tmp_path / "about.json").write_text(text)
        with pytest.raises(ValueError, match=r"about\.json is not what this command wrote"):
            lab.open_folder(tmp_path, {"a": 1})


# --- what is committed ---


@pytest.mark.parametrize(
    "folder, tables",
    [
        ("compare", compare.tables),
        ("compare-smollm2", compare.tables),
        ("ablation", ablate.tables),
        ("ablation-rates", ablate.tables),
        ("bench", bench.tables),
        ("bench-epyc", bench.tables),
    ],
)
def test_a_committed_table_is_what_the_command_makes_of_the_committed_files(folder, tables):
    path = lab.RESULTS / folder / "table.md"
    if not path.exists():
        pytest.skip("not made yet")
    text = path.read_text(encoding="utf-8")
    assert text == tables(lab.RESULTS / folder) + "\n"


# --- compare ---


def test_rates_are_quarter_decades():
    assert [compare.rate(i) for i in range(-4, 6)] == [0.1, 0.18, 0.3, 0.56, 1, 1.8, 3, 5.6, 10, 18]
    assert [compare.index_of_rate(compare.rate(i)) for i in range(-20, 9)] == list(range(-20, 9))


def test_a_grid_grows_while_its_edge_is_best_then_the_quarters_beside_the_best_are_tried():
    """By the mean of two seeds, of which one by itself would choose another rate. What diverges is never chosen."""
    best = dict.fromkeys(TRAINED, 0.03) | {"ia3": 1.8, "full": 1e-3}
    seen = {}

    def measure_jobs(jobs):
        for job in jobs:
            assert job["stage"] == "lr" and job["data"] == "kjv"
            seen.setdefault(job["method"], set()).add(job["lr"])
        rows = []
        for job in jobs:
            away = math.log10(job["lr"] / best[job["method"]])
            loss = math.inf if away > 0.6 else (away + (0.4 if job["seed"] else -0.4)) ** 2
            rows.append(job | {"loss": loss})
        return rows

    assert compare.choose_rates(measure_jobs, "kjv", dict.fromkeys(TRAINED, compare.index_of_rate(0.03))) == best
    assert seen["lora4"] == {0.01, 0.018, 0.03, 0.056, 0.1}
    assert seen["full"] == {3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3, 1e-2, 3e-2, 1e-1}
    assert seen["ia3"] == {0.01, 0.03, 0.1, 0.3, 1, 3, 10, 1.8, 5.6}  # 3 is the better half-decade, and 10 diverges


SETTINGS = {"device": "cpu", "dtype": "float32"} | compare.GPT_WORK


@pytest.fixture
def texts(tmp_path):
    """A folder with base.pt, a random GPT of three layers, and a/, whose test is three works, and b/, with one."""
    common.save(make_gpt(n_layer=3), tmp_path / "base.pt")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "val", "test"):
            text = f"And {name} saw the light, that it was {split}. " * 10
            if (name, split) == ("a", "test"):
                text = "".join(f"{title}\n{text}{i}\n" for i, title in enumerate(list(lab.TITLES)[:3]))
            (tmp_path / name / f"{split}.txt").write_text(text)
    return tmp_path


def test_the_whole_comparison_and_that_it_goes_on(texts, monkeypatch, capsys):
    """One grid point a method, two steps, two seeds."""
    monkeypatch.setattr(compare, "STEPS", 2)
    monkeypatch.setattr(compare, "SEEDS", range(1, 3))
    monkeypatch.setattr(compare, "LONG_STEPS", 4)
    monkeypatch.setattr(compare, "REPEATS", 2)

    def one_rate(measure_jobs, data, middles):
        job = {"stage": "lr", "data": data, "method": "ia3", "lr": 0.02, "steps": 2}
        measure_jobs([job | {"seed": seed} for seed in compare.RATE_SEEDS])
        return dict.fromkeys(TRAINED, 0.01)

    monkeypatch.setattr(compare, "choose_rates", one_rate)
    out = texts / "out"
    flags = f"--base {texts}/base.pt --data {texts}/a --forget {texts}/b --device cpu --workers 2 --out {out}".split()
    assert compare.main([*flags, "--plan"]) == 0
    # of each method seven rates and two tests, three of them also long, and the base
    n = len(TRAINED)
    assert capsys.readouterr().out.startswith(f"{n * 2 * 7 + n * 2 + 3 * 2 + 1} runs, ") and not out.exists()
    assert compare.main(flags) == 0
    rows = lab.read_csv(out / "results.csv", compare.RUNS)
    assert len(rows) == 2 + 1 + n * 2 + 3 * 2
    for name in ("beside.png", "curves.png", "rates.png"):
        assert compare.plt.imread(out / name)[..., :3].std() > 0.05
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert "2 seeds, on Macbeth, Twelfth Night, Julius Caesar:" in table
    found = compare.statistics(out)
    assert found.keys() == {("a", 2), ("a", 4)} and found["a", 4].keys() == {"base", "full", "lora4", "ia3"}
    for (_, steps), methods in found.items():
        assert methods["full"]["gap"] == pytest.approx([100] * 3) and (methods["base"]["gap"] == 0).all()
        assert (methods["ia3"]["beside"] == 0).all() and (methods["base"]["forgotten"] == 0).all()
        for name, values in methods.items():
            of = [row for row in rows if (row["stage"], row["method"], row["steps"]) == ("test", name, steps)]
            if of:  # blocks are kept in float32
                assert values["loss"].mean() == pytest.approx(np.mean([row["loss"] for row in of]), rel=1e-6)
                assert values["beside"].mean() == pytest.approx(values["seeds"].mean())
                assert len(values["loss"]) == 3 and len(values["seeds"]) == 2
    cell = lab.spread(*lab.student(found["a", 2]["full"]["beside"]), "+.4f")
    assert f"| {cell} |" in table or f"| {cell}, no ranking |" in table

    # in whatever order runs have ended, seeds are paired, and the rate that is told is the tests'
    ours, others = ([row for row in rows if (row["method"] == "ia3") == is_ours] for is_ours in (True, False))
    lab.write_csv(out / "results.csv", [*others[::-1], *sorted(ours, key=lambda row: row["stage"], reverse=True)])
    assert compare.tables(out) + "\n" == table and "| (IA)³ | 288 | 0.01 |" in table
    lab.write_csv(out / "results.csv", rows)

    # the files alone make the table; a run that is missing is measured again, to the same bits, and no other
    lab.write_csv(out / "results.csv", rows[:-1])
    (out / "table.md").unlink()
    assert compare.main(flags) == 0
    assert lab.read_csv(out / "results.csv", compare.RUNS) == rows and (out / "table.md").read_text() == table
    assert capsys.readouterr().out.count(" min left") == 1

    # another text to forget is another folder of runs; a method that is not in rivals.py is told
    assert compare.main([*flags, "--forget", f"{texts}/a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "holds runs with forget b, not a: another --out" in err
    lab.write_csv(out / "results.csv", [*rows, rows[-1] | {"method": "magic"}])
    assert compare.main(flags) == 2
    assert "names a method 'magic' that is not in rivals.py" in capsys.readouterr().err


@pytest.mark.parametrize("script", [compare, ablate])
def test_quick(script, texts, capsys):
    flags = f"--quick --base {texts}/base.pt --data {texts}/a --device cpu --out {texts}/out".split()
    assert script.main([*flags, *(["--forget", f"{texts}/b"] if script is compare else [])]) == 0
    table = (texts / "out/quick/table.md").read_text(encoding="utf-8")
    told = capsys.readouterr().out
    assert re.match(r"\d+ runs, ", told) and table.strip() in told and "nan" not in table


def test_no_ranking_where_a_difference_is_not_clear_of_0_over_works_and_over_seeds():
    clear, unclear = np.array([0.1, 0.11, 0.12]), np.array([-0.1, 0.11, 0.12])
    assert compare.is_ranked({"beside": clear, "seeds": -clear})
    assert not compare.is_ranked({"beside": unclear, "seeds": clear})
    assert not compare.is_ranked({"beside": clear, "seeds": unclear})
    assert not compare.is_ranked({"beside": clear, "seeds": clear[:1]})  # one seed knows of no other
    assert not compare.is_ranked({"beside": clear[:2], "seeds": clear})  # two works show themselves only
    assert compare.of_works(np.array([1.0, 3.0]), ".1f") == "2.0 (1.0 / 3.0)"
    assert compare.of_works(np.array([1.0, 2.0, 3.0]), ".2f") == "2.00 (-0.48 to 4.48)"  # 4.303 / √3 = 2.484


def test_a_llama_has_three_methods_and_its_frozen_weights_in_bfloat16(texts, capsys, monkeypatch):
    monkeypatch.setattr(compare, "STEPS", 2)
    common.save(make_llama().bfloat16(), texts / "llama.pt")
    out = texts / "out"
    flags = f"--base {texts}/llama.pt --data {texts}/a --forget {texts}/b --device cpu --out {out}".split()
    assert compare.main(flags) == 0
    rows = lab.read_csv(out / "results.csv", compare.RUNS)
    assert sorted((row["method"], row["seed"]) for row in rows) == [
        ("base", 0),
        *[(name, seed) for name in ("full", "ia3", "lora-all") for seed in (1, 2)],
    ]
    printed = capsys.readouterr().out
    assert "What they cost" not in printed and not (out / "costs.csv").exists()
    assert printed.count(", no ranking |") == 3  # no rate was chosen here: the base, full, LoRA
    assert compare.main([*flags, "--counts"]) == 2
    settings = {"base": f"{texts}/llama.pt", "llama": True, "device": "cpu"}
    for name in compare.LLAMA_RATES:
        for p in compare.load_model(settings, name, 0).parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)


def test_on_a_base_without_biases_bitfit_is_left_out(texts, capsys):
    common.save(make_gpt(bias=False), texts / "base.pt")
    flags = f"--base {texts}/base.pt --data {texts}/a --forget {texts}/b --device cpu --out {texts}/out --quick".split()
    assert compare.main(flags) == 0
    methods = {row["method"] for row in lab.read_csv(texts / "out/quick/results.csv", compare.RUNS)}
    assert methods == METHODS.keys() - {"bitfit"} and "BitFit" not in capsys.readouterr().out


def test_what_is_kept_for_backward_depends_on_the_place(capsys):
    """A layer keeps 16 n_embd-floats in full, as SAVED has it below."""
    assert compare.main(["--counts"]) == 0
    table = capsys.readouterr().out
    kept = {line.split(" | ")[0].strip("| "): float(line.split(" | ")[2]) for line in table.splitlines()[2:]}
    assert kept["(IA)³ on k, v, ff"] > 0.97 and kept["LoRA r = 1 on all maps"] > 0.97
    assert max(kept["(IA)³ on ff"], kept["(IA)³ on k, v"], kept["LoRA r = 4 on q, v"]) < 0.78


def test_a_run_that_diverges_is_a_run_like_any_other(texts, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(compare, "train", diverge)
    monkeypatch.setattr(ablate, "train", diverge)
    settings = SETTINGS | {"base": f"{texts}/base.pt", "folders": {"a": f"{texts}/a"}, "forget": "a"}
    results, arrays = compare.measure(settings, "lr", "a", "full", 1.0, 20, 0)
    assert results["loss"] == math.inf and arrays == {}
    results, arrays = compare.measure(settings, "test", "a", "full", 1.0, 20, 0)
    assert results["loss"] == results["forgotten"] == math.inf and np.isinf(lab.stack_works([arrays])).all()
    settings = {"base": f"{texts}/base.pt", "data": f"{texts}/a", "device": "cpu"}
    results, arrays = ablate.measure(settings, "k", "all", 1.0, 20, 1)
    assert results == {"values": 48, "loss": math.inf} and np.isinf(arrays["nats"]).all()


@pytest.mark.parametrize("method, seeds", [("bitfit", [2]), ("bitfit", [1, 2]), ("full", [1]), ("ia3", [1])])
def test_a_report_says_what_diverged(tmp_path, method, seeds):
    (tmp_path / "about.json").write_text('{"forget": "plays", "batch_size": 16, "works": {"folio": ["a", "b", "c"]}}')
    rows = [compare.job("lr", "folio", name, lr, 100, 0) for name in ("bitfit", "full") for lr in (0.1, 1.0)]
    for row in rows:
        gone = row["lr"] == 1.0 or row["method"] == "full"
        row |= {"values": 1, "loss": math.inf if gone else 1.0, "forgotten": None}
    arrays = {}
    for name in ("base", "full", "bitfit", "ia3"):
        for seed in (0,) if name == "base" else (1, 2):
            row = compare.job("test", "folio", name, 0.1, 0 if name == "base" else 100, seed)
            gone = name == method and seed in seeds
            nats = np.full(6, np.inf) if gone else np.arange(6) + len(name) + seed / 10
            run = {"nats": nats, "bytes": np.ones(6), "work": np.repeat([0, 1, 2], 2)}
            run |= {f"forget_{what}": array for what, array in run.items()}
            run["curve"] = np.empty((0, 2)) if gone or name == "base" else np.array([[0, 3.0], [100, 2.0]])
            arrays |= {f"{lab.run_name(row)}/{what}": array for what, array in run.items()}
            rows.append(row | {"values": 1, "loss": float(nats.mean()), "forgotten": float(nats.mean())})
    lab.write_csv(tmp_path / "results.csv", rows)
    np.savez(tmp_path / "windows.npz", **arrays)
    with np.errstate(invalid="ignore"):
        text = compare.tables(tmp_path)
        for draw in (compare.draw_beside, compare.draw_curves, compare.draw_rates):
            draw(tmp_path)
    assert "nan" not in text and "inf" not in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {METHODS[method].title} | 1 |")]
    assert line.split("|")[4].strip() == "diverged"
    assert "| BitFit | 0.000 | diverged |" in text and "| full fine-tuning | diverged | diverged |" in text
    for name in ("beside.png", "curves.png", "rates.png"):
        assert compare.plt.imread(tmp_path / name)[..., :3].std() > 0.05


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_learns_under_the_projects_own_loop(name, texts):
    settings = SETTINGS | {"base": f"{texts}/base.pt"}
    model = compare.load_model(settings, name, 0)
    data = lab.load_data(f"{texts}/a", model, ("train", "val"))
    history = train(model, data, compare.config_of(settings, steps=15, lr=0.01, eval_interval=15))
    assert history[-1]["val_loss"] < history[0]["val_loss"]


# --- ablate ---

REFERENCE = {"sites": "k,v,ff", "depth": "all", "lr": 0.1, "steps": 4}


@pytest.mark.parametrize("n_layer", range(2, 8))
def test_two_halves_make_the_whole(n_layer):
    halves = [ablate.layers(half, n_layer) for half in ("first-half", "second-half")]
    assert halves[0] + halves[1] == ablate.layers("all", n_layer) == list(range(n_layer))
    assert 0 <= len(halves[1]) - len(halves[0]) <= 1
    assert [ablate.layers(str(i), n_layer) for i in range(n_layer)] == [[i] for i in range(n_layer)]


@pytest.mark.parametrize("sites, depth", [("k,v,ff", "first-half"), ("ff", "2"), ("k,v", "second-half"), ("v", "all")])
def test_only_the_chosen_layers_learn_and_the_others_stay_exactly_one(texts, device, sites, depth):
    model = common.load(texts / "base.pt").to(device)
    vectors = attach(model, sites=sites.split(","))
    chosen = ablate.layers(depth, 3)
    values = ablate.hold(vectors, chosen)
    data = lab.load_data(f"{texts}/a", model, ("train", "val"))
    train(model, data, TrainConfig(lr=0.1, steps=5, eval_interval=5, batch_size=4))
    moved = 0
    for p in vectors.parameters():
        assert (p[[i for i in range(3) if i not in chosen]] == 1).all()
        moved += (p != 1).sum().item()
    # n_embd 16: l_k and l_v have 16 values a layer, l_ff 64; a trained one that is 1 in float32 again would be a marvel
    assert values == moved == len(chosen) * sum({"k": 16, "v": 16, "ff": 64}[site] for site in sites.split(","))


def test_every_run_is_there_once():
    depths = ["all", "first-half", "second-half", *map(str, range(6))]
    jobs = ablate.all_jobs(
        {"sites": ablate.SUBSETS, "depth": depths} | ablate.DEFAULTS, REFERENCE | {"steps": 100}, 3, False
    )
    # the base; three seeds of six subsets, eight depths, the reference, and the others' values but the reference's
    assert len(jobs) == len({lab.run_name(job) for job in jobs}) == 1 + 3 * (6 + 8 + 1 + 4 + 4)
    crossed = ablate.all_jobs({"lr": [0.3, 0.5], "steps": [8]}, REFERENCE, 1, True)
    assert [(job["lr"], job["steps"]) for job in crossed[1:]] == [(a, b) for a in (0.3, 0.5, 0.1) for b in (8, 4)]
    assert ablate.in_order("ff,k") == "k,ff" and ablate.in_order("v") == "v"


B = np.array([30.0, 20.0, 25.0, 25.0])  # bytes of the four blocks, two a work
W = np.array([4.0, 8.0, 1.0, 6.0])  # nats of the reference's seeds
BASE = {(("sites", "none"),): [W + 3 * B]}


def write_folder(folder, points, crossed=False):
    """A folder of results made by hand. points: {axes that differ from the reference, as a tuple: [nats a seed]}."""
    about = {"data": "text", "works": ["one", "two"], "block_size": 16, "crossed": crossed}
    (folder / "about.json").write_text(json.dumps(about | {"reference": REFERENCE}))
    rows, arrays = [], {}
    for point, seeds in points.items():
        for seed, nats in enumerate(seeds, 1):
            if nats is None:
                continue  # a run that was not made
            rows.append(REFERENCE | dict(point) | {"seed": seed, "values": 288, "loss": 0.0})
            arrays[f"{lab.run_name(rows[-1])}/nats"] = np.array(nats, np.float32)
            arrays[f"{lab.run_name(rows[-1])}/bytes"] = B
            arrays[f"{lab.run_name(rows[-1])}/work"] = np.array([0, 0, 1, 1])
    lab.write_csv(folder / "results.csv", rows)
    np.savez_compressed(folder / "windows.npz", **arrays)


def point(**changes):
    return tuple(changes.items())


def test_a_difference_that_is_the_same_everywhere_has_an_interval_of_no_width(tmp_path):
    """Base and points are the reference's own seeds plus c nats a byte: every seed finds c, if it is paired."""
    seeds = [W, 2 * W, W + B]
    points = BASE | {
        point(): seeds,
        point(sites="v"): [nats + 0.5 * B for nats in seeds],
        point(sites="k"): [nats + 2 * B for nats in seeds],
        point(lr=0.3): [W - 0.25 * B],  # seed 1 only, so the reference's seed 1 only
        point(lr=0.5): [None, W],  # of a command that was stopped: nothing to compare with yet
    }
    write_folder(tmp_path, points)
    summary = ablate.summarize(tmp_path)
    assert list(summary) == [("sites",), ("lr",)]
    base, *found = summary["sites",]
    assert [record["sites"] for record in (base, *found)] == ["none", "k", "v", "k,v,ff"]
    mean = np.mean([[nats[:2].sum() / 50, nats[2:].sum() / 50] for nats in seeds])
    assert [record["loss"] for record in found] == pytest.approx([mean + 2, mean + 0.5, mean])
    for record, c in zip(found, (2, 0.5, 0), strict=True):
        assert record["difference"] == pytest.approx([c] * 3, abs=1e-12) and record["seeds"] == 3
        assert record["by_work"] == pytest.approx([c, c], abs=1e-12)
    base, reference, higher = summary["lr",]
    assert (reference["loss"], reference["seeds"]) == (pytest.approx((12 / 50 + 7 / 50) / 2), 1)
    assert higher["difference"][0] == pytest.approx(-0.25) and math.isnan(higher["difference"][1])
    text = ablate.tables(tmp_path)
    assert "| the base | 288 | 3.1900 | +3.0000 |  | +3.0000, +3.0000 |" in text  # one seed: no interval
    assert "| 0.3 | 288 | -0.0600 | -0.2500 |  | -0.2500, -0.2500 |" in text
    assert "| v | 288 | 1.0867 | +0.5000 | +0.5000 to +0.5000 | +0.5000, +0.5000 |" in text
    assert text.count("| reference |  |  |") == 2
    assert "text/val (one, two), 3 seeds; layers all; learning rate 0.1" in text


def test_a_difference_within_the_seeds_noise_is_not_called_one(tmp_path):
    """Two seeds of which one gains what the other loses; and works that differ do not make an interval wider."""
    swing = B * [1, 1, 2, 2]
    write_folder(tmp_path, BASE | {point(): [W, W], point(lr=0.3): [W + swing, W - swing]})
    _, _, record = ablate.summarize(tmp_path)["lr",]
    half = 12.7062 * np.std([1.5, -1.5], ddof=1) / math.sqrt(2)
    assert record["difference"] == pytest.approx((0, -half, half), abs=1e-6)
    assert ablate.tables(tmp_path).count("not distinguished") == 1
    write_folder(tmp_path, BASE | {point(): [W, W], point(lr=0.3): [W + swing, W + swing]})
    _, _, record = ablate.summarize(tmp_path)["lr",]
    assert record["difference"] == pytest.approx((1.5, 1.5, 1.5)) and record["by_work"] == pytest.approx([1, 2])


@pytest.mark.parametrize("which", ["one of two seeds", "all", "reference"])
def test_what_diverged_is_said_and_breaks_nothing(tmp_path, which):
    gone = np.full(4, np.inf)
    higher = {"one of two seeds": [W, gone], "all": [gone, gone], "reference": [W, W]}[which]
    write_folder(tmp_path, BASE | {point(): [gone if which == "reference" else W] * 2, point(lr=0.3): higher})
    text = ablate.tables(tmp_path)
    name = {"one of two seeds": "0.3 | 288 | diverged, 1 of 2 |  |  |", "all": "0.3 | 288 | diverged, 2 of 2 |  |  |"}
    assert name.get(which, "0.1 | 288 | diverged, 2 of 2 | reference |  |") in text
    assert "nan" not in text and "inf" not in text
    for axes, records in ablate.summarize(tmp_path).items():
        ablate.draw(axes, records, tmp_path / "a.png")
        assert ablate.plt.imread(tmp_path / "a.png")[..., :3].std() > 0.05


def test_crossed_axes_have_one_table(tmp_path):
    grid = {point(lr=lr, steps=steps): [W + lr * B] for lr in (0.1, 0.3) for steps in (4, 8)}
    write_folder(tmp_path, BASE | grid, crossed=True)
    summary = ablate.summarize(tmp_path)
    assert list(summary) == [("lr", "steps")]
    assert [(r["lr"], r["steps"]) for r in summary["lr", "steps"][1:]] == [(0.1, 4), (0.1, 8), (0.3, 4), (0.3, 8)]
    assert "| the base |  | 288 |" in ablate.tables(tmp_path) and "| 0.3 | 8 | 288 |" in ablate.tables(tmp_path)


def test_an_ablation_is_train_pys_run_and_goes_on(texts, capsys):
    out = texts / "run"
    command = f"--base {texts}/base.pt --data {texts}/a --ref-steps 4 --device cpu --out {out} --lr 0.3"
    command = [*command.split(), "--depth", "0", "--seeds", "1"]
    assert ablate.main(command) == 0
    told = capsys.readouterr().out
    names = ["about.json", "depth.png", "lr.png", "results.csv", "table.md", "windows.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
    rows, table = lab.read_csv(out / "results.csv", ablate.RUNS), (out / "table.md").read_text()
    assert len(rows) == 4 and table == ablate.tables(out) + "\n" and table in told and "| layer 0 | 96 |" in table

    # the reference's run by the core alone; float32 sums in another order: 1e-6 of a few nats
    torch.set_num_threads(1)
    model = common.load(texts / "base.pt")
    attach(model)
    data = lab.load_data(f"{texts}/a", model, ("train", "val"))
    config = TrainConfig(lr=0.1, steps=4, seed=1, batch_size=16, eval_interval=4, eval_windows=1)
    train(model, data, config)
    expected = evaluate(model, data["val"], config) * data["val"].n_tokens / data["val"].n_bytes
    capsys.readouterr()
    by_name = {lab.run_name(row): row for row in rows}
    assert by_name["k,v,ff_all_0.1_4_1"]["loss"] == pytest.approx(expected, rel=1e-6)

    lab.write_csv(out / "results.csv", rows[:2] + rows[3:])  # as if stopped before the third
    assert ablate.main(command) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("1/1 ")  # behind the plan
    assert {lab.run_name(row): row for row in lab.read_csv(out / "results.csv", ablate.RUNS)} == by_name  # to the bit
    (texts / "a/val.txt").write_text((texts / "a/val.txt").read_text()[:-1] + "!")  # other data of the same name
    assert ablate.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another --out" in err


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(texts, handler):
    command = [sys.executable, "-m", "experiments.ablate", *f"--base {texts}/base.pt --data {texts}/a".split()]
    command += f"--device cpu --sites k v --ref-steps 400 --seeds 3 --out {texts}/run".split()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        assert process.stdout.readline().startswith("10 runs, ")
        assert process.stdout.readline().startswith("1/")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers as well
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ablate.py: stopped; the same command goes on from here\n")
    rows, arrays = lab.read_runs(texts / "run", ablate.RUNS)
    assert 1 <= len(rows) == len(arrays) < 10


# --- bench ---

CPU = torch.device("cpu")
L, H, C, V, TOKENS = 3, 2, 16, 61, 8
CONFIG = GPTConfig(TOKENS, V, L, H, C)
LLAMA_CONFIG = LlamaConfig(TOKENS, V, L, 4, 2, C, 40, 1e5, 1e-5, tied=True)
TWO = (bench.OURS, bench.FULL)
PEFTS_IA3 = [name for name in bench.TRAINING if name.startswith("PEFT (IA)³")]


def make(name, dtype=torch.float32, base=None, config=CONFIG):
    """A contestant's model and loss; its frozen or trained base holds the weights of base, one of ours, if given."""
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
    monkeypatch.setitem(bench.SHAPES, "tiny", lambda block_size: CONFIG)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(bench.WORK[device], "tiny", (3, TOKENS, 2))


@pytest.mark.parametrize("name", bench.TRAINING)
def test_every_contestant_starts_from_the_same_loss_and_trains_what_it_should(name, batch):
    base = make_gpt(block_size=TOKENS, vocab_size=V, n_layer=L, n_head=H, n_embd=C).double()
    model, loss_fn = make(name, torch.float64, base)
    loss = loss_fn(model, *batch)
    # ones as vectors and zeros as LoRA's second matrix change nothing
    assert abs(loss.item() - base(*batch)[1].item()) <= tolerance(name)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    if "(IA)³" in name:
        assert all("ia3" in key for key in names)
    count = {bench.FULL: sum(p.numel() for p in base.parameters()), bench.OURS: 6 * L * C}.get(name, 7 * L * C)
    if "LoRA" in name:
        count = L * 4 * (C + 3 * C)  # r times what c_attn reads and writes
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("name", bench.TRAINING_LLAMA)
def test_every_contestant_of_a_llamas_shape_too(name, batch):
    base = bench.our_model(LLAMA_CONFIG).double()
    model, loss_fn = make(name, torch.float64, base, LLAMA_CONFIG)
    # transformers takes the RMSNorms, the angles and its loss in float32
    assert abs(loss_fn(model, *batch).item() - base(*batch)[1].item()) <= (8 * 5 * 2**-24 if "PEFT" in name else 0)
    count = {bench.FULL: sum(p.numel() for p in base.parameters()), "PEFT LoRA": L * 4 * (C + C + C + C // 2)}
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


@pytest.mark.parametrize("name", bench.TRAINING[:5])
def test_flops_of_a_step(name, batch):
    """Full: two FLOPs an entry forward, two for the input's gradient, two for the weight's. A frozen base has no weight
    gradients, and its first c_attn reads what nothing trained has touched. Attention: two products of T × C forward,
    four backward; ours leaves out the gradient of the first layer's queries.
    """
    model, loss_fn = make(name)
    counts = lab.count_step(model, batch, loss_fn, TrainConfig(lr=0.1))
    full = name == bench.FULL
    assert counts["linear_flops"] == (6 * matrices(CONFIG) if full else 4 * matrices(CONFIG) - 2 * 3 * C**2)
    assert counts["attention_flops"] == 12 * L * TOKENS * C - (2 * TOKENS * C if name == bench.OURS else 0)
    linear, attention = lab.count_flops(lambda: loss_fn(model, *batch).backward())  # all rows, where lab counts one
    per_token = counts["linear_flops"], counts["attention_flops"]
    assert (linear, attention) == (3 * TOKENS * per_token[0], 3 * TOKENS * per_token[1])


def test_vectors_and_their_merge_add_no_flops_to_a_forward_pass(batch):
    counts = [bench.reader(name, CONFIG, batch, torch.float32, False)[name][1] for name in bench.INFERENCE]
    assert counts[0]["linear_flops"] == 2 * matrices(CONFIG) and counts[0]["attention_flops"] == 4 * L * TOKENS * C
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
        model, loss_fn = make(name, config=GPTConfig(TOKENS, V, n_layer, H, C))
        total.append(lab.count_saved(partial(loss_fn, model, *batch), model))
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

    assert lab.count_saved(forward, nn.Module()) == 12
    assert made[0]() is None


def test_a_training_step_is_forward_backward_adamw(batch):
    """Three steps of lab's against the same by hand: bit for bit."""
    config = TrainConfig(lr=0.1)
    one, other = (make_method("ia3", block_size=TOKENS, vocab_size=V) for _ in range(2))
    step = lab.training_step(one, batch, lambda model, x, y: model(x, y)[1], config)
    optimizer = torch.optim.AdamW(other.ia3.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        step()
        other(*batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.ia3.l_k, make_method("ia3", block_size=TOKENS, vocab_size=V).ia3.l_k)


def test_ratios_point_where_the_table_says(tiny, monkeypatch):
    """Over what has no vectors; and ours over the contestant."""
    took = {bench.FULL: 8.0, bench.OURS: 2.0, bench.BASE: 1.0, bench.UNMERGED: 5.0, bench.ONE_TASK: 2.0}

    def times(calls, *_):
        return {name: [took.get(name, 4.0)] * 3 for name in calls}

    monkeypatch.setattr(lab, "interleave", times)
    found = [bench.measure("tiny", what, 3, CPU, torch.float32, False) for what in bench.CONTESTS]
    rows = {row["contestant"]: row for rows in found for row in rows}
    assert rows.keys() > {*bench.TRAINING, *bench.INFERENCE}
    assert [rows[bench.OURS][key] for key in ("over_plain", "ours_over")] == [0.25, 1]
    assert [rows[bench.AROUND_OURS][key] for key in ("over_plain", "ours_over")] == [0.5, 0.5]
    assert [rows[bench.MERGED][key] for key in ("over_plain", "ours_over")] == [4, 1.25]
    assert rows["16 tasks, mixed"]["over_plain"] == 2
    assert rows[bench.FULL]["tokens_per_second"] == 3 * TOKENS / 8


def test_a_llamas_shape_has_contestants_of_its_own(tiny, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", lambda block_size: LLAMA_CONFIG)
    found = [bench.measure("tiny", what, 2, CPU, torch.float32, False) for what in bench.CONTESTS]
    names = [row["contestant"] for rows in found for row in rows]
    assert names[:8] == [*bench.TRAINING_LLAMA, *bench.INFERENCE] and len(names) == 13


def test_what_is_raced_is_what_its_name_says(batch):
    """The merged is merged, with vectors that are not ones; a mixed batch has the rows of each task by itself."""
    base, unmerged, merged = (
        bench.reader(name, CONFIG, batch, torch.float32, False)[name][0].args[0] for name in bench.INFERENCE
    )
    assert base.ia3 is None and merged.ia3 is None
    assert all((p - 1).abs().max() > 0.1 for p in unmerged.ia3.parameters())
    calls = {name: call for name, (call, _) in bench.mixers(CONFIG, CPU, torch.float32).items()}
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
    rows = lab.read_csv(tmp_path / "results.csv", bench.RESULTS)
    assert [row["contestant"] for row in rows[:10]] == [*bench.TRAINING, *bench.INFERENCE] and len(rows) == 15
    for row in rows:
        assert (row["peak_bytes"] is not None) == (device == "cuda" and row["what"] != "mixed")
        assert 0 < row["over_plain_low"] <= row["over_plain"] <= row["over_plain_high"]
    text = bench.tables(tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text + "\n"
    assert text in capsys.readouterr().out
    before = (tmp_path / "results.csv").read_bytes()
    assert bench.main(command(tmp_path, device=device)) == 0  # nothing is measured again
    assert (tmp_path / "results.csv").read_bytes() == before
    assert capsys.readouterr().out == text + "\n"
    lab.write_csv(tmp_path / "results.csv", [row for row in rows if row["what"] != "training"])  # it was stopped there
    assert bench.main(command(tmp_path, device=device)) == 0
    assert capsys.readouterr().out.count(": 2 rounds\n") == 1
    again = lab.read_csv(tmp_path / "results.csv", bench.RESULTS)
    assert [row["contestant"] for row in again] == [row["contestant"] for row in rows]
    assert again[len(bench.TRAINING) :] == rows[len(bench.TRAINING) :] and again[1] != rows[1]
    assert bench.main(command(tmp_path, "--repeats", "3", device=device)) == 2
    assert "holds runs with repeats 2, not 3" in capsys.readouterr().err

    # the cells, from numbers that are easy; bytes of GPU memory bring two columns more
    unit = 4 * 3 * TOKENS * L * C  # bytes of an n_embd-float, every token and layer
    full = {"linear_flops": 900, "attention_flops": 100, "saved_bytes": 20 * unit}
    ours = {"linear_flops": 540, "attention_flops": 80, "saved_bytes": 15 * unit}
    for row, counted, time in zip(rows[:2], (full, ours), (1.0, 0.75), strict=True):
        row |= {"peak_bytes": None} | counted | dict.fromkeys(("over_plain", "over_plain_low", "over_plain_high"), time)
        row |= {"ours_over": 0.75 / time, "ours_over_low": 0.5, "ours_over_high": 1.5, "tokens_per_second": 123456.7}
    line = "| (IA)³ | 0.75 (0.75 to 0.75) | 0.600 | 0.620 | 1.21 | 15.0 | 1.00 (0.50 to 1.50) |"
    assert bench.table(rows[:2]).splitlines()[-1] == line
    for row in rows[:2]:
        row["peak_bytes"] = 3 * 2**29
    assert bench.table(rows[:2]).splitlines()[-1] == f"{line} 123,457 | 1.50 |"


# --- the small tables ---


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
    rows = lab.read_csv(tmp_path / "quick/results.csv", generation.COLUMNS)
    assert [(row["rows"], row["contestant"]) for row in rows] == [
        (n, name) for n in (1, 8) for name in (generation.THEIRS, generation.OURS, generation.MERGED)
    ]
    model = make_gpt()
    everything = sum(p.numel() for p in model.parameters())
    assert generation.weight_bytes(model) == 4 * (everything - model.transformer.wpe.weight.numel())
    before = (tmp_path / "quick/results.csv").read_bytes()
    assert generation.main(["--quick", "--out", str(tmp_path)]) == 0  # nothing is left to measure
    assert (tmp_path / "quick/results.csv").read_bytes() == before


# --- mistakes ---


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (compare, "--base nothing.pt", "nothing.pt"),
        (compare, "--data nothing", "no data called 'nothing'"),
        (compare, "--data x/a y/a", "have the same name"),
        (compare, "--workers 0", "workers must be at least 1, not 0"),
        (ablate, "--depth 6", "depth must be all, first-half, second-half, or a layer from 0 to 5, not 6"),
        (ablate, "--depth top", "not top"),
        (ablate, "--lr 0.1 0", "lr must be from 1e-12 to 1000, not 0"),
        (ablate, "--steps 0", "steps must be"),
        (ablate, "--sites ff,v,k", "nothing to compare"),
        (ablate, "--seeds 0", "seeds must be at least 1"),
        (ablate, "--seeds 11", "seeds must be at most 10"),
        (ablate, "--cross --lr", "cross wants two axes"),
        (ablate, "--data nowhere", "no data called 'nowhere'"),
        (bench, "--shape 1.5B --device cpu", "is for a GPU"),
        (bench, "--repeats 1", "at least 2"),
    ],
)
def test_mistakes_are_told_in_one_line(script, flags, message, tmp_path, capsys):
    assert script.main([*flags.split(), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    name = script.__name__.split(".")[-1]
    assert err.startswith(f"{name}.py: ") and err.count("\n") == 1 and message in err and not out
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("name", ["peft", "transformers"])
def test_without_peft_or_transformers(tiny, name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert bench.main(command(tmp_path / "new")) == 2
    err = capsys.readouterr().err
    assert f"no {name} here" in err and "requirements-dev.txt" in err and not (tmp_path / "new").exists()
