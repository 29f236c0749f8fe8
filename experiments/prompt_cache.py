"""Read a prompt once for all of its choices: a cache as sample.Cache, but its rows can multiply, and gradients pass."""

import torch

from model import GPT


class PromptCache:
    """A cache for hidden() in which a text can go on in several ways: a prefix in prompts, a prompt in its choices.

    Each read has as many rows as the one before, or n times as many: then each row goes on in n rows, which stand
    together. Unlike sample.Cache it lets gradients through.

    padding: (B,) long, of the first read: how many tokens at the start of each row are not its own.
    """

    def __init__(self, model, padding):
        if isinstance(model, GPT) and padding.any():
            raise ValueError("this needs a Llama: padding before a prompt would move a GPT-2's positions")
        self.layers = [PromptLayer(padding) for _ in range(model.config.n_layer)]

    def n_read(self, _model, _task_ids):
        return self.layers[0].length


class PromptLayer:
    """One layer's part of a PromptCache."""

    def __init__(self, padding):
        self.padding = padding
        self.length = 0  # tokens read so far, the padding among them

    def append(self, k, v):
        """As sample.LayerCache.append. k, v: the new tokens', (rows, n_kv_head, T, d_head)."""
        rows, _, T, _ = k.shape
        if self.length > 0:
            n = rows // len(self.k)
            k = torch.cat((self.k.repeat_interleave(n, 0), k), 2)
            v = torch.cat((self.v.repeat_interleave(n, 0), v), 2)
        self.k = k
        self.v = v
        self.length = k.size(2)
        padding = self.padding.repeat_interleave(rows // len(self.padding)).view(-1, 1, 1, 1)
        place = torch.arange(self.length, device=k.device)
        new = place[-T:].unsqueeze(1)  # (T, 1)
        seen = (place <= new) & (place >= padding)  # (rows, 1, T, length)
        return k, v, seen | (place == new)  # padding sees itself: a softmax needs something
