"""What people get wrong is told in one line on stderr, with exit status 2, and nothing is written or damaged."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_gpt, make_ia3

import merge
import plot
import sample
import train
from ia3 import IA3
from model import load_file


@pytest.fixture
def folder(tiny_run, monkeypatch):
    """The tiny run's folder as working directory, with ia3.npz for its base and vectors for others."""
    folder, _ = tiny_run
    monkeypatch.chdir(folder)
    make_ia3(make_gpt()).save("ia3.npz")
    make_ia3(make_gpt(seed=1)).save("other_base.npz")
    make_ia3(make_gpt(n_layer=3)).save("other_shape.npz")
    return folder


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(folder, script, flags, message, capsys):
    before = snapshot(folder)
    assert script.main(flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{script.__name__}.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert message in err, err
    assert snapshot(folder) == before


TRAIN = "--init base.pt --data text --device cpu --out run --steps 2".split()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data psalms", "no data called 'psalms': there are"),
        ("--init nowhere.pt", "nowhere.pt"),
        ("--init text", "text"),
        ("--ia3 nowhere.npz", "nowhere.npz"),
        ("--ia3 other_base.npz", "another base"),
        ("--ia3 other_shape.npz", "this base takes"),
        ("--ia3 base.pt", "no file of (IA)³ vectors"),
        ("--targets q", "targets must be some of k, v, ff, not q"),
        ("--targets k,,v", "targets must be"),
        ("--steps 0", "steps must be at least 1"),
        ("--steps -5", "steps must be at least 1"),
        ("--steps many", "invalid int value"),
        ("--batch-size 0", "batch_size must be at least 1"),
        ("--batch-size 2 --grad-accum 3", "grad_accum 3"),
        ("--grad-accum 0", "grad_accum must be"),
        ("--lr 0", "lr must be above 0"),
        ("--lr=-1e-3", "lr must be above 0"),
        ("--lr nan", "lr must be above 0"),
        ("--lr inf", "lr must be above 0"),
        ("--warmup 2", "warmup must be from 0 to 1"),
        ("--warmup nan", "warmup must be from 0 to 1"),
        ("--weight-decay -1", "weight_decay"),
        ("--grad-clip 0", "grad_clip above 0"),
        ("--grad-clip nan", "grad_clip above 0"),
        ("--seed -1", "seed"),
        ("--eval-interval 0", "eval_interval must be"),
        ("--block-size 0", "block_size must be at least 1"),
        ("--block-size 17", "beyond the model's 16"),
        ("--schedule sine", "invalid choice"),
        ("--method lora", "invalid choice"),
        ("--device cuda", "device 'cuda' is not here"),
        ("--device tpu9", "device 'tpu9' is not here"),
        ("--dtype float16", "invalid choice"),
        ("--n-layer 2", "n_layer goes with --init scratch"),
        ("--tokenizer bytes", "tokenizer goes with --init scratch"),
        ("--init scratch --n-embd 10 --n-head 3", "n_embd 10 is not divisible by n_head 3"),
        ("--init scratch --block-size 0", "block_size must be"),
        ("--init scratch --n-layer 0", "n_layer must be at least 1"),
        ("--init scratch --dropout 1.5", "dropout must be"),
        ("--no-such-flag", "unrecognized arguments"),
        ("--out text/val.txt", "text/val.txt"),
        ("--out text/val.txt/run", "text/val.txt"),
        ("--out /proc/run", "/proc/run"),
    ],
)
def test_train(folder, flags, message, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    check(folder, train, [*TRAIN, *flags.split()], message, capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--base nowhere.pt", "nowhere.pt"),
        ("--ia3 nowhere.npz", "nowhere.npz"),
        ("--ia3 other_base.npz", "another base"),
        ("--data psalms", "no data called"),
        ("--out base.pt", "would replace base.pt"),
        ("--out ia3.npz", "would replace ia3.npz"),
        ("--out /proc/folder/m.pt", "/proc/folder"),
        ("--out text", "is a folder"),
        ("--unknown", "unrecognized"),
    ],
)
def test_merge(folder, flags, message, capsys):
    check(
        folder, merge, [*"--base base.pt --ia3 ia3.npz --data text --out m.pt".split(), *flags.split()], message, capsys
    )


def test_merge_refuses_vectors_that_overflow(folder, capsys):
    model = make_gpt()
    make_ia3(model).l_v.data[1, 3] = 3e38
    model.transformer.h[1].attn.c_attn.weight.data[32 + 3] = 30
    model.save("big.pt")
    model.ia3.base = None
    model.ia3.base = train.attach(model, model.ia3).base
    model.ia3.save("big.npz")
    flags = "--base big.pt --ia3 big.npz --data text --out m.pt".split()
    check(folder, merge, flags, "transformer.h.1.attn.c_attn.weight holds NaN or infinity", capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tokens -1", "tokens"),
        ("--top-k 0", "top_k"),
        ("--temperature -1", "temperature"),
        ("--temperature nan", "temperature"),
        ("--temperature 1e-40", "temperature"),
        ("--base nowhere.pt", "nowhere.pt"),
        ("--ia3 other_base.npz", "another base"),
        ("--ia3 ia3.npz other_shape.npz", "this base takes"),
        ("--device cuda:99", "device 'cuda:99' is not here"),
    ],
)
def test_sample(folder, flags, message, capsys):
    check(folder, sample, ["--base", "base.pt", "--device", "cpu", *flags.split()], message, capsys)


def test_sample_wants_a_prompt_and_a_tokenizer(folder, capsys):
    check(folder, sample, ["--base", "base.pt", "--prompt", ""], "the prompt is empty", capsys)
    make_gpt(vocab_size=99).save("odd.pt")
    check(folder, sample, ["--base", "odd.pt"], "tokenizer", capsys)
    check(folder, train, [*TRAIN, "--init", "odd.pt"], "tokenizer is unknown", capsys)


def test_plot(folder, capsys):
    check(folder, plot, ["nowhere"], "no run of train.py", capsys)
    (folder / "bad").mkdir()
    (folder / "bad/metrics.csv").write_text("step,loss\n0,x\n")
    check(folder, plot, ["bad"], "bad/metrics.csv", capsys)
    check(folder, plot, [], "RUN", capsys)


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_checkpoints_that_are_damaged_or_carry_code(folder, capsys):
    raw = (folder / "base.pt").read_bytes()
    for keep in (0, 10, len(raw) // 2, len(raw) - 10):
        (folder / "cut.pt").write_bytes(raw[:keep])
        check(folder, train, [*TRAIN, "--init", "cut.pt"], "cut.pt is truncated, carries code", capsys)
    torch.save({"model": Code(), "model_args": {}}, "code.pt")
    check(folder, train, [*TRAIN, "--init", "code.pt"], "carries code", capsys)
    (folder / "code.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    check(folder, sample, ["--base", "code.pt"], "carries code", capsys)
    assert not (folder / "ran").exists()
    np.savez("code.npz", about=np.array(Code(), dtype=object), l_k=np.array([Code()], dtype=object))
    check(folder, train, [*TRAIN, "--ia3", "code.npz"], "no file of (IA)³ vectors", capsys)
    assert not (folder / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt", "ia3.npz"])
def test_whatever_is_damaged_about_a_file_it_is_refused_or_read(folder, file):
    model = make_gpt()
    torch.save(torch.load("base.pt"), "legacy.pt", _use_new_zipfile_serialization=False)
    os.rename("base.pt", "zip.pt")
    raw, dice = (folder / file).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(raw, np.uint8).copy()
        near = 2000 if file == "legacy.pt" else len(raw)  # a legacy file's pickles stand at its head
        damaged[dice.integers(0, near, 20)] = dice.integers(0, 256, 20)
        with open("damaged", "wb") as f:
            f.write(damaged)
        try:
            IA3.load("damaged", model) if file == "ia3.npz" else load_file("damaged", mmap=True)
        except ValueError:
            refused += 1
    assert refused > 100


def spoiled(change):
    checkpoint = torch.load("base.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, "spoiled.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("model"), "not a GPT checkpoint"),
        (lambda c: c.pop("model_args"), "not a GPT checkpoint"),
        (lambda c: c["model"].pop("transformer.h.1.ln_1.bias"), "transformer.h.1.ln_1.bias"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "extra"),
        (lambda c: c["model"].update({"lm_head.weight": torch.ones(257, 16)}), "the head is not the embedding"),
        (lambda c: c["model"]["transformer.h.0.mlp.c_fc.bias"].fill_(torch.nan), "h.0.mlp.c_fc.bias holds NaN or inf"),
        (lambda c: c["model_args"].update(n_embd=32), "size mismatch"),
        (lambda c: c["model_args"].update(n_head=3), "not divisible"),
        (lambda c: c["model_args"].update(block_size=0), "block_size must be"),
        (lambda c: c["model_args"].update(n_layer="two"), "not a GPT checkpoint"),
        (lambda c: c["model_args"].update(rotary=True), "rotary"),
        (lambda c: c.update(tokenizer="words"), "unknown tokenizer 'words'"),
    ],
)
def test_checkpoints_of_something_else(folder, change, message, capsys):
    spoiled(change)
    check(folder, train, [*TRAIN, "--init", "spoiled.pt"], message, capsys)


def test_a_checkpoint_that_is_no_dict(folder, capsys):
    torch.save(torch.ones(3), "tensor.pt")
    check(folder, train, [*TRAIN, "--init", "tensor.pt"], "not a GPT checkpoint", capsys)


def test_a_learning_rate_that_blows_up_stops_with_one_line_and_a_finite_checkpoint(folder, capsys):
    assert train.main([*TRAIN, "--steps", "50", "--eval-interval", "1", "--lr", "1e38", "--grad-clip", "1e30"]) == 2
    err = capsys.readouterr().err
    assert "try a smaller lr" in err and err.count("\n") == 1
    saved = torch.load("run/last.pt", weights_only=True)["trained"]
    assert all(t.isfinite().all() for t in saved.values()) and not os.path.exists("run/ia3.npz")


@pytest.mark.parametrize("script", ["train", "merge", "sample", "plot"])
def test_as_a_process(script):
    """What main() is told in-process is what a shell sees; and --help teaches."""
    wrong = subprocess.run([sys.executable, f"{script}.py", "--wrong"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.count("\n") == 1
    shown = subprocess.run([sys.executable, f"{script}.py", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and f"python {script}.py" in shown.stdout and not shown.stderr
