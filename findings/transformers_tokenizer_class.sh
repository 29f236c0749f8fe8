#!/bin/bash
# transformers 5.23.0 reads a tokenizer that 4.57.6 saved, and splits the same text into other tokens.
#
# tokenizer.json describes a tokenizer completely, and tokenizer_config.json names its class. In version 5 the class
# wins: GPT2Tokenizer and LlamaTokenizer take vocabulary and merges from the file, but neither its algorithm nor its
# pre-tokenizer. Two ordinary cases, both without a warning, and decoding still returns the text:
# - A Unigram vocabulary (SentencePiece's default) under LlamaTokenizer is read as BPE. A Unigram file has no merges,
#   so nothing is ever merged: each character becomes a token.
# - BPE that makes each digit a piece of its own, as SmolLM's does, under GPT2Tokenizer: digits are not split off, so
#   spaces before a number are tokenized differently.
# PreTrainedTokenizerFast.from_pretrained still reads both files as they are.
#
# Output seen: tokens of 212 docstrings, and how many docstrings are split as tokenizer.json says
#                                  4.57.6        5.23.0        5.23.0, PreTrainedTokenizerFast
#   LlamaTokenizer, Unigram       157176  212   472306    0   157176  212
#   GPT2Tokenizer, single digits  165591  212   166540  104   165591  212
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.23.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --no-compile --disable-pip-version-check \
        transformers==$version numpy==2.4.6
done
cd "$folder"
export TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
4.57.6/bin/python - > log 2>&1 <<'END' || { cat log; exit 1; }
import inspect
import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence
from transformers import AutoTokenizer, GPT2TokenizerFast, LlamaTokenizerFast

docs = [inspect.cleandoc(getattr(np, name).__doc__ or "") for name in sorted(dir(np))]
docs = [doc for doc in docs if len(doc) > 500]
train = docs[::2]
test = docs[1::2]

unigram = Tokenizer(models.Unigram())
unigram.pre_tokenizer = Metaspace()
unigram.decoder = decoders.Metaspace()
special = ["<unk>", "<s>", "</s>"]
unigram.train_from_iterator(train, trainers.UnigramTrainer(vocab_size=2000, special_tokens=special, unk_token="<unk>"))
LlamaTokenizerFast(tokenizer_object=unigram).save_pretrained("llama")

digits = Tokenizer(models.BPE())
digits.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
digits.decoder = decoders.ByteLevel()
digits.train_from_iterator(train, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=ByteLevel.alphabet()))
GPT2TokenizerFast(tokenizer_object=digits).save_pretrained("gpt2")

old = {}
for name in ("llama", "gpt2"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    old[name] = [tokenizer.tokenize(text) for text in test]
with open("old.json", "w") as file:
    json.dump([test, old], file)
END
5.23.0/bin/python - <<'END'
import json
import sys

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

with open("old.json") as file:
    test, old = json.load(file)
print(f"{'':31s}4.57.6        5.23.0        5.23.0, PreTrainedTokenizerFast")
found = []
for name, told in (("llama", "LlamaTokenizer, Unigram"), ("gpt2", "GPT2Tokenizer, single digits")):
    saved = Tokenizer.from_file(f"{name}/tokenizer.json")
    wanted = [saved.encode(text, add_special_tokens=False).tokens for text in test]
    split = [old[name]]
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = reader.from_pretrained(name)
        split.append([tokenizer.tokenize(text) for text in test])
    counts = [(sum(map(len, texts)), sum(a == b for a, b in zip(texts, wanted))) for texts in split]
    print(f"{told:29s}" + "   ".join(f"{n_tokens} {n_same:4d}" for n_tokens, n_same in counts))
    found.append(counts)
llama, gpt2 = found
right = all(counts[0] == counts[2] and counts[0][1] == len(test) for counts in found)
sys.exit(not (right and llama[1][0] > 2 * llama[0][0] and llama[1][1] == 0 and gpt2[1][1] < 0.9 * len(test)))
END
