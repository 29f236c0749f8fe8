"""A Hugging Face folder's tokenizer: tokenizer.json, or GPT-2's vocab.json and merges.txt, in; tokenizer.json, out.

read_tokenizer and write_tokenizer are what others call. Only a byte-level BPE that cuts text as one of data's patterns
does comes in; whatever else a file asks for is refused by name.
"""

import json
import os

from data.tokenizer import GPT2, LLAMA3, SMOLLM2, Tokenizer
from tools import bpe
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
FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")  # how the names of a tokenizer's files begin


def tokenizer_files(folder):
    """The names of the files in folder that say that its model has a tokenizer of its own."""
    return [name for name in os.listdir(folder) if name.startswith(FILES)]


# --- in ---


def read_tokenizer(folder, vocab_size, config):
    """Read a folder's tokenizer. Returns a Tokenizer, or None without tokenizer.json and vocab.json.

    config: config.json's object, which may say what begins and ends a text. What tokenizer.json adds around a text (its
    post_processor) is left out. Raises ValueError, with the file's name, for what Tokenizer does not do.
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
            about = from_tokenizer_json(read_json(path))
        config = config | read_if_there(f"{folder}/generation_config.json")
        known = {*about["ranks"].values(), *about["special_tokens"].values()}
        bos, eos = [control_ids(name, about["special_tokens"], config, settings, known) for name in ("bos", "eos")]
        template = chat_template(folder, settings)
        return Tokenizer(about, vocab_size, bos[0] if bos else None, eos, template)
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        why = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        way_out = "renamed to end in .off, it is passed over, and the model reads .bin data only"
        raise ValueError(f"{path}: {why}; {way_out}") from None


def read_if_there(path):
    return read_json(path) if os.path.isfile(path) else {}


def from_tokenizer_json(whole):
    """What Tokenizer takes, from tokenizer.json's object."""
    model = whole["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']!r} is not known here, only byte-level 'BPE'")
    if model.get("byte_fallback"):
        raise ValueError("byte_fallback is True: this is a sentencepiece tokenizer, and only byte-level BPE is known")
    has_all_bytes = bpe.ALPHABET.keys() <= model["vocab"].keys()
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if key == "unk_token" and has_all_bytes:  # then nothing is unknown
            continue
        if model.get(key):
            raise ValueError(f"{key} is {model[key]!r}, and byte-level BPE has none")
    if whole.get("normalizer") is not None:
        raise ValueError(f"the normalizer {shortened(whole['normalizer'])} is not known here")
    special, plain = added_tokens(whole.get("added_tokens") or [], model["vocab"])
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pattern = find_pattern(whole.get("pre_tokenizer"))
    return bpe.from_merges(pattern, model["vocab"], merges, special, model.get("ignore_merges", False), plain)


def find_pattern(pre_tokenizer):
    """Which of PRE_TOKENIZERS' patterns cuts as pre_tokenizer does. Raises ValueError with its name where none does."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    found = []
    for step in steps:
        if step.get("type") == "ByteLevel":
            # older files do not say use_regex; trim_offsets is of positions in the text, not of ids
            step = BYTE_LEVEL | step | {"trim_offsets": True}
        found.append(step)
    for pattern, known in PRE_TOKENIZERS.items():
        if found == known:
            return pattern
    raise ValueError(f"the pre_tokenizer {shortened(pre_tokenizer)} is not known here")


def shortened(step):
    """A step of tokenizer.json as text, cut where it is long."""
    return json.dumps(step, ensure_ascii=False)[:300]


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
            raise ValueError(f"the added token {text!r} has id {token['id']}, and the library's is {expected}")
        free = max(free, expected + 1)
        special[text] = expected
        if token.get("special") is True:
            continue
        plain.append(text)
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"the added token {text!r} has {flag}, which is not known here")
    return special, plain


def from_vocab(vocabulary, folder, settings):
    """What Tokenizer takes, from GPT-2's two files. settings: of tokenizer_config.json and special_tokens_map.json.

    A token of several letters that no merge makes never comes about in a text, so it is a special one.
    """
    kind = settings.get("tokenizer_class") or "GPT2Tokenizer"
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast") or settings.get("add_prefix_space"):
        raise ValueError(f"a {kind} cuts a text in a way that is not known here without a tokenizer.json")
    with open(f"{folder}/merges.txt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {a + b for a, b in merges}
    special = {token: i for token, i in vocabulary.items() if len(token) > 1 and token not in made}

    # of the tokens added later, those are special that a setting names, such as pad_token, or lists as special
    listed = [token for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")]
    settings_text = json.dumps(settings | {"added_tokens_decoder": listed})
    added = read_if_there(f"{folder}/added_tokens.json")
    tokens = []
    for text in sorted(added, key=added.get):
        is_special = json.dumps(text) in settings_text
        tokens.append({"content": text, "id": added[text], "special": is_special})
    added, plain = added_tokens(tokens, vocabulary)
    return bpe.from_merges(GPT2, vocabulary, merges, special | added, plain=plain)


def control_ids(name, special, config, settings, known):
    """The ids that begin ('bos') or end ('eos') a text: first the tokenizer's own, by settings, then the model's.

    config: config.json's object with generation_config.json's over it. known: the tokenizer's ids; another one is
    left out, since a config may name ids of another vocabulary's defaults.
    """
    token = settings.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    ids = config.get(f"{name}_token_id")
    if not isinstance(ids, list):
        ids = [ids]
    ids = [special.get(token), *ids]
    return [i for i in dict.fromkeys(ids) if i in known]


def chat_template(folder, settings):
    """The chat template, Jinja text, or None."""
    if os.path.isfile(f"{folder}/chat_template.jinja"):
        with open(f"{folder}/chat_template.jinja", encoding="utf-8") as f:
            return f.read()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


# --- out ---


def write_tokenizer(tokenizer, folder):
    """Write a Tokenizer's own BPE as tokenizer.json, and tokenizer_config.json, which AutoTokenizer needs."""
    about = tokenizer.about
    special = about["special_tokens"]
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
            "vocab": {bpe.as_letters(token): i for token, i in about["ranks"].items()} | special,
            "merges": [[bpe.as_letters(a), bpe.as_letters(b)] for a, b in bpe.to_merges(about["ranks"])],
        },
    }
    write_json(whole, f"{folder}/tokenizer.json")
    texts = {i: text for text, i in special.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts.get(tokenizer.bos),
        "eos_token": texts.get(tokenizer.eos[0]) if tokenizer.eos else None,
        "chat_template": tokenizer.chat_template,
    }
    write_json({key: value for key, value in settings.items() if value}, f"{folder}/tokenizer_config.json")
