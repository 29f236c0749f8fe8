"""How well a model predicts every held-out work, in nats a byte: a table in Markdown.

    python -m experiments.held_out                                        # the base
    python -m experiments.held_out --ia3 out/demo/ia3.npz                 # with vectors
    python -m experiments.held_out --base out/demo/merged.pt              # merged

Each work is read whole, in windows that do not overlap.
"""

import argparse
import sys

import numpy as np

import common
from data import Stream
from experiments import lab
from ia3 import IA3
from train import TrainConfig, evaluate

SPLITS = {  # data: split: its name, where it is one work
    "plays": {"val": None, "test": None},
    "folio": {"val": None, "test": None},
    "sonnets": {"val": "Sonnets 97-126", "test": "Sonnets 127-154, A Lover's Complaint"},
    "kjv": {"val": "Isaiah", "test": "Luke, John"},
}
TITLES = {  # the line with which a play begins, and its name
    "MACBETH": "Macbeth",
    "TWELFTH NIGHT; OR, WHAT YOU WILL": "Twelfth Night",
    "JULIUS CAESAR": "Julius Caesar",
    "THE MERCHANT OF VENICE": "The Merchant of Venice",
    "The Tragedie of Macbeth": "Macbeth, 1623",
    "Twelfe Night, Or what you will": "Twelfth Night, 1623",
    "The Tragedie of Julius Caesar": "Julius Caesar, 1623",
    "The Merchant of Venice": "The Merchant of Venice, 1623",
    "As you Like it": "As You Like It, 1623",
    "The life and death of King Richard the Second": "Richard II, 1623",
    "The Two Gentlemen of Verona": "The Two Gentlemen of Verona, 1623",
}


def works(raw, name):
    """Return [(name, bytes)] of the works in raw: one called name, or a play from each line that is a title."""
    if name is not None:
        return [(name, raw)]
    starts = {}
    place = 0
    for line in raw.splitlines(keepends=True):
        title = TITLES.get(line.strip().decode())
        if title is not None and title not in starts:
            starts[title] = place
        place += len(line)
    if 0 not in starts.values():
        raise ValueError("the text does not begin with the title of a play")
    ends = [*list(starts.values())[1:], len(raw)]
    return [(title, raw[start:end]) for (title, start), end in zip(starts.items(), ends, strict=True)]


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint that reads bytes (default: data/base.pt)")
    parser.add_argument("--ia3", help="vectors for it")
    args = parser.parse_args(argv)
    model = common.load(args.base)
    if model.tokenizer is None or model.tokenizer.about != "bytes":
        raise ValueError(f"{args.base} does not read bytes")
    if args.ia3:
        model.ia3 = IA3.load(args.ia3, model)
    model.to(common.pick_device()[0])
    rows = []
    for data, splits in SPLITS.items():
        for split, name in splits.items():
            raw = (lab.ROOT / "data" / data / f"{split}.txt").read_bytes()
            for title, text in works(raw, name):
                stream = Stream(np.frombuffer(text, np.uint8), model.config.block_size)
                loss = evaluate(model, stream, TrainConfig(batch_size=32))
                rows.append([title, f"{data}/{split}", f"{len(text):,}", f"{loss:.3f}"])
    print(lab.markdown(["work", "in", "bytes", "nats a byte"], rows))
    return 0


def main(argv=None):
    return common.exit_status("held_out.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
