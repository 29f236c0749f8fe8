"""load() and save(): what is damaged, another base's, or not one task's is refused, and no code is run."""

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


def test_no_code_is_run(dice, given_start, tmp_path):
    model, vectors = make_known(dice)
    pickled = np.empty(tuple(vectors.l_v.shape), dtype=object)  # the right shape, since that may be looked at first
    pickled[0, 0] = RunsCode(tmp_path / "code was run")
    write(tmp_path / "task.npz", about(model, vectors), vectors, l_v=pickled)
    refused("a file with pickled code", IA3.load, tmp_path / "task.npz", model)
    check(not (tmp_path / "code was run").exists(), "code in the file was run: load with allow_pickle=False")


def test_sizes_are_looked_up_before_an_array_is_read(dice, given_start, tmp_path, monkeypatch):
    model, vectors = make_known(dice, n_layer=3)
    path = tmp_path / "task.npz"
    write(path, about(model, vectors), vectors, l_k=np.ones((3 * 20, model.config.n_embd), dtype=np.float32))
    read = []
    get = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, name: (read.append(name), get(self, name))[1])
    refused("a file whose l_k has far more values than this base takes", IA3.load, path, model)
    words = (
        "look at the shapes, which read_shapes returns, before an array is read: a small file can unfold to gigabytes"
    )
    check(set(read) <= {"about"}, words)


def test_what_the_file_says_of_itself_may_be_anything(dice, given_start, tmp_path):
    model, vectors = make_known(dice)
    for told in ([], "text", 7, None):
        write(tmp_path / "task.npz", told, vectors)
        refused(f"a file whose 'about' is {told!r}, which is not a dict", IA3.load, tmp_path / "task.npz", model)


def with_last(array, value):
    array = array.copy()
    array[-1, -1] = value
    return array


def test_damaged_files_are_refused(dice, given_start, tmp_path):
    model, vectors = make_known(dice, n_layer=3)  # n_embd is even, so no matrix is square
    path = tmp_path / "task.npz"
    told = about(model, vectors)
    write(path, told, vectors)
    raw = path.read_bytes()
    l_k, l_v, l_ff = (p.detach().numpy() for p in vectors.parameters())
    for what, changes in {
        "a file without l_v that says it has one": {"l_v": None},
        "a file whose l_k is transposed": {"l_k": l_k.T},
        "a file with NaN in the last entry of l_ff": {"l_ff": with_last(l_ff, np.nan)},
        "a file with NaN in the last entry of l_v": {"l_v": with_last(l_v, np.nan)},
        "a file with infinity in the last entry of l_k": {"l_k": with_last(l_k, np.inf)},
        "a file of arrays and nothing about them": {"about": None},
    }.items():
        write(path, told, vectors, **changes)
        refused(what, IA3.load, path, model)
    write(path, {key: told[key] for key in ("config", "vectors")}, vectors)
    refused("a file whose 'about' has no fingerprint", IA3.load, path, model)
    for keep in (0, 10, len(raw) // 2, len(raw) - 10):
        path.write_bytes(raw[:keep])
        refused(f"a file cut after {keep} of {len(raw)} bytes", IA3.load, path, model)


def test_a_file_that_is_not_there(dice, given_start, tmp_path):
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
    infinite = make_vectors(dice, config, fingerprint="0" * 64)
    infinite.l_ff.data[-1, -1] = float("inf")
    wrong = {"vectors never attached to a base": unattached, "stacked vectors": stacked}
    wrong["vectors with infinity in the last entry of l_ff"] = infinite
    for what, vectors in wrong.items():
        refused(f"saving {what}", vectors.save, tmp_path / "task.npz")
        check(not list(tmp_path.iterdir()), f"{what} were refused, but a file was written")
