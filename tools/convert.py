"""Every foreign format, once: published GPT-2, Hugging Face's folders, PEFT's (IA)³ adapters.

    python -m tools.convert gpt2 --out gpt2.pt               # or gpt2-medium, gpt2-large, gpt2-xl: fetched once
    python -m tools.convert hf path/to/folder --out base.pt  # config.json, and model.safetensors or pytorch_model.bin
    python -m tools.convert to-hf --base data/base.pt --ia3 out/folio/ia3.npz --out out/folio/hf  # merged first
    python -m tools.convert to-peft --ia3 out/folio/ia3.npz --out out/folio/peft
    python -m tools.convert from-peft --adapter out/folio/peft --out out/folio/back.npz
    python -m tools.convert count gpt2 gpt2-xl data/base.pt  # how many values (IA)³ trains, and of how many

What comes in becomes our checkpoint or our .npz, and from then on is an ordinary --base or --ia3. Needs neither
transformers nor peft, and the safetensors package only where a .safetensors file is read or written.

Two spellings differ, and they are all there is to convert: GPT-2's Conv1D stores a linear map's weight as (in, out),
ours is (out, in); and PEFT puts one vector over all of c_attn's output, [l_q, l_k, l_v], where (IA)³ has l_k and l_v.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import sys
import tempfile
import urllib.request

import torch

import common
from data import Tokenizer
from ia3 import IA3, fingerprint
from merge import merge
from model import GPT, GPTConfig

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


# --- reading what others wrote ---


def read_json(path):
    """Return the object in a .json file. Raises ValueError where it holds none."""
    with open(path, encoding="utf-8") as f:
        try:
            about = json.load(f)
        except (ValueError, RecursionError) as e:  # RecursionError: nested thousands deep
            raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no JSON object")
    return about


def read_tensors(path):
    """Read a .safetensors file, or else a PyTorch file. Returns {name: tensor} and the former's metadata.

    Raises OSError where there is no such file, and ValueError for one that is damaged or holds no tensors by name.
    """
    if not path.endswith(".safetensors"):
        tensors = common.load_file(path)
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise ValueError(f"{path} holds no tensors by name")
        return tensors, {}
    safe_open = import_safetensors().safe_open
    try:
        with safe_open(path, framework="pt") as f:
            names = f.keys()
            return {name: f.get_tensor(name) for name in names}, f.metadata() or {}
    except OSError:
        raise
    except Exception as e:  # its own error for a damaged file, others for a dtype that torch does not have
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e})") from None


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("a .safetensors file wants the safetensors package: pip install safetensors") from None
    return safetensors


def find(folder, *names):
    """Return the path of the first of names that is in folder. Raises OSError where none is."""
    for name in names:
        if os.path.isfile(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}")


# --- Hugging Face's layout ---


def hf_files(path):
    """Return config.json and the weights of a folder, or of its weights' file. Raises OSError where one is missing."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return f"{path}/config.json", find(path, "model.safetensors", "pytorch_model.bin")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file or folder {path}")
    return os.path.join(os.path.dirname(path), "config.json"), path


def from_hf(path):
    """Read a model in Hugging Face's layout: a folder, or a weights' file with its config.json beside it.

    Returns a GPT, float32, on the CPU, in eval mode, without dropout. Raises OSError for what is not there and
    ValueError for what is not a GPT-2, or one that ours does not compute.
    """
    config_path, weights_path = hf_files(path)
    about = read_json(config_path)
    if about.get("model_type") != "gpt2":
        raise ValueError(f"{config_path} describes a model of type {about.get('model_type')!r}, not 'gpt2'")
    try:
        config = gpt2_config(about)
    except ValueError as e:
        raise ValueError(f"{config_path}: {e}") from None
    tensors, _ = read_tensors(weights_path)
    try:
        return gpt2(config, tensors)
    except (ValueError, TypeError, RuntimeError) as e:  # the latter two of sizes that no tensor can have
        raise ValueError(f"{weights_path}: {str(e).splitlines()[0]}") from None


def gpt2_config(about):
    """The GPTConfig, without dropout, that a GPT-2's config.json describes. ValueError for what ours does not do."""
    config = GPTConfig(
        block_size=about.get("n_positions"),
        vocab_size=about.get("vocab_size"),
        n_layer=about.get("n_layer"),
        n_head=about.get("n_head"),
        n_embd=about.get("n_embd"),
    )
    computed = {  # key: the values that our GPT computes, GPT-2's default first
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, values in computed.items():
        if about.get(key, values[0]) not in values:
            raise ValueError(f"{key} is {about[key]!r}, and this GPT-2 has only {values[0]!r}")
    return config


def gpt2(config, tensors):
    """Build a GPT from GPT-2's published weights {name: tensor}; names may begin with 'transformer.'.

    Raises ValueError with the first name, shape or dtype that is not GPT-2's, or that holds NaN or infinity.
    """
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items() if not name.endswith(MASKS)}
    if "lm_head.weight" not in tensors and "wte.weight" in tensors:
        tensors["lm_head.weight"] = tensors["wte.weight"]  # tied, so it need not be there
    model = common.empty_model(GPT, config, tensors)
    weights = {}
    for name, ours in model.state_dict().items():
        theirs = name.removeprefix("transformer.")
        if theirs not in tensors:
            raise ValueError(f"there is no {theirs}, so it is no GPT-2 of {config.n_layer} layers")
        t = tensors.pop(theirs)
        if theirs.endswith(CONV1D):
            t = common.check_weight(t, theirs, ours.shape[::-1]).t()
        else:
            t = common.check_weight(t, theirs, ours.shape)
        weights[name] = t.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # nothing stays on disk
    if tensors:
        raise ValueError(f"{next(iter(tensors))} is not GPT-2's")
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError("lm_head.weight is not wte.weight, but GPT-2's head is tied")
    model.load_state_dict(weights, assign=True)
    model.transformer.wte.weight = model.lm_head.weight  # tied again
    if config.vocab_size in common.TOKENIZERS:
        model.tokenizer = Tokenizer(common.TOKENIZERS[config.vocab_size], config.vocab_size)
    return model.eval()


def to_hf(model, folder):
    """Write model as a folder that transformers' GPT2LMHeadModel.from_pretrained opens, and that from_hf opens.

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
    end = None
    if model.tokenizer is not None:
        end = max(model.tokenizer.ids)  # the last id of either tokenizer ends a text
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
    with common.replace_file(f"{folder}/pytorch_model.bin") as f:
        torch.save(weights, f)
    write_json(about, f"{folder}/config.json")


def write_json(about, path):
    with common.replace_file(path, text=True) as f:
        json.dump(about, f, indent=2)
        f.write("\n")


# --- published weights ---


def cache_folder(name):
    """Where a published model's files are kept; the environment's TORCH_HOME moves it."""
    return f"{torch.hub.get_dir()}/checkpoints/{name}"


def fetch_published(name):
    """Return the folder of a published GPT-2's config.json and weights, each fetched where the cache has none.

    Raises OSError with what was tried and where a copy would do. The environment's HF_ENDPOINT names a mirror.
    """
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for file in ("config.json", "pytorch_model.bin"):
        url = f"{host}/openai-community/{name}/resolve/main/{file}"
        path = f"{cache_folder(name)}/{file}"
        if os.path.exists(path):
            continue
        try:
            fetch(url, path)
        except (OSError, ValueError, http.client.HTTPException) as e:
            why = str(e).strip("<>") or type(e).__name__
            raise OSError(f"{url} could not be fetched ({why}); a copy of it at {path} would do") from None
    return cache_folder(name)


def fetch(url, path):
    """Fetch url into the file path, all of it or nothing. Over http or https only, redirects included.

    The length must be announced, and is checked; so is the SHA-256 where the server announces it. Raises ValueError
    for another kind of address, OSError or http.client.HTTPException for the rest.
    """
    check_address(url)
    redirects = Redirects()
    with urllib.request.build_opener(redirects).open(url, timeout=30) as response:
        size = response.length
        if size is None:
            raise OSError("its length is not announced, so that a cut could not be told from the end")
        print(f"fetching {url}, {size / 2**20:,.0f} MiB", file=sys.stderr)
        done = 0
        digest = hashlib.sha256()
        with common.replace_file(path) as f:
            while piece := response.read(2**20):
                f.write(piece)
                digest.update(piece)
                done += len(piece)
                if sys.stderr.isatty():
                    print(f"\r{done / size:4.0%}", end="\n" if done == size else "", file=sys.stderr, flush=True)
            if done != size:
                raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
            if (redirects.sha256 or announced_sha256(response.headers)) not in (None, digest.hexdigest()):
                raise OSError("its SHA-256 is not the one that the server announces")


class Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, for http and https only; sha256 is what an answer on the way said of the file that it points to."""

    sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        check_address(url)
        self.sha256 = announced_sha256(headers) or self.sha256
        return super().redirect_request(request, response, code, message, headers, url)


def check_address(url):
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"only http and https are fetched, not {url}")


def announced_sha256(headers):
    """The SHA-256 in the hub's X-Linked-ETag, or None; for a small file another, shorter hash stands there."""
    tag = headers.get("X-Linked-ETag", "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


# --- PEFT's adapters ---


def to_peft(vectors, folder, base):
    """Write one task's vectors as a PEFT (IA)³ adapter folder for GPT-2; base names the model they belong to.

    PEFT's vector over c_attn is [l_q, l_k, l_v], (3·n_embd, 1), of which l_q, and what is no site, is ones; that over
    mlp.c_proj's input is l_ff, (1, 4·n_embd). Raises ValueError for stacked vectors, and where the safetensors package
    is not installed.
    """
    safetensors = import_safetensors()
    if vectors.is_stacked():
        raise ValueError("only one task's vectors make an adapter")
    modules = []
    if vectors.l_k is not None or vectors.l_v is not None:
        modules.append("attn.c_attn")
    if vectors.l_ff is not None:
        modules.append("mlp.c_proj")
    tensors = {}
    for i, (l_k, l_v, l_ff) in enumerate(vectors.per_layer()):
        layer = f"base_model.model.transformer.h.{i}"
        if "attn.c_attn" in modules:
            ones = torch.ones(vectors.config.n_embd)
            parts = [ones if l is None else l.detach().cpu().float() for l in (None, l_k, l_v)]
            tensors[f"{layer}.attn.c_attn.ia3_l"] = torch.cat(parts).unsqueeze(1)
        if "mlp.c_proj" in modules:
            tensors[f"{layer}.mlp.c_proj.ia3_l"] = l_ff.detach().cpu().float().unsqueeze(0)
    about = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": modules,
        "feedforward_modules": [m for m in modules if m == "mlp.c_proj"],  # those whose input is scaled
        "fan_in_fan_out": True,  # GPT-2's Conv1D
        "inference_mode": True,
    }
    # PEFT passes over the fingerprint; from_peft refuses another base by it
    metadata = {"format": "pt", "fingerprint": vectors.fingerprint or ""}
    with common.replace_file(f"{folder}/adapter_model.safetensors") as f:
        f.write(safetensors.torch.save(tensors, metadata))
    write_json(about, f"{folder}/adapter_config.json")


def adapter_files(folder):
    """Return adapter_config.json and the vectors of a PEFT adapter. Raises OSError where these are missing."""
    return f"{folder}/adapter_config.json", find(folder, "adapter_model.safetensors", "adapter_model.bin")


def from_peft(folder, model):
    """Read a PEFT (IA)³ adapter folder made for model. Returns IA3 (attach it) and l_q (n_layer, n_embd) or None.

    PEFT scales queries too. (l_q ⊙ q)·(l_k ⊙ k) = q·(l_q ⊙ l_k ⊙ k), so l_q is folded into l_k: the same function.
    The product is taken in float64 and rounded once to float32. Raises OSError where a file is missing and ValueError
    for an adapter of another kind or base, with missing layers, or damaged.
    """
    config_path, path = adapter_files(folder)
    about = read_json(config_path)
    if about.get("peft_type") != "IA3":
        raise ValueError(f"{config_path} describes an adapter of type {about.get('peft_type')!r}, not 'IA3'")
    tensors, metadata = read_tensors(path)
    theirs, ours = metadata.get("fingerprint"), fingerprint(model)
    if theirs and theirs != ours:
        raise ValueError(f"{path} was made for another base of this shape ({theirs[:8]}, not {ours[:8]})")
    tensors = {name.removeprefix("base_model.model.").removeprefix("transformer."): t for name, t in tensors.items()}
    n_layer, n_embd = model.config.n_layer, model.config.n_embd
    has_attn = any(name.endswith(".attn.c_attn.ia3_l") for name in tensors)
    has_mlp = any(name.endswith(".mlp.c_proj.ia3_l") for name in tensors)

    def take(module, shape):
        """Take the vectors over a module out of tensors. Returns (n_layer, width) in float64."""
        layers = []
        for name in [f"h.{i}.{module}.ia3_l" for i in range(n_layer)]:
            if name not in tensors:
                raise ValueError(f"{path} has no {name}, but this base has {n_layer} layers")
            t = common.check_weight(tensors.pop(name), f"{path}: {name}", shape)
            layers.append(t.flatten().double())
        return torch.stack(layers)

    l_q = None
    matrices = {}
    if has_attn:
        l_q, l_k, l_v = take("attn.c_attn", (3 * n_embd, 1)).split(n_embd, dim=1)  # (n_layer, n_embd) each
        matrices |= {"l_k": l_q * l_k, "l_v": l_v}
    if has_mlp:
        matrices["l_ff"] = take("mlp.c_proj", (1, 4 * n_embd))
    if tensors or not matrices:
        raise ValueError(f"{path}: {next(iter(tensors), 'nothing in it')} is no (IA)³ vector of this base")
    vectors = IA3(model.config, [name.removeprefix("l_") for name in matrices])
    for name, p in vectors.matrices().items():
        p.data = common.check_weight(matrices[name].float(), f"{path}: {name}")  # l_q ⊙ l_k may have overflown
    vectors.fingerprint = ours
    return vectors, l_q


# --- the count ---


def count(names):
    """Return a table as text, a line a model: what (IA)³ trains of it. names: checkpoints, or 'gpt2'…

    A published GPT-2 is counted from its sizes, nothing is fetched. The blocks are all that stands in
    model.transformer.h, biases and LayerNorms too; the law 1/(2·n_embd) is of their matrices alone, 6·n_embd of
    12·n_embd² a layer, so it is a little larger. Bytes are those of the .npz.
    """
    head = ("model", "layers", "n_embd", "parameters", "trained", "of all", "of the blocks", "1/(2·n_embd)", "bytes")
    rows = [head]
    for name in names:
        if name in SIZES:
            with torch.device("meta"):  # sizes without memory
                model = GPT(published(name))
        else:
            model = common.load(name)
        config = model.config
        total = sum(p.numel() for p in model.parameters())
        blocks = sum(p.numel() for p in model.transformer.h.parameters())
        vectors = IA3(config)
        n = vectors.count()
        vectors.fingerprint = "0" * 64  # as long as a real one
        with tempfile.TemporaryDirectory() as folder:
            vectors.save(f"{folder}/ia3.npz")
            n_bytes = os.path.getsize(f"{folder}/ia3.npz")
        sizes = (f"{config.n_layer}", f"{config.n_embd}", f"{total:,}", f"{n:,}")
        shares = (f"{n / total:.4%}", f"{n / blocks:.4%}", f"{1 / (2 * config.n_embd):.4%}")
        rows.append((name, *sizes, *shares, f"{n_bytes:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return "\n".join(lines)


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help):
        return commands.add_parser(name, help=help, description=help)

    for name in SIZES:
        sub = command(name, f"make our checkpoint of the published {name}")
        sub.add_argument("--out", default=f"{name}.pt", help="the checkpoint (default: %(default)s)")
    sub = command("hf", "make our checkpoint of a GPT-2 in Hugging Face's layout")
    sub.add_argument("source", help="a folder, or a weights' file with config.json beside it")
    sub.add_argument("--out", required=True, help="the checkpoint")
    to_hf = command("to-hf", "write a base, merged with vectors or not, for transformers' GPT2LMHeadModel")
    to_peft = command("to-peft", "write vectors as a PEFT (IA)³ adapter folder for GPT-2")
    from_peft = command("from-peft", "read vectors from a PEFT (IA)³ adapter folder for GPT-2; l_q is folded into l_k")
    for sub in (to_hf, to_peft, from_peft):
        sub.add_argument("--base", default="data/base.pt", help="a checkpoint (default: %(default)s)")
    to_hf.add_argument("--ia3", help="vectors to merge into it (default: none)")
    to_hf.add_argument("--out", default="out/hf", help="the folder (default: %(default)s)")
    to_peft.add_argument("--ia3", default="out/folio/ia3.npz", help="the vectors (default: %(default)s)")
    to_peft.add_argument("--out", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    from_peft.add_argument("--adapter", default="out/folio/peft", help="the adapter's folder (default: %(default)s)")
    from_peft.add_argument("--out", default="out/folio/from-peft.npz", help="the vectors (default: %(default)s)")
    sub = command("count", "how many values (IA)³ trains of a model, in percent, by the law, and in bytes")
    sub.add_argument("models", nargs="*", default=[*SIZES, "data/base.pt"], help="checkpoints, or published names")
    return parser.parse_args(argv)


def run(argv):
    args = parse(argv)
    if args.command == "count":
        print(count(args.models))
        return 0
    if not args.out:
        raise ValueError("the name of the output is empty")

    if args.command == "hf":
        common.check_output(args.out, hf_files(args.source))
        save_checkpoint(from_hf(args.source), args.source, args.out)

    elif args.command == "to-hf":
        inputs = [args.base] if args.ia3 is None else [args.base, args.ia3]
        for name in ("pytorch_model.bin", "config.json"):
            common.check_output(f"{args.out}/{name}", inputs)
        model = common.load(args.base)
        if args.ia3 is not None:
            model.ia3 = IA3.load(args.ia3, model)
            model = merge(model)
        to_hf(model, args.out)
        print(f"{' + '.join(inputs)} → {args.out}")

    elif args.command == "to-peft":
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            common.check_output(f"{args.out}/{name}", [args.base, args.ia3])
        vectors = IA3.load(args.ia3, common.load(args.base))
        to_peft(vectors, args.out, args.base)
        print(f"{args.ia3} → {args.out}: {vectors.count():,} values, and ones for the queries")

    elif args.command == "from-peft":
        common.check_output(args.out, [args.base, *adapter_files(args.adapter)])
        vectors, l_q = from_peft(args.adapter, common.load(args.base))
        vectors.save(args.out)
        print(f"{args.adapter} → {args.out}: {vectors.count():,} values")
        if l_q is not None and (l_q != 1).any():
            print(f"its {(l_q != 1).sum():,} query values other than 1 are folded into l_k: the same function")

    else:  # a published name
        folder = cache_folder(args.command)
        common.check_output(args.out, [f"{folder}/config.json", f"{folder}/pytorch_model.bin"])
        fetch_published(args.command)
        try:
            model = from_hf(folder)
        except ValueError as e:
            raise ValueError(f"{e}; if it is damaged, remove it, and the next run fetches it again") from None
        save_checkpoint(model, args.command, args.out)
    return 0


def save_checkpoint(model, source, out):
    common.save(model, out)
    n = sum(p.numel() for p in model.parameters())
    tokenizer = "unknown, so that it reads .bin data only" if model.tokenizer is None else model.tokenizer.about
    print(f"{source} → {out}: {n:,} parameters, tokenizer {tokenizer}")


def main(argv=None):
    return common.exit_status("convert.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
