"""The top level is the promise: copied into an empty folder with data/, its files train, merge, compare on their own.

With torch, numpy and tiktoken alone: whatever else this repository's rooms need is kept from the process.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CARD = ("model.py", "ia3.py", "merge.py", "train.py", "sample.py", "common.py", "disk.py", "run_folder.py")

RUN = """
import sys

for name in ("matplotlib", "transformers", "peft", "safetensors", "gguf", "pytest"):
    sys.modules[name] = None  # importing it is an ImportError

import merge

assert "tiktoken" not in sys.modules, "merging needs no tokenizer"

import torch
import common, sample, train
from ia3 import IA3

flags = "--data text --batch-size 4 --eval-windows 4 --device cpu".split()
new = "--base scratch --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --steps 5 --out base".split()
assert train.main([*flags, *new]) == 0
assert train.main([*flags, *"--base base/ckpt.pt --steps 20 --out run".split()]) == 0

model = common.load("base/ckpt.pt")
vectors = IA3.load("run/ia3.npz", model)
idx = torch.tensor([list(b"In the beginning God created the")])
base = model(idx)[0]
model.ia3 = vectors
unmerged = model(idx)[0]
merged = merge.merge(model)
report = merge.verify(model, merged, idx)
assert report.is_exact() and (merged(idx)[0] - unmerged).abs().max() == report.max_difference < 1e-3, report
assert (unmerged - base).abs().max() > 0.01
greedy = [sample.generate(m, idx, 9, temperature=0) for m in (model, merged)]
assert torch.equal(*greedy)
print(sorted({name.split(".")[0] for name, m in sys.modules.items() if getattr(m, "__file__", None)
              and m.__file__.startswith(HERE)}))
"""


@pytest.mark.slow
def test_the_card_in_an_empty_folder_trains_merges_and_compares(tmp_path):
    for name in CARD:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "text").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"text/{split}.txt").write_bytes((ROOT / f"data/kjv/{split}.txt").read_bytes()[:4000])
    code = f"HERE = {str(tmp_path)!r}\n{RUN}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step    20/20" in done.stdout and "next: python" in done.stdout
    ours = [name.removesuffix(".py") for name in CARD]
    assert done.stdout.splitlines()[-1] == str(sorted(["data", *ours]))  # and none from anywhere else


def test_imports_point_one_way():
    """What the top level imports of this repository is itself and data/, at the top of a file, in no circle.

    common.py imports llama.py in a function, since llama.py may be left out.
    """
    # each imports what stands before it
    order = ["data", "disk", "ia3", "model", "common", "sample", "merge", "run_folder", "train"]
    rooms = {path.parent.name for path in ROOT.glob("*/*.py")} - {"data"}
    for name in CARD:
        for line in (ROOT / name).read_text().splitlines():
            words = line.split()
            if words[:1] not in (["import"], ["from"]):
                continue
            imported = words[1].split(".")[0]
            assert imported not in rooms, line
            if imported in order:
                assert order.index(imported) < order.index(name.removesuffix(".py")), (name, line)
                assert not line.startswith(" "), (name, line)


@pytest.mark.slow
def test_whoever_deletes_the_rooms_keeps_a_green_suite(tmp_path):
    rooms = ("experiments", "tools", "classroom", "docs", "findings")
    left_out = shutil.ignore_patterns(*rooms, ".git", ".venv", "out", "smollm2.*", "sentiment")
    shutil.copytree(ROOT, tmp_path / "card", ignore=left_out)
    command = [sys.executable, "-m", "pytest"]
    done = subprocess.run(command, cwd=tmp_path / "card", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "failed" not in done.stdout
