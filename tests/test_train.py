"""The loop: what moves and what does not, that nothing is lost, that parts and processes add up to one run."""

import copy
import csv
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import make_gpt, make_ia3, make_idx
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
from ia3 import IA3, attach
from model import GPT, GPTConfig
from train import (
    TrainConfig,
    autocast,
    backward,
    build,
    evaluate,
    get_batch,
    learning_rate,
    lm_loss,
    main,
    parse,
    train,
)


def load_vectors(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "about"}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture
def text():
    """A small text that repeats itself, so that there is something to learn."""
    tokens = np.frombuffer(b"In the beginning God created the heaven and the earth. " * 20, dtype=np.uint8)
    return {"train": datasets.Stream(tokens, 16), "val": datasets.Stream(tokens[:99], 16)}


def config(**changes):
    return TrainConfig(**{"steps": 3, "batch_size": 4, "eval_interval": 2, "block_size": 16} | changes)


def test_only_the_vectors_move_and_the_base_is_bitwise_unchanged(text, device):
    model = make_gpt().to(device)
    vectors = attach(model)
    before = copy.deepcopy(model.state_dict())
    history = train(model, text, config(steps=5))
    assert history[-1]["val_loss"] < history[0]["val_loss"]
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]) != name.startswith("ia3."), name
    # every value moves but those whose gradient is zero to rounding
    assert all((p != 1).float().mean() > 0.99 for p in vectors.parameters())


def test_full_fine_tuning_moves_every_tensor(text):
    model = make_gpt()
    before = copy.deepcopy(model.state_dict())
    train(model, text, config(method="full"))
    assert not any(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_same_seed_same_vectors_another_seed_others(text):
    def run(seed):
        model = make_gpt(dropout=0.1)
        vectors = attach(model)
        train(model, text, config(seed=seed))
        return {name: p.detach().numpy().copy() for name, p in vectors.matrices().items()}

    assert same(run(0), run(0))
    assert not same(run(0), run(1))
    stream = text["train"]
    text["train"] = copy.copy(stream)
    text["train"].batch = lambda seed, step, n: stream.batch(7, step, n)
    assert not same(run(0), run(1))  # the same batches, another dropout


def test_weight_decay_pulls_base_matrices_and_never_vectors(text):
    def no_gradient(model, x, y):
        return 0 * lm_loss(model, x, y)

    model = make_gpt()
    vectors = attach(model)
    train(model, text, config(weight_decay=0.5), no_gradient)
    assert all(torch.equal(p, torch.ones_like(p)) for p in vectors.parameters())
    model = make_gpt()
    before = copy.deepcopy(model.state_dict())
    train(model, text, config(method="full", weight_decay=0.5), no_gradient)
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


@pytest.fixture
def examples(tmp_path):
    """Completions of very unequal length."""
    rows = [{"prompt": "ab" * (1 + i % 3), "completion": "x" * (1 + i * i % 9)} for i in range(12)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("grad_accum", [2, 3, 5])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(examples, grad_accum, device):
    """Float64, so what differs is the order of a sum: 1e-12 of the gradient's size."""
    model = make_gpt().double().to(device)
    vectors = make_ia3(model).double()
    split = datasets.load(examples, "bytes", 257, 16)["train"]
    gradients = []
    for parts in (1, grad_accum):
        c = config(batch_size=7, grad_accum=parts)
        loss = backward(model, get_batch(split, 0, c, torch.device(device)), lm_loss, autocast(model, c))
        gradients.append([loss, *(p.grad.clone() for p in vectors.parameters())])
        model.zero_grad()
    for whole, accumulated in zip(*gradients, strict=True):
        assert (whole - accumulated).abs().max() < 1e-12 * whole.abs().max()


def test_two_processes_train_what_one_does(tiny_run, examples):
    """The same global batches, summed in another order in float32. Adam divides a gradient by its size, so a relative
    error of 1e-6 in it moves a vector by about lr · 1e-6 a step; 1e-4 leaves room for gradients 1000 times smaller.
    """
    folder, flags = tiny_run
    flags += f"--data {examples} --batch-size 5 --lr 0.05".split()
    assert main([*flags, "--out", f"{folder}/one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run([*torchrun, *flags, "--out", f"{folder}/two"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("values of") == 1  # one process prints
    one, two = (load_vectors(folder / run / "ia3.npz") for run in ("one", "two"))
    for name in one:
        assert np.abs(one[name] - 1).max() > 0.05
        assert np.abs(one[name] - two[name]).max() < 1e-4
    for column in ("train_loss", "val_loss"):
        losses = [[float(row[column]) for row in read_metrics(folder / run)] for run in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5, nan_ok=True)


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_leaves_vectors_metrics_and_a_checkpoint(tiny_run, capsys):
    folder, flags = tiny_run
    assert main([*flags, "--out", f"{folder}/run"]) == 0
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["ia3.npz", "last.pt", "metrics.csv"]
    assert [row["step"] for row in read_metrics(folder / "run")] == ["0", "2", "4"]
    out = capsys.readouterr().out
    assert "before:\nAnd God" in out and "after:\nAnd God" in out and "bits a byte" in out and "\r" not in out
    assert f"sample.py --base {folder}/base.pt --ia3 {folder}/run/ia3.npz" in out
    vectors = IA3.load(folder / "run/ia3.npz", GPT.from_pretrained(folder / "base.pt"))
    assert vectors.count() == 192


def test_bits_a_byte(tiny_run, capsys):
    """nats a token · tokens / bytes / ln 2; here a byte is a token, and all but the first are predicted."""
    folder, flags = tiny_run
    assert main([*flags, "--out", f"{folder}/run"]) == 0
    nats, bits = (
        float(word) for word in capsys.readouterr().out.split("val, all of it: ")[1].split() if word[0].isdigit()
    )
    n = (folder / "text/val.txt").stat().st_size
    assert bits == pytest.approx(nats * (n - 1) / n / math.log(2), abs=1e-4)


def test_full_and_scratch_write_a_checkpoint_that_trains_on(tiny_run):
    folder, flags = tiny_run
    assert main([*flags, "--out", f"{folder}/full", "--method", "full"]) == 0
    assert main([*flags, "--out", f"{folder}/on", "--init", f"{folder}/full/ckpt.pt"]) == 0
    sizes = "--init scratch --n-layer 1 --n-head 3 --n-embd 12 --dropout 0.1 --block-size 8".split()
    assert main([*flags, "--out", f"{folder}/new", *sizes]) == 0
    new = GPT.from_pretrained(folder / "new/ckpt.pt").config
    assert (new.n_layer, new.n_head, new.n_embd, new.dropout, new.block_size, new.vocab_size) == (1, 3, 12, 0.1, 8, 257)


def test_ia3_goes_on_from_given_vectors(tiny_run):
    folder, flags = tiny_run
    assert main([*flags, "--out", f"{folder}/a", "--targets", "k,ff"]) == 0
    assert main([*flags, "--out", f"{folder}/b", "--ia3", f"{folder}/a/ia3.npz", "--lr", "1e-9"]) == 0
    a, b = load_vectors(folder / "a/ia3.npz"), load_vectors(folder / "b/ia3.npz")
    assert a.keys() == b.keys() == {"l_k", "l_ff"}
    assert all(np.allclose(a[name], b[name], atol=1e-6) and (a[name] != 1).any() for name in a)


def test_a_short_window_trains_a_model_that_is_not_cropped(tiny_run):
    folder, flags = tiny_run
    assert main([*flags, "--out", f"{folder}/a", "--block-size", "8", "--method", "full"]) == 0
    assert GPT.from_pretrained(folder / "a/ckpt.pt").config.block_size == 16


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


def test_a_compiled_step_is_the_eager_one(device):
    """Compiled kernels sum in another order: float32 gradients over 768 terms agree to 1e-4 of the largest."""
    model = make_gpt().to(device)
    vectors = make_ia3(model)
    idx, targets = make_idx(model).to(device), make_idx(model, seed=1).to(device)
    model(idx, targets)[1].backward()
    eager = [p.grad.clone() for p in vectors.parameters()]
    model.zero_grad()
    try:
        model.compile()
        model(idx, targets)[1].backward()
    except torch._inductor.exc.InductorError as e:
        pytest.skip(f"torch.compile does not work here: {str(e).splitlines()[0]}")
    for a, p in zip(eager, vectors.parameters(), strict=True):
        assert (a - p.grad).abs().max() < 1e-4 * a.abs().max()


def test_the_embedded_task_is_learned(tmp_path):
    """The README's run takes 0.37 nats off in 20 steps of 16 windows; 0.1 is asked of 20 steps of 8."""
    assert main(f"--steps 20 --batch-size 8 --eval-windows 32 --out {tmp_path}/a --device cpu".split()) == 0
    losses = [float(row["val_loss"]) for row in read_metrics(tmp_path / "a")]
    assert losses[-1] < losses[0] - 0.1


def test_a_step_needs_two_thirds_of_the_matrix_products():
    """No gradient of a weight: 4 of the 6 units of full fine-tuning, and the first layer's input needs none either."""
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=6, n_head=6, n_embd=384))

    def flops():
        with FlopCounterMode(display=False) as counter:
            idx = make_idx(model, rows=2)
            model(idx, idx)[1].backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "mm" in str(op))

    full = flops()
    attach(model)
    assert 0.60 < flops() / full <= 0.66


def test_dropout_is_on_in_the_steps_and_off_in_what_comes_after(text):
    model, modes = fresh(dropout=0.5), []

    def loss_fn(m, x, y):
        modes.append(m.training)
        return lm_loss(m, x, y)

    train(model, text, config(steps=4, eval_interval=2, eval_windows=1), loss_fn)
    assert modes == [False, True, True, False, True, True, False] and not model.training


# Nothing is lost


def interrupted_at(step, action):
    """A loss_fn that calls action in a step's forward pass."""
    calls = []

    def loss_fn(model, x, y):
        calls.append(model.training)
        if sum(calls) == step + 1 and calls[-1]:
            action()
        return lm_loss(model, x, y)

    return loss_fn


def fresh(dropout=0.1):
    model = make_gpt(dropout=dropout)
    attach(model)
    return model


def test_ctrl_c_saves_a_whole_step_and_resume_ends_where_an_uninterrupted_run_does(text, tmp_path):
    whole, first, second = fresh(), fresh(), fresh()
    history = train(whole, text, config(steps=9, out=f"{tmp_path}/whole"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 6"):
        loss_fn = interrupted_at(5, lambda: signal.raise_signal(signal.SIGINT))
        train(first, text, config(steps=9, out=f"{tmp_path}/run"), loss_fn)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 6
    torch.manual_seed(99)  # the dropout of the rest must come from the checkpoint
    resumed = train(second, text, config(steps=9, out=f"{tmp_path}/run", resume=True))
    for name, p in whole.ia3.matrices().items():
        assert torch.equal(p, second.ia3.matrices()[name])
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in h] for h in (history, resumed)]
    assert str(timeless[0]) == str(timeless[1])  # as text, since NaN is not NaN


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text, tmp_path):
    model = fresh()

    def loss_fn(m, x, y):
        loss = lm_loss(m, x, y)
        return loss * math.nan if model.training and m.ia3.l_k[0, 0] != 1 else loss

    with pytest.raises(FloatingPointError, match=r"nan.* at step 1: try a smaller lr"):
        train(model, text, config(out=f"{tmp_path}/run", eval_interval=1), lambda m, x, y: loss_fn(m, x, y))
    assert all(p.isfinite().all() for p in model.ia3.parameters())
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert saved["step"] == 1 and all(t.isfinite().all() for t in saved["trained"].values())


def test_a_gradient_that_is_not_finite_stops_the_run(text):
    model = fresh()

    def loss_fn(m, x, y):
        # the root's slope at zero is infinite, the loss itself is fine
        return lm_loss(m, x, y) + (m.ia3.l_k[0, 0] - 1).abs().sqrt() * float(m.training)

    with pytest.raises(FloatingPointError, match=r"gradient (inf|nan) at step 0"):
        train(model, text, config(), loss_fn)


def start(flags):
    return subprocess.Popen(
        [sys.executable, "-u", "train.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process, word):
    """Read the process's output up to a line with word in it."""
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


def test_a_killed_run_resumes_to_the_same_bits(tiny_run):
    folder, flags = tiny_run
    flags += "--steps 300 --eval-interval 50".split()
    process = start([*flags, "--out", f"{folder}/killed"])
    wait_for(process, "step   100/")
    process.kill()
    process.wait()
    assert not (folder / "killed/ia3.npz").exists()
    with open(folder / "killed/metrics.csv", "a") as f:
        f.write("9999,1.0,1.0,0.1,1\n")  # a row of steps that were lost
    assert main([*flags, "--out", f"{folder}/killed", "--resume"]) == 0
    assert main([*flags, "--out", f"{folder}/whole", "--resume"]) == 0  # no checkpoint yet: starts at step 0
    assert same(load_vectors(folder / "killed/ia3.npz"), load_vectors(folder / "whole/ia3.npz"))
    rows = [[row["step"] for row in read_metrics(folder / run)] for run in ("killed", "whole")]
    assert rows[0] == rows[1] == ["0", "50", "100", "150", "200", "250", "300"]
    before = load_vectors(folder / "whole/ia3.npz")
    assert main([*flags, "--out", f"{folder}/whole", "--resume"]) == 0  # finished: nothing left to do
    assert same(before, load_vectors(folder / "whole/ia3.npz"))


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(tiny_run):
    folder, flags = tiny_run
    process = start([*flags, "--steps", "100000", "--eval-interval", "50", "--out", f"{folder}/run"])
    wait_for(process, "step    50/")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in err and "--resume" in err and err.count("\n") == 1
    step = torch.load(folder / "run/last.pt", weights_only=True)["step"]
    assert f"step {step};" in err and step >= 50


@pytest.mark.parametrize(
    "trouble, status, message",
    [
        (KeyboardInterrupt(), 130, "train.py: stopped; --resume"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "train.py: CUDA out of memory."),
    ],
)
def test_what_ends_a_run_from_without_is_one_line(tiny_run, monkeypatch, capsys, trouble, status, message):
    def stop(*_, **__):
        raise trouble

    monkeypatch.setattr("train.complete", stop)
    assert main([*tiny_run[1], "--out", f"{tiny_run[0]}/run"]) == status
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


def test_a_run_is_not_overwritten_or_resumed_by_mistake(tiny_run, capsys):
    folder, flags = tiny_run
    flags += ["--out", f"{folder}/run"]
    assert main(flags) == 0
    before = load_vectors(folder / "run/ia3.npz")
    assert main([*flags, "--seed", "1"]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main([*flags, "--seed", "1", "--resume"]) == 2
    assert "has seed 0, not 1" in capsys.readouterr().err
    assert same(before, load_vectors(folder / "run/ia3.npz"))
    assert main([*flags, "--block-size", "17", "--overwrite"]) == 2  # what is refused has replaced nothing
    assert main([*flags, "--grad-accum", "1000", "--overwrite"]) == 2
    (folder / "run/last.pt").unlink()
    assert main([*flags, "--resume"]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert same(before, load_vectors(folder / "run/ia3.npz"))
    assert main([*flags, "--seed", "1", "--overwrite"]) == 0
    assert not same(before, load_vectors(folder / "run/ia3.npz"))


def test_vectors_are_not_resumed_on_another_base_at_the_same_path(tiny_run, capsys):
    folder, flags = tiny_run
    flags += ["--out", f"{folder}/run", "--resume"]
    assert main(flags) == 0
    before = (folder / "run/ia3.npz").read_bytes()
    make_gpt(seed=1).save(folder / "base.pt")
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert "has base" in err and err.count("\n") == 1
    assert (folder / "run/ia3.npz").read_bytes() == before


def test_overwriting_a_run_keeps_the_base_that_lies_in_it(tiny_run):
    folder, flags = tiny_run
    flags += ["--out", f"{folder}/run"]
    assert main([*flags, "--method", "full"]) == 0
    base = (folder / "run/ckpt.pt").read_bytes()
    assert main([*flags, "--out", f"{folder}/run/../run", "--init", f"{folder}/run/ckpt.pt", "--overwrite"]) == 0
    assert (folder / "run/ckpt.pt").read_bytes() == base and (folder / "run/ia3.npz").exists()
    assert main([*flags, "--overwrite"]) == 0  # no part of this one
    assert not (folder / "run/ckpt.pt").exists()


@pytest.mark.parametrize(
    "wrong", [{"method": "ia4"}, {"schedule": "step"}, {"dtype": "float16"}, {"ia3": "a", "method": "full"}]
)
def test_settings_that_no_run_has_are_refused(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        TrainConfig(**wrong)
