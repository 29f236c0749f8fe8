"""Byte-level BPE as others write it, tokenizer.json, and as Tokenizer has it: pattern, ranks, special tokens.

Two things differ. In tokenizer.json a token is spelled in letters, one for each byte ('Ġthe' is b' the'), and beside
the tokens stand merges: pairs of tokens that become one, in the order in which they are tried. tiktoken, and so
Tokenizer, has no merges. It joins any two neighbours that make a token, lower ids first, and takes a piece of text
that is a token as it is. That is the same where, and only where, the merges say what the ids say; check_merges looks.
"""

import json
import os
from itertools import pairwise

from data.tokenizer import GPT2, LLAMA3, SMOLLM2, Tokenizer
from tools.files import read_json, write_json

# data's patterns in tokenizer.json: a list of pre_tokenizers, one after the other. Every other way is refused: whether
# another pattern cuts a text the same way in three regular expression engines is not known before it is tried
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    GPT2: [BYTE_LEVEL],
    SMOLLM2: [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    LLAMA3: [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False},
    ],
}


def alphabet():
    """{letter: byte} of GPT-2's spelling: a byte that Latin-1 prints is that letter, the others from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [i for i in range(256) if i not in printed]
    return {chr(i): i for i in printed} | {chr(0x100 + n): i for n, i in enumerate(others)}


ALPHABET = alphabet()
LETTERS = {byte: letter for letter, byte in ALPHABET.items()}


def as_bytes(token):
    """The bytes of a token in the spelling of byte-level BPE files: 'Ġthe' is b' the'. ValueError for other letters."""
    try:
        return bytes(ALPHABET[letter] for letter in token)
    except KeyError:
        raise ValueError(f"the token {token!r} is not in the spelling of byte-level BPE") from None


def as_letters(token):
    """The way back: b' the' is 'Ġthe'."""
    return "".join(LETTERS[byte] for byte in token)


# --- merges and ids ---


def byte_level(pattern, vocabulary, merges, special, whole_pieces=False, plain=()):
    """Return what Tokenizer takes. vocabulary: {token: id}, with or without special; merges: [(token, token)].

    special: {text: id}. whole_pieces: whether a piece that is a token is taken as it is, without merges. plain: those
    of special that are found in a text, too. Raises ValueError where Tokenizer would give other ids.
    """
    ranks = {as_bytes(token): i for token, i in vocabulary.items() if token not in special}
    for token in special:
        if token in ALPHABET and token in vocabulary:  # a text's own byte would then have no token
            raise ValueError(f"{token!r} is a special token and a byte's own")
    pairs = [(as_bytes(a), as_bytes(b)) for a, b in merges]
    check_merges(ranks, pairs, whole_pieces)
    about = {"pattern": pattern, "ranks": ranks, "special_tokens": special}
    if plain:
        check_plain(plain, special, ranks)
        about["plain_tokens"] = list(plain)
    return about


def check_plain(plain, special, ranks):
    """Raise ValueError where it depends on the library which tokens are found: where two of them can share a letter."""
    for text in plain:
        for other in special:
            if other != text and (overlap(text, other) or overlap(other, text)):
                raise ValueError(f"the added tokens {text!r} and {other!r} overlap")
    if len(ranks) < 256 or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{plain[0]!r} is an added token that is not special, and not every byte has a token")


def overlap(a, b):
    """Whether b can begin within a in a text."""
    return any(a[i:].startswith(b) or b.startswith(a[i:]) for i in range(len(a)))


def check_merges(ranks, pairs, whole_pieces):
    """Raise ValueError unless merging pairs in their order is merging by ranks, {bytes: id}, lower ids first.

    Merge a token's bytes by id until only the token itself is left to make (split). If two parts remain, their merge
    must be listed. If more remain, merging by ids never makes the token: then a piece that is a token must be taken
    whole, and all merges of two tokens to this one must be listed.
    """
    order = [ranks.get(a + b) if a in ranks and b in ranks else None for a, b in pairs]
    if None in order:
        a, b = pairs[order.index(None)]
        raise ValueError(f"the merge of {a!r} and {b!r} does not join two tokens to a third")
    if order != sorted(order):
        raise ValueError("the merges are not in the order of the ids")
    there = {token: set() for token in ranks}
    for a, b in pairs:
        there[a + b].add((a, b))
    for token in ranks:
        if len(token) == 1:
            continue
        parts = split(token, ranks)
        if len(parts) == 2:
            fits = tuple(parts) in there[token]
        else:
            fits = whole_pieces and there[token] == set(halves(token, ranks))
        if not fits:
            raise ValueError(f"the merges do not make the token {token!r} as the ids do")


def split(token, ranks):
    """The tokens that merging by ranks, lower ids first, makes of token's bytes before token itself is made."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, ranks[token]) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        if joined[i] >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def halves(token, ranks):
    """Every two tokens that make token."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [(a, b) for a, b in cuts if a in ranks and b in ranks]


# --- tokenizer.json ---


def is_tokenizers(name):
    """Whether a file of this name in a folder says that its model has a tokenizer of its own."""
    return name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens"))


def read_folder(folder, vocab_size, config):
    """Read the tokenizer of a Hugging Face folder, tokenizer.json or GPT-2's vocab.json and merges.txt.

    config: config.json's object, which may say what begins and ends a text. Returns a Tokenizer, or None where
    none of these files is there. What tokenizer.json adds around a text (its post_processor) is left out. Raises
    ValueError, with the file's name, for what Tokenizer does not do.
    """
    path = f"{folder}/tokenizer.json"
    if not os.path.isfile(path):
        path = f"{folder}/vocab.json"
    if not os.path.isfile(path):
        return None
    try:
        settings = read_if_there(f"{folder}/special_tokens_map.json")
        settings |= read_if_there(f"{folder}/tokenizer_config.json")
        if path.endswith("vocab.json"):
            settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | settings  # GPT-2's, unless told
            about = from_vocab(read_json(path), folder, settings)
        else:
            about = tokenizer(read_json(path))
        config = config | read_if_there(f"{folder}/generation_config.json")
        return Tokenizer(about, vocab_size, **control_tokens(about, config, settings, folder))
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        why = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        way_out = "renamed to end in .off, it is passed over, and the model reads .bin data only"
        raise ValueError(f"{path}: {why}; {way_out}") from None


def read_if_there(path):
    return read_json(path) if os.path.isfile(path) else {}


def from_vocab(vocabulary, folder, settings):
    """What Tokenizer takes, from GPT-2's two files. settings: of tokenizer_config.json.

    A token of several letters that no merge makes never comes about in a text, so it is a special one.
    """
    kind = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast") or settings.get("add_prefix_space"):
        raise ValueError(f"a {kind} cuts a text in a way that is not known here without a tokenizer.json")
    with open(f"{folder}/merges.txt", encoding="utf-8") as f:
        merges = [line.split(" ") for line in f.read().split("\n") if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}
    special = {token: i for token, i in vocabulary.items() if len(token) > 1 and token not in made}
    added = read_if_there(f"{folder}/added_tokens.json")
    # which of these are special, because a setting names them, such as pad_token, or lists them as special
    listed = [token for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")]
    named = json.dumps(settings | {"added_tokens_decoder": listed})
    tokens = []
    for text in sorted(added, key=added.get):
        tokens.append({"content": text, "id": added[text], "special": json.dumps(text) in named})
    added, plain = added_tokens(tokens, vocabulary)
    return byte_level(GPT2, vocabulary, merges, special | added, plain=plain)


def control_tokens(about, config, settings, folder):
    """Return bos, eos and chat_template as Tokenizer takes them; the tokenizer's own end comes first.

    config: config.json's object with generation_config.json's over it; settings: of tokenizer_config.json. An id that
    the tokenizer does not have is left out: a config of another vocabulary's defaults may name it.
    """
    known = {*about["ranks"].values(), *about["special_tokens"].values()}
    found = {}
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids = config.get(f"{name}_token_id")
        ids = [about["special_tokens"].get(token), *(ids if isinstance(ids, list) else [ids])]
        found[name] = [i for i in dict.fromkeys(ids) if i in known]
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if os.path.isfile(f"{folder}/chat_template.jinja"):
        with open(f"{folder}/chat_template.jinja", encoding="utf-8") as f:
            template = f.read()
    return {"bos": found["bos"][0] if found["bos"] else None, "eos": found["eos"], "chat_template": template}


def tokenizer(about):
    """What Tokenizer takes, from tokenizer.json's object."""
    model = about["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']!r} is not known here, only byte-level 'BPE'")
    if model.get("byte_fallback"):
        raise ValueError(
            "byte_fallback is True: this is a sentencepiece tokenizer, and only byte-level BPE is known here"
        )
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        never_unknown = key == "unk_token" and ALPHABET.keys() <= model["vocab"].keys()
        if model.get(key) and not never_unknown:
            raise ValueError(f"{key} is {model[key]!r}, and byte-level BPE has none")
    if about.get("normalizer") is not None:
        raise ValueError(f"the normalizer {name_of(about['normalizer'])} is not known here")
    special, plain = added_tokens(about.get("added_tokens") or [], model["vocab"])
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pattern = find_pattern(about.get("pre_tokenizer"))
    return byte_level(pattern, model["vocab"], merges, special, model.get("ignore_merges", False), plain)


def added_tokens(tokens, vocabulary):
    """Return {text: id} of tokenizer.json's added_tokens, and the texts of those that are not special.

    The library gives one that is not in the vocabulary the next free id, whatever the file says: ValueError where these
    differ, and for one that is not special and takes the spaces around it, or is found between spaces only.
    """
    special = {}
    plain = []
    free = len(vocabulary)
    for token in tokens:
        text = token["content"]
        expected = vocabulary.get(text, free)
        if token["id"] != expected:
            raise ValueError(
                f"the added token {text!r} has id {token['id']}, and the tokenizers library's is {expected}"
            )
        free = max(free, expected + 1)
        special[text] = expected
        if token.get("special") is True:
            continue
        plain.append(text)
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"the added token {text!r} has {flag}, which is not known here")
    return special, plain


def find_pattern(pre_tokenizer):
    """Which of PRE_TOKENIZERS' patterns cuts as pre_tokenizer does. Raises ValueError with its name where none does."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    # older files do not say use_regex; trim_offsets is of positions in the text, not of ids
    full = [BYTE_LEVEL | step | {"trim_offsets": True} if step.get("type") == "ByteLevel" else step for step in steps]
    for pattern, known in PRE_TOKENIZERS.items():
        if full == known:
            return pattern
    raise ValueError(f"the pre_tokenizer {name_of(pre_tokenizer)} is not known here")


def name_of(step):
    """A step of tokenizer.json as text, cut where it is long."""
    return json.dumps(step, ensure_ascii=False)[:300]


def write_tokenizer(about, folder, bos=None, eos=(), chat_template=None):
    """Write Tokenizer's about as tokenizer.json, and tokenizer_config.json, which AutoTokenizer needs."""
    ranks, special = about["ranks"], about["special_tokens"]
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = split(token, ranks)
        if len(parts) == 2:
            merges.append(parts)
        elif len(parts) > 2:
            merges += halves(token, ranks)
    added = []
    for text in sorted(special, key=special.get):
        token = {"id": special[text], "content": text, "special": text not in about.get("plain_tokens", [])}
        added.append(token | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False})
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[about["pattern"]]},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is taken as it is, as tiktoken does
            "vocab": {as_letters(token): i for token, i in ranks.items()} | special,
            "merges": [[as_letters(a), as_letters(b)] for a, b in merges],
        },
    }
    write_json(whole, f"{folder}/tokenizer.json")
    texts = {i: text for text, i in special.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts.get(bos),
        "eos_token": texts.get(eos[0]) if eos else None,
        "chat_template": chat_template,
    }
    write_json({key: value for key, value in settings.items() if value}, f"{folder}/tokenizer_config.json")
