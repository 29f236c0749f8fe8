"""The score sheet: grade every exercise by its tests in grading/, and write results.json as Gradescope reads it.

    make grade                          # every exercise
    python grade.py 3                   # one, in the sheet's words
    python -m pytest -m exercise3       # one, with all that pytest can say about it

Every exercise is graded in a process of its own, with a time limit: what loops forever or ends the program costs that
exercise only. The inputs are drawn anew every time; GRADE_SEED=... repeats those of an earlier grading.
"""

import argparse
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CHILD = """
import json, sys, grade
problem = grade.run_tests(json.loads(sys.argv[2]))
json.dump(problem, open(sys.argv[1], "w"))
"""


def explain(error, number):
    """What went wrong, in a line or two: a test's own words, a missing exercise, or an exception and where."""
    value = error.value
    if isinstance(value, pytest.fail.Exception):
        return str(value)
    if isinstance(value, pytest.Collector.CollectError):  # a file that cannot be imported; its last line says why
        return str(value).rstrip().splitlines()[-1].removeprefix("E").strip()
    missing = re.match(r"Exercise (\d+):", str(value)) if isinstance(value, NotImplementedError) else None
    if missing:
        return "not done yet" if int(missing[1]) == number else f"needs exercise {missing[1]}"
    text = f"{type(value).__name__}: {next(iter(str(value).splitlines()), '')}"
    ours = [entry for entry in error.traceback if Path(entry.path).parent == HERE]  # not grading/, nor torch
    return f"{text} ({ours[-1].path.name}, line {ours[-1].lineno + 1})" if ours else text


class Recorder:
    """A pytest plugin that keeps what the sheet says: the first problem, and how many more cases of its test fail.

    What stands behind a test that failed is not run: more often than not it would fail for the same reason, and say so
    in words that mislead.
    """

    def __init__(self, number):
        self.number = number
        self.problem = None
        self.failed = None  # the test whose case failed first
        self.alike = 0
        self.passed = 0

    def pytest_runtest_protocol(self, item):
        """Leave out, by saying that it is seen to, what is not a case of the test that failed."""
        return self.failed not in (None, item.originalname) or None

    def pytest_exception_interact(self, node, call):
        if self.problem is None:
            self.problem = explain(call.excinfo, self.number)
            self.failed = getattr(node, "originalname", node.name)  # a file's name, where it cannot be imported
        elif not isinstance(call.excinfo.value, NotImplementedError):  # "not done yet" is said once
            self.alike += 1

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def run_tests(exercise):
    """Run an exercise's tests in this process. Returns what is wrong with it, or None."""
    try:
        import ia3  # noqa: F401  as all tests do: pytest would not say what is wrong with it
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    recorder = Recorder(exercise["number"])
    file = f"{HERE}/grading/test_{exercise['name']}.py"
    status = pytest.main(["-p", "no:unraisableexception", file], plugins=[recorder])
    if recorder.problem is not None:
        return recorder.problem + (f" (and {recorder.alike} like it)" if recorder.alike else "")
    if status != pytest.ExitCode.OK or not recorder.passed:
        return "its tests did not come to their end: does the code call sys.exit?"
    return None


def grade(exercise, limit):
    """Run an exercise's tests in a process of their own, for limit seconds at most. Returns what is wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, f"{folder}/problem", json.dumps(exercise)]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=HERE, start_new_session=True, **quiet)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it and what it started
            process.wait()
            return f"not done after {limit:g} seconds: is there a loop that does not end?"
        try:
            return json.loads(Path(folder, "problem").read_text())
        except (OSError, ValueError):
            return "the program ended before it was graded (os._exit, Ctrl-C or a crash)"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="exercises to grade (default: all)")
    parser.add_argument("--out", default="results.json", help="where Gradescope looks (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for an exercise (default: %(default)s)")
    args = parser.parse_args(argv)
    exercises = json.loads((HERE / "grading/exercises.json").read_text(encoding="utf-8"))
    for number in args.numbers:
        if number not in [e["number"] for e in exercises]:
            parser.error(f"there is no exercise {number}")
    if args.numbers:
        exercises = [e for e in exercises if e["number"] in args.numbers]
    seed = os.environ.setdefault("GRADE_SEED", str(secrets.randbelow(10**9)))
    tests, wrong, total = [], set(), 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        for e, problem in zip(exercises, pool.map(lambda e: grade(e, args.limit), exercises), strict=True):
            number, points = e["number"], 0 if problem else e["points"]
            problems = []
            if problem:
                wrong.add(number)
                needs = [f"needs exercise {n}" for n in e["needs"] if n in wrong]
                problems = list(dict.fromkeys([*needs, problem]))
            print(f"{number:2d}. {e['title']:<40s} {points:3d} / {e['points']}", flush=True)
            for problem in problems:
                print(textwrap.fill(problem, 100, initial_indent="      - ", subsequent_indent="        "))
            total += points
            tests.append(
                {
                    "number": str(number),
                    "name": f"{number}. {e['title']}",
                    "score": points,
                    "max_score": e["points"],
                    "status": "failed" if problems else "passed",
                    "output": "\n".join(problems),
                }
            )
    print(f"{'total':>44s} {total:3d} / {sum(e['points'] for e in exercises)}")
    print(f"\nInputs were drawn from GRADE_SEED={seed}. Written questions are graded by hand.")
    if not args.numbers:  # a part of the sheet is no result
        Path(args.out).write_text(json.dumps({"tests": tests, "output": f"GRADE_SEED={seed}"}, indent=1) + "\n")
        print(f"{args.out} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
