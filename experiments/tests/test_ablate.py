"""ablate.py: which layers learn, what is compared with what, and its command whole on a tiny base."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from here import Here

import common
from conftest import make_gpt, write_run
from experiments import ablate, lab
from experiments.ablate import Job, Result
from ia3 import attach, fingerprint
from train import TrainConfig, evaluate, train

REFERENCE = Job("k,v,ff", "all", 0.1, 4)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)


@pytest.fixture
def folder(tmp_path):
    """base.pt, a random GPT of three layers, and text/."""
    return write_run(tmp_path, make_gpt(n_layer=3))[0]


# --- what is trained ---


@pytest.mark.parametrize("n_layer", range(2, 8))
def test_two_halves_make_the_whole(n_layer):
    halves = [ablate.layers(half, n_layer) for half in ("first-half", "second-half")]
    assert halves[0] + halves[1] == ablate.layers("all", n_layer) == list(range(n_layer))
    assert 0 <= len(halves[1]) - len(halves[0]) <= 1
    assert [ablate.layers(str(i), n_layer) for i in range(n_layer)] == [[i] for i in range(n_layer)]
    for depth in ("01", str(n_layer), "-1"):  # "01" would be layer 1 a second time, with a row of its own
        with pytest.raises(ValueError, match="depth must be"):
            ablate.layers(depth, n_layer)


@pytest.mark.parametrize("sites, depth", [("k,v,ff", "first-half"), ("ff", "2"), ("k,v", "second-half"), ("v", "all")])
def test_only_the_chosen_layers_learn_and_the_others_stay_exactly_one(folder, device, sites, depth):
    model = common.load(folder / "base.pt").to(device)
    vectors = attach(model, sites=sites.split(","))
    chosen = ablate.layers(depth, 3)
    values = ablate.hold(vectors, chosen)
    data = lab.load_data(folder / "text", model, ("train", "val"))
    train(model, data, TrainConfig(lr=0.1, steps=5, eval_interval=5, batch_size=4))
    moved = 0
    for p in vectors.parameters():
        assert (p[[i for i in range(3) if i not in chosen]] == 1).all()
        moved += (p != 1).sum().item()
    # n_embd 16: l_k and l_v have 16 values a layer, l_ff 64; a trained one that is 1 in float32 again would be a marvel
    assert values == moved == len(chosen) * sum({"k": 16, "v": 16, "ff": 64}[site] for site in sites.split(","))


def test_every_run_is_there_once():
    depths = ["all", "first-half", "second-half", *map(str, range(6))]
    axes = {"sites": ablate.SUBSETS, "depth": depths} | ablate.DEFAULTS
    jobs = ablate.all_jobs(axes, REFERENCE._replace(steps=100), 3, False)
    # the base; three seeds of six subsets, eight depths, the reference, and the others' values but the reference's
    assert len(jobs) == len(set(jobs)) == 1 + 3 * (6 + 8 + 1 + 4 + 4)
    crossed = ablate.all_jobs({"lr": [0.3, 0.5], "steps": [8]}, REFERENCE, 1, True)
    assert [(job.lr, job.steps) for job in crossed[1:]] == [(a, b) for a in (0.3, 0.5, 0.1) for b in (8, 4)]
    assert ablate.in_order("ff,k") == "k,ff" and ablate.in_order("x,v,q") == "q,v,x"


def test_a_run_that_diverges_is_a_run_like_any_other(folder, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(ablate, "train", diverge)
    settings = {"base": folder / "base.pt", "data": folder / "text", "device": "cpu"}
    result, arrays = ablate.measure(settings, Job("k,o", "all", 1.0, 20, 1))
    assert result == Result(2 * 16 * 3, math.inf) and np.isinf(arrays["nats"]).all()


# --- what is compared, by folders made by hand ---

B = np.array([30.0, 20.0, 25.0, 25.0])  # bytes of the four blocks, two a work
W = np.array([4.0, 8.0, 1.0, 6.0])  # nats of the reference's seeds
BASE = {REFERENCE._replace(sites="none"): [W + 3 * B]}


def write_folder(folder, points, crossed=False):
    """A folder of results made by hand. points: {Job of seed 0: [nats a seed, None: not made]}."""
    about = {"data": "text", "works": ["one", "two"], "block_size": 16, "crossed": crossed}
    about["reference"] = {axis: getattr(REFERENCE, axis) for axis in ablate.AXES}
    (folder / "about.json").write_text(json.dumps(about))
    results = {}
    arrays = {}
    for point, seeds in points.items():
        for seed, nats in enumerate(seeds, 1):
            if nats is not None:
                job = point._replace(seed=seed)
                results[job] = Result(288, 0.0)
                arrays[job] = {"nats": np.array(nats), "bytes": B, "work": np.array([0, 0, 1, 1])}
    lab.write_runs(folder, results, arrays)


def point(**changes):
    return REFERENCE._replace(**changes)


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
    assert base.point is None and [record.point.sites for record in found] == ["k", "v", "k,v,ff"]
    mean = np.mean([[nats[:2].sum() / 50, nats[2:].sum() / 50] for nats in seeds])
    assert [record.loss for record in found] == pytest.approx([mean + 2, mean + 0.5, mean])
    for record, c in zip(found, (2, 0.5, 0), strict=True):
        assert record.difference == pytest.approx([c] * 3, abs=1e-6) and record.n_seeds == 3  # kept in float32
        assert record.by_work == pytest.approx([c, c], abs=1e-6)
    base, reference, higher = summary["lr",]
    assert (reference.loss, reference.n_seeds) == (pytest.approx((12 / 50 + 7 / 50) / 2), 1)
    assert higher.difference[0] == pytest.approx(-0.25) and math.isnan(higher.difference[1])
    text = ablate.tables(tmp_path)
    assert "| the base | 0 | 3.1900 | +3.0000 |  | +3.0000, +3.0000 |" in text  # one seed: no interval
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
    assert record.difference == pytest.approx((0, -half, half), abs=1e-6)
    assert ablate.tables(tmp_path).count("not distinguished") == 1
    write_folder(tmp_path, BASE | {point(): [W, W], point(lr=0.3): [W + swing, W + swing]})
    _, _, record = ablate.summarize(tmp_path)["lr",]
    assert record.difference == pytest.approx((1.5, 1.5, 1.5)) and record.by_work == pytest.approx([1, 2])


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
        ablate.draw_picture(axes, records, tmp_path / "a.png")
        assert ablate.plt.imread(tmp_path / "a.png")[..., :3].std() > 0.05


def test_crossed_axes_have_one_table(tmp_path):
    grid = {point(lr=lr, steps=steps): [W + lr * B] for lr in (0.1, 0.3) for steps in (4, 8)}
    write_folder(tmp_path, BASE | grid, crossed=True)
    summary = ablate.summarize(tmp_path)
    assert list(summary) == [("lr", "steps")]
    assert [(r.point.lr, r.point.steps) for r in summary["lr", "steps"][1:]] == [(0.1, 4), (0.1, 8), (0.3, 4), (0.3, 8)]
    assert "| the base |  | 0 |" in ablate.tables(tmp_path) and "| 0.3 | 8 | 288 |" in ablate.tables(tmp_path)


# --- the command ---


def test_an_ablation_is_train_pys_run_and_goes_on(folder, capsys):
    out = folder / "run"
    command = f"--base {folder}/base.pt --data {folder}/text --ref-steps 4 --device cpu --out {out} --lr 0.3"
    command = [*command.split(), "--depth", "0", "--seeds", "1"]
    assert ablate.main(command) == 0
    told = capsys.readouterr().out
    names = ["about.json", "depth.png", "lr.png", "results.csv", "run.json", "table.md", "windows.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
    table = (out / "table.md").read_text()
    assert table == ablate.tables(out) + "\n" and table in told and "| layer 0 | 96 |" in table

    # the reference's run by the core alone; float32 sums in another order: 1e-6 of a few nats
    torch.set_num_threads(1)
    model = common.load(folder / "base.pt")
    attach(model)
    data = lab.load_data(folder / "text", model, ("train", "val"))
    config = TrainConfig(lr=0.1, steps=4, seed=1, batch_size=16, eval_interval=4, eval_windows=1)
    train(model, data, config)
    expected = evaluate(model, data["val"], config) * data["val"].n_tokens / data["val"].n_bytes
    capsys.readouterr()
    results, _ = lab.load_runs(out, Job, Result)
    loss = results[REFERENCE._replace(seed=1)].loss
    assert len(results) == 4 and loss == pytest.approx(expected, rel=1e-6)
    about = json.loads((out / "run.json").read_text())
    assert about["arguments"]["depth"] == ["0"] and about["arguments"]["seeds"] == 1
    assert about["fingerprint"] == fingerprint(model) and about["figures"]["k,v,ff_all_0.1_4_1"]["loss"] == loss

    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(lines[:3] + lines[4:]))  # as if stopped before the third
    assert ablate.main(command) == 0
    assert capsys.readouterr().out.startswith("1 runs are left")
    assert lab.load_runs(out, Job, Result)[0] == results  # to the bit
    assert json.loads((out / "run.json").read_text()) == about
    with open(folder / "text/val.txt", "a") as f:  # other data of the same name
        f.write("!")
    assert ablate.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data_hash" in err


def test_a_step_is_timed_where_the_runs_are_made(folder, monkeypatch):
    seen = []

    def pace(model, split, config):
        seen.append(model.lm_head.weight.device.type)
        return 1.0, 1.0

    monkeypatch.setattr(ablate.clocks, "pace", pace)
    monkeypatch.setattr(common, "pick_device", lambda device: torch.device("meta"))
    assert ablate.main(f"--plan --base {folder}/base.pt --data {folder}/text --sites v".split()) == 0
    assert seen == ["meta"]


def test_quick(folder, capsys):
    command = f"--quick --base {folder}/base.pt --data {folder}/text --device cpu --sites q,v,x --out {folder}/out"
    assert ablate.main(command.split()) == 0
    table = (folder / "out/quick/table.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out and "nan" not in table and "| q,v,x | 144 |" in table


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(folder, handler):
    command = [sys.executable, "-m", "experiments.ablate", "--base", f"{folder}/base.pt", "--data", f"{folder}/text"]
    command += f"--device cpu --sites k v --ref-steps 400 --seeds 3 --workers 1 --out {folder}/run".split()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=lab.ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline().startswith("10 runs ")
        assert process.stdout.readline().startswith("1/")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers as well
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("ablate.py: ") and err.count("\n") == 1
    results, arrays = lab.load_runs(folder / "run", Job, Result)
    assert 1 <= len(results) == len(arrays) < 10


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--depth 6", "from 0 to 5, not 6"),
        ("--depth top", "not top"),
        ("--lr 0.1 0", "not 0"),
        ("--steps 0", "steps must be"),
        ("--sites ff,v,k", "nothing to compare"),
        ("--seeds 0", "not 0"),
        ("--seeds 11", "not 11"),
        ("--cross --lr", "cross"),
        ("--data nowhere", "no data called 'nowhere'"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, message, tmp_path, capsys):
    assert ablate.main([*flags.split(), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ablate.py: ") and err.count("\n") == 1 and message in err and not out
    assert not list(tmp_path.rglob("*.csv"))
