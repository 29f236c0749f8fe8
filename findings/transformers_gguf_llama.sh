#!/bin/bash
# transformers 5.23.0 reads a LLaMA from a GGUF file without its position scaling and without its biases.
#
# Beside its weights, a GGUF file of the architecture "llama" may hold a factor by which positions are scaled
# (rope.scaling), since Llama 3.1 a divisor for each rotary speed (rope_freqs.weight), and biases of q, k and v.
# llama.cpp applies them. from_pretrained(gguf_file=...) loads such a file and leaves them out, without a warning: the
# model that it returns is another function. The files here are written by gguf 0.19.0, with one of the three each.
#
# Output seen (what is in the file, what was loaded):
#   rope.scaling.factor 4        rope_parameters {'rope_theta': 10000.0, 'rope_type': 'default'}
#   rope_freqs.weight 1 2 4 8    speeds 1 0.1 0.01 0.001
#   blk.0.attn_k.bias            attention_bias False and the bias is None
#   warnings: none
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'END'
import logging
import sys
import warnings

import gguf
import numpy as np
from transformers import LlamaForCausalLM
from transformers.utils import logging as their_logging

N_EMBD, N_HIDDEN, N_HEAD = 32, 64, 4
D_HEAD = N_EMBD // N_HEAD
VOCABULARY = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
folder = sys.argv[1]
dice = np.random.default_rng(0)


def add(writer, name, *shape):
    writer.add_tensor(name, dice.standard_normal(shape).astype(np.float32))


def write(feature):
    """A LLaMA of one layer with random weights and, of what a GGUF may hold beside them, one thing."""
    writer = gguf.GGUFWriter(f"{folder}/llama.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_HIDDEN)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_rope_freq_base(10000.0)
    if feature == "scaling":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add(writer, "token_embd.weight", len(VOCABULARY), N_EMBD)
    add(writer, "output_norm.weight", N_EMBD)
    if feature == "divisors":
        writer.add_tensor("rope_freqs.weight", np.array([1, 2, 4, 8], np.float32))
    for name in ("q", "k", "v"):
        add(writer, f"blk.0.attn_{name}.weight", N_EMBD, N_EMBD)
        if feature == "biases":
            add(writer, f"blk.0.attn_{name}.bias", N_EMBD)
    add(writer, "blk.0.attn_output.weight", N_EMBD, N_EMBD)
    add(writer, "blk.0.ffn_gate.weight", N_HIDDEN, N_EMBD)
    add(writer, "blk.0.ffn_up.weight", N_HIDDEN, N_EMBD)
    add(writer, "blk.0.ffn_down.weight", N_EMBD, N_HIDDEN)
    add(writer, "blk.0.attn_norm.weight", N_EMBD)
    add(writer, "blk.0.ffn_norm.weight", N_EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


told = []


class Keep(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())


def load(feature):
    write(feature)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LlamaForCausalLM.from_pretrained(folder, gguf_file="llama.gguf")
    told.extend(str(w.message) for w in caught)
    return model


their_logging.add_handler(Keep(logging.WARNING))
their_logging.set_verbosity_warning()
their_logging.disable_progress_bar()
rope = load("scaling").config.rope_parameters
speeds = load("divisors").model.rotary_emb.inv_freq
model = load("biases")
bias = model.model.layers[0].self_attn.k_proj.bias
told = [text for text in told if "rope" in text or "bias" in text or "not used" in text or "unexpected" in text]
print("rope.scaling.factor 4        rope_parameters", rope)
print("rope_freqs.weight 1 2 4 8    speeds", *(f"{speed:g}" for speed in speeds.tolist()))
print("blk.0.attn_k.bias            attention_bias", model.config.attention_bias, "and the bias is", bias)
print("warnings:", *(told or ["none"]))
plain = 10000.0 ** (-np.arange(0, D_HEAD, 2) / D_HEAD)
left_out = rope["rope_type"] == "default" and "factor" not in rope and np.allclose(speeds, plain) and bias is None
sys.exit(not (left_out and not told))
END
