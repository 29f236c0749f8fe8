"""Our Llama against transformers' LlamaForCausalLM, and our (IA)³ on it against PEFT's with its defaults for llama.

Weights are random, biases and RMSNorms included, and copied by name. transformers computes RMSNorm and the rotary table
in float32 whatever the model is held in, so in float64 the fixture `float64` puts float64 ones in their place; its
attention is SDPA, since its own softmax computes in float32 as well.
"""

import json
import math

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import common
from conftest import make_ia3
from ia3 import IA3, attach
from llama import Llama, LlamaConfig
from merge import merge
from sample import generate
from tools import convert
from tools.count import find_model

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
        if ".mlp." not in name:
            assert torch.equal(merged[name], t), name  # one product and one rounding on either side: the same bits


def test_merged_models_are_equal_as_functions(float64):
    """PEFT folds l_ff into the columns of down_proj, we into the rows of up_proj."""
    theirs, ours = make_both("biases")
    peft = make_peft(theirs)
    copy_vectors(peft, ours)
    merged = merge(ours)
    expected = peft.merge_and_unload()
    assert not torch.equal(merged.blocks[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)
    idx = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert (merged(idx)[0] - expected(idx).logits).abs().max() <= 1e-10


# --- folders and adapters ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_theirs_comes_in(tmp_path, kind, dtype):
    """Weights bit for bit, in the dtype that is stored; in one file, and in shards."""
    theirs, ours = make_both(kind, dtype)
    for folder, size in ((tmp_path / "one", "1GB"), (tmp_path / "shards", "10KB")):
        theirs.save_pretrained(folder, max_shard_size=size)
        back = convert.from_hf(folder)
        assert back.config == ours.config
        for name, t in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], t) and back.state_dict()[name].dtype == dtype, name
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not (tmp_path / "shards/model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_is_opened(tmp_path, kind, dtype, float64):
    theirs, ours = make_both(kind, dtype)
    convert.to_hf(ours, tmp_path)
    opened, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.dtype == dtype and transformers.LlamaConfig.from_pretrained(tmp_path).dtype == dtype
    for name, t in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], t), name
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act"):
        assert getattr(opened.config, key) == getattr(theirs.config, key), key
    idx, _ = make_batch()
    with torch.no_grad():
        assert (opened.double().eval()(idx).logits - ours.double()(idx)[0]).abs().max() <= 1e-10


def test_the_older_spelling_of_theirs_comes_in(tmp_path):
    """As transformers 4 wrote the rotary parameters: beside each other, and read by both alike."""
    theirs, ours = make_both("llama3", torch.float32)
    theirs.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    scaling = about.pop("rope_parameters")
    about |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert convert.from_hf(tmp_path).config == ours.config
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.rope_parameters == LLAMA3


def test_a_merged_llama_goes_home(tmp_path):
    theirs, ours = make_both("biases", torch.float32)
    common.save(ours, tmp_path / "base.pt")
    make_ia3(ours).save(tmp_path / "ia3.npz")
    flags = ["--base", f"{tmp_path}/base.pt", "--ia3", f"{tmp_path}/ia3.npz", "--out", f"{tmp_path}/home"]
    assert convert.main(["to-hf", *flags]) == 0
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "home").state_dict()
    merged = merge(ours).state_dict()
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], theirs.model.layers[0].mlp.up_proj.weight)
    for name, t in merged.items():
        assert torch.equal(opened[name], t), name


@pytest.mark.parametrize("kind", ["gqa-1", "gqa-2", "biases"])
def test_an_adapter_of_theirs_comes_in_bit_for_bit(tmp_path, kind):
    theirs, ours = make_both(kind, torch.float32)
    peft = make_peft(theirs).float()
    peft.save_pretrained(tmp_path)
    vectors, l_q = convert.from_peft(tmp_path, ours)
    assert l_q is None
    for i, (k, v, ff) in enumerate(vectors_of(peft)):
        assert torch.equal(vectors.l_k[i], k[:, 0])
        assert torch.equal(vectors.l_v[i], v[:, 0])
        assert torch.equal(vectors.l_ff[i], ff[0])


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_an_adapter_of_theirs_on_other_modules_comes_in(tmp_path, float64, wrap):
    """On layer 1 alone, up_proj's output scaled as well as down_proj's input: l_ff is the product, layer 0 keeps ones.

    The vectors are powers of two, so that their product is exact. Around a compiled model names have _orig_mod.
    """
    theirs, ours = make_both("gqa-2", torch.float32)
    modules = r".*layers\.1\.(self_attn\.k_proj|mlp\.(up|down)_proj)"
    config = IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=r".*down_proj")
    peft = get_peft_model(wrap(theirs), config)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        vectors = [p for name, p in peft.named_parameters() if "ia3_l" in name]
        for p in vectors:
            p.copy_(2.0 ** torch.randint(-2, 3, p.shape, generator=dice))
    assert len(vectors) == 3
    peft.save_pretrained(tmp_path)
    ours.ia3, _ = convert.from_peft(tmp_path, ours)
    assert ours.ia3.matrices().keys() == {"l_k", "l_ff"} and (ours.ia3.l_ff[0] == 1).all()
    idx, _ = make_batch()
    with torch.no_grad():
        expected = peft.double()._orig_mod(idx).logits if wrap == torch.compile else peft.double()(idx).logits
        assert (ours.double()(idx)[0] - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("sites", [("k", "v", "ff"), ("k",), ("v", "ff"), ("ff",)])
def test_an_adapter_of_ours_goes_out_and_comes_back_bit_for_bit(tmp_path, sites, float64):
    theirs, ours = make_both("gqa-2", torch.float32)
    vectors = make_ia3(ours, sites=sites)
    convert.to_peft(vectors, tmp_path, "a base")
    back, _ = convert.from_peft(tmp_path, ours)
    assert back.matrices().keys() == vectors.matrices().keys()
    for name, matrix in vectors.matrices().items():
        assert torch.equal(back.matrices()[name], matrix)
    peft = PeftModel.from_pretrained(theirs, tmp_path).eval()
    found = {name: p for name, p in peft.named_parameters() if "ia3_l" in name}
    assert len(found) == 2 * len(sites)
    for site, module in {"k": "self_attn.k_proj", "v": "self_attn.v_proj", "ff": "mlp.down_proj"}.items():
        for i in range(2) if site in sites else []:
            p = found[f"base_model.model.model.layers.{i}.{module}.ia3_l.default"]
            assert torch.equal(p.flatten(), vectors.matrices()[f"l_{site}"][i])
    idx, _ = make_batch()
    with torch.no_grad():
        expected = peft.double()(idx).logits
        assert (ours.double()(idx)[0] - expected).abs().max() <= 1e-10
        ours.ia3 = None
        assert (ours(idx)[0] - expected).abs().max() > 0.1  # the vectors do something


# --- the count ---


@pytest.mark.parametrize("name", ["LLaMA-7B", "Llama-3-8B", "SmolLM2-135M"])
def test_the_count_of_a_llama_is_pefts(name):
    config = find_model(name).config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
                num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
                num_key_value_heads=config.n_kv_head, tie_word_embeddings=config.tied,
            )
        )  # fmt: skip
        peft = get_peft_model(theirs, IA3Config(task_type="CAUSAL_LM"))
    trained, parameters = peft.get_nb_trainable_parameters()
    assert trained == IA3(config).count()
    assert parameters - trained == sum(p.numel() for p in find_model(name).parameters())
