"""Sites that the paper leaves alone, scaled from outside by forward hooks, so that the core keeps the paper's three.

A site is a line in OTHER and its place in ORDER; one that is not n_embd wide also needs its width in attach_sites.
ablate.py trains it like k, v and ff. It is not merged.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ia3 import SITES, attach
from model import GPT

OTHER = {  # a site's module in a GPT's block and in a Llama's; '' is the block itself
    "q": ("attn.c_attn", "self_attn.q_proj"),  # l_q ⊙ Q
    "o": ("attn.c_proj", "self_attn.o_proj"),  # l_o ⊙ (W_o y + b_o): what the attention adds to the residual stream
    "pre": ("mlp.c_fc", "mlp.gate_proj"),  # γ(l_pre ⊙ (W_1 x + b_1)): the MLP before its GELU; a Llama's gate
    "x": ("", ""),  # l_x ⊙ x: the residual stream behind a block
}
ORDER = ("q", "k", "v", "o", "pre", "ff", "x")  # as a block computes them


def attach_sites(model, sites):
    """ia3.attach with vectors at any of ORDER. Returns the IA3; its parameters are l_q and so on, too.

    Vectors at OTHER sites are float32 ones, (n_layer, width). They act as long as the model lives.
    """
    vectors = attach(model)
    for site in SITES:
        if site not in sites:
            setattr(vectors, f"l_{site}", None)
    for site in sites:
        if site not in SITES:
            width = model.config.widths[2] if site == "pre" else model.config.n_embd
            l = nn.Parameter(torch.ones(model.config.n_layer, width, device=model.lm_head.weight.device))
            vectors.register_parameter(f"l_{site}", l)
            in_gpt, in_llama = OTHER[site]
            for layer, block in enumerate(model.blocks):
                module = block.get_submodule(in_gpt if isinstance(model, GPT) else in_llama)
                module.register_forward_hook(partial(scale, l, layer))
    return vectors


def scale(l, layer, module, inputs, output):
    """A forward hook: multiply the first channels of output, of a GPT's c_attn the queries, by l[layer] (width,)."""
    l = F.pad(l[layer], (0, output.size(-1) - l.size(-1)), value=1.0)
    return (l * output).to(output.dtype)
