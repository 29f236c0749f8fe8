"""The learning rate of a step; and then all of it: vectors on the bundled base learn the spelling of 1623."""

from pathlib import Path

import pytest
import torch

import common
import data
import train
from conftest import against, changed, check, snapshot
from ia3 import attach

BASE = Path(__file__).parent.parent / "data/base.pt"


def rates(dice, schedule):
    """A TrainConfig, the first step after its warmup, and the learning rate of every step and of the one after."""
    warmup = int(dice.integers(3, 20))
    steps = warmup + 12 * int(dice.integers(3, 9))
    config = train.TrainConfig(
        steps=steps, lr=float(dice.uniform(0.01, 1)), schedule=schedule, warmup=(warmup + 0.75) / steps
    )
    return config, warmup, [train.learning_rate(step, config) for step in range(steps + 1)]


def near(a, b, config):
    return abs(a - b) < 1e-9 * config.lr


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_warmup_rises_in_equal_steps(dice, schedule):
    config, warmup, rate = rates(dice, schedule)
    check(rate[0] > 0, "the learning rate of step 0 is 0: that step would be lost")
    check(near(max(rate), config.lr, config), f"the peak must be lr: it is {against(max(rate), config.lr)}")
    peak = rate.index(max(rate))
    words = f"a warmup of {warmup + 0.75} steps is ⌊{warmup + 0.75}⌋ = {warmup} whole ones"
    check(peak == warmup, f"{words}, and the peak is at step {warmup}, not {peak}")
    for step in range(warmup):
        words = f"the warmup rises by lr/{warmup + 1} a step, but not from step {step} to {step + 1}"
        check(near(rate[step + 1] - rate[step], config.lr / (warmup + 1), config), words)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_without_warmup(dice, schedule):
    config = train.TrainConfig(steps=10, lr=float(dice.uniform(0.01, 1)), warmup=0.0, schedule=schedule)
    first = train.learning_rate(0, config)
    words = f"with warmup = 0 no step rises, and step 0 has all of lr: it is {against(first, config.lr)}"
    check(near(first, config.lr, config), words)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_that_is_all_warmup(schedule):
    config = train.TrainConfig(steps=10, lr=1.0, warmup=1.0, schedule=schedule)
    try:
        rate = [train.learning_rate(step, config) for step in range(11)]
    except ZeroDivisionError:
        check(
            False, "where warmup is 1, all steps rise and none is left for the decay: that divides by zero at the end"
        )
    check(rate[:10] == sorted(rate[:10]) and rate[9] < 1, "where warmup is 1, the rate must rise to the last step")


def test_the_linear_decay(dice):
    config, warmup, rate = rates(dice, "linear")
    n = config.steps - warmup
    check(near(rate[-1], 0, config), f"after the last step, at step {config.steps}, the rate must be 0")
    for step in range(warmup, config.steps):
        check(
            near(rate[step] - rate[step + 1], config.lr / n, config),
            f"linear: it must fall by lr/{n} after step {step}",
        )


def test_the_cosine_decay(dice):
    config, warmup, rate = rates(dice, "cosine")
    n = config.steps - warmup
    check(near(rate[-1], 0, config), f"after the last step, at step {config.steps}, the rate must be 0")
    check(near(rate[warmup + n // 2], config.lr / 2, config), "cosine: half of the peak half-way down")
    for i in range(n + 1):
        words = f"cosine: what is lost at step {warmup + i} is left at step {config.steps - i}"
        check(near(rate[warmup + i] + rate[config.steps - i], config.lr, config), words)
    for part, cosine in ((6, 3**0.5 / 2), (4, 0.5**0.5)):  # of 30° and of 45°
        words = f"cosine: the rate must be lr·(1 + cos(π·done))/2, but it is not when 1/{part} is done"
        check(near(rate[warmup + n // part], config.lr * (1 + cosine) / 2, config), words)


def test_vectors_learn_and_the_base_stays(dice):
    """Twelve steps at grading time. In four seeds they gained 0.26 nats or more over the base; 0.1 is required."""
    model = common.load(BASE)
    split = data.load("folio", model.tokenizer, model.config.vocab_size, 32)
    seed = int(dice.integers(10**6))
    settings = {"steps": 12, "lr": 0.1, "batch_size": 8, "eval_interval": 12, "eval_windows": 16, "seed": seed}
    config = train.TrainConfig(**settings)
    before = snapshot(model)
    idx = split["val"].windows([0])[0]
    with torch.no_grad():
        logits = model.eval()(idx)[0]
        attach(model)
        check(torch.equal(model.eval()(idx)[0], logits), "at step 0 the logits are not the base's, bit for bit")
    free = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("ia3.")]
    check(not free, f"attach left {len(free)} tensors of the base trainable: it must be frozen before anything learns")
    history = train.train(model, split, config)
    model.ia3 = None
    check(not changed(model, before), "training changed the base: without the vectors it is no longer what it was")
    at_first, at_last = history[0]["val_loss"], history[-1]["val_loss"]
    words = f"after 12 steps val must be 0.1 nats below the base's {at_first:.2f}; it fell by {at_first - at_last:.3f}"
    check(at_first - at_last > 0.1, words)
