"""Files broken on purpose, for every room: each is read, or refused in one line, and no code in it runs.

Two kinds of damage, drawn from a seed. Bytes: cut, flipped, overwritten, repeated, as disks and copies do it. Meaning:
the file is opened, one thing in it is replaced by a wrong one (another type, another shape, NaN, nothing at all), and
it is written anew, as another program or another version would. Each file is given to the command that reads it, in
this process, under a limit on its memory, so that nothing but SystemExit may leave main().

FUZZ=2000 python -m pytest -m "slow or not slow" tests/test_fuzz.py */tests/test_fuzz_*.py   damages each 2000 times
"""

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import zipfile

import numpy as np
import torch

DAMAGES = int(os.environ.get("FUZZ", 100))  # copies of each file, half of them damaged in their bytes, half in meaning
MEMORY = 6 * 2**30  # what a reader may take beyond what this process has mapped already


# --- damage ---


def damage_bytes(raw, dice):
    """Return raw with one accident in it."""
    raw = bytearray(raw)
    at = dice.randrange(len(raw))
    n = dice.choice([1, 2, 8, 64, 512])
    kind = dice.randrange(6)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        raw[at] ^= 1 << dice.randrange(8)
    elif kind == 2:
        raw[at : at + n] = bytes(len(raw[at : at + n]))
    elif kind == 3:
        raw[at : at + n] = dice.randbytes(n)
    elif kind == 4:
        del raw[at : at + n]
    else:
        raw[at:at] = raw[at : at + n]
    return bytes(raw)


def wrong_values(value, dice):
    """Return something else in value's place."""
    others = [None, "", "gpt2", -1, 0, 2.5, 10**9, 2**70, float("nan"), [], {}, True, b"x", torch.zeros(3)]
    if isinstance(value, torch.Tensor) and value.numel():
        bad = value.detach().clone().float()
        bad.view(-1)[0] = float("nan")
        others += [bad, value.detach().flatten()[:-1], value.detach().double(), value.detach().to(torch.int64)]
        others += [value.detach().to(torch.complex64), value.detach().float().to_sparse(), value.detach().to("meta")]
        others += [value.detach().float().to(torch.float8_e4m3fn)]
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        others = [value[..., :-1], value.astype(complex), value * np.nan, value.astype(np.int64), value.astype("S4")]
        others += [np.zeros((2**10, 2**10), dtype=np.float32)]
    return dice.choice(others)


def damage_meaning(tree, dice):
    """Return a copy of nested dicts and lists in which one thing is replaced, left out, or added."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return tree
        key = dice.choice(list(keys))
        if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
            node = node[key]
            continue
        if dice.random() < 0.2:
            del node[key]
        elif isinstance(node, dict) and dice.random() < 0.1:
            node["no such key"] = 1
        else:
            node[key] = wrong_values(node[key], dice)
        return tree


def rewrite(path, dice):
    """Damage the meaning of the file at path; False for a kind of file that has none beyond its bytes."""
    if path.suffix in (".pt", ".bin") and path.parent.name != "bin":
        torch.save(damage_meaning(torch.load(path, weights_only=True), dice), path)
    elif path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name != "about"}
            about = json.loads(file["about"].item()) if "about" in file.files else None
        if about and dice.random() < 0.5:
            about = damage_meaning(about, dice)
        else:
            arrays = damage_meaning(arrays, dice)
        arrays = {str(name): np.asarray(a) for name, a in arrays.items() if not isinstance(a, torch.Tensor)}
        if about is not None:
            arrays["about"] = np.bytes_(json.dumps(about, default=lambda _: None))
        np.savez(path, **{name: a for name, a in arrays.items() if a.dtype != object})
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_meaning(json.loads(path.read_text()), dice), default=lambda _: None))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        damaged = damage_meaning(rows, dice)
        path.write_text("\n".join(json.dumps(row, default=lambda _: None) for row in damaged))
    else:
        return False
    return True


# --- what must hold ---


def check_read(folder, name, command, capsys):
    """Run the command on folder's damaged file: it works, or says in one line what is wrong; nothing is left behind."""
    capsys.readouterr()
    status = command(folder)  # an exception leaves main() and fails the test here
    err = capsys.readouterr().err
    assert status in (0, 1, 2), (name, status)
    if status == 2:
        assert err.count("\n") == 1 and len(err) < 2000, (name, err)
    assert not list(folder.rglob("*.tmp")), name
    shutil.rmtree(folder / "new", ignore_errors=True)


def damage_and_read(folder, work, name, command, capsys, n=DAMAGES, rewrite=rewrite):
    """Damage the file called name n times, each time in a fresh copy of folder, and run the command that reads it."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        mapped = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, usual[1]))
    try:
        for seed in range(n):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder, work)
            path = work / name
            dice = random.Random(f"{name} {seed}")
            if seed % 2 == 0 or not rewrite(path, dice):
                path.write_bytes(damage_bytes((folder / name).read_bytes(), dice))
            print(f"{name}, damage {seed}", flush=True)  # shown if it fails
            check_read(work, name, command, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


def check_no_code_runs(folder, work, name, command, capsys):
    """Put code into the file called name, in several ways, and run the command that reads it."""
    shutil.copytree(folder, work)
    canary = work / "canary"
    pickle.loads(pickle.dumps(Canary(canary))).close()  # the canary sings where it is unpickled
    assert canary.exists()
    canary.unlink()
    for raw in poisoned(canary):
        (work / name).write_bytes(raw)
        check_read(work, name, command, capsys)
        assert not canary.exists()


class Canary:
    """A pickle of this makes a file where code runs."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def poisoned(canary):
    """Ways to put code into a file. Returns their bytes."""
    plain = io.BytesIO()
    torch.save({"model": Canary(canary), "model_args": {}}, plain)
    old = io.BytesIO()
    torch.save({"model": Canary(canary)}, old, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.savez(array, about=np.array([Canary(canary)], dtype=object), l_k=np.ones((1, 8)))
    npz = io.BytesIO()
    with zipfile.ZipFile(npz, "w") as z:
        z.writestr("about.npy", pickle.dumps(Canary(canary)))
    return [pickle.dumps(Canary(canary)), plain.getvalue(), old.getvalue(), array.getvalue(), npz.getvalue()]
