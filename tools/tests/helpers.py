"""What the tests of this room share: a refusal is one line and writes nothing; small changes of files; odd texts."""

import json
import random
from pathlib import Path

import torch


def snapshot(folder="."):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def check_refused(script, capsys, flags, message, folder="."):
    """One line that holds message, status 2, and not a byte of the folder changed."""
    before = snapshot(folder)
    capsys.readouterr()
    assert script.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out, err
    assert message in err, err
    assert snapshot(folder) == before


def read_json(path):
    return json.loads(Path(path).read_text())


def change_json(path, **changes):
    Path(path).write_text(json.dumps(read_json(path) | changes))


def cut(path):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


def is_same(model, expected):
    """Whether two models have the same weights bit for bit, whatever vectors are on them."""
    theirs = expected.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in model.state_dict().items() if not name.startswith("ia3."))


def odd_texts():
    """1000 texts full of digits, odd spaces, contractions, marks, other scripts and control characters."""
    dice = random.Random(0)
    words = "a the King's don't WE'LL ½ ² ٣٤ 1623 7 0 x1y22 12345678 naïve 中文 🙂 é ?! -- … < > _".split()
    words += "'S i'D 'ſ x'ſt K cafe\u0301".split()
    spaces = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\r", "\u00a0", "\u2003", "\u200b", "\x85", ""]
    controls = [chr(i) for i in range(32)] + ["\x7f", "\ufffd", "\U0010ffff"]
    texts = [""]
    for _ in range(1000):
        parts = []
        for _ in range(dice.randint(1, 12)):
            parts += [dice.choice(words), dice.choice(spaces)]
            if dice.random() < 0.1:
                parts.append(dice.choice(controls))
        texts.append("".join(parts))
    return texts
