"""What analysis.py counts, against closed forms."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from here import Here

import common
from conftest import make_gpt, make_ia3, make_llama
from experiments import analysis, lab
from experiments.analysis import Head, PairsJob, Recalled
from ia3 import IA3, attach
from model import GPTConfig


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(lab, "ProcessPoolExecutor", Here)


def test_the_effective_rank_of_known_changes():
    """r equal singular values have the entropy log r; (0.5, 0.25, 0.25) has 1.5 log 2; nothing changed has none."""
    before = make_gpt()
    after = copy.deepcopy(before)
    assert analysis.effective_rank(before, after) == 0
    weight = after.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight[range(5), range(5)] += 2.0
    assert analysis.effective_rank(before, after) == pytest.approx(5, rel=1e-5)
    with torch.no_grad():
        weight.copy_(before.transformer.h[0].mlp.c_fc.weight)
        weight[range(3), range(3)] += torch.tensor([4.0, 2.0, 2.0])
    assert analysis.effective_rank(before, after) == pytest.approx(2**1.5, rel=1e-5)
    with torch.no_grad():  # a mean over matrices
        after.transformer.h[1].attn.c_proj.weight[0, 0] += 1
    assert analysis.effective_rank(before, after) == pytest.approx((2**1.5 + 1) / 2, rel=1e-5)
    llama = make_llama()
    after = copy.deepcopy(llama)
    with torch.no_grad():
        after.model.layers[0].mlp.up_proj.weight[range(3), range(3)] += 2.0
    assert analysis.effective_rank(llama, after) == pytest.approx(3, rel=1e-5)


def test_pairs_are_random_letters_and_no_prompt_stands_twice():
    pairs = analysis.random_pairs(4096, 0)
    assert len({bytes(pair[:4]) for pair in pairs}) == 4096
    assert pairs.min() == ord("a") and pairs.max() == ord("z")
    for place in range(6):  # each letter some 158 times; a deviation is 12.3
        assert np.abs(np.bincount(pairs[:, place] - ord("a"), minlength=26) - 4096 / 26).max() < 5 * 12.3
    assert not np.array_equal(pairs, analysis.random_pairs(4096, 1))


def test_what_is_recalled_is_what_the_answers_no_longer_cost(tmp_path):
    common.save(make_gpt(), tmp_path / "base.pt")
    found, arrays = analysis.memorize(tmp_path / "base.pt", PairsJob("full", 8, 3e-3, 300, 1))
    left = arrays["nats"].sum() / math.log(2)
    assert found.bits == pytest.approx(8 * 2 * math.log2(26) - left) and found.bits > 0.9 * 8 * analysis.BITS
    assert found.values == sum(p.numel() for p in make_gpt().parameters())
    untrained, _ = analysis.memorize(tmp_path / "base.pt", PairsJob("ia3", 8, 1e-6, 1, 1))
    assert untrained.bits == 0  # a random model does not even know that answers are letters


def test_a_rate_at_which_it_diverges_recalls_nothing(tmp_path, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(analysis, "train", diverge)
    common.save(make_gpt(), tmp_path / "base.pt")
    found, arrays = analysis.memorize(tmp_path / "base.pt", PairsJob("ia3", 8, 1e3, 300, 1))
    assert found == Recalled(IA3(make_gpt().config).count(), 0, 0) and arrays == {}


def test_int8_is_off_by_half_a_step_at_most_and_leaves_ones():
    l = 1 + torch.randn(3, 50)
    l[:, 7] = 1
    l[2] = 1
    steps = (l - 1).abs().amax(1, keepdim=True) / 127
    back = analysis.to_int8(l)
    assert ((back - l).abs() <= steps / 2 + 1e-6).all()  # and float32's own rounding
    assert (back[:, 7] == 1).all() and (back[2] == 1).all()
    assert len(((back[0] - 1) / steps[0]).round().unique()) > 20
    extreme = (l[0] - 1).abs().argmax()
    assert back[0, extreme].item() == pytest.approx(l[0, extreme].item(), rel=1e-6)


def test_the_smallest_changes_are_reset_first():
    model = make_gpt()
    vectors = make_ia3(model)
    versions = analysis.small_versions(vectors)
    n = vectors.count()
    assert {words: n_bytes for words, (n_bytes, _) in versions.items() if "reset" not in words} == {
        "float32": 4 * n,
        "bfloat16": 2 * n,
        "int8": n + 4 * 3 * model.config.n_layer,
    }
    n_bytes, matrices = versions["75% reset"]
    kept = {name: matrix != 1 for name, matrix in matrices.items()}
    assert sum(mask.sum().item() for mask in kept.values()) == n_bytes // 4 == n - round(0.75 * n)
    least = min((vectors.matrices()[name][mask] - 1).abs().min() for name, mask in kept.items())
    most = max((vectors.matrices()[name][~mask] - 1).abs().max() for name, mask in kept.items())
    assert most < least


def test_a_place_among_many_takes_more_bytes():
    for n_layer, size in ((160, 4), (200, 6)):  # 6 · 64 values a layer: below 2^16, and above
        vectors = IA3(GPTConfig(8, 9, n_layer, 1, 64))
        with torch.no_grad():
            for p in vectors.parameters():
                p.normal_()
        n_bytes, matrices = analysis.small_versions(vectors)["50% reset"]
        assert n_bytes == size * sum((matrix != 1).sum().item() for matrix in matrices.values())


def test_some_choices_are_from_all_over_the_file(tmp_path):
    model = make_gpt()
    lines = [json.dumps({"prompt": "a", "choices": ["b", word], "label": 1}) for word in ("c", "d", "e", "f", "g")]
    (tmp_path / "val.jsonl").write_text("\n".join(lines) + "\n")
    every = analysis.losses_of(model, tmp_path, 9)()
    assert len(every) == 5
    assert analysis.losses_of(model, tmp_path, 3)() == pytest.approx(every[[0, 1, 3]], rel=1e-5)


def test_a_rate_at_which_it_diverges_is_written_down(tmp_path, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(analysis, "train", diverge)
    settings = {"base": lab.BASE, "data": "folio", "items": 2}
    found, _ = analysis.learn_once(settings, analysis.RateJob(1e3, 5, 1))
    assert found.loss == math.inf


@pytest.mark.parametrize("make", [make_gpt, make_llama])
def test_a_head_of_ones_is_lost_without_loss(make, tmp_path, capsys):
    """All heads but one are ones: only resetting that one changes anything, by what leaving the vectors out does."""
    model = make(block_size=64)
    common.save(model, tmp_path / "base.pt")
    vectors = attach(model)
    d_head = model.config.n_embd // model.config.n_head
    with torch.no_grad():
        vectors.l_k[1, d_head : 2 * d_head] = 3.0
        vectors.l_v[1, d_head : 2 * d_head] = torch.linspace(-4, 4, d_head)
    vectors.save(tmp_path / "task.npz")
    (tmp_path / "val.txt").write_bytes(bytes(range(256)) * 3)
    argv = ["heads", f"--base={tmp_path}/base.pt", f"--ia3={tmp_path}/task.npz", f"--data={tmp_path}"]
    assert analysis.main([*argv, f"--out={tmp_path}/out", "--items=4"]) == 0
    heads = lab.read_rows(tmp_path / "out/results.csv", Head)
    assert len(heads) == model.config.n_layer * model.config.widths[0] // d_head
    before = analysis.losses_of(model, tmp_path, 4)()
    model.ia3 = None
    after = analysis.losses_of(model, tmp_path, 4)()
    for head in heads:
        if (head.layer, head.head) == (1, 1):
            assert (head.l_k_mean, head.l_k_std, head.l_v_mean) == (3, 0, pytest.approx(0, abs=1e-6))
            assert head.rise == pytest.approx((after - before).mean(), rel=1e-5) and head.rise != 0
            assert head.standard_error == pytest.approx((after - before).std(ddof=1) / 2, rel=1e-5)
        else:
            assert (head.l_k_mean, head.l_v_std, head.rise) == (1, 0, 0)
    assert "| l_k | 1.00 to 3.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("capacity --workers=-1", "workers must be"),
        ("heads --items=1", "items must be"),
        ("heads --base=nowhere.pt", "nowhere.pt"),
        ("capacity --base=small.pt", "small.pt is too small"),
        ("size --ia3=nowhere.npz", "nowhere.npz"),
        ("size --data=nowhere", "nowhere"),
    ],
)
def test_a_refusal_leaves_no_folder(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    common.save(make_gpt(vocab_size=99), "small.pt")
    assert analysis.main([*flags.split(), "--out=new"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt"]


def test_heads_wants_vectors_of_keys_and_of_values(tmp_path, capsys):
    model = make_gpt()
    common.save(model, tmp_path / "base.pt")
    attach(model, sites=("k", "ff")).save(tmp_path / "task.npz")
    argv = ["heads", f"--base={tmp_path}/base.pt", f"--ia3={tmp_path}/task.npz", f"--out={tmp_path}/out"]
    assert analysis.main(argv) == 2
    assert "task.npz scales no keys, or no values" in capsys.readouterr().err


def test_the_size_of_the_bundled_vectors_in_small(tmp_path, capsys):
    assert analysis.main(["size", "--quick", "--items=4", f"--out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "| int8 | 6,984 |" in text and "| 2 | 0.1 |" in text
    assert (tmp_path / "quick/size.png").stat().st_size > 1000
    assert analysis.main(["size", "--quick", "--items=5", f"--out={tmp_path}"]) == 2
    assert "holds runs with items 4, not 5" in capsys.readouterr().err
    model = common.load(lab.BASE)
    negative = sum((p < 0).sum().item() for p in IA3.load(lab.ROOT / "data/folio.npz", model).parameters())
    assert f"{negative:,} of its 6,912 scales are negative" in text


def test_capacity_in_small_stopped_and_gone_on_with(tmp_path, capsys):
    argv = ["capacity", "--quick", f"--out={tmp_path}"]
    assert analysis.main(argv) == 0
    table = (tmp_path / "quick/table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().endswith(table.strip())
    assert analysis.main(argv) == 0
    assert capsys.readouterr().out.strip() == table.strip()  # no run is made again
    found, _ = lab.load_runs(tmp_path / "quick", PairsJob, Recalled)
    assert len(found) == 12 and {recalled.values for job, recalled in found.items() if job.method == "ia3"} == {6912}
    assert "Numbers trained: ia3 6,912, lora-all 18,432, full 2,7" in table
    for job, recalled in found.items():  # a matrix of LoRA's changes by rank one, what full fine-tuning changes by more
        assert job.method != "lora-all" or recalled.rank == pytest.approx(1, abs=0.2)
        assert job.method != "full" or recalled.rank > 10
