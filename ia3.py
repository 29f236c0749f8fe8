"""(IA)³'s vectors as a value: make them, freeze the base under them, count, save, load, stack tasks.

A task is three small matrices, a row a layer, all ones at the start, so that step 0 is the base, bit for bit:

    l_k  (n_layer, n_embd)      l_v  (n_layer, n_embd)      l_ff  (n_layer, 4·n_embd)

    attach(model)                       # freeze the model, set model.ia3 to vectors of ones
    model.ia3 = None                    # the base again
    model.ia3 = IA3.load(path, model)   # another task
    attach(model, stack([a, b, None]))  # three tasks at once, the third is the base: model(idx, tasks=(B,) long)
"""

import hashlib
import json
import os
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

TARGETS = ("k", "v", "ff")  # what can be scaled: keys, values, the MLP's hidden activations


class IA3(nn.Module):
    """The vectors of one task, or of several with a leading task axis (stack). A target left out is None.

    config: the base's GPTConfig. targets: any of 'k', 'v', 'ff'; ValueError for others, or for none.
    """

    def __init__(self, config, targets=TARGETS):
        super().__init__()
        if not targets or not set(targets) <= set(TARGETS):
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, not {','.join(targets) or 'none'}")

        def ones(target, width):
            return nn.Parameter(torch.ones(config.n_layer, width)) if target in targets else None

        self.l_k = ones("k", config.n_embd)
        self.l_v = ones("v", config.n_embd)
        self.l_ff = ones("ff", 4 * config.n_embd)
        self.config = config
        self.base = None  # the fingerprint of the base they were attached to

    def matrices(self):
        """Return {'l_k': l_k, ...}, without the targets left out."""
        return dict(self.named_parameters())

    def count(self):
        """The number of values: with all targets 6·n_layer·n_embd a task (section 3.3 on GPT-2's shapes)."""
        return sum(p.numel() for p in self.parameters())

    def is_stacked(self):
        return next(self.parameters()).dim() == 3  # (n_tasks, n_layer, width)

    def rows(self, tasks=None):
        """Return each layer's (l_k, l_v, l_ff), (width,) or None; gathered by tasks (B,) long, (B, 1, width) or None.

        Raises ValueError when stacked vectors and tasks do not come together, or when an id is out of range.
        """
        if self.is_stacked() != (tasks is not None):
            raise ValueError("stacked vectors want tasks, one id a row, and vectors of one task want none")
        n_tasks = next(self.parameters()).size(0)
        if tasks is not None and (tasks.dtype != torch.long or tasks.min() < 0 or tasks.max() >= n_tasks):
            raise ValueError(f"tasks must be long, each id from 0 to {n_tasks - 1}")

        def row(matrix, layer):
            if matrix is not None and tasks is not None:
                return matrix[tasks, layer].unsqueeze(1)  # (B, 1, width)
            return None if matrix is None else matrix[layer]

        return [(row(self.l_k, i), row(self.l_v, i), row(self.l_ff, i)) for i in range(self.config.n_layer)]

    def save(self, path):
        """Write one .npz: matrices, config, the base's fingerprint. ValueError for unattached or stacked vectors."""
        if self.base is None or self.is_stacked():
            raise ValueError("only one task's vectors, attached to a base (ia3.attach), can be saved")
        arrays = {name: p.detach().float().cpu().numpy() for name, p in self.matrices().items()}
        about = {"config": asdict(self.config), "vectors": list(arrays), "base": self.base}
        with open(f"{path}.tmp", "wb") as f:
            np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)
        os.replace(f"{path}.tmp", path)  # a crash leaves the old file or the new one, never half of one

    @classmethod
    def load(cls, path, model):
        """Read vectors that were made for model's base; no code of the file's is run. Returns IA3, not yet attached.

        Raises OSError where there is no such file and ValueError where it is damaged or made for another base.
        """
        with open(path, "rb") as f:
            try:
                file = np.load(f, allow_pickle=False)
                about = json.loads(file["about"].item())
                arrays = {name: file[name].astype(np.float32) for name in file.files if name != "about"}
                vectors = cls(model.config, [name.removeprefix("l_") for name in about["vectors"]])
                base = about["base"]
            except Exception as e:  # a damaged file makes zipfile, json and numpy raise nearly anything
                raise ValueError(f"{path} is truncated, or no file of (IA)³ vectors ({type(e).__name__})") from None
        found = {name: a.shape for name, a in arrays.items()}
        wanted = {name: tuple(p.shape) for name, p in vectors.matrices().items()}
        if found != wanted:
            raise ValueError(f"{path} holds {found}, but this base takes {wanted}")
        for name, p in vectors.matrices().items():
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
            p.data = torch.from_numpy(arrays[name])
        vectors.base = fingerprint(model)
        if base != vectors.base:
            raise ValueError(f"{path} was made for another base of this shape ({base[:8]}, not {vectors.base[:8]})")
        return vectors.to(next(model.parameters()).device)

    def extra_repr(self):
        lines = [f"{name} {tuple(p.shape)}, {p.min():.3f} to {p.max():.3f}" for name, p in self.matrices().items()]
        return "\n".join([*lines, f"{self.count():,} values for base {self.base[:8] if self.base else 'unknown'}"])


def attach(model, vectors=None, targets=TARGETS):
    """Freeze model, set model.ia3 to vectors (by default ones for targets), remember the base's fingerprint.

    Call it before torch.compile and before DDP. Returns the vectors. Raises ValueError for those of another base.
    """
    vectors = IA3(model.config, targets) if vectors is None else vectors
    theirs, ours = ((c.n_layer, c.n_embd) for c in (vectors.config, model.config))
    base = fingerprint(model)
    if theirs != ours or vectors.base not in (None, base):
        raise ValueError(f"vectors of another base: n_layer, n_embd {theirs} of {vectors.base}, not {ours} of {base}")
    vectors.base = base
    model.ia3 = None  # vectors that were there belong to their holder: only the base is frozen
    model.requires_grad_(False)
    model.ia3 = vectors.requires_grad_().to(next(model.parameters()).device)  # float32, whatever the base is held in
    return vectors


def stack(tasks):
    """Copy several tasks, each an IA3 or None for the base, into one IA3 of matrices (n_tasks, n_layer, width).

    What a task does not scale is ones in its row. Raises ValueError for vectors of different shapes or bases.
    """
    given = [task for task in tasks if task is not None]
    shapes = {(task.config.n_layer, task.config.n_embd) for task in given}
    bases = {task.base for task in given if task.base}
    if len(shapes) != 1 or len(bases) > 1 or any(task.is_stacked() for task in given):
        raise ValueError("stack wants one or more tasks' vectors, all for one base")
    stacked = IA3(given[0].config, [t for t in TARGETS if any(f"l_{t}" in task.matrices() for task in given)])
    stacked.base = bases.pop() if bases else None
    for name, ones in stacked.matrices().items():
        rows = [ones if task is None else task.matrices().get(name, ones) for task in tasks]
        setattr(stacked, name, nn.Parameter(torch.stack([row.detach().to(rows[0].device) for row in rows])))
    return stacked


def fingerprint(model):
    """SHA-256 of the base's keys, shapes and values rounded to bfloat16, without the vectors and the tied head."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        if not name.startswith("ia3.") and name != "lm_head.weight":
            digest.update(f"{name} {tuple(t.shape)}".encode())
            digest.update(t.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
