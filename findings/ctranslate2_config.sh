#!/bin/bash
# ctranslate2 4.8.5 converts transformers 5.23.0's GPT-2 and LLaMA without some switches of their configs.
#
# GPT2Config can leave attention's scores unscaled (scale_attn_weights) or divide them by the layer's number as well
# (scale_attn_by_inverse_layer_idx), and LlamaConfig can name another activation than silu. The converter reads none
# of the three and says nothing: it writes a model that computes another function. Everything else that was tried
# (GPT-2's activations, LLaMA's biases, scaled positions, rotary base and epsilon) arrives.
#
# Output seen: the largest difference of a logit, in float32, where logits have a standard deviation near 0.9
#   gpt2, as it is                                  under 0.0001
#   gpt2, scale_attn_weights False                  0.97
#   gpt2, scale_attn_by_inverse_layer_idx True      0.12
#   llama, as it is                                 under 0.0001
#   llama, attention_bias True, mlp_bias True       under 0.0001
#   llama, hidden_act gelu                          0.73
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    ctranslate2==4.8.5 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - "$folder" <<'END'
import sys

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N = 64
END = "<|endoftext|>"
IDS = [1, 5, 9, 3, 7, 2]
ENDS = {"vocab_size": N, "bos_token_id": N - 1, "eos_token_id": N - 1}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
tokens = [f"w{i}" for i in range(N - 1)] + [END]


def make(kind, settings):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **ENDS, **settings))
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **ENDS, **settings))
    for name, p in model.named_parameters():
        is_norm = ("ln_" in name or "norm" in name) and name.endswith("weight")
        p.data.normal_(1.0 if is_norm else 0.0, 0.15)
    return model.eval()


def difference(kind, settings, number):
    """The largest difference of a logit between transformers and ctranslate2."""
    folder = f"{sys.argv[1]}/{number}"
    model = make(kind, settings)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": END, "eos_token": END, "unk_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}-ct2")
    generator = ctranslate2.Generator(f"{folder}-ct2", compute_type="float32")
    found = np.array(generator.forward_batch([[tokens[i] for i in IDS]]))[0, :, :N]
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    return np.abs(found - wanted).max()


cases = [
    ("gpt2", {}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
]
differences = []
for number, (kind, settings) in enumerate(cases):
    told = ", ".join(f"{name} {value}" for name, value in settings.items()) or "as it is"
    differences.append(difference(kind, settings, number))
    shown = f"{differences[-1]:.2f}" if differences[-1] > 1e-4 else "under 0.0001"
    print(f"{kind + ', ' + told:48s}{shown}")
lost = [difference > 0.01 for difference in differences]
sys.exit(lost != [False, True, True, False, False, True])
END
