"""What the scripts share and no reader needs first: checkpoints, devices, and how a mistake is reported."""

import os
import sys
from dataclasses import asdict

import torch

from data.tokenizer import Tokenizer
from disk import check_size, check_weight, is_out_of_memory, load_file, replace_file
from ia3 import unwrap
from model import GPT, GPTConfig

if not hasattr(GPT, "blocks"):  # another model.py, nanoGPT's for one, which would ignore the vectors in silence
    raise ImportError("Python found another model.py before nanoIA3's: put nanoIA3's folder first on sys.path")

# Guess the tokenizer of a checkpoint that does not name one (nanoGPT's) from its vocabulary size: 257 is the 256 bytes
# and one id that ends a text; 50304 is GPT-2's 50257 rounded up to a multiple of 64
TOKENIZERS = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}
TOKENIZER_FIELDS = ("bos", "eos", "chat_template")  # what else of a tokenizer a checkpoint keeps


# --- a checkpoint: nanoGPT's dict plus 'tokenizer', 'bos', 'eos' and 'chat_template' ---


def load(path, dtype=torch.float32):
    """Read a checkpoint file, ours or nanoGPT's. Returns a GPT or a Llama, on the CPU, in eval mode.

    dtype: what the weights become; None leaves them as they are stored. Raises OSError if there is no such file and
    ValueError if it is not such a checkpoint. tools/convert.py makes one from foreign files.
    """
    if os.path.isdir(path) or os.fspath(path).endswith((".safetensors", ".gguf")):
        raise ValueError(f"{path} is not a checkpoint: python -m tools.convert hf or gguf makes one of it")
    checkpoint = load_file(path)
    check_whose(checkpoint, path)
    try:
        weights = our_names(checkpoint["model"])
        check_size(weights, path)
        model = build_model(checkpoint["model_args"], len(weights))
        load_weights(model, checked_copies(weights, model, dtype))
        model.tokenizer = build_tokenizer(checkpoint, model.config.vocab_size)
    except (TypeError, AttributeError, KeyError, RuntimeError, ValueError, OverflowError) as e:
        if is_out_of_memory(e):
            raise
        why = str(e).strip().rpartition("\n")[2].strip()  # torch's first line names the class, its last one the weight
        raise ValueError(f"{path} is not a checkpoint: {why[:200]}") from None
    return model.eval()


# How a weight's name ends in another library's checkpoint, that library, and what exports a file that we convert
FOREIGN = (
    ("layers.0.attention.wq.weight", "llama2.c or Meta", "llama2.c's export.py --version -1"),
    ("transformer.h.0.attn.qkv.weight", "LitGPT", "litgpt convert_from_litgpt, with config.json beside its file,"),
)


def check_whose(checkpoint, path):
    """Raise ValueError unless checkpoint, read from path, has our form or nanoGPT's; a known library's is named."""
    if isinstance(checkpoint, dict):
        weights = checkpoint.get("model", checkpoint)
        names = [str(name) for name in weights] if isinstance(weights, dict) else []
        for theirs, library, exporter in FOREIGN:
            if any(name.endswith(theirs) for name in names):
                raise ValueError(f"{path} is from {library}: {exporter} makes what python -m tools.convert hf reads")
        if {"model", "model_args"} <= checkpoint.keys():
            return
    raise ValueError(f"{path} is not our checkpoint or nanoGPT's: python -m tools.convert reads other formats")


def our_names(weights):
    """Return {name: tensor} under plain names, without the causal mask that nanoGPT stores if it lacks flash attention.

    .attn.bias is the mask; .attn.c_attn.bias is a bias.
    """
    return {plain_name(name): t for name, t in weights.items() if not name.endswith(".attn.bias")}


def plain_name(name):
    """A weight's name without what torch.compile and DistributedDataParallel put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def build_model(args, n_tensors):
    """Return the GPT or the Llama that a checkpoint's model_args describe, without memory for its weights."""
    if "n_kv_head" not in args:
        return empty_model(GPT, GPTConfig(**args), n_tensors)
    from llama import Llama, LlamaConfig  # here, so that everything else works without llama.py

    return empty_model(Llama, LlamaConfig(**args), n_tensors)


def empty_model(model_class, config, n_tensors):
    """Return model_class(config) without memory for its weights. Raises ValueError for more layers than tensors."""
    if config.n_layer > n_tensors:  # checked before anything is made for each layer
        raise ValueError(f"n_layer is {config.n_layer}, but there are only {n_tensors} tensors")
    with torch.device("meta"):
        return model_class(config)


def checked_copies(weights, model, dtype):
    """Return copies of weights, {name: tensor}, in dtype (None: as they are). ValueError if one does not fit model.

    Copied, because load_file maps the file into memory, and the file may be replaced later.
    """
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    copies = {}
    for name, t in weights.items():
        check_weight(t, name, shapes.get(name))  # load_weights refuses a name that the model does not have
        copies[name] = t.to(dtype or t.dtype, copy=True)
    return copies


def load_weights(model, weights):
    """Put weights, {name: tensor}, into an empty model without copying. A tied head is one matrix with the embedding.

    Raises RuntimeError for missing or other names and ValueError for a tied head that differs from the embedding.
    """
    model.load_state_dict(weights, assign=True)
    is_gpt = isinstance(model, GPT)
    if is_gpt or model.config.tied:
        embedding = model.transformer.wte if is_gpt else model.model.embed_tokens
        if not torch.equal(embedding.weight, model.lm_head.weight):
            raise ValueError("the head differs from the embedding, and in this model they are one matrix")
        embedding.weight = model.lm_head.weight  # load_state_dict made them two


def build_tokenizer(checkpoint, vocab_size):
    """Return the Tokenizer that a checkpoint names, or that its vocabulary's size tells; None if neither does."""
    about = checkpoint.get("tokenizer", TOKENIZERS.get(vocab_size))
    if about is None:
        return None
    fields = {name: checkpoint.get(name) for name in TOKENIZER_FIELDS}
    return Tokenizer(about, vocab_size, **fields)


def save(model, path):
    """Write model's checkpoint, without its vectors: a base stays a base."""
    model = unwrap(model)
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("ia3.")}
    checkpoint = {"model": weights, "model_args": asdict(model.config), "tokenizer": None}
    tokenizer = model.tokenizer
    if tokenizer is not None:
        checkpoint["tokenizer"] = tokenizer.about
        checkpoint |= {name: getattr(tokenizer, name) for name in TOKENIZER_FIELDS}
    with replace_file(path) as f:
        torch.save(checkpoint, f)


# --- devices ---


def pick_device(name="auto"):
    """Return a torch.device and set a GPU up: it becomes the current one, and its float32 products are in TF32.

    name: cpu, cuda, cuda:1 or mps; auto is cuda if there is one, else cpu. Raises ValueError for a device that is not
    here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's: one GPU per process
    try:
        device = torch.empty(0, device=name).device  # torch.device(name) accepts devices that are not here
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).splitlines()[0].partition(". ")[0]  # one sentence: torch may list all devices it knows
        raise ValueError(f"device {name!r} is not available: {why}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL exchanges tensors over the current device
        torch.set_float32_matmul_precision("high")  # TF32
    return device


def pick_dtype(device, frozen=None):
    """Return the name of the dtype to compute in, 'float32' or 'bfloat16'.

        on CUDA         bfloat16 if the GPU has it
        on a CPU        bfloat16 if it multiplies that natively and frozen is a Llama that is stored in it
        everywhere else float32; a GPT's figures are thus the same on every CPU

    frozen: the model, if its weights are not trained.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type != "cpu" or frozen is None or isinstance(frozen, GPT):
        return "float32"
    if frozen.lm_head.weight.dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        return "bfloat16"
    return "float32"


def cpu_multiplies_bfloat16():
    """Whether this CPU has instructions for it; without them bfloat16 is slower than float32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    found = torch.cpu.get_capabilities()
    return found.get("avx512_bf16", False) or found.get("amx_bf16", False)


# --- the end of every script ---


def exit_status(name, run, argv, stopped="stopped"):
    """Return the exit status of the script called name, whose work is run(argv).

    ValueError, OSError and their like are taken for a mistake in the input: one line on stderr and status 2. Ctrl-C is
    130, and prints stopped. Any other exception is a mistake of ours and keeps its traceback.
    """
    try:
        status = run(argv)
        if sys.stdout is not None:  # None: the shell closed it, >&-
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        return 141  # 128 + SIGPIPE, as the shell reports it
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not is_out_of_memory(e):
            raise  # a mistake of ours
        message = " ".join(str(e).split()) or "out of memory"  # a MemoryError has no words
        print(f"{name}: {message[:350]}", file=sys.stderr)
        return 2
