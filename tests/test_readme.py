"""The README says what is there."""

import re
from pathlib import Path

import pytest

from experiments import ablate, bench, claims, compare
from experiments.runs import read_csv

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


@pytest.mark.parametrize("name, most", [("model.py", 300), ("ia3.py", 160), ("merge.py", 160), ("train.py", 360)])
def test_the_four_files_stay_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize(
    "folder, text",
    [
        ("compare", compare.tables),
        ("compare", lambda folder: claims.claims(folder, ROOT / "data/base.pt")),
        ("bench", bench.tables),
        ("ablation", lambda folder: "\n\n".join(ablate.tables(folder).split("\n\n")[:4])),  # by vectors, by layers
    ],
)
def test_the_tables_are_those_of_the_committed_results(folder, text):
    """Every paragraph and table that the experiment makes of its CSVs stands in the README, letter by letter."""
    pieces = text(ROOT / "experiments/results" / folder).split("\n\n")
    assert sum("| --- |" in piece for piece in pieces) >= 1
    for piece in pieces:
        assert piece in README, piece


@pytest.mark.parametrize(
    "name, tables",
    [("ablation", ablate.tables), ("ablation-rates", ablate.tables), ("bench-epyc", bench.tables)],
)
def test_the_tables_beside_the_readme_are_those_of_their_results(name, tables):
    folder = ROOT / "experiments/results" / name
    assert (folder / "table.md").read_text(encoding="utf-8") == tables(folder) + "\n"


def test_two_processors_agree_as_far_as_the_readme_says():
    """All that is counted is the same, and the time of our step over a rival's differs by up to 0.1."""
    here, there = (read_csv(ROOT / "experiments/results" / name / "results.csv") for name in ("bench", "bench-epyc"))
    apart = 0
    for a, b in zip(here, there, strict=True):
        for key in ("shape", "contestant", "trained", "linear_flops", "attention_flops", "saved_bytes"):
            assert a[key] == b[key]
        apart = max(apart, abs(a["ours_over"] - b["ours_over"]))
    assert 0.05 < apart <= 0.1
