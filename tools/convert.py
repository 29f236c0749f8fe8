"""Every foreign format: published GPT-2, Hugging Face's folders, PEFT's (IA)³ adapters.

    python train.py --init gpt2                            # published GPT-2: fetched once, then from the cache
    python train.py --init path/to/folder                  # config.json with model.safetensors or pytorch_model.bin
    python merge.py --format hf --out out/folio/hf         # a merged model as such a folder
    python convert.py to-hf --out out/base-hf              # a base as such a folder
    python convert.py to-peft --out out/folio/peft         # vectors as a PEFT adapter
    python convert.py from-peft --adapter out/folio/peft --out out/folio/back.npz
    python convert.py count gpt2 gpt2-xl data/base.pt      # how many values (IA)³ trains, and of how many

Needs neither transformers nor peft, and the safetensors package only where a .safetensors file is read or written.

Two spellings differ, and they are all there is to convert: GPT-2's Conv1D stores a linear map's weight as (in, out),
ours is (out, in); and PEFT puts one vector over all of c_attn's output, [l_q, l_k, l_v], where (IA)³ has l_k and l_v.
"""

import argparse
import http.client
import json
import os
import sys
import tempfile
import urllib.request

import torch

from ia3 import IA3, fingerprint
from model import GPT, GPTConfig, load_file

SIZES = {  # n_layer, n_head, n_embd of the four published GPT-2s (Radford et al. 2019, table 2)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out)
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, kept as a weight by older versions


def published(name):
    """The GPTConfig of 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl'."""
    n_layer, n_head, n_embd = SIZES[name]
    return GPTConfig(block_size=1024, vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def read(path, weights=None):
    """Read a GPT-2: a folder in Hugging Face's layout, the weights file of one, or a published GPT-2 by its name.

    weights: what is in the file path, where the caller has loaded it. Returns a GPT in float32 on the CPU, in eval
    mode, without dropout. A file does not tell its number of heads: that is in the config.json beside it, or known
    where the sizes are a published GPT-2's. A file or folder goes before a name. Raises OSError for what is not there
    or cannot be fetched, and ValueError for what is not a GPT-2.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        config = read_config(path)
        weights, where, _ = read_tensors(path, "model.safetensors", "pytorch_model.bin")
        return from_hf(weights, config, where)
    if os.path.isfile(path):
        folder, name = os.path.split(path)
        config = read_config(folder or ".") if os.path.exists(os.path.join(folder, "config.json")) else None
        weights = read_tensors(folder or ".", name, name)[0] if name.endswith(".safetensors") else weights
        return from_hf(weights, config, path)
    if path not in SIZES:
        raise FileNotFoundError(f"no file or folder {path}; by name there are {', '.join(SIZES)}")
    file = fetch(path)
    try:
        return from_hf(load_file(file, mmap=True), published(path), file)
    except ValueError as e:
        os.remove(file)
        raise ValueError(f"{e}; removed, so that the next run fetches it again") from None


def fetch(name):
    """Return the path of a published pytorch_model.bin, fetched into torch.hub's cache where it is not there yet.

    Raises OSError with what was tried and which local file would do instead. Environment: TORCH_HOME moves the cache,
    HF_ENDPOINT names a mirror.
    """
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = f"{host.rstrip('/')}/openai-community/{name}/resolve/main/pytorch_model.bin"
    path = f"{torch.hub.get_dir()}/checkpoints/{name}-pytorch_model.bin"
    if os.path.exists(path):
        return path
    partial = f"{path}.{os.getpid()}.tmp"  # its own, should several processes fetch at once
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            size, done = response.length, 0
            if size is None:
                raise OSError("its length is not announced, so that a cut could not be told from the end")
            print(f"fetching {url}, {size / 2**20:,.0f} MiB", file=sys.stderr)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(partial, "wb") as file:
                while piece := response.read(2**20):
                    file.write(piece)
                    done += len(piece)
                    if sys.stderr.isatty():
                        print(f"\r{done / size:4.0%}", end="\n" if done == size else "", file=sys.stderr, flush=True)
        if done != size:
            raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: HF_ENDPOINT is no address
        raise OSError(
            f"{url} could not be fetched ({str(e).strip('<>')}); a local pytorch_model.bin or the folder that holds it"
            f" can be given instead of {name}, or put that file at {path}"
        ) from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return path


def read_json(path):
    """Return the object in a .json file. Raises ValueError where it holds none."""
    with open(path, encoding="utf-8") as file:
        try:
            about = json.load(file)
        except ValueError as e:
            raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no JSON object")
    return about


def read_config(folder):
    """Return the GPTConfig, without dropout, that a folder's config.json describes.

    Raises OSError where there is none and ValueError where it is not GPT-2's or asks for what our GPT does not do.
    """
    path = f"{folder}/config.json"
    about = read_json(path)
    if about.get("model_type") != "gpt2":
        raise ValueError(f"{path} describes a model of type {about.get('model_type')!r}, not 'gpt2'")
    names = {"n_positions": "block_size"} | {n: n for n in ("vocab_size", "n_layer", "n_head", "n_embd")}
    for name in names:
        if not isinstance(about.get(name), int):
            raise ValueError(f"{path} wants a whole number as {name}, and has {about.get(name)!r}")
    ours = {  # key: the values that our GPT computes, its default first
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * about["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, values in ours.items():
        if about.get(key, values[0]) not in values:
            raise ValueError(f"{path} has {key} {about[key]!r}; this GPT-2 has only {values[0]!r}")
    try:
        return GPTConfig(**{ours: about[theirs] for theirs, ours in names.items()})
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read_tensors(folder, safe, plain):
    """Read a folder's safe (.safetensors) or else plain (PyTorch) file. Returns its tensors, path, and metadata.

    Raises OSError where the folder has neither, and ValueError for a damaged file, or for a .safetensors alone where
    that package is not installed.
    """
    path = f"{folder}/{safe}"
    if not os.path.exists(path):
        if not os.path.exists(f"{folder}/{plain}"):
            raise FileNotFoundError(f"{folder} holds neither {safe} nor {plain}")
        return load_file(f"{folder}/{plain}", mmap=True), f"{folder}/{plain}", {}
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        if os.path.exists(f"{folder}/{plain}"):
            return load_file(f"{folder}/{plain}", mmap=True), f"{folder}/{plain}", {}
        raise ValueError(f"{path} is read with the safetensors package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, path, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({str(e).splitlines()[0]})") from None


def from_hf(weights, config, where):
    """Build a GPT, float32 and in eval mode, from GPT-2's published weights {name: tensor}.

    config: its GPTConfig; None takes the published GPT-2 that has these sizes. Names may begin with 'transformer.'.
    Raises ValueError with the first name or shape that is not GPT-2's; where names the file in it.
    """
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{where} is not a GPT checkpoint: it holds no weights by name")
    weights = {name.removeprefix("transformer."): t for name, t in weights.items() if not name.endswith(MASKS)}
    shapes = {name: tuple(getattr(t, "shape", ())) for name, t in weights.items()}
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    if config is None:
        width = shapes.get("wte.weight", (0,))[-1:]
        known = [name for name, (layers, _, n_embd) in SIZES.items() if (layers, n_embd) == (n_layer, *width)]
        if not known:
            raise ValueError(
                f"{where} is not a GPT checkpoint of ours, nor a published GPT-2, nor beside a config.json"
            )
        config = published(known[0])
    if n_layer != config.n_layer:
        raise ValueError(f"{where} has {n_layer} layers, but its config says n_layer {config.n_layer}")
    try:
        with torch.device("meta"):  # shapes without memory
            model = GPT(config)
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"{where}: its config's sizes are beyond a tensor's ({str(e).splitlines()[0]})") from None
    ours = {}
    for name, wanted in model.state_dict().items():
        theirs = name.removeprefix("transformer.")
        if theirs == "lm_head.weight" and theirs not in weights:
            continue
        if theirs not in weights:
            raise ValueError(f"{where} has no {theirs}: it is not a GPT-2")
        t = weights.pop(theirs)
        shape = tuple(wanted.shape)[::-1] if theirs.endswith(CONV1D) else tuple(wanted.shape)
        if shapes[theirs] != shape or not t.is_floating_point():
            kind = getattr(t, "dtype", type(t).__name__)
            raise ValueError(f"{where}: {theirs} is {kind} {shapes[theirs]}, but this GPT-2 has floats {shape} there")
        if theirs == "lm_head.weight":
            if not torch.equal(t.float(), ours["transformer.wte.weight"]):
                raise ValueError(f"{where}: lm_head.weight is not wte.weight, but GPT-2's head is tied")
            continue
        t = t.t() if theirs.endswith(CONV1D) else t
        ours[name] = t.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # nothing stays on disk
    if weights:
        raise ValueError(f"{where}: {next(iter(weights))} is not GPT-2's")
    ours["lm_head.weight"] = ours["transformer.wte.weight"]
    model.load_state_dict(ours, assign=True)
    model.transformer.wte.weight = model.lm_head.weight  # tied again
    return model.eval()


def save_hf(model, folder):
    """Write model as a folder that transformers' GPT2LMHeadModel.from_pretrained opens, and that read() opens.

    Hugging Face's GPT-2 always has biases: where ours has none they are zeros. Raises ValueError for a model with
    vectors (merge them first), and for a folder with a model.safetensors, which would be opened instead.
    """
    if model.ia3 is not None:
        raise ValueError("a model with vectors has no place in Hugging Face's layout: merge them first")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if os.path.exists(f"{folder}/{name}"):
            raise ValueError(f"{folder} holds another model's {name}, which would be opened instead of this one")
    config = model.config
    weights = {}
    for name, t in model.transformer.state_dict(prefix="transformer.").items():  # without the tied head
        weights[name] = t.t().contiguous() if name.endswith(CONV1D) else t
        if not config.bias and not name.endswith(("wte.weight", "wpe.weight")):
            weights[name.replace("weight", "bias")] = t.new_zeros(t.size(0))
    end = {"bytes": 256, "gpt2": 50256}.get(model.tokenizer)
    about = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/pytorch_model.bin.tmp", "wb") as file:
        torch.save(weights, file)
    write_json(about, f"{folder}/config.json.tmp")
    for name in ("pytorch_model.bin", "config.json"):
        os.replace(f"{folder}/{name}.tmp", f"{folder}/{name}")


def write_json(about, path):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(about, file, indent=2)
        file.write("\n")


def save_peft(vectors, folder, base):
    """Write one task's vectors as a PEFT (IA)³ adapter folder for GPT-2; base names the model they belong to.

    PEFT's vector over c_attn is [l_q, l_k, l_v], (3·n_embd, 1), of which l_q, and what is no target, is ones; that over
    mlp.c_proj's input is l_ff, (1, 4·n_embd). Raises ValueError for stacked vectors, and where the safetensors package
    is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("an adapter is written with the safetensors package: pip install safetensors") from None
    if vectors.is_stacked():
        raise ValueError("only one task's vectors make an adapter")
    tensors = {}
    for i, (l_k, l_v, l_ff) in enumerate(vectors.rows()):
        layer = f"base_model.model.transformer.h.{i}"
        if l_k is not None or l_v is not None:
            ones = torch.ones(vectors.config.n_embd)
            parts = [ones if l is None else l.detach().cpu().float() for l in (None, l_k, l_v)]
            tensors[f"{layer}.attn.c_attn.ia3_l"] = torch.cat(parts).unsqueeze(1)
        if l_ff is not None:
            tensors[f"{layer}.mlp.c_proj.ia3_l"] = l_ff.detach().cpu().float().unsqueeze(0).contiguous()
    modules = [m for m in ("attn.c_attn", "mlp.c_proj") if any(f".{m}." in name for name in tensors)]
    about = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": modules,
        "feedforward_modules": [m for m in modules if m == "mlp.c_proj"],  # those whose input is scaled
        "fan_in_fan_out": True,  # GPT-2's Conv1D
        "inference_mode": True,
    }
    os.makedirs(folder, exist_ok=True)
    # PEFT passes over the fingerprint; load_peft refuses another base by it
    save_file(tensors, f"{folder}/adapter_model.safetensors.tmp", {"format": "pt", "base": vectors.base or ""})
    write_json(about, f"{folder}/adapter_config.json.tmp")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        os.replace(f"{folder}/{name}.tmp", f"{folder}/{name}")


def load_peft(folder, model):
    """Read a PEFT (IA)³ adapter folder made for model. Returns IA3 (attach it) and l_q (n_layer, n_embd) or None.

    PEFT scales queries too. (l_q ⊙ q)·(l_k ⊙ k) = q·(l_q ⊙ l_k ⊙ k), so l_q is folded into l_k: the same function.
    The product is taken in float64 and rounded once to float32. Raises OSError where a file is missing and ValueError
    for an adapter of another kind or base, with missing layers, or damaged.
    """
    about = read_json(f"{folder}/adapter_config.json")
    if about.get("peft_type") != "IA3":
        raise ValueError(f"{folder} is an adapter of type {about.get('peft_type')!r}, not 'IA3'")
    tensors, where, metadata = read_tensors(folder, "adapter_model.safetensors", "adapter_model.bin")
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{where} holds no tensors by name")
    base = fingerprint(model)
    if metadata.get("base") not in (None, "", base):
        raise ValueError(f"{where} was made for another base of this shape ({metadata['base'][:8]}, not {base[:8]})")
    tensors = {name.removeprefix("base_model.model.").removeprefix("transformer."): t for name, t in tensors.items()}
    n_layer, n_embd = model.config.n_layer, model.config.n_embd
    columns = {}  # module: (n_layer, width)
    for module, shape in (("attn.c_attn", (3 * n_embd, 1)), ("mlp.c_proj", (1, 4 * n_embd))):
        if not any(name.endswith(f".{module}.ia3_l") for name in tensors):
            continue  # not a target
        rows = []
        for name in [f"h.{i}.{module}.ia3_l" for i in range(n_layer)]:
            if name not in tensors:
                raise ValueError(f"{where} has no {name}, but this base has {n_layer} layers")
            t = tensors.pop(name)
            if tuple(t.shape) != shape:
                raise ValueError(f"{where}: {name} is {tuple(t.shape)}, but this base takes {shape}")
            rows.append(t.flatten().double())
        columns[module] = torch.stack(rows)
    if tensors or not columns:
        raise ValueError(f"{where}: {next(iter(tensors), 'nothing in it')} is no (IA)³ vector of this base")
    targets = (["k", "v"] if "attn.c_attn" in columns else []) + (["ff"] if "mlp.c_proj" in columns else [])
    vectors, l_q = IA3(model.config, targets), None
    if "attn.c_attn" in columns:
        l_q, l_k, l_v = columns["attn.c_attn"].split(n_embd, dim=1)
        vectors.l_k.data, vectors.l_v.data = (l_q * l_k).float(), l_v.float()
    if "mlp.c_proj" in columns:
        vectors.l_ff.data = columns["mlp.c_proj"].float()
    for name, p in vectors.matrices().items():
        if not p.isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or infinity")
    vectors.base = base
    return vectors, l_q


def count(names):
    """Return a table as text, a line a model: what (IA)³ trains of it. names: what from_pretrained reads, or 'gpt2'…

    A published GPT-2 is counted from its sizes, nothing is fetched. The blocks are all that stands in
    model.transformer.h, biases and LayerNorms too; the law 1/(2·n_embd) is of their matrices alone, 6·n_embd of
    12·n_embd² a layer, so it is a little larger. Bytes are those of the .npz.
    """
    head = ("model", "layers", "n_embd", "parameters", "trained", "of all", "of the blocks", "1/(2·n_embd)", "bytes")
    rows = [head]
    for name in names:
        known = name in SIZES and not os.path.exists(name)
        config = published(name) if known else GPT.from_pretrained(name).config
        with torch.device("meta"):
            model = GPT(config)
        total, blocks = (sum(p.numel() for p in m.parameters()) for m in (model, model.transformer.h))
        vectors = IA3(config)
        vectors.base = "0" * 64  # as long as a fingerprint
        with tempfile.TemporaryDirectory() as folder:
            vectors.save(f"{folder}/ia3.npz")
            size = os.path.getsize(f"{folder}/ia3.npz")
        n = vectors.count()
        shares = [f"{share:.4%}" for share in (n / total, n / blocks, 1 / (2 * config.n_embd))]
        rows.append((name, f"{config.n_layer}", f"{config.n_embd}", f"{total:,}", f"{n:,}", *shares, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def run(argv):
    def fail(message):
        raise ValueError(message)

    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.error = fail
    commands = parser.add_subparsers(dest="command", required=True, metavar="{count,to-peft,from-peft,to-hf}")

    def command(name, help):
        sub = commands.add_parser(name, help=help, description=help)
        sub.error = fail
        return sub

    sub = command("count", "how many values (IA)³ trains of a model, in percent, by the law, and in bytes")
    sub.add_argument("models", nargs="*", default=[*SIZES, "data/base.pt"], help="names, checkpoints, folders")
    peft_out = command("to-peft", "write vectors as a PEFT (IA)³ adapter folder for GPT-2")
    peft_in = command("from-peft", "read vectors from a PEFT (IA)³ adapter folder for GPT-2; l_q is folded into l_k")
    hf_out = command(
        "to-hf", "write a base as a folder for transformers' GPT2LMHeadModel (merge.py --format hf merges)"
    )
    for sub in (peft_out, peft_in, hf_out):
        sub.add_argument("--base", default="data/base.pt", help="a checkpoint, a folder, gpt2 (default: %(default)s)")
    peft_out.add_argument("--ia3", default="out/folio/ia3.npz", help="the vectors (default: %(default)s)")
    peft_out.add_argument("--out", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    peft_in.add_argument("--adapter", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    peft_in.add_argument("--out", default="out/folio/from-peft.npz", help="the vectors (default: %(default)s)")
    hf_out.add_argument("--out", default="out/base-hf", help="the folder (default: %(default)s)")
    args = parser.parse_args(argv)

    if args.command == "count":
        print(count(args.models))
        return 0
    refuse_overwriting(args.base, args.out)
    model = GPT.from_pretrained(args.base)
    if args.command == "to-hf":
        save_hf(model, args.out)
        print(f"{args.base} → {args.out}")
    elif args.command == "to-peft":
        vectors = IA3.load(args.ia3, model)
        save_peft(vectors, args.out, args.base)
        print(f"{args.ia3} → {args.out}: {vectors.count():,} values, and ones for the queries")
    else:
        if os.path.isdir(args.out):
            raise ValueError(f"--out {args.out} is a folder")
        vectors, l_q = load_peft(args.adapter, model)
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        vectors.save(args.out)
        print(f"{args.adapter} → {args.out}: {vectors.count():,} values")
        if l_q is not None and not (l_q == 1).all():
            print(f"its {(l_q != 1).sum():,} query values other than 1 are folded into l_k: the same function")
    return 0


def refuse_overwriting(path, out):
    """Raise ValueError where writing to out, a file or a folder of a model, would replace path, which is read."""
    for theirs in (path, f"{path}/pytorch_model.bin"):
        for ours in (out, f"{out}/pytorch_model.bin"):
            if os.path.exists(theirs) and os.path.exists(ours) and os.path.samefile(theirs, ours):
                raise ValueError(f"--out {out} would replace {path}, which it is made from")


def main(argv=None):
    try:
        return run(argv)
    except (ValueError, OSError) as e:
        print(f"convert.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
