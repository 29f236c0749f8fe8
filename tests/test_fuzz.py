"""What the core reads, broken on purpose (tests/damage.py): checkpoints, vectors, a run's folder, and data."""

import json

import numpy as np
import pytest

import common
import sample
import train
from conftest import make_gpt, make_ia3, make_llama_with_bpe
from tests.damage import DAMAGES, check_no_code_runs, damage_and_read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One good file of every kind, all of one tiny base."""
    folder = tmp_path_factory.mktemp("good")
    model = make_gpt(n_layer=1, n_embd=8, block_size=8)
    common.save(model, folder / "base.pt")
    common.save(make_llama_with_bpe(n_layer=1, block_size=8), folder / "llama.pt")
    make_ia3(model).save(folder / "ia3.npz")
    for kind in ("text", "jsonl", "bin"):
        (folder / kind).mkdir()
    for split in ("train", "val"):
        (folder / f"text/{split}.txt").write_text("In the beginning God created. " * 4, encoding="utf-8")
        line = json.dumps({"prompt": "a", "completion": "b"})
        (folder / f"jsonl/{split}.jsonl").write_text(f"{line}\n{line}\n")
        np.arange(64, dtype=np.uint16).tofile(folder / f"bin/{split}.bin")
    assert train_on("text", folder, "run") == 0
    return folder


def train_on(data, folder, out, *more):
    flags = f"--base {folder}/base.pt --data {folder}/{data} --out {folder}/{out} --steps 1 --batch-size 2"
    return train.main([*flags.split(), *"--eval-windows 1 --device cpu".split(), *more])


def write_text(base, folder, *more):
    return sample.main([*f"--base {folder}/{base} --prompt A --tokens 1 --device cpu".split(), *more])


# the file that is damaged, and the command that reads it
READERS = {
    "base.pt": lambda folder: write_text("base.pt", folder),
    "llama.pt": lambda folder: write_text("llama.pt", folder),
    "ia3.npz": lambda folder: write_text("base.pt", folder, "--ia3", f"{folder}/ia3.npz"),
    "run/last.pt": lambda folder: train_on("text", folder, "run", "--resume"),
    "text/train.txt": lambda folder: train_on("text", folder, "new"),
    "jsonl/train.jsonl": lambda folder: train_on("jsonl", folder, "new"),
    "bin/train.bin": lambda folder: train_on("bin", folder, "new"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(folder, tmp_path, capsys, name):
    n = DAMAGES // 5 if name.startswith(("text", "bin")) else DAMAGES
    damage_and_read(folder, tmp_path / "work", name, READERS[name], capsys, n)


@pytest.mark.parametrize("name", READERS)
def test_no_code_of_a_file_runs(folder, tmp_path, capsys, name):
    check_no_code_runs(folder, tmp_path / "work", name, READERS[name], capsys)
