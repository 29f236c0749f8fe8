#!/bin/bash
# torchmetrics 1.9.0 (torch 2.13.0): in a MetricCollection, metrics that agree on the first batch agree for ever.
#
# To save time a MetricCollection merges metrics whose sums are equal after the first batch. From then on it updates
# only one of them. It does not look at their settings. So if the first batch happens to have no padding, the perplexity
# without padding becomes the one with padding. With the same batches in the other order it is right. Nothing warns;
# compute_groups=False prevents it. Users have reported other cases (torchmetrics' issues 2596 and 2916, closed).
#
# Output seen, for one batch with padding (token 0) and one without
#                                   in a collection, padding in the
#                               alone      first batch     second batch
#   perplexity                  13.08            13.08            13.08
#   perplexity, no padding      11.95            11.95            13.08
#   accuracy                   0.1562           0.1562           0.1562
#   accuracy, no padding       0.1731           0.1731           0.1562
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import sys

import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

dice = torch.Generator().manual_seed(0)
logits = torch.randn(2, 4, 16, 8, generator=dice)  # 2 batches of 4 texts of 16 tokens, out of 8
targets = torch.randint(1, 8, (2, 4, 16), generator=dice)
targets[1, :, 10:] = 0
full, padded = zip(logits, targets, strict=True)


def perplexities():
    return {"perplexity": Perplexity(), "perplexity, no padding": Perplexity(ignore_index=0)}


def accuracies():
    settings = {"num_classes": 8, "average": "micro"}
    return {
        "accuracy": MulticlassAccuracy(**settings),
        "accuracy, no padding": MulticlassAccuracy(**settings, ignore_index=0),
    }


def of(metric, batches, classes_last):
    for scores, labels in batches:
        metric.update(scores if classes_last else scores.transpose(1, 2), labels)
    return metric.compute()


print("                                 in a collection, padding in the")
print("                            alone      first batch     second batch")
is_as_seen = True
for make, classes_last in ((perplexities, True), (accuracies, False)):
    first = of(MetricCollection(make()), (padded, full), classes_last)
    second = of(MetricCollection(make()), (full, padded), classes_last)
    for name, metric in make().items():
        alone = of(metric, (full, padded), classes_last)
        print(f"{name:23s}{alone:10.4g}{first[name]:17.4g}{second[name]:17.4g}")
        is_right = torch.isclose(second[name], alone).item()
        is_as_seen &= torch.isclose(first[name], alone).item() and is_right == ("no padding" not in name)
sys.exit(not is_as_seen)
END
