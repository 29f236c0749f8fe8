"""A checkpoint's own byte-level BPE against the tokenizers library: a vocabulary trained here, SmolLM2's rule for
digits and spaces, and tokenizer.json in and out."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from data.tokenizer import GPT2, LLAMA3, SMOLLM2, Tokenizer
from tools import bpe
from tools.bpe import as_bytes

TRAIN = Path(__file__).parents[2] / "data/folio/train.txt"
TEXTS = [
    "Thou art 1623 years old,  and 7 more:\n\n   300 \t 4 5",
    "it's we'll I'VE don't  x1y22 ½ ² ٣٤ three",
    "naïve café \u2003 wide \u00a0 spaces \r\n 中文 🙂 e\u0301",
    " leading,  trailing   ",
    "\x00a\x04b \x7f!\x13! the\x06re",
    "",
]


@pytest.fixture(scope="module")
def both():
    """Trained without the rule for digits, so that there are tokens of several digits and of spaces before one, which
    only the rule keeps from being made."""
    theirs = tokenizers.Tokenizer(BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = TRAIN.read_text()[:200_000] + "In 1623,  16 23\n\n    1623 \t 45  \n" * 500
    theirs.train_from_iterator([text], BpeTrainer(vocab_size=600, special_tokens=["<end>"]))
    assert {"Ġ1623", "ĊĊĠĠĠ"} <= theirs.get_vocab().keys()
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    vocab = theirs.get_vocab()
    ranks = {as_bytes(token): i for token, i in vocab.items() if token != "<end>"}
    return theirs, Tokenizer({"pattern": SMOLLM2, "ranks": ranks, "special_tokens": {"<end>": 0}}, 600)


@pytest.mark.parametrize("text", [*TEXTS, TRAIN.read_text()[200_000:220_000]], ids=range(len(TEXTS) + 1))
def test_the_same_ids(both, text):
    """Of most bytes the vocabulary has no token, since the text that it was trained on has none: they are left out."""
    theirs, ours = both
    assert len(ours.bytes_without_token) > 128
    assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids


def test_ids_become_text_again_special_tokens_too_and_padding_none(both):
    _, ours = both
    text = "Thou art 1623 years old"
    assert ours.decode([0, *ours.encode_ordinary(text), 10**6]) == "<end>" + text


# --- tokenizer.json ---


LLAMA3_REGEX = (  # as its tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer(pattern):
    """The tokenizers library's own objects for what the pattern does."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == GPT2:
        return by_bytes
    if pattern == SMOLLM2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    cut = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_REGEX), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_theirs(pattern, alphabet=False):
    """Trained here, on folio and on digits and odd spaces; alphabet: with a token for every byte."""
    theirs = tokenizers.Tokenizer(BPE())
    theirs.pre_tokenizer = pre_tokenizer(pattern)
    text = TRAIN.read_text()[:100_000] + "In 1623,  16 23\n\n    1623 \t 45  \n it's I'LL don't" * 300
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<end>", "<start>"], initial_alphabet=letters)
    theirs.train_from_iterator([text], trainer)
    return theirs


def odd_texts():
    """Some 1000 texts full of digits, odd spaces, contractions, marks, other scripts and control characters."""
    dice = random.Random(0)
    words = "a the King's don't WE'LL ½ ² ٣٤ 1623 7 0 x1y22 12345678 naïve 中文 🙂 é ?! -- … < > _".split()
    words += "'S i'D 'ſ x'ſt K".split()
    spaces = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\r", "\u00a0", "\u2003", "\u200b", "\x85", ""]
    controls = [chr(i) for i in range(32)] + ["\x7f", "\ufffd", "\U0010ffff"]
    texts = []
    for _ in range(1000):
        parts = []
        for _ in range(dice.randint(1, 12)):
            parts += [dice.choice(words), dice.choice(spaces)]
            if dice.random() < 0.1:
                parts.append(dice.choice(controls))
        texts.append("".join(parts))
    return [*texts, *TEXTS, TRAIN.read_text()[100_000:120_000]]


def the_same_ids(theirs, ours):
    for text in odd_texts():
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("pattern", [GPT2, SMOLLM2, LLAMA3], ids=["gpt2", "smollm2", "llama3"])
@pytest.mark.parametrize("alphabet", [True, False], ids=["all bytes", "some bytes"])
def test_a_tokenizer_json_comes_in_and_goes_out(tmp_path, pattern, alphabet):
    theirs = make_theirs(pattern, alphabet)
    theirs.save(f"{tmp_path}/tokenizer.json")
    ours = bpe.read_folder(tmp_path, 700, {})
    assert ours.about["pattern"] == pattern and ours.about["special_tokens"] == {"<end>": 0, "<start>": 1}
    assert bool(ours.bytes_without_token) != alphabet
    the_same_ids(theirs, ours)
    bpe.write_tokenizer(ours.about, tmp_path)
    assert bpe.read_folder(tmp_path, 700, {}).about == ours.about
    for back in (
        tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json"),
        AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer,
    ):
        the_same_ids(back, ours)
        text = "<start>it's 1623<end>"  # which the library reads as special tokens, and decodes
        assert back.decode(back.encode(text).ids, skip_special_tokens=False) == text
        assert back.encode(text).ids == [1, *ours.encode_ordinary("it's 1623"), 0]


def test_added_tokens_that_are_not_special_are_found_in_a_text(tmp_path):
    """Those that are special stay text, and the library agrees once its setting leaves them so."""
    theirs = make_theirs(GPT2, True)
    theirs.add_tokens(["<new>", "1623"])
    theirs.add_special_tokens(["<sep>"])
    theirs.save(f"{tmp_path}/tokenizer.json")
    ours = bpe.read_folder(tmp_path, 710, {})
    assert ours.about["special_tokens"] | {"<new>": 700, "1623": 701, "<sep>": 702} == ours.about["special_tokens"]
    text = "the <new> King in 1623<new><sep> <end>\n <new"
    theirs.encode_special_tokens = True  # as text, the library means
    assert {700, 701} < set(ours.encode_ordinary(text)) and 702 not in ours.encode_ordinary(text)
    assert ours.encode_ordinary(text) == theirs.encode(text).ids
    the_same_ids(theirs, ours)
    bpe.write_tokenizer(ours.about, tmp_path)
    assert bpe.read_folder(tmp_path, 710, {}).about == ours.about
    back = tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    back.encode_special_tokens = True
    assert back.encode(text).ids == theirs.encode(text).ids


def test_an_added_token_has_the_id_that_the_library_gives_it(tmp_path):
    """Behind a gap it is another one than the file says."""
    theirs = make_theirs(GPT2, True)
    theirs.add_tokens(["<new>"])
    theirs.save(f"{tmp_path}/tokenizer.json")
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["added_tokens"][-1]["id"] = 705
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert tokenizers.Tokenizer.from_file(f"{tmp_path}/tokenizer.json").token_to_id("<new>") == 700
    with pytest.raises(ValueError, match=r"'<new>' has id 705.* 700"):
        bpe.read_folder(tmp_path, 710, {})


@pytest.mark.parametrize("tokens", [["<a>", "<a>b"], ["ing", "ping"], ["<sep", "p>"], ["<e"]], ids=" ".join)
def test_added_tokens_that_overlap_are_refused(tmp_path, tokens):
    """Which of them is found in a text is a matter of the library: here the longest, in tiktoken any."""
    theirs = make_theirs(GPT2, True)
    theirs.add_tokens(tokens)
    theirs.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(ValueError, match="overlap"):
        bpe.read_folder(tmp_path, 710, {})


def test_every_merge_that_makes_a_token_as_llama_3s_file_has_them(tmp_path):
    """With tokens that lower ids do not make of two: only a whole piece, or merges of higher ids first, become them."""
    theirs = make_theirs(LLAMA3, alphabet=True)
    ranks = {as_bytes(token): i for token, i in theirs.get_vocab().items() if i > 1}
    ranks |= {b" zounds": 700, b"zo": 701, b"zounds": 702, b"12": 703, b"23": 704, b"123": 705}
    about = {"pattern": LLAMA3, "ranks": ranks, "special_tokens": {"<end>": 0, "<start>": 1}}
    assert len(bpe.split(b" zounds", ranks)) > 2 and len(bpe.split(b"123", ranks)) == 2
    bpe.write_tokenizer(about, tmp_path)
    path = tmp_path / "tokenizer.json"
    assert bpe.read_folder(tmp_path, 710, {}).about == about
    whole = json.loads(path.read_text())
    merges = [(a, b) for token in sorted(ranks, key=ranks.get) for a, b in bpe.halves(token, ranks)]
    whole["model"]["merges"] = [f"{bpe.as_letters(a)} {bpe.as_letters(b)}" for a, b in merges]  # the older spelling
    path.write_text(json.dumps(whole))
    ours = bpe.read_folder(tmp_path, 710, {})
    assert ours.about == about
    theirs = tokenizers.Tokenizer.from_file(str(path))
    the_same_ids(theirs, ours)
    for text in ("zounds", " zounds", " zoundszounds", "xzounds zound 1234 12 3"):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, text
    whole["model"]["ignore_merges"] = False
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="do not make the token b' zounds' as the ids do"):
        bpe.read_folder(tmp_path, 710, {})
    other = tokenizers.Tokenizer.from_file(str(path))
    assert other.encode(" zounds").ids != ours.encode_ordinary(" zounds")  # so it is rightly refused


def test_merges_in_the_order_of_the_ids_are_not_enough(tmp_path):
    """Here abc is a and bc, but lower ids make ab and c of it: the library never makes it, tiktoken does."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    theirs = tokenizers.Tokenizer(BPE(vocab, [("a", "b"), ("b", "c"), ("a", "bc")]))
    theirs.pre_tokenizer = pre_tokenizer(GPT2)
    theirs.save(f"{tmp_path}/tokenizer.json")
    with pytest.raises(ValueError, match="do not make the token b'abc' as the ids do"):
        bpe.read_folder(tmp_path, 6, {})
    ranks = {token.encode(): i for token, i in vocab.items()}
    ours = Tokenizer({"pattern": GPT2, "ranks": ranks, "special_tokens": {}}, 6)
    assert (theirs.encode("abc").ids, ours.encode_ordinary("abc")) == ([3, 2], [5])
