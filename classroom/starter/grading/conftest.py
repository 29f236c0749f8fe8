"""What the grading tests share: random models and vectors, drawn anew at every grading, and words for what is wrong.

The exercise of a test is that of its file: grading/exercises.json has the list.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import ia3
from model import GPT, GPTConfig

EXERCISES = json.loads((Path(__file__).parent / "exercises.json").read_text(encoding="utf-8"))
SUBSETS = [("k",), ("v",), ("ff",), ("k", "v"), ("k", "ff"), ("v", "ff"), ("k", "v", "ff")]


def pytest_configure(config):
    for exercise in EXERCISES:
        config.addinivalue_line("markers", f"exercise{exercise['number']}: {exercise['title']}")


def pytest_collection_modifyitems(items):
    numbers = {f"test_{exercise['name']}": exercise["number"] for exercise in EXERCISES}
    for item in items:
        item.add_marker(f"exercise{numbers[item.path.stem]}")


def check(condition, message):
    """Fail with message, and no traceback, unless condition holds."""
    if not condition:
        pytest.fail(message, pytrace=False)


def refused(what, function, *given):
    """function(*given) must raise a ValueError. Returns what that says."""
    try:
        function(*given)
    except NotImplementedError:
        raise
    except ValueError as e:
        return str(e)
    except Exception as e:
        check(False, f"{what} must be refused with a ValueError, not with {type(e).__name__}: {e}")
    check(False, f"{what} must be refused with a ValueError, but there is no error")


def runs(words, function, *given):
    """Return function(*given), which must not raise; words say what is wrong if it does."""
    try:
        return function(*given)
    except NotImplementedError:
        raise
    except Exception as e:
        check(False, f"{words} ({type(e).__name__}: {next(iter(str(e).splitlines()), '')[:80]})")


def close(a, b):
    """a and b agree but for rounding in float64."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-9 * (1 + b.abs().max()))


def against(found, wanted):
    """Both numbers, with as many digits as show that they differ."""
    digits = 3
    while digits < 17 and f"{found:.{digits}g}" == f"{wanted:.{digits}g}":
        digits += 1
    return f"{found:.{digits}g}, where {wanted:.{digits}g} is right"


def check_digits(a, b, what):
    """Fail if a agrees with b, both float64, to float32's digits only."""
    rounded = not close(a, b) and a.shape == b.shape and bool((a - b).abs().max() < 1e-5 * (1 + b.abs().max()))
    words = "in float64 it is right to float32's digits only: cast neither factor before the product"
    check(not rounded, f"{what}: {words}")


@pytest.fixture
def dice():
    return np.random.default_rng(int(os.environ.get("GRADE_SEED") or secrets.randbelow(10**9)))


def draw(dice, *shape, mean=0.0, spread=1.0):
    """A float64 tensor of N(mean, spread)."""
    return torch.from_numpy(dice.normal(mean, spread, shape))


def draw_scales(dice, *shape):
    """Scales of N(1, 0.7), among them, in every vector, one below -0.5 and one above 2.5."""
    scales = draw(dice, *shape, mean=1.0, spread=0.7)
    low, high = dice.choice(shape[-1], 2, replace=False)
    scales[..., low] = -0.5 - draw(dice, *shape[:-1]).abs()
    scales[..., high] = 2.5 + draw(dice, *shape[:-1]).abs()
    return scales


def draw_short(dice, *shape):
    """A float32 tensor around 1 of 11 binary digits: times a bfloat16, which has 8, it is exact in float32."""
    return draw(dice, *shape, mean=1.0, spread=0.5).half().float()


def product(l, t):
    """What l · t is in t's dtype, rounded once, for an l of draw_short."""
    return (l.double() * t.double()).to(t.dtype)


def make_gpt(dice, **sizes):
    """A small GPT in float32 with random sizes and weights, biases and LayerNorms included."""
    n_head = int(dice.integers(1, 4))
    n_embd = n_head * 2 * int(dice.integers(2, 5))
    config = {"block_size": 8, "vocab_size": 31, "n_layer": int(dice.integers(2, 5))}
    config |= {"n_head": n_head, "n_embd": n_embd} | sizes
    model = GPT(GPTConfig(**config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(draw(dice, *p.shape, mean=float("ln_" in name and "weight" in name), spread=0.3))
    return model.eval()


@dataclass
class OtherConfig:
    """Of a base that is not a GPT-2: n_embd does not determine its widths."""

    n_layer: int
    n_embd: int
    widths: tuple


class Other(torch.nn.Module):
    """A base that is not a GPT-2, as far as vectors know it: a config and weights."""

    def __init__(self, dice, widths):
        super().__init__()
        self.config = OtherConfig(n_layer=2, n_embd=8, widths=widths)
        self.ia3 = None
        self.transformer = torch.nn.Linear(3, 3)  # whoever freezes only this leaves the other one trainable
        self.outside = torch.nn.Linear(3, 3)
        for p in self.parameters():
            p.data = draw(dice, *p.shape).float()


def put_vectors(vectors, dice, config, sites, spread, n_tasks=None, fingerprint=None):
    """Make vectors, an IA3 that was not initialized, one with l_k, l_v, l_ff of N(1, spread) for the sites."""
    torch.nn.Module.__init__(vectors)
    vectors.config = config
    vectors.fingerprint = fingerprint
    for site, width in zip(("k", "v", "ff"), config.widths, strict=True):
        shape = (config.n_layer, width) if n_tasks is None else (n_tasks, config.n_layer, width)
        values = draw(dice, *shape, mean=1.0, spread=spread).float()
        setattr(vectors, f"l_{site}", torch.nn.Parameter(values) if site in sites else None)


def make_vectors(dice, config, sites=("k", "v", "ff"), n_tasks=None, fingerprint=None):
    """Random vectors that need none of the exercises; stacked ones where n_tasks is given."""
    vectors = ia3.IA3.__new__(ia3.IA3)
    put_vectors(vectors, dice, config, sites, 0.5, n_tasks, fingerprint)
    return vectors


def make_known(dice, sites=("k", "v", "ff"), **sizes):
    """A small GPT, and random vectors that remember it as their base."""
    model = make_gpt(dice, **sizes)
    return model, make_vectors(dice, model.config, sites, fingerprint=ia3.fingerprint(model))


def about(model, vectors):
    """What a file says of its vectors, a dict, by the handout."""
    names = [name for name, _ in vectors.named_parameters()]
    return {"config": asdict(model.config), "vectors": names, "fingerprint": vectors.fingerprint}


def write(path, told, vectors, **changes):
    """Write a file of vectors by numpy, with `told` in about; changes replace arrays, and None leaves one out."""
    arrays = {name: p.detach().numpy() for name, p in vectors.named_parameters()}
    arrays = {"about": np.bytes_(json.dumps(told))} | arrays | changes
    with open(path, "wb") as f:
        np.savez(f, **{name: array for name, array in arrays.items() if array is not None})


@pytest.fixture
def given_start(dice, monkeypatch):
    """IA3(config, sites) and its count() work, whether or not they are done: they are other exercises."""

    def start(self, config, sites=ia3.SITES):
        put_vectors(self, dice, config, sites, spread=0)

    def count(self):
        return torch.nn.utils.parameters_to_vector(self.parameters()).numel()

    monkeypatch.setattr(ia3.IA3, "__init__", start)
    monkeypatch.setattr(ia3.IA3, "count", count)


def snapshot(model):
    """A copy of every tensor of model's, by name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def changed(model, before):
    """The names of model's tensors that are no longer, bit for bit, what snapshot saw."""
    now = model.state_dict()
    return [name for name, t in before.items() if name not in now or not torch.equal(now[name], t)]
