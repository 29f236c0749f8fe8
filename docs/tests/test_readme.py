"""The README shows the files' own lines and the tables' own figures, and stays a front page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(heading):
    return README.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_dozen_lines_are_the_files_own():
    blocks = re.findall(r"```python\n(.*?)```", section("The method is a dozen lines"), re.S)
    code = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(code) == 12
    files = [line.strip() for name in ("model.py", "merge.py") for line in (ROOT / name).read_text().splitlines()]
    for line in code:
        assert any(there.startswith(line) for there in files), line


def test_the_rows_of_exactness_are_the_tables():
    table = (ROOT / "experiments/results/exactness/table.md").read_text(encoding="utf-8")
    rows = [line for line in section("Is the merge exact?").splitlines() if line.startswith("|")]
    assert len(rows) == 5  # a head, a rule, three rows
    for row in rows:
        assert row in table.splitlines()


def test_the_rows_of_few_shot_are_the_tables():
    table = (ROOT / "experiments/results/fewshot/table.md").read_text(encoding="utf-8")
    better, cheaper = [line for line in section("Measured").splitlines() if "fewshot/table.md" in line]
    shown = re.findall(r"([a-z-]+) ([+-][0-9.]+)", better)
    assert len(shown) == 6  # every task
    for task, value in shown:
        line = next(line for line in table.splitlines() if line.startswith(f"| {task} |"))
        assert f"| {value} (" in line, task
    anew, cached = re.findall(r"([0-9,]+)(?: predictions)? where", cheaper)
    line = next(line for line in table.splitlines() if line.startswith("| 32 |"))
    assert line.endswith(f"| {cached} predictions | {anew} predictions |")


def test_the_session_of_many_tasks_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", section("Many tasks on one base"), re.S)
    session = {}
    exec(block, session)
    assert session["logits"].shape == (3, 50, session["model"].config.vocab_size)


def test_it_is_a_front_page():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert lines.index("## The method is a dozen lines") < 60
