"""Tokenizers: text to token ids and back."""

from functools import cached_property
from itertools import pairwise

# how many ids a tokenizer has; bytes: a byte's id is its value, and 256 is <|endoftext|>
N_IDS = {"bytes": 257, "gpt2": 50257}
BPE_KEYS = ("pattern", "ranks", "special_tokens")  # what a byte-level BPE of a checkpoint's own consists of

# Regular expressions that cut a text into pieces; merges never cross a piece. GPT2: a word with the space before it.
# SMOLLM2: as GPT2, but every digit is a piece of its own, without the space. LLAMA3: Llama 3's
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2 = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = (GPT2, SMOLLM2, LLAMA3)  # a file's own is refused: some regular expressions never end on a short text


class Tokenizer:
    """Text to token ids and back, by tiktoken, which is imported where the first text is read.

    about           'bytes', 'gpt2', or a byte-level BPE as plain data, as a checkpoint holds it, a dict of
      pattern         one of PATTERNS, which cuts a text into pieces
      ranks           {bytes: id}; in a piece, the neighbours that make the lowest id are merged first
      special_tokens  {text: id}
      plain_tokens    if any, a list of those special_tokens that a text can spell
    vocab_size      the model's; ids beyond the tokenizer's own are padding and stand for no text
    bos             the id that begins a text, or None
    eos             a list of the ids that end one; for 'bytes' and 'gpt2' both are the last id
    chat_template   Jinja text, or None

    Raises ValueError for a name that is not known, and for ids that do not fit the vocabulary.
    """

    def __init__(self, about, vocab_size, bos=None, eos=None, chat_template=None):
        if isinstance(about, dict):
            check_bpe(about, vocab_size)
            self.ids = {*about["ranks"].values(), *about["special_tokens"].values()}
            self.plain = set(about.get("plain_tokens", []))
        elif isinstance(about, str) and about in N_IDS:
            if N_IDS[about] > vocab_size:
                raise ValueError(f"tokenizer {about} has {N_IDS[about]} ids, but the vocabulary only {vocab_size}")
            self.ids = range(N_IDS[about])
            self.plain = set()
            bos = N_IDS[about] - 1
            eos = [bos]
        else:
            raise ValueError(f"unknown tokenizer {str(about)[:40]!r}: there are {', '.join(N_IDS)}")
        eos = eos or []
        if bos is not None and bos not in self.ids:
            raise ValueError(f"bos is {str(bos)[:40]}, which is not an id of the tokenizer")
        if not isinstance(eos, list) or not set(eos).issubset(self.ids):
            raise ValueError(f"eos is {str(eos)[:40]}, which is not a list of ids of the tokenizer")
        if not isinstance(chat_template, str | None):
            raise ValueError("a chat template must be text")
        self.about = about
        self.bos = bos
        self.eos = eos
        self.chat_template = chat_template

    @cached_property
    def encoding(self):
        import tiktoken  # not at the top: merging and training on .bin files need none

        if self.about == "gpt2":
            try:
                return tiktoken.get_encoding("gpt2")
            except OSError:  # no network
                raise OSError(
                    "tiktoken cannot fetch GPT-2's ids: TIKTOKEN_CACHE_DIR may name a folder of them"
                ) from None
        if self.about == "bytes":
            pattern = r"(?s:.)"  # every character by itself
            ranks = {bytes([i]): i for i in range(256)}
            special = {"<|endoftext|>": 256}
        else:
            pattern, ranks, special = [self.about[name] for name in BPE_KEYS]
        return tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    @cached_property
    def bytes_without_token(self):
        """The bytes that no token stands for alone: SmolLM2 has 21 of them."""
        if isinstance(self.about, str):
            return b""
        return bytes(i for i in range(256) if bytes([i]) not in self.about["ranks"])

    def encode_ordinary(self, text):
        """Return the ids of text. A special token that is not plain is text; a byte without a token is left out.

        Raises ValueError for a text that tiktoken fails on.
        """
        raw = text.encode("utf-8", "replace")
        if raw.translate(None, self.bytes_without_token) != raw:
            return encode_without(self.bytes_without_token, text, self.about)
        try:
            return self.encoding.encode(text, allowed_special=self.plain, disallowed_special=())
        except BaseException as e:
            if type(e).__name__ != "PanicException":  # a failure in tiktoken's Rust part; it is not an Exception
                raise
            raise ValueError(f"tiktoken fails on this text of {len(text):,} characters") from None

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i in self.ids])

    def __deepcopy__(self, memo):
        return self  # it never changes, so a copied model shares it


# --- a text with bytes that no token stands for, which tiktoken does not know ---


def encode_without(missing, text, about):
    """Return the ids of text without the bytes missing. The text is cut into pieces first, as it would be with them."""
    import regex  # tiktoken's own dependency

    ids = []
    for piece in regex.finditer(about["pattern"], text):
        known = piece[0].encode("utf-8", "replace").translate(None, missing)
        ids += merge_bytes(known, about["ranks"])
    return ids


def merge_bytes(piece, ranks):
    """Return the ids of piece, bytes that all have a token: merge the two neighbours of the lowest rank until none fit.

    A piece that is a token stays whole, as tiktoken leaves it.
    """
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while True:
        pairs = {a + b for a, b in pairwise(parts)} & ranks.keys()
        if not pairs:
            return [ranks[part] for part in parts]
        best = min(pairs, key=ranks.get)
        merged = []
        for part in parts:
            if merged and merged[-1] + part == best:
                merged[-1] = best
            else:
                merged.append(part)
        parts = merged


# --- what a checkpoint may hold ---


def check_bpe(about, vocab_size):
    """Raise ValueError unless about is a byte-level BPE as Tokenizer has it, every id its own and below vocab_size."""
    if about.keys() - {"plain_tokens"} != set(BPE_KEYS):
        raise ValueError(f"a tokenizer of its own has {', '.join(BPE_KEYS)}, not {', '.join(map(str, about))}")
    pattern, ranks, special = [about[name] for name in BPE_KEYS]
    if pattern not in PATTERNS:
        raise ValueError("a tokenizer's pattern must be GPT-2's, SmolLM2's or Llama 3's, letter by letter")
    for name, tokens, kind in (("ranks", ranks, bytes), ("special_tokens", special, str)):
        if not isinstance(tokens, dict) or not all(isinstance(token, kind) and token for token in tokens):
            raise ValueError(f"a tokenizer's {name} must be a dict of {kind.__name__} and their ids")
    for token, i in [*ranks.items(), *special.items()]:
        if type(i) is not int or not 0 <= i < vocab_size:
            allowed = f"whole numbers from 0 to the vocabulary's {vocab_size - 1}"
            raise ValueError(f"a tokenizer's ids must be {allowed}, but {token[:40]!r} has {str(i)[:40]}")
    if not set(about.get("plain_tokens", [])) <= special.keys():
        raise ValueError("a tokenizer's plain_tokens must be special_tokens, too")
    if about.get("plain_tokens") and any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError("a tokenizer with plain_tokens must have a token for every byte")
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids):
        raise ValueError("two of a tokenizer's tokens have the same id")
