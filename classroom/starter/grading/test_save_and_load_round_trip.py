"""save() and load(): what one writes the other reads, bit for bit; and load reads what numpy wrote by the handout."""

import numpy as np
import pytest
import torch

from conftest import SUBSETS, about, check, make_known, runs, write
from ia3 import IA3


def compare(again, vectors, values, model):
    check(isinstance(again, IA3), "load must return an IA3")
    found = {name for name, _ in again.named_parameters()}
    check(found == set(values), f"{sorted(values)} were saved, but {sorted(found)} come back")
    for name, p in again.named_parameters():
        check(p.dtype == torch.float32 and p.requires_grad, f"{name} must come back as a float32 Parameter, trainable")
        check(torch.equal(p, values[name]), f"{name} does not come back bit for bit")
    check(again.fingerprint == vectors.fingerprint, "the fingerprint of the base must come back as .fingerprint")
    check(model.ia3 is None, "load must not attach the vectors: it returns them")


@pytest.mark.parametrize("sites", SUBSETS)
def test_there_and_back(dice, given_start, tmp_path, sites):
    model, vectors = make_known(dice, sites)
    values = {name: p.detach().clone() for name, p in vectors.named_parameters()}
    vectors.save(tmp_path / "task.npz")
    compare(IA3.load(tmp_path / "task.npz", model), vectors, values, model)


@pytest.mark.parametrize("sites", SUBSETS)
def test_a_file_like_folio_opens(dice, given_start, tmp_path, sites):
    model, vectors = make_known(dice, sites)
    write(tmp_path / "theirs.npz", about(model, vectors), vectors)
    compare(IA3.load(tmp_path / "theirs.npz", model), vectors, dict(vectors.named_parameters()), model)
    values = dict(vectors.named_parameters())
    compare(IA3.load(tmp_path / "theirs.npz", model.bfloat16()), vectors, values, model)  # the base, in another dtype


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_file_in_another_dtype_becomes_float32_or_is_refused(dice, given_start, tmp_path, dtype):
    model, vectors = make_known(dice)
    write(tmp_path / "theirs.npz", about(model, vectors), vectors, l_k=vectors.l_k.detach().numpy().astype(dtype))
    try:
        again = IA3.load(tmp_path / "theirs.npz", model)
    except ValueError:
        return
    words = f"l_k is {dtype.__name__} in the file, and must become float32 (or be refused)"
    check(again.l_k.dtype == torch.float32, f"{words}, not {again.l_k.dtype}")


def test_another_block_size_or_dropout_is_no_other_base(dice, given_start, tmp_path):
    model, vectors = make_known(dice)
    told = about(model, vectors)
    told["config"] |= {"block_size": 4, "dropout": 0.1}
    write(tmp_path / "theirs.npz", told, vectors)
    words = "refused: a file whose config has another block_size and dropout. Which base it is the fingerprint says"
    runs(words, IA3.load, tmp_path / "theirs.npz", model)
