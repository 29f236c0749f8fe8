"""Our Llama against transformers' LlamaForCausalLM, and our (IA)³ on it against PEFT's with its defaults for llama.

Weights are random, biases and RMSNorms included, and copied by name. transformers computes RMSNorm and the rotary table
in float32 whatever the model is held in, so in float64 the fixture `float64` puts float64 ones in their place; its
attention is SDPA, since its own softmax computes in float32 as well.
"""

import math

import pytest
import torch
import transformers
from peft import IA3Config, get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ia3 import attach
from llama import Llama, LlamaConfig
from merge import merge
from sample import generate

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# d_head 8 has the speeds 1, 1/10, 1/100, 1/1000: this keeps the first, slows the last two by 8, the second by less
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32

KINDS = {
    "gqa-1": {"num_key_value_heads": 4},
    "gqa-2": {"num_key_value_heads": 2},
    "gqa-4": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
}


def make_both(kind, dtype=torch.float64):
    """The same weights twice: transformers' model and ours. Logits are of the order of 1."""
    sizes = {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": PLAIN} | KINDS[kind]
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="sdpa", bos_token_id=60, eos_token_id=60,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.15)
            if "norm" in name:
                p.add_(1)
    rope = config.rope_parameters
    ours = Llama(
        LlamaConfig(
            block_size=64, vocab_size=61, n_layer=2, n_head=4, n_kv_head=config.num_key_value_heads, n_embd=32,
            n_hidden=48, rope_base=rope["rope_theta"], norm_eps=1e-5, tied=config.tie_word_embeddings,
            rope_scaling=rope if rope["rope_type"] == "llama3" else None,
            attention_bias=config.attention_bias, mlp_bias=config.mlp_bias,
        )
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())  # strict: transformers' keys are ours
    return theirs.to(dtype).eval(), ours.to(dtype).eval()


@pytest.fixture
def float64(monkeypatch):
    """transformers' RMSNorm and rotary table, in float64; the table by transformers' formulas, not by ours."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def table(self, x, position_ids):
        rope = self.config.rope_parameters
        d_head = self.config.hidden_size // self.config.num_attention_heads
        speed = 1.0 / rope["rope_theta"] ** (torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        if rope["rope_type"] == "llama3":
            length, factor = rope["original_max_position_embeddings"], rope["factor"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            wavelength = 2 * math.pi / speed
            slowed = torch.where(wavelength > length / low, speed / factor, speed)
            smooth = (length / wavelength - low) / (high - low)
            between = (wavelength <= length / low) & (wavelength >= length / high)
            assert between.any() and (wavelength > length / low).any() and (wavelength < length / high).any()
            speed = torch.where(between, (1 - smooth) * slowed / factor + smooth * slowed, slowed)
        angles = position_ids[..., None] * speed
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", table)


def make_batch(rows=3, seed=0):
    dice = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 61, (rows, 65), generator=dice)
    return idx[:, :-1], idx[:, 1:]


def their_loss(theirs, idx, targets):
    return F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())


# float64 rounds at 1e-16; sums of some hundred terms of order 1 through two layers cost two or three digits of that
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_every_gradient_in_float64(kind, float64):
    theirs, ours = make_both(kind)
    idx, targets = make_batch()
    logits, loss = ours(idx, targets)
    expected = theirs(idx).logits
    assert expected.std() > 0.3  # not so small that anything agrees
    assert (logits - expected).abs().max() <= 1e-10
    expected_loss = their_loss(theirs, idx, targets)
    assert abs(loss - expected_loss) <= 1e-10
    expected_loss.backward()
    loss.backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name  # k_proj.bias too: turned by its position, it is no constant
        assert (found[name] - grad).abs().max() <= 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_float32_against_transformers_as_it_is(kind):
    """Root mean square, relative: the two round at other places, some ten roundings of 6e-8 deep."""
    theirs, ours = make_both(kind, torch.float32)
    idx, _ = make_batch()
    with torch.no_grad():
        expected = theirs(idx).logits
        assert (ours(idx)[0] - expected).norm() <= 1e-6 * expected.norm()


def test_greedy_text():
    theirs, ours = make_both("gqa-2", torch.float32)
    prompt = make_batch()[0][:, :4]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(generate(ours, prompt, 40, temperature=0), expected)


# --- (IA)³ ---


def make_peft(theirs, random=True):
    """Wrap transformers' model in PEFT's (IA)³ with its own defaults for llama: k_proj, v_proj, down_proj."""
    peft = get_peft_model(theirs, IA3Config(task_type="CAUSAL_LM")).double().eval()
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for vectors in vectors_of(peft):
            for p in vectors if random else []:
                p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
    return peft


def vectors_of(peft):
    """PEFT's own parameters, (k_proj's, v_proj's, down_proj's) a layer, and nothing of its is left out."""
    layers = peft.base_model.model.model.layers
    vectors = []
    for layer in layers:
        modules = (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.down_proj)
        vectors.append([module.ia3_l["default"] for module in modules])
    assert sum(map(len, vectors)) == len([p for p in peft.parameters() if p.requires_grad])
    return vectors


def copy_vectors(peft, ours):
    """Attach PEFT's vectors to ours, in float64."""
    vectors = attach(ours).double()
    with torch.no_grad():
        for i, (k, v, ff) in enumerate(vectors_of(peft)):
            vectors.l_k[i], vectors.l_v[i], vectors.l_ff[i] = k[:, 0], v[:, 0], ff[0]
    return vectors


def compare(vectors, peft, what):
    """Every one of our vectors against PEFT's; what: which tensor of a parameter is looked at."""
    for i, theirs in enumerate(vectors_of(peft)):
        for ours, p in zip((vectors.l_k, vectors.l_v, vectors.l_ff), theirs, strict=True):
            assert (what(ours)[i] - what(p).flatten()).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_of_the_vectors(kind, float64):
    theirs, ours = make_both(kind)
    peft = make_peft(theirs)
    vectors = copy_vectors(peft, ours)
    idx, targets = make_batch()
    with torch.no_grad():
        expected = peft(idx).logits
        ours.ia3 = None
        assert (ours(idx)[0] - expected).abs().max() > 0.1  # the vectors do something
        ours.ia3 = vectors
        assert (ours(idx)[0] - expected).abs().max() <= 1e-10
    their_loss(peft, idx, targets).backward()
    ours(idx, targets)[1].backward()
    assert vectors.l_k.grad.abs().min() > 0
    compare(vectors, peft, lambda p: p.grad)


def test_ten_steps_give_the_same_vectors_and_losses(float64):
    theirs, ours = make_both("gqa-2")
    peft = make_peft(theirs, random=False)
    vectors = copy_vectors(peft, ours)  # all ones
    options = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0}
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizers = torch.optim.AdamW(trained, **options), torch.optim.AdamW(vectors.parameters(), **options)
    for step in range(10):
        idx, targets = make_batch(seed=step)
        losses = their_loss(peft, idx, targets), ours(idx, targets)[1]
        assert abs(losses[0] - losses[1]) <= 1e-10
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (vectors.l_k - 1).abs().min() > 1e-4  # they did move
    compare(vectors, peft, lambda p: p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["gqa-2", "biases"])
def test_merged_weights(kind, dtype):
    theirs, ours = make_both(kind)
    peft = make_peft(theirs).to(dtype)
    copy_vectors(peft, ours)
    merged = merge(ours.to(dtype)).state_dict()
    expected = peft.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(merged[name], t), name  # one product and one rounding on either side: the same bits
