"""Sites beside the paper's: powers of two at them are weights multiplied by hand, bit for bit; and they learn."""

import copy

import pytest
import torch

from conftest import make_gpt, make_idx, make_llama
from experiments.sites import ORDER, OTHER, attach_sites
from ia3 import SITES
from model import GPT
from train import check_trained, lm_loss


def powers_of_two(l):
    """Fill l with ±1/4 to ±4."""
    dice = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, l.shape, generator=dice) * 2 - 1
    with torch.no_grad():
        l.copy_(sign * 2.0 ** torch.randint(-2, 3, l.shape, generator=dice))


def rows_of(block, site, is_gpt):
    """The linear map that a site follows, and how many of its rows."""
    if site == "q":
        linear = block.attn.c_attn if is_gpt else block.self_attn.q_proj
        return linear, linear.in_features
    if site == "o":
        linear = block.attn.c_proj if is_gpt else block.self_attn.o_proj
    else:
        linear = block.mlp.c_fc if is_gpt else block.mlp.gate_proj
    return linear, linear.out_features


@pytest.mark.parametrize("site", ["q", "o", "pre"])
def test_a_site_behind_a_linear_map_is_that_maps_rows_multiplied(make_model, site):
    model = make_model()
    folded = copy.deepcopy(model)
    l = attach_sites(model, [site]).get_parameter(f"l_{site}")
    idx = make_idx(model)
    assert torch.equal(model(idx)[0], folded(idx)[0])  # ones are the base
    powers_of_two(l)
    with torch.no_grad():
        for block, row in zip(folded.blocks, l, strict=True):
            linear, n = rows_of(block, site, isinstance(model, GPT))
            linear.weight[:n] *= row.unsqueeze(1)
            linear.bias[:n] *= row
    assert torch.equal(model(idx)[0], folded(idx)[0])


def test_the_residual_stream_is_scaled_behind_every_block(make_model):
    model = make_model()
    plain = copy.deepcopy(model)
    l = attach_sites(model, ["x"]).l_x
    powers_of_two(l)
    for block, row in zip(plain.blocks, l, strict=True):
        forward = block.forward
        block.forward = lambda *args, forward=forward, row=row: row * forward(*args)
    idx = make_idx(model)
    assert torch.equal(model(idx)[0], plain(idx)[0])


def test_each_site_has_its_width_and_only_those_asked_for_learn(make_model):
    model = make_model()
    vectors = attach_sites(model, ["q", "v", "x", "pre"])
    C = model.config.n_embd
    _, kv, hidden = model.config.widths
    widths = {name: tuple(p.shape) for name, p in vectors.matrices().items()}
    assert widths == {"l_q": (2, C), "l_v": (2, kv), "l_x": (2, C), "l_pre": (2, hidden)}
    check_trained(model)
    idx = make_idx(model)
    lm_loss(model, idx, idx).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith("ia3.")
    assert all((p.grad != 0).any() for p in vectors.parameters())


def test_on_gpt2_queries_and_keys_are_one_function():
    """l_q ⊙ Q by K is Q by l_q ⊙ K, bit for bit where l_q are powers of two; with a rotation between it is not."""
    for make, same in ((make_gpt, True), (make_llama, False)):
        sizes = {} if same else {"n_kv_head": 4}
        on_q = make(**sizes)
        on_k = copy.deepcopy(on_q)
        powers_of_two(attach_sites(on_q, ["q"]).l_q)
        powers_of_two(attach_sites(on_k, ["k"]).l_k)
        idx = make_idx(on_q)
        assert torch.equal(on_q(idx)[0], on_k(idx)[0]) == same


def test_orders_sites_are_the_papers_and_the_others():
    assert set(ORDER) == set(SITES) | OTHER.keys() and len(ORDER) == len(SITES) + len(OTHER)
