"""LLaMA in Hugging Face's layout: what its config.json and weights say, in and out. transformers' names are ours."""

import torch

import common
import disk
from llama import ROPE_NUMBERS, Llama, LlamaConfig
from tools.files import check_names, each_tensor, read_tensors, widest_dtype

KINDS = ("llama", "mistral", "qwen2")  # the same model, but for a window; in Qwen2 only q, k and v have biases
FREQUENCIES = ".rotary_emb.inv_freq"  # the rotation's speeds, kept as a weight by older versions


def llama_config(about):
    """The LlamaConfig that config.json describes, one of KINDS. ValueError or TypeError for what ours does not do.

    The rotary parameters have two spellings: transformers 5 has rope_parameters, with the base as rope_theta in it;
    before, rope_theta stood beside rope_scaling. What is not there has transformers' default.
    """
    if about["model_type"] == "mistral":
        about = {"sliding_window": 4096, "num_key_value_heads": 8} | about  # its defaults
    elif about["model_type"] == "qwen2":
        about = {"num_key_value_heads": 32, "attention_bias": True} | about
        if not about.get("use_sliding_window"):
            about["sliding_window"] = None
    theirs = about.get("rope_scaling") or about.get("rope_parameters") or {}
    rope = {"rope_theta": about.get("rope_theta", 10000.0)} | theirs
    kind = rope.get("rope_type", rope.get("type", "default"))  # the latter is an older spelling yet
    if rope.get("type", kind) != kind:
        raise ValueError(f"the rotation is {kind!r} by rope_type and {rope['type']!r} by type")
    scaling = None
    if kind != "default":  # LlamaConfig refuses all but 'llama3'
        scaling = {"rope_type": kind} | {name: rope[name] for name in ROPE_NUMBERS if name in rope}
    n_head = about.get("num_attention_heads")
    n_kv_head = about.get("num_key_value_heads")
    config = LlamaConfig(
        block_size=about.get("max_position_embeddings"),
        vocab_size=about.get("vocab_size"),
        n_layer=about.get("num_hidden_layers"),
        n_head=n_head,
        n_kv_head=n_head if n_kv_head is None else n_kv_head,
        n_embd=about.get("hidden_size"),
        n_hidden=about.get("intermediate_size"),
        rope_base=rope["rope_theta"],
        norm_eps=about.get("rms_norm_eps", 1e-6),
        tied=about.get("tie_word_embeddings", False),
        rope_scaling=scaling,
        attention_bias=about.get("attention_bias", False),
        mlp_bias=about.get("mlp_bias", False),
    )
    computed = {  # key: the values that our Llama computes, LLaMA's default first
        "hidden_act": ("silu", "swish"),
        "head_dim": (config.n_embd // config.n_head, None),
        "partial_rotary_factor": (None, 1),
        "sliding_window": (None,),
        "use_sliding_window": (None, False),
        "num_experts": (None,),
        "num_local_experts": (None,),
        "quantization_config": (None,),
    }
    for key, values in computed.items():
        value = (about | rope).get(key, values[0])
        if value not in values:
            raise ValueError(f"{key} is {value!r}, and this LLaMA has only {values[0]!r}")
    for layer in about.get("layer_types") or []:
        if layer != "full_attention":
            raise ValueError(f"a layer is {layer!r}, and this LLaMA has only 'full_attention'")
    return config


def llama(config, files, has_output_bias=True):
    """Build a Llama from {path: names of its tensors, or None for all}, in the dtypes that are stored.

    One file is open at a time. has_output_bias: whether o_proj has biases where q, k and v have; if not, ours are
    zeros. Raises ValueError with the first name, shape or dtype that is not LLaMA's, or that holds NaN or infinity.
    """
    names = []
    for path, given in files.items():
        names += given or list(read_tensors(path)[0])  # their tensors stay on the disk
    names = [full_name(name) for name in names if not name.endswith(FREQUENCIES)]
    model = common.empty_model(Llama, config, len(names))
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    # what need not be there
    tied = ["lm_head.weight"] if config.tied else []
    zeros = [] if has_output_bias else [name for name in shapes if name.endswith("o_proj.bias")]
    check_names([*names, *tied, *zeros], shapes, "LLaMA", config.n_layer)

    weights = {}
    for name, t in each_tensor(files):
        name = full_name(name)
        if name in shapes:  # not FREQUENCIES
            t = disk.check_weight(t, name, shapes[name])
            weights[name] = t.clone(memory_format=torch.contiguous_format)  # nothing stays on the disk
    for name in tied:
        weights.setdefault(name, weights["model.embed_tokens.weight"])
    for name in zeros:
        dtype = weights[name.replace("bias", "weight")].dtype
        weights.setdefault(name, torch.zeros(shapes[name], dtype=dtype))
    common.load_weights(model, weights)
    return model.eval()


def full_name(name):
    """The name of a tensor in LlamaForCausalLM; LlamaModel's own, without a head, lack its first word."""
    name = common.plain_name(name)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def describe(model):
    """Return the config.json that transformers' LlamaForCausalLM reads, and its weights {name: tensor}.

    The rotary parameters are in the older of the two spellings, which every version reads.
    """
    config = model.config
    weights = model.state_dict()
    if config.tied:
        del weights["lm_head.weight"]
    about = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "rope_theta": config.rope_base,
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "torch_dtype": widest_dtype(weights),
    }
    return about, weights
