"""save(): there is the old file or the new one, whatever happens on the way."""

import contextlib
import os
from pathlib import Path

import numpy as np

from conftest import check, make_known


def test_a_crash_leaves_the_old_file(dice, tmp_path, monkeypatch):
    """The disk is full, say, when half of the arrays are written."""
    _, vectors = make_known(dice)
    path = tmp_path / "task.npz"
    path.write_bytes(b"the old file")

    def crash(file, **arrays):
        if hasattr(file, "write"):
            file.write(b"half of")
        else:
            Path(file).write_bytes(b"half of")
        raise OSError("No space left on device")

    for name in ("savez", "savez_compressed"):
        monkeypatch.setattr(np, name, crash)
    with contextlib.suppress(OSError):
        vectors.save(path)
    words = "a crash while save writes must leave the old file: write under another name and rename (replace_file does)"
    check(path.exists() and path.read_bytes() == b"the old file", words)


def test_the_new_file_takes_the_place_of_the_old_one(dice, tmp_path):
    """A program that has the old file open continues to read it."""
    _, vectors = make_known(dice)
    path = tmp_path / "task.npz"
    path.write_bytes(b"the old file")
    with open(path, "rb") as old:
        vectors.save(path)
        check(path.read_bytes() != b"the old file", "save(path) leaves what was at path before, and must replace it")
        words = "save wrote into the old file: write under another name, and rename that into place (replace_file does)"
        check(old.read() == b"the old file", words)


def test_a_crash_before_the_new_file_is_in_place_leaves_the_old_one(dice, tmp_path, monkeypatch):
    _, vectors = make_known(dice)
    path = tmp_path / "task.npz"
    path.write_bytes(b"the old file")

    def crash(*_, **__):
        raise OSError("stopped before the rename")

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, crash)
    with contextlib.suppress(OSError):
        vectors.save(path)
    words = "a crash right before the rename must leave the old file: do not remove it first, the rename replaces it"
    check(path.exists() and path.read_bytes() == b"the old file", words)
