"""Text in, batches out: the three kinds of data folder, and batches as a function of (seed, step).

A data folder holds one of, tried in this order:

    train.jsonl  val.jsonl   one {"prompt": ..., "completion": ...} a line; only the completion's tokens carry loss, and
                             the token that ends a text follows them, if the tokenizer has one
    train.bin    val.bin     token ids, nanoGPT's format or llm.c's; memory-mapped, so they may be larger than memory
    train.txt    val.txt     UTF-8 text, or under the bytes tokenizer any bytes at all

A split is a Stream of tokens or a set of Examples. Both have

    len(split)                             how many windows it has; of Examples, each one is a window
    split.windows(ids)                     these windows: inputs and targets
    split.batch(seed, step, batch_size)    the batch of a step: inputs and targets
    split.prompt(n)                        n tokens to continue
    split.data_hash()                      tells it from other data
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
LLM_C = {20240520: np.uint16, 20240801: np.uint32}  # the first number of llm.c's token files: what the tokens are


class Stream:
    """One long run of tokens, cut into windows of block_size. n_bytes: the length of its text, if known."""

    def __init__(self, tokens, block_size, n_bytes=None):
        self.tokens = tokens
        self.block_size = block_size
        self.n_bytes = n_bytes
        self.n_tokens = len(tokens) - 1  # tokens that can be predicted: all but the first

    def __len__(self):
        """The number of windows that do not overlap; the last may be short."""
        return math.ceil(self.n_tokens / self.block_size)

    def windows(self, ids):
        """The windows ids, left to right: inputs and targets, both (len(ids), block_size) long; -1 is no target."""
        return self._cut([i * self.block_size for i in ids])

    def batch(self, seed, step, batch_size):
        """The batch of a step: windows that start anywhere, drawn from (seed, step) and nothing else."""
        rng = np.random.default_rng((seed, step))
        return self._cut(rng.integers(0, len(self.tokens) - self.block_size, batch_size))

    def data_hash(self):
        """Tells these windows from others, so that no run is resumed on other training data."""
        digest = hashlib.sha256(f"{self.tokens.dtype} {self.block_size}".encode())
        digest.update(self.tokens)
        return digest.hexdigest()

    def prompt(self, n):
        """The first n tokens, (1, n) long; fewer if there are fewer."""
        return torch.from_numpy(self.tokens[:n].astype(np.int64)).unsqueeze(0)

    def _cut(self, starts):
        x = torch.zeros(len(starts), self.block_size, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, start in enumerate(starts):
            piece = torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))
            x[row, : len(piece) - 1] = piece[:-1]
            y[row, : len(piece) - 1] = piece[1:]
        return x, y


class Examples:
    """Prompts with completions, one example a row, padded on the right to the longest of its batch."""

    def __init__(self, examples):
        self.examples = examples  # [(prompt ids, completion ids)]
        self.n_bytes = None

    def __len__(self):
        return len(self.examples)

    def windows(self, ids):
        """The examples ids: inputs and targets, both (len(ids), longest) long; no targets (-1) on prompts, padding."""
        rows = [self.examples[i] for i in ids]
        longest = max(len(p) + len(c) for p, c in rows) - 1
        x = torch.zeros(len(rows), longest, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, (prompt, completion) in enumerate(rows):
            both = torch.tensor(prompt + completion)
            targets = both.clone()
            targets[: len(prompt)] = -1
            x[row, : len(both) - 1] = both[:-1]
            y[row, : len(both) - 1] = targets[1:]
        return x, y

    def batch(self, seed, step, batch_size):
        """The batch of a step: the next examples of an endless list; (seed, epoch) shuffles each epoch."""
        n = len(self.examples)
        orders = {}  # of the epochs that the batch takes from
        ids = []
        for place in range(step * batch_size, (step + 1) * batch_size):  # examples since step 0
            epoch = place // n
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(n)
            ids.append(orders[epoch][place % n])
        return self.windows(ids)

    def data_hash(self):
        return hashlib.sha256(json.dumps(self.examples).encode()).hexdigest()

    def prompt(self, n):
        """The last n tokens of the first example's prompt, (1, ≤ n) long; its completion's first if it has none."""
        prompt, completion = self.examples[0]
        return torch.tensor([prompt[-n:] or completion[:1]])


def evenly_spaced(split, n):
    """The numbers of n windows of split, evenly spaced from the first to the last; of all where it has fewer."""
    n = min(n, len(split))
    return torch.linspace(0, len(split) - 1, n, dtype=torch.float64).long().tolist()


def to_device(batch, device):
    """The batch's tensors on device; to CUDA from pinned memory, so that the copy overlaps with computing."""
    if device.type == "cuda":
        batch = [t.pin_memory() for t in batch]
    return [t.to(device, non_blocking=True) for t in batch]


def kind_of(folder, split):
    """The first kind of file that folder has of a split, or None."""
    for kind in ("jsonl", "bin", "txt"):
        if (folder / f"{split}.{kind}").is_file():
            return kind
    return None


def find(name_or_path, splits=("train", "val")):
    """Return {split: Path} of a data folder, by its name under data/ or by its path. OSError where one is missing."""
    names = sorted(path.parent.name for path in HERE.glob("*/train.txt"))
    folder = HERE / name_or_path if name_or_path in names else Path(name_or_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data called {name_or_path!r}: there are {', '.join(names)}, or a folder's path")
    # train decides, if it is there: then merge.py, which reads val alone, reads the val that train.py read
    kind = kind_of(folder, "train") or kind_of(folder, splits[0])
    if kind is None:
        raise FileNotFoundError(f"{folder} holds no {splits[0]}.jsonl, {splits[0]}.bin or {splits[0]}.txt")
    paths = {split: folder / f"{split}.{kind}" for split in splits}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
    return paths


def load(name_or_path, tokenizer, vocab_size, block_size, splits=("train", "val")):
    """Read a data folder, by its name under data/ or by its path. Returns {split: Stream or Examples}.

    tokenizer, vocab_size: the model's; without a tokenizer it can read .bin only. block_size: of a window.
    Raises OSError where a file is missing and ValueError where it holds something else, or too little.
    """
    data = {}
    for split, path in find(name_or_path, splits).items():
        if path.suffix != ".bin" and tokenizer is None:
            raise ValueError(f"{path} holds text, but this model's tokenizer is unknown: it can read .bin files only")
        if path.suffix == ".jsonl":
            data[split] = read_jsonl(path, tokenizer, block_size)
        else:
            data[split] = read_stream(path, tokenizer, vocab_size, block_size)
    return data


def read_stream(path, tokenizer, vocab_size, block_size):
    """Read a .bin or a .txt file as a Stream. Raises as load does."""
    if path.suffix == ".bin":
        if tokenizer is not None and (path.parent / "meta.pkl").exists():
            raise ValueError(f"{path} holds nanoGPT's ids of characters (meta.pkl), not of this model's tokenizer")
        tokens = read_bin(path, vocab_size)
        n_bytes = None  # of its text: the file does not tell
    else:
        tokens = read_text(path, tokenizer)
        n_bytes = path.stat().st_size
    if len(tokens) <= block_size:
        raise ValueError(f"{path} holds {len(tokens)} tokens, too few for one window of block_size {block_size}")
    return Stream(tokens, block_size, n_bytes)


def tokens_of(raw, tokenizer):
    """A text's bytes as an array of tokens. Raises UnicodeDecodeError if they must be UTF-8 and are not."""
    if tokenizer.about == "bytes":
        return np.frombuffer(raw, dtype=np.uint8)  # a byte's id is its value
    return np.array(tokenizer.encode_ordinary(raw.decode("utf-8")), dtype=np.int32)


def read_text(path, tokenizer):
    """Return the file's tokens as an array. Raises ValueError if it must be UTF-8 (not for bytes) and is not."""
    try:
        return tokens_of(path.read_bytes(), tokenizer)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text (byte {e.start})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def read_bin(path, vocab_size):
    """Return the file's tokens, memory-mapped.

    They are uint16, or uint32 for a vocabulary above 65,536. llm.c's files say which in a header of 1024 bytes. Raises
    ValueError for a file of another width, and for ids beyond the vocabulary.
    """
    size = path.stat().st_size
    width = np.uint16 if vocab_size <= 2**16 else np.uint32
    header = 0
    if size > 1024:
        magic = int(np.memmap(path, dtype=np.uint32, mode="r", shape=1)[0])
        if magic in LLM_C:
            width = LLM_C[magic]
            header = 1024
    name = np.dtype(width).name
    if size == header or (size - header) % np.dtype(width).itemsize:
        raise ValueError(f"{path} is empty or not a file of {name} tokens: {size} bytes")
    tokens = np.memmap(path, dtype=width, mode="r", offset=header)
    if len(tokens) > 1 and not tokens[1::2].any():
        raise ValueError(f"{path} has a 0 in every second place when read as {name}: its numbers are wider")
    if tokens.max() >= vocab_size:
        raise ValueError(f"{path} read as {name} holds id {tokens.max()}, beyond the vocabulary of {vocab_size}")
    return tokens


def json_lines(path):
    """Yield where a line stands and what its JSON says, for every line that is not blank. ValueError for no JSON."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not JSON ({e})") from None


def read_jsonl(path, tokenizer, block_size):
    """Read one {"prompt": ..., "completion": ...} a line. Raises ValueError with the file and line of what is wrong."""
    examples = []
    for where, row in json_lines(path):
        if isinstance(row, dict) and "choices" in row:
            raise ValueError(f"{where}: choices to rank: python -m experiments.ranking --data {path.parent}")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
            raise ValueError(f'{where}: expected {{"prompt": text, "completion": text}}')
        try:
            prompt = tokenizer.encode_ordinary(row["prompt"])
            completion = tokenizer.encode_ordinary(row["completion"])
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        if len(completion) < (1 if prompt else 2):  # the very first token of a text has no prediction
            raise ValueError(f"{where}: a completion needs a token, and behind an empty prompt two")
        completion += tokenizer.eos[:1]  # so that what is trained learns to stop
        if len(prompt) + len(completion) - 1 > block_size:  # the last token is a target only
            raise ValueError(f"{where}: {len(prompt) + len(completion)} tokens do not fit block_size {block_size}")
        examples.append((prompt, completion))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return Examples(examples)
