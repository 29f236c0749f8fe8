"""Losses window by window, and how sure one may be of their mean: a bootstrap over windows and seeds, paired."""

import numpy as np
import torch
from torch.nn import functional as F

from data import to_device
from train import autocast


@torch.no_grad()
def window_losses(model, split, config, n_windows=None):
    """Return the nats of n_windows evenly spaced windows of a split, or of all, and each one's number of targets.

    Two float64 arrays (windows,): nats.sum() / targets.sum() is train.evaluate's loss of the same windows.
    """
    n = min(n_windows or len(split), len(split))
    ids = torch.linspace(0, len(split) - 1, n, dtype=torch.float64).long().tolist()
    nats, targets = [], []
    model.eval()
    for i in range(0, n, config.batch_size):
        x, y = to_device(split.windows(ids[i : i + config.batch_size]), model.lm_head.weight.device)
        with autocast(model, config):
            logits = model(x)[0]  # (B, T, vocab_size)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), y, ignore_index=-1, reduction="none")  # (B, T)
        nats.append(losses.double().sum(1).cpu())
        targets.append((y >= 0).sum(1).cpu())
    return torch.cat(nats).numpy(), torch.cat(targets).double().numpy()


def bootstrap(nats, targets, n=2000):
    """Resample windows and seeds n times, the same windows and the same seeds for everyone: differences are paired.

    nats: {name: (seeds, windows)}, the base's with one row; targets (windows,). Returns {name: n means, nats a target}.
    """
    dice = np.random.default_rng(0)
    windows = dice.multinomial(len(targets), np.full(len(targets), 1 / len(targets)), n)  # (n, windows): how often each
    seeds = {s: dice.multinomial(s, np.full(s, 1 / s), n) / s for s in sorted({len(m) for m in nats.values()})}
    means = {}
    for name, matrix in nats.items():
        per_seed = windows @ matrix.T / (windows @ targets)[:, None]  # (n, seeds)
        means[name] = (seeds[len(matrix)] * per_seed).sum(1)
    return means


def interval(draws):
    """The middle 95 % of a bootstrap's draws."""
    return tuple(np.quantile(draws, (0.025, 0.975)).tolist())
