"""What the tests share: small random models, tiny runs, and devices, of which CPU always runs.

`make test` runs the proof: tests/, without what is marked slow. `make test-all` runs every room; `pytest tools/tests`
one of them. Tests that take a device run on the CPU, and on CUDA too where there is one.
"""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from data.tokenizer import SMOLLM2, Tokenizer
from ia3 import attach
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from sample import generate

# models are tiny here: several threads would mostly wait for each other
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start

ROOT = Path(__file__).parent
# without tools/ nothing reads the weights that the oracles, transformers and peft, write
collect_ignore_glob = [] if (ROOT / "tools").is_dir() else ["tests/oracles/*"]

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_report_header():
    return f"devices: {', '.join(DEVICES)}"


@pytest.fixture
def handler():
    """Python's own handler of Ctrl-C, also where the tests run in the background, whose shell lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def products_in_float32():
    """A test that ran a script on a GPU left TF32 on: common.pick_device."""
    torch.set_float32_matmul_precision("highest")


def make_gpt(seed=0, **sizes):
    """A small GPT whose every weight is random, biases and LayerNorms included, so that none can hide a mistake."""
    config = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16} | sizes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**config))
    if config["vocab_size"] == 257:
        model.tokenizer = Tokenizer("bytes", 257)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3["original_max_position_embeddings"] = 64


def make_llama(seed=0, **sizes):
    """A small Llama whose every weight is random, as make_gpt's: 2 heads of keys for 4 of queries, and all biases."""
    config = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16}
    config |= {"n_hidden": 40, "rope_base": 10000.0, "norm_eps": 1e-5, "tied": True}
    config |= {"attention_bias": True, "mlp_bias": True} | sizes
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**config))
    if config["vocab_size"] == 257:
        model.tokenizer = Tokenizer("bytes", 257)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if "norm" in name:
                p.add_(1)
    return model.eval()


@pytest.fixture(params=[make_gpt, make_llama])
def make_model(request):
    """make_gpt, then make_llama: what takes this is tested on both models."""
    return request.param


def make_bpe():
    """A byte-level BPE as Tokenizer has it: the bytes from 1 on, seven merged tokens, and two special ones."""
    ranks = {bytes([i]): i + 1 for i in range(256)}
    ranks |= {token: 257 + i for i, token in enumerate((b"th", b" th", b"the", b" the", b"12", b"  ", b"123"))}
    return {"pattern": SMOLLM2, "ranks": ranks, "special_tokens": {"<end>": 0, "<start>": 264}}


def make_llama_with_bpe(**sizes):
    model = make_llama(vocab_size=280, **sizes)
    model.tokenizer = Tokenizer(make_bpe(), 280)
    return model


def make_ia3(model, seed=0, sites=("k", "v", "ff"), powers_of_two=False):
    """Attach random vectors to model: powers of two from 1/4 to 4 with signs, or N(1, 0.5)."""
    vectors = attach(model, sites=sites)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in vectors.parameters():
            if powers_of_two:
                sign = torch.randint(0, 2, p.shape, generator=dice) * 2 - 1
                p.copy_(sign * 2.0 ** torch.randint(-2, 3, p.shape, generator=dice))
            else:
                p.copy_(1 + 0.5 * torch.randn(p.shape, generator=dice))
    return vectors


def make_idx(model, rows=3, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, model.config.block_size), generator=dice)


def write_run(folder, model):
    """Write model to folder/base.pt, and text/{train,val}.txt. Returns folder and the flags of a run on them."""
    common.save(model, folder / "base.pt")
    (folder / "text").mkdir()
    (folder / "text/train.txt").write_text("In the beginning God created the heaven and the earth. " * 20)
    (folder / "text/val.txt").write_text("And God saw the light, that it was good. " * 5)
    flags = "--steps 4 --batch-size 4 --eval-interval 2 --device cpu"
    return folder, ["--base", f"{folder}/base.pt", "--data", f"{folder}/text", *flags.split()]


def load_vectors(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "about"}


def same(a, b):
    """Whether two dicts of arrays are equal bit for bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def end_texts_early(patch):
    """Let the texts that train.py and merge.py write end after 5 tokens: they take longer than all else in a test."""

    def few(model, idx, max_new_tokens, *settings, **others):
        return generate(model, idx, min(max_new_tokens, 5), *settings, **others)

    patch.setattr("sample.generate", few)
    patch.setattr("merge.generate", few)


@pytest.fixture
def short_texts(monkeypatch):
    end_texts_early(monkeypatch)


@pytest.fixture
def tiny_run(tmp_path, short_texts):
    """write_run of a random tiny GPT."""
    return write_run(tmp_path, make_gpt())
