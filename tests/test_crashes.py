"""A run that is killed before any rename, or in the middle of a save, resumes to the same bits."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
import train
from conftest import make_gpt

pytestmark = pytest.mark.slow


def read_run(folder):
    """What a finished run leaves: the vectors, and metrics.csv without the column of the clock."""
    with np.load(folder / "ia3.npz") as file:
        vectors = {name: file[name].tobytes() for name in file.files}
    metrics = [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]
    return vectors, metrics


@pytest.mark.parametrize("kind", ["rename", "half-save"])
def test_a_killed_run_resumes_to_the_same_bits(tiny_run, kind):
    folder, flags = tiny_run
    common.save(make_gpt(dropout=0.2), folder / "base.pt")  # so that a resumed run must know its dropout, too
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = [*flags, "--steps", "3", "--eval-interval", "1"]
    assert train.main([*flags, "--out", f"{folder}/whole"]) == 0
    wanted = read_run(folder / "whole")
    killed = 0
    for n in range(1, 40):
        out = folder / f"{kind}-{n}"
        command = [sys.executable, "tests/crash_worker.py", kind, str(n), *flags, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        if done.returncode == 0:  # there is no n-th event
            break
        assert done.returncode == 137, done.stderr
        killed += 1
        half = [path for path in out.glob("*") if path.name not in ("last.pt", "metrics.csv", "ia3.npz")]
        assert all(path.name.endswith(".tmp") for path in half)  # no half file under a final name
        assert train.main([*flags, "--out", str(out), "--resume"]) == 0
        assert read_run(out) == wanted, n
        assert not list(out.glob("*.tmp"))
    torch.set_num_threads(threads)
    assert killed == {"rename": 10, "half-save": 4}[kind]  # last.pt, metrics.csv four times each, ia3.npz, run.json
