"""What lab.py promises: losses work by work, intervals against textbooks, and folders of runs that go on."""

import json
import math
import os
import signal
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from here import Here

import common
from conftest import make_gpt
from data import Stream
from experiments import ablate, bench, clocks, compare_tables, edge, generation, lab, quantized, shots
from train import TrainConfig, evaluate

# --- losses and intervals ---


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
    low, high = clocks.equivalence(list(range(1, n + 1)), [1] * n)
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


def test_the_difference_is_of_medians_over_templates_within_each_draw():
    dice = np.random.default_rng(1)
    ours, theirs = dice.random((2, 3, 3, 40)) < [[[[0.8]]], [[[0.6]]]]
    value, low, high, t_low, t_high = lab.accuracy_difference(ours, theirs)
    of_draw = []
    for a, b in zip(ours, theirs, strict=True):
        of_draw.append(sorted(a.mean(1))[1] - sorted(b.mean(1))[1])
    assert value == pytest.approx(sum(of_draw) / 3) and low < value < high
    assert value == pytest.approx(shots.accuracy_of(ours) - shots.accuracy_of(theirs))
    deviation = math.sqrt(sum((d - value) ** 2 for d in of_draw) / 2)
    assert (t_high - t_low) / 2 == pytest.approx(4.3027 * deviation / math.sqrt(3))
    # the bootstrap against one that is written down draw by draw; two of 2000 each differ by chance, in their ends by
    # some 4 % of the interval's width (a standard error of 0.05 of a deviation each, of 3.9 that it is wide)
    values = []
    for _ in range(2000):
        draws, items = dice.integers(3, size=3), dice.integers(40, size=40)
        medians = [[np.median(found[d][:, items].mean(1)) for d in draws] for found in (ours, theirs)]
        values.append(np.mean(medians[0]) - np.mean(medians[1]))
    assert [low, high] == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.1 * (high - low))


@pytest.mark.parametrize("degrees", lab.T_975)
def test_students_points_leave_a_fortieth_above(degrees):
    """The density, integrated from 0 by the trapezoid rule: 0.475 lie between 0 and the point."""
    t = np.linspace(0, lab.T_975[degrees], 200_001)
    factor = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    assert np.trapezoid(factor * (1 + t**2 / degrees) ** (-(degrees + 1) / 2), t) == pytest.approx(0.475, abs=2e-6)


# --- tables ---

MAKERS = {
    "ablation": ablate,
    "ablation-rates": ablate,
    "ablation-sites": ablate,
    "bench": bench,
    "bench-epyc": bench,
    "bench-h200": bench,
    "bench-h200-compiled": bench,
    "compare": compare_tables,
    "compare-smollm2": compare_tables,
    "edge": edge,
    "generation": generation,
    "generation-bfloat16": generation,
    "quantized": quantized,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_committed_table_is_made_of_the_committed_files(name):
    text = (lab.RESULTS / name / "table.md").read_text(encoding="utf-8")
    assert text == MAKERS[name].tables(lab.RESULTS / name) + "\n"


# --- runs ---


class Job(NamedTuple):
    name: str
    seed: int


@dataclass
class Result:
    loss: float
    gain: float | None = None


def half(job):
    if job.name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return Result(job.seed / 2), {"nats": np.full(3, job.seed)}


def test_runs_go_on_where_they_were_stopped(tmp_path, capsys, monkeypatch):
    jobs = [Job("x_y/z", seed) for seed in range(3)]
    with pytest.raises(OSError, match="a worker was killed"):
        lab.make_runs([*jobs[:2], Job("die", 0)], half, Result, tmp_path, 1)  # in a real process, one after another
    first = {job: Result(job.seed / 2) for job in jobs[:2]}
    assert lab.load_runs(tmp_path, Job, Result)[0] == first
    capsys.readouterr()
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    results = lab.make_runs([*jobs, jobs[0]], half, Result, tmp_path, 1)
    assert list(results) == jobs and capsys.readouterr().out.startswith("1/1 ")
    found, arrays = lab.load_runs(tmp_path, Job, Result)
    assert found == results == first | {jobs[2]: Result(1.0)}
    assert all((lab.arrays_of(job, arrays, tmp_path)["nats"] == job.seed).all() for job in jobs)


def test_a_folder_takes_more_data_and_no_contradiction(tmp_path):
    about = {"base": "b", "hash": {"folio": "1"}}
    lab.open_folder(tmp_path, about)
    lab.open_folder(tmp_path, about | {"hash": {"kjv": "2"}})
    both = {"folio": "1", "kjv": "2"}
    assert lab.read_about(tmp_path) == about | {"hash": both}
    lab.open_folder(tmp_path, about)
    lab.open_folder(tmp_path, {"base": "b"})
    wrong = [
        (about | {"base": "c"}, "base b, not c"),
        (about | {"hash": {"folio": "3"}}, "not {'folio': '3'}"),
        (about | {"hash": "1"}, "}, not 1"),
        (about | {"more": 1}, "more None, not 1"),
        ({"hash": both}, "base b, not None"),
    ]
    for other, message in wrong:
        with pytest.raises(ValueError, match=message):
            lab.open_folder(tmp_path, other)
    assert lab.read_about(tmp_path) == about | {"hash": both}
    (tmp_path / "about.json").write_text(json.dumps({"base": "b"}))  # written before its hashes were
    lab.open_folder(tmp_path, about)
    assert lab.read_about(tmp_path) == about


def test_run_json_is_of_the_last_command_that_made_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)

    def command(*jobs):
        done = lab.make_runs(jobs, half, Result, tmp_path, 1)
        lab.write_runs_json(tmp_path, "x.py", {}, make_gpt(), None, done)
        return list(json.loads((tmp_path / "run.json").read_text())["figures"])

    a, b, c = [Job("x", seed) for seed in range(3)]
    assert command(a, b) == command(a) == ["x_0", "x_1"]
    assert command(c) == command(a, b) == ["x_2"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: other columns"),
        ("a,b\n1,2\n", "line 1: other columns"),
        ("name,seed,loss,gain\nx,1,many,\n", "line 2: could not convert"),
        ("name,seed,loss,gain\nx,1\n", "line 2: "),
        ("name,seed,loss,gain\nx,1,,2\n", "line 2: "),  # only a gain may be missing
        ("name,seed,loss,gain\nx,1,2,3,4\n", "line 2: too many cells"),
        ("name,seed,loss,gain\nx,1.5,2,\n", "line 2: invalid literal"),
        (b"\xff\xfe\x00", "remove it to measure again"),
    ],
)
def test_a_csv_that_is_edited_empty_or_foreign_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "results.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"results\.csv is not what this command wrote") as e:
        lab.load_runs(tmp_path, Job, Result)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_text_that_is_missing_at_the_end_of_a_row_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("seed,name\n1,x\n2\n")
    with pytest.raises(ValueError, match="line 3: too few cells"):
        lab.read_csv(tmp_path / "a.csv", {"seed": int, "name": str})


def test_a_small_file_that_unfolds_to_gigabytes_is_not_read(tmp_path):
    np.savez_compressed(tmp_path / "windows.npz", **{"x/nats": np.zeros(10**8 + 1, dtype=bool)})
    assert (tmp_path / "windows.npz").stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"windows\.npz is damaged"):
        lab.load_runs(tmp_path, Job, Result)


def test_other_files_that_are_foreign_are_one_clear_line(tmp_path):
    (tmp_path / "windows.npz").write_text("x")
    with pytest.raises(ValueError, match=r"windows\.npz is damaged"):
        lab.load_runs(tmp_path, Job, Result)
    with pytest.raises(ValueError, match="lacks x_1"):
        lab.arrays_of(Job("x", 1), {}, tmp_path)
    for other in (np.zeros(4), np.array([0, 0, 1])):
        with pytest.raises(ValueError, match="different texts"):
            lab.stack_works([{"work": work, "nats": work, "bytes": work + 1} for work in (np.zeros(3), other)])
    for text in ("", "[1]", "{"):
        (tmp_path / "about.json").write_text(text)
        with pytest.raises(ValueError, match=r"about\.json is not what this command wrote"):
            lab.open_folder(tmp_path, {"a": 1})
