"""Our (IA)³ against PEFT's on the same GPT-2: logits, gradients, ten steps, merged weights, and the adapters that
travel both ways. PEFT's vector over c_attn begins with a query part, which the paper does not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpt2 import SIZES, as_ours, make_batch, make_both, make_theirs
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from torch.nn import functional as F

import common
from conftest import make_ia3
from ia3 import IA3, attach
from merge import merge
from tools import convert

C = SIZES["n_embd"]


def make_peft(theirs, query="ones", seed=0):
    """Wrap transformers' model in PEFT's (IA)³ with random vectors, N(1, 0.5), in float64.

    query: what the query part holds: 'ones', 'powers' of two, or 'any' values.
    """
    peft = get_peft_model(theirs, IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)).double().eval()
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for c_attn, c_proj in vectors_of(peft):
            for p in (c_attn, c_proj):  # float32 values, so that a float32 file holds them exactly
                p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
            if query == "ones":
                c_attn[:C] = 1
            elif query == "powers":
                c_attn[:C] = 2.0 ** torch.randint(-2, 3, (C, 1), generator=dice)
    return peft


def vectors_of(peft):
    """PEFT's own parameters, (c_attn's, mlp.c_proj's) a layer."""
    blocks = peft.base_model.model.transformer.h
    return [(block.attn.c_attn.ia3_l["default"], block.mlp.c_proj.ia3_l["default"]) for block in blocks]


def copy_vectors(peft, ours):
    """Attach PEFT's vectors to ours in float64, the query part left behind."""
    vectors = attach(ours).double()
    with torch.no_grad():
        for i, (c_attn, c_proj) in enumerate(vectors_of(peft)):
            vectors.l_k[i], vectors.l_v[i], vectors.l_ff[i] = c_attn[C : 2 * C, 0], c_attn[2 * C :, 0], c_proj[0]
    return vectors


def difference(peft, ours):
    idx, _ = make_batch()
    with torch.no_grad():
        expected = peft(idx).logits
        assert expected.std() > 0.3
        return (ours(idx)[0] - expected).abs().max().item()


def their_loss(peft, idx, targets):
    return F.cross_entropy(peft(idx).logits.flatten(0, 1), targets.flatten())


def test_logits_and_gradients_of_the_vectors(tmp_path):
    theirs, ours = make_both(tmp_path)
    peft = make_peft(theirs)
    vectors = copy_vectors(peft, ours)
    assert difference(peft, ours) <= 1e-10
    idx, targets = make_batch()
    their_loss(peft, idx, targets).backward()
    ours(idx, targets)[1].backward()
    for i, (c_attn, c_proj) in enumerate(vectors_of(peft)):
        assert c_attn.grad.abs().min() > 0
        assert (vectors.l_k.grad[i] - c_attn.grad[C : 2 * C, 0]).abs().max() <= 1e-10
        assert (vectors.l_v.grad[i] - c_attn.grad[2 * C :, 0]).abs().max() <= 1e-10
        assert (vectors.l_ff.grad[i] - c_proj.grad[0]).abs().max() <= 1e-10


def test_ten_steps_give_the_same_vectors_and_losses(tmp_path):
    theirs, ours = make_both(tmp_path)
    peft = get_peft_model(theirs, IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)).double().eval()
    vectors = copy_vectors(peft, ours)  # all ones
    options = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizers = (
        torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], **options),
        torch.optim.AdamW(vectors.parameters(), **options),
    )
    for step in range(10):
        idx, targets = make_batch(seed=step)
        losses = their_loss(peft, idx, targets), ours(idx, targets)[1]
        assert abs(losses[0] - losses[1]) <= 1e-10
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for c_attn, _ in vectors_of(peft):
            c_attn.grad[:C] = 0  # the query part held at ones
        for optimizer in optimizers:
            optimizer.step()
    for i, (c_attn, c_proj) in enumerate(vectors_of(peft)):
        assert torch.equal(c_attn[:C], torch.ones(C, 1, dtype=torch.float64))
        assert (c_attn[C:] - 1).abs().min() > 1e-3  # they did move
        assert (torch.cat([vectors.l_k[i], vectors.l_v[i]]) - c_attn[C:, 0]).abs().max() <= 1e-10
        assert (vectors.l_ff[i] - c_proj[0]).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merged_weights(tmp_path, dtype):
    theirs, ours = make_both(tmp_path)
    peft = make_peft(theirs).to(dtype)
    copy_vectors(peft, ours)
    merged = merge(ours.to(dtype)).transformer.state_dict()
    for name, t in peft.merge_and_unload().transformer.state_dict().items():
        # one product and one rounding on either side: the same bits
        assert torch.equal(as_ours(name, t), merged[name]), name


# l_k is kept in float32: times a power of two it is exact, times anything else it is rounded, by at most 6e-8 of itself
@pytest.mark.parametrize("query, tolerance", [("ones", 1e-10), ("powers", 1e-10), ("any", 1e-6)])
def test_an_adapter_of_theirs_comes_in(tmp_path, query, tolerance, capsys):
    theirs, ours = make_both(tmp_path / "base")
    peft = make_peft(theirs, query)
    peft.float().save_pretrained(tmp_path / "adapter")
    peft.double()
    common.save(ours, tmp_path / "base.pt")
    flags = ["--base", f"{tmp_path}/base.pt", "--adapter", f"{tmp_path}/adapter", "--out", f"{tmp_path}/in.npz"]
    assert convert.main(["from-peft", *flags]) == 0
    assert ("folded into l_k" in capsys.readouterr().out) == (query != "ones")
    ours.ia3 = IA3.load(tmp_path / "in.npz", ours)
    assert ours.ia3.l_k.dtype == torch.float32
    ours.double()
    assert difference(peft, ours) <= tolerance


def test_an_adapter_trained_with_its_query_part_free_comes_in(tmp_path):
    theirs, ours = make_both(tmp_path / "base")
    peft = make_peft(theirs)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for step in range(10):
        optimizer.zero_grad()
        their_loss(peft, *make_batch(seed=step)).backward()
        optimizer.step()
    assert all((c_attn[:C] - 1).abs().min() > 1e-3 for c_attn, _ in vectors_of(peft))
    peft.float().save_pretrained(tmp_path / "adapter")
    ours.ia3, l_q = convert.from_peft(tmp_path / "adapter", ours)
    assert l_q.shape == (SIZES["n_layer"], C) and torch.equal(l_q[1].float(), vectors_of(peft)[1][0][:C, 0])
    ours.double()
    assert difference(peft.double(), ours) <= 1e-6


@pytest.mark.parametrize("sites", [("k", "v", "ff"), ("k",), ("v", "ff"), ("ff",)])
def test_an_adapter_of_ours_goes_out_and_comes_back(tmp_path, sites):
    theirs, ours = make_both(tmp_path / "base")
    vectors = make_ia3(ours, sites=sites)
    convert.to_peft(vectors, tmp_path / "adapter", "a base")
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter").double().eval()
    assert not any("ia3_l" in name and p.isnan().any() for name, p in peft.named_parameters())
    back, l_q = convert.from_peft(tmp_path / "adapter", ours)
    if l_q is not None:
        assert (l_q == 1).all()
    for name, t in vectors.matrices().items():
        assert torch.equal(back.matrices()[name], t), name
    assert all((t == 1).all() for name, t in back.matrices().items() if name not in vectors.matrices())
    ours.double()
    assert difference(peft, ours) <= 1e-10


def test_the_command_writes_what_peft_reads_without_a_warning(tmp_path, capsys, recwarn):
    theirs, ours = make_both(tmp_path / "base", torch.float32)
    vectors = make_ia3(ours)
    vectors.save(tmp_path / "ia3.npz")
    common.save(ours, tmp_path / "base.pt")
    flags = ["--base", f"{tmp_path}/base.pt", "--ia3", f"{tmp_path}/ia3.npz", "--out", f"{tmp_path}/out"]
    assert convert.main(["to-peft", *flags]) == 0
    assert "ones for the queries" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == flags[1]
    recwarn.clear()
    peft = PeftModel.from_pretrained(theirs, tmp_path / "out")
    assert not [w for w in recwarn if "peft" in str(w.filename) or "adapter" in str(w.message)]
    ours.double()
    assert difference(peft.double().eval(), ours) <= 1e-10
    # what PEFT saves of it again is what we wrote, query part and all
    peft.float().save_pretrained(tmp_path / "again")
    again, l_q = convert.from_peft(tmp_path / "again", ours)
    assert (l_q == 1).all() and torch.equal(again.l_ff, vectors.l_ff.float())


def test_their_lora_is_refused_and_an_adapter_of_one_layer_leaves_the_others_at_ones(tmp_path):
    theirs, ours = make_both(tmp_path / "base")
    get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="of type 'LORA', not 'IA3'"):
        convert.from_peft(tmp_path / "lora", ours)
    one = IA3Config(task_type="CAUSAL_LM", target_modules=["h.1.attn.c_attn"], feedforward_modules=[])
    peft = get_peft_model(make_theirs(), one)
    scales = peft.base_model.model.transformer.h[1].attn.c_attn.ia3_l["default"].data.uniform_(0.5, 2)
    peft.save_pretrained(tmp_path / "one")
    vectors, l_q = convert.from_peft(tmp_path / "one", ours)
    assert (vectors.l_k[0] == 1).all() and (vectors.l_v[0] == 1).all() and vectors.l_ff is None
    assert torch.equal(vectors.l_v[1], scales[2 * C :, 0]) and torch.equal(l_q[1], scales[:C, 0].double())


def test_what_peft_scales_by_default_is_what_the_page_says():
    """docs/peft.md, on other models: the attention's part of each type's targets."""
    assert TARGETS["llama"] == ["k_proj", "v_proj", "down_proj"]
    for name in ("gpt_neo", "bart", "gemma", "qwen2", "qwen3", "llama4", "phi", "gptj"):
        assert TARGETS[name][:2] == ["q_proj", "v_proj"]
    assert TARGETS["opt"][:2] == ["q_proj", "k_proj"]
    for name in ("bloom", "gpt_neox", "falcon"):
        assert TARGETS[name][0] == "query_key_value"
    assert TARGETS.keys().isdisjoint({"gemma3", "llama4_text", "qwen3_moe", "smollm3"})


@pytest.mark.slow
def test_the_whole_comparison_of_the_page_runs():
    """docs/peft.md's comparison, without AdapterHub: ours is the formula, PEFT's default is another function."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, root / "tests/oracles/paper.py"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.split("PEFT ")[:2]
    assert "55,296 values" in ours and "64,512 values" in theirs
    distances = [float(line.split()[-1]) for line in ours.splitlines() if "max |Δlogit|" in line]
    assert len(distances) == 2 and max(distances) < 1e-12  # float64, logits of about 1
