"""The score sheet: grade every exercise by its tests in grading/, and write results.json as Gradescope reads it.

    make grade                          # every exercise
    python grade.py 3                   # one, in the sheet's words
    python -m pytest -m exercise3       # one, with all that pytest can say about it

Every row of the sheet is graded in a process of its own, with a time limit: an endless loop or an exit costs only
that row. The inputs are drawn anew every time; GRADE_SEED=... repeats those of an earlier grading.
"""

import argparse
import contextlib
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


def read_sheet():
    """The rows of the sheet: one for each exercise, or for each part of one."""
    return json.loads((HERE / "grading/exercises.json").read_text(encoding="utf-8"))


def explain(error, number):
    """What went wrong, in a line or two: a test's own words, a missing exercise, or an exception and where.

    error: pytest's ExceptionInfo; number: that of the exercise that is graded.
    """
    value = error.value
    if isinstance(value, pytest.fail.Exception):
        return str(value)
    if isinstance(value, pytest.Collector.CollectError):  # a file that cannot be imported: pytest has the text only
        text = str(value)
        ours = re.findall(rf"(?m)(?:^|{re.escape(str(HERE))}/)(\w+\.py)\"?(?:, line |:)(\d+)", text)
        last = text.rstrip().splitlines()[-1].removeprefix("E").strip()
        return f"{last} ({ours[-1][0]}, line {ours[-1][1]})" if ours else last
    missing = re.match(r"Exercise (\d+):", str(value)) if isinstance(value, NotImplementedError) else None
    if missing:
        return "not done yet" if int(missing[1]) == number else f"needs exercise {missing[1]}"
    if isinstance(value, SyntaxError):
        return f"{type(value).__name__}: {value.msg} ({Path(value.filename).name}, line {value.lineno})"
    text = f"{type(value).__name__}: {next(iter(str(value).splitlines()), '')}"
    ours = [entry for entry in error.traceback if Path(entry.path).parent == HERE]  # not grading/, nor torch
    return f"{text} ({ours[-1].path.name}, line {ours[-1].lineno + 1})" if ours else text


class Recorder:
    """A pytest plugin that keeps what the sheet says: the first problem, and how many more cases of its test fail.

    Once a test has failed, the tests after it are not run: most would fail for the same reason, and what they said
    would mislead.
    """

    def __init__(self, number):
        self.number = number
        self.problem = None
        self.failed = None  # the test whose case failed first
        self.alike = 0
        self.passed = 0

    def pytest_runtest_protocol(self, item):
        """Skip every test but the cases of the one that failed: True tells pytest that the item is done."""
        return self.failed not in (None, item.originalname) or None

    def pytest_exception_interact(self, node, call):
        if self.problem is None:
            self.problem = explain(call.excinfo, self.number)
            self.failed = getattr(node, "originalname", node.name)  # a file's name, where it cannot be imported
        elif not isinstance(call.excinfo.value, NotImplementedError):  # "not done yet" is said once
            self.alike += 1

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed


def run_tests(row):
    """Run a row's tests in this process. Returns what is wrong, or None."""
    try:
        import ia3  # noqa: F401  as all tests do: pytest would not say what is wrong with it
    except Exception:
        return explain(pytest.ExceptionInfo.from_current(), row["number"])
    recorder = Recorder(row["number"])
    file = f"{HERE}/grading/test_{row['name']}.py"
    status = pytest.main(["-p", "no:unraisableexception", file], plugins=[recorder])
    if recorder.problem is not None:
        return recorder.problem + (f" (and {recorder.alike} like it)" if recorder.alike else "")
    if status != pytest.ExitCode.OK or not recorder.passed:
        return "its tests did not come to their end: does the code call sys.exit?"
    return None


def grade(row, limit, folder=HERE):
    """Run the tests of a row of folder's sheet in a process of their own. Returns what is wrong, or None.

    After limit seconds the process is ended. Whatever it has started and left running is ended in any case.
    """
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", CHILD, f"{place}/problem", json.dumps(row)]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit:g} seconds: is there a loop that does not end?"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            return json.loads(Path(place, "problem").read_text())
        except (OSError, ValueError):
            return "the program ended before it was graded (os._exit, Ctrl-C or a crash)"


def score(rows, problems, path=None, note=""):
    """Yield each row's result, as Gradescope reads it, as soon as its problem is known.

    problems: what is wrong with each row, or None. With path, results.json is written there after every row; rows that
    are still to come stand in it with no points.
    """
    results = []
    for row in rows:
        result = {"number": str(row["number"]), "name": f"{row['number']}. {row['title']}", "score": 0}
        result |= {"max_score": row["points"], "status": "failed", "output": "the grader was stopped before this"}
        results.append(result)
    wrong = set()
    for row, result, problem in zip(rows, results, problems, strict=True):
        if problem is None:
            result |= {"score": row["points"], "status": "passed", "output": ""}
        else:
            wrong.add(row["number"])
            needs = [f"needs exercise {number}" for number in row["needs"] if number in wrong]
            result["output"] = "\n".join(dict.fromkeys([*needs, problem]))
        if path is not None:
            partial = Path(f"{path}.tmp")
            partial.write_text(json.dumps({"tests": results, "output": note}, indent=1) + "\n")
            partial.replace(path)
        yield result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="exercises to grade (default: all)")
    parser.add_argument("--out", default="results.json", help="where Gradescope looks (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds for a row of the sheet (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    rows = read_sheet()
    for number in args.numbers:
        if number not in [row["number"] for row in rows]:
            parser.error(f"there is no exercise {number}")
    path = args.out
    if args.numbers:
        rows = [row for row in rows if row["number"] in args.numbers]
        path = None  # a part of the sheet is not a result
    seed = os.environ.setdefault("GRADE_SEED", str(secrets.randbelow(10**9)))
    total = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        problems = pool.map(lambda row: grade(row, args.limit), rows)
        for row, result in zip(rows, score(rows, problems, path, f"GRADE_SEED={seed}"), strict=True):
            print(f"{row['number']:2d}. {row['title']:<40s} {result['score']:3d} / {row['points']}", flush=True)
            for problem in result["output"].splitlines():
                print(textwrap.fill(problem, 100, initial_indent="      - ", subsequent_indent="        "))
            total += result["score"]
    print(f"{'total':>44s} {total:3d} / {sum(row['points'] for row in rows)}")
    print(f"\nInputs were drawn from GRADE_SEED={seed}. Written questions are graded by hand.")
    if path is not None:
        print(f"{path} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
