"""Grade all submissions, each row of each in a fresh copy of the starter, and print the scores as CSV. Needs Linux.

    python classroom/grade_all.py submissions --starter path/to/starter --out graded > scores.csv

submissions holds a folder or a .zip per student. Of each only the files with exercises are taken, wherever in it they
lie; the grader, its tests and the data are the starter's (classroom/make.py). graded/NAME.json is NAME's results.json,
complete up to the row that is being graded. Every process has limits on memory, processes and files. The table and
the student's sheet name files that are missing.

With --one, submissions is one student's folder and --out one results.json, as Gradescope needs (classroom/TEACHING.md).
"""

import argparse
import csv
import os
import resource
import secrets
import shutil
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIMITS = {
    resource.RLIMIT_AS: 4 * 2**30,  # bytes of memory per process
    resource.RLIMIT_NPROC: 4096,  # processes and threads of this user; root has no limit
    resource.RLIMIT_FSIZE: 64 * 2**20,  # bytes of a file that is written
    resource.RLIMIT_NOFILE: 256,  # open files
}
LARGEST = 2**20  # bytes of a file that is taken from a submission


def files_with_exercises(starter):
    """The names of the files that students change: those with a gap in the starter."""
    mark = 'raise NotImplementedError("Exercise '
    return [path.name for path in sorted(starter.glob("*.py")) if mark in path.read_text(encoding="utf-8")]


def members(path):
    """Yield (path, size, function that reads it) for a file; and, where it is a .zip, for every file in it."""
    yield path, path.stat().st_size, path.read_bytes
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                yield path / info.filename, info.file_size, lambda info=info: archive.read(info)


def collect(submission, names):
    """Find the files called names in a submission. Returns {name: bytes}, and a list of what the student should know.

    Of several files with one name the one in the outermost folder counts.
    """
    found = {}  # name: (depth, bytes)
    notes = []
    paths = sorted(submission.rglob("*")) if submission.is_dir() else [submission]
    for file in paths:
        if file.is_symlink() or not file.is_file():  # a link may lead out of the submission
            continue
        try:
            for path, size, read in members(file):
                if path.name not in names or "__MACOSX" in path.parts or ".venv" in path.parts:
                    continue
                depth = len(path.parts)
                if size > LARGEST:
                    notes.append(f"{path.name} is larger than {LARGEST} bytes and was left out")
                elif path.name not in found or depth < found[path.name][0]:
                    found[path.name] = depth, read()
                elif depth == found[path.name][0]:
                    notes.append(f"{path.name} is there more than once")
        except Exception as e:  # damaged, or with a password: zipfile, zlib, lzma and bz2 each raise their own
            notes.append(f"{file.name} could not be read ({type(e).__name__})")
    for name in names:
        if name not in found:
            notes.append(f"{name} is missing")
    return {name: raw for name, (_, raw) in found.items()}, notes


def grade_fresh(grade, row, starter, files, limit):
    """Grade one row in a copy of the starter that holds the submission's files and is thrown away."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place) / "starter"
        shutil.copytree(starter, folder, ignore=shutil.ignore_patterns(".venv", "out", "__pycache__"))
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        return grade.grade(row, limit, folder)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submissions", type=Path, help="a folder with a folder or a .zip per student")
    parser.add_argument("--starter", type=Path, required=True, help="what make.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder for a results file per student")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds for a row, as in grade.py (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once (default: %(default)s)")
    parser.add_argument("--one", action="store_true", help="submissions is one student's, and --out one file")
    args = parser.parse_args(argv)
    starter = args.starter.resolve()
    if not (starter / "grading/exercises.json").is_file():
        raise ValueError(f"{args.starter} is not a starter: make.py writes one")
    if not args.submissions.is_dir():
        raise ValueError(f"{args.submissions} is not a folder")
    todo = [args.submissions] if args.one else sorted(args.submissions.glob("[!.]*"))  # not .DS_Store

    sys.path.insert(0, str(starter))
    import grade

    for name, value in LIMITS.items():  # of this process, and of those that it starts
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # rows run side by side
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    seed = os.environ.setdefault("GRADE_SEED", str(secrets.randbelow(10**9)))  # the same inputs for all

    rows = grade.read_sheet()
    names = files_with_exercises(starter)
    table = csv.writer(sys.stdout)
    table.writerow(["submission", "total", *(row["name"] for row in rows), "notes"])
    for submission in todo:
        files, notes = collect(submission, names)
        path = args.out if args.one else args.out / f"{submission.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        note = "\n".join([*notes, f"GRADE_SEED={seed}"])
        with ThreadPoolExecutor(args.jobs) as pool:
            problems = pool.map(lambda row, files=files: grade_fresh(grade, row, starter, files, args.limit), rows)
            points = [result["score"] for result in grade.score(rows, problems, path, note)]
        table.writerow([submission.name, sum(points), *points, "; ".join(notes)])
        sys.stdout.flush()
    return 0


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"grade_all.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
