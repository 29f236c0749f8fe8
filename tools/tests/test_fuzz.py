"""Files broken on purpose, a few thousand of them: each is read, or refused in one line; no code of theirs runs.

Two kinds of damage, drawn from a seed. Bytes: cut, flipped, overwritten, repeated, as disks and copies do it. Meaning:
the file is opened, one thing in it is replaced by a wrong one (another type, another shape, NaN, nothing at all), and
it is written anew, as another program or another version would. Each file is given to the command that reads it, in
this process, so that nothing but SystemExit may leave main().
"""

import copy
import io
import json
import pickle
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file as save_safe

import common
import sample
import train
from conftest import make_gpt, make_ia3, make_llama, make_llama_with_bpe
from experiments import ranking
from tools import convert, plot

DAMAGES = 160  # copies of each file, half of them damaged in their bytes, half in their meaning
PICTURES = 20  # the same of what is drawn: a picture takes a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One good file of every kind, all of one tiny base."""
    folder = tmp_path_factory.mktemp("good")
    model = make_gpt(n_layer=1, n_embd=8, block_size=8)
    common.save(model, folder / "base.pt")
    make_ia3(model).save(folder / "ia3.npz")
    (folder / "text").mkdir()
    (folder / "jsonl").mkdir()
    (folder / "bin").mkdir()
    for split in ("train", "val"):
        (folder / f"text/{split}.txt").write_text("In the beginning God created. " * 4, encoding="utf-8")
        line = json.dumps({"prompt": "a", "completion": "b"})
        (folder / f"jsonl/{split}.jsonl").write_text(f"{line}\n{line}\n")
        np.arange(64, dtype=np.uint16).tofile(folder / f"bin/{split}.bin")
    (folder / "choices").mkdir()
    for split in ("train", "val"):
        line = json.dumps({"prompt": "a", "choices": ["b", "cd"], "label": 1})
        (folder / f"choices/{split}.jsonl").write_text(f"{line}\n{line}\n")
    assert train.main(train_flags(folder, "text", folder / "run")) == 0
    common.save(make_llama(n_layer=1, block_size=8), folder / "llama.pt")
    convert.to_hf(common.load(folder / "base.pt"), folder / "hf")
    shutil.copytree(folder / "hf", folder / "safe")
    save_safe(torch.load(folder / "hf/pytorch_model.bin", weights_only=True), folder / "safe/model.safetensors")
    convert.to_peft(make_ia3(model), folder / "adapter", "base.pt")
    convert.to_hf(make_llama_with_bpe(n_layer=1, block_size=8), folder / "llama")
    weights = torch.load(folder / "llama/pytorch_model.bin", weights_only=True)
    (folder / "llama/pytorch_model.bin").unlink()
    save_safe(weights, folder / "llama/model-1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (folder / "llama/model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def train_flags(folder, data, out):
    flags = f"--base {folder}/base.pt --data {folder}/{data} --out {out} --steps 1 --batch-size 2 --eval-windows 1"
    return [*flags.split(), "--device", "cpu"]


def read_base(folder):
    return sample.main(f"--base {folder}/base.pt --prompt A --tokens 1 --device cpu".split())


def read_vectors(folder):
    return sample.main(f"--base {folder}/base.pt --ia3 {folder}/ia3.npz --prompt A --tokens 1 --device cpu".split())


def read_llama(folder):
    return sample.main(f"--base {folder}/llama.pt --prompt A --tokens 1 --device cpu".split())


def choose(folder):
    flags = f"--base {folder}/base.pt --data {folder}/choices --out {folder}/new --steps 1 --batch-size 2"
    return ranking.main([*flags.split(), "--device", "cpu"])


def convert_hf(name):
    return lambda folder: convert.main(["hf", f"{folder}/{name}", "--out", f"{folder}/new/base.pt"])


def convert_adapter(folder):
    flags = f"from-peft --base {folder}/base.pt --adapter {folder}/adapter --out {folder}/new/ia3.npz"
    return convert.main(flags.split())


def draw(folder):
    return plot.main([f"{folder}/run"])


def resume(folder):
    return train.main([*train_flags(folder, "text", folder / "run"), "--resume"])


def train_on(data):
    return lambda folder: train.main(train_flags(folder, data, folder / "new"))


# the file that is damaged, and the command that reads it
READERS = [
    ("base.pt", read_base),
    ("ia3.npz", read_vectors),
    ("run/last.pt", resume),
    ("text/train.txt", train_on("text")),
    ("jsonl/train.jsonl", train_on("jsonl")),
    ("bin/train.bin", train_on("bin")),
    ("choices/train.jsonl", choose),
    ("llama.pt", read_llama),
    ("hf/pytorch_model.bin", convert_hf("hf")),
    ("hf/config.json", convert_hf("hf")),
    ("safe/model.safetensors", convert_hf("safe")),
    ("llama/config.json", convert_hf("llama")),
    ("llama/tokenizer.json", convert_hf("llama")),
    ("llama/model.safetensors.index.json", convert_hf("llama")),
    ("adapter/adapter_model.safetensors", convert_adapter),
    ("adapter/adapter_config.json", convert_adapter),
    ("run/metrics.csv", draw),
    ("run/ia3.npz", draw),
]


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
        others = [value[:, :-1], value.astype(complex), value * np.nan, value.astype(np.int64), value.astype("S4")]
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
            about = json.loads(file["about"].item())
        if dice.random() < 0.5:
            about = damage_meaning(about, dice)
        else:
            arrays = damage_meaning(arrays, dice)
        arrays = {str(name): np.asarray(a) for name, a in arrays.items() if not isinstance(a, torch.Tensor)}
        text = json.dumps(about, default=lambda _: None)
        np.savez(path, about=np.bytes_(text), **{name: a for name, a in arrays.items() if a.dtype != object})
    elif path.suffix == ".safetensors":
        tensors = damage_meaning(load_safe(path), dice)
        save_safe({name: t.contiguous() for name, t in tensors.items() if is_storable(t)}, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(damage_meaning(json.loads(path.read_text()), dice), default=lambda _: None))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        damaged = damage_meaning(rows, dice)
        path.write_text("\n".join(json.dumps(row, default=lambda _: None) for row in damaged))
    else:
        return False
    return True


def is_storable(t):
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta


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


@pytest.mark.parametrize("name, command", READERS, ids=[f"{name}-{command.__name__}" for name, command in READERS])
def test_a_damaged_file_is_read_or_refused_in_one_line(folder, tmp_path, capsys, name, command):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    path = work / name
    good = path.read_bytes()
    n = PICTURES if command is draw else DAMAGES
    for seed in range(n):
        dice = random.Random(f"{name} {seed}")
        shutil.rmtree(work / "run")
        shutil.copytree(folder / "run", work / "run")
        path.write_bytes(good)
        if seed % 2 == 0 or not rewrite(path, dice):
            path.write_bytes(damage_bytes(good, dice))
        print(f"{name}, damage {seed}", flush=True)  # shown where it fails
        check_read(work, name, command, capsys)


class Canary:
    """A pickle of this makes a file where code runs."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def poisoned(path, canary):
    """Ways to put code into the file at path. Returns their bytes."""
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


@pytest.mark.parametrize("name, command", READERS, ids=[f"{name}-{command.__name__}" for name, command in READERS])
def test_no_code_of_a_file_runs(folder, tmp_path, capsys, name, command):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary))).close()  # the canary sings where it is unpickled
    assert canary.exists()
    canary.unlink()
    for raw in poisoned(work / name, canary):
        (work / name).write_bytes(raw)
        check_read(work, name, command, capsys)
        assert not canary.exists()
