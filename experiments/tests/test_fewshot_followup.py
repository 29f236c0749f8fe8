"""The two later questions, on a tiny random Llama and made sentences: no test says who wins."""

from dataclasses import replace

import numpy as np
from here import Here
from test_fewshot import write_sets

import common
from conftest import make_llama
from experiments import fewshot_followup, lab, peers, rivals, shots
from ia3 import IA3


def test_lora_has_as_many_values_as_ia3():
    """LoRA r = 1 on q and v: 2·n_embd and n_embd + n_kv_head·d_head. In SmolLM2's shape both methods have 57,600."""
    for model in (make_llama(), peers.our_model(peers.SHAPES["SmolLM2"](block_size=8))):
        rivals.attach(model, shots.ADD["lora1"])
        config = model.config
        n_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert n_values == config.n_layer * (3 * config.n_embd + config.widths[1])
    assert n_values == IA3(config).count() == 57_600


def test_the_draws_of_all_methods_are_compared_and_no_others():
    settings = shots.Settings(seeds=fewshot_followup.SEEDS)
    rates = {"ia3": 1e-2, "lora1": 1e-2, "full": 3e-5}
    runs = fewshot_followup.runs_of_draws(settings, rates)
    assert len(set(runs)) == len(runs) == 60 and {run.split for run in runs} == {"test"}
    arrays = {"beta": np.zeros((3, 4, 2)), "labels": np.zeros(4)}
    found = dict.fromkeys(runs[:11], arrays)  # draw 0 of both tasks, draw 1 of movies, two methods of news
    whole = fewshot_followup.whole_draws(found, runs)
    assert whole.keys() == {"movies", "news"} and whole["movies"].keys() == whole["news"].keys() == rates.keys()
    assert all(of_seed.keys() == {0, 1} for of_seed in whole["movies"].values())
    assert all(of_seed.keys() == {0} for of_seed in whole["news"].values())


def test_products_choose_the_best_mean_and_the_first_of_equals():
    tried = {"ia3": {1e-3: [0.5, 0.9], 3e-3: [0.8, 0.6], 1e-2: [0.6, 0.6]}, "full": {1e-5: [0.1], 3e-5: [0.2]}}
    assert fewshot_followup.choose(tried) == {"ia3": 1e-3, "full": 3e-5}


def test_the_whole_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    common.save(make_llama(block_size=4096), tmp_path / "base.pt")
    write_sets(tmp_path / "data", n_train=40)
    flags = [f"--base={tmp_path}/base.pt", f"--data={tmp_path}/data", f"--out={tmp_path}/out", "--dtype=float32"]
    out = tmp_path / "out/quick"

    def stage(name):
        status = fewshot_followup.main([*flags, "--quick", "--stage", name])
        return status, *capsys.readouterr()

    out.mkdir(parents=True)
    (out / "about.json").write_text("{}")  # of another command
    status, _, err = stage("report")
    assert status == 2 and err.count("\n") == 1
    (out / "about.json").unlink()
    status, _, err = stage("runs")
    assert status == 2 and "--stage rates" in err
    assert stage("sites")[0] == 0
    status, text, _ = stage("report")
    assert status == 0 and "| q,o,pre |" in text and "at their best" not in text
    assert stage("rates")[0] == 0 and stage("runs")[0] == 0
    assert "all runs are done" in stage("runs")[1]
    status, text, _ = stage("report")
    assert status == 0 and text.strip() == (out / "table.md").read_text().strip()
    assert (out / "draws.png").stat().st_size > 1000
    results, _ = lab.load_runs(out, shots.Run, shots.Result)
    assert len(results) == 5 + 12 + 3  # of sites, rates and draws


def test_the_committed_table_is_made_of_the_committed_runs():
    folder = lab.RESULTS / "fewshot-followup"
    about, runs_made = fewshot_followup.read_folder(folder)
    settings = replace(shots.Settings(), seeds=fewshot_followup.SEEDS)
    text, _ = fewshot_followup.tables(runs_made, settings, about["values"])
    assert (folder / "table.md").read_text(encoding="utf-8") == text + "\n"
