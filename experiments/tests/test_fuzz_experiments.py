"""What the experiments read, broken on purpose (tests/damage.py): choices to rank, and the results of earlier runs."""

import json
import shutil

import pytest

import common
from conftest import make_gpt
from experiments import ablate, analysis, bench, compare, edge, fewshot, generation, lab, quantized, ranking
from tests.damage import DAMAGES, damage_and_read

pytestmark = pytest.mark.slow


def test_a_damaged_file_of_choices_is_read_or_refused_in_one_line(tmp_path, capsys):
    folder = tmp_path / "good"
    (folder / "choices").mkdir(parents=True)
    common.save(make_gpt(n_layer=1, n_embd=8, block_size=8), folder / "base.pt")
    for split in ("train", "val"):
        line = json.dumps({"prompt": "a", "choices": ["b", "cd"], "label": 1})
        (folder / f"choices/{split}.jsonl").write_text(f"{line}\n{line}\n")

    def choose(folder):
        flags = (
            f"--base {folder}/base.pt --data {folder}/choices --out {folder}/new --steps 1 --batch-size 2 --device cpu"
        )
        return ranking.main(flags.split())

    damage_and_read(folder, tmp_path / "work", "choices/train.jsonl", choose, capsys)


# a folder of committed results, and what reads it when its command goes on from there
READERS = {
    "ablation": lambda folder: lab.load_runs(folder, ablate.Job, ablate.Result),
    "analysis/capacity": lambda folder: lab.load_runs(folder, analysis.PairsJob, analysis.Recalled),
    "analysis/size": lambda folder: lab.load_runs(folder, analysis.RateJob, analysis.Learned),
    "bench": bench.read_rows,
    "compare": lambda folder: lab.load_runs(folder, compare.Job, compare.Result),
    "edge": edge.tables,
    "fewshot": fewshot.read_runs,
    "generation": generation.read_rows,
    "quantized": lambda folder: lab.load_runs(folder, quantized.Job, quantized.Result),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("file", ["results.csv", "windows.npz", "about.json"])
def test_damaged_results_are_read_or_refused_in_one_line(tmp_path, capsys, name, file):
    if not (lab.RESULTS / name / file).exists():
        pytest.skip("this experiment writes none")
    shutil.copytree(lab.RESULTS / name, tmp_path / "good", ignore=shutil.ignore_patterns("*.png", "*.md"))

    def read(folder):
        def run(argv):
            lab.read_about(folder) if file == "about.json" else READERS[name](folder)
            return 0

        return common.exit_status(name, run, [])

    damage_and_read(tmp_path / "good", tmp_path / "work", file, read, capsys, DAMAGES // 10)
