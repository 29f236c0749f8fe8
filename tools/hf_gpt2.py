"""GPT-2 in Hugging Face's layout: what its config.json and weights say, in and out.

One spelling differs, and it is all there is to convert: GPT-2's Conv1D stores a linear map's weight as (in, out), ours
is (out, in).
"""

import torch

import common
import disk
from model import GPT, GPTConfig
from tools.files import check_names, widest_dtype

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
    tensors = {common.plain_name(name).removeprefix("transformer."): t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not name.endswith(MASKS)}
    if "wte.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["wte.weight"])  # tied, so it need not be there
    model = common.empty_model(GPT, config, len(tensors))
    ours = {name.removeprefix("transformer."): name for name in model.state_dict()}
    check_names(tensors, ours, "GPT-2", config.n_layer)
    weights = {}
    for name, t in tensors.items():
        shape = model.get_parameter(ours[name]).shape
        if name.endswith(CONV1D):
            t = disk.check_weight(t, name, shape[::-1]).t()
        else:
            t = disk.check_weight(t, name, shape)
        # a copy: nothing stays on the disk
        weights[ours[name]] = t.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    common.load_weights(model, weights)
    return model.eval()


def describe(model):
    """Return the config.json that transformers' GPT2LMHeadModel reads, and its weights {name: tensor}.

    Hugging Face's GPT-2 always has biases: where ours has none they are zeros.
    """
    config = model.config
    weights = {}
    for name, t in model.transformer.state_dict(prefix="transformer.").items():  # without the tied head
        weights[name] = t.t().contiguous() if name.endswith(CONV1D) else t
        if not config.bias and not name.endswith(("wte.weight", "wpe.weight")):
            weights[name.replace("weight", "bias")] = t.new_zeros(t.size(0))
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
        "torch_dtype": widest_dtype(weights),
    }
    return about, weights
