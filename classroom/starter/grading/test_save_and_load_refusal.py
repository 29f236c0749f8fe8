"""load() and save(): what is damaged, or another base's, or no one task's, is refused, and no code is run."""

import os

import numpy as np

from conftest import about, check, make_gpt, make_known, make_vectors, refused, write
from ia3 import IA3


def test_another_base_is_refused(dice, given_start, tmp_path):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8}
    model, vectors = make_known(dice, **sizes)
    path = tmp_path / "task.npz"
    write(path, about(model, vectors), vectors)
    refused("vectors of another base of the same shape", IA3.load, path, make_gpt(dice, **sizes))
    for wrong in ({"n_layer": 3}, {"n_embd": 12}):
        refused(f"vectors for another shape ({wrong})", IA3.load, path, make_gpt(dice, **(sizes | wrong)))
    told = about(model, vectors)
    last = "1" if told["fingerprint"][-1] == "0" else "0"
    write(path, told | {"fingerprint": told["fingerprint"][:-1] + last}, vectors)
    refused("a fingerprint that differs in its last digit", IA3.load, path, model)


class RunsCode:
    """What a pickle can do to you when it is read: this one makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_shapes_are_compared_before_an_array_is_read(dice, given_start, tmp_path, monkeypatch):
    model, vectors = make_known(dice, n_layer=3)
    path = tmp_path / "task.npz"
    write(path, about(model, vectors), vectors, l_k=vectors.l_k.detach().numpy().T)
    read = []
    get = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1])
    refused("a file whose l_k is transposed", IA3.load, path, model)
    words = "compare the shapes, which read_shapes tells, before an array is read: a small file can unfold to gigabytes"
    check(set(read) <= {"about"}, words)


def test_damaged_files_are_refused(dice, given_start, tmp_path):
    model, vectors = make_known(dice, n_layer=3)  # n_embd is even, so no matrix is square
    path = tmp_path / "task.npz"
    told = about(model, vectors)
    write(path, told, vectors)
    raw = path.read_bytes()
    l_k, l_v, l_ff = (p.detach().numpy() for p in vectors.parameters())
    pickled = np.empty(l_v.shape, dtype=object)  # the right shape, since that may be looked at first
    pickled[0, 0] = RunsCode(tmp_path / "code was run")
    for what, changes in {
        "a file without l_v that says it has one": {"l_v": None},
        "a file whose l_k is transposed": {"l_k": l_k.T},
        "a file with NaN in l_ff": {"l_ff": np.full_like(l_ff, np.nan)},
        "a file with infinity in l_k": {"l_k": np.full_like(l_k, np.inf)},
        "a file with pickled code": {"l_v": pickled},
        "a file of arrays and nothing about them": {"about": None},
    }.items():
        write(path, told, vectors, **changes)
        refused(what, IA3.load, path, model)
        check(not (tmp_path / "code was run").exists(), "code in the file was run: load with allow_pickle=False")
    write(path, {key: told[key] for key in ("config", "vectors")}, vectors)
    refused("a file whose 'about' has no fingerprint", IA3.load, path, model)
    for keep in (0, 10, len(raw) // 2, len(raw) - 10):
        path.write_bytes(raw[:keep])
        refused(f"a file cut after {keep} of {len(raw)} bytes", IA3.load, path, model)


def test_a_file_that_is_not_there(dice, tmp_path):
    words = "a file that is not there must raise an OSError (FileNotFoundError)"
    try:
        IA3.load(tmp_path / "nothing.npz", make_gpt(dice))
    except NotImplementedError:
        raise
    except OSError:
        return
    except Exception as e:
        check(False, f"{words}, not {type(e).__name__}")
    check(False, words)


def test_what_cannot_be_saved_is_refused(dice, tmp_path):
    config = make_gpt(dice).config
    unattached = make_vectors(dice, config)
    stacked = make_vectors(dice, config, n_tasks=2, fingerprint="0" * 64)
    for what, vectors in {"vectors never attached to a base": unattached, "stacked vectors": stacked}.items():
        refused(f"saving {what}", vectors.save, tmp_path / "task.npz")
        check(not list(tmp_path.iterdir()), f"{what} were refused, but a file was written")
