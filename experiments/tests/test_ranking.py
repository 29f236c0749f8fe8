"""Rank classification and the paper's three losses (sections 3.1, 3.2), against brute force, and their command."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch

import common
import train
from conftest import make_gpt, make_ia3, make_llama
from data.tokenizer import Tokenizer
from experiments import ranking

ROWS = [
    {"prompt": "Q: ", "choices": ["yes", "no, \0ever", "\0o"], "label": 1},  # token 0 is a token like any other
    {"prompt": "And: ", "choices": ["up", "vp"], "label": 0},
]


def write(folder, rows, names=("train", "val")):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def split(tmp_path):
    return ranking.load_choices(write(tmp_path, ROWS) / "train.jsonl", Tokenizer("bytes", 257), 16)


def log_p_by_hand(model, prompt, choice):
    """log p of each of the choice's tokens, one forward pass a token, nothing padded."""
    ids = list((prompt + choice).encode())
    out = []
    for t in range(len(prompt), len(ids)):
        out.append(model(torch.tensor([ids[:t]]))[0][0, -1].log_softmax(-1)[ids[t]].item())
    return out


def test_the_three_losses_are_the_papers_formulas(split):
    """Section 3.2, by hand: float64, so that only the order of sums differs, 1e-12 of a few nats."""
    model = make_gpt().double()
    lm, ul, ln, right, wrong = 0.0, 0.0, [], 0, 0
    for row in ROWS:
        log_p = [log_p_by_hand(model, row["prompt"], choice) for choice in row["choices"]]
        beta = [math.exp(sum(lp) / len(lp)) for lp in log_p]
        ln.append(-math.log(beta[row["label"]] / sum(beta)))
        for n, lp in enumerate(log_p):
            if n == row["label"]:
                lm, right = lm - sum(lp), right + len(lp)
            else:
                ul, wrong = ul - sum(math.log(1 - math.exp(v)) for v in lp), wrong + len(lp)
    truth = {"lm": lm / right, "ul": ul / wrong, "ln": sum(ln) / 2}
    assert (right, wrong) == (11, 7)
    batch = split.windows([0, 1])
    for name, value in truth.items():
        assert ranking.make_loss([name])(model, *batch).item() == pytest.approx(value, rel=1e-11), name
    assert ranking.make_loss()(model, *batch).item() == pytest.approx(sum(truth.values()), rel=1e-11)


def test_no_choice_is_ever_sure_enough_to_make_a_loss_or_a_gradient_infinite():
    log_p = torch.tensor([[[-0.1, 0.0], [0.0, -200.0]]], requires_grad=True)  # p = 1 and p = 0 in a wrong choice
    there, labels = torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([0])
    loss = ranking.loss_ul(log_p, there, labels)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-6) / 2, rel=1e-3)
    assert log_p.grad.isfinite().all() and (log_p.grad[0, 0] == 0).all()


def mixed_examples(seed):
    """40 examples of prompts of 1 to 9 tokens, two choices or three, of 1 to 4 tokens."""
    dice = np.random.default_rng(seed)
    examples = []
    for i in range(40):
        choices = [dice.integers(1, 257, n).tolist() for n in ((1, 4) if i % 3 else (3, 1, 2))]
        examples.append((dice.integers(1, 257, 1 + i % 9).tolist(), choices, i % 2))
    return examples


@pytest.mark.parametrize("prefix", [[], [9, 8, 7, 6, 5]])
def test_a_prompt_read_once_behind_a_prefix_is_scored_as_if_each_choice_were_read_alone(make_model, prefix):
    """float64, so that only the order of sums differs. Several batches go on from the same prefix."""
    model = make_model(block_size=64).double()
    make_ia3(model)
    examples = mixed_examples(0)
    found = ranking.scores(model, ranking.Choices(examples), prefix)
    whole = ranking.Choices([([*prefix, *prompt], choices, label) for prompt, choices, label in examples])
    x, y, _ = whole.windows(range(len(examples)))
    expected = ranking.normalized(*ranking.token_log_likelihoods(model, x, y))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_padded_prompts_read_once_give_the_same_loss_and_gradients():
    """The gradient of a key in the prompt is the sum over the choices that look at it; none comes from padding."""
    llama = make_llama(block_size=64).double()
    vectors = make_ia3(llama).double()  # float32 gradients would be rounded
    found = []
    ways = ((ranking.Choices, ranking.token_log_likelihoods), (ranking.SharedPrompts, ranking.choice_log_likelihoods))
    for split, log_likelihoods_of in ways:
        vectors.zero_grad()
        batch = split(mixed_examples(1)).windows(range(17))
        loss = ranking.make_loss(log_likelihoods_of=log_likelihoods_of)(llama, *batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in vectors.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


LEARNABLE = [
    {"prompt": "\n", "choices": ["aXb", "aYb"], "label": 1},
    {"prompt": "\n", "choices": ["cYd", "cXd"], "label": 0},
]


def test_training_learns_the_right_choices(tmp_path, capsys):
    folder = write(tmp_path / "d", LEARNABLE)
    common.save(make_gpt(), tmp_path / "base.pt")
    flags = f"--data {folder} --base {tmp_path}/base.pt --device cpu --steps 30 --lr 0.1"
    for losses in ("lm", "ul", "ln"):
        assert ranking.main([*flags.split(), "--losses", losses, "--out", f"{tmp_path}/{losses}"]) == 0
        assert "accuracy: 100.0%, " in capsys.readouterr().out, losses
    before = (tmp_path / "lm/ia3.npz").read_bytes()
    assert ranking.main([*flags.split(), "--out", f"{tmp_path}/lm"]) == 2
    assert "--out" in capsys.readouterr().err and (tmp_path / "lm/ia3.npz").read_bytes() == before
    go_on = ["--k", "1", "--ia3", f"{tmp_path}/lm/ia3.npz", "--out", f"{tmp_path}/on"]
    assert ranking.main([*flags.split(), *go_on]) == 0


def read_predictions(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_predictions_are_the_scores_of_the_vectors_that_were_saved(tmp_path, capsys):
    """Learned on three seeds, then evaluated again from the files, and by the base: only the named file is read."""
    folder = write(tmp_path / "d", ROWS * 4, ("train",))
    write(folder, ROWS, ("val",))
    common.save(make_gpt(), tmp_path / "base.pt")
    flags = [f"--data={folder}", f"--base={tmp_path}/base.pt", "--device=cpu", "--steps=3", "--lr=0.5"]
    assert ranking.main([*flags, "--k=2", "--seeds", "0", "1", "2", f"--out={tmp_path}/run"]) == 0
    shares = [float(share) for share in re.findall(r"seed \d: ([0-9.]+)%", capsys.readouterr().out)]

    write(folder, ROWS, ("test",))
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").rename(tmp_path / f"{name}.jsonl")
    for seed in range(3):
        npz = f"{tmp_path}/run/seed-{seed}/ia3.npz"
        assert ranking.main([*flags, "--evaluate", "--test", f"--ia3={npz}", f"--out={tmp_path}/on{seed}"]) == 0
        learned = read_predictions(tmp_path / f"run/seed-{seed}/predictions-val.csv")
        again = read_predictions(tmp_path / f"on{seed}/predictions-test.csv")
        assert again == learned  # test holds the same rows
        right = sum(row["gold"] == row["chosen"] for row in learned)
        assert shares[seed] == pytest.approx(100 * right / 2, abs=0.05)
        about = json.loads((tmp_path / f"run/seed-{seed}/run.json").read_text())
        assert about["figures"] == {"ranked": "val", "n_items": 2, "accuracy": right / 2}
        assert (about["arguments"]["seed"], about["arguments"]["lr"], about["arguments"]["k"]) == (seed, 0.5, 2)
        assert sorted(path.name for path in (tmp_path / f"on{seed}").iterdir()) == ["predictions-test.csv", "run.json"]
        about = json.loads((tmp_path / f"on{seed}/run.json").read_text())
        assert about["figures"] == {"ranked": "test", "n_items": 2, "accuracy": right / 2}
        assert (about["arguments"]["ia3"], about["data_hash"]) == (npz, None)
    assert ranking.main([*flags, "--evaluate", "--test", f"--out={tmp_path}/base"]) == 0
    row = read_predictions(tmp_path / "base/predictions-test.csv")[1]
    assert (row["item"], row["gold"], row["log_likelihood_2"]) == ("1", "0", "")
    found = [float(row[f"log_likelihood_{n}"]) for n in range(2)]
    both = [log_p_by_hand(make_gpt(), ROWS[1]["prompt"], choice) for choice in ROWS[1]["choices"]]
    assert found == pytest.approx([sum(lp) / len(lp) for lp in both], rel=1e-5)  # float32's rounding
    assert ranking.main([*flags, "--evaluate", "--test", f"--out={tmp_path}/base"]) == 2
    assert "predictions-test.csv" in capsys.readouterr().err


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_an_evaluation_and_a_training_do_not_share_a_folder(tmp_path, capsys, n_seeds):
    """There is one run.json in it."""
    folder = write(tmp_path / "d", ROWS, ("train", "val", "test"))
    common.save(make_gpt(), tmp_path / "base.pt")
    flags = [f"--data={folder}", f"--base={tmp_path}/base.pt", "--device=cpu", "--steps=1"]
    training = [*flags, "--seeds", *map(str, range(n_seeds))]
    evaluation = [*flags, "--evaluate", "--test"]
    for name, first, second in (("a", training, evaluation), ("b", evaluation, training)):
        assert ranking.main([*first, f"--out={tmp_path}/{name}"]) == 0
        before = read_files(tmp_path / name)
        capsys.readouterr()
        assert ranking.main([*second, f"--out={tmp_path}/{name}"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "name another --out" in err
        assert read_files(tmp_path / name) == before


def count_calls(monkeypatch, name, last=None):
    """Count the calls of ranking's function name in the list that is returned; the last is a Ctrl-C instead."""
    calls = []
    usual = getattr(ranking, name)

    def call(*args):
        calls.append(name)
        if len(calls) == last:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(ranking, name, call)
    return calls


N_LOSSES = 5  # of a seed with three steps: val before, the steps, val after


@pytest.mark.parametrize(
    "name, last, n_left",
    [
        ("loss_ln", N_LOSSES + 1, 2 * N_LOSSES),  # in seed 1, before its first checkpoint
        ("loss_ln", N_LOSSES + 4, 2 * N_LOSSES - 1),  # in its last step
        ("scores", 2, N_LOSSES),  # trained, but not ranked
        ("write_run_json", 2, N_LOSSES),  # ranked, but not written down
    ],
)
def test_the_same_command_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch, name, last, n_left):
    folder = write(tmp_path / "d", ROWS * 4)
    common.save(make_gpt(), tmp_path / "base.pt")
    flags = [f"--data={folder}", f"--base={tmp_path}/base.pt", "--device=cpu", "--steps=3", "--lr=0.5", "--k=4"]
    names = [f"seed-{seed}/{file}" for seed in range(3) for file in ("ia3.npz", "predictions-val.csv")]
    command = [*flags, "--seeds", "0", "1", "2", f"--out={tmp_path}/whole"]
    assert ranking.main(command) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("seed", "val", "95"))]

    command[-1] = f"--out={tmp_path}/run"
    with monkeypatch.context() as patch:
        count_calls(patch, name, last)
        assert ranking.main(command) == 130
    capsys.readouterr()
    calls = count_calls(monkeypatch, "loss_ln")
    assert ranking.main(command) == 0
    assert len(calls) == n_left  # seed 0 is not trained again, nor what is done of seed 1
    found = capsys.readouterr().out.splitlines()
    assert [line for line in found if line.startswith(("seed", "val", "95"))] == told
    for file in names:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file

    calls.clear()
    rankings = count_calls(monkeypatch, "scores")
    for seeds in ("2 3 0", "1", "4"):
        assert ranking.main([*flags, "--seeds", *seeds.split(), f"--out={tmp_path}/run"]) == 0
    assert len(calls) == 2 * N_LOSSES and len(rankings) == 2  # seeds 3 and 4
    there = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert there == ["about.json", *(f"seed-{n}" for n in range(5))]


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path, capsys):
    """Of other settings, of another command, or damaged: refused in one line, before anything is trained."""
    folder = write(tmp_path / "d", ROWS, ("train", "val", "test"))
    for name, base in (("base", make_gpt(0)), ("other", make_gpt(1))):
        common.save(base, tmp_path / f"{name}.pt")
    flags = [f"--data={folder}", f"--base={tmp_path}/base.pt", "--device=cpu", "--steps=1", "--k=2"]
    flags += [f"--out={tmp_path}/run"]
    assert ranking.main(flags) == 0
    write(tmp_path / "others", ROWS * 2)

    def check_refused(*more):
        before = read_files(tmp_path / "run")
        capsys.readouterr()
        assert ranking.main([*flags, *more]) == 2, more
        err = capsys.readouterr().err
        assert err.startswith("ranking.py: ") and err.count("\n") == 1 and str(tmp_path / "run") in err, err
        assert read_files(tmp_path / "run") == before
        return err

    different = ["--lr=0.2", "--k=1", "--steps=2", "--losses=lm", "--batch-size=2", "--test", "--seeds=1"]
    different += [f"--ia3={tmp_path}/run/ia3.npz", f"--data={tmp_path}/others", f"--base={tmp_path}/other.pt"]
    for flag in different:
        assert "name a new --out" in check_refused(flag)
    assert "holds runs with lr 0.1, not 0.2: name a new --out" in check_refused("--lr=0.2", "--seeds", "0", "1")
    assert "name a new --out" in check_refused("--seeds", "0", "1")  # which would train seed 0 again, in a folder
    vectors = (tmp_path / "run/ia3.npz").read_bytes()
    first = [*flags[:-1], f"--ia3={tmp_path}/first.npz", f"--out={tmp_path}/more", "--seeds"]
    (tmp_path / "first.npz").write_bytes(vectors)
    assert ranking.main([*first, "0", "1"]) == 0
    (tmp_path / "first.npz").write_bytes((tmp_path / "more/seed-1/ia3.npz").read_bytes())
    assert ranking.main([*first, "0", "1", "2"]) == 2 and "first_vectors" in capsys.readouterr().err

    (tmp_path / "run/run.json").write_text("[]")
    assert "run.json is not what this command wrote" in check_refused()
    (tmp_path / "run/about.json").unlink()
    for name in ("predictions-val.csv", "ia3.npz", "last.pt", "run.json"):
        assert f"another run's {name}" in check_refused()
        (tmp_path / "run" / name).unlink()


@pytest.mark.parametrize("n_right, n", [(0, 10), (3, 10), (50, 50), (160, 200)])
def test_wilsons_interval_is_where_the_share_is_1_96_standard_errors_away(n_right, n):
    """Its definition: at each end p, |share - p| = 1.96 sqrt(p (1 - p) / n); p = 0 or 1 where the share is."""
    share = n_right / n
    for end in ranking.wilson(share, n):
        assert abs(share - end) == pytest.approx(1.96 * math.sqrt(abs(end * (1 - end)) / n), abs=1e-7)


def test_the_k_examples_are_drawn_from_the_seed_as_many_of_each_label_as_there_are():
    many = ranking.Choices([([i], [[1], [2], [3]], min(i % 10, 2)) for i in range(50)])  # 5, 5 and 40 of a label
    drawn = [ranking.draw_examples(many, 12, seed).examples for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for k, expected in ((12, [4, 4, 4]), (4, [2, 1, 1]), (20, [5, 5, 10]), (50, [5, 5, 40])):
        found = ranking.draw_examples(many, k, 0).examples
        labels = [label for _, _, label in found]
        assert sorted(labels.count(label) for label in range(3)) == sorted(expected)
        assert len({prompt[0] for prompt, _, _ in found}) == k and found[:4] == drawn[0][:4]
    for k in (0, 51):
        with pytest.raises(ValueError, match="50 examples, not"):
            ranking.draw_examples(many, k, 0)


GOOD = {"prompt": "a", "choices": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: "),
        ("[1]", "line 2: "),
        (json.dumps({"prompt": "a", "completion": "b"}), "line 2: "),
        (json.dumps(GOOD | {"choices": "bc"}), "line 2: "),
        (json.dumps(GOOD | {"choices": ["b", 1]}), "line 2: "),
        (json.dumps(GOOD | {"choices": ["b"]}), "line 2: "),
        (json.dumps(GOOD | {"label": 2}), "line 2: label 2"),
        (json.dumps(GOOD | {"label": -1}), "line 2: label -1"),
        (json.dumps(GOOD | {"label": True}), "line 2: label True"),
        (json.dumps(GOOD | {"label": "0"}), "line 2: label '0'"),
        (json.dumps(GOOD | {"choices": ["b", ""]}), "line 2: "),
        (json.dumps(GOOD | {"prompt": ""}), "line 2: "),
        (json.dumps(GOOD | {"choices": ["b", "c" * 17]}), "line 2: 18 tokens"),
        (None, "train.jsonl"),
    ],
)
def test_choices_that_are_none_are_refused_with_their_line(tmp_path, line, message):
    text = "\n" if line is None else json.dumps(GOOD) + "\n" + line + "\n"
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"train\.jsonl") as e:
        ranking.load_choices(tmp_path / "train.jsonl", Tokenizer("bytes", 257), 16)
    assert message in str(e.value)


def test_a_text_that_the_tokenizer_fails_on_is_refused_with_its_line(tmp_path, monkeypatch):
    def fail(text):
        raise ValueError("too long a text")

    tokenizer = Tokenizer("bytes", 257)
    monkeypatch.setattr(tokenizer, "encode_ordinary", fail)
    with pytest.raises(ValueError, match=r"train\.jsonl line 1: too long a text"):
        ranking.load_choices(write(tmp_path, ROWS) / "train.jsonl", tokenizer, 16)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--k 3", "2 examples, not 3"),
        ("--losses lm,lm", "each once, not lm,lm"),
        ("--ia3=", "No such file"),
        ("--out=", "empty"),
        ("--losses lm,xx", "each once, not lm,xx"),
        ("--steps 0", "steps must be"),
        ("--seeds 1 1", "--seeds"),
        ("--test", "test.jsonl"),
        ("--data {folder}/nowhere", "nowhere"),
        ("--base {folder}/nowhere.pt", "nowhere.pt"),
    ],
)
def test_bad_flags_are_told_in_one_line(tmp_path, capsys, flags, message):
    common.save(make_gpt(), tmp_path / "base.pt")
    folder = write(tmp_path / "d", ROWS)
    given = ["--base", f"{tmp_path}/base.pt", "--data", str(folder), "--out", f"{tmp_path}/run"]
    assert ranking.main([*given, *flags.format(folder=tmp_path).split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ranking.py: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "run").exists()


def test_train_sends_choices_to_the_command_that_ranks_them(tmp_path, capsys):
    folder = write(tmp_path / "d", ROWS)
    common.save(make_gpt(), tmp_path / "base.pt")
    assert train.main(["--base", f"{tmp_path}/base.pt", "--data", str(folder), "--out", f"{tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"python -m experiments.ranking --data {folder}" in err
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_logits_of_a_bfloat16_model_are_not_rounded_to_it():
    """A logit of 20 would be a multiple of 1/8, and choices would tie. float64 of the same weights is the truth."""
    model = make_gpt().bfloat16()
    model.lm_head.weight.normal_()
    hidden, y = torch.randn(1, 3, model.config.n_embd).bfloat16(), torch.tensor([[4, 9, 200]])
    found, _ = ranking.log_likelihoods(model, hidden, y)
    with torch.autocast("cpu", torch.bfloat16):  # as full fine-tuning trains
        in_training, _ = ranking.log_likelihoods(model.float(), hidden, y)
    assert torch.equal(in_training, found)
    truth = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    expected = truth[0, range(3), y[0]].float().unsqueeze(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32's own rounding; bfloat16's is 1e-2
