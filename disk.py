"""Files: read without running their code, replaced whole or not at all."""

import os
import re
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import torch


def load_file(path):
    """torch.load onto the CPU, running no code of the file's. Raises ValueError for a damaged file or one with code.

    torch.load checks no checksum, so those of the zip, PyTorch's format since 1.6, are checked first.
    """
    with open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an old pickle format: what is wrong is said below, in one line
        try:
            is_zip = zipfile.is_zipfile(f)
            bad_member = zipfile.ZipFile(f).testzip() if is_zip else None  # the first with a wrong checksum
            if bad_member is None:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as e:  # a damaged file makes torch and zipfile raise nearly anything
            if isinstance(e, MemoryError) or is_out_of_memory(e):  # a damaged header may ask for any size
                raise ValueError(f"{path} does not fit into memory, or is damaged") from None
            code = re.search(r"GLOBAL ([\w.]{1,80})", str(e))
            if code:  # torch names what the file would call, such as an object's class
                way = "save it again with tensors and plain values only"
                raise ValueError(f"{path} carries code ({code[1]}): {way}") from None
            raise ValueError(f"{path} is truncated, carries code, or is no PyTorch file ({type(e).__name__})") from None
    raise ValueError(f"{path} is damaged: {bad_member[:80]} fails its checksum")


def check_size(tensors, path):
    """Raise ValueError if copies of {name: tensor} would take more than twice as much memory as the file at path.

    Twice, because a tied head has two names but is stored once. A damaged file may expand one number to a matrix, or
    give one matrix many names; once copied, they would fill memory.
    """
    claimed = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, torch.Tensor))
    if claimed > 2 * os.path.getsize(path):
        raise ValueError(f"its tensors claim {claimed:,} bytes, and the file holds {os.path.getsize(path):,}")


def check_weight(t, name, shape=None):
    """Return t. Raises ValueError, with its name, unless it is a plain tensor of finite floats, of shape if given."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name} is a {type(t).__name__}, not a tensor")
    if t.dtype not in dtypes or t.layout != torch.strided or t.is_nested or t.is_meta:
        raise ValueError(f"{name} is not a plain tensor of floats, but {t.dtype}, {t.layout} on {t.device}")
    if shape is not None and t.shape != shape:  # before its values are read: a small file may claim any shape
        raise ValueError(f"{name} has shape {tuple(t.shape)}, not {tuple(shape)}")
    if not t.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return t


@contextmanager
def replace_file(path, text=False):
    """Open a temporary file beside path for writing, and rename it to path when the block ends.

    So path is the old file or the new one, never half of one, and a failure leaves nothing behind. Makes the folder.
    Raises OSError, with the path, if it cannot be written, and ValueError if path is a folder, a device, or empty.
    """
    path = os.fspath(path)
    check_output(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = f"{path}.tmp"
    try:
        options = {"mode": "w", "encoding": "utf-8", "newline": ""} if text else {"mode": "wb"}
        with open(partial, **options) as f:
            yield f
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # on a full disk torch.save raises a RuntimeError; neither names the file
        why = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise OSError(f"{path} could not be written: {why}") from None
    finally:
        if os.path.lexists(partial):
            os.remove(partial)


def check_output(path, inputs=()):
    """Raise ValueError if path or path.tmp is no regular file, or is one of inputs, which would be overwritten."""
    path = os.fspath(path)
    if not os.path.basename(path):
        raise ValueError(f"the output {path!r} is empty or names a folder")
    for name in (path, f"{path}.tmp"):
        if os.path.exists(name) and not os.path.isfile(name):
            raise ValueError(f"{name} exists and is not a regular file: choose another output")
        for other in inputs:
            if os.path.realpath(other) == os.path.realpath(name):
                raise ValueError(f"writing {path} would replace {other}, which this command reads")


def read_shapes(file):
    """Return {name: shape} of an .npz's arrays without 'about', reading headers only: a small file can unfold to much.

    file: what np.load returns. Raises ValueError for an 'about' of more than 64 KiB, for arrays that do not hold
    numbers, and if a header is damaged.
    """
    shapes = {}
    for name in file.files:
        with file.zip.open(f"{name}.npy") as member:
            np.lib.format.read_magic(member)  # the version, which np.savez writes as 1.0
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if name == "about":
            if shape != () or dtype.itemsize > 2**16:
                raise ValueError("'about' is too long")
            continue
        if dtype.kind not in "fiub":
            raise ValueError(f"{name} holds {dtype}")
        shapes[name] = shape
    return shapes


def is_out_of_memory(error):
    """Whether an error says that a GPU's memory or the CPU's is full."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
