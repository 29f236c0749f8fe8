"""save(): the file as numpy reads it, so that no load can make up for what is wrong in it."""

import json

import numpy as np
import pytest
import torch

from conftest import SUBSETS, about, check, make_known


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
