"""What the Llama has that GPT-2 has not: positions that turn, shared keys, a gate, a head of its own; and that merging,
stacking, caching, saving and training work on it as well. Its agreement with transformers is shown in tests/oracles/.
"""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import make_ia3, make_idx, make_llama
from torch.nn import functional as F

import common
import merge as merging
import sample
import train as training
from data import Stream, Tokenizer
from ia3 import IA3, attach, fingerprint, stack, unstack
from llama import Llama, LlamaConfig, rotary_table, rotate
from merge import fold_rows, merge

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3["original_max_position_embeddings"] = 64
SHAPES = {
    "gqa-1": {"n_kv_head": 4, "attention_bias": False, "mlp_bias": False},
    "gqa-2": {},
    "gqa-4": {"n_kv_head": 1},
    "untied": {"tied": False},
    "llama3": {"rope_scaling": LLAMA3},
}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


# --- merging ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sites", [("k", "v", "ff"), ("k",), ("v",), ("ff",)])
def test_powers_of_two_merge_bit_for_bit(device, shape, sites, dtype):
    """Multiplying by ±2^n is exact, so every intermediate is the same number: no tolerance."""
    model = make_llama(**shape).to(device, dtype)
    make_ia3(model, 0, sites, powers_of_two=True)
    idx = make_idx(model).to(device)
    merged = merge(model)
    assert torch.equal(merged(idx)[0], model(idx)[0])
    model.ia3 = None
    assert not torch.equal(merged(idx)[0], model(idx)[0])


@pytest.mark.parametrize("sites", [("k", "v", "ff"), ("k",), ("v",), ("ff",)])
def test_any_vectors_merge_to_1e_11_in_float64(shape, sites):
    """Logits here are below 100, sums run over at most 40 terms: 40 · 100 · 2^-53 is 4e-13 a layer."""
    model = make_llama(**shape).double()
    make_ia3(model, 0, sites)
    idx = make_idx(model)
    with torch.no_grad():
        assert (merge(model)(idx)[0] - model(idx)[0]).abs().max() <= 1e-11


def test_the_merged_model_is_a_plain_llama_of_the_same_class_and_head():
    for tied in (True, False):
        model = make_llama(tied=tied)
        make_ia3(model)
        merged = merge(model)
        assert type(merged) is Llama and merged.ia3 is None and merged.config == model.config
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
        assert merged.state_dict().keys() == make_llama(tied=tied).state_dict().keys()


def test_l_ff_folds_into_the_columns_of_w_down_or_the_rows_of_w_up_alike_and_not_into_w_gate():
    model = make_llama().double()
    vectors = make_ia3(model, sites=("ff",))
    plain = copy.deepcopy(model)
    plain.ia3 = None
    into_up, into_gate = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        for i, l_ff in enumerate(vectors.l_ff):
            fold_rows(into_up.model.layers[i].mlp.up_proj, slice(None), l_ff)
            fold_rows(into_gate.model.layers[i].mlp.gate_proj, slice(None), l_ff)
        idx = make_idx(model)
        wanted = model(idx)[0]
        assert (merge(model)(idx)[0] - wanted).abs().max() <= 1e-11
        assert (into_up(idx)[0] - wanted).abs().max() <= 1e-11
        assert (into_gate(idx)[0] - wanted).abs().max() > 0.1


# --- the rotation: what a vector on either side of it can do ---

D_HEAD = 8
ONES = torch.ones(D_HEAD, dtype=torch.float64)
ANY = 1 + 0.5 * torch.randn(D_HEAD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PAIRED = ANY[: D_HEAD // 2].repeat(2)  # channels i and i + d_head/2 agree


def scores(shift=0, l_q=ONES, l_k=ONES, after=ONES):
    """Q Kᵀ of 12 random positions from shift on, (12, 12). l_q, l_k scale before the rotation, after scales keys
    after it."""
    config = make_llama(n_embd=4 * D_HEAD).config
    dice = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 12, D_HEAD, generator=dice, dtype=torch.float64)
    cos, sin = rotary_table(config, torch.arange(shift, shift + 12), torch.float64)
    q, k = rotate(l_q * q, cos, sin), rotate(l_k * k, cos, sin)
    return (q @ (after * k).transpose(-1, -2))[0, 0]


def distance(a, b):
    return (a - b).abs().max()


def test_whatever_is_folded_into_w_k_scores_depend_on_how_far_apart_two_tokens_are_only():
    assert distance(scores(), scores(shift=100)) <= 1e-12
    assert distance(scores(l_k=ANY), scores(shift=100, l_k=ANY)) <= 1e-12


def test_a_vector_after_the_rotation_folds_only_where_its_entries_agree_within_each_pair():
    """Where they do not agree, scores depend on where the two tokens are, and by the test above no W_k gives that."""
    assert distance(scores(after=PAIRED), scores(l_k=PAIRED)) <= 1e-12
    assert distance(scores(after=PAIRED), scores()) > 0.1
    assert distance(scores(after=ANY), scores(shift=100, after=ANY)) > 0.1


def test_l_k_moves_to_the_queries_only_where_its_entries_agree_within_each_pair():
    """A token's score with itself, where nothing turns, is the same with l_k on its query and with no other vector for
    any query; but then its score with another token differs."""
    assert distance(scores(l_q=PAIRED), scores(l_k=PAIRED)) <= 1e-12
    on_queries, on_keys = scores(l_q=ANY), scores(l_k=ANY)
    assert distance(on_queries.diagonal(), on_keys.diagonal()) <= 1e-12
    assert distance(on_queries, on_keys) > 0.1


def test_the_rotary_table_is_float32_at_least_and_no_part_of_the_state():
    config = make_llama().config
    pos = torch.arange(300)
    exact = rotary_table(config, pos, torch.float64)
    assert {t.dtype for t in exact} == {torch.float64}
    for t, wanted in zip(rotary_table(config, pos, torch.bfloat16), exact, strict=True):
        assert t.dtype == torch.float32 and t.shape == (300, 2)
        assert distance(t, wanted) <= 300 * 2**-23  # the angle, below 300, rounded to float32
    assert not list(make_llama().buffers())


def test_rmsnorm_of_bfloat16_is_computed_in_float32():
    norm = make_llama().model.norm
    x = torch.randn(64, 16).bfloat16()
    weight = norm.weight.detach().bfloat16().float()
    wide = x.float()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    # rounded once: half a step, and a little for float32's own rounding next to a tie
    assert ((norm.bfloat16()(x).float() - wanted).abs() <= 0.51 * 2**-7 * wanted.abs()).all()


# --- the cache ---


@torch.no_grad()
def greedy(model, idx, n, task_ids=None):
    """Greedy text without a cache, from logits of the whole window."""
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :], task_ids=task_ids)[0]
        idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def test_greedy_text_with_the_cache_is_that_without(device, shape):
    model = make_llama(**shape).to(device)
    prompt = make_idx(model).to(device)[:, :5]
    vectors = [make_ia3(model, seed) for seed in range(2)]
    for ia3, task_ids in ((None, None), (vectors[0], None), (stack([*vectors, None]), torch.tensor([2, 0, 1]))):
        model.ia3 = None if ia3 is None else ia3.to(device)
        ids = None if task_ids is None else task_ids.to(device)
        text = sample.generate(model, prompt, 20, temperature=0, task_ids=ids)  # runs past block_size 16
        assert torch.equal(text, greedy(model, prompt, 20, ids))


def test_a_cache_read_piece_by_piece_gives_the_logits_of_the_whole():
    model = make_llama().double()
    make_ia3(model)
    idx = make_idx(model)
    cache = sample.Cache(model, 3, 16)
    assert cache.layers[0].k.shape == (3, 2, 16, 4)  # heads of keys, not of queries
    with torch.no_grad():
        pieces = [model(piece, cache=cache)[0] for piece in idx.split([1, 6, 1, 8], dim=1)]
        assert distance(torch.cat(pieces, dim=1), model(idx)[0]) <= 1e-12
    model.ia3 = None
    with pytest.raises(ValueError, match="other vectors"):
        model(idx[:, :1], cache=cache)


# --- the vectors ---


def test_widths_and_count():
    model = make_llama()
    vectors = attach(model)
    assert [tuple(p.shape) for p in vectors.parameters()] == [(2, 8), (2, 8), (2, 40)]  # l_k for 2 heads of 4 channels
    assert vectors.count() == 2 * (8 + 8 + 40)


def test_ones_are_the_base_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llama().to(dtype)
        idx = make_idx(model)
        base = model(idx)[0]
        attach(model)
        assert torch.equal(model(idx)[0], base)


@torch.no_grad()
def test_a_product_is_taken_in_float32_and_rounded_once_to_bfloat16():
    """Seen in the first layer, whose activations the vectors do not change: keys of token 0, where nothing is turned,
    and values in the cache, and what the down-projection is given."""
    model = make_llama().bfloat16()
    idx = make_idx(model)
    given = {}
    down_proj = model.model.layers[0].mlp.down_proj
    down_proj.register_forward_pre_hook(lambda module, args: given.update(h=args[0]))

    def first_layer():
        cache = sample.Cache(model, 3, 16)
        model(idx, cache=cache)
        k, v = cache.layers[0].k[:, :, 0], cache.layers[0].v[:, :, 0]  # (B, heads of keys, d_head)
        return k.flatten(1), v.flatten(1), given["h"]

    k, v, _ = first_layer()
    vectors = make_ia3(model, sites=("k", "v"))
    scaled_k, scaled_v, _ = first_layer()
    assert torch.equal(scaled_k, (vectors.l_k[0] * k.float()).bfloat16())
    assert torch.equal(scaled_v, (vectors.l_v[0] * v.float()).bfloat16())
    model.ia3 = None
    h = first_layer()[2]
    vectors = make_ia3(model, sites=("ff",))
    assert torch.equal(first_layer()[2], (vectors.l_ff[0] * h.float()).bfloat16())


def test_a_batch_of_several_tasks_is_each_alone():
    model = make_llama().double()
    tasks = [make_ia3(model, seed).double() for seed in range(2)]
    idx = make_idx(model)
    with torch.no_grad():
        alone = []
        for row, ia3 in enumerate([tasks[1], None, tasks[0]]):
            model.ia3 = ia3
            alone.append(model(idx[row : row + 1])[0])
        model.ia3 = stack([*tasks, None]).double()
        mixed = model(idx, task_ids=torch.tensor([1, 2, 0]))[0]
        assert distance(mixed, torch.cat(alone)) <= 1e-12
    for task, again in zip(tasks, unstack(model.ia3), strict=False):
        assert all(torch.equal(p, again.matrices()[name].double()) for name, p in task.matrices().items())


def test_vectors_are_saved_and_read_again_on_their_base_only(tmp_path):
    model = make_llama()
    vectors = make_ia3(model)
    vectors.save(tmp_path / "a.npz")
    again = IA3.load(tmp_path / "a.npz", make_llama())
    assert all(torch.equal(p, again.matrices()[name]) for name, p in vectors.matrices().items())
    for other in (make_llama(rope_base=5000.0), make_llama(seed=1)):
        with pytest.raises(ValueError, match="another base of this shape"):
            IA3.load(tmp_path / "a.npz", other)


def with_config(model, **changed):
    """model's own weights under another config, one that changes no shape."""
    other = copy.deepcopy(model)
    other.config = LlamaConfig(**(vars(model.config) | changed))
    return other


def test_the_fingerprint_sees_all_that_changes_the_function_and_nothing_else():
    model = make_llama(n_kv_head=4, rope_scaling=LLAMA3)
    ours = fingerprint(model)
    assert fingerprint(with_config(model, rope_base=5000.0)) != ours
    assert fingerprint(with_config(model, norm_eps=1e-6)) != ours
    assert fingerprint(with_config(model, n_head=2, n_kv_head=2)) != ours
    assert fingerprint(with_config(model, rope_scaling=None)) != ours
    assert fingerprint(with_config(model, rope_scaling=LLAMA3 | {"factor": 4})) != ours
    assert fingerprint(with_config(model, block_size=32)) == ours
    assert fingerprint(with_config(model, rope_base=10000)) == ours
    assert fingerprint(with_config(model, rope_scaling=dict(reversed(LLAMA3.items())))) == ours
    assert fingerprint(copy.deepcopy(model).bfloat16()) == ours
    make_ia3(model)
    assert fingerprint(model) == ours
    untied = make_llama(tied=False)
    ours = fingerprint(untied)
    untied.lm_head.weight.data[3, 5] += 1
    assert fingerprint(untied) != ours


# --- config, weights, files ---


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "None is not known"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling wants factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "rope_scaling wants factor"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_embd": 20}, "an even number"),
        ({"n_hidden": 0}, "n_hidden must be"),
        ({"n_head": True}, "n_head must be"),
        ({"rope_base": 0}, "rope_base must be"),
        ({"norm_eps": float("nan")}, "norm_eps must be"),
    ],
)
def test_configs_that_no_llama_can_have_are_refused_by_name(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_llama(**sizes)


def test_it_starts_as_transformers_does():
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "n_hidden": 128, "block_size": 8}
    sizes |= {"vocab_size": 257, "rope_base": 1e4, "norm_eps": 1e-5, "tied": True, "attention_bias": True}
    for name, p in Llama(LlamaConfig(**sizes)).named_parameters():
        if p.dim() == 2:  # the standard error of a standard deviation is std / √(2n); 5 of them
            assert abs(p.std().item() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5, name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_loss_is_the_mean_over_targets_that_are_not_minus_one():
    model = make_llama().double()
    idx = make_idx(model)
    targets = idx.roll(-1, dims=1)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    terms = [-F.log_softmax(logits[b, t], 0)[targets[b, t]] for b in range(3) for t in range(16) if targets[b, t] >= 0]
    assert torch.allclose(loss, sum(terms) / len(terms), rtol=1e-12)
    with pytest.raises(ValueError, match="every target is -1"):
        model(idx, torch.full_like(idx, -1))
    with pytest.raises(ValueError, match="block_size is 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def small_bpe():
    ranks = {bytes([i]): i for i in range(97, 123)} | {b"ab": 200, b" ": 201}
    return {"pattern": r" ?\p{L}+|.", "ranks": ranks, "special_tokens": {"<end>": 256}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_come_back_bit_for_bit(tmp_path, shape, dtype):
    model = make_llama(**shape).to(dtype)
    model.tokenizer = Tokenizer(small_bpe(), 257)
    make_ia3(model)
    common.save(model, tmp_path / "a.pt")
    again = common.load(tmp_path / "a.pt", dtype=None)
    assert type(again) is Llama and again.config == model.config and again.ia3 is None and not again.training
    assert again.tokenizer.about == small_bpe() and again.tokenizer.decode([200, 256, 255]) == "ab<end>"
    for name, t in again.state_dict().items():
        assert t.dtype == dtype and torch.equal(t, model.state_dict()[name]), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tied
    assert {t.dtype for t in common.load(tmp_path / "a.pt").state_dict().values()} == {torch.float32}


def test_a_tied_checkpoint_with_two_matrices_is_refused(tmp_path):
    common.save(make_llama(), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    saved["model"]["lm_head.weight"] = saved["model"]["lm_head.weight"] + 1
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the head is not the embedding"):
        common.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ranks": {b"a": 0, b"b": 0}}, "the same id"),
        ({"special_tokens": {"<end>": 97}}, "the same id"),
        ({"special_tokens": {"<end>": 257}}, "from 0 to the vocabulary's 256"),
        ({"ranks": {b"a": -1}}, "from 0 to the vocabulary's 256"),
        ({"ranks": {b"a": 1.0}}, "must be whole numbers"),
        ({"ranks": {"a": 1}}, "ranks must be a dict of bytes"),
        ({"ranks": [b"a"]}, "ranks must be a dict of bytes"),
        ({"special_tokens": {b"end": 256}}, "special_tokens must be a dict of str"),
        ({"pattern": None}, "pattern must be text"),
        ({"merges": []}, "has pattern, ranks, special_tokens, not"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(small_bpe() | changed, 257)


# --- training, and the command lines ---


def test_train_from_scratch():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 257, 1, 2, 1, 32, 64, rope_base=1e4, norm_eps=1e-5, tied=False))
    text = b"In the beginning God created the heaven and the earth. " * 20
    data = Stream(torch.frombuffer(bytearray(text), dtype=torch.uint8).numpy(), 16)
    config = training.TrainConfig(steps=30, lr=1e-2, batch_size=8, eval_interval=30)
    history = training.train(model, {"train": data, "val": data}, config)
    assert history[0]["val_loss"] > 5 and history[-1]["val_loss"] < 3  # ln 257 = 5.5; the letters' own entropy is 2.8


def test_the_command_lines_work_on_a_llama(tmp_path, capsys):
    model = make_llama(block_size=32)
    common.save(model, tmp_path / "base.pt")
    (tmp_path / "text").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"text/{split}.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    base = ["--base", f"{tmp_path}/base.pt"]
    run = [*base, "--data", f"{tmp_path}/text", "--out", f"{tmp_path}/run", "--device", "cpu", "--steps", "4"]
    assert training.build(training.parse(run))[0].ia3.count() == 2 * (8 + 8 + 40)
    args = training.parse(run)
    training.build(args)
    assert args.lr == 0.003
    assert training.main(run) == 0
    ia3, merged = f"{tmp_path}/run/ia3.npz", f"{tmp_path}/merged.pt"
    assert merging.main([*base, "--ia3", ia3, "--data", f"{tmp_path}/text", "--out", merged]) == 0
    assert "greedy text     identical" in capsys.readouterr().out
    assert sample.main([*base, "--ia3", ia3, ia3, "--prompt", "In", "--tokens", "20", "--device", "cpu"]) == 0
    assert sample.main(["--base", merged, "--prompt", "In", "--tokens", "20", "--device", "cpu"]) == 0


def test_all_else_works_without_llama_py():
    code = "import sys; sys.modules['llama'] = None; import common, merge, sample, train; common.load('data/base.pt')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
