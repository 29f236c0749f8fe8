"""A checkpoint's own byte-level BPE against the tokenizers library: a vocabulary trained here, and SmolLM2's rule for
digits and spaces."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data import Tokenizer
from tools.bpe import SMOLLM2, as_bytes

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
    assert len(ours.missing) > 128
    assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids


def test_ids_become_text_again_special_tokens_too_and_padding_none(both):
    _, ours = both
    text = "Thou art 1623 years old"
    assert ours.decode([0, *ours.encode_ordinary(text), 10**6]) == "<end>" + text
