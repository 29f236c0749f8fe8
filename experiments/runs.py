"""Many training runs, each measured once, written down at once, and gone on with where they were stopped."""

import csv
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch


def number(text):
    """What a cell of a CSV says: an int, a float, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_csv(path):
    """Return a CSV's rows as dicts, numbers as numbers; none where there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [{name: number(cell) for name, cell in row.items()} for row in csv.DictReader(f)]


def write_csv(path, rows):
    """Write rows, dicts of the same keys, under a temporary name and then renamed."""
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def open_folder(folder, about):
    """Make folder for runs that about, a dict of text and numbers, describes; ValueError where others' runs are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "about.json"
    if not path.exists():
        path.write_text(json.dumps(about, indent=1) + "\n")
    found = json.loads(path.read_text())
    for name in about | found:
        if found.get(name) != about.get(name):
            raise ValueError(f"{folder} holds runs with {name} {found.get(name)}, not {about.get(name)}: another --out")


def worker():
    torch.set_num_threads(1)  # a process a core is faster than a thread a core, and the same bits on any machine
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - train()'s progress, of several processes at once


def measure_all(jobs, measure, path, workers):
    """Call measure(**job) for every job that the CSV at path lacks, in so many processes; write each row down at once.

    jobs: dicts of the same keys; measure: a function of a module's top level, which returns a dict of results, the same
    keys for every job. Returns the rows, job | results, in the order of jobs. A call again goes on where one stopped.
    """
    done = {tuple(map(str, list(row.values())[: len(jobs[0])])): row for row in read_csv(path)}
    left = [job for job in jobs if tuple(map(str, job.values())) not in done]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker)
    try:
        running = {pool.submit(measure, **job): job for job in left}
        start = time.time()
        for n, future in enumerate(as_completed(running), 1):
            row = running[future] | future.result()
            write_csv(path, [*done.values(), row])
            done[tuple(map(str, running[future].values()))] = row
            minutes = (time.time() - start) / n * (len(left) - n) / 60
            results = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{n}/{len(left)}  {results}  {minutes:.0f} min left", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return [done[tuple(map(str, job.values()))] for job in jobs]
