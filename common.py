"""What the scripts share and no reader needs first: checkpoints, whole files, devices, and how a mistake is told."""

import os
import sys
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch

from data import Tokenizer
from model import GPT, GPTConfig

# what the vocabulary's size tells where a checkpoint, such as nanoGPT's, does not: 257 is the 256 bytes and one that
# ends a text, 50304 is GPT-2's 50257 rounded up to a multiple of 64
TOKENIZERS = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}


# --- a checkpoint: nanoGPT's dict plus 'tokenizer' ---


def load(path, dtype=torch.float32):
    """Read a checkpoint file, ours or nanoGPT's. Returns a GPT or a Llama, on the CPU, in eval mode.

    dtype: what it is held in; None: as it is in the file. Raises OSError where there is no such file and ValueError
    where it holds no such model. tools/convert.py makes such a file of foreign ones.
    """
    checkpoint = load_file(path)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is no checkpoint of ours or nanoGPT's; python -m tools.convert makes one of others")
    try:
        weights = {
            name.removeprefix("_orig_mod."): t  # torch.compile's prefix
            for name, t in checkpoint["model"].items()
            if not name.endswith(".attn.bias")  # the causal mask, which nanoGPT keeps without flash attention
        }
        if "n_kv_head" in checkpoint["model_args"]:  # a Llama's
            from llama import Llama, LlamaConfig  # here, so that all else works without llama.py

            config = LlamaConfig(**checkpoint["model_args"])
            model = empty_model(Llama, config, weights)
            embedding = model.model.embed_tokens
            tied = config.tied
        else:
            config = GPTConfig(**checkpoint["model_args"])
            model = empty_model(GPT, config, weights)
            embedding = model.transformer.wte
            tied = True
        for name, empty in model.state_dict().items():
            if name in weights:  # else load_state_dict says so
                t = check_weight(weights[name], name, empty.shape)
                weights[name] = t.to(dtype or t.dtype, copy=True)  # a copy: nothing stays on the disk
        model.load_state_dict(weights, assign=True)
        if tied:
            if not torch.equal(embedding.weight, model.lm_head.weight):
                raise ValueError("the head is not the embedding, and here they are one matrix")
            embedding.weight = model.lm_head.weight  # one matrix again
        tokenizer = checkpoint.get("tokenizer", TOKENIZERS.get(config.vocab_size))
        if tokenizer is not None:
            model.tokenizer = Tokenizer(tokenizer, config.vocab_size)
    except (TypeError, AttributeError, KeyError, RuntimeError, ValueError, OverflowError) as e:
        raise ValueError(f"{path} is not a checkpoint: {str(e).splitlines()[-1].strip()}") from None
    return model.eval()


def save(model, path):
    """Write model's checkpoint, the vectors left out: a base stays a base."""
    weights = {name: t for name, t in model.state_dict().items() if not name.startswith("ia3.")}
    tokenizer = None if model.tokenizer is None else model.tokenizer.about
    with replace_file(path) as f:
        torch.save({"model": weights, "model_args": asdict(model.config), "tokenizer": tokenizer}, f)


def empty_model(model_class, config, names):
    """Return model_class(config) without memory for its weights. ValueError for more layers than names of tensors."""
    if config.n_layer > len(names):  # before anything is made for each of them
        raise ValueError(f"n_layer is {config.n_layer}, but there are only {len(names)} tensors")
    with torch.device("meta"):
        return model_class(config)


def check_weight(t, name, shape=None):
    """Return t. Raises ValueError, with its name, unless it is a plain tensor of finite floats; of shape, if given."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name} is no tensor, but a {type(t).__name__}")
    if t.dtype not in dtypes or t.layout != torch.strided or t.is_nested or t.is_meta:
        raise ValueError(f"{name} is no plain tensor of floats, but {t.dtype}, {t.layout} on {t.device}")
    if shape is not None and t.shape != shape:  # before its values are read: a small file may claim any shape
        raise ValueError(f"{name} is {tuple(t.shape)}, where {tuple(shape)} is wanted")
    if not t.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return t


def load_file(path):
    """torch.load onto the CPU, running no code of the file's. Raises ValueError for a damaged file or one with code."""
    with open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old pickle format: what is wrong is said below, in one line
        try:
            is_zip = zipfile.is_zipfile(f)  # PyTorch's format since 1.6: tensors stay on disk until they are used
            f.seek(0)
            return torch.load(path if is_zip else f, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as e:  # a damaged file makes torch raise nearly anything
            if isinstance(e, MemoryError) or is_out_of_memory(e):  # or the file claims what it does not hold
                raise ValueError(f"{path} does not fit into memory, or is damaged") from None
            raise ValueError(f"{path} is truncated, carries code, or is no PyTorch file ({type(e).__name__})") from None


# --- files ---


@contextmanager
def replace_file(path, text=False):
    """Open a temporary file beside path for writing, and rename it to path when the block ends.

    So there is the old file or the new one, never half of one; what fails leaves nothing behind. Makes the folder.
    Raises OSError where it cannot be written and ValueError where path is a folder, a device, or empty.
    """
    path = os.fspath(path)
    check_output(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.tmp"
    try:
        with open(partial, "w", encoding="utf-8", newline="") if text else open(partial, "wb") as f:
            yield f
        os.replace(partial, path)
    except RuntimeError as e:  # torch.save's, on a full disk
        raise OSError(f"{path} could not be written: {str(e).splitlines()[0]}") from None
    finally:
        if os.path.lexists(partial):
            os.remove(partial)


def check_output(path, inputs=()):
    """Raise ValueError unless a command that reads the files inputs may write path, and before that path.tmp."""
    path = os.fspath(path)
    if not os.path.basename(path):
        raise ValueError(f"the output {path!r} is empty or a folder's name")
    for name in (path, f"{path}.tmp"):
        if os.path.exists(name) and not os.path.isfile(name):
            raise ValueError(f"{name} is there and is no regular file: choose another output")
        for other in inputs:
            if os.path.realpath(other) == os.path.realpath(name):
                raise ValueError(f"writing {path} would replace {other}, which this command reads")


def read_shapes(file):
    """Return {name: shape} of an .npz's arrays but 'about', from their headers: a small file can unfold to gigabytes.

    file: what np.load returns. Raises ValueError for an 'about' of more than 64 KiB, and where a header is damaged.
    """
    shapes = {}
    for name in file.files:
        with file.zip.open(f"{name}.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if name != "about":
            shapes[name] = shape
        elif shape != () or dtype.itemsize > 2**16:
            raise ValueError("'about' is too long")
    return shapes


# --- devices ---


def pick_device(name="auto", dtype="auto"):
    """Return the torch.device and the name of the dtype that 'auto' stands for. Raises ValueError for one not here.

    A device is cpu, cuda, cuda:1, mps; auto is cuda or cpu, and bfloat16 on a GPU that has it, else float32. A GPU
    becomes the process's current one, and float32 products on it become TF32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's: a GPU a process
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        why = str(e).splitlines()[0].partition(". ")[0]  # a sentence: torch may list all that it has
        raise ValueError(f"device {name!r} is not here: {why}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what torchrun's processes exchange goes over it
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return device, dtype


# --- the end of every script ---


def exit_status(name, run, argv, stopped="stopped"):
    """Do run(argv), the whole of the script called name, and return its exit status.

    What is wrong with the input is one line on stderr and 2; Ctrl-C is 130, and says stopped. Anything else is a
    mistake of ours and keeps its traceback.
    """
    try:
        status = run(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not is_out_of_memory(e):
            raise  # a mistake of ours
        text = " ".join(str(e).split()) or "out of memory"  # a MemoryError has no words
        print(f"{name}: {text}", file=sys.stderr)
        return 2


def is_out_of_memory(error):
    """Whether a RuntimeError says that a GPU's memory or the CPU's is full."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
