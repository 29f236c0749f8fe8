"""The classroom: what is cut and what stays, where the solution is not, and what right and wrong answers score.

Wrong answers are made from the solution by replacing one piece of its text. Every folder is graded by its own grade.py,
in a child of classroom_worker.py.
"""

import ast
import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from classroom import make

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NAMES = [exercise.name for exercise in make.EXERCISES]
CUT = sorted({where for exercise in make.EXERCISES for where, *_ in exercise.cuts})


def solution(file):
    return (ROOT / make.FILES[file]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    out = tmp_path_factory.mktemp("classroom") / "starter"
    assert make.main(["--out", str(out)]) == 0
    return out


@pytest.fixture
def solve(starter, tmp_path):
    """solve(names, changes): a copy of the starter with these exercises done, and (file, old, new) replaced in that."""

    def solve(names, changes=()):
        folder = tmp_path / "answer"
        shutil.copytree(starter, folder, ignore=shutil.ignore_patterns("data"))
        (folder / "data").symlink_to(starter / "data")
        for file in CUT:
            source = solution(file)
            for where, old, new in changes:
                if where == file:
                    assert source.count(old) == 1, old
                    source = source.replace(old, new)
            for number, exercise in enumerate(make.EXERCISES, 1):
                for where, *place in exercise.cuts:
                    if where == file and exercise.name not in names:
                        source = make.cut(source, f"Exercise {number}: {exercise.title}", *place)
            (folder / file).write_text(source, encoding="utf-8")
        return folder

    return solve


@pytest.fixture(scope="module")
def worker():
    command = [sys.executable, str(ROOT / "tests/classroom_worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def grade(worker):
    """grade(folder, names, options of pytest's): {name: what is wrong, a list of texts}."""

    def grade(folder, names=NAMES, options=""):
        exercises = [{"number": NAMES.index(name) + 1, "name": name} for name in names]
        print(json.dumps([str(folder), exercises, options]), file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    return grade


def test_only_bodies_are_cut_and_everything_else_stays(starter):
    for file in CUT:
        before, after = solution(file), (starter / file).read_text(encoding="utf-8")
        cuts = sum(where == file for exercise in make.EXERCISES for where, *_ in exercise.cuts)
        added = [line[2:].strip() for line in difflib.ndiff(before.split("\n"), after.split("\n")) if line[:2] == "+ "]
        assert len(added) == cuts and all(line.startswith('raise NotImplementedError("Exercise ') for line in added)

        def outside(source):
            nodes = [
                n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)
            ]
            signatures = [ast.dump(n.args) for n in nodes if isinstance(n, ast.FunctionDef)]
            return {ast.get_docstring(n) for n in nodes}, signatures

        assert outside(before) == outside(after)
    assert {p.name for p in starter.rglob("*.py")} >= {"grade.py", "plot.py", "test_count.py", "__init__.py"}


def test_what_a_cut_takes():
    source = textwrap.dedent('''
        # before
        def f(a,
              b):
            """Stays.

            All of it."""
            # goes
            def inner():
                return 1

            return inner()  # goes, too

        # after
        class A:
            def g(self, x):
                if x > 1:
                    # goes
                    x = (
                        2
                    )  # goes
                    # stays, since it is after the last statement
                elif x < 0:
                    return 0
                return x
    ''')
    assert make.cut(source, "m", "f") == source.replace(
        source[source.index("    # goes") : source.index("\n# after")], '    raise NotImplementedError("m")\n'
    )
    body = source[source.index("            # goes\n            x") : source.index("            # stays, since")]
    assert make.cut(source, "m", "A.g", "x > 1") == source.replace(body, '            raise NotImplementedError("m")\n')
    assert "return 0" not in make.cut(source, "m", "A.g", "x < 0")
    twice = "def f(x):\n    if x:\n        x = 1\n    if x:\n        x = 2\n"
    with pytest.raises(ValueError, match="2 `if x` in f, and one is wanted"):
        make.cut(twice, "m", "f", "x")
    for place in (("h",), ("A.f",), ("A.g", "x > 2"), ("f.missing",)):
        with pytest.raises(ValueError, match="wanted"):
            make.cut(source, "m", *place)
    for text in ('def f():\n    """Only this."""\n', "def f(): return 1\n"):
        with pytest.raises(ValueError, match=r"nothing to cut|line of its own"):
            make.cut(text, "m", "f")


# lines of cut bodies that stand in code that ships, too, and tell nothing
ORDINARY = {
    "model.ia3 = None",
    "check_finite(model)",
    "except Exception as e:",
    "with replace_file(path) as f:",
    "return vectors",
}


def test_the_solution_is_nowhere_in_the_starter(starter):
    """Not in the code, the tests, the handout or the data; and there is no history and no cache: only files wanted."""
    lines = set()
    for exercise in make.EXERCISES:
        for file, *place in exercise.cuts:
            first, last = make.find(solution(file), *place)
            lines |= {line.split("  # ")[0].strip() for line in solution(file).splitlines()[first - 1 : last]}
    lines = {line for line in lines if len(line) > 12}
    assert len(lines - ORDINARY) > 60 and lines >= ORDINARY  # nothing is excused that need not be
    files = [path for path in starter.rglob("*") if not path.is_dir()]
    for path in files:
        raw = path.read_bytes()
        assert not [line for line in lines - ORDINARY if line.encode() in raw], path
    names = {str(path.relative_to(starter)) for path in files}
    tests = {f"grading/test_{name}.py" for name in NAMES}
    own = {"README.md", "Makefile", "pyproject.toml", ".gitignore", "grade.py"}
    assert names == {*make.FILES, *tests, *own, "grading/conftest.py", "grading/exercises.json"}
    here = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not here or set(make.FILES.values()) <= set(here)


# a piece of every place where the method stands, whatever the exercises are
METHOD = """
l_k * k
l_v * v
l_ff * h
nn.Parameter(torch.ones(
model.requires_grad_(False)
matrix[task_ids, layer]
p.numel() for p in self.parameters()
upstream * x
weight[rows], l.unsqueeze(1)
scale(linear.weight, l)
2 * n_embd, 3 * n_embd
merged = copy.deepcopy(model)
config.warmup * config.steps
""".split("\n")[1:-1]


def test_every_place_of_the_method_is_cut(starter):
    for code in METHOD:
        assert [file for file in CUT if code in solution(file)], code
        assert not [path for path in starter.rglob("*.py") if code in path.read_text(encoding="utf-8")], code


def test_a_starter_scores_nothing(starter, grade):
    problems = grade(starter)
    for name, texts in problems.items():
        needs = [f"needs exercise {NAMES.index(other) + 1}" for other in make.EXERCISES[NAMES.index(name)].needs]
        assert texts and set(texts) <= {"not done yet", *needs}, (name, texts)


def test_the_solution_scores_everything(solve, grade):
    assert grade(solve(NAMES)) == {name: [] for name in NAMES}


PLACES = [(exercise.name, *cut) for exercise in make.EXERCISES for cut in exercise.cuts]


@pytest.mark.parametrize("name, file, place", [(name, file, place) for name, file, *place in PLACES])
def test_every_cut_alone_costs_its_exercise(solve, grade, name, file, place):
    """An exercise of several places scores nothing where one of them is not done."""
    folder = solve(NAMES)
    message = f"Exercise {NAMES.index(name) + 1}: not this one"
    (folder / file).write_text(make.cut(solution(file), message, *place), encoding="utf-8")
    assert "not done yet" in grade(folder, [name])[name]


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_scores_alone_but_for_those_that_it_needs(solve, grade, name):
    """So a mistake in one costs no other: of the code that is cut, their tests run nothing."""
    needs = set(make.EXERCISES[NAMES.index(name)].needs)
    assert grade(solve({name} | needs), [name]) == {name: []}


@pytest.mark.parametrize("name", [exercise.name for exercise in make.EXERCISES if exercise.needs])
def test_an_exercise_that_needs_another_says_so(solve, grade, name):
    needs = make.EXERCISES[NAMES.index(name)].needs
    texts = grade(solve([name]), [name])[name]
    assert texts and set(texts) <= {f"needs exercise {NAMES.index(other) + 1}" for other in needs}


# (exercise, a wrong answer to it: file, old, new, and what the sheet must say of it)
K, V = "k = (l_k * k).to(k.dtype)  # l_k ⊙ K", "v = (l_v * v).to(v.dtype)  # l_v ⊙ V"
H = "h = (l_ff * h).to(h.dtype)"
ONES = "return nn.Parameter(torch.ones(config.n_layer, width))"
NO_SITE = "            if site not in sites:\n                return None\n"
COUNT = "sum(p.numel() for p in self.parameters())"
SUM = "(upstream * x).sum((0, 1))"
DIFFERENCE = "(above - below) / (2 * step)"
ROW = "scale(linear.weight[rows], l.unsqueeze(1))"
BIAS = "scale(linear.bias[rows], l)"
KEYS = "fold_rows(block.attn.c_attn, slice(n_embd, 2 * n_embd), l_k)"
VALUES = "fold_rows(block.attn.c_attn, slice(2 * n_embd, 3 * n_embd), l_v)"
COLUMN = "scale(linear.weight, l)  #"
COPY = "merged = copy.deepcopy(model)"
GATHER = "matrix[task_ids, layer].unsqueeze(1)"
COSINE = "0.5 * (1 + math.cos(math.pi * done))"
WRONG = [
    ("keys_and_values", "model.py", K, "q, k = (l_k * q).to(q.dtype), (l_k * k).to(k.dtype)", "queries are scaled too"),
    ("keys_and_values", "model.py", V, "v = (l_v + v).to(v.dtype)", "not softmax"),
    ("keys_and_values", "model.py", V, "pass", "nothing is scaled"),
    ("keys_and_values", "model.py", K, "k = l_k * k", "bfloat16 again"),
    ("keys_and_values", "model.py", K, "k *= l_k", "modified inplace"),
    ("keys_and_values", "model.py", K, "k = (k / l_k).to(k.dtype)", "the keys are divided"),
    ("keys_and_values", "model.py", V, "v = (l_v.detach() * v).to(v.dtype)", "no gradient reaches l_v"),
    (
        "hidden_activations",
        "model.py",
        H,
        'h = F.gelu((l_ff * self.c_fc(x)).to(h.dtype), approximate="tanh")',
        "before the GELU",
    ),
    ("hidden_activations", "model.py", H, "h = l_ff * h", "bfloat16 again"),
    ("hidden_activations", "model.py", H, "h = (l_ff.detach() * h).to(h.dtype)", "no gradient reaches l_ff"),
    ("hidden_activations", "model.py", H, "h = (l_ff * l_ff * h).to(h.dtype)", "acts twice"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("ones(", "zeros("), "must be all ones"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("config.n_layer, width", "width"), "a row a layer"),
    ("start_at_ones", "ia3.py", NO_SITE, "", "must be None"),
    ("start_at_ones", "ia3.py", ONES, "return torch.ones(config.n_layer, width)", "nn.Parameter"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("width)", "config.n_embd)"), "l_ff must be"),
    ("freeze_the_base", "ia3.py", "    model.requires_grad_(False)\n", "", "base is left trainable"),
    ("freeze_the_base", "ia3.py", "vectors.requires_grad_().to", "vectors.to", "must be trainable"),
    (
        "freeze_the_base",
        "ia3.py",
        "    model.ia3 = None  # vectors that were",
        "    # vectors that were",
        "their holder",
    ),
    ("freeze_the_base", "ia3.py", "if theirs not in (None, ours):", "if False:", "another base of the same shape"),
    ("freeze_the_base", "ia3.py", "    vectors.fingerprint = ours\n    model", "    model", "must be the fingerprint"),
    (
        "freeze_the_base",
        "ia3.py",
        ".to(next(model.parameters()).device)  # float32",
        ".to(next(model.parameters()))  #",
        "stay float32",
    ),
    ("count", "ia3.py", COUNT, "6 * self.config.n_layer * self.config.n_embd", "but count() says"),
    ("count", "ia3.py", COUNT, "sum(p.size(-1) for p in self.parameters())", "but count() says"),
    ("count", "ia3.py", COUNT, "len(list(self.parameters()))", "but count() says"),
    ("gradient", "gradient.py", SUM, "(upstream * x).mean((0, 1))", "a mean over B and T"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(1).mean(0)", "a mean over B,"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(0)", "an entry a channel"),
    ("gradient", "gradient.py", SUM, "upstream.sum((0, 1))", "finite differences say"),
    ("gradient", "gradient.py", SUM, "-(upstream * x).sum((0, 1))", "sign"),
    ("gradient", "gradient.py", "    p[place] = before - step\n", "    p[place] = before\n", "slope is"),
    ("gradient", "gradient.py", DIFFERENCE, "(above - below) / step", "twice the slope"),
    ("gradient", "gradient.py", "    p[place] = before\n", "", "the bits that it had"),
    ("fold_rows", "merge.py", ROW, "scale(linear.weight[: len(l)], l.unsqueeze(1))", "outputs of other rows"),
    ("fold_rows", "merge.py", BIAS, "pass", "must be scaled"),
    ("fold_rows", "merge.py", BIAS, "scale(linear.bias[: len(l)], l)", "outputs of other rows"),
    ("fold_rows", "merge.py", ROW, "scale(linear.weight[rows], l)", "columns of W_k"),
    ("fold_rows", "merge.py", "if linear.bias is not None:", "if True:", "'NoneType' object"),
    ("fold_rows", "merge.py", ROW, "linear.weight = torch.nn.Parameter(linear.weight * 1)", "another Parameter"),
    ("fold_columns", "merge.py", COLUMN, "scale(linear.weight, l[: linear.out_features].unsqueeze(1))  #", "column j"),
    (
        "fold_columns",
        "merge.py",
        COLUMN,
        "scale(linear.bias, l[: linear.out_features])\n        " + COLUMN,
        "b_2 must stay",
    ),
    ("fold_columns", "merge.py", COPY, "merged = model", "must return another GPT, a copy"),
    ("fold_columns", "merge.py", COPY, "merged = copy.copy(model)", "take them off a copy"),
    ("fold_columns", "merge.py", KEYS, KEYS.replace("n_embd, 2 * n_embd", "0, n_embd"), "the rows of W_k"),
    ("fold_columns", "merge.py", VALUES, VALUES.replace("l_v", "l_k"), "the rows of W_v get another vector"),
    ("fold_columns", "merge.py", "if model.ia3 is None or ", "if ", "a model without vectors"),
    (
        "fold_columns",
        "merge.py",
        "if model.ia3.fingerprint not in (None, fingerprint(model)):",
        "if False:",
        "another base's vectors",
    ),
    ("fold_columns", "merge.py", "    check_finite(merged)\n", "", "overflows"),
    ("save_and_load", "ia3.py", "        if theirs != ours:", "        if False:", "another base of the same shape"),
    (
        "save_and_load",
        "ia3.py",
        "if not isinstance(theirs, str):",
        "if theirs is None:\n            theirs = ours\n        if False:",
        "has no fingerprint",
    ),
    ("save_and_load", "ia3.py", "allow_pickle=False", "allow_pickle=True", "code in the file was run"),
    ("save_and_load", "ia3.py", "if not np.isfinite(arrays[name]).all():", "if False:", "NaN"),
    ("save_and_load", "ia3.py", "p.detach().float()", "p.detach().half().float()", "bit for bit"),
    (
        "save_and_load",
        "ia3.py",
        "except Exception as e:",
        "except ValueError as e:",
        "must be refused with a ValueError, not",
    ),
    ("save_and_load", "ia3.py", "with replace_file(path) as f:", 'with open(f"{path}.tmp", "wb") as f:', "one file"),
    ("save_and_load", "ia3.py", '"fingerprint": self.fingerprint}', '"base": self.fingerprint}', "no fingerprint"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer - 1].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids.flip(0), layer].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer]", "to meet (B, T, width)"),
    ("stack_tasks", "ia3.py", GATHER, "matrix.detach()[task_ids, layer].unsqueeze(1)", "does not require grad"),
    (
        "stack_tasks",
        "ia3.py",
        "else task.matrices().get(name, ones)",
        "else task.matrices().get(name, ones * 0)",
        "must be ones",
    ),
    (
        "stack_tasks",
        "ia3.py",
        "else task.matrices().get(name, ones) for task in tasks]",
        "else task.matrices().get(name, ones) for task in tasks[::-1]]",
        "bit for bit",
    ),
    ("stack_tasks", "ia3.py", " or len(fingerprints) > 1", "", "two bases"),
    ("train", "train.py", "if step < warmup:", "if False:", "warmup"),
    ("train", "train.py", "config.lr * (step + 1) / (warmup + 1)", "config.lr * step / warmup", "step 0 is 0"),
    ("train", "train.py", COSINE, COSINE.replace("done", "done / 2"), "must be 0"),
    ("train", "train.py", "config.lr * (1 - done)", "config.lr * done", "the peak is at step"),
    ("train", "train.py", COSINE, "(1 - done)", "not when 1/6 is done"),
]
IDS = [f"{name}-{NAMES.index(name) + 1}-{i}" for i, (name, *_) in enumerate(WRONG)]


@pytest.mark.parametrize("name, file, old, new, words", WRONG, ids=IDS)
def test_a_wrong_answer_loses_its_exercise_and_is_told_why(solve, grade, name, file, old, new, words):
    problems = grade(solve(NAMES, [(file, old, new)]), [name], "-x")[name]
    assert any(words in text for text in problems), problems


def test_every_exercise_has_three_wrong_answers():
    assert all([name for name, *_ in WRONG].count(name) >= 3 for name in NAMES)


def test_the_untouched_base_runs(starter):
    command = [sys.executable, "sample.py", "--prompt", "To be", "--tokens", "5", "--device", "cpu"]
    result = subprocess.run(command, cwd=starter, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("To be"), result.stderr
    result = subprocess.run([*command, "--ia3", "data/folio.npz"], cwd=starter, capture_output=True, text=True)
    assert "NotImplementedError: Exercise 9: Save, load, and refuse a wrong base" in result.stderr


def test_make_needs_the_standard_library_only_and_refuses_what_it_would_overwrite(tmp_path):
    command = [sys.executable, "-I", "-S", str(ROOT / "classroom/make.py"), "--out"]  # -S: no site-packages
    result = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True)
    assert result.returncode == 0 and "make grade" in result.stdout, result.stderr
    again = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not an empty folder" in again.stderr
    with pytest.raises(SystemExit, match="2"):
        make.main([])


def test_the_handout_fits_the_table(starter, monkeypatch, tmp_path):
    """What the repository's copy says, number by number, is what make.py would write, with the tables of docs/."""
    written = (ROOT / "classroom/HANDOUT.md").read_text(encoding="utf-8")
    shipped = (starter / "README.md").read_text(encoding="utf-8")
    headings = [line for line in written.splitlines() if line.startswith("#")]
    assert headings == [line for line in shipped.splitlines() if line.startswith("#")]
    sources = ("experiments/results/exactness/table.md", "docs/formats.md")
    docs = [(ROOT / name).read_text(encoding="utf-8") for name in sources]
    diff = list(difflib.ndiff(written.splitlines(), shipped.splitlines()))
    gone = [line[2:] for line in diff if line.startswith("- ")]
    new = [line[2:] for line in diff if line.startswith("+ ")]
    assert gone == ["*(table: experiments/results/exactness/table.md)*", "*(table: docs/formats.md)*"]
    assert len(new) > 10 and set(new) <= set("\n".join(docs).splitlines())

    monkeypatch.setattr(make, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\ntext | text\n\n```\ncode\n```\n\n| a |\n| --- |\n\n| b |\n")
    assert make.handout("before\n*(table: page.md)*\nafter\n", []) == "before\n```\ncode\n```\nafter\n"
    page.write_text("# A page\n\n| a |\n| --- |\n\n```\ncode\n```\n")
    assert make.handout("*(table: page.md)*\n", []) == "| a |\n| --- |\n"
    page.write_text("# No table\n")
    with pytest.raises(ValueError, match=r"page\.md, which has none"):
        make.handout("*(table: page.md)*\n", [])


def test_exercises_are_dropped_and_reordered_by_the_table_alone(tmp_path, grade):
    table = [make.EXERCISES[NAMES.index(name)] for name in ("count", "start_at_ones", "gradient")]
    make.make(tmp_path / "starter", table)
    text = (tmp_path / "starter/README.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("### ") and "minutes)" in line]
    assert [heading.split(" (")[0] for heading in headings] == [f"### {i}. {e.title}" for i, e in enumerate(table, 1)]
    source = (tmp_path / "starter/ia3.py").read_text(encoding="utf-8")
    assert 'NotImplementedError("Exercise 1: Count the values")' in source and source.count("NotImplementedError") == 2
    assert (tmp_path / "starter/merge.py").read_text(encoding="utf-8") == solution("merge.py")
    assert len(list((tmp_path / "starter/grading").glob("test_*.py"))) == 3
    with pytest.raises(ValueError, match="no section"):
        make.make(tmp_path / "other", [make.Exercise("count", 3, "No such section", [])])


def run_grade(folder, *flags):
    """Run grade.py as `make grade` does. Returns the score sheet and results.json."""
    result = subprocess.run([sys.executable, "grade.py", *flags], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "results.json").read_text())


def test_make_grade_in_a_fresh_folder(starter, tmp_path):
    """With a .venv that stands for the one that the Makefile installs; three exercises, which are enough."""
    folder = tmp_path / "fresh"
    shutil.copytree(starter, folder)
    sheet = json.loads((folder / "grading/exercises.json").read_text())
    kept = [exercise for exercise in sheet if exercise["name"] in ("keys_and_values", "count", "train")]
    (folder / "grading/exercises.json").write_text(json.dumps(kept))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    (folder / ".venv/run").touch()
    before = set(folder.rglob("*"))
    result = subprocess.run(["make", "grade"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    total = sum(exercise["points"] for exercise in kept)
    assert f"total   0 / {total}" in result.stdout and result.stdout.count("- not done yet") == len(kept)
    assert "needs exercise 1\n" in result.stdout
    assert {path.name for path in set(folder.rglob("*")) - before} == {"results.json"}


TROUBLE = {
    "keys_and_values": ("model.py", K, "import os; os._exit(0)", "ended before it was graded"),
    "hidden_activations": ("model.py", H, "raise SystemExit(0)", "SystemExit: 0 (model.py, line"),
    "count": ("ia3.py", f"return {COUNT}", "while True: pass", "a loop that does not end"),
    "gradient": ("gradient.py", "import torch\n", "import torch\ndef oh no\n", "SyntaxError"),
    "fold_rows": ("merge.py", ROW, "raise KeyboardInterrupt", "did not come to their end"),
    "fold_columns": ("merge.py", COLUMN, "'a' + 1  #", "TypeError: can only concatenate"),
}


def test_what_goes_wrong_costs_its_exercise_only_and_is_on_the_sheet(solve):
    """A loop, an exit, a file that cannot be imported: and the rest is graded, in results.json as on the sheet."""
    changes = [change for *change, _ in TROUBLE.values()]
    folder = solve(set(NAMES) - {"start_at_ones"}, changes)
    sheet, results = run_grade(folder, "--limit", "20")  # enough for what is right, on a busy machine
    outputs = {test["name"].split(". ")[1]: test["output"] for test in results["tests"]}
    for exercise, test in zip(make.EXERCISES, results["tests"], strict=True):
        lost = exercise.name in TROUBLE or exercise.name in ("start_at_ones", "train")
        assert test["max_score"] == exercise.points
        assert test["score"] == (0 if lost else exercise.points), sheet
        assert bool(outputs[exercise.title]) == lost
        if exercise.name in TROUBLE:
            assert TROUBLE[exercise.name][-1] in outputs[exercise.title]
    assert " 3. Start at ones                              0 / 5\n      - not done yet\n" in sheet
    assert "- needs exercise 3\n" in sheet
    assert f"total  {sum(test['score'] for test in results['tests'])} / " in sheet


def test_pytest_grades_an_exercise_by_its_marker(solve):
    command = [sys.executable, "-m", "pytest", "-m", "exercise3 or exercise4"]
    result = subprocess.run(command, cwd=solve(["start_at_ones"]), capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    failed = re.findall(r"(?m)^FAILED grading/(\w+)\.py", result.stdout)
    assert set(failed) == {"test_freeze_the_base"} and " 8 passed" in result.stdout  # 7 subsets, and one test more
    assert "NotImplementedError: Exercise 4: Freeze the base" in result.stdout


def test_inputs_are_drawn_at_grading_time(starter):
    """Other numbers every time, but with GRADE_SEED the same ones."""
    code = """
import os, sys
sys.path.insert(0, "grading")
import conftest
for seed in ("", "", "7", "7"):
    os.environ["GRADE_SEED"] = seed
    print(conftest.draw(conftest.dice.__wrapped__(), 3))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=starter, capture_output=True, text=True)
    a, b, c, d = result.stdout.splitlines()
    assert c == d and len({a, b, c}) == 3


# vectors of this very base, whatever data/ holds
TASKS = """
import common, ia3, torch
for name in ("folio", "sonnets", "kjv"):
    vectors = ia3.attach(common.load("data/base.pt"))
    vectors.l_v.data += 0.1 * torch.randn_like(vectors.l_v)
    vectors.save(f"data/{name}.npz")
"""


def run_in(folder, *command):
    result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def done(solve, starter):
    """A starter in which everything is done, with short texts, so that reading all of val takes no time."""
    folder = solve(NAMES)
    (folder / "data").unlink()
    shutil.copytree(starter / "data", folder / "data")
    for path in folder.glob("data/*/*.txt"):
        path.write_bytes(path.read_bytes()[:2000])
    run_in(folder, "-c", TASKS)
    return folder


def test_the_handouts_sessions_and_commands_do_what_it_says(done):
    handout = (done / "README.md").read_text(encoding="utf-8")
    assert handout.count("    >>> ") > 20
    assert run_in(done, "-m", "doctest", "README.md") == ""

    sample = 'sample.py --ia3 data/folio.npz data/sonnets.npz data/kjv.npz --prompt "The king " --tokens 120'
    assert f"    python {sample}\n" in handout
    assert run_in(done, *shlex.split(sample)).split()[:3] == ["folio", "sonnets", "kjv"]


def test_the_demo_of_a_done_starter(done):
    """The commands of its Makefile, with two steps and a few tokens; and what the handout says that merging prints."""
    makefile = (done / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    commands = [line.removeprefix("\t$(BIN)/python ") for line in makefile.splitlines() if "$(BIN)" in line]
    assert [command.split()[0] for command in commands] == ["train.py", "merge.py", "sample.py", "-m"]
    few = ["--steps 2 --batch-size 2 --eval-windows 2", "", "--tokens 3", ""]
    outputs = [run_in(done, *shlex.split(f"{c} {more}")) for c, more in zip(commands, few, strict=True)]
    shown = (done / "README.md").read_text(encoding="utf-8").split("prints something like\n\n")[1].split("\n\n")[0]
    assert [line.split("  ")[0] for line in outputs[1].splitlines()[1:]] == [
        line.strip().split("  ")[0] for line in shown.splitlines()[1:]
    ]
    assert outputs[2].startswith("To be, or not to be")
    assert outputs[3].split() == ["out/demo/loss.png", "out/demo/vectors.png"]


def answers():
    return (ROOT / "classroom/ANSWERS.md").read_text(encoding="utf-8")


def test_the_tests_that_the_answers_name_are_there():
    named = set(re.findall(r"`(test_\w+)`", answers()))
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert len(named) >= 5
    for name in named:
        assert f"def {name}(" in there, name


def test_the_numbers_of_the_answers():
    """T0's blocks: width 4096, a gated MLP 10,240 wide, cross-attention in the decoder's; 24 of each."""
    n, n_ff = 4096, 10240
    encoder = 4 * n * n + 3 * n * n_ff  # W_q, W_k, W_v, W_o; the gated MLP's three matrices
    decoder = encoder + 4 * n * n
    values = 24 * (2 * n + n_ff) + 24 * (4 * n + n_ff)
    text = answers()
    for shown in (
        f"{2 * n + n_ff:,} values for {encoder / 1e6:.0f} million weights",
        f"{4 * n + n_ff:,} for\n{decoder / 1e6:.0f} million",
        f"{values:,} values in 24 of each, {values / (24 * (encoder + decoder)):.4%} of".replace("%", " %"),
        f"T0's vectors are {4 * values / 1e6:.1f} MB",
    ):
        assert shown in text, shown


def test_the_ranks_of_the_answers():
    """Of ΔW: for rows the number of scaled ones, for W_2 at most n, for two heads' keys exchanged d_head."""
    n, d_head = 24, 8
    dice = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    W_k, W_2, l_k = draw(n, n), draw(n, 4 * n), torch.ones(n, dtype=torch.float64)
    l_k[:5] = 1 + draw(5).abs()
    assert torch.linalg.matrix_rank(l_k.unsqueeze(1) * W_k - W_k) == 5
    assert torch.linalg.matrix_rank(W_2 * draw(4 * n) - W_2) == n
    A, B = slice(0, d_head), slice(d_head, 2 * d_head)
    exchanged, copied = W_k.clone(), W_k.clone()
    exchanged[A], exchanged[B] = W_k[B], W_k[A]
    copied[A] = W_k[B]
    assert torch.linalg.matrix_rank(exchanged - W_k) == d_head
    assert torch.linalg.matrix_rank(copied - W_k) == d_head
