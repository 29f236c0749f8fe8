"""save() and load(): one .npz, bit for bit, without pickle; and what is damaged or another base's is refused."""

import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import SUBSETS, check, make_gpt, make_vectors, refused

from ia3 import IA3, fingerprint


def make_task(dice, sites=("k", "v", "ff"), **sizes):
    model = make_gpt(dice, **sizes)
    return model, make_vectors(dice, model.config, sites, fingerprint=fingerprint(model))


def read(path):
    """The arrays in a file, without pickle."""
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("sites", SUBSETS)
def test_there_and_back(dice, given_start, tmp_path, sites):
    model, vectors = make_task(dice, sites)
    values = {name: p.detach().clone() for name, p in vectors.named_parameters()}
    path = tmp_path / "task.npz"
    vectors.save(path)
    check([p.name for p in tmp_path.iterdir()] == ["task.npz"], "save(path) must leave one file there, called path")
    found = read(path)
    for name, p in values.items():
        check(name in found, f"np.load finds no {name} in the file, but {sorted(found)}")
        check(np.array_equal(found[name], p.numpy()), f"{name} in the file is not the vectors' {name}, bit for bit")
    words = "a file must hold the matrices of its sites, and no others"
    check({name for name in found if name.startswith("l_")} == set(values), words)
    most = 4 * sum(p.numel() for p in values.values()) + 2048
    check(path.stat().st_size <= most, "4 bytes a value and 2 KiB must do")
    again = IA3.load(path, model)
    check(isinstance(again, IA3), "load must return an IA3")
    check({name for name, _ in again.named_parameters()} == set(values), f"{sites} were saved, but others come back")
    for name, p in again.named_parameters():
        check(torch.equal(p, values[name]), f"{name} does not come back bit for bit")
        check(p.dtype == torch.float32 and p.requires_grad, f"{name} must come back as a float32 Parameter, trainable")
    check(again.fingerprint == vectors.fingerprint, "the fingerprint of the base must come back as .fingerprint")
    check(model.ia3 is None, "load must not attach the vectors: it returns them")


def test_a_file_of_the_handouts_format_opens(dice, given_start, tmp_path):
    """Written by numpy here, so that load is not tried on what save writes alone."""
    model, vectors = make_task(dice)
    arrays = {name: p.detach().numpy() for name, p in vectors.named_parameters()}
    about = {"config": asdict(model.config), "vectors": list(arrays), "fingerprint": vectors.fingerprint}
    path = tmp_path / "theirs.npz"
    np.savez(path, about=np.bytes_(json.dumps(about)), **arrays)
    for name, p in IA3.load(path, model).named_parameters():
        check(
            np.array_equal(arrays[name], p.detach().numpy()), f"{name} of a file like data/folio.npz comes back changed"
        )


def test_another_base_is_refused(dice, given_start, tmp_path):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8}
    model, vectors = make_task(dice, **sizes)
    vectors.save(tmp_path / "task.npz")
    path = tmp_path / "task.npz"
    refused("vectors of another base of the same shape", IA3.load, path, make_gpt(dice, **sizes))
    for wrong in ({"n_layer": 3}, {"n_embd": 12}):
        refused(f"vectors for another shape ({wrong})", IA3.load, path, make_gpt(dice, **(sizes | wrong)))
    IA3.load(tmp_path / "task.npz", model.bfloat16())  # the same base, whatever it is held in


class RunsCode:
    """What a pickle can do to you when it is read: this one makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_damaged_files_are_refused(dice, given_start, tmp_path):
    model, vectors = make_task(dice, n_layer=3)  # n_embd is even, so no matrix is square
    path = tmp_path / "task.npz"
    vectors.save(path)
    raw = path.read_bytes()
    arrays = read(path)
    old = {"config": asdict(model.config), "vectors": ["l_k", "l_v", "l_ff"]}
    pickled = np.empty(arrays["l_v"].shape, dtype=object)  # the right shape, since that may be looked at first
    pickled[0, 0] = RunsCode(tmp_path / "code was run")
    for what, changes in {
        "a file without l_v that says it has one": {"l_v": None},
        "a file whose l_k is transposed": {"l_k": arrays["l_k"].T},
        "a file with NaN in l_ff": {"l_ff": np.full_like(arrays["l_ff"], np.nan)},
        "a file with infinity in l_k": {"l_k": np.full_like(arrays["l_k"], np.inf)},
        "a file with pickled code": {"l_v": pickled},
        "a file whose 'about' has no fingerprint": {"about": np.bytes_(json.dumps(old))},
        "a file of arrays and nothing about them": {n: None for n in arrays if not n.startswith("l_")},
    }.items():
        np.savez(path, **{name: a for name, a in (arrays | changes).items() if a is not None})
        refused(what, IA3.load, path, model)
        check(not (tmp_path / "code was run").exists(), "code in the file was run: load with allow_pickle=False")
    for keep in (0, 10, len(raw) // 2, len(raw) - 10):
        path.write_bytes(raw[:keep])
        refused(f"a file cut after {keep} of {len(raw)} bytes", IA3.load, path, model)
    try:
        IA3.load(tmp_path / "nothing.npz", model)
    except OSError:
        return
    except Exception as e:
        check(False, f"a file that is not there must raise an OSError (FileNotFoundError), not {type(e).__name__}")
    check(False, "a file that is not there must raise an OSError (FileNotFoundError)")


def test_what_cannot_be_saved_is_refused(dice, tmp_path):
    config = make_gpt(dice).config
    unattached = make_vectors(dice, config)
    stacked = make_vectors(dice, config, n_tasks=2, fingerprint="0" * 64)
    for what, vectors in {"vectors never attached to a base": unattached, "stacked vectors": stacked}.items():
        refused(f"saving {what}", vectors.save, tmp_path / "task.npz")
        check(not list(tmp_path.iterdir()), f"{what} were refused, but a file was written")
