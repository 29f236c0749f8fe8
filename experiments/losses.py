"""How well a model predicts every held-out work, in nats a byte: a table in Markdown.

    python experiments/losses.py                                        # the base
    python experiments/losses.py --ia3 out/demo/ia3.npz                 # with vectors
    python experiments/losses.py --base out/demo/merged.pt              # merged

Each work is read whole, in windows that do not overlap.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Stream
from ia3 import IA3
from model import GPT, pick_device
from train import TrainConfig, evaluate

# the works of each split, in order, and the line with which each begins; the first begins at the top
WORKS = {
    ("plays", "val"): {"Macbeth": None, "Twelfth Night": "TWELFTH NIGHT; OR, WHAT YOU WILL"},
    ("plays", "test"): {"Julius Caesar": None, "The Merchant of Venice": "THE MERCHANT OF VENICE"},
    ("folio", "val"): {"Macbeth, 1623": None, "Twelfth Night, 1623": "Twelfe Night, Or what you will"},
    ("folio", "test"): {
        "Julius Caesar, 1623": None,
        "The Merchant of Venice, 1623": "The Merchant of Venice",
        "As You Like It, 1623": "As you Like it",
        "Richard II, 1623": "The life and death of King Richard the Second",
        "The Two Gentlemen of Verona, 1623": "The Two Gentlemen of Verona",
    },
    ("sonnets", "val"): {"Sonnets 97-126": None},
    ("sonnets", "test"): {"Sonnets 127-154, A Lover's Complaint": None},
    ("kjv", "val"): {"Isaiah": None},
    ("kjv", "test"): {"Luke, John": None},
}


def works(name, split):
    """Return [(title, bytes)] of the works in data/NAME/SPLIT.txt."""
    raw = (ROOT / "data" / name / f"{split}.txt").read_bytes()
    starts = []
    for line in WORKS[name, split].values():
        starts.append(0 if line is None else raw.index(b"\n" + line.encode() + b"\n") + 1)
    ends = [*starts[1:], len(raw)]
    return [(title, raw[a:b]) for title, a, b in zip(WORKS[name, split], starts, ends, strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=ROOT / "data/base.pt", help="a byte-level checkpoint (default: data/base.pt)")
    parser.add_argument("--ia3", help="vectors for it")
    args = parser.parse_args(argv)
    try:
        model = GPT.from_pretrained(args.base)
        model.ia3 = IA3.load(args.ia3, model) if args.ia3 else None
        if model.tokenizer != "bytes":
            raise ValueError(f"{args.base} does not read bytes")
    except (ValueError, OSError) as e:
        print(f"losses.py: {e}", file=sys.stderr)
        return 2
    model.to(pick_device()[0])
    config = TrainConfig(batch_size=32)
    print("| work | in | bytes | nats a byte |\n| --- | --- | --- | --- |")
    for name, split in WORKS:
        for title, raw in works(name, split):
            loss = evaluate(model, Stream(np.frombuffer(raw, np.uint8), model.config.block_size), config)
            print(f"| {title} | {name}/{split} | {len(raw):,} | {loss:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
