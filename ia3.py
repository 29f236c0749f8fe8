"""(IA)³'s vectors as a value: make them, freeze the base under them, count, save, load, stack tasks.

A task is three small matrices, one row a layer, all ones at the start, so that step 0 is the base, bit for bit:

    l_k  (n_layer, width of the keys)   l_v  (n_layer, width of the values)   l_ff  (n_layer, width of the MLP)

The widths are the model's (config.widths); in GPT-2 they are n_embd, n_embd and 4·n_embd.

    attach(model)                       # to train: freeze the model, set model.ia3 to vectors of ones
    model.ia3 = None                    # the base again
    model.ia3 = IA3.load(path, model)   # to switch: another task
    model.ia3 = stack([a, b, None])     # three tasks at once, the third is the base: model(idx, task_ids=(B,) long)
"""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from common import read_shapes, replace_file

SITES = ("k", "v", "ff")  # what can be scaled: keys, values, the MLP's hidden activations


class IA3(nn.Module):
    """The vectors of one task, or of several with a leading task axis (stack). A site left out is None.

    config: the base's. sites: a list or tuple of 'k', 'v', 'ff'; ValueError for others, or for none.
    """

    def __init__(self, config, sites=SITES):
        super().__init__()
        if isinstance(sites, str) or not sites or not set(sites) <= set(SITES):
            raise ValueError(f"sites must be a list of some of {', '.join(SITES)}, not {sites!r}")

        def ones(site, width):
            if site not in sites:
                return None
            return nn.Parameter(torch.ones(config.n_layer, width))

        k_width, v_width, ff_width = config.widths
        self.l_k = ones("k", k_width)
        self.l_v = ones("v", v_width)
        self.l_ff = ones("ff", ff_width)
        self.config = config
        self.fingerprint = None  # of the base that they belong to: known once they are attached, or loaded

    def matrices(self):
        """Return {'l_k': l_k, ...}, without the sites left out."""
        return dict(self.named_parameters())

    def count(self):
        """The number of entries: a task of all sites has n_layer · (d_k + d_v + d_ff) (section 3.3)."""
        return sum(p.numel() for p in self.parameters())

    def is_stacked(self):
        return next(self.parameters()).dim() == 3  # (n_tasks, n_layer, width)

    def per_layer(self, task_ids=None):
        """Return each layer's (l_k, l_v, l_ff), each (width,), or (B, 1, width) gathered by task_ids, or None.

        task_ids: (B,) long, wanted where the vectors are stacked and only there. Raises ValueError where it does not
        fit. On a GPU the ids are not looked at, since that would make every forward pass wait, and one out of range
        ends in CUDA's own assertion: whoever calls the model itself runs check_task_ids once, as generate does.
        """
        if self.is_stacked() != (task_ids is not None):
            raise ValueError("stacked vectors want task_ids, one a row, and vectors of one task want none")
        on_gpu = isinstance(task_ids, torch.Tensor) and task_ids.device.type != "cpu"
        if task_ids is not None and not on_gpu:
            self.check_task_ids(task_ids)

        def of_layer(matrix, layer):
            if matrix is None:
                return None
            if task_ids is not None:
                return matrix[task_ids, layer].unsqueeze(1)  # (B, 1, width): each row of the batch its own task's
            return matrix[layer]  # (width,)

        layers = range(self.config.n_layer)
        return [(of_layer(self.l_k, i), of_layer(self.l_v, i), of_layer(self.l_ff, i)) for i in layers]

    def check_task_ids(self, task_ids):
        """Raise ValueError unless task_ids is (B,) long and names tasks that are here."""
        n_tasks = next(self.parameters()).size(0)
        if not isinstance(task_ids, torch.Tensor) or task_ids.dtype != torch.long or task_ids.dim() != 1:
            raise ValueError("task_ids must be a tensor (B,) of dtype long, one id a row")
        if len(task_ids) and not 0 <= task_ids.min() <= task_ids.max() < n_tasks:
            raise ValueError(f"task_ids must be from 0 to {n_tasks - 1}")

    def save(self, path):
        """Write one .npz: the matrices, and the config, names and fingerprint of the base as JSON.

        Raises ValueError for vectors of no known base (attach them), and for stacked ones (unstack them first).
        """
        if self.fingerprint is None or self.is_stacked():
            raise ValueError("only one task's vectors can be saved (ia3.unstack), and of a known base (ia3.attach)")
        arrays = {name: p.detach().float().cpu().numpy() for name, p in self.matrices().items()}
        about = {"config": asdict(self.config), "vectors": list(arrays), "fingerprint": self.fingerprint}
        with replace_file(path) as f:
            np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path, model):
        """Read vectors that were made for model's base; no code of the file's is run. Returns IA3, not yet attached.

        Assign them to model.ia3 to switch tasks; attach them to train on. Raises OSError where there is no such file
        and ValueError where it is damaged or made for another base.
        """
        with open(path, "rb") as f:
            try:
                file = np.load(f, allow_pickle=False)
                shapes = read_shapes(file)
                about = json.loads(file["about"].item())
                vectors = cls(model.config, [name.removeprefix("l_") for name in about["vectors"]])
                wanted = {name: tuple(p.shape) for name, p in vectors.matrices().items()}
                arrays = {}
                if shapes == wanted:  # else none is read, and the error follows below
                    arrays = {name: file[name].astype(np.float32, casting="same_kind") for name in wanted}
            except Exception as e:  # a damaged file makes zipfile, json and numpy raise nearly anything
                raise ValueError(f"{path} is truncated, or no file of (IA)³ vectors ({type(e).__name__})") from None
        if shapes != wanted:
            raise ValueError(f"{path} holds {shapes}, but this base takes {wanted}")
        for name, p in vectors.matrices().items():
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{path}: {name} holds NaN or infinity")
            p.data = torch.from_numpy(arrays[name])
        theirs, ours = str(about.get("fingerprint")), fingerprint(model)
        if theirs != ours:
            raise ValueError(f"{path} was made for another base of this shape ({theirs[:8]}, not {ours[:8]})")
        vectors.fingerprint = ours
        return vectors.to(next(model.parameters()).device)


def attach(model, vectors=None, sites=SITES):
    """Freeze model, set model.ia3 to vectors (by default ones at sites), remember the base's fingerprint.

    Attach to train or to have vectors checked; to switch tasks, assigning to model.ia3 is enough. Cast the model first:
    model.to(dtype) afterwards casts the vectors, too. Call it before torch.compile and before DDP. Returns the vectors,
    float32 and on the model's device. Raises ValueError for those of another base.
    """
    if vectors is None:
        vectors = IA3(model.config, sites)
    if not isinstance(vectors, IA3):
        raise ValueError(f"attach wants an IA3, not {type(vectors).__name__}: IA3.load(path, model) reads a file")
    theirs, ours = vectors.fingerprint, fingerprint(model)
    if (vectors.config.n_layer, vectors.config.widths) != (model.config.n_layer, model.config.widths):
        raise ValueError("these vectors are for another base: another number of layers, or other widths")
    if theirs not in (None, ours):
        raise ValueError(f"these vectors are for another base of this shape ({theirs[:8]}, not {ours[:8]})")
    vectors.fingerprint = ours
    model.ia3 = None  # vectors that were there belong to their holder: only the base is frozen
    model.requires_grad_(False)
    model.ia3 = vectors.requires_grad_().to(next(model.parameters()).device, torch.float32)  # whatever the base is in
    return vectors


def stack(tasks):
    """Copy several tasks, each an IA3 or None for the base, into one IA3 of matrices (n_tasks, n_layer, width).

    What a task does not scale is ones in its row. Raises ValueError for no vectors at all, for stacked ones, and for
    those of different shapes or bases.
    """
    tasks = list(tasks)
    given = [task for task in tasks if task is not None]
    shapes = {(task.config.n_layer, task.config.widths) for task in given}
    fingerprints = {task.fingerprint for task in given if task.fingerprint}
    if len(shapes) != 1 or len(fingerprints) > 1 or any(task.is_stacked() for task in given):
        raise ValueError("stack wants one or more tasks' vectors, all for one base")
    sites = [site for site in SITES if any(f"l_{site}" in task.matrices() for task in given)]
    stacked = IA3(given[0].config, sites).to(next(given[0].parameters()).device)
    stacked.fingerprint = fingerprints.pop() if fingerprints else None
    for name, ones in stacked.matrices().items():
        matrices = [ones if task is None else task.matrices().get(name, ones) for task in tasks]
        matrices = [matrix.detach().to(ones.device) for matrix in matrices]
        setattr(stacked, name, nn.Parameter(torch.stack(matrices)))  # (n_tasks, n_layer, width)
    return stacked


def unstack(stacked):
    """The way back: return a list of IA3, copies of one task's vectors each, so that each can be saved or merged.

    The sites are the stack's: what a task did not scale is ones. Raises ValueError for vectors of one task.
    """
    if not stacked.is_stacked():
        raise ValueError("unstack wants stacked vectors, and these are one task's")
    n_tasks = next(stacked.parameters()).size(0)
    tasks = []
    for task_id in range(n_tasks):
        task = IA3(stacked.config, [name.removeprefix("l_") for name in stacked.matrices()])
        task.fingerprint = stacked.fingerprint
        for name, matrix in stacked.matrices().items():
            setattr(task, name, nn.Parameter(matrix[task_id].detach().clone()))  # (n_layer, width)
        tasks.append(task)
    return tasks


def fingerprint(model):
    """SHA-256, in hexadecimal, of the base as a function: class, config and weights, without the vectors.

    IA3.load, attach and merge refuse vectors of another base; merging changes the weights, so that the same vectors are
    not merged twice. Hashed are the config without dropout and block_size (n_head, say, changes the function and no
    shape), and every weight's name, shape and values, a tied head once. Values are rounded to bfloat16, so that a base
    has one fingerprint in float32 and bfloat16; another base whose weights round to the same passes.
    """
    config = {name: value for name, value in asdict(model.config).items() if name not in ("dropout", "block_size")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config]).encode())
    for name, p in sorted(model.named_parameters()):
        if not name.startswith("ia3."):
            digest.update(f"{name} {tuple(p.shape)}".encode())
            rounded = p.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.int16).numpy())  # numpy has no bfloat16
    return digest.hexdigest()
