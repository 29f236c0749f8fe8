"""The loop: what moves and what does not, that parts add up to a batch, and that nothing is lost when a run ends early.

What takes processes, a compiler or minutes is in test_train_slow.py; kills are in test_crashes.py.
"""

import copy
import io
import json
import math
import shlex
import shutil
import signal
import subprocess
import threading
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import data as datasets
import merge
import run_folder
import sample
from conftest import (
    ROOT,
    end_texts_early,
    load_vectors,
    make_gpt,
    make_ia3,
    make_llama,
    read_metrics,
    same,
    write_run,
)
from data.tokenizer import Tokenizer
from ia3 import IA3, attach, fingerprint
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from run_folder import write_run_json
from train import (
    TrainConfig,
    build,
    default_lr,
    evaluate,
    get_batch,
    learning_rate,
    lm_loss,
    main,
    parse,
    prepare_folder,
    train,
)


def make_text():
    """A small text that repeats itself, so that there is something to learn."""
    tokens = np.frombuffer(b"In the beginning God created the heaven and the earth. " * 20, dtype=np.uint8)
    return {"train": datasets.Stream(tokens, 16), "val": datasets.Stream(tokens[:99], 16)}


@pytest.fixture
def text():
    return make_text()


def config(**changes):
    return TrainConfig(**{"lr": 0.1, "steps": 3, "batch_size": 4, "eval_interval": 2} | changes)


def with_vectors(model):
    attach(model)
    return model


def fresh(dropout=0.1):
    return with_vectors(make_gpt(dropout=dropout))


def stop_after(n_steps):
    """A should_stop, which train asks before every step."""
    answers = iter([False] * n_steps + [True])
    return lambda: next(answers)


def test_only_the_vectors_move_and_the_base_is_bitwise_unchanged(make_model, text, device):
    model = make_model().to(device)
    vectors = attach(model)
    before = copy.deepcopy(model.state_dict())
    history = train(model, text, config(steps=5))
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) != name.startswith("ia3."), name
    # every value moves but those whose gradient is zero to rounding
    assert all((p != 1).float().mean() > 0.99 for p in vectors.parameters())


def test_full_fine_tuning_moves_every_tensor(make_model, text):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    train(model, text, config())
    assert not any(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", [GPT, Llama])
def test_a_new_model_learns(text, kind):
    """From ln 257 = 5.5 nats to less than the letters' own entropy in this text, 2.8: it has learned their order."""
    torch.manual_seed(0)
    if kind is GPT:
        model = GPT(GPTConfig(16, 257, n_layer=1, n_head=2, n_embd=32))
    else:
        sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "n_hidden": 64}
        model = Llama(LlamaConfig(16, 257, **sizes, rope_base=1e4, norm_eps=1e-5, tied=False))
    history = train(model, text, config(steps=60, lr=1e-2, batch_size=8, eval_interval=60))
    assert 5.4 < history[0]["val_loss"] < 5.7 and history[-1]["val_loss"] < 2.7


def test_a_run_is_adamw_on_the_batches_of_its_steps(text):
    """By hand: clip to the norm, then Adam's equations (Kingma and Ba 2015, algorithm 1), without decay for vectors.

    In float64, where the order of sums costs 1e-12 of a gradient; where that is near Adam's ε of 1e-8, 1e-4 of it.
    """
    c = config(steps=4, lr=0.05, grad_clip=0.5)
    model = make_gpt().double()
    vectors = attach(model).double()
    train(model, text, c)

    plain = make_gpt().double()
    p = attach(plain).double()
    m = {name: torch.zeros_like(l) for name, l in p.matrices().items()}
    v = {name: torch.zeros_like(l) for name, l in p.matrices().items()}
    for step in range(4):
        p.zero_grad()
        plain(*text["train"].batch(c.seed, step, c.batch_size))[1].backward()
        norm = torch.cat([l.grad.flatten() for l in p.parameters()]).norm()
        for name, l in p.matrices().items():
            g = l.grad * min(1, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g**2
            m_hat = m[name] / (1 - 0.9 ** (step + 1))
            v_hat = v[name] / (1 - 0.99 ** (step + 1))
            l.data -= learning_rate(step, c) * m_hat / (v_hat.sqrt() + 1e-8)
    for name, l in p.matrices().items():
        assert (l - vectors.matrices()[name]).abs().max() < 1e-4 * c.lr, name


def test_what_requires_a_gradient_is_trained_and_nothing_else(text):
    model = make_gpt().requires_grad_(False)
    model.transformer.ln_f.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    train(model, text, config())
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert moved == ["transformer.ln_f.weight"]


def vectors_only_assigned():
    model = make_gpt()
    model.ia3 = attach(make_gpt())
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_gpt().requires_grad_(False), r"nothing in this model requires a gradient: ia3\.attach"),
        (vectors_only_assigned, r"a base that is not frozen: ia3\.attach\(model, vectors\)"),
        (lambda: fresh().bfloat16(), r"l_k is torch.bfloat16, too coarse to train: cast the base first"),
        (lambda: fresh().half(), r"l_k is torch.float16, too coarse to train"),
    ],
    ids=["nothing to train", "vectors on a base that is not frozen", "bfloat16", "float16"],
)
def test_a_model_that_would_train_nothing_or_something_else_is_refused(text, make, message):
    with pytest.raises(ValueError, match=message):
        train(make(), text, config())


def test_same_seed_same_vectors_another_seed_others(text):
    def run(seed):
        model = make_gpt(dropout=0.1)
        vectors = attach(model)
        train(model, text, config(seed=seed))
        return {name: p.detach().numpy().copy() for name, p in vectors.matrices().items()}

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_weight_decay_pulls_base_matrices_and_never_vectors(text):
    def no_gradient(model, x, y):
        return 0 * lm_loss(model, x, y)

    model = make_gpt()
    vectors = attach(model)
    train(model, text, config(weight_decay=0.5), no_gradient)
    assert all(torch.equal(p, torch.ones_like(p)) for p in vectors.parameters())
    model = make_gpt()
    before = copy.deepcopy(model.state_dict())
    train(model, text, config(weight_decay=0.5), no_gradient)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) == (t.dim() == 1), name  # matrices shrink; biases and LayerNorms stay


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_then_falls_to_zero(schedule):
    c = config(steps=100, lr=1.0, warmup=0.1, schedule=schedule)
    rates = [learning_rate(step, c) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1 and rates[100] == pytest.approx(0, abs=1e-15)
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    quarter = 0.75 if schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * 22.5 / 90)
    assert (rates[32] + rates[33]) / 2 == pytest.approx(quarter, abs=1e-3)
    assert learning_rate(1, config(steps=1, warmup=1.0)) == pytest.approx(config().lr)


def test_evaluation_reads_every_target_once_or_evenly_spaced_windows(text):
    model = make_gpt()
    tokens = torch.from_numpy(text["val"].tokens.astype(np.int64))
    total = 0.0
    for start in range(0, 98, 16):
        piece = tokens[start : start + 17]
        total += model(piece[None, :-1], piece[None, 1:])[1].item() * (len(piece) - 1)
    assert evaluate(model, text["val"], config()) == pytest.approx(total / 98, rel=1e-5)
    x, y = text["val"].windows([0, 3, 6])  # 3 of 7, both ends among them; the last is short
    assert evaluate(model, text["val"], config(), n_windows=3) == pytest.approx(model(x, y)[1].item(), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_what_processes_add_up_lies_where_the_model_does(text, monkeypatch):
    """NCCL adds up on GPUs only. Two were never at hand."""
    seen = []
    monkeypatch.setattr("train.ranks", lambda: (0, 2))
    monkeypatch.setattr("train.dist.all_reduce", lambda total: seen.append(total.device.type))
    evaluate(make_gpt().to("cuda"), text["val"], config())
    assert seen == ["cuda"]


@pytest.fixture
def examples(tmp_path):
    """Completions of very unequal length."""
    rows = [{"prompt": "ab" * (1 + i % 3), "completion": "x" * (1 + i * i % 9)} for i in range(12)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("grad_accum", [2, 5])
def test_a_run_in_parts_is_the_run_of_whole_batches(examples, grad_accum):
    """Float64: Adam divides a gradient by its size, so an error of 1e-12 of it moves a vector by lr · 1e-12 a step."""
    data = datasets.load(examples, Tokenizer("bytes", 257), 257, 16)
    results = []
    for parts in (1, grad_accum):
        model = make_gpt().double()
        vectors = attach(model).double()
        history = train(model, data, config(batch_size=7, grad_accum=parts, lr=0.01))
        results.append([history, vectors])
    (whole, a), (parts, b) = results
    for ours, theirs in zip(whole[1:], parts[1:], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    for name, p in a.matrices().items():
        assert (p != 1).any() and (p - b.matrices()[name]).abs().max() < 1e-9


def test_token_0_is_a_target_like_others():
    """In shares of a batch and in means over windows. Float64 sums in another order differ by 1e-12."""
    zeros = datasets.Examples([([1], [0]), ([2, 3, 4], [0, 0, 0])])
    shares = [share for _, share in get_batch(zeros, 0, config(batch_size=2, grad_accum=2), torch.device("cpu"))]
    assert sorted(shares) == [1 / 4, 3 / 4]
    model = make_gpt().double()
    whole = model(*zeros.windows([0, 1]))[1].item()
    assert evaluate(model, zeros, config(batch_size=1)) == pytest.approx(whole, rel=1e-12)
    history = train(make_gpt(), {"train": zeros, "val": zeros}, config(batch_size=2, grad_accum=2, steps=1))
    assert history[-1]["train_loss"] == pytest.approx(whole, rel=1e-5)


def test_the_train_loss_is_the_mean_since_the_evaluation_before(text):
    losses = []

    def loss_fn(model, x, y):
        loss = lm_loss(model, x, y)
        if model.training:
            losses.append(loss.item())
        return loss

    c = config(steps=5)
    history = train(fresh(), text, c, loss_fn)
    assert [row["step"] for row in history] == [0, 2, 4, 5]
    assert [row["lr"] for row in history] == [learning_rate(row["step"], c) for row in history]
    assert math.isnan(history[0]["train_loss"]) and history[0]["tokens_per_second"] == 0
    found = [row["train_loss"] for row in history[1:]]
    assert found == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]], rel=1e-6)


# The command line


@pytest.fixture(scope="module", params=[make_gpt, make_llama], ids=["gpt", "llama"])
def done(request, tmp_path_factory):
    """A run of the command line: its folder's parent, the model with its vectors, and what was printed."""
    folder, flags = write_run(tmp_path_factory.mktemp("done"), request.param())
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        end_texts_early(patch)
        assert main([*flags, "--device", "auto", "--seed", "7", "--eval-windows", "1", "--out", f"{folder}/run"]) == 0
    model = common.load(folder / "base.pt")
    model.ia3 = IA3.load(folder / "run/ia3.npz", model)
    return folder, model, out.getvalue()


def test_a_run_leaves_vectors_metrics_and_a_checkpoint(done):
    folder, model, _ = done
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["ia3.npz", "last.pt", "metrics.csv", "run.json"]
    assert [row["step"] for row in read_metrics(folder / "run")] == ["0", "2", "4"]
    assert list(model.ia3.matrices()) == ["l_k", "l_v", "l_ff"] and all((p != 1).any() for p in model.ia3.parameters())


def test_a_run_prints_texts_before_and_after_and_the_loss_over_all_of_val(done, short_texts):
    folder, model, out = done
    val = datasets.load(f"{folder}/text", model.tokenizer, 257, 16)["val"]
    vectors = model.ia3
    model.ia3 = None
    before = sample.complete(model, val.prompt(64), temperature=0.5)[0]
    model.ia3 = vectors
    after = sample.complete(model, val.prompt(64), temperature=0.5)[0]
    assert before.startswith("And God") and f"\nbefore:\n{before}\n\nafter:\n{after}\n" in out
    assert out.startswith(f"{vectors.count()} values learn") and "\r" not in out
    loss = evaluate(model, val, config())  # however few windows the evaluations of the run looked at
    n = (folder / "text/val.txt").stat().st_size  # a byte is a token, and all but the first are predicted
    bits = loss * (n - 1) / n / math.log(2)
    assert f"val, all of it: {loss:.4f} nats per token, {bits:.4f} bits per byte" in out


def test_a_run_says_what_it_was(done):
    """run.json beside the results, and the rate, steps, seed and data in the file of vectors itself."""
    folder, model, _ = done
    about = json.loads((folder / "run/run.json").read_text())
    with np.load(folder / "run/ia3.npz") as file:
        saved = json.loads(file["about"].item())
    given = about["arguments"]
    assert given["seed"] == 7 and given["steps"] == 4
    assert given["sites"] == "k,v,ff" and given["device"] == str(common.pick_device("auto"))  # though no flag said so
    assert about["fingerprint"] == saved["fingerprint"] == fingerprint(model)
    assert saved["how"] == {"lr": given["lr"], "steps": 4, "seed": 7, "data_hash": about["data_hash"]}
    assert about["figures"]["n_values"] == model.ia3.count() and about["figures"]["val_loss"] > 0
    assert about["versions"]["torch"] == torch.__version__
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert (about["commit"] or "").removesuffix("-dirty") == head


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_repository_that_holds_a_copy_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "copy").mkdir()
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a paper"]):
        subprocess.run([*git, *command], check=True)
    commits = []
    for folder in (tmp_path, tmp_path / "copy"):
        monkeypatch.setattr(run_folder, "__file__", f"{folder}/run_folder.py")
        write_run_json(tmp_path / "run.json", "x.py", {}, make_gpt(), None, {})
        commits.append(json.loads((tmp_path / "run.json").read_text())["commit"])
    assert len(commits[0]) == 40 and commits[1] is None


def test_a_run_json_is_json_whatever_a_run_found(tmp_path):
    """JSON has no infinity and no NaN."""
    figures = {"diverged": math.inf, "lost": [math.nan], "loss": 1.5, "name": "Infinity"}
    write_run_json(tmp_path / "run.json", "x.py", {"minutes": math.inf}, make_gpt(), None, figures)
    text = (tmp_path / "run.json").read_text()
    about = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert about["figures"] == {"diverged": None, "lost": [None], "loss": 1.5, "name": "Infinity"}
    assert about["arguments"] == {"minutes": None}


@pytest.mark.parametrize("vocab_size", [257, 99])
def test_what_a_run_names_as_next_can_be_run(tmp_path, short_texts, capsys, vocab_size):
    """With its own data and windows; of a base whose tokenizer is not known there is nothing to sample."""
    (tmp_path / "two words").mkdir()
    folder, flags = write_run(tmp_path / "two words", make_gpt(vocab_size=vocab_size))
    (folder / "text/val.txt").write_text("And God saw")  # too short for a window of the base's 16
    if vocab_size == 99:
        for n, split in ((400, "train"), (11, "val")):
            (np.arange(n, dtype=np.uint16) % 99).tofile(folder / f"text/{split}.bin")
    assert main([*flags, "--out", f"{folder}/run", "--block-size", "8"]) == 0
    _, *commands = capsys.readouterr().out.split("next: ")[1].splitlines()  # the first makes pictures
    commands = [shlex.split(command) for command in commands]
    assert [command[1] for command in commands] == ["sample.py", "merge.py"][vocab_size == 99 :]
    for command in commands:
        script = {"sample.py": sample, "merge.py": merge}[command[1]]
        assert script.main(command[2:]) == 0


@pytest.mark.parametrize(
    "make_model, method, wanted",
    [
        (make_gpt, "--method full", make_gpt().config),
        (make_llama, "--method full", make_llama().config),
        (make_gpt, "--base scratch --n-layer 1 --n-head 3 --n-embd 12 --block-size 8", GPTConfig(8, 257, 1, 3, 12)),
    ],
    ids=["gpt", "llama", "scratch"],
)
def test_where_all_weights_learn_a_checkpoint_is_written_that_trains_on(
    tmp_path, short_texts, make_model, method, wanted
):
    folder, flags = write_run(tmp_path, make_model())
    assert main([*flags, "--out", f"{folder}/full", *method.split()]) == 0
    model, _ = build(parse([*flags, "--base", f"{folder}/full/ckpt.pt"]))
    assert model.config == wanted


def test_ia3_goes_on_from_given_vectors_or_from_ones_at_the_sites_asked_for(tiny_run):
    folder, flags = tiny_run
    given = make_ia3(make_gpt(), sites=("k", "ff"))
    given.save(folder / "given.npz")
    found = build(parse([*flags, "--ia3", f"{folder}/given.npz"]))[0].ia3.matrices()
    assert same_tensors(found, given.matrices()) and all(p.requires_grad for p in found.values())
    found = build(parse([*flags, "--sites", "k,ff"]))[0].ia3.matrices()
    assert list(found) == ["l_k", "l_ff"] and all((p == 1).all() for p in found.values())


def test_a_training_window_is_the_models_but_at_most_256_or_as_asked_for_and_crops_no_model(make_model, tiny_run):
    folder, flags = tiny_run
    (folder / "text/val.txt").write_text("And God saw the light, that it was good. " * 9)
    for block_size, more, window in ((16, [], 16), (300, [], 256), (16, ["--block-size", "8"], 8)):
        common.save(make_model(block_size=block_size), folder / "base.pt")
        model, data = build(parse([*flags, *more]))
        assert data["train"].block_size == data["val"].block_size == window
        assert model.config.block_size == block_size


@pytest.mark.parametrize(
    "make_model, more, lr",
    [
        (make_gpt, "", 0.1),
        (make_llama, "", 0.003),
        (make_gpt, "--method full", 0.001),
        (make_llama, "--method full", 0.001),
        (make_gpt, "--lr 0.5", 0.5),
    ],
)
def test_the_learning_rate_fits_the_model_where_none_is_given(tmp_path, make_model, more, lr):
    _, flags = write_run(tmp_path, make_model())
    args = parse([*flags, *more.split()])
    build(args)
    assert args.lr == lr


def test_a_gpt_of_ten_million_weights_learns_at_the_papers_rate():
    with torch.device("meta"):
        model = GPT(GPTConfig(16, 257, n_layer=4, n_head=2, n_embd=512))  # 12.7 million
    assert default_lr(model.requires_grad_(False)) == 0.003


def test_a_frozen_base_is_stored_in_bfloat16_and_its_vectors_in_float32(tiny_run, device):
    folder, flags = tiny_run
    flags += ["--out", f"{folder}/a", "--dtype", "bfloat16", "--device", device]
    model, _ = build(parse(flags))
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("ia3.") else torch.bfloat16) and p.device.type == device
    assert main(flags) == 0
    vectors = load_vectors(folder / "a/ia3.npz")
    assert all(m.dtype == np.float32 and (m != 1).any() for m in vectors.values())
    assert any((torch.from_numpy(m).bfloat16().float().numpy() != m).any() for m in vectors.values())
    state = torch.load(folder / "a/last.pt", weights_only=True)["optimizer"]["state"]
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(tiny_run, device, monkeypatch):
    folder, flags = tiny_run
    seen = set()
    linear = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        y = linear(x, weight, bias)
        seen.add((weight.dtype, y.dtype))
        return y

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    assert main([*flags, "--out", f"{folder}/a", "--dtype", "bfloat16", "--method", "full", "--device", device]) == 0
    assert (torch.float32, torch.bfloat16) in seen
    saved = torch.load(folder / "a/ckpt.pt", weights_only=True)["model"]
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_dropout_is_on_in_the_steps_and_off_in_what_comes_after(text):
    model, modes = fresh(dropout=0.5), []

    def loss_fn(m, x, y):
        modes.append(m.training)
        return lm_loss(m, x, y)

    train(model, text, config(steps=4, eval_interval=2, eval_windows=1), loss_fn)
    assert modes == [False, True, True, False, True, True, False] and not model.training


def test_every_step_has_its_own_dropout_drawn_from_the_seed(text):
    def seeds(seed):
        found = []

        def loss_fn(model, x, y):
            if model.training:
                found.append(torch.initial_seed())  # what the generator was last set to
            return lm_loss(model, x, y)

        train(fresh(), text, config(steps=5, seed=seed), loss_fn)
        return found

    assert seeds(0) == seeds(0) and len({*seeds(0), *seeds(1)}) == 10


# Nothing is lost


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history):
    """As text, since NaN is not NaN; without what depends on the clock."""
    return str([{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history])


@pytest.mark.parametrize("make", [fresh, lambda: with_vectors(make_llama())])
def test_a_run_that_is_told_to_stop_is_saved_and_resumes_to_the_same_bits(text, tmp_path, make):
    whole, first, second = make(), make(), make()
    history = train(whole, text, config(steps=9, out=f"{tmp_path}/whole"))
    stopped = train(first, text, config(steps=9, out=f"{tmp_path}/run"), should_stop=stop_after(5))
    assert [row["step"] for row in stopped] == [0, 2, 4]
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.pt", "metrics.csv"]
    (tmp_path / "run").rename(tmp_path / "moved")
    torch.manual_seed(99)  # dropout is a function of (seed, step), whatever was drawn before
    resumed = train(second, text, config(steps=9, out=f"{tmp_path}/moved", resume=True))
    assert same_tensors(whole.ia3.matrices(), second.ia3.matrices())
    assert timeless(history) == timeless(resumed)


def test_after_a_resume_the_time_left_is_told_by_the_steps_that_were_timed(text, tmp_path, monkeypatch, capsys):
    train(fresh(), text, config(steps=4, out=f"{tmp_path}/run"), should_stop=stop_after(1))
    clock = iter(range(0, 1000, 10))  # ten seconds pass between one look at it and the next
    monkeypatch.setattr("train.time", SimpleNamespace(time=lambda: next(clock)))
    capsys.readouterr()
    train(fresh(), text, config(steps=4, out=f"{tmp_path}/run", resume=True))
    assert "0:20 left" in capsys.readouterr().out.splitlines()[0]  # step 2 of 4: one was timed, two are left


def test_the_pace_and_the_time_left_are_those_since_the_last_evaluation(text, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 30))  # thirty seconds pass between one look at it and the next
    monkeypatch.setattr("train.time", SimpleNamespace(time=lambda: next(clock)))
    history = train(fresh(), text, config(steps=8))
    # two steps of four windows of sixteen tokens
    assert [row["tokens_per_second"] for row in history] == [0, *[pytest.approx(2 * 4 * 16 / 30)] * 4]
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[-2] for line in lines] == ["1:30", "1:00", "0:30", "0:00"]
    clock = iter([0, 0, 0, *[59.7] * 9])
    train(fresh(), text, config(steps=4))
    assert capsys.readouterr().out.splitlines()[1].endswith("  1:00 left")


def test_evaluation_takes_no_gradient_and_computes_as_training_does(text):
    """In bfloat16 by autocast, where weights are float32; a base that is stored in it needs none."""
    seen = set()

    def loss_fn(model, x, y):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return lm_loss(model, x, y)

    for make, wanted in ((make_gpt, True), (lambda: make_gpt().bfloat16(), False)):
        seen.clear()
        evaluate(make(), text["val"], config(dtype="bfloat16"), loss_fn)
        assert seen == {(False, wanted)}


def test_a_new_base_has_the_sizes_of_help_and_the_seeds_weights(tiny_run):
    _, flags = tiny_run
    models = [build(parse([*flags, "--base", "scratch", "--seed", seed]))[0] for seed in "001"]
    a, b, c = [model.lm_head.weight for model in models]
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert models[0].config == GPTConfig(block_size=128, vocab_size=257, n_layer=6, n_head=6, n_embd=192)


def test_a_run_without_out_goes_into_a_folder_of_its_datas_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("some/text", "text", "."):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (tmp_path / folder / f"{split}.txt").write_text("text")
    for name in ("folio", "some/text/", "some/../text", "."):
        args = parse(["--data", name])
        prepare_folder(args)
        assert args.out == f"out/{(tmp_path / name).resolve().name}"


@pytest.mark.slow
def test_compile_compiles_the_model_that_is_trained(tiny_run, monkeypatch):
    folder, flags = tiny_run
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self.ia3))
    monkeypatch.setenv("CXX", "true")
    assert main([*flags, "--out", f"{folder}/run", "--compile"]) == 0
    assert len(compiled) == 1 and compiled[0] is not None


def test_a_full_run_resumes_to_the_same_bits(make_model, text, tmp_path):
    """The base's weights, and the state of an optimizer with decay."""
    whole, first, second = make_model(), make_model(), make_model()
    train(whole, text, config(steps=5))
    train(first, text, config(steps=5, out=f"{tmp_path}/run"), should_stop=stop_after(2))
    train(second, text, config(steps=5, out=f"{tmp_path}/run", resume=True))
    assert same_tensors(whole.state_dict(), second.state_dict())


def test_train_is_callable_from_any_thread_and_leaves_signals_alone(text, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", None)  # calling it would raise
    results = []
    thread = threading.Thread(target=lambda: results.append(train(fresh(), text, config(out=f"{tmp_path}/run"))))
    thread.start()
    thread.join()
    assert [row["step"] for row in results[0]] == [0, 2, 3]


def test_metrics_are_written_anew_from_last_pt_on_resume(text, tmp_path):
    c = config(out=f"{tmp_path}/run", resume=True)
    train(fresh(), text, c)
    before = (tmp_path / "run/metrics.csv").read_bytes()
    for damage in (b"step,train_loss\n9999,1.0\n", None):
        (tmp_path / "run/metrics.csv").unlink()
        if damage is not None:
            (tmp_path / "run/metrics.csv").write_bytes(damage)
        train(fresh(), text, c)  # finished: nothing is left to do
        assert (tmp_path / "run/metrics.csv").read_bytes() == before


def test_a_run_is_not_resumed_on_other_data_another_base_or_other_settings(text, tmp_path):
    c = config(out=f"{tmp_path}/run", resume=True)
    train(fresh(), text, c)
    before = (tmp_path / "run/last.pt").read_bytes()

    def resume(model, data, message, **changes):
        with pytest.raises(ValueError, match=rf"last\.pt cannot be resumed: {message}.*; remove the folder"):
            train(model, data, config(out=f"{tmp_path}/run", resume=True, **changes))
        assert (tmp_path / "run/last.pt").read_bytes() == before

    tokens = text["train"].tokens.copy()
    tokens[7] += 1
    resume(fresh(), text | {"train": datasets.Stream(tokens, 16)}, "it is another run's: its data_hash is")
    resume(with_vectors(make_gpt(seed=1)), text, "it is another run's: its fingerprint is")
    resume(fresh(), text, "it is another run's: its seed is 0, not 1", seed=1)
    resume(fresh(), text, ".*steps is 3, not 4", steps=4)
    some = make_gpt()
    attach(some, sites=["k"])
    resume(some, text, "it trained ia3.l_k, ia3.l_v, ia3.l_ff, not ia3.l_k")
    given = fresh()
    given.ia3.l_v.data[0, 3] = 2
    resume(given, text, "it is another run's: its first_vectors is")


@pytest.fixture(scope="module")
def last_pt(tmp_path_factory):
    """What last.pt holds after a run of three steps."""
    folder = tmp_path_factory.mktemp("last")
    train(fresh(), make_text(), config(out=f"{folder}"))
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("history"), "KeyError"),
        (lambda s: s.pop("settings"), "KeyError"),
        (lambda s: s.pop("optimizer"), "KeyError"),
        (lambda s: s.update(step="three"), "its step is three"),
        (lambda s: s.update(step=-(10**9)), "its step is -1000000000"),
        (lambda s: s.update(step=4), "its step is 4, of 3"),
        (lambda s: s.update(history=[]), "after 0 evaluations"),
        (lambda s: s["settings"].pop("lr"), "its lr is None"),
        (lambda s: s["trained"]["ia3.l_k"].data.fill_(math.nan), "ia3.l_k holds NaN"),
        (
            lambda s: s["trained"].update({"ia3.l_k": torch.ones(2, 15)}),
            r"ia3\.l_k has shape \(2, 15\), not \(2, 16\)",
        ),
        (lambda s: s["optimizer"]["state"].clear(), "0 states after 3 steps"),
        (lambda s: s["optimizer"]["state"][1].pop("exp_avg"), "state 1 is not AdamW's"),
        (lambda s: s["optimizer"]["state"][1].update(step=torch.tensor(1e30)), "state 1 is not AdamW's after 3 steps"),
        (lambda s: s["optimizer"]["state"][1].update(exp_avg=torch.zeros(3)), r"exp_avg has shape \(3,\)"),
        (lambda s: s["optimizer"]["state"][2]["exp_avg_sq"].fill_(math.inf), "exp_avg_sq holds NaN or infinity"),
        (lambda s: s["optimizer"]["state"][2]["exp_avg_sq"].fill_(-1.0), "exp_avg_sq is negative"),
    ],
)
def test_a_last_pt_that_is_damaged_or_older_is_refused_in_one_line(last_pt, text, tmp_path, spoil, message):
    c = config(out=f"{tmp_path}", resume=True)
    state = copy.deepcopy(last_pt)
    spoil(state)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=rf"last\.pt cannot be resumed: .*{message}"):
        train(fresh(), text, c, should_stop=lambda: True)


@pytest.mark.parametrize(
    "training, message", [(True, "loss inf, gradient .* at step 1"), (False, "val loss inf at step 1")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path, training, message):
    """A training loss that is infinite while its gradient is fine, or one on val, from the second step on."""
    model = fresh()

    def loss_fn(model, x, y):
        loss = lm_loss(model, x, y)
        if model.training == training and model.ia3.l_k[0, 0] != 1:
            loss = loss + math.inf
        return loss

    with pytest.raises(FloatingPointError, match=f"{message}: try a smaller --lr"):
        train(model, text, config(out=f"{tmp_path}/run", eval_interval=1), loss_fn)
    assert all(p.isfinite().all() for p in model.ia3.parameters())
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["step"] == (1 if training else 0) and all(t.isfinite().all() for t in saved["trained"].values())


def test_a_gradient_that_is_not_finite_stops_the_run(text):
    model = fresh()

    def loss_fn(m, x, y):
        # the root's slope at zero is infinite, the loss itself is fine
        return lm_loss(m, x, y) + (m.ia3.l_k[0, 0] - 1).abs().sqrt() * float(m.training)

    with pytest.raises(FloatingPointError, match=r"gradient (inf|nan) at step 0"):
        train(model, text, config(), loss_fn)
    train(model, text, config())  # and the next run of this model does not begin with it


def interrupt_in_step(monkeypatch, step, times):
    """Send Ctrl-C, times of them, while the command line's run is in a step's forward pass."""
    calls = []

    def loss_fn(model, x, y):
        calls.append(model.training)
        if model.training and sum(calls) == step + 1:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return lm_loss(model, x, y)

    monkeypatch.setattr("train.train", partial(train, loss_fn=loss_fn))


def test_ctrl_c_finishes_the_step_exits_with_130_and_resume_goes_on(tiny_run, handler, monkeypatch, capsys):
    folder, flags = tiny_run
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2, times=1)
        assert main([*flags, "--out", f"{folder}/run"]) == 130
    assert capsys.readouterr().err == f"train.py: stopped; --resume continues from {folder}/run/last.pt\n"
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["last.pt", "metrics.csv"]  # no ia3.npz
    assert torch.load(folder / "run/last.pt", weights_only=True)["step"] == 3
    assert main([*flags, "--out", f"{folder}/run", "--resume"]) == 0
    assert main([*flags, "--out", f"{folder}/whole"]) == 0
    assert same(load_vectors(folder / "run/ia3.npz"), load_vectors(folder / "whole/ia3.npz"))
    assert signal.getsignal(signal.SIGINT) is handler  # nor does a run that nothing stops keep its own


def test_a_second_ctrl_c_stops_at_once(tiny_run, handler, monkeypatch, capsys):
    folder, flags = tiny_run
    interrupt_in_step(monkeypatch, 3, times=2)
    assert main([*flags, "--out", f"{folder}/run"]) == 130
    assert capsys.readouterr().err.count("\n") == 1 and signal.getsignal(signal.SIGINT) is handler
    assert torch.load(folder / "run/last.pt", weights_only=True)["step"] == 2  # the evaluation before, not step 3 or 4
    assert not (folder / "run/ia3.npz").exists()


def test_a_folder_that_holds_a_run_is_not_written_to_and_the_way_out_is_said(tiny_run):
    folder, flags = tiny_run
    flags += ["--out", f"{folder}/run"]
    (folder / "run").mkdir()
    prepare_folder(parse(flags))  # an empty folder holds none
    for name in ("metrics.csv", "ia3.npz", "ckpt.pt", "run.json"):
        (folder / "run" / name).touch()
        for more in ([], ["--resume"]):
            with pytest.raises(ValueError, match="holds a run: remove it or choose another --out"):
                prepare_folder(parse([*flags, *more]))
        (folder / "run" / name).unlink()
    (folder / "run/last.pt").touch()
    with pytest.raises(ValueError, match="holds a run: --resume continues it"):
        prepare_folder(parse(flags))
    prepare_folder(parse([*flags, "--resume"]))


def test_train_itself_writes_over_no_run(text, tmp_path):
    train(fresh(), text, config(out=f"{tmp_path}/run"))
    before = (tmp_path / "run/last.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run"):
        train(fresh(), text, config(out=f"{tmp_path}/run"))
    assert (tmp_path / "run/last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_compiled_model_trains_as_itself_and_resumes(text, tmp_path):
    plain = fresh()
    train(plain, text, config(out=f"{tmp_path}/a"))
    compiled = torch.compile(fresh(), backend="eager")
    train(compiled, text, config(out=f"{tmp_path}/b"))
    assert torch.equal(compiled.ia3.l_ff, plain.ia3.l_ff)
    saved = torch.load(tmp_path / "b/last.pt", weights_only=True)
    assert list(saved["trained"]) == ["ia3.l_k", "ia3.l_v", "ia3.l_ff"]
    assert (
        train(torch.compile(fresh(), backend="eager"), text, config(out=f"{tmp_path}/b", resume=True))[-1]["step"] == 3
    )


# Settings


@pytest.mark.parametrize("wrong", [{"schedule": "step"}, {"steps": 1.5}, {"seed": 0.5}])  # others: test_bad_input.py
def test_settings_that_no_run_has_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(lr=0.1, **wrong)


def test_a_batch_holds_a_row_for_every_part_of_every_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    TrainConfig(lr=0.1, batch_size=8, grad_accum=2)
    with pytest.raises(ValueError, match="4 processes × --grad-accum 3"):
        TrainConfig(lr=0.1, batch_size=8, grad_accum=3)
