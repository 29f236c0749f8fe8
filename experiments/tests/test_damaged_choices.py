"""Choices to rank, broken on purpose (tests/damage.py)."""

import json

import common
from conftest import make_gpt
from experiments import ranking
from tests.damage import damage_and_read


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
