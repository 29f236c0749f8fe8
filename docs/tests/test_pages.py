"""The pages: links lead somewhere, quoted code stands in its file, Python runs, and figures are a command's.

No test looks for a sentence, so every sentence may be reworded.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = (
    "README.md",
    "docs/*.md",
    "data/README.md",
    "experiments/*.md",
    "experiments/results/*.md",
    "classroom/*.md",
)
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
GENERATED = re.compile(r"^<!-- made by: (.*?) -->\n(.*?)^<!-- end -->$", re.M | re.S)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


# --- links ---


def links(page):
    """[(text, target)] of a page's links, pictures included, code blocks left out."""
    prose = FENCED.sub("", read(page))
    return re.findall(r"\[([^\[\]]*)\]\(([^()\s]+)\)", prose)


def anchors(path):
    """The anchors that GitHub gives a page's headings: lower case, punctuation left out, a hyphen for a space."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def symbols(tree):
    """The qualified names of a module's classes and functions: {'MLP', 'MLP.forward', ...}."""
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
            found |= {f"{node.name}.{name}" for name in symbols(node)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for _, target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert path.suffix == ".md", f"{target}: name the function in the link's text, not the line"
            assert anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES)
def test_code_in_a_links_text_stands_in_the_linked_file(page):
    """As it is written, or as the name of a class or function: CausalSelfAttention.forward."""
    for text, target in links(page):
        path = (ROOT / page).parent / target
        if not text.startswith("`") or path.suffix != ".py":
            continue
        source = path.read_text(encoding="utf-8")
        code = text.strip("`")
        assert code in source or code in symbols(ast.parse(source)), f"{target} has no {text}"


# --- code ---


def excerpts():
    """(page, text) of the fenced code whose first line names a file: '# model.py'."""
    found = []
    for page in PAGES:
        found += [(page, text) for language, text in FENCED.findall(read(page)) if language == "py"]
    return found


def code_lines(text):
    """Without indentation and comments."""
    return [line.split("  # ")[0].strip() for line in text.splitlines()]


@pytest.mark.parametrize("page, text", excerpts())
def test_an_excerpt_is_the_files_own_lines(page, text):
    """In the file's order; lines of the file may be left out."""
    name, *shown = code_lines(text)
    there = code_lines(read(name.removeprefix("# ")))
    for line in shown:
        assert line in there, f"{name}: {line!r} is not there, or not after the line before it"
        there = there[there.index(line) + 1 :]


def sessions():
    """The pages whose Python runs. Other rooms' pages show fragments instead."""
    return [page for page in PAGES if page.startswith(("README", "docs", "data")) and "\n```python\n" in read(page)]


@pytest.mark.parametrize("page", sessions())
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch, capsys):
    """A page is one session. A block of text after one of Python is what that prints; without one it may print."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)  # what it writes goes there
    blocks = FENCED.findall(read(page))
    session = {}
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        exec(compile(code, f"{page}, block {i}", "exec"), session)
        printed = capsys.readouterr().out
        if i + 1 < len(blocks) and blocks[i + 1][0] == "text":
            assert printed == blocks[i + 1][1]


# --- commands ---


def commands(page):
    """[(script, flags)] of a page's commands: 'python train.py --steps 4', 'python -m tools.plot out/demo'."""
    prose = re.sub(r"^```python\n.*?^```$", "", read(page), flags=re.M | re.S)
    found = []
    for script, rest in re.findall(r"(?:python|torchrun \S+ \d+) ((?:-m )?[\w./]+)([^`\n]*)", prose):
        if script.startswith("-m "):
            script = script.removeprefix("-m ").replace(".", "/") + ".py"
        flags = re.findall(r"--[a-z0-9-]+", rest.split("  #")[0])
        if script.endswith(".py"):
            found.append((script, flags))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("classroom")])
def test_every_command_names_a_script_and_flags_that_exist(page):
    """The classroom's are of the folder that it hands out. A flag is looked for in the script and beside it."""
    for script, flags in commands(page):
        if script in ("pip.py", "venv.py", "pytest.py"):
            continue
        assert (ROOT / script).exists(), script
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
        for flag in {*flags} - {"--help"}:
            field = flag.removeprefix("--").replace("-", "_") + ": "  # of a dataclass whose fields are flags
            assert f'"{flag}"' in sources or field in sources, (script, flag)


# --- figures ---


def generated():
    """(page, command, text) of every block between 'made by: COMMAND' and 'end'."""
    found = []
    for page in PAGES:
        found += [(page, command, text) for command, text in GENERATED.findall(read(page))]
    return found


def committed_table(command):
    """The table in which a command's results are committed, or None: what it writes by > FILE or --out FOLDER."""
    words = shlex.split(command)
    if ">" in words:
        return words[words.index(">") + 1]
    if "--out" in words:
        return words[words.index("--out") + 1] + "/table.md"
    return None


@pytest.mark.parametrize("page, command, text", generated())
def test_a_generated_block_is_what_its_command_writes(page, command, text):
    """Rows of the table in which the command's results are committed, or else all that the command prints."""
    table = committed_table(command)
    if table is not None:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows and set(rows) <= set(read(table).splitlines())
        return
    python, *words = shlex.split(command)
    assert python == "python"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the pages show a CPU's figures
    made = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    fenced = FENCED.search(text)
    shown = fenced[2] if fenced else text
    assert shown.strip().removeprefix(f"$ {command}\n") == made.stdout.strip()


@pytest.mark.parametrize("page", ["README.md", "experiments/results/claims.md"])
def test_a_number_beside_a_link_to_a_table_stands_there(page):
    """In a list's item or a table's row, a number with a point or a comma is one of the pages that it links."""
    lines = re.sub(r"\n {2,}", " ", read(page)).splitlines()  # an item's later lines are indented
    n_checked = 0
    for line in lines:
        targets = re.findall(r"\]\(([^()\s#]+\.md)", line)
        if not line.startswith(("- ", "| ")) or "table.md" not in line:
            continue
        linked = "".join(((ROOT / page).parent / target).read_text(encoding="utf-8") for target in targets)
        prose = re.sub(r"\]\([^()]*\)", "", line)
        for figure in re.findall(r"(?<![\d.,])(?:\d+\.\d+|\d+,\d{3})(?![\d.])", prose):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", linked), f"{figure}: {line}"
            n_checked += 1
    assert n_checked >= 3
