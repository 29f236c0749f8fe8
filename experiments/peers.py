"""What bench.py and generation.py race: models of one shape with random weights, ours, PEFT's and transformers'."""

import warnings
from functools import partial

import torch
from torch.nn import functional as F

from ia3 import attach
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from tools import hf_llama
from train import lm_loss

SHAPES = {  # name: (block_size) -> config
    "base": partial(GPTConfig, vocab_size=257, n_layer=6, n_head=6, n_embd=192),
    "6x384": partial(GPTConfig, vocab_size=257, n_layer=6, n_head=6, n_embd=384),
    "124M": partial(GPTConfig, vocab_size=50257, n_layer=12, n_head=12, n_embd=768),
    "SmolLM2": partial(
        LlamaConfig,
        vocab_size=49152,
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        n_embd=576,
        n_hidden=1536,
        rope_base=1e5,
        norm_eps=1e-5,
        tied=True,
    ),
    "350M": partial(GPTConfig, vocab_size=50257, n_layer=24, n_head=16, n_embd=1024),
    "1.5B": partial(GPTConfig, vocab_size=50257, n_layer=48, n_head=25, n_embd=1600),
}
FULL, OURS = "full fine-tuning", "(IA)³"
AROUND_OURS = "PEFT (IA)³ around our model"
TRAINING = (
    FULL,
    OURS,
    AROUND_OURS,
    "PEFT (IA)³, gelu_pytorch_tanh",
    "PEFT (IA)³, gelu_new",
    "PEFT LoRA, gelu_pytorch_tanh",
    "PEFT LoRA, gelu_new",
)
TRAINING_LLAMA = (FULL, OURS, AROUND_OURS, "PEFT (IA)³", "PEFT LoRA")
HEAD_EVERYWHERE = "(IA)³, the head everywhere"
COMPLETIONS = (HEAD_EVERYWHERE, OURS, "PEFT (IA)³")


def their_packages():
    """Return the modules (peft, transformers). Raises ValueError where they are not installed."""
    try:
        import peft
        import transformers
    except ImportError as e:
        raise ValueError(f"{e.name} is not installed: pip install -r requirements-dev.txt") from None
    transformers.logging.set_verbosity_error()  # of a vocabulary of 257, it misses GPT-2's last token
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what PEFT still calls there
    return peft, transformers


def our_model(config):
    """A GPT or a Llama, random weights."""
    return GPT(config) if isinstance(config, GPTConfig) else Llama(config)


def their_model(config, **more):
    """transformers' model of the same shape, random weights. more: of its configuration."""
    _, transformers = their_packages()
    if isinstance(config, GPTConfig):
        sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=config.block_size, **sizes | more))
    with torch.device("meta"):
        about, _ = hf_llama.describe(Llama(config))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**about | more))


def their_loss(model, x, y):
    y = y.masked_fill(y < 0, -100)  # their mark of what is no target
    return model(input_ids=x, labels=y, shift_labels=y).loss


def loss_by_all_logits(model, x, y):
    """lm_loss, with the head applied to all positions, whether they have a target or not."""
    logits, _ = model(x)  # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1)


def build(name, config, device, dtype):
    """Return a contestant of TRAINING, TRAINING_LLAMA or COMPLETIONS: its model, random weights and vectors of ones,
    and its loss(model, x, y).

    A frozen base is stored in dtype; vectors, LoRA's matrices and what is trained in full are float32.
    """
    with torch.device(device):
        if name == FULL:
            return our_model(config), lm_loss
        if name in (OURS, HEAD_EVERYWHERE):
            model = our_model(config).to(dtype)
            attach(model)
            return model, lm_loss if name == OURS else loss_by_all_logits
        if name == AROUND_OURS:
            base = our_model(config)
            loss_fn = lm_loss
        else:
            settings = {"use_cache": False, "attn_implementation": "sdpa"}
            if isinstance(config, GPTConfig):
                settings |= {"activation_function": name.partition(", ")[2]}
                settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            base = their_model(config, **settings)
            loss_fn = their_loss
        peft, _ = their_packages()
        return peft.get_peft_model(base.to(dtype), adapter(name, config)).train(), loss_fn


def adapter(name, config):
    """PEFT's configuration of a contestant's method."""
    peft, _ = their_packages()
    kind = {}
    if name != AROUND_OURS:
        kind = {"task_type": "CAUSAL_LM", "fan_in_fan_out": isinstance(config, GPTConfig)}  # weights as (in, out)
    if isinstance(config, GPTConfig):
        scaled = ["attn.c_attn", "mlp.c_proj"]
        hidden = ["mlp.c_proj"]
        by_lora = ["attn.c_attn"]
    else:
        scaled = ["k_proj", "v_proj", "down_proj"]
        hidden = ["down_proj"]
        by_lora = ["q_proj", "v_proj"]
    if "LoRA" in name:
        return peft.LoraConfig(r=4, target_modules=by_lora, **kind)
    return peft.IA3Config(target_modules=scaled, feedforward_modules=hidden, **kind)
