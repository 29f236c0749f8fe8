"""The pages: their links lead somewhere, their Python runs and prints what they say, their tables are a command's."""

import importlib.util
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = ("README.md", "docs/*.md", "data/README.md", "experiments/README.md", "classroom/*.md")
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def links(page):
    """[(text, target)] of a page's links, pictures included, code blocks left out."""
    prose = BLOCK.sub("", read(page))
    return re.findall(r"\[([^\[\]]*)\]\(([^()\s]+)\)", prose)


def anchors(path):
    """The anchors that GitHub gives a page's headings: lower case, punctuation left out, a hyphen for a space."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page):
    """[(language, text)] of a page's fenced code, in its order."""
    return BLOCK.findall(read(page))


def test_the_pages_are_found():
    assert {"README.md", "docs/paper.md", "docs/tasks.md", "data/README.md", "classroom/HANDOUT.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for _, target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target
        elif anchor:
            assert re.fullmatch(r"L\d+", anchor), target


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_line_quotes_code_that_stands_there(page):
    for text, target in links(page):
        file, _, line = target.partition("#L")
        if line and text.startswith("`"):
            there = ((ROOT / page).parent / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
            assert text.strip("`") in there, f"{target} is {there.strip()!r}, not {text}"


def test_the_paper_is_linked_to_the_code_line_by_line():
    assert len([target for _, target in links("docs/paper.md") if "#L" in target]) >= 8


def test_an_excerpt_is_what_stands_in_the_file_that_its_first_line_names():
    """Line after line; only the indentation of the whole may differ."""
    excerpts = [code.splitlines() for language, code in blocks("docs/llama.md") if language == "py"]
    assert len(excerpts) >= 4
    for first, *lines in excerpts:
        name = first.removeprefix("# ")
        indented = textwrap.indent("\n".join(lines), "    ")
        deeper = textwrap.indent(indented, "    ")
        assert any(f"\n{text}\n" in read(name) for text in (indented, deeper)), f"not in {name}: {lines}"


@pytest.mark.parametrize("page", ["docs/tasks.md", "docs/paper.md", "docs/peft.md", "docs/llama.md"])
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    """A page is one session. A block of text after one of Python is what that prints; without one it may print."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)  # what it writes goes there
    found = blocks(page)
    session = {}
    n_run = 0
    for i, (language, code) in enumerate(found):
        if language != "python":
            continue
        if "import adapters" in code and importlib.util.find_spec("adapters") is None:
            continue  # AdapterHub's wants an environment of its own
        exec(compile(code, f"{page}, block {i}", "exec"), session)
        n_run += 1
        printed = capsys.readouterr().out
        if i + 1 < len(found) and found[i + 1][0] == "text":
            assert printed == found[i + 1][1]
    assert n_run >= 1


def test_the_count_on_the_page_is_what_the_command_prints(monkeypatch, capsys):
    from tools import convert

    monkeypatch.chdir(ROOT)
    assert convert.main(["count"]) == 0
    language, shown = blocks("docs/formats.md")[0]  # the first block of the page: the classroom takes it from there
    assert language == "text"
    assert shown == "$ python -m tools.convert count\n" + capsys.readouterr().out
