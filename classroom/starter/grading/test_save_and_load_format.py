"""save(): the file as numpy reads it, so that no load can make up for what is wrong in it."""

import json

import numpy as np
import pytest
import torch

from conftest import SUBSETS, about, check, make_known, runs


@pytest.mark.parametrize("sites", SUBSETS)
def test_the_file(dice, tmp_path, sites):
    model, vectors = make_known(dice, sites)
    values = {name: p.detach().clone() for name, p in vectors.named_parameters()}
    path = tmp_path / "task"
    vectors.save(path)
    there = [p.name for p in tmp_path.iterdir()]
    words = "save(path) must leave one file there, called path: np.savez adds .npz to a name, but not to an open file"
    check(there == ["task"], f"{words}. There is {', '.join(there) or 'nothing'}, and task was asked for")
    with np.load(path) as file:  # no pickle: numpy refuses it
        found = dict(file)
    words = "a file must hold 'about' and the matrices of its sites, and no others"
    check(set(found) == {"about", *values}, f"{words}: {sites} are in {sorted(found)}")
    for name, p in values.items():
        check(found[name].dtype == np.float32, f"{name} must be float32 in the file, not {found[name].dtype}")
        check(np.array_equal(found[name], p.numpy()), f"{name} in the file is not the vectors' {name}, bit for bit")
    told, wanted = found["about"].item(), about(model, vectors)
    check(isinstance(told, bytes), "'about' must hold the JSON as bytes: np.bytes_ makes them of a text")
    told = json.loads(told)
    check(set(told) == set(wanted), f"'about' must have the keys {sorted(wanted)}, not {sorted(told)}")
    for key in wanted:
        check(told[key] == wanted[key], f"about[{key!r}] must be {wanted[key]!r}, not {told[key]!r}")
    for name, p in vectors.named_parameters():
        check(p.requires_grad and torch.equal(p, values[name]), f"save changed {name}, or made it untrainable")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_vectors_held_in_another_dtype(dice, tmp_path, dtype):
    """As they are when the model was cast after attach."""
    _, vectors = make_known(dice)
    vectors.to(dtype)
    words = f"vectors that are held in {dtype} must be saved as float32"
    runs(words, vectors.save, tmp_path / "task.npz")
    with np.load(tmp_path / "task.npz") as file:
        check(file["l_k"].dtype == np.float32, f"{words}, not {file['l_k'].dtype}")
        check(np.array_equal(file["l_k"], vectors.l_k.detach().float().numpy()), f"{words}, with their values")


def test_how_they_were_trained_is_kept(dice, tmp_path):
    model, vectors = make_known(dice)
    how = {"lr": 0.1, "steps": 200}
    words = "save takes how, a dict that says how the vectors were trained"
    runs(words, lambda: vectors.save(tmp_path / "task.npz", how))
    with np.load(tmp_path / "task.npz") as file:
        told = json.loads(file["about"].item())
    check(told.get("how") == how, f"{words}, and 'about' must have it under 'how'; there it is {told.get('how')!r}")
    check(
        set(told) == {*about(model, vectors), "how"}, f"beside 'how' everything else must stay in 'about', not {told}"
    )
