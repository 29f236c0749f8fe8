"""How well a model predicts every held-out work, in nats a byte: a table in Markdown.

    python -m experiments.held_out                                        # the base
    python -m experiments.held_out --ia3 out/demo/ia3.npz                 # with vectors
    python -m experiments.held_out --base out/demo/merged.pt              # merged

Each work is read whole, in windows that do not overlap.
"""

import argparse
import sys

import common
from experiments import lab
from ia3 import IA3
from train import TrainConfig, evaluate

DATA = ("plays", "folio", "sonnets", "kjv")


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    parser.add_argument("--ia3", help="vectors for it")
    args = parser.parse_args(argv)
    model = common.load(args.base)
    if args.ia3 is not None:
        model.ia3 = IA3.load(args.ia3, model)
    model.to(common.pick_device()[0])
    rows = []
    for data in DATA:
        for split in ("val", "test"):
            for title, stream in lab.read_works(data, split, model).items():
                loss = evaluate(model, stream, TrainConfig(batch_size=32)) * lab.tokens_a_byte(stream)
                rows.append([title, f"{data}/{split}", f"{stream.n_bytes:,}", f"{loss:.3f}"])
    print(lab.markdown(["work", "in", "bytes", "nats a byte"], rows))
    return 0


def main(argv=None):
    return common.exit_status("held_out.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
