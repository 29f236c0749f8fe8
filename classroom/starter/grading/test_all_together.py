"""Your files alone, from the first step to the merged model: nothing stands in for an exercise here."""

import copy
import importlib.util

import pytest
import torch

import data
import train
from conftest import changed, check, close, draw, draw_scales, make_gpt, refused, runs, snapshot
from data.tokenizer import Tokenizer
from ia3 import IA3, attach, fingerprint, stack
from merge import merge
from sample import Cache, generate


def make_llama(dice):
    from llama import Llama, LlamaConfig

    n_kv_head, group, d_head = (int(n) for n in (dice.integers(1, 4), dice.integers(2, 4), 2 * dice.integers(2, 4)))
    n_head = group * n_kv_head
    sizes = {"n_layer": 2, "n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_head * d_head, "tied": False}
    sizes |= {"n_hidden": int(dice.integers(30, 50)), "attention_bias": True, "mlp_bias": True}
    config = LlamaConfig(block_size=16, vocab_size=257, rope_base=100.0, norm_eps=1e-5, **sizes)
    model = runs("a Llama cannot be made: see its widths", Llama, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(draw(dice, *p.shape, mean=float("norm" in name), spread=0.3))
    return model.eval()


MODELS = ["GPT", "Llama"] if importlib.util.find_spec("llama") else ["GPT"]  # a starter may be without


@pytest.fixture(params=MODELS)
def model(request, dice):
    if request.param == "Llama":
        model = make_llama(dice)
    else:
        model = make_gpt(dice, vocab_size=257, block_size=16)
    model.tokenizer = Tokenizer("bytes", 257)
    return model


@torch.no_grad()
def scale_all(dice, vectors):
    for p in vectors.parameters():
        p.copy_(draw_scales(dice, *p.shape))


@torch.no_grad()
def differs_with_a_cache(model, idx, task_ids=None):
    """Whether idx (B, T), read token by token with a cache, has other logits than read at once."""
    cache = Cache(model, *idx.shape, task_ids)
    pieces = [model(token, task_ids=task_ids, cache=cache)[0] for token in idx.split(1, dim=1)]  # (B, 1, vocab_size)
    return not close(torch.cat(pieces, dim=1), model(idx, task_ids=task_ids)[0])


def test_all_together(dice, tmp_path, model):
    name = type(model).__name__
    base = copy.deepcopy(model)
    idx = torch.from_numpy(dice.integers(0, 257, (3, 6)))

    # attach, and train two steps
    vectors = attach(model)
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_bytes(dice.integers(32, 127, 500).astype("uint8").tobytes())
    splits = data.load(str(tmp_path), model.tokenizer, 257, 16)
    before = snapshot(base)
    train.train(model, splits, train.TrainConfig(steps=2, lr=0.1, batch_size=4, eval_interval=2, eval_windows=2))
    still = [matrix for matrix, p in vectors.named_parameters() if bool((p == 1).all())]
    check(not still, f"{name}: two steps of training leave {', '.join(still)} at ones")
    check(not changed(model, before), f"{name}: two steps of training changed the base")

    # save and load, onto another copy of the base
    scale_all(dice, vectors)  # so that every entry matters
    vectors.save(tmp_path / "task.npz")
    again = IA3.load(tmp_path / "task.npz", base)
    same = not changed(again, snapshot(vectors))
    check(same, f"{name}: the vectors that were saved are not those that come back")

    # stack: each row of the batch as if its task was alone; from here on in float64
    other = attach(copy.deepcopy(base), sites=("v",))
    scale_all(dice, other)
    model, base = model.double().eval(), base.double().eval()
    tasks = [again.double(), None, other.double()]
    mixed = copy.deepcopy(base)
    mixed.ia3 = stack(tasks).double()
    ids = torch.arange(3)
    with torch.no_grad():
        logits = mixed(idx, task_ids=ids)[0]
        for row, task in enumerate(tasks):
            base.ia3 = task
            words = f"{name}: in a batch of several tasks, row {row} is not what its task alone gives"
            check(close(logits[row], base(idx)[0][row]), words)
    base.ia3 = None

    # read with a cache
    words = f"{name}: the logits with a cache are not those without one"
    check(not differs_with_a_cache(model, idx), words)
    check(not differs_with_a_cache(mixed, idx, ids), f"{words}, in a batch of several tasks")

    # merge, in train mode as after a step; and a product that overflows
    model.ia3 = again
    values, was = snapshot(model), model.train().ia3
    merged = merge(model)
    check(model.ia3 is was and not changed(model, values), f"{name}: merging changed the model that was merged")
    check(model.training and merged.training, f"{name}: merging changed the mode, train or eval")
    model.eval()
    merged.eval()
    with torch.no_grad():
        found, truth = merged(idx)[0], model(idx)[0]
    check(not close(truth, base(idx)[0]), f"{name}: vectors change nothing: the logits are the base's")
    check(close(found, truth), f"{name}: the merged model's logits are not the unmerged model's")
    huge = copy.deepcopy(model).float()
    with torch.no_grad():
        for p in huge.parameters():
            p *= 1e20
    huge.ia3.fingerprint = fingerprint(huge)
    values, was, theirs = snapshot(huge), huge.ia3, huge.ia3.fingerprint
    refused(f"{name}: a merge that overflows float32", merge, huge)
    left = huge.ia3 is was and was.fingerprint == theirs and not changed(huge, values)
    check(left, f"{name}: a merge that was refused changed the model given")

    # sampled text
    seed = int(dice.integers(10**6))
    texts = [generate(m, idx, 8, generator=torch.Generator().manual_seed(seed)) for m in (model, merged)]
    check(torch.equal(*texts), f"{name}: the merged model samples another text than the unmerged one")
