"""The README says what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_to_a_line_names_code_that_stands_there():
    links = re.findall(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)", README)
    assert len(links) >= 8
    for code, file, number in links:
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert code in line, f"{file}:{number} is {line.strip()!r}, not {code!r}"


def test_the_dozen_lines_are_the_files_own():
    shown = README.split("## The method is a dozen lines")[1].split("A task is a value")[0]
    code = [line.strip() for block in re.findall(r"```python\n(.*?)```", shown, re.S) for line in block.splitlines()]
    assert len(code) == 12
    files = [line.strip() for name in ("model.py", "merge.py") for line in (ROOT / name).read_text().splitlines()]
    for line in code:
        assert any(there.startswith(line) for there in files), line


@pytest.mark.parametrize("name", ["README.md", "data/README.md"])
def test_every_file_that_is_named_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = {target.split("#")[0] for target in re.findall(r"\]\((?!http)([^)]+)\)", text)}
    run = set(re.findall(r"python3? ([\w/]+\.py)", text))
    assert run if name == "README.md" else linked | run
    for path in linked:
        assert ((ROOT / name).parent / path).exists(), path
    for path in run:
        assert (ROOT / path).exists(), path
