"""The few-shot experiment on a tiny random Llama and made sentences: no test reads rated ones, or says who wins."""

import argparse
import itertools
import json

import numpy as np
import pytest
import torch
from here import Here

import common
from conftest import make_gpt, make_llama
from data import prepare
from experiments import fewshot, fewshot_demo, fewshot_tables, lab, ranking, serving, shots
from experiments.fewshot_tables import Row
from ia3 import IA3

SERVED = dict.fromkeys(("task", "sentences"), str) | dict.fromkeys(("zero-shot", "its vectors"), float)
SERVED |= dict.fromkeys(("mixed", "merged", "merged in bfloat16"), int)  # serving's columns
WORDS = ("dull", "grand", "red", "tall", "odd", "warm", "late", "new")


def write_sets(folder, n_train=24):
    """Made sentences of four sets and two tasks of theirs, n_train in train and 10 in val and in test of a set."""
    sets = {}
    for name in ("movies", "products", "tweets", "news"):
        splits = {}
        for split, n in (("train", n_train), ("val", 10), ("test", 10)):
            splits[split] = [(f"{name}-{split}{i}", i % 2, f"a {WORDS[i % 8]} {name[:2]}{i}") for i in range(n)]
        prepare.write_task(folder / name, splits, prepare.SENTIMENT)
        sets[name] = splits
    flipped = {}
    for split, rows in sets["movies"].items():
        flipped[split] = [(name, 1 - label, text) for name, label, text in rows]
    prepare.write_task(folder / "movies-flipped", flipped, prepare.SENTIMENT)
    prepare.write_task(folder / "source", prepare.which_source(sets), prepare.SOURCE)
    return folder


@pytest.fixture
def flags(tmp_path):
    """What names a tiny base, made sentences and the folder for what comes out."""
    common.save(make_llama(block_size=4096), tmp_path / "base.pt")
    write_sets(tmp_path / "data", n_train=40)
    return [f"--base={tmp_path}/base.pt", f"--data={tmp_path}/data", f"--out={tmp_path}/out"]


# --- examples ---


def test_a_draw_has_as_many_of_each_label_and_begins_the_larger_ones(tmp_path):
    rows = shots.read_task(write_sets(tmp_path), "movies", "train")
    large = shots.draw(rows, 12, 3)
    assert shots.draw(rows, 4, 3) == large[:4]
    for k in (2, 4, 12):
        assert sum(row.label for row in shots.draw(rows, k, 3)) == k // 2
    assert len({row.prompts[0] for row in large}) == 12  # none twice
    assert shots.draw(rows, 12, 4) != large
    for k, why in ((0, "multiple of the 2 labels"), (3, "multiple of the 2 labels"), (26, "fewer than 13")):
        with pytest.raises(ValueError, match=why):
            shots.draw(rows, k, 0)


def test_a_context_is_the_examples_as_they_are_asked_with_their_answers(tmp_path):
    tokenizer = make_llama().tokenizer
    rows = shots.read_task(write_sets(tmp_path), "movies", "train")[:2]
    ids = shots.context(tokenizer, "plain", rows, 1)
    good, bad = rows if rows[0].label else rows[::-1]
    text = {id(good): " Good", id(bad): " It does not sound good at all"}
    assert tokenizer.decode(ids) == "".join(f"{row.prompts[1]}{text[id(row)]}\n\n" for row in rows)
    ids = shots.context(tokenizer, "chat", rows[:1], 0)
    ids += shots.ask(tokenizer, "chat", rows[1], 0)[0]
    answer = ["negative", "positive"][rows[0].label]
    turns = [shots.SYSTEM, f"user\n{rows[0].prompts[0]}", f"assistant\n{answer}", f"user\n{rows[1].prompts[0]}"]
    assert bytes(ids).decode() == "".join(f"\1{turn}\2\n" for turn in turns) + "\1assistant\n"


def test_the_content_free_sentences_stand_in_the_templates_of_the_task():
    for task, label in (("movies", " negative"), ("movies-flipped", " negative"), ("movies-ab", " A")):
        rows = shots.content_free(task)
        assert len(rows) == 3 and rows[0].choices[0][0] == label
    assert shots.content_free("news")[0].prompts[0] == "Sentence: N/A\nSentiment:"
    assert len(shots.content_free("source")[0].choices[1]) == 4


# --- scores ---


def test_calibration_by_hand():
    """p = (0.6, 0.4); the content-free mean of (0.9, 0.1) and (0.7, 0.3) is (0.8, 0.2): 0.75 against 2."""
    beta = np.log([[[0.6, 0.4]]]) - 3  # a common factor of a prompt's choices says nothing
    free = np.log([[[0.9, 0.1], [0.7, 0.3]]]) - np.array([[[1], [5]]])
    assert np.exp(shots.calibrated(beta, free)).tolist() == [[pytest.approx([0.75, 2.0])]]


def test_where_there_is_no_such_choice_nothing_is_calibrated():
    beta = np.array([[[-1.0, -2.0, -np.inf], [-2.0, -1.0, -3.0]]])
    found = shots.calibrated(beta, beta[:, :1])
    assert found[0, 0].argmax() in (0, 1) and np.isneginf(found[0, 0, 2]) and not np.isnan(found).any()


def test_a_score_that_is_no_number_is_the_lowest(tmp_path, flags, monkeypatch):
    settings = shots.Settings(f"{tmp_path}/base.pt", f"{tmp_path}/data", dtype="float32", items=1)
    scored = np.array([[[np.nan, -np.inf, -2.0]]] * 3)
    monkeypatch.setattr(shots, "score_templates", lambda *_: scored)
    _, arrays = shots.measure(settings, shots.Run("test", "movies", "zero", "chat"))
    assert arrays["beta"].tolist() == [[[-np.inf, -np.inf, -2.0]]] * 3


@pytest.mark.parametrize("n_features", [0, 5])  # biases alone; the probe
def test_a_fit_is_at_the_minimum_of_its_loss(n_features):
    """The loss is convex, so its minimum is where its slope is 0."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(12, n_features, generator=dice, dtype=torch.float64)
    offset = torch.randn(12, 3, generator=dice, dtype=torch.float64)
    labels = torch.arange(12) % 3
    w, b = shots.fit(x, labels, offset)
    slope = (offset + x @ w.T + b).softmax(-1) - torch.nn.functional.one_hot(labels, 3)  # in the logits
    torch.testing.assert_close(slope.T @ x + w, torch.zeros_like(w), rtol=0, atol=1e-4)
    torch.testing.assert_close(slope.sum(0), torch.zeros_like(b), rtol=0, atol=1e-4)


# --- rivals ---


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in shots.ADD]
    + [(name, torch.bfloat16) for name in shots.ADD if name != "full"],  # it trains what it holds, in float32
)
def test_a_rival_starts_from_the_base_and_learns(name, dtype, tmp_path):
    """A soft prompt is text before the question, so it starts from the base behind some tokens."""
    model = make_llama(block_size=512).to(dtype)
    rows = shots.read_task(write_sets(tmp_path), "movies", "train")[:4]
    before = shots.score_templates(model, rows)
    soft = range(257, 257 + shots.N_PROMPT) if name == "prompt" else ()
    model.requires_grad_(False)
    trained = shots.ADD[name](model)
    for p in trained:
        p.requires_grad_(True)
        assert p.dtype == torch.float32
    if name == "prompt":
        prompt, embedding = model.model.embed_tokens.prompt, model.model.embed_tokens.embedding.weight
        ids = [(embedding == row).all(1).nonzero()[0].item() for row in prompt]
        before = shots.score_templates(make_llama(block_size=512).to(dtype), rows, soft=ids)
    np.testing.assert_array_equal(shots.score_templates(model, rows, soft=soft), before)
    shots.train_on(model, shots.pairs_to_learn(model.tokenizer, rows, soft), lr=1e-2, steps=3)
    assert np.abs(shots.score_templates(model.eval(), rows, soft=soft) - before).max() > 1e-4
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}


# --- the runs ---


def test_the_list_of_runs_has_none_twice_and_products_test_in_none():
    settings = shots.Settings()
    chosen = fewshot.Chosen("chat", "free", {"ia3": 1e-2} | dict.fromkeys(shots.RIVALS, 1e-3))
    to_choose = fewshot.runs_of_formats(settings) + fewshot.runs_of_rates(settings)
    to_report = fewshot.runs_to_report(settings, chosen)
    assert {(run.split, run.task) for run in to_choose} == {("val", "products")}
    assert {run.split for run in to_report} == {"test"} and "products" not in {run.task for run in to_report}
    assert len(set(to_choose + to_report)) == len(to_choose + to_report)
    for task, seed in itertools.product(settings.tasks, range(5)):
        assert shots.Run("test", task, "ia3", "plain", 32, 3e-3, 100, seed=seed) in to_report
        assert shots.Run("test", task, "icl", "chat", 32, seed=seed) in to_report


def test_the_whole_of_it_stopped_and_gone_on_with(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)
    data = tmp_path / "data"
    out = tmp_path / "out"

    def stage(*more):
        status = fewshot.main([*flags, "--quick", "--dtype=float32", "--stage", *more])
        return status, *capsys.readouterr()

    def choose():
        found, _ = fewshot.read_runs(out / "quick")
        quick = shots.Settings(seeds=(0,), ks=(2, 4, 6), k=4, steps=2)
        return fewshot.choose(fewshot.tried_on_products(found, quick))

    for split in ("test", "val"):  # what no stage before runs may open
        for path in data.glob(f"*/choices-*/{split}.jsonl"):
            if split == "test" or "products" not in str(path):
                path.rename(f"{path}.hidden")
    assert stage("runs")[0] == 2  # nothing is chosen yet
    assert stage("formats")[0] == 0
    assert choose().rates == {}
    status, text, _ = stage("rates", "--minutes", "0")
    assert status == 0 and "runs of" in text
    status, text, _ = stage("rates")
    assert status == 0 and "all runs are done" in text
    results, _ = lab.load_runs(out / "quick", shots.Run, shots.Result)
    about = json.loads((out / "quick/run.json").read_text())
    assert about["arguments"]["stage"] == "rates" and about["data_hash"].keys() == {"products"}
    assert about["figures"].items() <= {lab.run_name(job): vars(result) for job, result in results.items()}.items()
    assert choose().rates.keys() == {"ia3", *shots.RIVALS}
    status, text, _ = stage("report")
    assert status == 0 and "| movies | not all draws are run |" in text
    for path in data.glob("*/choices-*/*.hidden"):
        path.rename(str(path).removesuffix(".hidden"))
    assert stage("runs")[0] == 0
    assert "all runs are done" in stage("runs", "--minutes", "0")[1]
    assert stage("costs")[0] == 0
    costs = lab.read_rows(out / "quick/costs.csv", fewshot.Cost)
    assert [cost.prefix_flops > 0 for cost in costs] == [False, True, True, True]  # nothing stands before K = 0
    (tmp_path / "base.pt").rename(tmp_path / "away.pt")  # a report reads files of runs alone
    status, text, _ = stage("report")
    assert status == 0 and text.strip() == (out / "quick/table.md").read_text().strip()
    assert "| full | movies |" in text and "| prompt | movies |" in text
    assert "| movies |" in text and "draws are run" not in text and (out / "quick/accuracy.png").stat().st_size > 1000
    assert (out / "quick/costs.png").stat().st_size > 1000

    results, arrays = lab.load_runs(out / "quick", shots.Run, shots.Result)
    for job, result in results.items():  # the accuracy of every run again, from its arrays
        run = arrays[job]
        assert run["beta"].shape == (3, 8, 2) and run["labels"].tolist() == [0, 1] * 4
        medians = sorted((beta.argmax(-1) == run["labels"]).mean() for beta in run["beta"])
        assert result.accuracy == medians[1] and result.diverged == 0
    zero = next(job for job in results if (job.method, job.split, job.form) == ("zero", "test", "plain"))
    rows = [json.loads(line) for line in (data / "movies/choices-3/test.jsonl").read_text().splitlines()[:8]]
    examples = [([*row["prompt"].encode()], [[*c.encode()] for c in row["choices"]], 0) for row in rows]
    found = ranking.scores(common.load(tmp_path / "away.pt"), ranking.Choices(examples))
    np.testing.assert_allclose(arrays[zero]["beta"][2], found, rtol=1e-4)
    assert {"biases-4-0", "probe-6-0"} <= arrays[zero].keys()


def test_runs_on_other_sentences_are_another_folders(tmp_path, capsys, flags, monkeypatch):
    monkeypatch.setattr(lab, "make_runs", lambda *_: {})
    monkeypatch.setattr(lab, "write_runs_json", lambda *_: None)
    for _ in range(2):
        assert fewshot.main([*flags, "--dtype=float32", "--stage=formats"]) == 0
    path = tmp_path / "data/products/choices-2/train.jsonl"
    path.write_text(path.read_text().replace("dull", "droll"))
    capsys.readouterr()
    assert fewshot.main([*flags, "--dtype=float32", "--stage=rates"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_hashed_is_train_and_every_split_that_is_scored(tmp_path):
    settings = shots.Settings(data=str(write_sets(tmp_path)))
    tokenizer = make_llama().tokenizer
    hashes = []
    for split in ("train", "test", "val"):
        pairs = shots.pairs_to_learn(tokenizer, shots.read_task(tmp_path, "movies", split))
        hashes.append(pairs.data_hash()[:16])
    runs = [shots.Run(split, "movies", "zero") for split in ("val", "test")]
    for some, expected in ((runs[:1], hashes[::2]), (runs[1:], hashes[:2]), (runs, hashes)):
        assert fewshot.hash_data(some, settings, tokenizer) == {"movies": "".join(expected)}


def test_the_demonstration_leaves_vectors_that_give_what_it_printed(tmp_path, capsys, flags):
    out = tmp_path / "out"
    assert fewshot_demo.main([*flags, "--steps=3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " %   " in line]
    words = ["zero-shot", "16 examples", "(IA)³ from the same 16", "(IA)³ from 32", "(IA)³ from 32, merged"]
    assert len(rows) == 5 and all(row.startswith(start) for row, start in zip(rows, words, strict=True))
    model = common.load(tmp_path / "base.pt")
    model.ia3 = IA3.load(out / "ia3.npz", model)
    assert all((p != 1).any() for p in model.ia3.parameters())
    val = shots.read_task(tmp_path / "data", "movies", "val")
    for row, built in ((rows[3], model), (rows[4], model), (rows[4], common.load(out / "merged.pt"))):
        assert f" {fewshot_demo.share_right(built, val):.1%}".replace("%", " %") in row
    assert (out / "fewshot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "script, wrong, why",
    [
        (fewshot_demo, "--steps=0", "steps must be at least 1"),
        (fewshot_demo, "--base=mute.pt", "names no tokenizer"),
        (fewshot_demo, "--base=wild.pt", "try a smaller --lr"),  # diverged, and not a result
        (serving, "--items=0", "items must be at least 1, not 0"),
        (serving, "--base=gpt.pt --items=7", "multiple of the 2 labels"),  # told before training, which wants a Llama
        (serving, "--base=gpt.pt --items=8 --k=4", "Llama"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_saved(tmp_path, capsys, flags, monkeypatch, script, wrong, why):
    monkeypatch.chdir(tmp_path)
    common.save(make_gpt(block_size=4096), "gpt.pt")
    model = make_llama(block_size=4096)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # the loss is no number
    common.save(model, "wild.pt")
    model.tokenizer = None
    common.save(model, "mute.pt")
    assert script.main([*flags, *wrong.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{script.__name__.split('.')[-1]}.py: ") and err.count("\n") == 1 and why in err, err
    assert not list((tmp_path / "out").glob("*"))


def test_three_tasks_learned_and_served_in_one_batch(tmp_path, capsys, flags):
    out = tmp_path / "out"
    assert serving.main([*flags, "--k=4", "--steps=3", "--items=8"]) == 0
    assert capsys.readouterr().out.strip().endswith((out / "table.md").read_text().strip())
    rows = lab.read_csv(out / "results.csv", SERVED)
    assert [(row["task"], row["mixed"], row["merged"]) for row in rows] == [(task, 8, 8) for task in serving.TASKS]
    model = common.load(tmp_path / "base.pt")
    learned = [IA3.load(out / f"{task}.npz", model) for task in serving.TASKS]
    for a, b in itertools.combinations(learned, 2):
        assert not torch.equal(a.l_ff, b.l_ff)
    for vectors, row in zip(learned, rows, strict=True):
        model.ia3 = vectors
        drawn = shots.draw(shots.read_task(tmp_path / "data", row["task"], "val"), 8, 0)
        found = shots.score_templates(model, drawn)[0].argmax(-1)
        assert row["its vectors"] == (found == [item.label for item in drawn]).mean()


def draws(*shares):
    """A draw per share: in each of three templates so many of ten answers are right."""
    return [np.stack([np.arange(10) < 10 * share] * 3) for share in shares]


def test_a_rival_is_compared_on_its_own_draws_and_only_when_all_are_run():
    settings = shots.Settings()
    chosen = fewshot.Chosen("plain", "free", {"ia3": 3e-3, "full": 3e-5, "lora4": 1e-3})
    ours = draws(0.5, 0.6, 0.4, 0.9, 0.9)
    theirs = draws(0.4, 0.4, 0.4)  # rivals have the first three draws
    rows = {
        Row("ia3", k=32, lr=3e-3, steps=100): {"movies": ours, "news": ours[:4]},
        Row("full", k=32, lr=3e-5, steps=100): {"movies": theirs, "news": theirs},
        Row("lora4", k=32, lr=1e-3, steps=100): {"movies": theirs[:2]},
    }
    whole = fewshot_tables.only_whole(rows, fewshot.runs_to_report(settings, chosen))
    (line,) = fewshot_tables.beside_rivals(whole, settings, chosen).splitlines()[2:]
    assert line.startswith("| 0.003 | full | movies | 50.0 | 40.0 | +10.0 (")


def test_what_training_saves_by_hand():
    ours = fewshot.Cost(0, 0, 100, 0, 0, 0, 0, 0.0, 5000, 2_000_000)
    costs = [ours, ours._replace(k=4, flops=150, prefix_flops=1000)]
    table, *_ = fewshot_tables.cost_table(costs)
    of_k = {line.split(" | ")[0]: line.removesuffix(" |").split(" | ") for line in table.splitlines()}
    assert of_k["| 0"][-2:] == ["", ""]
    # cached: training costs 4000 more than filling the cache, and saves 50; anew it saves 1050 of 5000, 4.8
    assert of_k["| 4"][-2:] == ["80 predictions", "5 predictions"]


def test_the_committed_table_is_what_the_report_makes_of_the_committed_files(tmp_path):
    folder = lab.RESULTS / "fewshot"
    fewshot.report(shots.Settings(), folder, tmp_path)
    assert (folder / "table.md").read_text(encoding="utf-8") == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000 and (tmp_path / "costs.png").stat().st_size > 10_000


def test_the_committed_table_of_serving_is_its_results():
    folder = lab.RESULTS / "serving"
    made = serving.table(lab.read_csv(folder / "results.csv", SERVED), argparse.Namespace(k=32, steps=300))
    assert (folder / "table.md").read_text(encoding="utf-8") == made + "\n"
