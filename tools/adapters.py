"""One task's vectors as PEFT's (IA)³ adapters, and back.

On LLaMA PEFT's defaults are the paper's, one to one: k_proj, v_proj, and down_proj, whose input is scaled. On GPT-2 it
has one vector over all of c_attn's output, [l_q, l_k, l_v], where (IA)³ has l_k and l_v.
"""

import math
import os

import torch

import disk
from common import plain_name
from ia3 import IA3, fingerprint
from model import GPTConfig
from tools.files import find, import_safetensors, read_json, read_tensors, write_json


def to_peft(vectors, folder, base):
    """Write one task's vectors as a PEFT (IA)³ adapter folder for their kind of model; base names the model.

    Raises ValueError for stacked vectors, for a folder that holds a model, and where the safetensors package is not
    installed.
    """
    safetensors = import_safetensors()
    if os.path.exists(f"{folder}/config.json"):
        raise ValueError(f"{folder} holds a model, which transformers would then open with these vectors on it")
    if vectors.is_stacked():
        raise ValueError("only one task's vectors make an adapter")
    is_gpt2 = isinstance(vectors.config, GPTConfig)
    top, layers = layer_names(is_gpt2)
    tensors = {}
    for i, layer in enumerate(vectors.per_layer()):
        layer = [None if l is None else l.detach().cpu().float() for l in layer]
        modules = gpt2_modules(*layer) if is_gpt2 else llama_modules(*layer)
        for module, l in modules.items():
            tensors[f"base_model.model.{top}{layers}.{i}.{module}.ia3_l"] = l
    about = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(modules),
        "feedforward_modules": [m for m in modules if m.startswith("mlp.")],  # those whose input is scaled
        "fan_in_fan_out": is_gpt2,  # Conv1D
        "inference_mode": True,
    }
    # PEFT passes over the fingerprint; from_peft refuses another base by it
    metadata = {"format": "pt", "fingerprint": vectors.fingerprint or ""}
    with disk.replace_file(f"{folder}/adapter_model.safetensors") as f:
        f.write(safetensors.torch.save(tensors, metadata))
    write_json(about, f"{folder}/adapter_config.json")


def layer_names(is_gpt2):
    """What the names of a layer's tensors begin with: the model without its head, and the list of its layers in it."""
    return ("transformer.", "h") if is_gpt2 else ("model.", "layers")


def gpt2_modules(l_k, l_v, l_ff):
    """{module: PEFT's vector over it} in a layer of GPT-2; the queries' part, and what is no site, is ones."""
    modules = {}
    if l_k is not None or l_v is not None:
        ones = torch.ones_like(l_v if l_k is None else l_k)
        parts = [ones if l is None else l for l in (None, l_k, l_v)]
        modules["attn.c_attn"] = torch.cat(parts).unsqueeze(1)  # (3·n_embd, 1): over its output
    if l_ff is not None:
        modules["mlp.c_proj"] = l_ff.unsqueeze(0)  # (1, 4·n_embd): over its input
    return modules


def llama_modules(l_k, l_v, l_ff):
    """{module: PEFT's vector over it} in a layer of LLaMA."""
    modules = {}
    if l_k is not None:
        modules["self_attn.k_proj"] = l_k.unsqueeze(1)  # (n_kv_head · d_head, 1): over its output
    if l_v is not None:
        modules["self_attn.v_proj"] = l_v.unsqueeze(1)
    if l_ff is not None:
        modules["mlp.down_proj"] = l_ff.unsqueeze(0)  # (1, n_hidden): over its input
    return modules


def adapter_files(folder):
    """Return adapter_config.json and the vectors of a PEFT adapter. Raises OSError where these are missing."""
    return f"{folder}/adapter_config.json", find(folder, "adapter_model.safetensors", "adapter_model.bin")


def from_peft(folder, model):
    """Read a PEFT (IA)³ adapter folder made for model. Returns IA3 (attach it) and l_q (n_layer, n_embd) or None.

    On GPT-2 PEFT scales queries too. (l_q ⊙ q)·(l_k ⊙ k) = q·(l_q ⊙ l_k ⊙ k), so l_q is folded into l_k: the same
    function. On LLaMA a vector over up_proj's output scales the same channels as one over down_proj's input, so l_ff is
    their product. Products are taken in float64 and rounded once to float32. A layer without a vector gets ones. Raises
    OSError where a file is missing and ValueError for an adapter of another kind or base, or damaged.
    """
    config_path, path = adapter_files(folder)
    about = read_json(config_path)
    if about.get("peft_type") != "IA3":
        raise ValueError(f"{config_path} describes an adapter of type {about.get('peft_type')!r}, not 'IA3'")
    tensors, metadata = read_tensors(path)
    theirs = metadata.get("fingerprint")
    ours = fingerprint(model)
    if theirs and theirs != ours:
        raise ValueError(f"{path} was made for another base of this shape ({theirs[:8]}, not {ours[:8]})")
    try:
        vectors, l_q = read_vectors(tensors, model.config)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    vectors.fingerprint = ours
    return vectors, l_q


def read_vectors(tensors, config):
    """from_peft, of an adapter's {name: tensor} and the base's config."""
    is_gpt2 = isinstance(config, GPTConfig)
    top, layers = layer_names(is_gpt2)
    tensors = {plain_name(name).removeprefix("base_model.model.").removeprefix(top): t for name, t in tensors.items()}

    def take(module, shape):
        """Take a module's vectors out of tensors. Returns (n_layer, width) in float64, or None without any."""
        names = [f"{layers}.{i}.{module}.ia3_l" for i in range(config.n_layer)]
        if not any(name in tensors for name in names):
            return None
        found = []
        for name in names:
            t = tensors.pop(name) if name in tensors else torch.ones(shape)
            found.append(disk.check_weight(t, name, shape).flatten().double())
        return torch.stack(found)

    k_width, v_width, ff_width = config.widths
    l_q = l_k = l_v = None
    if is_gpt2:
        qkv = take("attn.c_attn", (3 * k_width, 1))
        l_ff = take("mlp.c_proj", (1, ff_width))
        if qkv is not None:
            l_q, l_k, l_v = qkv.split(k_width, dim=1)  # (n_layer, n_embd) each
            l_k = l_q * l_k
    else:
        l_k = take("self_attn.k_proj", (k_width, 1))
        l_v = take("self_attn.v_proj", (v_width, 1))
        factors = [take("mlp.up_proj", (ff_width, 1)), take("mlp.down_proj", (1, ff_width))]
        factors = [l for l in factors if l is not None]
        l_ff = math.prod(factors) if factors else None
    matrices = {"k": l_k, "v": l_v, "ff": l_ff}
    sites = [site for site, l in matrices.items() if l is not None]
    if tensors or not sites:
        raise ValueError(f"{next(iter(tensors), 'nothing in it')} is not an (IA)³ vector of this base")
    vectors = IA3(config, sites)
    for site in sites:
        p = getattr(vectors, f"l_{site}")
        p.data = disk.check_weight(matrices[site].float(), f"l_{site}")  # a product may have overflown
    return vectors, l_q
