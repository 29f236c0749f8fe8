"""compare.py: the search for a rate, every command whole on a tiny base, and the tables, from files alone.

None of these tests asserts which method wins.
"""

import json
import math

import numpy as np
import pytest
import torch
from here import Here

import common
from conftest import make_gpt, make_llama
from experiments import compare, compare_tables, lab
from experiments.compare import Job, Result, Settings
from experiments.rivals import METHODS
from train import train

TRAINED = [name for name in METHODS if name != "base"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)


# --- the search ---


def test_rates_are_quarter_decades():
    assert [compare.rate(i) for i in range(-4, 6)] == [0.1, 0.18, 0.3, 0.56, 1, 1.8, 3, 5.6, 10, 18]
    assert [compare.index_of_rate(compare.rate(i)) for i in range(-20, 9)] == list(range(-20, 9))


def test_a_grid_grows_while_its_edge_is_best_then_the_quarters_beside_the_best_are_tried():
    """By the mean of two seeds, of which one by itself would choose another rate. What diverges is never chosen."""
    best = {"lora4": 0.03, "full": 1e-3, "ia3": 1.8}
    seen = {}

    def measure_jobs(jobs):
        results = {}
        for job in jobs:
            assert (job.stage, job.data, job.steps) == ("lr", "kjv", 40)
            seen.setdefault(job.method, set()).add(job.lr)
            away = math.log10(job.lr / best[job.method])
            loss = math.inf if away > 0.6 else (away + (0.4 if job.seed else -0.4)) ** 2
            results[job] = Result(1, loss, None)
        return results

    middles = dict.fromkeys(best, compare.index_of_rate(0.03))
    assert compare.choose_rates(measure_jobs, "kjv", 40, middles) == best
    assert seen["lora4"] == {0.01, 0.018, 0.03, 0.056, 0.1}
    assert seen["full"] == {3e-4, 5.6e-4, 1e-3, 1.8e-3, 3e-3, 1e-2, 3e-2, 1e-1}
    assert seen["ia3"] == {0.01, 0.03, 0.1, 0.3, 1, 3, 10, 1.8, 5.6}  # 3 is the better half-decade, and 10 diverges


# --- the command, on a tiny base ---


@pytest.fixture
def texts(tmp_path):
    """A folder with base.pt, a random GPT, and a/, whose test is three works, and b/, with one."""
    common.save(make_gpt(), tmp_path / "base.pt")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "val", "test"):
            text = f"And {name} saw the light, that it was {split}. " * 10
            if (name, split) == ("a", "test"):
                text = "".join(f"{title}\n{text}{i}\n" for i, title in enumerate(list(lab.TITLES)[:3]))
            (tmp_path / name / f"{split}.txt").write_text(text)
    return tmp_path


def flags(texts, base="base.pt"):
    return f"--base {texts}/{base} --data {texts}/a --forget {texts}/b --device cpu --out {texts}/out".split()


def test_three_methods_one_of_them_searched_and_that_the_command_goes_on(texts, capsys):
    out = texts / "out"
    command = [*flags(texts), *"--methods lora4 ia3 full --steps 2 --seeds 2 --lr lora4=0.01 full=1e-3".split()]
    assert compare.main([*command, "--plan"]) == 0
    # of (IA)³ seven rates by two seeds; two tests of each method; and the base, which takes no step
    n = 7 * 2 + 3 * 2
    assert capsys.readouterr().out.startswith(f"{n + 1} runs are left, {n * 2} steps, ") and not out.exists()
    assert compare.main(command) == 0
    results, _ = lab.load_runs(out, Job, Result)
    tests = {job: result for job, result in results.items() if job.stage == "test"}
    lr = {job.method: job.lr for job in tests}
    about = json.loads((out / "run.json").read_text())
    assert about["arguments"]["lr"]["a"].items() <= lr.items() and about["data_hash"].keys() == {"a", "b"}
    assert about["figures"] == {lab.run_name(job): vars(result) for job, result in tests.items()}
    losses = compare_tables.mean_losses(results, "a", 2)["ia3"]
    assert lr == {"base": 0, "lora4": 0.01, "full": 1e-3, "ia3": min(losses, key=losses.get)}
    for name in ("beside.png", "curves.png", "rates.png"):
        assert compare_tables.plt.imread(out / name)[..., :3].std() > 0.05
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table) and "2 seeds, on Macbeth, Twelfth Night, Julius Caesar:" in table
    ((key, methods),) = compare_tables.read_tests(out).items()
    assert key == ("a", 2) and list(methods) == ["base", "full", "lora4", "ia3"]
    rows = {name: compare_tables.row_of(methods, name) for name in methods}
    assert rows["full"].gap == pytest.approx([100] * 3) and (rows["base"].gap == 0).all()
    assert (rows["ia3"].beside == 0).all() and (rows["base"].forgotten == 0).all()
    for name, row in rows.items():
        of = [result.loss for job, result in tests.items() if job.method == name]
        assert row.loss.mean() == pytest.approx(np.mean(of), rel=1e-6)  # blocks are kept in float32
        assert row.beside.mean() == pytest.approx(row.seeds.mean())
        assert len(row.loss) == 3 and len(row.seeds) == 2

    # in whatever order runs have ended, seeds are paired
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join([lines[0], *lines[:0:-1]]))
    assert compare_tables.tables(out) + "\n" == table

    # a run that is missing is measured again, to the same bits, and no other
    (out / "results.csv").write_text("".join(lines[:-1]))
    (out / "table.md").unlink()
    assert compare.main([*command, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("1 runs are left, ")
    assert compare.main(command) == 0
    assert lab.load_runs(out, Job, Result)[0] == results and (out / "table.md").read_text() == table
    assert capsys.readouterr().out.count(" min left") == 1

    # another method with fewer seeds joins them; a second rate, or another text to forget, is another folder
    joined = [*flags(texts), *"--methods vera --steps 2 --seeds 1 --lr 0.1".split()]
    assert compare.main(joined) == 0
    assert capsys.readouterr().out.count(" min left") == 1
    methods = compare_tables.read_tests(out)["a", 2]
    vera = compare_tables.row_of(methods, "vera")
    assert len(vera.seeds) == 1 and not vera.is_ranked()
    assert len(compare_tables.row_of(methods, "lora4").seeds) == 2
    assert compare.main([*joined[:-1], "0.2"]) == 2
    assert "0.1, not 0.2" in capsys.readouterr().err
    assert compare.main([*command, "--forget", f"{texts}/a"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "forget b, not a" in err
    lab.write_runs(out, results | {next(iter(results))._replace(method="magic"): Result(1, 1.0, 1.0)}, {})
    with pytest.raises(ValueError, match="magic"):
        compare_tables.tables(out)


def test_one_new_method_by_itself_is_one_row(texts, capsys):
    assert compare.main([*flags(texts), *"--methods vera --seeds 2 --steps 3 --lr 0.1".split()]) == 0
    lines = (texts / "out/table.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {METHODS['vera'].title} |")]
    cells = row.split(" | ")
    assert cells[1:3] == ["2,400", "0.1"] and cells[4:8] == ["", "", "", ""]  # no gap without full, nothing beside
    assert not (texts / "out/costs.csv").exists() and "nan" not in "".join(lines)


def test_a_folder_goes_by_its_own_name(texts, capsys, monkeypatch):
    monkeypatch.chdir(texts / "a")
    command = "--base ../base.pt --data . --forget ../b --device cpu --out ../out --methods ia3 --steps 1 --seeds 1"
    for _ in range(2):
        assert compare.main([*command.split(), "--lr", "0.1"]) == 0
    assert "0 runs are left" in capsys.readouterr().out
    assert {job.data for job in lab.load_runs(texts / "out", Job, Result)[0]} == {"a"}


def test_another_rate_on_the_second_data_is_told_before_any_run(texts, capsys):
    there = Job("test", "b", "vera", 0.1, 2, 1)
    lab.write_runs(texts / "out", {there: Result(1, 1.0, 1.0)}, {})
    before = (texts / "out/results.csv").read_bytes()
    command = f"{' '.join(flags(texts))} --data {texts}/a {texts}/b --methods vera --steps 2 --seeds 1 --lr 0.2"
    assert compare.main(command.split()) == 2
    assert "0.1, not 0.2" in capsys.readouterr().err
    assert (texts / "out/results.csv").read_bytes() == before


def test_quick_is_every_method_with_its_costs(texts, capsys):
    assert compare.main([*flags(texts), "--quick"]) == 0
    table = (texts / "out/quick/table.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out and "nan" not in table
    for name in METHODS:
        assert table.count(f"| {METHODS[name].title} |") == 2  # what it learned, what it costs


def test_on_a_base_without_biases_bitfit_is_left_out(texts):
    base = make_gpt(bias=False)
    assert compare.choose_methods(None, base, is_llama=False) == [name for name in TRAINED if name != "bitfit"]
    with pytest.raises(ValueError, match="bitfit"):
        compare.choose_methods(["bitfit"], base, is_llama=False)


def test_a_llama_has_three_methods_and_its_frozen_weights_in_bfloat16(texts, capsys):
    common.save(make_llama().bfloat16(), texts / "llama.pt")
    command = [*flags(texts, "llama.pt"), *"--steps 2 --seeds 1 --lr 1e-3".split()]
    assert compare.main(command) == 0
    results, _ = lab.load_runs(texts / "out", Job, Result)
    assert {job.method for job in results} == {"base", "full", "ia3", "lora-all"}
    printed = capsys.readouterr().out
    assert printed.count(", no ranking |") == 3  # no rate was chosen here: the base, full, LoRA
    assert compare.main([*command, "--counts"]) == 2
    settings = Settings(f"{texts}/llama.pt", {}, "b", "cpu", "bfloat16", is_llama=True)
    for name in compare.ON_LLAMA:
        for p in settings.model(name, 0).parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)


def test_what_is_kept_for_backward_depends_on_the_place(texts, capsys):
    """As wide as the bundled base, since the head's share counts."""
    common.save(make_gpt(n_layer=6, n_head=6, n_embd=192), texts / "wide.pt")
    assert compare.main([*flags(texts, "wide.pt"), "--counts"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    kept = {line.split(" | ")[0].strip("| "): float(line.split(" | ")[2]) for line in lines}
    assert kept["(IA)³ on k, v, ff"] > 0.97 and kept["LoRA r = 1 on all maps"] > 0.97
    assert max(kept["(IA)³ on ff"], kept["(IA)³ on k, v"], kept["LoRA r = 4 on q, v"]) < 0.78


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_learns_under_the_projects_own_loop(name, texts):
    settings = Settings(f"{texts}/base.pt", {}, "b", "cpu", "float32")
    model = settings.model(name, 0)
    data = lab.load_data(f"{texts}/a", model, ("train", "val"))
    history = train(model, data, settings.config(steps=15, lr=0.01, eval_interval=15))
    assert history[-1]["val_loss"] < history[0]["val_loss"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("--base nothing.pt", "nothing.pt"),
        ("--data nothing", "no data called 'nothing'"),
        ("--data x/a y/a", "have the same name"),
        ("--workers 0", "workers must be at least 1, not 0"),
        ("--seeds 11", "not 11"),
        ("--steps 0", "not 0"),
        ("--methods magic", "magic"),
        ("--methods ia3 --lr vera=0.1", "vera=0.1"),
        ("--lr fast", "fast"),
        ("--lr 0", "lr 0"),
    ],
)
def test_mistakes_are_told_in_one_line(text, message, tmp_path, capsys):
    assert compare.main([*text.split(), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("compare.py: ") and err.count("\n") == 1 and message in err and not out
    assert not list(tmp_path.rglob("*.csv"))


# --- what diverges ---


def test_a_run_that_diverges_is_a_run_like_any_other(texts, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(compare, "train", diverge)
    settings = Settings(f"{texts}/base.pt", {"a": f"{texts}/a"}, "a", "cpu", "float32")
    result, arrays = compare.measure(settings, Job("lr", "a", "full", 1.0, 20, 0))
    assert result.loss == math.inf and arrays == {}
    result, arrays = compare.measure(settings, Job("test", "a", "full", 1.0, 20, 0))
    assert result.loss == result.forgotten == math.inf and np.isinf(lab.stack_works([arrays])).all()


@pytest.mark.parametrize("method, seeds", [("bitfit", [2]), ("bitfit", [1, 2]), ("full", [1]), ("ia3", [1])])
def test_a_report_says_what_diverged(tmp_path, method, seeds):
    about = {"forget": "plays", "batch_size": 16, "works": {"folio": ["a", "b", "c"]}}
    (tmp_path / "about.json").write_text(json.dumps(about))
    results = {}
    arrays = {}
    for name, lr in (("bitfit", 0.1), ("bitfit", 1.0), ("full", 0.1), ("full", 1.0)):
        gone = lr == 1.0 or name == "full"
        for seed in (0, 1):
            results[Job("lr", "folio", name, lr, 100, seed)] = Result(1, math.inf if gone else 1.0, None)
    for name in ("base", "full", "bitfit", "ia3"):
        for seed in (0,) if name == "base" else (1, 2):
            gone = name == method and seed in seeds
            nats = np.full(6, np.inf) if gone else np.arange(6) + len(name) + seed / 10
            run = {"nats": nats, "bytes": np.ones(6), "work": np.repeat([0, 1, 2], 2)}
            run |= {f"forget_{what}": array for what, array in run.items()}
            run["curve"] = np.empty((0, 2)) if gone or name == "base" else np.array([[0, 3.0], [100, 2.0]])
            job = Job("test", "folio", name, 0.1, 0 if name == "base" else 100, seed)
            results[job] = Result(1, float(nats.mean()), float(nats.mean()))
            arrays[job] = run
    lab.write_runs(tmp_path, results, arrays)
    text = compare_tables.write(tmp_path)
    assert "nan" not in text and "inf" not in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {METHODS[method].title} | 1 |")]
    assert line.split("|")[4].strip() == "diverged"
    gap = [line.split("|")[5].strip() for line in text.splitlines() if line.startswith("| (IA)³ |")]
    assert (gap == ["diverged"]) == (method in ("full", "ia3"))
    assert "| BitFit | 0.000 | diverged |" in text and "| full fine-tuning | diverged | diverged |" in text
    for name in ("beside.png", "curves.png", "rates.png"):
        assert compare_tables.plt.imread(tmp_path / name)[..., :3].std() > 0.05


# --- tables ---


def test_a_dot_and_its_bar_are_of_the_same_seeds(tmp_path, monkeypatch):
    """Of the seeds that both have: here 1, at which the loss is 1 nat a block above (IA)³'s."""
    (tmp_path / "about.json").write_text(json.dumps({"forget": "plays"}))
    results = {}
    arrays = {}
    for method, seed, nats in (("base", 0, 9.0), ("ia3", 1, 3.0), ("ia3", 2, 5.0), ("vera", 1, 4.0)):
        job = Job("test", "a", method, 0.1, 0 if method == "base" else 10, seed)
        run = {"nats": np.full(3, nats), "bytes": np.ones(3), "work": np.arange(3)}
        results[job] = Result(1, nats, nats)
        arrays[job] = run | {f"forget_{what}": array for what, array in run.items()}
    lab.write_runs(tmp_path, results, arrays)
    drawn = []

    def block_noise(change, n_bytes):
        drawn.append(change.tolist())
        return 0.0, 1.0

    monkeypatch.setattr(lab, "block_noise", block_noise)
    compare_tables.draw_beside(tmp_path)
    assert drawn == [[1.0]] * 3
    methods = compare_tables.read_tests(tmp_path)["a", 10]
    assert (compare_tables.row_of(methods, "vera").beside == 1).all()


def test_no_ranking_where_a_difference_is_not_clear_of_0_over_works_and_over_seeds():
    def is_ranked(beside, seeds):
        return compare_tables.Row(np.zeros(3), np.zeros(3), beside=beside, seeds=seeds).is_ranked()

    clear, unclear = np.array([0.1, 0.11, 0.12]), np.array([-0.1, 0.11, 0.12])
    assert is_ranked(clear, -clear)
    assert not is_ranked(unclear, clear)
    assert not is_ranked(clear, unclear)
    assert not is_ranked(clear, clear[:1])  # one seed knows of no other
    assert not is_ranked(clear[:2], clear)  # two works show themselves only
    assert compare_tables.of_works(np.array([1.0, 3.0]), ".1f") == "2.0 (1.0 / 3.0)"
    assert compare_tables.of_works(np.array([1.0, 2.0, 3.0]), ".2f") == "2.00 (-0.48 to 4.48)"  # 4.303 / √3 = 2.484
