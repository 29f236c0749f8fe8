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
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from classroom import make

ROOT = Path(__file__).parents[2]
NAMES = [exercise.name for exercise in make.EXERCISES]
SHEET = make.score_sheet(make.EXERCISES)  # one row for each exercise, or for each part of one


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
        diff = difflib.unified_diff(before.split("\n"), after.split("\n"), n=0)
        added = [line[1:].strip() for line in diff if line[:1] == "+" and line[:3] != "+++"]
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
    with pytest.raises(ValueError, match="2 `if x` in f"):
        make.cut(twice, "m", "f", "x")
    for place in (("h",), ("A.f",), ("A.g", "x > 2"), ("f.missing",)):
        with pytest.raises(ValueError, match=place[-1].split(".")[-1]):
            make.cut(source, "m", *place)
    for text in ('def f():\n    """Only this."""\n', "def f(): return 1\n"):
        with pytest.raises(ValueError, match=r"nothing to cut|line of its own"):
            make.cut(text, "m", "f")


# lines of cut bodies that stand in code that ships, too, and tell nothing
ORDINARY = {
    "model = unwrap(model)",
    "model.ia3 = None",
    "check_finite(model)",
    "check_arrays(arrays)",
    "except Exception as e:",
    "with replace_file(path) as f:",
    "return vectors",
}


def test_the_solution_is_nowhere_in_the_starter(starter):
    """Not in the code, the tests or the handout; and no history or cache is there, only the files on the list."""
    lines = set()
    for exercise in make.EXERCISES:
        for file, *place in exercise.cuts:
            first, last = make.find(solution(file), *place)
            lines |= {line.split("  # ")[0].strip() for line in solution(file).splitlines()[first - 1 : last]}
    lines = {line for line in lines if len(line) > 12}
    assert len(lines - ORDINARY) > 60 and lines >= ORDINARY  # nothing is excused that need not be
    files = [path for path in starter.rglob("*") if not path.is_dir()]
    for path in files:
        if path.suffix in (".txt", ".pt"):  # texts and the base
            continue
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
    problems = grade(starter)
    assert problems.pop("all_together").startswith("needs exercise ")
    assert set(problems.values()) == {"not done yet"}


def test_the_solution_scores_everything(solve, grade):
    assert grade(solve(NAMES)) == {row["name"]: None for row in SHEET}


def test_the_parts_of_an_exercise_have_its_points():
    for exercise in make.EXERCISES:
        assert not exercise.parts or sum(exercise.parts.values()) == exercise.points


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


# Wrong answers: the row of the sheet, the file, a piece of its solution, what stands there instead, and a piece of what
# the sheet must say
K, V, H = "k = (l_k * k).to(k.dtype)", "v = (l_v * v).to(v.dtype)", "h = (l_ff * h).to(h.dtype)"
ONES = "return nn.Parameter(torch.ones(config.n_layer, width))"
NO_SITE = "            if site not in sites:\n                return None\n"
FREEZE = "    model.requires_grad_(False)\n"
MADE = "    if vectors is None:\n"
SHAPE = "(vectors.config.n_layer, vectors.config.widths) != (model.config.n_layer, model.config.widths)"
REFUSE = "    theirs = vectors.fingerprint\n"
SAME_CONFIG = "    if vectors.config != model.config:\n        raise ValueError\n"
COUNT = "sum(p.numel() for p in self.parameters())"
SUM = "(upstream * x).sum((0, 1))"
DIFFERENCE = "(above - below) / (2 * step)"
MOVE = """    p[place] = before + step
    above = loss()
    p[place] = before - step
    below = loss()
    p[place] = before
"""
MOVE_BY = (
    MOVE.replace("= before + step", "+= step").replace("= before - step", "-= 2 * step").replace("= before", "+= step")
)
ROW = "scale(linear.weight[rows], l.unsqueeze(1))"
BIAS = "scale(linear.bias[rows], l)"
ROWS_IN_FLOAT32 = "(linear.weight[rows].float() * l.float().unsqueeze(1)).to(linear.weight.dtype)"
ROW_BY_ROW = "[scale(linear.weight[i], l[i - rows.start]) for i in range(rows.start, rows.stop)]"
KEYS = "fold_rows(block.attn.c_attn, slice(n_embd, 2 * n_embd), l_k)"
VALUES = "fold_rows(block.attn.c_attn, slice(2 * n_embd, 3 * n_embd), l_v)"
IN_W_1 = "\n    fold_rows(block.mlp.c_fc, slice(None), l_ff)"
COLUMN = "scale(linear.weight, l)"
COPY = "merged = copy.deepcopy(model)"
FOLD = "    fold(merged)\n    check_finite(merged)\n"
AWAY = "    vectors, model.ia3 = model.ia3, None\n" + FOLD + "    model.ia3 = vectors\n"
STRANGERS = "if model.ia3.fingerprint not in (None, fingerprint(model)):"
ARRAY = "p.detach().float()"
ABOUT = '{"config": asdict(self.config), "vectors": list(arrays), "fingerprint": self.fingerprint}'
WRITE = "with replace_file(path) as f:"
IN_PLACE = 'with open(path, "wb") as f:'
BESIDE = 'with open(f"{path}.tmp", "wb") as f:'
SAVEZ = "np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)"
REMOVE = """
            import os
            if os.path.exists(path):
                os.remove(path)"""
CAST = '.astype(np.float32, casting="same_kind")'
FINITE = '        check_arrays(arrays, f"{path}: ")\n'
FIRST_LAYER = "        check_arrays({name: a[0] for name, a in arrays.items()})\n"
KNOWN = "        vectors.fingerprint = ours\n"
STRANGE_CONFIG = KNOWN + '        if about["config"] != asdict(model.config):\n            raise ValueError\n'
LOADED = "return vectors.to(next(model.parameters()).device)"
SHAPES = "shapes = read_shapes(file)"
UNPACKED = 'shapes = {name: a.shape for name, a in dict(file).items() if name != "about"}'
GATHER = "matrix[task_ids, layer].unsqueeze(1)"
BY_ROW = "torch.stack([matrix[t, layer] for t in task_ids.tolist()]).unsqueeze(1)"
BY_TASK = "sum((task_ids == t).float().view(-1, 1, 1) * matrix[t, layer] for t in range(len(matrix)))"
BASES = "{task.fingerprint for task in given if task.fingerprint}"
DEPTH = "(task.config.n_layer, task.config.widths)"
OWN = "matrix = ones  #"
EACH = "for task in tasks:\n            matrix"
WARMUP = "int(config.warmup * config.steps)"
COSINE = "0.5 * (1 + math.cos(math.pi * done))"
WIDTHS = "self.n_kv_head * d_head, self.n_kv_head * d_head, self.n_hidden"
D_HEAD = "d_head = self.n_embd // self.n_head"
FOLD_V = "block.self_attn.v_proj, slice(None), l_v"
FOLD_FF = "fold_rows(block.mlp.up_proj, slice(None), l_ff)"
SAME_FOLD = "fold_columns(block.mlp.down_proj, l_ff)"
WRONG = [
    ("keys_and_values", "model.py", K, "q, k = (l_k * q).to(q.dtype), (l_k * k).to(k.dtype)", "queries are scaled too"),
    ("keys_and_values", "model.py", V, "v = (l_v + v).to(v.dtype)", "not softmax"),
    ("keys_and_values", "model.py", V, "pass", "nothing is scaled"),
    ("keys_and_values", "model.py", K, "k = l_k * k", "bfloat16 again"),
    ("keys_and_values", "model.py", K, "k *= l_k", "make a new tensor"),
    ("keys_and_values", "model.py", K, "k = (k / l_k).to(k.dtype)", "the keys are divided"),
    ("keys_and_values", "model.py", V, "v = (l_v.detach() * v).to(v.dtype)", "no gradient reaches l_v"),
    ("keys_and_values", "model.py", K, "k = l_k.to(k.dtype) * k", "the vector itself is rounded"),
    ("keys_and_values", "model.py", V, "v = l_v.to(v.dtype) * v", "the vector itself is rounded"),
    ("keys_and_values", "model.py", K, "k = (l_k.float() * k.float()).to(k.dtype)", "cast neither factor"),
    ("keys_and_values", "model.py", K, f"{K} if cache is None else k", "a cache"),
    ("keys_and_values", "model.py", V, f"{V} if cache is None else v", "a cache"),
    ("keys_and_values", "model.py", K, f"{K} if not self.training else k", "train mode"),
    ("keys_and_values", "model.py", K, "k = (l_k.abs() * k).to(k.dtype)", "negative entry of l_k"),
    ("keys_and_values", "model.py", V, "v = (l_v.abs() * v).to(v.dtype)", "negative entry of l_v"),
    ("keys_and_values", "model.py", V, "v = (l_v.clamp(0, 2) * v).to(v.dtype)", "not softmax"),
    (
        "hidden_activations",
        "model.py",
        H,
        'h = F.gelu((l_ff * self.c_fc(x)).to(h.dtype), approximate="tanh")',
        "before the GELU",
    ),
    ("hidden_activations", "model.py", H, "h = l_ff.to(h.dtype) * h", "the vector itself is rounded"),
    ("hidden_activations", "model.py", H, "h = l_ff * h", "bfloat16 again"),
    ("hidden_activations", "model.py", H, "h = (l_ff.float() * h.float()).to(h.dtype)", "cast neither factor"),
    ("hidden_activations", "model.py", H, "h = (l_ff.detach() * h).to(h.dtype)", "no gradient reaches l_ff"),
    ("hidden_activations", "model.py", H, "h = (l_ff * l_ff * h).to(h.dtype)", "acts twice"),
    ("hidden_activations", "model.py", H, "h = (h / l_ff).to(h.dtype)", "divided by l_ff"),
    ("hidden_activations", "model.py", H, "h = (l_ff.abs() * h).to(h.dtype)", "negative entry of l_ff"),
    ("hidden_activations", "model.py", H, "h = (l_ff.clamp(0, 2) * h).to(h.dtype)", "not W_2"),
    ("hidden_activations", "model.py", H, f"{H} if not self.training else h", "train mode"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("ones(", "zeros("), "must be all ones"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("width)", "width) + 1e-6"), "1.000001, where 1 is right"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("config.n_layer, width", "width"), "one row per layer"),
    ("start_at_ones", "ia3.py", NO_SITE, "", "must be None"),
    ("start_at_ones", "ia3.py", ONES, "return torch.ones(config.n_layer, width)", "nn.Parameter"),
    ("start_at_ones", "ia3.py", ONES, ONES.replace("width)", "config.n_embd)"), "l_ff must be"),
    (
        "start_at_ones",
        "ia3.py",
        ONES,
        ONES.replace("width)", 'config.n_embd * (4 if site == "ff" else 1))'),
        "config.widths",
    ),
    (
        "start_at_ones",
        "ia3.py",
        ONES,
        "return nn.Parameter(torch.ones(1).expand(config.n_layer, width))",
        "memory of its own",
    ),
    ("freeze_the_base", "ia3.py", FREEZE, "", "base is left trainable"),
    ("freeze_the_base", "ia3.py", FREEZE, "    model.transformer.requires_grad_(False)\n", "outside.weight"),
    ("freeze_the_base", "ia3.py", SHAPE, SHAPE.replace("widths", "n_embd"), "compare widths"),
    ("freeze_the_base", "ia3.py", "elif sites is not None:", "elif False:", "vectors and sites at once"),
    ("freeze_the_base", "ia3.py", MADE, f"{MADE}        model.requires_grad_(False)\n", "'q': refused"),
    ("freeze_the_base", "ia3.py", "    vectors.requires_grad_()\n", "", "must be trainable"),
    ("freeze_the_base", "ia3.py", "    model.ia3 = None  #", "    #", "their holder"),
    ("freeze_the_base", "ia3.py", "if theirs not in (None, ours):", "if False:", "another base of the same shape"),
    (
        "freeze_the_base",
        "ia3.py",
        "    vectors.fingerprint = ours\n    vectors",
        "    vectors",
        "must be the fingerprint",
    ),
    (
        "freeze_the_base",
        "ia3.py",
        ".to(next(model.parameters()).device, torch.float32)",
        ".to(next(model.parameters()))",
        "stay float32",
    ),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + "    model.ia3 = None\n", "the vectors of before are gone"),
    (
        "freeze_the_base",
        "ia3.py",
        REFUSE,
        REFUSE + "    vectors.fingerprint = fingerprint(model)\n",
        "they remember this base now",
    ),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + FREEZE, "belong to their holder"),
    ("freeze_the_base", "ia3.py", "if not isinstance(vectors, IA3):", "if False:", "not an IA3"),
    ("freeze_the_base", "ia3.py", "device, torch.float32)", "device)", "in bfloat16 must become float32"),
    ("freeze_the_base", "ia3.py", REFUSE, REFUSE + SAME_CONFIG, "with another block_size"),
    ("count", "ia3.py", COUNT, "6 * self.config.n_layer * self.config.n_embd", "but count() says"),
    ("count", "ia3.py", COUNT, "sum(p.size(-1) for p in self.parameters())", "but count() says"),
    ("count", "ia3.py", COUNT, "len(list(self.parameters()))", "but count() says"),
    ("gradient", "gradient.py", SUM, "(upstream * x).mean((0, 1))", "a mean over B and T"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(1).mean(0)", "a mean over B,"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum(0)", "one entry per channel"),
    ("gradient", "gradient.py", SUM, "upstream.sum((0, 1))", "by finite differences"),
    ("gradient", "gradient.py", SUM, "-(upstream * x).sum((0, 1))", "sign"),
    ("gradient", "gradient.py", "    p[place] = before - step\n", "    p[place] = before\n", "the function says"),
    ("gradient", "gradient.py", DIFFERENCE, "(above - below) / step", "twice the slope"),
    ("gradient", "gradient.py", "    p[place] = before\n", "", "the bits that it had"),
    ("gradient", "gradient.py", SUM, "(upstream * x).sum((0, 1)) * (1 + 1e-5)", "where"),
    ("gradient", "gradient.py", "    before = p[place]", "    step = 1e-4\n    before = p[place]", "use the step"),
    ("gradient", "gradient.py", MOVE, MOVE_BY, "the bits that it had"),
    ("fold_rows", "merge.py", ROW, "linear.weight[rows] *= l.to(linear.weight.dtype).unsqueeze(1)", "the weight in bf"),
    ("fold_rows", "merge.py", BIAS, "linear.bias[rows] *= l.to(linear.bias.dtype)", "the bias in bfloat16"),
    ("fold_rows", "merge.py", BIAS, "linear.bias = torch.nn.Parameter(linear.bias)", "write into linear.bias"),
    ("fold_rows", "merge.py", ROW, "scale(linear.weight[: len(l)], l.unsqueeze(1))", "outputs of other rows"),
    ("fold_rows", "merge.py", BIAS, "pass", "must be scaled"),
    ("fold_rows", "merge.py", BIAS, "scale(linear.bias[: len(l)], l)", "outputs of other rows"),
    ("fold_rows", "merge.py", ROW, "scale(linear.weight[rows], l)", "columns of W_k"),
    ("fold_rows", "merge.py", ROW, ROW.replace("l.un", "(1 / l).un"), "divided by"),
    ("fold_rows", "merge.py", ROW, ROW.replace("l.un", "l.abs().un"), "must stay negative"),
    ("fold_rows", "merge.py", ROW, ROW_BY_ROW, "slice(None)"),
    ("fold_rows", "merge.py", ROW, f"linear.weight[rows] = {ROWS_IN_FLOAT32}", "cast neither factor"),
    ("fold_rows", "merge.py", "if linear.bias is not None:", "if True:", "linear.bias is None"),
    ("fold_rows", "merge.py", ROW, "linear.weight = torch.nn.Parameter(linear.weight * 1)", "another Parameter"),
    ("fold_columns", "merge.py", COLUMN, "scale(linear.weight, l[: linear.out_features].unsqueeze(1))", "column j"),
    ("fold_columns", "merge.py", COLUMN, "scale(linear.weight, l.unsqueeze(1))", "column j"),
    ("fold_columns", "merge.py", COLUMN, "scale(linear.weight, 1 / l)", "divided by"),
    (
        "fold_columns",
        "merge.py",
        COLUMN,
        "linear.weight.copy_(linear.weight.float() * l.float())",
        "cast neither factor",
    ),
    ("fold_columns", "merge.py", COLUMN, "scale(linear.weight, l.abs())", "must stay negative"),
    ("fold_columns", "merge.py", COLUMN, f"scale(linear.bias, l[: linear.out_features]); {COLUMN}", "b_2 must stay"),
    ("fold_columns", "merge.py", COLUMN, "linear.weight *= l.to(linear.weight.dtype)", "in bfloat16"),
    (
        "fold_columns",
        "merge.py",
        COLUMN,
        f"linear.bias = torch.nn.Parameter(linear.bias.clone()); {COLUMN}",
        "leave linear.bias as it is",
    ),
    ("fold_columns", "merge.py", COPY, f"model.requires_grad_(True)\n    {COPY}", "tensors are trainable"),
    ("fold_columns", "merge.py", COPY, f"{COPY}\n    model.ia3.fingerprint = None", "fingerprint"),
    ("fold_columns", "merge.py", COPY, f"{COPY}.eval()", "in train mode"),
    ("fold_columns", "merge.py", COPY, f"model.eval()\n    {COPY}", "its mode"),
    ("fold_columns", "merge.py", FOLD, AWAY, "is refused, but merge changed the model given, its vectors"),
    ("fold_columns", "merge.py", "n_embd = block.attn.c_attn.in_features", "n_embd = len(l_k)", "are None"),
    ("fold_columns", "merge.py", COPY, COPY + "\n    merged.tokenizer = None", "lost the tokenizer"),
    ("fold_columns", "merge.py", "merged.requires_grad_(True)", "merged.requires_grad_(True).train()", "in eval mode"),
    ("fold_columns", "merge.py", COPY, "merged = model", "must return another GPT, a copy"),
    ("fold_columns", "merge.py", COPY, "merged = copy.copy(model)", "its vectors"),
    ("fold_columns", "merge.py", KEYS, KEYS.replace("n_embd, 2 * n_embd", "0, n_embd"), "the rows of W_k"),
    ("fold_columns", "merge.py", VALUES, VALUES.replace("l_v", "l_k"), "the rows of W_v get another vector"),
    ("fold_columns", "merge.py", VALUES, f"{VALUES}\n    {VALUES}", "must be called twice per block"),
    ("fold_columns", "merge.py", VALUES, VALUES + IN_W_1, "must be called twice per block"),
    ("fold_columns", "merge.py", "if model.ia3 is None or ", "if ", "a model without vectors"),
    ("fold_columns", "merge.py", STRANGERS, "if False:", "another base's vectors"),
    ("fold_columns", "merge.py", "    check_finite(merged)\n", "", "overflows"),
    ("save_and_load_format", "ia3.py", ARRAY, "p.detach().half().float()", "bit for bit"),
    ("save_and_load_format", "ia3.py", ARRAY, "p.detach().double()", "must be float32 in the file"),
    ("save_and_load_format", "ia3.py", ARRAY, "p.detach()", "must be saved as float32"),
    ("save_and_load_format", "ia3.py", ARRAY, "p.requires_grad_(False).float()", "made it untrainable"),
    ("save_and_load_format", "ia3.py", ABOUT, ABOUT.replace("self.fingerprint}", "self.config.n_embd}"), "must be"),
    (
        "save_and_load_format",
        "ia3.py",
        ABOUT,
        ABOUT.replace('"config": asdict(self.config), ', ""),
        "must have the keys",
    ),
    ("save_and_load_format", "ia3.py", ABOUT, ABOUT.replace('"fingerprint"', '"base"'), "must have the keys"),
    ("save_and_load_format", "ia3.py", "np.bytes_(json.dumps(about))", "json.dumps(about)", "bytes"),
    ("save_and_load_format", "ia3.py", SAVEZ, SAVEZ.replace("(f,", "(path,"), "np.savez adds .npz"),
    ("save_and_load_format", "ia3.py", WRITE, BESIDE, "one file"),
    ("save_and_load_format", "ia3.py", 'about["how"] = how', "pass", "under 'how'"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, "", "must come back as .fingerprint"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, KNOWN + "        model.ia3 = vectors\n", "must not attach"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, KNOWN + "        vectors.requires_grad_(False)\n", "trainable"),
    ("save_and_load_round_trip", "ia3.py", KNOWN, STRANGE_CONFIG, "a file whose config has another block_size"),
    ("save_and_load_round_trip", "ia3.py", LOADED, "return vectors.to(next(model.parameters()))", "float32 Parameter"),
    ("save_and_load_round_trip", "ia3.py", CAST, "", "is float16 in the file"),
    ("save_and_load_atomic", "ia3.py", WRITE, IN_PLACE, "the old file"),
    ("save_and_load_atomic", "ia3.py", WRITE, BESIDE, "must replace it"),
    ("save_and_load_atomic", "ia3.py", SAVEZ, SAVEZ + REMOVE, "right before the rename"),
    ("save_and_load_refusal", "ia3.py", "if theirs != ours:", "if False:", "another base of the same shape"),
    ("save_and_load_refusal", "ia3.py", "if theirs != ours:", "if theirs[:8] != ours[:8]:", "in its last digit"),
    ("save_and_load_refusal", "ia3.py", "if theirs != ours:", "if theirs not in ('None', ours):", "no fingerprint"),
    ("save_and_load_refusal", "ia3.py", FINITE, "        pass\n", "NaN"),
    ("save_and_load_refusal", "ia3.py", FINITE, FIRST_LAYER, "NaN in the last entry"),
    (
        "save_and_load_refusal",
        "ia3.py",
        "        check_arrays(arrays)\n        about =",
        "        about =",
        "saving vectors with inf",
    ),
    ("save_and_load_refusal", "ia3.py", "except Exception as e:", "except ValueError as e:", "ValueError, not"),
    ("save_and_load_refusal", "ia3.py", "if self.fingerprint is None or ", "if ", "never attached"),
    ("save_and_load_refusal", "ia3.py", SHAPES, UNPACKED, "before an array is read"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer - 1].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids.flip(0), layer].unsqueeze(1)", "gets the vector of task"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[task_ids, layer]", "to meet (B, T, width)"),
    ("stack_tasks", "ia3.py", GATHER, "matrix[layer, task_ids].unsqueeze(1)", "layer"),
    ("stack_tasks", "ia3.py", GATHER, "matrix.detach()[task_ids, layer].unsqueeze(1)", "no gradient reaches l_k"),
    ("stack_tasks", "ia3.py", GATHER, BY_ROW, "without a loop"),
    ("stack_tasks", "ia3.py", GATHER, BY_TASK, "without a loop"),
    ("stack_tasks", "ia3.py", "IA3(given[0].config, sites)", "IA3(tasks[0].config, sites)", "stands first"),
    ("stack_tasks", "ia3.py", BASES, "{given[0].fingerprint}", "one task remembers a base"),
    ("stack_tasks", "ia3.py", BASES, BASES.replace("given if", "given[:2] if"), "the last one's another"),
    ("stack_tasks", "ia3.py", DEPTH, "task.config.n_layer", "compare widths"),
    ("stack_tasks", "ia3.py", DEPTH, "(task.config.n_layer, task.config.n_embd)", "compare widths"),
    ("stack_tasks", "ia3.py", DEPTH, "str(task.config)", "whose configs differ"),
    ("stack_tasks", "ia3.py", OWN, "matrix = ones * 0  #", "must be ones"),
    ("stack_tasks", "ia3.py", EACH, EACH.replace("tasks", "tasks[::-1]"), "l_k"),
    ("stack_tasks", "ia3.py", " or len(fingerprints) > 1", "", "two bases"),
    ("train", "train.py", "if step < warmup:", "if False:", "warmup"),
    ("train", "train.py", "config.lr * (step + 1) / (warmup + 1)", "config.lr * step / warmup", "step 0 is 0"),
    ("train", "train.py", COSINE, COSINE.replace("done", "done / 2"), "must be 0"),
    ("train", "train.py", "config.lr * (1 - done)", "config.lr * done", "the peak is at step"),
    ("train", "train.py", COSINE, "(1 - done)", "not when 1/6 is done"),
    ("train", "train.py", "max(config.steps - warmup, 1)", "(config.steps - warmup)", "divides by zero"),
    ("train", "train.py", WARMUP, "round(config.warmup * config.steps)", "whole ones"),
    ("train", "train.py", WARMUP, f"max({WARMUP}, 1)", "with warmup = 0"),
    ("train", "ia3.py", FREEZE, "", "of the base trainable"),
    ("llama", "llama.py", WIDTHS, "self.n_embd, self.n_embd, self.n_hidden", "cannot meet"),
    ("llama", "llama.py", WIDTHS, "self.n_embd // 2, self.n_embd // 2, self.n_hidden", "cannot meet"),
    ("llama", "llama.py", D_HEAD, "d_head = self.n_embd / self.n_head", "must be ints"),
    ("llama", "llama.py", K, "pass", "nothing is scaled"),
    ("llama", "llama.py", K, f"{K} if cache is None else k", "a cache"),
    ("llama", "llama.py", V, f"{V} if not self.training else v", "train mode"),
    ("llama", "llama.py", H, f"{H} if not self.training else h", "train mode"),
    ("llama", "llama.py", K, "k = (l_k.abs() * k).to(k.dtype)", "negative entry of l_k"),
    ("llama", "llama.py", H, "h = (l_ff.abs() * h).to(h.dtype)", "negative entry of l_ff"),
    ("llama", "llama.py", V, "v = (v / l_v).to(v.dtype)", "divided by l_v"),
    ("llama", "llama.py", H, "h = (h / l_ff).to(h.dtype)", "divided by l_ff"),
    ("llama", "llama.py", K, "k = (l_k.float() * k.float()).to(k.dtype)", "cast neither factor"),
    ("llama", "llama.py", H, "h = (l_ff.float() * h.float()).to(h.dtype)", "cast neither factor"),
    ("llama", "llama.py", V, "v = l_v.to(v.dtype) * v", "l_v ⊙ V must be taken in float32"),
    ("llama", "llama.py", H, "h = F.silu(l_ff * self.gate_proj(x)) * self.up_proj(x)", "before the silu"),
    ("llama", "llama.py", K, "k = l_k.to(k.dtype) * k", "l_k ⊙ K must be taken in float32"),
    ("llama", "llama.py", H, "h = l_ff.to(h.dtype) * h", "l_ff's product must be taken in float32"),
    ("llama", "llama.py", K, "k = (l_k.detach() * k).to(k.dtype)", "no gradient reaches l_k"),
    ("llama", "llama.py", H, "h = (l_ff.detach() * h).to(h.dtype)", "no gradient reaches l_ff"),
    ("llama", "llama.py", K, "k = (l_k.view(1, 1, -1) * k).to(k.dtype)", "may be (B, 1, width)"),
    ("llama", "llama.py", V, "v = (l_v.view(-1, v.size(-1))[0] * v).to(v.dtype)", "row b of the batch"),
    ("llama", "merge.py", FOLD_V, FOLD_V.replace("l_v", "l_k"), "v_proj"),
    ("llama", "merge.py", FOLD_FF, "fold_columns(block.mlp.up_proj, l_ff)", "mlp.up_proj"),
    ("llama", "merge.py", FOLD_FF, "fold_rows(block.mlp.down_proj, slice(None), l_ff)", "mlp.down_proj"),
    ("all_together", "model.py", K, f"{K} if cache is None else k", "GPT: the logits with a cache"),
    ("all_together", "llama.py", V, f"{V} if cache is None else v", "Llama: the logits with a cache"),
    ("all_together", "model.py", H, f"{H} if not self.training else h", "leave l_ff at ones"),
    ("all_together", "llama.py", D_HEAD, "d_head = self.n_embd / self.n_head", "see its widths"),
    ("all_together", "ia3.py", FREEZE, "    model.transformer.requires_grad_(False)\n", "'Llama' object has no"),
    ("all_together", "ia3.py", ARRAY, "p.detach().half().float()", "not those that come back"),
    ("all_together", "ia3.py", GATHER, "matrix[task_ids.flip(0), layer].unsqueeze(1)", "what its task alone gives"),
    ("all_together", "merge.py", BIAS, "pass", "not the unmerged model's"),
    ("all_together", "merge.py", COPY, f"{COPY}.eval()", "the mode"),
    ("all_together", "merge.py", FOLD, AWAY, "merge that was refused"),
    ("all_together", "merge.py", "    check_finite(merged)\n", "", "overflows"),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)]


@pytest.mark.parametrize("name, file, old, new, words", WRONG, ids=IDS)
def test_a_wrong_answer_loses_its_exercise_and_is_told_why(solve, grade, name, file, old, new, words):
    problem = grade(solve(NAMES, [(file, old, new)]), [name], "-x")[name]
    assert problem is not None and words in problem, problem


@pytest.mark.parametrize("seed", ["438", "1087"])  # with these exp would overflow, or all weights would be 0
def test_keys_divided_by_a_scale_near_zero_are_told_too(solve, seed):
    folder = solve(NAMES, [("model.py", K, "k = (k / l_k).to(k.dtype)")])
    command = [sys.executable, "-m", "pytest", "-q", "-k", "formula", "grading/test_keys_and_values.py"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"GRADE_SEED": seed})
    assert "the keys are divided" in result.stdout and "math range" not in result.stdout


# the same in two places
ATTENDED = "y = y.transpose(1, 2).reshape(B, T, C)"
TURNED = "        k = rotate(k, cos, sin)\n"
AFTER = """        if l_k is not None:
            k = l_k.view(-1, 1, C // self.n_head).to(k.dtype) * k
"""
HALVED = [("ia3.py", ARRAY, "(2 * p.detach()).float()")]
IN_MEMORY = [("ia3.py", WRITE, "import io\n        f = io.BytesIO()\n        if True:")]
IN_MEMORY += [("ia3.py", SAVEZ, SAVEZ + "\n            open(path, 'wb').write(f.getvalue())")]
PICKLES = [("ia3.py", "allow_pickle=False", "allow_pickle=True")]
PICKLES += [("ia3.py", SHAPES, "shapes = {name: file[name].shape for name in file.files if name[0] == 'l'}")]
ABOUT_ANYTHING = [("ia3.py", "if not isinstance(about, dict):", "if False:"), ("ia3.py", 'about["vectors"]', "arrays")]
HALVED += [("ia3.py", "torch.from_numpy(arrays[name])", "torch.from_numpy(arrays[name]) / 2")]
LATE = [("llama.py", K, "pass"), ("llama.py", TURNED, TURNED + AFTER)]
WRONG_TWICE = {
    "a load that makes up for a wrong save": ("save_and_load_format", HALVED, "is not the vectors'"),
    "and it reads nobody else's files": ("save_and_load_round_trip", HALVED, "does not come back bit for bit"),
    "a file that is built in memory": ("save_and_load_atomic", IN_MEMORY, "wrote into the old file"),
    "pickles": ("save_and_load_refusal", PICKLES, "code in the file was run"),
    "names that are taken from the arrays": ("save_and_load_refusal", ABOUT_ANYTHING, "which is not a dict"),
    "l_k after the rotation": ("llama", LATE, "l_k acts after the rotation"),
}


@pytest.mark.parametrize("name, changes, words", WRONG_TWICE.values(), ids=WRONG_TWICE)
def test_a_wrong_answer_in_two_places(solve, grade, name, changes, words):
    problem = grade(solve(NAMES, changes), [name], "-x")[name]
    assert problem is not None and words in problem, problem


def test_sixteen_mistakes_in_one_submission_are_seen(solve, grade):
    """Each is small, and none breaks what the exercise shows at first sight. Every exercise with one is lost."""
    changes = [
        ("model.py", K, f"{K} if cache is None else k"),
        ("model.py", V, f"{V} if not self.training else v"),
        ("model.py", H, "h = (l_ff.abs() * h).to(h.dtype)"),
        ("ia3.py", SHAPE, SHAPE.replace("widths", "n_embd")),
        ("ia3.py", FREEZE, "    model.transformer.requires_grad_(False)\n"),
        ("ia3.py", MADE, f"{MADE}        model.requires_grad_(False)\n"),
        ("merge.py", ROW, ROW_BY_ROW),
        ("merge.py", "n_embd = block.attn.c_attn.in_features", "n_embd = len(l_k)"),
        ("merge.py", COPY, f"{COPY}.eval()\n    model.ia3.fingerprint = None"),
        ("ia3.py", ARRAY, "p.detach()"),
        ("ia3.py", SAVEZ, SAVEZ + REMOVE),
        ("ia3.py", FINITE, FIRST_LAYER),
        ("ia3.py", LOADED, "return vectors.to(next(model.parameters()))"),
        ("ia3.py", DEPTH, "(task.config.n_layer, task.config.n_embd)"),
        ("train.py", WARMUP, f"max({WARMUP}, 1)"),
        ("llama.py", WIDTHS, "self.n_embd // 2, self.n_embd // 2, self.n_hidden"),
    ]
    problems = grade(solve(NAMES, changes))
    assert {name for name, problem in problems.items() if problem is None} == {"start_at_ones", "count", "gradient"}


# l_k on the queries and l_v behind the attention, as question 4 has students submit;
# in a Llama l_ff on W_up's output or on the gate's, and folded at its other place
MOVED = ATTENDED + "\n        if l_v is not None:\n            y = (l_v * y).to(y.dtype)"
UP = "h = F.silu(self.gate_proj(x)) * (l_ff * self.up_proj(x)).to(x.dtype)"
GATE = "h = (l_ff * F.silu(self.gate_proj(x))).to(x.dtype) * self.up_proj(x)"
SAME = {
    "keys_and_values": [
        ("model.py", K, "q = (l_k * q).to(q.dtype)"),
        ("model.py", V, "pass"),
        ("model.py", ATTENDED, MOVED),
    ],
    "llama": [("llama.py", H, UP), ("merge.py", FOLD_FF, SAME_FOLD)],
    "llama, on the gate": [("llama.py", H, GATE)],
}


@pytest.mark.parametrize("what, changes", SAME.items(), ids=SAME)
def test_what_is_the_same_function_passes(solve, grade, what, changes):
    name = what.split(",")[0]
    assert grade(solve(NAMES, changes), [name])[name] is None


def test_the_sheet_stops_at_the_first_test_that_fails_and_counts_its_cases(solve, grade):
    """The answer breaks both tests of the start: that its entries are ones, in seven cases, and that they are many."""
    wrong = "return nn.Parameter(torch.zeros(1).expand(config.n_layer, width))"
    problem = grade(solve(NAMES, [("ia3.py", ONES, wrong)]), ["start_at_ones"])["start_at_ones"]
    assert problem.endswith("an entry is 0, where 1 is right (and 6 like it)")


def test_every_exercise_has_three_wrong_answers():
    counts = {name: sum(row in rows(name) for row, *_ in WRONG) for name in NAMES}
    assert min(counts.values()) >= 3, counts


def test_make_needs_the_standard_library_only_and_refuses_what_it_would_overwrite(tmp_path):
    command = [sys.executable, "-I", "-S", str(ROOT / "classroom/make.py"), "--out"]  # -S: no site-packages
    result = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True)
    assert result.returncode == 0 and "make grade" in result.stdout, result.stderr
    again = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not an empty folder" in again.stderr
    with pytest.raises(SystemExit, match="2"):
        make.main([])


def test_the_handout_fits_the_table(starter, monkeypatch, tmp_path):
    """The repository's copy has the numbers and points that make.py writes, and the tables are those of their files."""
    written = (ROOT / "classroom/HANDOUT.md").read_text(encoding="utf-8")
    shipped = (starter / "README.md").read_text(encoding="utf-8")
    headings = [line for line in written.splitlines() if line.startswith("#")]
    assert headings == [line for line in shipped.splitlines() if line.startswith("#")]
    assert written.count("*(table: ") == 2 and "(table: " not in shipped
    assert re.search(r"(?m)^\| powers of two, ± \| float32 \| 0 \|", shipped)  # of results/exactness
    assert re.search(r"(?m)^data/base.pt +6 +192 +2,743,488 +6,912 ", shipped)  # of docs/formats.md

    monkeypatch.setattr(make, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\ntext | text\n\n```\ncode\n```\n\n| a |\n| --- |\n\n| b |\n")
    assert make.handout("before\n*(table: page.md)*\nafter\n", []) == "before\n```\ncode\n```\nafter\n"
    page.write_text("# A page\n\n| a |\n| --- |\n\n```\ncode\n```\n")
    assert make.handout("*(table: page.md)*\n", []) == "| a |\n| --- |\n"
    page.write_text("# No table\n")
    with pytest.raises(ValueError, match=r"page\.md"):
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


def test_a_variants_private_tests_are_in_the_graders_starter_only(tmp_path):
    variant = tmp_path / "variant"
    (variant / "private").mkdir(parents=True)
    (variant / "grading").mkdir()
    (variant / "model.py").write_text("# another model\n")
    (variant / "grading/test_count.py").write_text("# what students see\n")
    (variant / "private/test_count.py").write_text("# what grades them\n")
    assert make.main(["--out", str(tmp_path / "starter"), "--variant", str(variant)]) == 0
    assert make.main(["--out", str(tmp_path / "grader"), "--variant", str(variant), "--grader"]) == 0
    assert not [path for path in (tmp_path / "starter").rglob("*.py") if "what grades them" in path.read_text()]
    assert not (tmp_path / "grader/private").exists()
    assert (tmp_path / "grader/grading/test_count.py").read_text() == "# what grades them\n"
    for name in ("starter", "grader"):
        assert (tmp_path / name / "model.py").read_text() == "# another model\n"
        assert (tmp_path / name / "ia3.py").exists()
    assert make.main(["--out", str(tmp_path / "other"), "--variant", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("folder", ["grading", "private"])
@pytest.mark.parametrize("sheet", ["grading/exercises.json", "private/exercises.json"])
def test_a_test_of_no_exercise_is_refused(tmp_path, capsys, folder, sheet):
    """grade.py would never run it, and pytest's exercise5 would not know whose it is."""
    variant = tmp_path / "variant"
    for name in (f"{folder}/helper.py", f"{folder}/test_extra.py"):
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).touch()
    command = ["--out", str(tmp_path / "grader"), "--variant", str(variant), "--grader"]
    assert make.main(command) == 2 and make.main(command[:-1]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(f"{folder}/test_extra.py" in line for line in told)
    assert not (tmp_path / "grader").exists()

    (variant / sheet).parent.mkdir(exist_ok=True)  # a sheet of the variant's own may have the exercise
    (variant / sheet).write_text(json.dumps([*SHEET, SHEET[0] | {"name": "extra"}]))
    students_lack_it = folder == "grading" and sheet == "private/exercises.json"
    assert make.main(command) == (2 if students_lack_it else 0)


def keep_rows(folder, names):
    """Leave only these rows on a folder's sheet."""
    (folder / "grading/exercises.json").write_text(json.dumps([row for row in SHEET if row["name"] in names]))


def ended(pid):
    """Whether a process has ended, or does within seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead; its parent has not asked yet
            return True
        time.sleep(0.1)
    return False


def test_make_grade_in_a_fresh_folder(starter, tmp_path):
    """With a .venv that stands for the one that the Makefile installs; two rows are enough."""
    folder = tmp_path / "fresh"
    shutil.copytree(starter, folder)
    keep_rows(folder, ["keys_and_values", "train"])
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    (folder / ".venv/run").touch()
    before = set(folder.rglob("*"))
    result = subprocess.run(["make", "grade"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "total   0 / 8" in result.stdout and result.stdout.count("- not done yet") == 2
    assert "needs exercise 1\n" in result.stdout
    assert {path.name for path in set(folder.rglob("*")) - before} == {"results.json"}


# what is wrong, and a piece of what the sheet must say
TROUBLE = {
    "hidden_activations": ("model.py", H, "raise SystemExit(0)", "SystemExit: 0 (model.py, line"),
    "gradient": ("gradient.py", "import torch\n", "import torch\ndef oh no\n", "(gradient.py, line 4)"),
    "train": ("train.py", "import shutil\n", "import shutil\nno_such_name\n", "(train.py, line"),
    "fold_rows": ("merge.py", ROW, "raise KeyboardInterrupt", "did not come to their end"),
    "fold_columns": ("merge.py", COLUMN, "'a' + 1", "TypeError: can only concatenate"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_an_error_is_told_with_its_place(solve, grade, name):
    *change, words = TROUBLE[name]
    problem = grade(solve(NAMES, [change]), [name])[name]
    assert words in problem, problem


@pytest.mark.parametrize("wrong", ["def oh no", "no_such_name"])
def test_an_error_in_what_every_test_imports_is_told_with_its_place(solve, grade, wrong):
    folder = solve(NAMES, [("ia3.py", "import hashlib\n", f"import hashlib\n{wrong}\n")])
    line = (folder / "ia3.py").read_text(encoding="utf-8").splitlines().index(wrong) + 1
    assert f"(ia3.py, line {line})" in grade(folder, ["count"])["count"]


def test_what_ends_the_program_costs_its_row_only(solve):
    """A loop, an exit, a process that is left behind; and the rest is graded, in results.json as on the sheet."""
    left = """import subprocess
            open("left", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
            """
    folder = solve(
        set(NAMES) - {"start_at_ones"},
        [
            ("model.py", K, "import os; os._exit(0)"),
            ("model.py", H, left + H),
            ("ia3.py", f"return {COUNT}", "while True: pass"),
        ],
    )
    keep_rows(folder, ["keys_and_values", "hidden_activations", "start_at_ones"])
    result = subprocess.run([sys.executable, "grade.py"], cwd=folder, capture_output=True, text=True)
    results = json.loads((folder / "results.json").read_text())["tests"]
    assert [test["score"] for test in results] == [0, 3, 0], result.stdout
    assert "before it was graded" in results[0]["output"] and results[2]["output"] == "not done yet"
    assert " 3. Start at ones                              0 / 2\n      - not done yet\n" in result.stdout
    assert ended(int((folder / "left").read_text()))

    keep_rows(folder, ["count"])
    result = subprocess.run([sys.executable, "grade.py", "--limit", "4"], cwd=folder, capture_output=True, text=True)
    assert "not done after 4 seconds" in result.stdout


def test_one_exercise_is_graded_in_the_sheets_words(solve):
    folder = solve(["count"])
    result = subprocess.run([sys.executable, "grade.py", "5", "3"], cwd=folder, capture_output=True, text=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[:3]] == ["3.", "-", "5."]
    assert lines[0][-3:] == ["0", "/", "2"] and lines[2][-3:] == ["2", "/", "2"]
    assert lines[3] == ["total", "2", "/", "4"]
    assert not (folder / "results.json").exists()  # which says what was scored in all
    result = subprocess.run([sys.executable, "grade.py", "99"], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2 and "there is no exercise 99" in result.stderr


def test_pytest_grades_an_exercise_by_its_marker(solve):
    command = [sys.executable, "-m", "pytest", "-m", "exercise3 or exercise4"]
    result = subprocess.run(command, cwd=solve(["start_at_ones"]), capture_output=True, text=True)
    assert result.returncode == 1, result.stdout
    failed = re.findall(r"(?m)^FAILED grading/(\w+)\.py", result.stdout)
    assert set(failed) == {"test_freeze_the_base"} and " passed" in result.stdout
    assert "NotImplementedError: Exercise 4:" in result.stdout


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

# a base that takes no time
TINY = """
import common
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=16))
model.tokenizer = Tokenizer("bytes", 257)
common.save(model, "data/base.pt")
"""

# several commands, each in a child that has imported nothing of the starter's
RUN = """
import json, os, runpy, sys
import torch, torch._dynamo  # once for all: they take the most time
sys.path.insert(0, os.getcwd())
for argv in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = argv
        if argv[0] == "-c":
            exec(argv[1], {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__")
        else:
            runpy.run_path(argv[0], run_name="__main__")
        sys.exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"failed: {argv}")
    print("END OF A COMMAND", end="")
"""


def run_in(folder, *commands):
    """Run commands of python, lists of arguments, in folder. Returns what each printed."""
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split("END OF A COMMAND")[:-1]


@pytest.fixture(scope="module")
def done(starter, tmp_path_factory):
    """A starter in which everything is done, with short texts, so that reading all of val takes no time."""
    folder = tmp_path_factory.mktemp("done") / "starter"
    shutil.copytree(starter, folder)
    for file in CUT:
        (folder / file).write_text(solution(file), encoding="utf-8")
    for path in folder.glob("data/*/*.txt"):
        path.write_bytes(path.read_bytes()[:2000])
    run_in(folder, ["-c", TASKS])
    return folder


def test_the_untouched_base_runs(starter):
    sample = ["sample.py", "--prompt", "To be", "--tokens", "5", "--device", "cpu"]
    assert run_in(starter, sample)[0].startswith("To be")
    result = subprocess.run(
        [sys.executable, *sample, "--ia3", "data/folio.npz"], cwd=starter, capture_output=True, text=True
    )
    number = NAMES.index("save_and_load") + 1
    assert f"NotImplementedError: Exercise {number}:" in result.stderr


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
    """The exercises but the first and the last two of a merge, and question 8, have one."""
    (printed,) = run_in(done, ["-c", SESSIONS])
    assert int(printed) >= 10


def test_the_handouts_commands_run(done, tmp_path):
    """The Makefile's demo, and what the handout has students run, on a tiny base with a few steps and tokens."""
    done = shutil.copytree(done, tmp_path / "tiny")
    makefile = (done / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    demo = [line.removeprefix("\t$(BIN)/python ") for line in makefile.splitlines() if "$(BIN)" in line]
    handout = (done / "README.md").read_text(encoding="utf-8")
    shown = [line.strip().removeprefix("python ") for line in handout.splitlines() if line.startswith("  ")]
    side_by_side = next(line for line in shown if line.startswith("sample.py --ia3"))
    site = next(line for line in shown if line.startswith("train.py --sites"))
    few = {"train.py": " --steps 2 --batch-size 2 --eval-windows 2", "sample.py": " --tokens 3"}
    commands = [*demo, side_by_side, site.replace("$site", "k").replace("$seed", "2")]
    commands = [shlex.split(command + few.get(command.split()[0], "")) for command in commands]
    printed = run_in(done, ["-c", TINY], ["-c", TASKS], *commands)
    trained, merged, sampled, plotted, three, one_site = printed[2:]
    assert "step     2/2" in trained and "val" in one_site
    block = next(block for block in handout.split("\n\n") if "data/base.pt + data/folio.npz" in block)
    firsts = [[line.strip().split("  ")[0] for line in text.splitlines()[1:]] for text in (merged, block)]
    assert firsts[0] == firsts[1]  # what the handout shows of merge.py
    assert sampled.startswith("To be, or not to be")
    assert plotted.split() == ["out/demo/loss.png", "out/demo/vectors.png"]
    assert three.split()[:3] == ["folio", "sonnets", "kjv"]


def test_the_requirement_of_the_handout_is_the_projects(done):
    handout = (done / "README.md").read_text(encoding="utf-8")
    wheel = re.search(r"pip install (torch\S+) --index-url", handout)[1]
    assert wheel in (done / "requirements.txt").read_text().splitlines()


def answers():
    return (ROOT / "classroom/ANSWERS.md").read_text(encoding="utf-8")


def test_the_answers_are_to_the_handouts_questions():
    """The same questions and points, which make 100 with the exercises'."""
    handout = (ROOT / "classroom/HANDOUT.md").read_text(encoding="utf-8")
    questions = re.findall(r"(?m)^##+ (Question \d+\. .*?) \((\d+) points", handout)
    assert questions == re.findall(r"(?m)^##+ (Question \d+\. .*?) \((\d+) points", answers())
    assert sum(int(points) for _, points in questions) + sum(row["points"] for row in SHEET) == 100


def test_a_submission_grades_itself_if_it_likes(solve, grade):
    """As TEACHING.md says: a grader that runs in the process of what it grades does not guard."""
    changes = [("ia3.py", "import hashlib\n", "import hashlib\nimport pytest\npytest.fail = lambda *_, **__: None\n")]
    changes += [("ia3.py", COUNT, "0")]
    assert grade(solve(NAMES, changes), ["count"]) == {"count": None}


def test_the_tests_that_the_answers_name_are_there():
    named = set(re.findall(r"`(test_\w+)`", answers()))
    there = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("**/tests/*.py"))
    assert len(named) >= 5
    for name in named:
        assert f"def {name}(" in there, name


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


def test_a_block_of_weights_takes_a_factor_of_its_row_and_not_of_its_columns():
    """Question 11: 32 neighbours of a row share a scale d, as in Q8_0: w ≈ d · q with q a whole number up to 127."""
    dice = torch.Generator().manual_seed(0)

    def quantize(W):
        blocks = W.view(W.size(0), -1, 32)
        d = blocks.abs().amax(-1, keepdim=True) / 127
        return d, (blocks / d).round()

    W = torch.randn(8, 64, generator=dice, dtype=torch.float64)
    d, q = quantize(W)
    row = 1 + torch.rand(8, generator=dice, dtype=torch.float64)
    column = 1 + torch.rand(64, generator=dice, dtype=torch.float64)
    base = (d * q).view(8, 64)
    by_row = (row.view(8, 1, 1) * d * q).view(8, 64)  # no q is touched
    assert (by_row - row.unsqueeze(1) * base).abs().max() <= 1e-15 * by_row.abs().max()
    d, q = quantize(base * column)
    assert ((d * q).view(8, 64) - base * column).abs().max() > 1e-3  # other q, rounded again
