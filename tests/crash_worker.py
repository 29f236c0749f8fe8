"""Run train.main(), and end this process like a kill at the n-th event: nothing after it runs, no finally, no flush.

python tests/crash_worker.py KIND N FLAGS...     KIND: rename (just before it), half-save (half of it on the disk)
"""

import io
import os
import sys

import torch

import train

kind, n, *flags = sys.argv[1:]
left = int(n)
replace, save = os.replace, torch.save


def die_at_the_nth():
    global left
    left -= 1
    if left == 0:
        os._exit(137)


def crashing_replace(source, target):
    if kind == "rename":
        die_at_the_nth()
    replace(source, target)


def crashing_save(state, f):
    if kind == "half-save":
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        die_at_the_nth()
        f.seek(0)
        f.truncate()
    save(state, f)


os.replace, torch.save = crashing_replace, crashing_save
torch.set_num_threads(1)
sys.exit(train.main(flags))
