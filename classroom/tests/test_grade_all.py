"""grade_all.py: what it finds, what it says, and what a submission cannot do to others or to what is left afterwards.

What a submission tries here is harmless: a note in a file, a process that sleeps, memory asked for and not used.
"""

import csv
import io
import json
import subprocess
import sys
import zipfile

import pytest
from test_classroom import COUNT, ROOT, SHEET, ended, keep_rows, solution

from classroom import make
from classroom.grade_all import collect


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """A starter whose sheet has one row, which is enough here."""
    folder = tmp_path_factory.mktemp("grade_all") / "starter"
    make.make(folder)
    for path in folder.glob("data/*/*.txt"):
        path.write_bytes(b"")
    keep_rows(folder, ["count"])
    return folder


def with_code(code):
    """The solution's ia3.py, in which count() does this first; code is one line."""
    old = f"return {COUNT}"
    return solution("ia3.py").replace(old, f"{code}; {old}")


def grade_all(*flags):
    command = [sys.executable, str(ROOT / "classroom/grade_all.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_submissions_are_found_graded_and_kept_apart(starter, tmp_path):
    submissions = tmp_path / "submissions"
    (submissions / "ada/homework/solution").mkdir(parents=True)
    for file in ("ia3.py", "model.py"):
        (submissions / "ada/homework/solution" / file).write_text(solution(file))
    with zipfile.ZipFile(submissions / "ben.ZIP", "w") as archive:
        archive.writestr("hand in/ia3.py", solution("ia3.py").replace(COUNT, "0"))
        archive.writestr("__MACOSX/hand in/ia3.py", "not Python")
    with zipfile.ZipFile(submissions / "dan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ia3.py", solution("ia3.py"))
    damaged = bytearray((submissions / "dan.zip").read_bytes())
    damaged[30 + len("ia3.py")] = 0xFF  # the first compressed byte: no such kind of block, so a zlib.error
    (submissions / "dan.zip").write_bytes(damaged)
    (submissions / ".DS_Store").touch()
    (submissions / "eve").mkdir()
    left = tmp_path / "left"
    spoil = f"""
import pathlib, subprocess
for path in pathlib.Path(__file__).parent.rglob("*.*"):
    if path.suffix in (".py", ".json"):
        path.write_text(path.read_text() + " ")  # a note in each file of the copy that it is graded in
pathlib.Path({str(left)!r}).write_text(str(subprocess.Popen(["sleep", "600"]).pid))
"""
    (submissions / "eve/ia3.py").write_text(solution("ia3.py") + spoil)
    before = {path: path.read_bytes() for path in starter.rglob("*") if path.is_file()}

    result = grade_all(submissions, "--starter", starter, "--out", tmp_path / "graded", "--limit", "300")
    assert result.returncode == 0, result.stderr
    table = list(csv.DictReader(io.StringIO(result.stdout)))
    points = next(row["points"] for row in SHEET if row["name"] == "count")
    assert [(row["submission"], row["total"], row["count"]) for row in table] == [
        ("ada", str(points), str(points)),
        ("ben.ZIP", "0", "0"),
        ("dan.zip", "0", "0"),
        ("eve", str(points), str(points)),
    ]
    missing = [[name for name in make.FILES if f"{name} is missing" in row["notes"]] for row in table]
    cut = {where for exercise in make.EXERCISES for where, *_ in exercise.cuts}
    there = [{"ia3.py", "model.py"}, {"ia3.py"}, set(), {"ia3.py"}]
    assert [set(names) for names in missing] == [cut - names for names in there]
    assert ["dan.zip could not be read" in row["notes"] for row in table] == [False, False, True, False]
    told = json.loads((tmp_path / "graded/ben.ZIP.json").read_text())
    assert told["tests"][0]["score"] == 0 and "count() says 0" in told["tests"][0]["output"]
    assert "merge.py is missing" in told["output"]

    assert {path: path.read_bytes() for path in starter.rglob("*") if path.is_file()} == before
    assert ended(int(left.read_text()))


LIMITS = {
    "memory": ("import numpy; numpy.empty(6 * 2**30, 'int8')", "allocate"),
    "a file's size": ("open('large', 'wb').truncate(2**30)", "File too large"),
    "open files": ("[open('/dev/null') for _ in range(300)]", "Too many open files"),
    "processes": ("import resource as r; assert r.getrlimit(r.RLIMIT_NPROC)[0] > 4096", "AssertionError"),
}


@pytest.mark.parametrize("code, words", LIMITS.values(), ids=LIMITS)
def test_what_a_submission_uses_is_limited(starter, tmp_path, code, words):
    """One student's folder, as on Gradescope."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one/ia3.py").write_text(with_code(code))
    flags = ("--one", tmp_path / "one", "--starter", starter, "--out", tmp_path / "results.json", "--limit", "300")
    result = grade_all(*flags)
    assert result.returncode == 0, result.stderr
    (test,) = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert test["score"] == 0 and words in test["output"], test


def test_results_are_there_from_the_first_row_on(starter, monkeypatch):
    """Also if the grader itself is stopped by a limit of time: what is not graded yet has no points."""
    monkeypatch.syspath_prepend(starter)
    import grade

    path = starter.parent / "partial.json"
    results = grade.score(SHEET, iter([None] * len(SHEET)), path)
    assert next(results)["score"] == SHEET[0]["points"]
    there = json.loads(path.read_text())["tests"]
    assert [test["score"] for test in there] == [SHEET[0]["points"], *[0] * (len(SHEET) - 1)]
    assert [test["max_score"] for test in there] == [row["points"] for row in SHEET]


def test_what_cannot_be_graded_is_one_line(starter, tmp_path):
    for flags in ((tmp_path, "--starter", tmp_path), (tmp_path / "none", "--starter", starter)):
        result = grade_all(*flags, "--out", tmp_path / "out")
        assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_what_is_taken_from_a_submission(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/ia3.py").write_text("the outer one")
    (tmp_path / "a/b/ia3.py").write_text("an inner one")
    (tmp_path / "a/damaged.zip").write_bytes(b"PK")
    (tmp_path / "a/merge.py").write_bytes(b" " * (2**20 + 1))
    (tmp_path / "elsewhere.py").write_text("outside of the submission")
    (tmp_path / "a/model.py").symlink_to(tmp_path / "elsewhere.py")
    files, notes = collect(tmp_path / "a", ["ia3.py", "model.py", "merge.py"])
    assert files == {"ia3.py": b"the outer one"}
    assert any("BadZipFile" in note for note in notes) and any("merge.py is larger" in note for note in notes)
    assert "model.py is missing" in notes
