"""(IA)³'s vectors as a value: make them, freeze the base under them, count, save, load, stack tasks.

A task is three small matrices with one row per layer. They start at ones, so step 0 is the base, bit for bit:

    l_k  (n_layer, width of the keys)   l_v  (n_layer, width of the values)   l_ff  (n_layer, width of the MLP)

The widths are the model's (config.widths); in GPT-2 they are n_embd, n_embd and 4·n_embd.

    attach(model)                       # to train: freeze the model, set model.ia3 to vectors of ones
    model.ia3 = None                    # the base again
    model.ia3 = IA3.load(path, model)   # switch to another task
    model.ia3 = stack([a, b, None])     # three tasks at once, the third is the base: model(idx, task_ids=(B,) long)
"""

import hashlib
import json
import math
import os
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from disk import read_shapes, replace_file

SITES = ("k", "v", "ff")  # what can be scaled: keys, values, the MLP's hidden activations


class IA3(nn.Module):
    """The vectors of one task, or of several with a leading task axis (stack). A site left out is None.

    config: the base's. sites: a list or tuple of 'k', 'v', 'ff'; raises ValueError for others, or for none.
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
        self.fingerprint = None  # of their base: set when they are attached or loaded

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

        task_ids: (B,) long, required when the vectors are stacked and refused otherwise (ValueError). On a GPU their
        range is not checked, because looking would make every forward pass wait. check_task_ids checks it once.
        """
        if self.is_stacked() != (task_ids is not None):
            raise ValueError("stacked vectors need task_ids, one per row; vectors of one task take none")
        if task_ids is not None:
            self.check_task_ids(task_ids, in_range=not getattr(task_ids, "is_cuda", False))
        layers = []
        for i in range(self.config.n_layer):
            l_k = layer_vector(self.l_k, i, task_ids)
            l_v = layer_vector(self.l_v, i, task_ids)
            l_ff = layer_vector(self.l_ff, i, task_ids)
            layers.append((l_k, l_v, l_ff))
        return layers

    def check_task_ids(self, task_ids, in_range=True):
        """Raise ValueError unless task_ids is (B,) long and, where in_range is asked, names tasks that are here."""
        n_tasks = next(self.parameters()).size(0)
        if not isinstance(task_ids, torch.Tensor) or task_ids.dtype != torch.long or task_ids.dim() != 1:
            raise ValueError("task_ids must be a tensor (B,) of dtype long, one id per row")
        if in_range and len(task_ids) and not 0 <= task_ids.min() <= task_ids.max() < n_tasks:
            raise ValueError(f"task_ids must be from 0 to {n_tasks - 1}")

    def save(self, path, how=None):
        """Write one .npz: the matrices, and beside them 'about': the base's config and fingerprint, the names.

        how: a dict of plain values that says how they were trained; it is kept in 'about' and not read again.

        Raises ValueError for vectors of no known base (attach them), for stacked ones (unstack them first), and for
        NaN or infinity.
        """
        if self.fingerprint is None or self.is_stacked():
            raise ValueError("save takes one task's vectors (ia3.unstack) of a known base (ia3.attach)")
        arrays = {name: p.detach().float().cpu().numpy() for name, p in self.matrices().items()}
        check_arrays(arrays)
        about = {"config": asdict(self.config), "vectors": list(arrays), "fingerprint": self.fingerprint}
        if how is not None:
            about["how"] = how
        with replace_file(path) as f:
            # JSON as a zero-dimensional array of bytes, so that np.load needs no pickle
            np.savez(f, about=np.bytes_(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path, model):
        """Read vectors made for model's base. Nothing in the file is run as code. Returns an IA3, not yet attached.

        Assign it to model.ia3 to switch tasks; attach it to train on. Raises OSError if there is no such file and
        ValueError if it is damaged or was made for another base.
        """
        model = unwrap(model)
        about, arrays = read_npz(path, most=model.config.n_layer * sum(model.config.widths))
        try:
            vectors = cls(model.config, [name.removeprefix("l_") for name in about["vectors"]])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path} names no vectors of (IA)³") from None
        found = {name: a.shape for name, a in arrays.items()}
        expected = {name: tuple(p.shape) for name, p in vectors.matrices().items()}
        if found != expected:
            raise ValueError(f"{path} holds {found}, but this base takes {expected}")
        check_arrays(arrays, f"{path}: ")
        theirs = str(about.get("fingerprint"))
        ours = fingerprint(model)
        if theirs != ours:
            raise ValueError(f"{path} was made for another base of this shape ({theirs[:8]}, not {ours[:8]})")
        for name, p in vectors.matrices().items():
            p.data = torch.from_numpy(arrays[name])
        vectors.fingerprint = ours
        return vectors.to(next(model.parameters()).device)


def layer_vector(matrix, layer, task_ids):
    """One layer of a matrix: (width,); with task_ids (B, 1, width), each its own task's; None for a site left out."""
    if matrix is None:
        return None
    if task_ids is not None:
        return matrix[task_ids, layer].unsqueeze(1)  # (B, 1, width)
    return matrix[layer]  # (width,)


def layers_of(model, task_ids, n_rows):
    """Return each layer's (l_k, l_v, l_ff) for a forward pass of model over n_rows rows; Nones without vectors.

    Raises ValueError for task_ids that do not fit (see IA3.per_layer).
    """
    if model.ia3 is None:
        if task_ids is not None:
            raise ValueError("task_ids need stacked vectors, and this model has no vectors")
        return [(None, None, None)] * model.config.n_layer
    layers = model.ia3.per_layer(task_ids)
    if task_ids is not None and len(task_ids) != n_rows:
        raise ValueError(f"task_ids must be one id for each row of idx: {n_rows}, not {len(task_ids)}")
    return layers


def read_npz(path, most):
    """Return what a file of vectors holds: about, a dict, and {name: float32 array}.

    most: a file whose headers announce more values than this is refused before one is unpacked. Raises OSError if there
    is no such file and ValueError for a larger one or a damaged one.
    """
    if os.path.isdir(path) or os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"{path} is not an .npz of vectors: python -m tools.convert from-peft makes one of PEFT's")
    with open(path, "rb") as f:
        try:
            file = np.load(f, allow_pickle=False)
            shapes = read_shapes(file)
            n_values = sum(math.prod(shape) for shape in shapes.values())
            about = json.loads(file["about"].item())
            if not isinstance(about, dict):
                raise ValueError("about is not a dict")
            if n_values > most:
                raise ValueError(f"it holds {shapes}: {n_values:,} values, and this base takes at most {most:,}")
            arrays = {name: file[name].astype(np.float32, casting="same_kind") for name in shapes}
        except Exception as e:  # a damaged file makes zipfile, json and numpy raise nearly anything
            why = e if isinstance(e, ValueError) else type(e).__name__
            raise ValueError(f"{path} is truncated, or no file of this base's (IA)³ vectors: {why}") from None
    return about, arrays


def check_arrays(arrays, where=""):
    """Raise ValueError with the name of an array that holds NaN or infinity."""
    for name, a in arrays.items():
        if not np.isfinite(a).all():
            raise ValueError(f"{where}{name} holds NaN or infinity")


def unwrap(model):
    """The module inside what torch.compile(model) returns; any other model itself."""
    return getattr(model, "_orig_mod", model)


def attach(model, vectors=None, sites=None):
    """Freeze model, set model.ia3 to vectors and remember the base's fingerprint. Returns the vectors.

    Attach to train, or to have vectors checked. To switch tasks, assigning to model.ia3 is enough.

    vectors: an IA3, by default ones at sites (all three). They become float32, on the model's device. Cast the model
    first: model.to(dtype) afterwards casts the vectors, too. Raises ValueError for another base's vectors, and if both
    vectors and sites are given.
    """
    model = unwrap(model)
    if vectors is None:
        vectors = IA3(model.config, SITES if sites is None else sites)
    elif sites is not None:
        raise ValueError("attach takes vectors or sites: vectors have their own sites")
    if not isinstance(vectors, IA3):
        raise ValueError(f"attach takes an IA3, not {type(vectors).__name__}: IA3.load(path, model) reads a file")
    if (vectors.config.n_layer, vectors.config.widths) != (model.config.n_layer, model.config.widths):
        raise ValueError("these vectors are for another base: another number of layers, or other widths")
    theirs = vectors.fingerprint
    ours = fingerprint(model)
    if theirs not in (None, ours):
        raise ValueError(f"these vectors are for another base of this shape ({theirs[:8]}, not {ours[:8]})")
    vectors.fingerprint = ours
    vectors.to(next(model.parameters()).device, torch.float32)  # whatever the base is held in
    vectors.requires_grad_()
    model.ia3 = None  # drop the old vectors first, so that the next line freezes the base and not them
    model.requires_grad_(False)
    model.ia3 = vectors
    return vectors


def stack(tasks):
    """Copy several tasks, each an IA3 or None for the base, into one IA3 of matrices (n_tasks, n_layer, width).

    A site that a task does not scale is ones there. Raises ValueError for no vectors at all, for stacked ones, and for
    vectors of different shapes or bases.
    """
    tasks = list(tasks)
    given = [task for task in tasks if task is not None]
    shapes = {(task.config.n_layer, task.config.widths) for task in given}
    fingerprints = {task.fingerprint for task in given if task.fingerprint}
    if not given or any(task.is_stacked() for task in given):
        raise ValueError("stack takes one or more vectors, each of one task")
    if len(shapes) > 1 or len(fingerprints) > 1:
        raise ValueError("stack takes vectors of one base, and these are of several")
    sites = [site for site in SITES if any(f"l_{site}" in task.matrices() for task in given)]
    stacked = IA3(given[0].config, sites).to(next(given[0].parameters()).device)
    stacked.fingerprint = fingerprints.pop() if fingerprints else None
    for name, ones in stacked.matrices().items():
        matrices = []
        for task in tasks:
            matrix = ones  # for the base, and for a site that the task does not scale
            if task is not None and name in task.matrices():
                matrix = task.matrices()[name]
            matrices.append(matrix.detach().to(ones.device))
        setattr(stacked, name, nn.Parameter(torch.stack(matrices)))  # (n_tasks, n_layer, width)
    return stacked


def unstack(stacked):
    """The inverse of stack: return a list of IA3, one per task, as copies. Each can then be saved or merged.

    All have the stack's sites: one that a task did not scale is ones. Raises ValueError for vectors of one task.
    """
    if not stacked.is_stacked():
        raise ValueError("unstack takes stacked vectors, and these are one task's")
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
    """SHA-256, in hexadecimal, of all that determines the base's output: class, config and weights, not the vectors.

    IA3.load, attach and merge refuse vectors of another base. Merging changes the weights, so the same vectors cannot
    be merged twice. Hashed are the config without dropout and block_size (n_head, for one, changes the function and no
    shape), and the name, shape and values of every weight. Values are rounded to bfloat16, so that casting a bfloat16
    base to float32 keeps its fingerprint. Two bases that differ only below bfloat16's precision share theirs.
    """
    model = unwrap(model)
    config = {name: value for name, value in asdict(model.config).items() if name not in ("dropout", "block_size")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config]).encode())
    for name, p in sorted(model.named_parameters()):
        if not name.startswith("ia3."):
            digest.update(f"{name} {tuple(p.shape)}".encode())
            rounded = p.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.int16).numpy())  # numpy has no bfloat16
    return digest.hexdigest()
