#!/bin/bash
# safetensors 0.8.0 with torch 2.13.0: a conjugated tensor comes back unconjugated.
#
# torch's conj() copies nothing: it returns a view with a bit set. That view is contiguous, and everything in torch
# sees the right values, torch.save included. safetensors writes the memory below and does not look at the bit, so the
# imaginary part comes back with the other sign, without a word. LLaMA's released code keeps its rotary table as such
# complex numbers, and the conjugate rotates backwards. resolve_conj() before saving gives the right file.
#
# Output seen, for exp(i/2) and its conjugate:
#   in torch                      0.878 -0.479i
#   through torch.save            0.878 -0.479i
#   through safetensors           0.878 +0.479i
#   resolve_conj(), safetensors   0.878 -0.479i
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
    safetensors==0.8.0 torch==2.13.0 numpy==2.4.6 packaging
"$folder/venv/bin/python" - "$folder" <<'END'
import sys

import torch
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
table = torch.polar(torch.ones(1), torch.tensor([0.5])).conj()
torch.save(table, f"{folder}/table.pt")
save_file({"table": table}, f"{folder}/table.safetensors")
save_file({"table": table.resolve_conj()}, f"{folder}/resolved.safetensors")
found = {
    "in torch": table,
    "through torch.save": torch.load(f"{folder}/table.pt"),
    "through safetensors": load_file(f"{folder}/table.safetensors")["table"],
    "resolve_conj(), safetensors": load_file(f"{folder}/resolved.safetensors")["table"],
}
for name, t in found.items():
    print(f"{name:30s}{t[0].real:.3f} {t[0].imag:+.3f}i")
signs = [t[0].imag.item() > 0 for t in found.values()]
sys.exit(not (table.is_contiguous() and signs == [False, False, True, False]))
END
