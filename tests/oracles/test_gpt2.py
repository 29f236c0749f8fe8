"""Our GPT against transformers' GPT2LMHeadModel: same weights, same numbers; folders and files travel both ways."""

import pytest
import torch
from gpt2 import SIZES, as_ours, make_batch, make_both, make_theirs
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import common
from conftest import make_gpt, make_ia3, make_idx
from ia3 import IA3
from merge import merge
from sample import generate
from tools import convert


# float64 rounds at 1e-16, float32 at 1e-7; sums of some hundred terms of order 1 cost two or three digits of that
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_logits_and_loss(tmp_path, dtype, tolerance):
    theirs, ours = make_both(tmp_path, dtype)
    idx, targets = make_batch()
    with torch.no_grad():
        logits, loss = ours(idx, targets)
        expected = theirs(idx).logits
        assert expected.std() > 0.3  # not so small that anything agrees
        assert (logits - expected).abs().max() <= tolerance
        assert abs(loss - cross_entropy(expected, targets)) <= tolerance
        # their own loss shifts the labels itself, and takes the logits in float32 whatever the model is in
        own, same = theirs(idx, labels=idx).loss, ours(idx[:, :-1], idx[:, 1:])[1]
    assert abs(own - same) <= 1e-5


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_gradients_of_every_parameter(tmp_path):
    theirs, ours = make_both(tmp_path)
    idx, targets = make_batch()
    cross_entropy(theirs(idx).logits, targets).backward()
    ours(idx, targets)[1].backward()
    expected = {name: as_ours(name, p.grad) for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert set(found) == set(expected)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        assert (found[name] - grad).abs().max() <= 1e-10, name


def test_greedy_text(tmp_path):
    theirs, ours = make_both(tmp_path, torch.float32)
    idx, _ = make_batch()
    prompt = idx[:, :4]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(generate(ours, prompt, 12, temperature=0), expected)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])  # the published files are of 2019: legacy
def test_a_weights_file_as_it_was_published(tmp_path, prefix, zipped):
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path)
    weights = {prefix + name.removeprefix("transformer."): t for name, t in theirs.transformer.state_dict().items()}
    for i in range(SIZES["n_layer"]):
        weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if prefix:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    idx, _ = make_batch()
    with torch.no_grad():
        for source in (tmp_path, path):  # the folder, and the file with config.json beside it
            assert (convert.from_hf(source)(idx)[0] - theirs(idx).logits).abs().max() <= 1e-4


def test_half_precision_comes_in_as_float32(tmp_path):
    theirs = make_theirs().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = convert.from_hf(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.transformer.h[1].mlp.c_fc.weight, theirs.transformer.h[1].mlp.c_fc.weight.t().float())


@pytest.mark.parametrize("sizes", [{}, {"bias": False}, {"vocab_size": 61, "n_head": 4}])
def test_what_we_write_transformers_opens(tmp_path, sizes):
    ours = make_gpt(**sizes)
    convert.to_hf(ours, tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx = make_idx(ours)
    with torch.no_grad():
        expected = ours.double()(idx)[0]
        assert (theirs.double().eval()(idx).logits - expected).abs().max() <= 1e-10 * expected.abs().max()
        back = convert.from_hf(tmp_path)
        assert (back.double()(idx)[0] - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (back.tokenizer is None) == (ours.tokenizer is None)


def test_a_merged_model_goes_home(tmp_path):
    ours = make_gpt()
    common.save(ours, tmp_path / "base.pt")
    make_ia3(ours).save(tmp_path / "ia3.npz")
    flags = ["--base", f"{tmp_path}/base.pt", "--ia3", f"{tmp_path}/ia3.npz", "--out", f"{tmp_path}/home"]
    assert convert.main(["to-hf", *flags]) == 0
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "home").eval()
    ours = common.load(tmp_path / "base.pt")
    ours.ia3 = IA3.load(tmp_path / "ia3.npz", ours)
    merged = merge(ours)
    idx = make_idx(ours)
    for name, t in theirs.transformer.state_dict().items():
        assert torch.equal(as_ours(name, t), merged.transformer.state_dict()[name]), name
    with torch.no_grad():
        expected = merged.double()(idx)[0]
        assert (theirs.double()(idx).logits - expected).abs().max() <= 1e-10 * expected.abs().max()
