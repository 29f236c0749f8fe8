"""The ablation harness: what a run trains, which runs there are, how they are compared, drawn and gone on with."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_gpt

import data as datasets
from experiments import ablate
from experiments.runs import read_csv, write_csv
from ia3 import attach
from train import TrainConfig, build, evaluate, train

REFERENCE = {"targets": "k,v,ff", "depth": "all", "lr": 0.1, "steps": 4, "data_size": 1.0, "noise": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with base.pt, a random GPT of three layers, and text/{train,val}.txt."""
    folder = tmp_path_factory.mktemp("ablate")
    make_gpt(n_layer=3).save(folder / "base.pt")
    (folder / "text").mkdir()
    (folder / "text/train.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    (folder / "text/val.txt").write_text("And God saw the light, that it was good. " * 5)
    return folder


def settings(base, device="cpu"):
    run = {"init": f"{base}/base.pt", "data": f"{base}/text", "device": device}
    return run | {"schedule": "cosine", "batch_size": 4, "block_size": 16}


def flags(base):
    return f"--init {base}/base.pt --data {base}/text --ref-steps 4 --batch-size 4 --device cpu".split()


@pytest.mark.parametrize("n_layer", range(2, 8))
def test_two_halves_make_the_whole(n_layer):
    halves = [ablate.layers(half, n_layer) for half in ("first-half", "second-half")]
    assert halves[0] + halves[1] == ablate.layers("all", n_layer) == list(range(n_layer))
    assert 0 <= len(halves[1]) - len(halves[0]) <= 1
    assert [ablate.layers(str(i), n_layer) for i in range(n_layer)] == [[i] for i in range(n_layer)]


@pytest.mark.parametrize(
    "targets, depth", [("k,v,ff", "first-half"), ("ff", "2"), ("k,v", "second-half"), ("v", "all")]
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_only_the_chosen_rows_learn_and_the_others_stay_exactly_one(base, device, targets, depth, noise):
    config = TrainConfig(**settings(base, device), lr=0.1, steps=5, eval_interval=5, dtype="float32")
    model, data = build(config)
    vectors = attach(model, targets=targets.split(","))
    chosen = ablate.layers(depth, 3)
    values = ablate.prepare(vectors, chosen, noise, seed=1)
    others = [i for i in range(3) if i not in chosen]
    for p in vectors.parameters():
        assert (p[others] == 1).all() and (p[chosen] == 1).all() == (noise == 0)
    train(model, data, config)
    moved = 0
    for p in vectors.parameters():
        assert (p[others] == 1).all()
        moved += (p != 1).sum().item()
    # n_embd 16: l_k and l_v have 16 values a layer, l_ff 64; a trained one that is 1 in float32 again would be a marvel
    assert values == moved == len(chosen) * sum({"k": 16, "v": 16, "ff": 64}[t] for t in targets.split(","))


def test_the_noise_is_normal_of_the_given_size_and_drawn_from_the_seed():
    starts = []
    for seed in (1, 1, 2):
        vectors = attach(make_gpt(n_embd=256))
        ablate.prepare(vectors, [0, 1], 0.3, seed)
        starts.append(torch.cat([p.detach().flatten() - 1 for p in vectors.parameters()]))
    n = starts[0].numel()  # 3072; four standard errors: of a mean 0.3/√n, of a standard deviation 0.3/√(2n)
    assert abs(starts[0].mean()) < 4 * 0.3 / n**0.5 and abs(starts[0].std() - 0.3) < 4 * 0.3 / (2 * n) ** 0.5
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("targets, values", [("k,v,ff", 3 * 96), ("v", 3 * 16)])
def test_a_run_is_the_run_of_train_py(base, device, tmp_path, targets, values):
    """By train.py's own build, train and evaluate. float32 sums in another order: 1e-6 of a few nats."""
    shared = settings(base, device)
    job = REFERENCE | {"targets": targets, "seed": 3}
    result = ablate.measure(shared, tmp_path, **job)
    config = TrainConfig(**shared, targets=targets, lr=0.1, steps=4, seed=3, eval_interval=4, eval_windows=1)
    model, data = build(config)
    untouched = evaluate(model, data["val"], config)
    train(model, data, config)
    a_byte = data["val"].n_tokens / data["val"].n_bytes
    assert result["loss"] == pytest.approx(evaluate(model, data["val"], config) * a_byte, rel=1e-6)
    assert result == result | {"values": values, "train_tokens": data["train"].n_tokens}
    nats = np.load(tmp_path / f"{ablate.run_name(job)}.npy")
    assert nats.dtype == np.float32 and nats.shape == (len(data["val"]),)
    assert nats.sum(dtype=np.float64) / data["val"].n_bytes == pytest.approx(result["loss"], rel=1e-6)
    assert ablate.measure(shared, tmp_path, **job | {"noise": 0.3})["loss"] != result["loss"]
    without = ablate.measure(shared, tmp_path, **job | {"targets": "none"})
    assert without["values"] == 0 and without["loss"] == pytest.approx(untouched * a_byte, rel=1e-6)


def test_data_is_cut_from_its_start():
    stream = datasets.Stream(np.arange(1000), 16)
    part = ablate.cut(stream, 0.1)
    assert part.tokens.tolist() == list(range(100)) and part.block_size == 16
    assert len(ablate.cut(stream, 1.0).tokens) == 1000
    examples = datasets.Examples([([i], [i, i]) for i in range(29)])
    assert ablate.cut(examples, 0.1).examples == examples.examples[:3]
    for split, share in ((stream, 0.016), (examples, 0.01), (stream, 0.0), (stream, 1.1), (stream, float("nan"))):
        with pytest.raises(ValueError, match="data-size"):
            ablate.cut(split, share)
    assert len(ablate.cut(stream, 0.017).tokens) == 17  # the fewest that one window takes


def test_every_run_is_there_once():
    depths = ["all", "first-half", "second-half", *map(str, range(6))]
    axes = {"targets": ablate.SUBSETS, "depth": depths} | ablate.DEFAULTS
    jobs = ablate.plan(axes, REFERENCE | {"steps": 100})
    assert len(jobs) == len({ablate.run_name(job) for job in jobs})
    # the base; six subsets, eight depths and the reference with three seeds; the others' values but the reference's
    assert len(jobs) == 1 + 3 * (6 + 8 + 1) + 4 + 4 + 3 + 3 <= 65
    assert set(ablate.SUBSETS) == {
        ",".join(t for t, on in zip(("k", "v", "ff"), bits, strict=True) if on)
        for bits in itertools.product((False, True), repeat=3)
        if any(bits)
    }
    alone = ablate.plan({"lr": [0.3], "noise": [0.2]}, REFERENCE, seeds=2)
    assert [(job["lr"], job["noise"], job["seed"]) for job in alone[1:]] == [
        *((0.3, 0.0, 1), (0.3, 0.0, 2), (0.1, 0.0, 1), (0.1, 0.0, 2)),
        *((0.1, 0.2, 1), (0.1, 0.2, 2)),
    ]
    crossed = ablate.plan({"lr": [0.3, 0.5], "noise": [0.2]}, REFERENCE, cross=True)
    assert {(job["lr"], job["noise"]) for job in crossed[1:]} == set(itertools.product((0.3, 0.5, 0.1), (0.2, 0.0)))


def write_folder(folder, points, val_bytes=100.0):
    """A folder of results made by hand. points: {axes that differ from the reference, as a tuple: [nats a seed]}."""
    (folder / "about.json").write_text(
        json.dumps(
            {"data": "text 0123", "val_bytes": val_bytes, "batch_size": 4, "block_size": 16}
            | REFERENCE
            | {"schedule": "cosine"}
        )
    )
    rows, arrays = [], {"targets": np.array([3.0, 2.0, 5.0, 4.0], np.float32)}
    for point, seeds in points.items():
        for seed, nats in enumerate(seeds, 1):
            if nats is None:
                continue  # a run that was not made
            rows.append(REFERENCE | dict(point) | {"seed": seed, "values": 288, "train_tokens": 1000, "loss": 0.0})
            arrays[ablate.run_name(rows[-1])] = np.array(nats, np.float32)
    write_csv(folder / "results.csv", rows)
    np.savez_compressed(folder / "windows.npz", **arrays)


def point(**changes):
    return tuple(changes.items())


T = np.array([3.0, 2.0, 5.0, 4.0])  # targets of the four windows
W = np.array([4.0, 8.0, 1.0, 6.0])  # nats of the reference's seeds
BASE = {point(targets="none"): [W + 3 * T]}


def test_a_difference_that_is_the_same_everywhere_has_an_interval_of_no_width(tmp_path):
    """Base and points are the reference's own seeds plus c nats a target: every resampling finds c, if it is paired."""
    seeds = [W, 2 * W, W + T]
    points = BASE | {
        point(): seeds,
        point(targets="v"): [nats + 0.5 * T for nats in seeds],
        point(targets="k"): [nats + 2 * T for nats in seeds],
        point(lr=0.3): [W - 0.25 * T],  # seed 1 only, so the reference's seed 1 only
        point(lr=0.5): [None, W],  # of a command that was stopped: nothing to compare with yet
        point(noise=0.3): [W],
    }
    write_folder(tmp_path, points)
    summary = ablate.summarize(tmp_path)
    assert list(summary) == [("targets",), ("lr",), ("noise",)]
    base, *found = summary["targets",]
    assert [record["targets"] for record in (base, *found)] == ["none", "k", "v", "k,v,ff"]
    a_byte = T.sum() / 100
    mean = np.sum(seeds) / 3 / 100
    assert [record["loss"] for record in found] == pytest.approx([mean + 2 * a_byte, mean + 0.5 * a_byte, mean])
    for record, c in zip(found, (2, 0.5, 0), strict=True):
        assert record["interval"] == pytest.approx((c * a_byte, c * a_byte), abs=1e-12)
        assert record["difference"] == pytest.approx(c * a_byte, abs=1e-12) and record["seeds"] == 3
    assert base["loss"] == pytest.approx((W + 3 * T).sum() / 100)
    base, reference, higher = summary["lr",]
    assert (reference["loss"], reference["seeds"]) == (pytest.approx(W.sum() / 100), 1)
    assert higher["interval"] == pytest.approx((-0.25 * a_byte, -0.25 * a_byte), abs=1e-12)
    assert base["interval"] == pytest.approx((3 * a_byte, 3 * a_byte), abs=1e-12)
    text = ablate.tables(tmp_path)
    assert "| the base | 288 | 0.6100 | +0.4200 | +0.4200 to +0.4200 |" in text
    assert "| 0.3 | 288 | 0.1550 | -0.0350 | -0.0350 to -0.0350 |" in text
    assert "| 0.3 | 288 | 0.1900 | +0.0000 | +0.0000 to +0.0000, not distinguished |" in text  # noise without effect
    assert text.count("| reference |  |") == 3 and "text/val, 3 seeds; layers all, learning rate 0.1" in text


def test_a_difference_within_the_noise_is_not_called_one(tmp_path):
    """Half of the windows gain what the others lose: the interval is that of resampling four windows, and holds 0."""
    swing = T * [1, -1, -1, 1]  # 3 − 2 − 5 + 4 = 0
    write_folder(tmp_path, BASE | {point(): [W], point(lr=0.3): [W + swing]}, val_bytes=None)
    _, _, record = ablate.summarize(tmp_path)["lr",]
    # a resampling draws one of the two halves only with probability 2⁻⁴ each, which is more than 2.5 %
    assert record["interval"] == pytest.approx((-1, 1)) and record["difference"] == pytest.approx(0, abs=1e-12)
    text = ablate.tables(tmp_path)
    assert text.count("not distinguished") == 1 and "| nats a token |" in text
    assert f"| {W.sum() / T.sum():.4f} | reference |" in text


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
        ablate.draw(axes, records, "nats a byte", tmp_path / "a.png")
        assert ablate.plt.imread(tmp_path / "a.png")[..., :3].std() > 0.05


def test_crossed_axes_have_a_table_of_their_own(tmp_path):
    grid = {point(lr=lr, noise=noise): [W + lr * T] for lr in (0.1, 0.3) for noise in (0.0, 0.2)}
    write_folder(tmp_path, BASE | grid | {point(steps=8): [W]})
    summary = ablate.summarize(tmp_path)
    assert list(summary) == [("lr",), ("steps",), ("noise",), ("lr", "noise")]
    assert [(r["lr"], r["noise"]) for r in summary["lr", "noise"][1:]] == [(0.1, 0), (0.1, 0.2), (0.3, 0), (0.3, 0.2)]
    assert "| the base |  | 288 |" in ablate.tables(tmp_path) and "| 0.3 | 0.2 | 288 |" in ablate.tables(tmp_path)
    ablate.draw(("lr", "noise"), summary["lr", "noise"], "nats a byte", tmp_path / "a.png")
    assert ablate.plt.imread(tmp_path / "a.png")[..., :3].std() > 0.05


def test_the_command_goes_on_where_it_was_stopped(base, tmp_path, capsys):
    command = [*flags(base), "--out", str(tmp_path / "run"), "--lr", "0.3", "1e30", "--depth", "0", "--seeds", "1"]
    assert ablate.main(command) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        *("about.json", "depth.png", "lr.png", "results.csv", "table.md", "windows.npz")
    ]
    rows, table = read_csv(run / "results.csv"), (run / "table.md").read_text()
    assert len(rows) == 5 and table == ablate.tables(run) + "\n" and table in out
    assert "| layer 0 | 96 |" in table and "diverged, 1 of 1" in table
    with np.load(run / "windows.npz") as file:
        nats = dict(file)
    losses = {ablate.run_name(row): row["loss"] for row in rows}
    assert losses.keys() | {"targets"} == nats.keys()
    # a window's float32 is 6e-8 of it from the sum that results.csv was told
    assert losses == pytest.approx({n: nats[n].sum(dtype=float) / 205 for n in losses}, rel=1e-6)
    assert nats["targets"].sum() == 204  # of 41 · 5 bytes

    assert ablate.main(command) == 0  # nothing left to do
    assert "left" not in capsys.readouterr().out and read_csv(run / "results.csv") == rows
    write_csv(run / "results.csv", rows[:2] + rows[3:])  # as if stopped before the third
    assert ablate.main(command) == 0
    assert capsys.readouterr().out.startswith("1/1 ")
    by_name = {ablate.run_name(row): row for row in read_csv(run / "results.csv")}
    assert by_name == {ablate.run_name(row): row for row in rows}  # to the bit
    assert (run / "table.md").read_text() == table

    others = ["--ref-lr 0.2", "--batch-size 8", "--block-size 8", "--schedule linear"]
    for split in ("train", "val"):  # a folder of the same name and sizes, one of its bytes another
        shutil.copytree(base / "text", tmp_path / split / "text")
        path = tmp_path / split / f"text/{split}.txt"
        path.write_text(path.read_text()[:-1] + "!")
        others.append(f"--data {tmp_path}/{split}/text")
    for other in others:
        assert ablate.main([*command, *other.split()]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "another --out" in err
    (run / "windows.npz").unlink()
    assert ablate.main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "lacks" in err and "remove results.csv" in err


def test_prompts_and_completions_are_measured_by_the_token(base, tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    for split, n in (("train", 20), ("val", 6)):
        lines = [json.dumps({"prompt": f"{i}: ", "completion": "yes" * (i % 3 + 1)}) for i in range(n)]
        (tmp_path / f"pairs/{split}.jsonl").write_text("\n".join(lines))
    command = f"--init {base}/base.pt --data {tmp_path}/pairs --ref-steps 2 --data-size 0.1 --device cpu --out"
    assert ablate.main([*command.split(), str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "| nats a token |" in out and "| 9 | 288 |" in out  # 'yes' and 'yesyes' are left, one byte a token


def test_quick_is_the_same_in_small(base, tmp_path, monkeypatch, capsys):
    seen = []

    def look(jobs, _, path, __):
        seen.extend(jobs)
        raise ValueError(path)

    monkeypatch.setattr(ablate, "measure_all", look)
    command = f"--init {base}/base.pt --data {base}/text --device cpu --out {tmp_path} --quick"
    assert ablate.main(command.split()) == 2
    assert capsys.readouterr().err == f"ablate.py: {tmp_path}/quick/results.csv\n"
    # the base, subsets and depths, the reference, one value of lr, steps, noise; a hundredth of the text is no window
    assert len(seen) == 1 + 6 + 5 + 1 + 3 and {job["data_size"] for job in seen} == {1.0}
    assert {job["seed"] for job in seen} == {1} and {job["steps"] for job in seen} == {15, 30}


@pytest.mark.parametrize(
    "line, message",
    [
        ("--width", "unrecognized arguments: --width"),
        ("--sub k", "unrecognized arguments: --sub"),
        pytest.param(
            "--device cuda",
            "device 'cuda' is not here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here"),
        ),
        ("--subsets q", "'q' is none of k v ff"),
        ("--subsets k,", "'k,' is none of"),
        ("--depth 3", "depth must be all, first-half, second-half, or a layer from 0 to 2, not 3"),
        ("--depth -1", "not -1"),
        ("--depth top", "not top"),
        ("--lr 0.1 0", "lr must be above 0"),
        ("--lr x", "--lr: invalid float value: 'x'"),
        ("--steps 0", "steps must be at least 1"),
        ("--steps 1.5", "--steps: invalid int value: '1.5'"),
        ("--data-size 0", "data-size must be above 0 and at most 1"),
        ("--data-size 2", "data-size must be above 0 and at most 1"),
        ("--data-size 0.001", "too little for one window"),
        ("--noise -0.1", "noise must be at least 0"),
        ("--noise inf", "noise must be at least 0 and finite"),
        ("--ref-noise nan", "noise must be at least 0"),
        ("--subsets ff,v,k", "nothing to compare"),
        ("--seeds 0", "seeds must be at least 1"),
        ("--workers 0", "workers must be at least 1"),
        ("--cross --lr", "cross wants two axes"),
        ("--cross", "cross wants two axes"),
        ("--block-size 17", "block_size must be from 1 to the model's 16"),
        ("--block-size 0", "block_size must be from 1"),
        ("--batch-size 0", "batch_size must be at least 1"),
        ("--data nowhere", "no data called 'nowhere'"),
        ("--init nowhere.pt", "nowhere.pt"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(base, tmp_path, capsys, line, message):
    axis = [] if line.startswith("--cross") else ["--lr", "0.1"]
    assert ablate.main([*flags(base), *axis, *line.split(), "--out", f"{tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ablate.py: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists()


def test_vectors_are_named_in_any_order():
    assert ablate.subset("ff,k") == "k,ff" and ablate.subset("v,ff,k") == "k,v,ff" and ablate.subset("v") == "v"
