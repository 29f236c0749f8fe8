"""(IA)³'s rivals, each held to its paper, and the comparison, run whole on a tiny base."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_gpt, make_idx
from torch import nn

from experiments import compare
from experiments.methods import METHODS, Adapter
from experiments.runs import read_csv, write_csv
from experiments.windows import bootstrap, interval, window_losses
from train import TrainConfig, evaluate

TRAINED = [name for name in METHODS if name != "base"]


def make_method(name, seed=0, moved=True, **sizes):
    """The tiny GPT with a method attached; moved: what it trains, pushed off its start."""
    model = make_gpt(**sizes)
    torch.manual_seed(seed)
    METHODS[name].attach(model)
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if moved and p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=dice))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- the rivals ---


@pytest.mark.parametrize("sizes", [{}, {"n_layer": 3, "n_embd": 24, "vocab_size": 300, "block_size": 20}])
@pytest.mark.parametrize("name", METHODS)
def test_each_trains_as_many_values_as_its_formula_says(name, sizes):
    model = make_method(name, **sizes)
    assert sum(p.numel() for p in trained(model).values()) == METHODS[name].count(model.config)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prefix"])
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
        assert name in ("adapters", "prefix")
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


def test_bitfit_trains_biases_and_nothing_else():
    model = make_method("bitfit")
    assert {name.split(".")[-1] for name in trained(model)} == {"bias"}
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias"))


def test_layernorm_tuning_trains_every_layernorm_and_nothing_else():
    model = make_method("layernorm")
    norms = {
        f"{name}.{what}"
        for name, m in model.named_modules()
        if isinstance(m, nn.LayerNorm)
        for what in ("weight", "bias")
    }
    assert trained(model).keys() == norms and len(norms) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize("name, r, targets", [("lora1", 1, "kv"), ("lora4", 4, "qv")])
def test_lora_changes_its_targets_by_a_matrix_of_rank_r(name, r, targets):
    base, merged = make_gpt(), METHODS[name].merge(make_method(name))
    changed = {key for key, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[key])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    for ours, theirs in zip(merged.transformer.h, base.transformer.h, strict=True):
        change = (ours.attn.c_attn.weight - theirs.attn.c_attn.weight).double().chunk(3)
        for target, matrix in zip("qkv", change, strict=True):
            # float32's rounding of the sum leaves singular values of some 1e-7
            rank = torch.linalg.matrix_rank(matrix, atol=1e-5).item()
            assert rank == (r if target in targets else 0)


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


def test_an_adapter_is_its_formula():
    adapter = Adapter(5, 3).double()
    h = torch.randn(2, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    u = h @ adapter.down.weight.T + adapter.down.bias
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    expected = h + gelu @ adapter.up.weight.T + adapter.up.bias
    assert (adapter(h) - expected).abs().max() <= 1e-13


def test_adapters_stand_behind_both_projections_and_nowhere_else():
    model = make_method("adapters")
    places = [name for name, m in model.named_modules() if isinstance(m, Adapter)]
    assert places == [f"transformer.h.{i}.{sub}.c_proj.1" for i in range(2) for sub in ("attn", "mlp")]


def test_a_fresh_prefix_is_the_text_whose_keys_and_values_it_holds():
    """Without positions, the base that has read the prefix's text and the base with the prefix predict the same."""
    base = make_gpt().double()
    nn.init.zeros_(base.transformer.wpe.weight)
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    METHODS["prefix"].attach(model)
    torch.manual_seed(0)
    text = base.generate(torch.zeros(1, 1, dtype=torch.long), 8)[:, 1:]
    idx = make_idx(base)[:, :8]
    expected = base(torch.cat((text.expand(3, -1), idx), 1))[0][:, 8:]
    assert (model(idx)[0] - expected).abs().max() <= 1e-11
    assert model.transformer.h[0].attn.keys.shape == (8, 16)


def test_a_prefix_lets_no_position_see_the_future():
    model = make_method("prefix")
    idx = make_idx(model)
    other = idx.clone()
    other[:, -1] = (other[:, -1] + 1) % 257
    assert torch.equal(model(idx)[0][:, :-1], model(other)[0][:, :-1])


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_learns_under_the_projects_own_loop(name, tiny_run):
    folder, _ = tiny_run
    settings = compare.Settings(str(folder / "base.pt"), "", "cpu", "float32", folder)
    model = compare.load_model(settings, name, 0)
    data = compare.load_data(str(folder / "text"), model, ("train", "val"))
    config = compare.config_of(settings, steps=15, lr=0.01, eval_interval=15)
    history = compare.train(model, data, config)
    assert history[-1]["val_loss"] < history[0]["val_loss"]


# --- windows and intervals ---


def test_window_losses_are_evaluates(tiny_run):
    folder, _ = tiny_run
    model, config = make_gpt(), TrainConfig(batch_size=4)
    val = compare.load_data(str(folder / "text"), model, ("val",))["val"]
    nats, targets = window_losses(model, val, config)
    assert len(nats) == len(val) and targets.sum() == val.n_tokens
    # float32 means of batches against sums of windows
    assert nats.sum() / targets.sum() == pytest.approx(evaluate(model, val, config), rel=1e-6)
    nats, targets = window_losses(model, val, config, 3)
    assert nats.sum() / targets.sum() == pytest.approx(evaluate(model, val, config, n_windows=3), rel=1e-6)


def test_the_bootstrap_finds_the_textbook_interval():
    """Of independent windows, the standard error of the mean: s / √n."""
    dice = np.random.default_rng(1)
    nats = dice.normal(10, 2, (1, 400))
    low, high = interval(bootstrap({"a": nats}, np.ones(400))["a"])
    error = nats.std() / math.sqrt(400)
    # a 95 % interval's ends from 2000 draws are off by some 6 % of the standard error
    assert low == pytest.approx(nats.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(nats.mean() + 1.96 * error, abs=0.25 * error)


def test_the_bootstrap_weighs_windows_by_their_targets():
    targets = np.arange(1.0, 51.0)
    assert np.allclose(bootstrap({"a": 2 * targets[None]}, targets)["a"], 2, rtol=1e-12)


def test_the_bootstrap_pairs_windows_and_seeds():
    dice = np.random.default_rng(2)
    nats = dice.normal(10, 2, (5, 50))
    draws = bootstrap({"a": nats, "b": nats + 0.5}, np.ones(50))
    assert np.ptp(draws["a"]) > 0.3 and np.allclose(draws["b"] - draws["a"], 0.5, atol=1e-12)
    one_seed = bootstrap({"a": nats[:1]}, np.ones(50))["a"].std()
    between = bootstrap({"a": np.repeat(10 * np.arange(5.0)[:, None], 50, 1)}, np.ones(50))["a"].std()
    assert between == pytest.approx(10 * math.sqrt(2) / math.sqrt(5), rel=0.1) and one_seed > 0


# --- the comparison ---


def test_rates_are_half_decades():
    assert [compare.rate(i) for i in range(-3, 3)] == [0.03, 0.1, 0.3, 1, 3, 10]


def test_a_grid_grows_while_its_edge_is_best():
    """A loss that is lowest at 1 for (IA)³, far above its published 3e-3, and at the published rate for the others."""
    seen = []

    def measure_jobs(jobs):
        seen.append(len(jobs))
        best = {name: method.lr for name, method in METHODS.items()} | {"ia3": 1.0, "full": 1e-6}
        return [job | {"loss": abs(math.log10(job["lr"] / best[job["method"]]))} for job in jobs]

    rates = compare.choose_rates(measure_jobs, "folio")
    assert rates == {name: METHODS[name].lr for name in TRAINED} | {"ia3": 1.0, "full": 1e-6}
    # 5 half-decades for 8 methods; up to 1 and one beyond, down to 1e-6 and one below
    assert seen[0] == 40 and seen[-1] == 40 + 4 + 4


@pytest.fixture
def compared(tmp_path_factory, monkeypatch):
    """The whole comparison on a tiny base: one grid point a method, two steps, two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    make_gpt().save(folder / "base.pt")
    for data in ("a", "b"):
        (folder / data).mkdir()
        for split in ("train", "val", "test"):
            (folder / data / f"{split}.txt").write_text(f"And {data} saw the light, that it was {split}. " * 10)
    monkeypatch.setattr(compare, "STEPS", 2)
    monkeypatch.setattr(compare, "SEEDS", range(1, 3))
    monkeypatch.setattr(compare, "LONG_STEPS", 4)
    monkeypatch.setattr(compare, "LONG_SEEDS", range(1, 2))
    monkeypatch.setattr(compare, "REPEATS", 2)
    rates = dict.fromkeys(TRAINED, 0.01)
    monkeypatch.setattr(compare, "choose_rates", lambda measure_jobs, data: rates)
    flags = ["--init", f"{folder}/base.pt", "--data", f"{folder}/a", f"{folder}/b", "--forget", f"{folder}/b"]
    return [*flags, "--device", "cpu", "--workers", "1", "--out", f"{folder}/out"]


def test_the_whole_comparison_and_that_it_goes_on(compared, capsys):
    out = Path(compared[-1])
    assert compare.main(compared) == 0
    rows = read_csv(out / "runs.csv")
    assert len(rows) == 2 * (1 + 8 * 2) + 3
    for name in ("table.md", "gap.png", "curves.png", "windows.npz", "curves.csv", "costs.csv"):
        assert (out / name).stat().st_size > 500
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.strip().endswith(table.strip())
    found = compare.statistics(out)
    assert found.keys() == {("a", 2), ("b", 2), ("a", 4)} and found["a", 4].keys() == {"base", "full", "lora4", "ia3"}
    for (data, steps), methods in found.items():
        assert methods["full"]["gap"] == pytest.approx((100, 100, 100)) and methods["base"]["gap"] == (0, 0, 0)
        assert methods["ia3"]["beside"] == (0, 0, 0) and methods["base"]["forgotten"] == (0, 0, 0)
        for name, values in methods.items():
            of = [row for row in rows if (Path(row["data"]).name, row["method"], row["steps"]) == (data, name, steps)]
            if of:  # windows are kept to 1/64 nat, of 16 bytes each
                mean = np.mean([row["loss"] for row in of])
                assert values["loss"][0] == pytest.approx(mean, abs=1 / 64 / 16)
                assert values["loss"][1] <= values["loss"][0] <= values["loss"][2]

    # the files alone make the table; a run that is missing is measured again, to the same bits, and no other
    write_csv(out / "runs.csv", rows[:-1])
    (out / "table.md").unlink()
    assert compare.main(compared) == 0
    assert read_csv(out / "runs.csv") == rows and (out / "table.md").read_text() == table
    assert capsys.readouterr().out.count(" min left") == 1

    write_csv(out / "runs.csv", rows)
    other = [*compared[:-1], str(out)]
    other[other.index("--forget") + 1] += "/../a"
    assert compare.main(other) == 2
    assert re.fullmatch(r"compare.py: .* holds runs with forget b, not a: another --out\n", capsys.readouterr().err)


def test_quick_is_one_seed_of_the_first_data_at_the_committed_rates(compared, monkeypatch, capsys):
    seen = []

    def measure_all(jobs, measure, path, workers):
        seen.extend(jobs)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure_all", measure_all)
    assert compare.main([*compared, "--quick"]) == 130
    assert capsys.readouterr().err == "compare.py: stopped; the same command goes on from here\n"
    assert [job["method"] for job in seen] == ["base", *TRAINED]
    rates = {row["method"]: row["lr"] for row in read_csv(compare.COMMITTED / "runs.csv") if row["stage"] == "test"}
    assert all((job["lr"], job["steps"], job["seed"]) == (rates[job["method"]], 60, 1) for job in seen[1:])
    assert {Path(job["data"]).name for job in seen} == {"a"}
    assert (Path(compared[-1]) / "quick/about.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--init nothing.pt", "nothing.pt"),
        ("--data nothing", "no data called 'nothing'"),
        ("--workers 0", "workers must be at least 1, not 0"),
        ("--device cuda:99", "device 'cuda:99' is not here"),
        ("--axis k", "unrecognized arguments: --axis k"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message, tmp_path, capsys):
    assert compare.main([*flags.split(), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("compare.py: ") and err.count("\n") == 1 and message in err and not out
    assert not list(tmp_path.rglob("*.csv"))


def test_a_rate_that_blows_up_is_a_run_like_any_other(tiny_run):
    folder, _ = tiny_run
    settings = compare.Settings(str(folder / "base.pt"), str(folder / "text"), "cpu", "float32", folder)
    row = compare.measure(settings, "lr", str(folder / "text"), "full", 1e30, 20, 0)
    assert row["loss"] == math.inf
