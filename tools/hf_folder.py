"""A Hugging Face folder in and out: config.json, the weights in one file or several, and the tokenizer.

What the two models' config.json and weights say is in hf_gpt2.py and hf_llama.py, the tokenizer in hf_tokenizer.py.
"""

import os

import torch

import common
import disk
from data.tokenizer import Tokenizer
from model import GPT
from tools import hf_gpt2, hf_llama
from tools.files import each_tensor, find, read_json, write_json
from tools.hf_tokenizer import read_tokenizer, tokenizer_files, write_tokenizer

KINDS = ("gpt2", *hf_llama.KINDS)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_weights(path):
    """Return the folder of config.json, and {path: names of its tensors, or None for all} of the weights.

    path: a folder, or a file of weights or an index of several with config.json beside it. Raises OSError if one of
    them is missing, and ValueError for an index that is none.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        folder = path
        path = find(folder, *WEIGHTS)
    elif os.path.isfile(path):
        folder = os.path.dirname(path) or "."
    else:
        raise FileNotFoundError(f"no file or folder {path}")
    return folder, shards(path) if path.endswith(".index.json") else {path: None}


def shards(index_path):
    """Return {path: names of its tensors} of an index of several files, which are beside it.

    Raises ValueError where it is no such index, or names a file elsewhere.
    """
    names_of = {}
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith((".safetensors", ".bin")):
            raise ValueError(f"{index_path}: {file!r} is not a .safetensors or .bin file of its folder")
        names_of.setdefault(os.path.join(os.path.dirname(index_path), file), []).append(name)
    return names_of


def input_files(path):
    """Every file that from_hf may read."""
    folder, files = find_weights(path)
    names = ["config.json", "generation_config.json", "chat_template.jinja", *tokenizer_files(folder)]
    names += [name for name in WEIGHTS if name.endswith(".index.json")]
    return [path, *files, *[f"{folder}/{name}" for name in names]]


def from_hf(path):
    """Read a model in Hugging Face's layout: a folder, or a weights' file or index with its config.json beside it.

    Returns a GPT, in float32 and without dropout, or a Llama, in the dtype that is stored; on the CPU, in eval mode.
    Its tokenizer is tokenizer.json's, or vocab.json's and merges.txt's; in a folder without any file of a tokenizer a
    GPT's is guessed from its vocabulary's size, and a Llama's is None.
    Raises OSError for what is not there and ValueError for what is neither, or one that ours do not compute.
    """
    folder, files = find_weights(path)
    config_path = f"{folder}/config.json"
    about = read_json(config_path)
    kind = about.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{config_path} describes a model of type {kind!r}: known are {', '.join(KINDS)}")
    try:
        config = hf_gpt2.gpt2_config(about) if kind == "gpt2" else hf_llama.llama_config(about)
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"{config_path}: {e}") from None

    tokenizer = None
    if tokenizer_files(folder):
        tokenizer = read_tokenizer(folder, config.vocab_size, about)
    elif kind == "gpt2" and config.vocab_size in common.TOKENIZERS:
        tokenizer = Tokenizer(common.TOKENIZERS[config.vocab_size], config.vocab_size)

    try:
        if kind == "gpt2":
            model = hf_gpt2.gpt2(config, dict(each_tensor(files)))
        else:
            model = hf_llama.llama(config, files, has_output_bias=kind != "qwen2")
    except (ValueError, TypeError, RuntimeError) as e:  # the latter two of sizes that no tensor can have
        where = folder if len(files) > 1 else next(iter(files))  # many shards' names would fill the line
        raise ValueError(f"{where}: {str(e).splitlines()[0]}") from None
    model.tokenizer = tokenizer
    return model


def to_hf(model, folder):
    """Write model as a folder that transformers opens, as GPT2LMHeadModel or LlamaForCausalLM, and that from_hf opens.

    With it goes the tokenizer, where it is a byte-level BPE of the model's own. Raises ValueError for a model with
    vectors (merge them first), and for a folder with other files that would be opened with it or instead of it.
    """
    if model.ia3 is not None:
        raise ValueError("a model with vectors has no place in Hugging Face's layout: merge them first")
    tokenizer = model.tokenizer
    has_bpe = tokenizer is not None and isinstance(tokenizer.about, dict)
    written = ["config.json"]
    if has_bpe:
        written += ["tokenizer.json", "tokenizer_config.json"]
    there = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted(there):
        if name.endswith((".json", ".safetensors", ".jinja")) and name not in written:
            what = f"another model's {name}, which would be opened instead of this one, or with it"
            raise ValueError(f"{folder} holds {what}")

    about, weights = hf_gpt2.describe(model) if isinstance(model, GPT) else hf_llama.describe(model)
    if tokenizer is not None:
        about["bos_token_id"] = tokenizer.bos
        about["eos_token_id"] = tokenizer.eos[0] if len(tokenizer.eos) == 1 else tokenizer.eos or None
    elif isinstance(model, GPT):
        about |= {"bos_token_id": None, "eos_token_id": None}  # unknown; a LLaMA's defaults are sentencepiece's 1 and 2
    if has_bpe:
        write_tokenizer(tokenizer, folder)
    with disk.replace_file(f"{folder}/pytorch_model.bin") as f:
        torch.save(weights, f)
    write_json(about, f"{folder}/config.json")
