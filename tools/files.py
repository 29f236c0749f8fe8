"""What the readers of foreign formats share: JSON, and tensors by name, from one file or from several."""

import json
import os
from functools import reduce

import torch

import disk


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


def write_json(about, path):
    with disk.replace_file(path, text=True) as f:
        json.dump(about, f, indent=2)
        f.write("\n")


def find(folder, *names):
    """Return the path of the first of names that is in folder. Raises OSError where none is."""
    for name in names:
        if os.path.isfile(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}")


# --- tensors ---


def widest_dtype(weights):
    """The name of the widest dtype of {name: tensor}, for config.json: transformers casts all weights to it."""
    return str(reduce(torch.promote_types, {t.dtype for t in weights.values()})).removeprefix("torch.")


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("a .safetensors file needs the safetensors package: pip install safetensors") from None
    return safetensors


def read_tensors(path):
    """Read a .safetensors file, or else a PyTorch file. Returns {name: tensor} and the former's metadata.

    Raises OSError where there is no such file, and ValueError for one that is damaged or holds no tensors by name.
    """
    if not path.endswith(".safetensors"):
        tensors = disk.load_file(path)
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise ValueError(f"{path} holds no tensors by name")
        disk.check_size(tensors, path)
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


def check_names(names, expected, whose, n_layer):
    """Raise ValueError with the first of the expected names of tensors that is not there, or that should not be."""
    for name in expected:
        if name not in names:
            raise ValueError(f"{name} is missing, so this is not a {whose} of {n_layer} layers")
    for name in names:
        if name not in expected:
            raise ValueError(f"{name[:80]} is not {whose}'s")


def each_tensor(files):
    """Yield (name, tensor) of {path: names of its tensors, or None for all}, one file open at a time.

    Raises as read_tensors does, and ValueError where a file has no tensor of a name.
    """
    for path, names in files.items():
        tensors, _ = read_tensors(path)
        for name in names or list(tensors):
            if name not in tensors:
                raise ValueError(f"{path} has no {name}, which should be there by the index")
            yield name, tensors[name]
        del tensors  # before the next file is opened
