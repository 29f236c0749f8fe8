"""Make an assignment: this repository with the code of the exercises cut out, and a grader.

    python classroom/make.py --out path/to/starter
    cd path/to/starter && make grade                # a score sheet, and results.json for Gradescope
    python classroom/make.py --out path/to/starter --variant path/to/variant        # with your changes
    python classroom/make.py --out path/to/grader --variant path/to/variant --grader    # and your private tests

What an exercise is, and where, is the table EXERCISES below: add, drop and re-order rows there (classroom/TEACHING.md).
A cut replaces the body of a function, or of one `if` in it, by `raise NotImplementedError("Exercise N: ...")`;
docstrings, signatures and the comments around it stay. Needs the standard library only.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

CLASSROOM = Path(__file__).resolve().parent
ROOT = CLASSROOM.parent


@dataclass
class Exercise:
    name: str  # its tests are starter/grading/test_NAME.py
    points: int
    title: str  # its section in HANDOUT.md has this title
    cuts: list  # (file, function) or (file, function, condition of the if whose body is cut)
    needs: tuple = ()  # names of exercises without which this one cannot be graded
    parts: dict = field(default_factory=dict)  # {part: points} where it is graded in parts, by test_NAME_PART.py each


# what the last row runs end to end
EVERYTHING = ("keys_and_values", "hidden_activations", "start_at_ones", "freeze_the_base", "count", "fold_rows")
EVERYTHING += ("fold_columns", "save_and_load", "stack_tasks", "train", "llama")

# in the order of their numbers, which start at 1
EXERCISES = [
    Exercise(
        "keys_and_values",
        5,
        "Scale keys and values",
        [
            ("model.py", "CausalSelfAttention.forward", "l_k is not None"),
            ("model.py", "CausalSelfAttention.forward", "l_v is not None"),
        ],
    ),
    Exercise(
        "hidden_activations",
        3,
        "Scale the MLP's hidden activations",
        [("model.py", "MLP.forward", "l_ff is not None")],
    ),
    Exercise("start_at_ones", 2, "Start at ones", [("ia3.py", "IA3.__init__.ones")]),
    Exercise("freeze_the_base", 5, "Freeze the base", [("ia3.py", "attach")]),
    Exercise("count", 2, "Count the values", [("ia3.py", "IA3.count")]),
    Exercise(
        "gradient",
        4,
        "Derive and check the gradient",
        [("gradient.py", "gradient_of_l"), ("gradient.py", "central_difference")],
    ),
    Exercise("fold_rows", 4, "Fold l_k and l_v into rows", [("merge.py", "fold_rows")]),
    Exercise(
        "fold_columns",
        6,
        "Fold l_ff into columns, and merge",
        [("merge.py", "fold_columns"), ("merge.py", "fold_gpt2"), ("merge.py", "merge")],
    ),
    Exercise(
        "save_and_load",
        7,
        "Save and load",
        [("ia3.py", "IA3.save"), ("ia3.py", "IA3.load"), ("ia3.py", "read_npz")],
        parts={"format": 2, "round_trip": 2, "refusal": 2, "atomic": 1},
    ),
    Exercise(
        "stack_tasks",
        5,
        "Stack tasks and mix them in a batch",
        [("ia3.py", "stack"), ("ia3.py", "layer_vector", "task_ids is not None")],
    ),
    Exercise(
        "train",
        3,
        "Warm up, decay, and learn",
        [("train.py", "learning_rate")],
        needs=("keys_and_values", "hidden_activations", "start_at_ones", "freeze_the_base"),
    ),
    Exercise(
        "llama",
        4,
        "The same three in a LLaMA",
        [
            ("llama.py", "LlamaConfig.widths"),
            ("llama.py", "CausalSelfAttention.forward", "l_k is not None"),
            ("llama.py", "CausalSelfAttention.forward", "l_v is not None"),
            ("llama.py", "MLP.forward", "l_ff is not None"),
            ("merge.py", "fold_llama"),
        ],
    ),
    Exercise("all_together", 10, "All together", [], needs=EVERYTHING),
]

# what a starter holds beside classroom/starter, the tests of its exercises and the handout: {there: here}
FILES = {"gradient.py": "classroom/gradient.py", "llama.py": "llama.py"}
SOURCES = "model.py ia3.py merge.py train.py run_folder.py sample.py common.py disk.py tools/plot.py"
for name in SOURCES.split():
    FILES[name] = name
for name in ("requirements.txt", "LICENSE", "data/__init__.py", "data/tokenizer.py", "data/base.pt"):
    FILES[name] = name
for task in ("folio", "sonnets", "kjv"):
    FILES[f"data/{task}.npz"] = f"data/{task}.npz"
for text in ("plays", "folio", "sonnets", "kjv"):
    for split in ("train", "val", "test"):
        FILES[f"data/{text}/{split}.txt"] = f"data/{text}/{split}.txt"
# these only if an exercise cuts them: whole, they would show the answers of others
IF_CUT = ("gradient.py", "llama.py")
PRIVATE = "private"  # the folder of a variant with tests that students do not get


def find(source, function, condition=None):
    """Return the first and the last line, from 1, of a function's body without its docstring, or of one `if` in it.

    function: its qualified name, such as 'IA3.__init__.ones'. condition: as ast.unparse spells it; it must be that of
    exactly one `if` in the function. Comment lines right above the first statement belong to the body. Raises
    ValueError where there is no such place.
    """
    node = ast.parse(source)
    for part in function.split("."):
        named = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if len(named) != 1:
            raise ValueError(f"{len(named)} definitions of {part} on the way to {function}, where one is needed")
        node = named[0]
    body = node.body
    if condition is not None:
        bodies = [n.body for n in ast.walk(node) if isinstance(n, ast.If) and ast.unparse(n.test) == condition]
        if len(bodies) != 1:
            raise ValueError(f"{len(bodies)} `if {condition}` in {function}, where one is needed")
        body = bodies[0]
    elif ast.get_docstring(node) is not None:
        body = body[1:]
    if not body:
        raise ValueError(f"{function} has nothing to cut but its docstring")
    lines = source.splitlines()
    first = min(n.lineno for n in [body[0], *getattr(body[0], "decorator_list", [])])
    if lines[first - 1][: body[0].col_offset].strip():
        raise ValueError(f"{function}: what is cut must begin on a line of its own")
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, body[-1].end_lineno


def cut(source, message, function, condition=None):
    """Return source with the lines that find() finds replaced by `raise NotImplementedError(message)`."""
    first, last = find(source, function, condition)
    lines = source.splitlines(keepends=True)
    indent = re.match(" *", lines[first - 1])[0]
    literal = json.dumps(message, ensure_ascii=False)  # a string in Python, too
    lines[first - 1 : last] = [f"{indent}raise NotImplementedError({literal})\n"]
    return "".join(lines)


def cut_all(file, source, exercises):
    """Return the source of a starter's file with every cut of exercises in it."""
    for number, exercise in enumerate(exercises, 1):
        for where, *place in exercise.cuts:
            if where == file:
                source = cut(source, f"Exercise {number}: {exercise.title}", *place)
    ast.parse(source)
    return source


def first_table(path, heading=""):
    """Return the first table, or block of code, behind heading in a Markdown file. ValueError where there is none."""
    text = path.read_text(encoding="utf-8")
    if heading:
        text = text.partition(f"# {heading}")[2]
    table = re.search(r"(?m)^(\|.*\n)+|^```.*\n(?s:.*?)^```\n", text)
    if table is None:
        raise ValueError(f"HANDOUT.md needs a table of {path}, {heading!r}, and there is none")
    return table[0]


def handout(text, exercises):
    """Return the handout: the exercises' sections in the table's order, numbered anew, and the tables put in.

    A section starts with '### N. TITLE (P points, ...)'; one that the table does not have is left out. A line
    '*(table: PATH, "HEADING")*' becomes first_table of the repository's file PATH; the heading may be left out.
    """
    line = r'(?m)^\*\(table: (\S+?)(?:, "(.*)")?\)\*\n'
    text = re.sub(line, lambda found: first_table(ROOT / found[1], found[2] or ""), text)
    pattern = re.compile(r"### \d+\. (.*) \(\d+ points, (.*)\)\n")
    before = []
    sections = {}  # title: what stands behind the points, and what follows
    after = []
    for part in re.split(r"(?m)^(?=##+ )", text):
        heading = pattern.match(part)
        if heading:
            sections[heading[1]] = (heading[2], part[heading.end() :])
        elif sections:
            after.append(part)
        else:
            before.append(part)
    numbered = []
    for number, exercise in enumerate(exercises, 1):
        if exercise.title not in sections:
            raise ValueError(f"HANDOUT.md has no section '### N. {exercise.title} (P points, ...)'")
        rest, section = sections[exercise.title]
        numbered.append(f"### {number}. {exercise.title} ({exercise.points} points, {rest})\n{section}")
    return "".join(before + numbered + after)


def score_sheet(exercises):
    """Return what the grader knows of the exercises, as a list of dicts: one an exercise, or one a part of it.

    A row's name is that of its tests, grading/test_NAME.py.
    """
    numbers = {exercise.name: number for number, exercise in enumerate(exercises, 1)}
    sheet = []
    for exercise in exercises:
        graded = [(exercise.name, exercise.title, exercise.points)]
        if exercise.parts:
            graded = [
                (f"{exercise.name}_{part}", f"{exercise.title}: {part.replace('_', ' ')}", points)
                for part, points in exercise.parts.items()
            ]
        for name, title, points in graded:
            sheet.append(
                {
                    "number": numbers[exercise.name],
                    "name": name,
                    "title": title,
                    "points": points,
                    "needs": [numbers[name] for name in exercise.needs if name in numbers],
                }
            )
    return sheet


def make(out, exercises=EXERCISES):
    """Write a starter into the folder out, which must be new or empty. Raises ValueError where it is not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder")
    cut_files = {where for exercise in exercises for where, *_ in exercise.cuts}
    unknown = cut_files - FILES.keys()
    if unknown:
        raise ValueError(f"a starter has no {', '.join(sorted(unknown))}: see FILES")

    # what is written: the handout, the sheet, and the code with its cuts
    texts = {"README.md": handout((CLASSROOM / "HANDOUT.md").read_text(encoding="utf-8"), exercises)}
    sheet = score_sheet(exercises)
    texts["grading/exercises.json"] = json.dumps(sheet, indent=1) + "\n"
    files = {there: here for there, here in FILES.items() if there not in IF_CUT or there in cut_files}
    for there, here in files.items():
        if there.endswith(".py"):
            texts[there] = cut_all(there, (ROOT / here).read_text(encoding="utf-8"), exercises)

    # what is copied: the grader and the data
    tests = [f"grading/test_{row['name']}.py" for row in sheet]
    given = ["Makefile", "pyproject.toml", ".gitignore", "grade.py", "grading/conftest.py", *tests]
    copies = {name: CLASSROOM / "starter" / name for name in given}
    copies |= {there: ROOT / here for there, here in files.items() if there not in texts}

    for there in (*texts, *copies):
        (out / there).parent.mkdir(parents=True, exist_ok=True)
    for there, source in texts.items():
        (out / there).write_text(source, encoding="utf-8")
    for there, here in copies.items():
        shutil.copyfile(here, out / there)


def check_tests(variant):
    """Raise ValueError where a test of a variant is that of no row of its sheet: it would never be run."""
    rows = score_sheet(EXERCISES)
    for folder in (variant / "grading", variant / PRIVATE):  # private tests may have a sheet of their own
        if (folder / "exercises.json").exists():
            rows = json.loads((folder / "exercises.json").read_text(encoding="utf-8"))
        names = [f"test_{row['name']}.py" for row in rows]
        for path in sorted(folder.rglob("test_*.py")):
            if str(path.relative_to(folder)) not in names:
                raise ValueError(f"{path} is the test of no exercise: give it the name of the test that it replaces")


def add_variant(out, variant, for_grader=False):
    """Copy a variant's files over those of the starter in out.

    The variant is a folder laid out as a starter. Only a starter for the grader gets its private/, into grading/.
    """
    for path in sorted(variant.rglob("*")):
        where = path.relative_to(variant)
        if path.is_dir() or (where.parts[0] == PRIVATE and not for_grader):
            continue
        if where.parts[0] == PRIVATE:
            where = Path("grading", *where.parts[1:])
        (out / where).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / where)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument("--variant", type=Path, help="a folder whose files replace or join the starter's")
    parser.add_argument("--grader", action="store_true", help="with the variant's private tests: do not hand this out")
    args = parser.parse_args(argv)
    out = args.out
    try:
        if args.variant is not None:
            if not args.variant.is_dir():
                raise ValueError(f"{args.variant} is not a folder")
            check_tests(args.variant)
        make(out)
        if args.variant is not None:
            add_variant(out, args.variant, args.grader)
    except (ValueError, OSError) as e:
        print(f"make.py: {e}", file=sys.stderr)
        return 2
    for number, exercise in enumerate(EXERCISES, 1):
        print(f"{number:2d}. {exercise.title:<40s} {exercise.points:3d} points")
    print(f"{sum(e.points for e in EXERCISES):>48d} points\nnext: cd {out} && make grade")
    return 0


if __name__ == "__main__":
    sys.exit(main())
