#!/bin/bash
# tokenizers 0.23.3: BERT's kind of tokenizer, trained twice on the same text, is two tokenizers.
#
# Training has no random step and takes no seed, and a byte-level BPE comes out the same each time. But with a mark for
# pieces within a word ("##", as in BERT) or at its end ("</w>", as in the first GPT and CLIP), the marked characters
# get their ids in another order each time, and in BERT's kind other tokens follow. A model needs the very file that it
# was trained with: whoever trains the tokenizer anew from the same text gives the model other ids, without an error.
# Users have reported it (tokenizers' issue 1794).
#
# Output seen, on 60,000 characters of Python's own help, with 1,500 tokens; the figures vary from run to run. Other
# lines are those with other ids.
#   trained twice            ids moved   other tokens   other lines   the second reads the first's ids as
#   BertWordPieceTokenizer       27.9%             11         41.4%   a tokefizer is a flar of words and their ids.
#   CharBPETokenizer              5.9%              0         70.3%   h tokenizer is B file of words and their ids 7
#   ByteLevelBPETokenizer         0.0%              0          0.0%   A tokenizer is a file of words and their ids.
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'END'
import sys
from pydoc_data.topics import topics

from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, CharBPETokenizer

SENTENCE = "A tokenizer is a file of words and their ids."
lines = "\n".join(topics.values())[:60000].splitlines()


def train(kind):
    tokenizer = kind()
    tokenizer.train_from_iterator(lines, vocab_size=1500, show_progress=False)
    return tokenizer


print("trained twice            ids moved   other tokens   other lines   the second reads the first's ids as")
found = []
for kind in (BertWordPieceTokenizer, CharBPETokenizer, ByteLevelBPETokenizer):
    first, second = train(kind), train(kind)
    ids, again = first.get_vocab(), second.get_vocab()
    moved = sum(again.get(token) != i for token, i in ids.items()) / len(ids)
    other = len(again.keys() - ids.keys())
    lost = sum(first.encode(line).ids != second.encode(line).ids for line in lines) / len(lines)
    read = second.decode(first.encode(SENTENCE).ids)
    found.append((moved, other, lost))
    print(f"{kind.__name__:24s}{moved:10.1%}{other:15d}{lost:14.1%}   {read}")
by_word, by_end, by_byte = found
sys.exit(not (by_word[0] > 0.02 and by_word[2] > 0.1 and by_end[0] > 0.01 and by_end[2] > 0.1 and by_byte == (0, 0, 0)))
END
