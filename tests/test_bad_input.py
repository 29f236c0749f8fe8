"""What people get wrong on a command line is one line on stderr and exit status 2, and nothing is written or damaged.

argparse's own errors have its usage before that line. Damaged files are in test_files.py and test_data.py.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import merge
import sample
import train
from conftest import make_gpt, make_ia3, write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a base, a text, vectors for the base, and vectors for others."""
    folder, _ = write_run(tmp_path_factory.mktemp("good"), make_gpt())
    make_ia3(make_gpt()).save(folder / "ia3.npz")
    make_ia3(make_gpt(seed=1)).save(folder / "other_base.npz")
    make_ia3(make_gpt(n_layer=3)).save(folder / "other_shape.npz")
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of it as working directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(folder, script, flags, message, capsys):
    """Run script in-process: what it says and returns is what a shell sees."""
    before = snapshot(folder)
    try:
        status = script.main(flags)
    except SystemExit as e:  # argparse's
        status = e.code
    err = capsys.readouterr().err
    assert status == 2
    *usage, line = err.splitlines()
    assert line.startswith(f"{script.__name__}.py: ") or (usage and ": error: " in line), err
    assert not usage or usage[0].startswith("usage: "), err
    assert message in line, err
    assert snapshot(folder) == before


TRAIN = "--base base.pt --data text --device cpu --out run --steps 2".split()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data psalms", "no data called 'psalms': there are folio, kjv, plays, sonnets"),
        ("--base nowhere.pt", "nowhere.pt"),
        ("--base text", "text is not a checkpoint"),
        ("--ia3 nowhere.npz", "nowhere.npz"),
        ("--ia3=", "No such file"),
        ("--ia3 other_base.npz", "another base"),
        ("--ia3 other_shape.npz", "this base takes"),
        ("--ia3 base.pt", "(IA)³"),
        ("--ia3 ia3.npz --method full", "--ia3 and --sites go with --method ia3"),
        ("--sites k --method full", "--ia3 and --sites go with --method ia3"),
        ("--ia3 ia3.npz --sites k", "--sites goes without --ia3: the file has its own"),
        ("--sites=", "sites must be"),
        ("--sites q", "sites must be a list of some of k, v, ff"),
        ("--sites k,,v", "sites must be"),
        ("--steps 0", "steps must be from 1 to 1000000000, not"),
        (f"--steps {10**30}", "steps must be from 1 to 1000000000, not"),
        ("--steps many", "invalid int value"),
        ("--batch-size 0", "--batch-size must be from 1 to 100000, not"),
        (f"--batch-size {10**12}", "--batch-size must be from 1 to 100000, not"),
        ("--batch-size 2 --grad-accum 3", "--grad-accum 3"),
        ("--grad-accum 0", "--grad-accum must be"),
        (f"--grad-accum {10**12}", "--grad-accum must be"),
        ("--lr 0", "lr must be from 1e-12 to 1000, not"),
        ("--lr nan", "lr must be from 1e-12 to 1000, not"),
        ("--lr 1e39", "lr must be from 1e-12 to 1000, not 1e+39"),
        ("--warmup 2", "warmup must be from 0 to 1, not 2"),
        ("--weight-decay -1", "--weight-decay"),
        ("--weight-decay 1e39", "--weight-decay must be from 0 to 1000"),
        ("--grad-clip 0", "--grad-clip must be from 1e-12 to inf, not"),
        ("--seed -1", "seed must be"),
        (f"--seed {2**64}", f"seed must be from 0 to {2**63 - 1}, not"),
        ("--eval-interval 0", "--eval-interval must be"),
        ("--eval-windows 0", "--eval-windows must be"),
        ("--block-size 17", "--block-size must be from 1 to 16"),
        ("--schedule sine", "invalid choice"),
        ("--method lora", "invalid choice"),
        ("--device cuda", "'cuda'"),
        ("--device tpu9", "'tpu9'"),
        ("--device meta", "'meta'"),
        ("--device hpu", "'hpu'"),
        ("--dtype float16", "invalid choice"),
        ("--n-layer 2", "--n-layer goes with --base scratch"),
        ("--tokenizer bytes", "tokenizer goes with --base scratch"),
        ("--base scratch --n-embd 10 --n-head 3", "n_embd 10 is not divisible by n_head 3"),
        ("--base scratch --block-size -1", "--block-size must be"),
        ("--base scratch --n-layer 0", "--n-layer must be from 1"),
        ("--base scratch --seed 100000000000000000000", "--seed must be from 0"),
        ("--no-such-flag", "unrecognized arguments"),
        ("--out text/val.txt", "text/val.txt"),
        ("--out /proc/run", "/proc/run"),
        ("--out .", "folder of its own"),
        ("--out /", "folder of its own"),
        ("--data text/.. --out ..", "folder of its own"),
    ],
)
def test_train(folder, flags, message, capsys):
    if "--device cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    check(folder, train, [*TRAIN, *flags.split()], message, capsys)


def test_train_without_a_name_for_its_output(folder, capsys):
    check(folder, train, [*TRAIN, "--out", ""], "folder of its own", capsys)


def test_train_writes_over_nothing_that_it_reads(folder, capsys):
    (folder / "run").mkdir()
    os.rename("base.pt", "run/last.pt.tmp")
    check(folder, train, [*TRAIN, "--base", "run/last.pt.tmp"], "would replace run/last.pt.tmp", capsys)
    os.rename("run/last.pt.tmp", "run/ckpt.pt.tmp")
    check(folder, train, [*TRAIN, "--base", "run/ckpt.pt.tmp", "--method", "full"], "would replace run/ckpt", capsys)


def test_train_without_a_compiler(folder, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    check(folder, train, [*TRAIN, "--compile"], "--compile needs a C++ compiler", capsys)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--base nowhere.pt", "nowhere.pt"),
        ("--ia3 nowhere.npz", "nowhere.npz"),
        ("--ia3 other_base.npz", "another base"),
        ("--data psalms", "no data called"),
        ("--out base.pt", "would replace base.pt"),
        ("--out ia3.npz", "would replace ia3.npz"),
        ("--out text/val.txt", "would replace text/val.txt"),
        ("--out /dev/null", "regular file"),
        ("--out text", "regular file"),
        ("--out new/", "folder"),
        ("--block-size 99", "--block-size must be from 1 to the base's 16, not 99"),
        ("--block-size 0", "--block-size must be from 1 to the base's 16, not 0"),
        ("--unknown", "unrecognized"),
    ],
)
def test_merge(folder, flags, message, capsys):
    check(
        folder, merge, [*"--base base.pt --ia3 ia3.npz --data text --out m.pt".split(), *flags.split()], message, capsys
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tokens -1", "tokens must be from 0 to a million"),
        (f"--tokens {10**12}", "tokens must be from 0 to a million"),
        ("--top-k 0", "top_k must be at least 1"),
        ("--temperature -1", "temperature"),
        ("--temperature nan", "temperature"),
        ("--temperature 1e-40", "temperature"),
        (f"--seed {2**64}", "seed"),
        ("--base nowhere.pt", "nowhere.pt"),
        ("--ia3 other_base.npz", "another base"),
        ("--ia3 ia3.npz other_shape.npz", "this base takes"),
        ("--device cuda:99", "'cuda:99'"),
    ],
)
def test_sample(folder, flags, message, capsys):
    check(folder, sample, ["--base", "base.pt", "--device", "cpu", *flags.split()], message, capsys)


def test_a_prompt_and_a_tokenizer_are_wanted(folder, capsys):
    check(folder, sample, ["--base", "base.pt", "--prompt", ""], "the prompt is empty", capsys)
    common.save(make_gpt(vocab_size=99), "odd.pt")
    check(folder, sample, ["--base", "odd.pt"], "names no tokenizer", capsys)
    check(folder, train, [*TRAIN, "--base", "odd.pt"], "tokenizer is unknown", capsys)


# The end of every script


@pytest.mark.parametrize(
    "trouble, status, message",
    [
        (ValueError("what is\nwrong"), 2, "x.py: what is wrong\n"),
        (FileNotFoundError(2, "No such file or directory", "a.pt"), 2, "x.py: [Errno 2] No such file or directory"),
        (FloatingPointError("loss nan"), 2, "x.py: loss nan\n"),
        (MemoryError(), 2, "x.py: out of memory\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "x.py: CUDA out of memory.\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "x.py: DefaultCPUAllocator"),
        (RuntimeError("CUDA error: out of memory"), 2, "x.py: CUDA error: out of memory\n"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), 2, "x.py: CUDA error: CUBLAS"),
        (KeyboardInterrupt(), 130, "x.py: stopped; go on\n"),
    ],
)
def test_what_ends_a_script_is_one_line(capsys, trouble, status, message):
    def run(argv):
        assert argv == ["a", "b"]
        raise trouble

    assert common.exit_status("x.py", run, ["a", "b"], "stopped; go on") == status
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize("trouble", [RuntimeError("illegal memory access"), KeyError("x"), TypeError("x")])
def test_a_mistake_of_ours_keeps_its_traceback(trouble):
    def run(argv):
        raise trouble

    with pytest.raises(type(trouble)):
        common.exit_status("x.py", run, [])


def test_a_run_that_ends_well_or_says_so_itself_returns_its_own_status():
    assert common.exit_status("x.py", lambda argv: 0, []) == 0
    assert common.exit_status("x.py", lambda argv: 1, []) == 1


@pytest.mark.parametrize("script", [train, merge, sample])
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    out, err = capsys.readouterr()
    assert end.value.code == 0 and not err and f"python {script.__name__}.py" in out


@pytest.mark.slow
def test_as_a_process_into_a_pipe_that_is_closed(tiny_run):
    """What main() returns in-process is what a shell sees: its status, and no traceback when head has seen enough."""
    flags = f"--base {tiny_run[0]}/base.pt --prompt A --tokens 9 --device cpu".split()
    process = subprocess.Popen(
        [sys.executable, "sample.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")
    process.stderr.close()
