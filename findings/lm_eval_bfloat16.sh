#!/bin/bash
# lm_eval 0.4.13: a bfloat16 model's scores are rounded, and BLiMP's right answers win the ties.
#
# HFLM takes log_softmax in the dtype of the logits, which by default is the checkpoint's, and sums it in that dtype.
# bfloat16 has 8 significant bits: a score near -70 is a multiple of 0.5. Two sentences that differ in one word often
# get the same score. np.argmax then takes the first choice, and BLiMP's template always has the right one first, as
# have those of multiblimp, zhoblimp, turblimp, blimp_nl, lm_syneval and truthfulqa_mc1. softmax_dtype="float32" helps;
# its documentation only says that it can help with numerical stability.
#
# Neither model below was trained, and lots decide which sentence of a pair is right, so the truth is near 50%.
#
# Output seen: accuracy by BLiMP's template on 500 pairs
#                                           right one first   right one second   pairs with equal scores
#   logits near 0, default                            78.8%              19.2%                     59.6%
#   logits near 0, softmax_dtype float32              50.0%              50.0%                      0.0%
#   larger logits, default                            54.2%              48.8%                      5.4%
#   larger logits, softmax_dtype float32              51.2%              51.2%                      0.0%
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    lm_eval==0.4.13 accelerate==1.15.0 datasets==5.2.0 transformers==5.23.0 torch==2.13.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'END' || { cat "$folder/log"; exit 1; }
import sys
from pathlib import Path

import lm_eval
import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N = 1000
tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(N)}, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w0", pad_token="w0")
dice = np.random.default_rng(0)
rows = []
for _ in range(500):
    words = dice.integers(1, N, 10)
    pair = {}
    for name, word in zip(("sentence_good", "sentence_bad"), dice.integers(1, N, 2), strict=True):
        words[4] = word
        pair[name] = " ".join(f"w{i}" for i in words)
    rows.append(pair)
pairs = DatasetDict({"train": Dataset.from_list(rows)})
blimp = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/blimp/_template_yaml").read_text())
del blimp["dataset_path"]


def accuracy(model, right_first, **settings):
    """Return lm_eval's accuracy, and the share of pairs whose two sentences have the same score."""
    config = dict(blimp, task="pairs", custom_dataset=lambda **_: pairs)
    if not right_first:
        config.update(doc_to_target=1, doc_to_choice="{{[sentence_bad, sentence_good]}}")
    lm = HFLM(model, tokenizer=tokenizer, batch_size=16, device="cpu", **settings)
    found = lm_eval.simple_evaluate(lm, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    scores = [[score for (score, _), in sample["resps"]] for sample in found["samples"]["pairs"]]
    return found["results"]["pairs"]["acc,none"], np.mean([a == b for a, b in scores])


as_seen = []
print("                                        right one first   right one second   pairs with equal scores")
for size, spread in (("logits near 0", 0.02), ("larger logits", 0.2)):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=N, initializer_range=spread, **shape)).to(torch.bfloat16)
    found = []
    for name, settings in (("default", {}), ("softmax_dtype float32", {"softmax_dtype": "float32"})):
        (first, equal), (second, _) = accuracy(model, True, **settings), accuracy(model, False, **settings)
        found.append((first, second, equal))
        print(f"{size + ', ' + name:40s}{first:15.1%}{second:19.1%}{equal:26.1%}")
    (first, second, equal), (truth, swapped, _) = found
    as_seen.append(truth == swapped and first > truth + 0.01 and second < truth - 0.01 and equal > 0.02)
sys.exit(not all(as_seen))
END
