#!/bin/bash
# transformers 5.23.0's Trainer (torch 2.13.0): accumulating 8 batches makes many models' loss and gradient 8 times as
# large.
#
# If a model's forward takes **kwargs, as all of these do, the Trainer leaves it to the model to divide the loss by the
# number of labels in all accumulated batches. The causal language model here does so. The others never read that
# number and return the mean over their batch, and the Trainer adds these means up. So the same 8 texts have 8 times the
# loss, printed and optimized, when they come in 8 batches. Nothing warns. Adam hides it, since it divides by the
# gradient's size, but what max_grad_norm compares is 8 times too large. Users have reported it (transformers' issue
# 47688).
#
# Output seen: one step of SGD, max_grad_norm=0, on small random models without dropout
#   8 texts as                      1 batch of 8      8 batches of 1     loss     step
#   LlamaForCausalLM                loss    3.47      loss    3.47      x 1.0    x 1.0
#   LlamaForSequenceClassification  loss    0.71      loss    5.64      x 8.0    x 8.0
#   LlamaForTokenClassification     loss    0.71      loss    5.65      x 8.0    x 8.0
#   BertForMaskedLM                 loss    3.48      loss   27.86      x 8.0    x 8.0
#   BertForSequenceClassification   loss    0.69      loss    5.53      x 8.0    x 8.0
#   T5ForConditionalGeneration      loss    4.13      loss   33.04      x 8.0    x 8.0
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - 2> log <<'END' || { cat log; exit 1; }
import contextlib
import io
import sys

import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config, Trainer, TrainingArguments

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
configs = {
    "Llama": LlamaConfig(**sizes, pad_token_id=0),
    "Bert": BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "T5": T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0),
}
configs["T5"].decoder_start_token_id = 0
texts = torch.randint(1, 32, (8, 10), generator=torch.Generator().manual_seed(1))


def train(kind, labels, batch_size, batches):
    """Return the loss of one step, as the Trainer logs it, and the step's length."""
    torch.manual_seed(0)
    family = next(name for name in configs if kind.startswith(name))
    model = getattr(transformers, kind)(configs[family])
    before = [p.detach().clone() for p in model.parameters()]
    settings = TrainingArguments(
        output_dir="out", per_device_train_batch_size=batch_size, gradient_accumulation_steps=batches, max_steps=1,
        optim="sgd", learning_rate=0.01, max_grad_norm=0, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    moved = [(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)]
    return trainer.state.log_history[0]["loss"], torch.cat(moved).norm().item()


print("8 texts as                      1 batch of 8      8 batches of 1     loss     step")
ratios = {}
for kind, labels in (
    ("LlamaForCausalLM", texts),
    ("LlamaForSequenceClassification", texts[:, 0] % 2),
    ("LlamaForTokenClassification", texts % 2),
    ("BertForMaskedLM", texts),
    ("BertForSequenceClassification", texts[:, 0] % 2),
    ("T5ForConditionalGeneration", texts),
):
    (loss, step), (loss_of_8, step_of_8) = train(kind, labels, 8, 1), train(kind, labels, 1, 8)
    ratios[kind] = (round(loss_of_8 / loss, 1), round(step_of_8 / step, 1))
    times = "".join(f"{f'x {ratio:.1f}':>9s}" for ratio in ratios[kind])
    print(f"{kind:30s}  loss {loss:7.2f}      loss {loss_of_8:7.2f}  {times}", flush=True)
right = ratios.pop("LlamaForCausalLM")
sys.exit(not (right == (1, 1) and set(ratios.values()) == {(8, 8)}))
END
