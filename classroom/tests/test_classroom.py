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
from torch.nn import functional as F

from classroom import make
from conftest import make_gpt
from experiments import ablate, rivals
from ia3 import IA3

ROOT = Path(__file__).parents[2]
NAMES = [exercise.name for exercise in make.EXERCISES]
SHEET = make.score_sheet(make.EXERCISES)  # a row an exercise, or a part of one


def rows(name):
    """The names of the sheet's rows of an exercise."""
    return [row["name"] for row in SHEET if row["number"] == NAMES.index(name) + 1]


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
    command = [sys.executable, str(ROOT / "classroom/tests/classroom_worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def grade(worker):
    """grade(folder, names of rows, options of pytest's): {name: what is wrong, or None}."""

    def grade(folder, names=None, options=""):
        exercises = [row for row in SHEET if names is None or row["name"] in names]
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
    tests = {f"grading/test_{row['name']}.py" for row in SHEET}
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
    assert set(grade(starter).values()) == {"not done yet"}


def test_the_solution_scores_everything(solve, grade):
    assert grade(solve(NAMES)) == {row["name"]: None for row in SHEET}


def test_the_parts_of_an_exercise_have_its_points():
    for exercise in make.EXERCISES:
        assert not exercise.parts or sum(exercise.parts.values()) == exercise.points
    assert sum(exercise.points for exercise in make.EXERCISES) == 60  # of 100: the written part has the rest


PLACES = [(exercise.name, *cut) for exercise in make.EXERCISES for cut in exercise.cuts]


@pytest.mark.parametrize("name, file, place", [(name, file, place) for name, file, *place in PLACES])
def test_every_cut_alone_costs_its_exercise(solve, grade, name, file, place):
    """An exercise of several places, or a part of it, scores nothing where one of them is not done."""
    folder = solve(NAMES)
    message = f"Exercise {NAMES.index(name) + 1}: not this one"
    (folder / file).write_text(make.cut(solution(file), message, *place), encoding="utf-8")
    assert "not done yet" in grade(folder, rows(name)).values()


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_scores_alone_but_for_those_that_it_needs(solve, grade, name):
    """So a mistake in one costs no other: of the code that is cut, their tests run nothing."""
    needs = set(make.EXERCISES[NAMES.index(name)].needs)
    assert set(grade(solve({name} | needs), rows(name)).values()) == {None}


@pytest.mark.parametrize("name", [exercise.name for exercise in make.EXERCISES if exercise.needs])
def test_an_exercise_that_needs_another_says_so(solve, grade, name):
    needs = make.EXERCISES[NAMES.index(name)].needs
    assert grade(solve([name]), [name])[name] in {f"needs exercise {NAMES.index(other) + 1}" for other in needs}


# (row of the sheet, a wrong answer to it: file, old, new, and what the sheet must say of it)
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
SAVE = 'about = {"config": asdict(self.config), "vectors": list(arrays), "fingerprint": self.fingerprint}'
WRITE = "with replace_file(path) as f:\n            np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)\n"
KNOWN = "        vectors.fingerprint = ours\n"
REFUSE = "    theirs, ours = vectors.fingerprint, fingerprint(model)\n"
SAME_CONFIG = "    if vectors.config != model.config:\n        raise ValueError\n"
IN_W_1 = "\n    fold_rows(block.mlp.c_fc, slice(None), l_ff)"
BASES = "{task.fingerprint for task in given if task.fingerprint}"
MOVE = "    p[place] = before + step\n    above = loss()\n    p[place] = before - step\n"
MOVE += "    below = loss()\n    p[place] = before\n"
WIDTHS = "self.n_kv_head * d_head, self.n_kv_head * d_head, self.n_hidden"
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
    ("keys_and_values", "model.py", K, "k = l_k.to(k.dtype) * k", "the vector itself is rounded"),
    ("keys_and_values", "model.py", V, "v = l_v.to(v.dtype) * v", "the vector itself is rounded"),
    ("hidden_activations", "model.py", H, "h = l_ff.to(h.dtype) * h", "the vector itself is rounded"),
    ("hidden_activations", "model.py", H, "h = l_ff * h", "bfloat16 again"),
    ("hidden_activations", "model.py", H, "h = (l_ff.float() * h.float()).to(h.dtype)", "cast neither factor"),
    ("keys_and_values", "model.py", K, "k = (l_k.float() * k.float()).to(k.dtype)", "cast neither factor"),
    ("hidden_activations", "model.py", H, "h = (l_ff.detach() * h).to(h.dtype)", "no gradient reaches l_ff"),
    ("hidden_activations", "model.py", H, "h = (l_ff * l_ff * h).to(h.dtype)", "acts twice"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("ones(", "zeros("), "must be all ones"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("width)", "width) + 1e-6"), "1.000001, where 1 is right"),
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
        ".to(next(model.parameters()).device, torch.float32)  #",
        ".to(next(model.parameters()))  #",
        "stay float32",
    ),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + "    model.ia3 = None\n", "the vectors of before are gone"),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + "    vectors.fingerprint = ours\n", "they remember this base now"),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + "    model.requires_grad_(False)\n", "belong to their holder"),
    ("freeze_the_base", "ia3.py", "if not isinstance(vectors, IA3):", "if False:", "what is no IA3"),
    ("freeze_the_base", "ia3.py", "device, torch.float32)  #", "device)  #", "in bfloat16 must become float32"),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + SAME_CONFIG, "with another block_size"),
    ("count", "ia3.py", COUNT, "6 * self.config.n_layer * self.config.n_embd", "but count() says"),
    ("count", "ia3.py", COUNT, "sum(p.size(-1) for p in self.parameters())", "but count() says"),
    ("count", "ia3.py", COUNT, "len(list(self.parameters()))", "but count() says"),
    ("gradient", "gradient.py", SUM, "(upstream * x).mean((0, 1))", "a mean over B and T"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(1).mean(0)", "a mean over B,"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(0)", "an entry a channel"),
    ("gradient", "gradient.py", SUM, "upstream.sum((0, 1))", "by finite differences"),
    ("gradient", "gradient.py", SUM, "-(upstream * x).sum((0, 1))", "sign"),
    ("gradient", "gradient.py", "    p[place] = before - step\n", "    p[place] = before\n", "the function says"),
    ("gradient", "gradient.py", DIFFERENCE, "(above - below) / step", "twice the slope"),
    ("gradient", "gradient.py", "    p[place] = before\n", "", "the bits that it had"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum((0, 1)) * (1 + 1e-5)", "where"),
    ("gradient", "gradient.py", "    before = p[place]", "    step = 1e-4\n    before = p[place]", "use the step"),
    (
        "gradient",
        "gradient.py",
        MOVE,
        MOVE.replace("= before + step", "+= step")
        .replace("= before - step", "-= 2 * step")
        .replace("= before", "+= step"),
        "the bits that it had",
    ),
    (
        "fold_rows",
        "merge.py",
        ROW,
        "linear.weight[rows] *= l.to(linear.weight.dtype).unsqueeze(1)",
        "the weight in bfloat16",
    ),
    ("fold_rows", "merge.py", BIAS, "linear.bias[rows] *= l.to(linear.bias.dtype)", "the bias in bfloat16"),
    (
        "fold_rows",
        "merge.py",
        BIAS,
        BIAS + "\n            linear.bias = torch.nn.Parameter(linear.bias)",
        "write into linear.bias",
    ),
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
    ("fold_columns", "merge.py", COLUMN, "linear.weight *= l.to(linear.weight.dtype)  #", "in bfloat16"),
    (
        "fold_columns",
        "merge.py",
        COLUMN,
        "linear.bias = torch.nn.Parameter(linear.bias.clone())\n        " + COLUMN,
        "leave linear.bias as it is",
    ),
    ("fold_columns", "merge.py", COPY, "model.requires_grad_(True)\n    " + COPY, "which tensors of the model given"),
    ("fold_columns", "merge.py", COPY, COPY + "\n    merged.tokenizer = None", "lost the tokenizer"),
    ("fold_columns", "merge.py", "merged.requires_grad_(True)", "merged.requires_grad_(True).train()", "in eval mode"),
    ("fold_columns", "merge.py", COPY, "merged = model", "must return another GPT, a copy"),
    ("fold_columns", "merge.py", COPY, "merged = copy.copy(model)", "take them off a copy"),
    ("fold_columns", "merge.py", KEYS, KEYS.replace("n_embd, 2 * n_embd", "0, n_embd"), "the rows of W_k"),
    ("fold_columns", "merge.py", VALUES, VALUES.replace("l_v", "l_k"), "the rows of W_v get another vector"),
    ("fold_columns", "merge.py", VALUES, f"{VALUES}\n    {VALUES}", "must be called twice a block"),
    ("fold_columns", "merge.py", VALUES, VALUES + IN_W_1, "must be called twice a block"),
    ("fold_columns", "merge.py", "if model.ia3 is None or ", "if ", "a model without vectors"),
    (
        "fold_columns",
        "merge.py",
        "if model.ia3.fingerprint not in (None, fingerprint(model)):",
        "if False:",
        "another base's vectors",
    ),
    ("fold_columns", "merge.py", "    check_finite(merged)\n", "", "overflows"),
    ("save_and_load_format", "ia3.py", "p.detach().float()", "p.detach().half().float()", "bit for bit"),
    ("save_and_load_format", "ia3.py", "p.detach().float()", "p.detach().double()", "must be float32 in the file"),
    ("save_and_load_format", "ia3.py", "p.detach().float()", "p.requires_grad_(False).float()", "made it untrainable"),
    ("save_and_load_format", "ia3.py", SAVE, SAVE.replace("self.fingerprint}", "self.config.n_embd}"), "must be"),
    ("save_and_load_format", "ia3.py", SAVE, SAVE.replace('"config": asdict(self.config), ', ""), "must have the keys"),
    ("save_and_load_format", "ia3.py", SAVE, SAVE.replace('"fingerprint"', '"base"'), "must have the keys"),
    (
        "save_and_load_format",
        "ia3.py",
        WRITE,
        WRITE.replace("np.bytes_(json.dumps(about))", "json.dumps(about)"),
        "bytes",
    ),
    (
        "save_and_load_format",
        "ia3.py",
        WRITE,
        WRITE.split("\n")[1].strip().replace("(f,", "(path,") + "\n",
        "np.savez adds .npz",
    ),
    (
        "save_and_load_format",
        "ia3.py",
        WRITE,
        WRITE.replace("replace_file(path)", 'open(f"{path}.tmp", "wb")'),
        "one file",
    ),
    ("save_and_load_round_trip", "ia3.py", KNOWN, "", "must come back as .fingerprint"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, KNOWN + "        model.ia3 = vectors\n", "must not attach"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, KNOWN + "        vectors.requires_grad_(False)\n", "trainable"),
    (
        "save_and_load_round_trip",
        "ia3.py",
        KNOWN,
        KNOWN + '        if about["config"] != asdict(model.config):\n            raise ValueError\n',
        "a file whose config has another block_size",
    ),
    ("save_and_load_atomic", "ia3.py", WRITE, WRITE.replace("replace_file(path)", 'open(path, "wb")'), "the old file"),
    (
        "save_and_load_atomic",
        "ia3.py",
        WRITE,
        WRITE.replace("replace_file(path)", 'open(f"{path}.tmp", "wb")'),
        "must replace it",
    ),
    (
        "save_and_load_atomic",
        "ia3.py",
        WRITE,
        "import io\n"
        "        f = io.BytesIO()\n"
        "        np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)\n"
        '        open(path, "wb").write(f.getvalue())\n',
        "wrote into the old file",
    ),
    (
        "save_and_load_refusal",
        "ia3.py",
        "        if theirs != ours:",
        "        if False:",
        "another base of the same shape",
    ),
    ("save_and_load_refusal", "ia3.py", "if theirs != ours:", "if theirs[:8] != ours[:8]:", "in its last digit"),
    (
        "save_and_load_refusal",
        "ia3.py",
        "if theirs != ours:",
        "if theirs not in ('None', ours):",
        "has no fingerprint",
    ),
    ("save_and_load_refusal", "ia3.py", "allow_pickle=False", "allow_pickle=True", "code in the file was run"),
    ("save_and_load_refusal", "ia3.py", "if not np.isfinite(arrays[name]).all():", "if False:", "NaN"),
    (
        "save_and_load_refusal",
        "ia3.py",
        "except Exception as e:",
        "except ValueError as e:",
        "must be refused with a ValueError, not",
    ),
    ("save_and_load_refusal", "ia3.py", "if self.fingerprint is None or ", "if ", "never attached"),
    (
        "save_and_load_refusal",
        "ia3.py",
        "shapes = read_shapes(file)",
        'shapes = {name: a.shape for name, a in dict(file).items() if name != "about"}',
        "before an array is read",
    ),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer - 1].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids.flip(0), layer].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer]", "to meet (B, T, width)"),
    ("stack_tasks", "ia3.py", GATHER, "matrix.detach()[task_ids, layer].unsqueeze(1)", "no gradient reaches l_k"),
    (
        "stack_tasks",
        "ia3.py",
        GATHER,
        "torch.stack([matrix[t, layer] for t in task_ids.tolist()]).unsqueeze(1)",
        "without a loop",
    ),
    (
        "stack_tasks",
        "ia3.py",
        GATHER,
        "sum((task_ids == t).float().view(-1, 1, 1) * matrix[t, layer] for t in range(len(matrix)))",
        "without a loop",
    ),
    ("stack_tasks", "ia3.py", "IA3(given[0].config, sites)", "IA3(tasks[0].config, sites)", "'NoneType' object has no"),
    ("stack_tasks", "ia3.py", BASES, "{given[0].fingerprint}", "one task remembers a base"),
    ("stack_tasks", "ia3.py", BASES, BASES.replace("given if", "given[:2] if"), "the last one's another"),
    ("stack_tasks", "ia3.py", "(task.config.n_layer, task.config.widths)", "task.config.n_layer", "two widths"),
    ("stack_tasks", "ia3.py", "(task.config.n_layer, task.config.widths)", "str(task.config)", "whose configs differ"),
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
        "l_k",
    ),
    ("stack_tasks", "ia3.py", " or len(fingerprints) > 1", "", "two bases"),
    ("train", "train.py", "if step < warmup:", "if False:", "warmup"),
    ("train", "train.py", "config.lr * (step + 1) / (warmup + 1)", "config.lr * step / warmup", "step 0 is 0"),
    ("train", "train.py", COSINE, COSINE.replace("done", "done / 2"), "must be 0"),
    ("train", "train.py", "config.lr * (1 - done)", "config.lr * done", "the peak is at step"),
    ("train", "train.py", COSINE, "(1 - done)", "not when 1/6 is done"),
    ("train", "train.py", "max(config.steps - warmup, 1)", "(config.steps - warmup)", "divides by zero"),
    ("train", "train.py", "int(config.warmup * config.steps)", "round(config.warmup * config.steps)", "whole ones"),
    ("train", "ia3.py", "    model.requires_grad_(False)\n", "", "of the base trainable"),
    ("llama", "llama.py", WIDTHS, "self.n_embd, self.n_embd, self.n_hidden", "cannot meet"),
    ("llama", "llama.py", K, "pass", "nothing is scaled"),
    ("llama", "llama.py", V, "v = l_v.to(v.dtype) * v", "l_v ⊙ V must be taken in float32"),
    ("llama", "llama.py", H, "h = F.silu(l_ff * self.gate_proj(x)) * self.up_proj(x)", "before the silu"),
    ("llama", "llama.py", K, "k = l_k.to(k.dtype) * k", "l_k ⊙ K must be taken in float32"),
    ("llama", "llama.py", K, "k = (l_k.detach() * k).to(k.dtype)", "no gradient reaches l_k"),
    ("llama", "llama.py", H, "h = (l_ff.detach() * h).to(h.dtype)", "no gradient reaches l_ff"),
    ("llama", "llama.py", K, "k = (l_k.view(1, 1, -1) * k).to(k.dtype)", "may be (B, 1, width)"),
    ("llama", "llama.py", V, "v = (l_v.view(-1, v.size(-1))[0] * v).to(v.dtype)", "row b of the batch"),
    (
        "llama",
        "merge.py",
        "block.self_attn.v_proj, slice(None), l_v",
        "block.self_attn.v_proj, slice(None), l_k",
        "v_proj",
    ),
    ("llama", "merge.py", "fold_columns(block.mlp.down_proj", "fold_columns(block.mlp.up_proj", "mlp.up_proj"),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)]


@pytest.mark.parametrize("name, file, old, new, words", WRONG, ids=IDS)
def test_a_wrong_answer_loses_its_exercise_and_is_told_why(solve, grade, name, file, old, new, words):
    problem = grade(solve(NAMES, [(file, old, new)]), [name], "-x")[name]
    assert problem is not None and words in problem, problem


# the same in two places
ATTENDED = "y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again\n"
TURNED = "        k = rotate(k, cos, sin)\n"
WRONG_TWICE = {
    "a load that makes up for a wrong save": (
        "save_and_load_format",
        [
            ("ia3.py", "p.detach().float()", "(2 * p.detach()).float()"),
            ("ia3.py", "torch.from_numpy(arrays[name])", "torch.from_numpy(arrays[name]) / 2"),
        ],
        "is not the vectors'",
    ),
    "and its load reads nobody else's files": (
        "save_and_load_round_trip",
        [
            ("ia3.py", "p.detach().float()", "(2 * p.detach()).float()"),
            ("ia3.py", "torch.from_numpy(arrays[name])", "torch.from_numpy(arrays[name]) / 2"),
        ],
        "does not come back bit for bit",
    ),
    "l_k after the rotation": (
        "llama",
        [
            ("llama.py", K, "pass"),
            (
                "llama.py",
                TURNED,
                TURNED
                + "        if l_k is not None:\n"
                + "            k = l_k.view(-1, 1, C // self.n_head).to(k.dtype) * k\n",
            ),
        ],
        "l_k acts after the rotation",
    ),
}


@pytest.mark.parametrize("name, changes, words", WRONG_TWICE.values(), ids=WRONG_TWICE)
def test_a_wrong_answer_in_two_places(solve, grade, name, changes, words):
    problem = grade(solve(NAMES, changes), [name], "-x")[name]
    assert problem is not None and words in problem, problem


def test_what_is_the_same_function_passes(solve, grade):
    """l_k on the queries and l_v behind the attention, which the handout has students submit; l_ff on W_up's rows."""
    moved = ATTENDED + "        if l_v is not None:\n            y = (l_v * y).to(y.dtype)\n"
    changes = [("model.py", K, "q = (l_k * q).to(q.dtype)"), ("model.py", V, "pass"), ("model.py", ATTENDED, moved)]
    changes += [("merge.py", "fold_columns(block.mlp.down_proj,", "fold_rows(block.mlp.up_proj, slice(None),")]
    assert set(grade(solve(NAMES, changes), ["keys_and_values", "llama"]).values()) == {None}


def test_the_sheet_stops_at_the_first_test_that_fails_and_counts_its_cases(solve, grade):
    """The answer breaks both tests of the start: that its entries are ones, in seven cases, and that they are many."""
    wrong = "return nn.Parameter(torch.zeros(1).expand(config.n_layer, width))"
    problem = grade(solve(NAMES, [("ia3.py", ONES, wrong)]), ["start_at_ones"])["start_at_ones"]
    assert problem.endswith("an entry is 0, where 1 is right (and 6 like it)")


def test_every_exercise_has_three_wrong_answers():
    counts = {name: sum(row in rows(name) for row, *_ in WRONG) for name in NAMES}
    assert min(counts.values()) >= 3, counts


def test_the_untouched_base_runs(starter):
    command = [sys.executable, "sample.py", "--prompt", "To be", "--tokens", "5", "--device", "cpu"]
    result = subprocess.run(command, cwd=starter, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("To be"), result.stderr
    result = subprocess.run([*command, "--ia3", "data/folio.npz"], cwd=starter, capture_output=True, text=True)
    assert "NotImplementedError: Exercise 9: Save and load" in result.stderr


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
    there = {path.name for path in (tmp_path / "starter").glob("*.py")}
    assert "gradient.py" in there and "llama.py" not in there  # which is not cut here, and shows model.py's answers
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
    for row, test in zip(SHEET, results["tests"], strict=True):
        lost = row["name"] in TROUBLE or row["name"] in ("start_at_ones", "train")
        assert test["max_score"] == row["points"]
        assert test["score"] == (0 if lost else row["points"]), sheet
        assert bool(test["output"]) == lost
        if row["name"] in TROUBLE:
            assert TROUBLE[row["name"]][-1] in test["output"]
    assert " 3. Start at ones                              0 / 3\n      - not done yet\n" in sheet
    assert "- needs exercise 3\n" in sheet
    assert f"total  {sum(test['score'] for test in results['tests'])} / " in sheet


def test_code_that_cannot_be_imported_is_named(solve, grade):
    """Where it is what every test imports, too: pytest itself then ends without a word to the sheet."""
    folder = solve(NAMES, [("ia3.py", "import hashlib\n", "import hashlib\nimport no_such_module\n")])
    assert grade(folder, ["count"]) == {"count": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_one_exercise_is_graded_in_the_sheets_words(solve):
    folder = solve(["count"])
    result = subprocess.run([sys.executable, "grade.py", "9", "5"], cwd=folder, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert lines[0] == " 5. Count the values                           2 / 2"
    assert [line[:3] for line in lines[:9]] == [" 5.", *[" 9.", "   "] * 4]
    assert lines[9].split() == ["total", "2", "/", "9"]
    assert not (folder / "results.json").exists()  # which says what was scored in all
    result = subprocess.run([sys.executable, "grade.py", "99"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2 and "there is no exercise 99" in result.stderr


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


# every section's session in a child that has imported nothing of the starter's, and no name
SESSIONS = """
import doctest, os, re, sys
import torch  # once for all: it takes the most time, and gives no session a name
n = 0
for part in re.split(r"(?m)^###? ", open("README.md", encoding="utf-8").read()):
    test = doctest.DocTestParser().get_doctest(part, {}, part.splitlines()[0], "README.md", 0)
    if not test.examples:
        continue
    n += 1
    child = os.fork()
    if child == 0:
        failed = doctest.DocTestRunner().run(test).failed
        sys.stdout.flush()
        os._exit(failed > 0)
    assert os.waitpid(child, 0)[1] == 0, test.name
print(n)
"""


def test_every_session_of_the_handout_runs_in_a_fresh_interpreter(done):
    assert run_in(done, "-c", SESSIONS) == "11\n"


def test_the_handouts_commands_do_what_it_says(done):
    handout = (done / "README.md").read_text(encoding="utf-8")
    sample = 'sample.py --ia3 data/folio.npz data/sonnets.npz data/kjv.npz --prompt "The king " --tokens 120'
    assert f"    python {sample}\n" in handout
    assert run_in(done, *shlex.split(sample)).split()[:3] == ["folio", "sonnets", "kjv"]

    site = "train.py --sites $site --seed $seed --steps 100 --out out/$site-$seed"
    assert f"    python {site}\n" in handout
    few = site.replace("$site", "k").replace("$seed", "2").replace("100", "1") + " --batch-size 2 --eval-windows 2"
    assert "val, all of it: " in run_in(done, *few.split())

    requirements = (done / "requirements.txt").read_text()
    wheel = re.search(r"pip install (torch\S+) --index-url https://download.pytorch.org/whl/cpu\n", handout)[1]
    assert wheel in requirements.splitlines()
    took = "about 80 seconds"  # make demo
    assert took in handout and took in (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_pages_for_teachers_fit_the_handout():
    """The same questions, worth 40 points; the files that Gradescope takes; the minutes, in hours."""
    handout = (ROOT / "classroom/HANDOUT.md").read_text(encoding="utf-8")
    questions = re.findall(r"(?m)^##+ (Question \d+\. .*?) \((\d+) points", handout)
    assert questions == re.findall(r"(?m)^##+ (Question \d+\. .*?) \((\d+) points", answers())
    assert sum(int(points) for _, points in questions) == 40
    teaching = (ROOT / "classroom/TEACHING.md").read_text(encoding="utf-8")
    taken = re.search(r"for file in (.*); do cp", teaching)[1].split()
    assert sorted(taken) == CUT
    minutes = [int(n) for n in re.findall(r"(?m)^### \d+\. .* points, (\d+) minutes", handout)]
    assert len(minutes) == len(NAMES) and "some four hours" in teaching and 3.5 < sum(minutes) / 60 < 4.5


def test_a_submission_grades_itself_if_it_likes(solve, grade):
    """As the teacher is told: a grader in the process of what it grades is no guard."""
    changes = [("ia3.py", "import hashlib\n", "import hashlib\nimport pytest\npytest.fail = lambda *_, **__: None\n")]
    changes += [("ia3.py", COUNT, "0")]
    assert grade(solve(NAMES, changes), ["count"]) == {"count": None}


def test_the_tests_that_the_answers_name_are_there():
    named = set(re.findall(r"`(test_\w+)`", answers()))
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert len(named) >= 5
    for name in named:
        assert f"def {name}(" in there, name


def cells(table, first):
    """The cells behind the first one of the row of a results/ table that begins with the cell first."""
    lines = (ROOT / f"experiments/results/{table}/table.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def gain_at(sites, lr):
    """What sites gain over the base at a rate, in nats a byte, by the table of sites × rates."""
    return float(cells("ablation-rates", "the base")[2]) - float(cells("ablation-rates", f"{sites} | {lr}")[2])


def numbers_of_the_answers():
    """What ANSWERS.md states, computed: texts of the form in which they stand there."""
    found = set()

    # question 2: T0's blocks are 4096 wide, with a gated MLP of 10,240 and cross-attention in the decoder's; 24 of each
    n, n_ff = 4096, 10240
    encoder = 4 * n * n + 3 * n * n_ff  # W_q, W_k, W_v, W_o; the gated MLP's three matrices
    decoder = encoder + 4 * n * n
    values = 24 * (2 * n + n_ff) + 24 * (4 * n + n_ff)
    found |= {f"{2 * n + n_ff:,} values for {encoder / 1e6:.0f} million weights"}
    found |= {f"{4 * n + n_ff:,} for {decoder / 1e6:.0f} million", f"{n_ff:,} wide", f"n is {n}"}
    found |= {f"{values:,} values in 24 of each, {100 * values / (24 * (encoder + decoder)):.4f} % of their matrices"}
    found |= {f"T0's vectors are {4 * values / 1e6:.1f} MB"}
    smallest = next(n for n in range(1, 10**4) if 1 / (2 * n) < 1e-4) - 1
    found |= {f"wherever n > {smallest}", f"{10**4:,} bytes, {10**4 // 4:,} values"}
    found |= {f"n > {smallest} takes {6 * smallest:,} values, {4 * 6 * smallest / 1e6} MB", f"1 for {smallest},"}
    found |= {f"{10**4 // 4:,} values are 0.01 % of {10**4 // 4 / 1e-4 / 1e6:.0f} million", "0.01 MB", '"0.01 %"'}
    count = {}  # values trained, and of all parameters, by docs/formats.md
    for line in (ROOT / "docs/formats.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(("gpt2 ", "data/base.pt ")):
            name, _, n, n_all, n_trained, *_ = line.replace(",", "").split()
            count[name] = int(n_all), int(n_trained), int(n)
    for n_all, n_trained, n in count.values():
        share = f"{100 * n_trained / n_all:.3f}" if n == 768 else f"{100 * n_trained / n_all:.2f}"
        found |= {f"{100 / (2 * n):.{3 if n == 768 else 2}f} %", f"{share} %"}
    found |= {f"n is {count['data/base.pt'][2]}", f"1/{2 * count['data/base.pt'][2]}", f"n = {count['gpt2'][2]}"}

    # question 7: Llama-3-8B
    d_head = 4096 // 32
    found |= {f"8 heads of {d_head} channels, {8 * d_head} of {32 * d_head}"}

    # question 8
    base = float(cells("ablation", "the base")[1])
    _, points, _ = ablate.read_points(ROOT / "experiments/results/ablation")
    gains = {}
    for sites, name in {"k": "k", "v": "v", "ff": "ff", "k,v,ff": "all three"}.items():
        n_values, loss, *_ = cells("ablation", sites)
        gains[sites] = base - float(loss)
        seeds = [base - row["loss"] for row in points[sites, "all", 0.1, 100].values()]
        assert len(seeds) == 3 and max(seeds) - min(seeds) < 0.01  # "by thousandths"
        a_thousand = gains[sites] / int(n_values.replace(",", "")) * 1000
        ends = f"{min(seeds):.3f}, {max(seeds):.3f}"
        found |= {f"| {name} | {n_values} | {gains[sites]:.3f} | {ends} | {a_thousand:.3f} |"}
    found |= {f"{100} steps"}
    assert 1.9 < (gains["k"] + gains["v"] + gains["ff"]) / gains["k,v,ff"] < 2.1  # "about twice"
    at_a_third = sum(gain_at(sites, "0.03") for sites in ("k", "v", "ff")) / gain_at("k,v,ff", "0.03")
    found |= {f"{at_a_third:.1f} times, not twice"}
    for lr in ("0.03", "0.1", "0.3"):
        assert gain_at("ff", lr) > gain_at("v", lr) > gain_at("k", lr)
        assert gain_at("v", lr) > gain_at("k", lr) > gain_at("ff", lr) / 4  # l_ff is four times as wide
    assert all(gain_at(sites, "0.3") > gain_at(sites, "0.1") for sites in ("k", "v"))
    assert gain_at("ff", "0.1") > max(gain_at("ff", "0.03"), gain_at("ff", "0.3"))

    # question 9
    n_all, n_trained, n = count["gpt2"]
    lora = 2 * 4 * (n + n)
    found |= {f"{n_all:,} numbers, {4 * n_all / 1e6:.0f} MB", f"{4 * 1000 * n_all / 1e9:.0f} GB", "GPT-2 124M"}
    found |= {f"{n_trained:,} numbers a task are {4 * n_trained / 1e3:.0f} kB", f"{4 * n_trained * 1000 / 1e6:.0f} MB"}
    found |= {f"2·4·({n} + {n}) = {lora:,} numbers a layer, is {12 * lora:,}", f"{4 * 12 * lora * 1000 / 1e6:.0f} MB"}
    found |= {f"{100 * 6 * n / (2 * 12 * n * n):.3f} %", f"{100 * 2 * 2 * 4 * n / (12 * n * n):.2f} %", "64 tasks"}
    found |= {f"reads 64 models, {64 * 4 * n_all / 1e9:.0f} GB", f"{64 * 4 * n_trained / 1e6:.0f} MB of vectors"}
    found |= {f"{64 * 4 * 12 * lora / 1e6:.0f} MB", "12n²", "4r/(12n)"}

    gpu = (ROOT / "experiments/results/bench-h200/table.md").read_text(encoding="utf-8").splitlines()
    more = [float(line.split("|")[2].split()[0]) - 1 for line in gpu if line.startswith("| base with vectors |")]
    found |= {f"{100 * min(more):.0f} to {100 * max(more):.0f} % on a GPU"}

    # question 10
    found |= {f"{count['data/base.pt'][1]:,} on the bundled base"}
    for name in ("LoRA r = 1 on k, v", "LoRA r = 1 on q, k, v", "(IA)³", "LoRA r = 4 on q, v"):
        shown = {"(IA)³": "(IA)³ ", "LoRA r = 1 on q, k, v": "this LoRA closes "}.get(name, "")
        found |= {f"{shown}{cells('compare', name)[3].split()[0]} %"}
    behind = float(cells("compare", "LoRA r = 1 on q, k, v")[4].split()[0])
    found |= {f"it is {behind:.4f} nats behind"}
    lines = (ROOT / "experiments/results/compare/table.md").read_text(encoding="utf-8").split("What they cost")[1]
    costs = {line.split("|")[1].strip(): line.split("|") for line in lines.splitlines() if line.startswith("|")}
    found |= {f"{costs[name][2].strip()} numbers" for name in ("LoRA r = 1 on k, v", "LoRA r = 4 on q, v")}
    found |= {f"keeps {costs['LoRA r = 1 on k, v'][6].strip()} of", f"(IA)³ {costs['(IA)³'][6].strip()}, since"}
    return found


def test_every_number_of_the_answers_is_computed():
    """Of two digits and more, powers of ten aside: it stands in a piece that is computed here, and each piece there."""
    text = " ".join(re.sub(r"`[^`]*`|\]\([^)]*\)|(?m:^#.*)|10[⁻³⁴¹]+", "", answers()).split())
    left = text
    for piece in sorted(numbers_of_the_answers(), key=len, reverse=True):
        assert piece in text, piece
        left = left.replace(piece, "")
    assert re.findall(r".{,20}\b\d[\d.,]*\d.{,20}", left) == []


def test_lora_at_equal_count():
    for sizes in ({"n_layer": 6, "n_head": 6, "n_embd": 192}, {"n_layer": 2, "n_head": 2, "n_embd": 16}):
        model = make_gpt(**sizes)
        wanted = IA3(model.config).count()
        assert sum(p.numel() for p in rivals.add_lora(model, 1, "qkv")) == wanted
        assert sum(p.numel() for p in rivals.add_lora(make_gpt(**sizes), 3, "k")) == wanted


def test_a_scale_of_either_factor_of_a_swiglu_is_one_of_the_product():
    dice = torch.Generator().manual_seed(0)
    gate, up, l = torch.randn(3, 50, generator=dice, dtype=torch.float64)
    product = l * (F.silu(gate) * up)
    for other in ((l * F.silu(gate)) * up, F.silu(gate) * (l * up)):
        assert (other - product).abs().max() <= 1e-15 * product.abs().max()
    assert (F.silu(l * gate) * up - product).abs().max() > 0.1


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
