"""What the experiments share: runs that go on where they were stopped, losses work by work, how sure one may be of a
mean, tables.

A folder of runs holds about.json, what all of them share; results.csv, a line per run; and windows.npz, the arrays of
each run. A run is known by its job, a NamedTuple of what was decided in advance; what it found is a dataclass.
"""

import csv
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch.nn import functional as F

import data as datasets
import run_folder
from disk import read_shapes, replace_file
from train import autocast

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "data/base.pt")
RESULTS = ROOT / "experiments/results"  # what is committed
# Student's t, the 97.5 % point, by degrees of freedom: any table has it, and the tests integrate the density
T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}
BLOCK = 32  # windows: some pages
N_RESAMPLES = 2000  # of a bootstrap
TITLES = {  # the line with which a work begins, and its name
    "MACBETH": "Macbeth",
    "TWELFTH NIGHT; OR, WHAT YOU WILL": "Twelfth Night",
    "JULIUS CAESAR": "Julius Caesar",
    "THE MERCHANT OF VENICE": "The Merchant of Venice",
    "The Tragedie of Macbeth": "Macbeth, 1623",
    "Twelfe Night, Or what you will": "Twelfth Night, 1623",
    "The Tragedie of Julius Caesar": "Julius Caesar, 1623",
    "The Merchant of Venice": "The Merchant of Venice, 1623",
    "As you Like it": "As You Like It, 1623",
    "The life and death of King Richard the Second": "Richard II, 1623",
    "The Two Gentlemen of Verona": "The Two Gentlemen of Verona, 1623",
    "Isaiah 1": "Isaiah",
    "Luke 1": "Luke",
    "John 1": "John",
}
STOPPED = "stopped; the same command continues"


# --- what a folder of runs holds ---


def open_folder(folder, about):
    """Make folder for the runs that about, a dict for JSON, describes; or check that those in it are such runs.

    A dict within about, such as the hashes of several data, may gain names; one that is missing counts as empty. Raises
    ValueError where others' runs are.
    """
    path = folder / "about.json"
    found = read_about(folder) if path.exists() else None
    merged = about if found is None else merge_abouts(found, about, folder)
    if merged != found:
        with replace_file(path, text=True) as f:
            f.write(json.dumps(merged, indent=1) + "\n")


def merge_abouts(found, about, folder):
    """Return what folder's about.json becomes. Raises ValueError where found, what it says, contradicts about."""
    merged = {}
    for name in found | about:  # a name that one lacks counts as {}: only dicts can be added to
        theirs = found.get(name, {})
        ours = about.get(name, {})
        if contradict(theirs, ours):
            difference = f"{name} {found.get(name)}, not {about.get(name)}"
            raise ValueError(f"{folder} holds runs with {difference}: name a new --out")
        merged[name] = theirs | ours if isinstance(ours, dict) else ours
    return merged


def contradict(theirs, ours):
    """Whether two values of about.json differ: dicts, in a name that both have."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return any(theirs[key] != ours[key] for key in theirs.keys() & ours.keys())
    return theirs != ours


def read_about(folder):
    """Return about.json's dict. Raises OSError where there is none and ValueError where it is something else."""
    path = folder / "about.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"{path} is not what this command wrote: remove it with the runs beside it")
    return about


def read_csv(path, columns):
    """Return a CSV's rows as dicts; none where there is no such file.

    columns: {name: type} in the file's order, such as a dataclass's annotations. An empty cell is None, if its type
    allows that. Raises ValueError, with the line, for a file that does not fit.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        try:
            if reader.fieldnames != list(columns):
                raise ValueError("other columns")
            return [parse_row(cells, columns) for cells in reader]
        except (csv.Error, ValueError) as e:
            why = f"line {max(reader.line_num, 1)}: {e}"
            raise ValueError(f"{path} is not what this command wrote ({why}): remove it to measure again") from None


def parse_row(cells, columns):
    """The values of a CSV's row. cells: {name: text}; columns: {name: type}."""
    if None in cells:  # how csv names the cells beyond the columns
        raise ValueError("too many cells")
    if None in cells.values():  # and how it fills those that are missing
        raise ValueError("too few cells")
    row = {}
    for name, kind in columns.items():
        first, *others = get_args(kind) or (kind,)  # of float | None: both
        row[name] = None if others and cells[name] == "" else first(cells[name])
    return row


def write_csv(path, rows):
    """Write rows, dicts of the same keys."""
    with replace_file(path, text=True) as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path, row_type):
    """Return a CSV's rows as row_type, a dataclass or a NamedTuple. Raises as read_csv does."""
    return [row_type(**row) for row in read_csv(path, row_type.__annotations__)]


def run_name(job):
    """What windows.npz calls the run of a job."""
    return "_".join(str(value) for value in job)


def load_runs(folder, job_type, result_type):
    """Return the runs in folder: {job: result} in the file's order, and {job: {array's name: array}}.

    job_type: a NamedTuple, results.csv's first columns; result_type: a dataclass, the others. Raises ValueError for
    files that make_runs did not write.
    """
    results = {}
    n = len(job_type._fields)
    for row in read_csv(folder / "results.csv", job_type.__annotations__ | result_type.__annotations__):
        values = list(row.values())
        results[job_type(*values[:n])] = result_type(*values[n:])
    by_name = read_windows(folder / "windows.npz")
    return results, {job: by_name[run_name(job)] for job in results if run_name(job) in by_name}


def read_windows(path):
    """Return windows.npz's arrays, {run's name: {array's name: array}}; none where there is no such file."""
    found = {}
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if sum(math.prod(shape) for shape in read_shapes(file).values()) > 10**8:
                    raise ValueError("too many numbers")  # a small file can unfold to gigabytes
                for key in file.files:
                    run, _, array = key.rpartition("/")
                    found.setdefault(run, {})[array] = file[key].astype(np.float64)
        except Exception as e:  # a damaged file makes zipfile and numpy raise nearly anything
            raise ValueError(f"{path} is damaged, or not what this command wrote ({type(e).__name__})") from None
    return found


def arrays_of(job, arrays, folder):
    """Return a run's arrays. Raises ValueError where windows.npz lacks them."""
    if job not in arrays:
        name = run_name(job)
        raise ValueError(f"{folder}/windows.npz lacks {name}: remove its line in results.csv to measure again")
    return arrays[job]


def stack_works(runs, kind=""):
    """Nats a byte of every work by every run, (runs, works). kind: 'forget_', or '' for what was learned.

    Raises ValueError where the runs did not read the same blocks.
    """
    losses = []
    for run in runs:
        work = run.get(f"{kind}work")
        if work is None or not np.array_equal(work, runs[0][f"{kind}work"]):
            raise ValueError("windows.npz holds runs that were measured on different texts: remove it")
        work = work.astype(int)
        losses.append(np.bincount(work, run[f"{kind}nats"]) / np.bincount(work, run[f"{kind}bytes"]))
    return np.stack(losses)


# --- making the runs ---


def check_counts(workers, seeds=1):
    """Raise ValueError for --workers or --seeds out of bounds."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    most = len(T_975) + 1
    if not 1 <= seeds <= most:
        raise ValueError(f"seeds must be from 1 to {most}, as far as the table of Student's t goes, not {seeds}")


def start_worker():
    torch.set_num_threads(1)  # one process per core is faster than one thread per core, and the bits are the same
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - train()'s progress, of several processes at once


def submit(pool, measure, jobs):
    """Hand the jobs to the pool's workers. Returns {future: job}.

    Ctrl-C reaches every process of a terminal's command: workers inherit that they ignore it, and this one ends them.
    Else it would now and then see a dead worker before it heard of the Ctrl-C itself.
    """
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return {pool.submit(measure, job): job for job in jobs}
    finally:
        signal.signal(signal.SIGINT, usual)


def make_runs(jobs, measure, result_type, folder, workers, minutes=math.inf):
    """Call measure(job) for every job that folder lacks, in so many processes, and write each run down at once.

    jobs: NamedTuples of one type; measure: a function of a module's top level, which returns a result_type, a
    dataclass, and a dict of arrays. Returns {job: result} of the jobs that are done. A second call continues
    where the first stopped. After so many minutes no more jobs are handed to the workers; those that they have are
    finished. Raises OSError where a worker was killed.
    """
    results, arrays = load_runs(folder, type(jobs[0]), result_type)
    left = [job for job in dict.fromkeys(jobs) if job not in results]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        running = submit(pool, measure, left)
        start = time.time()
        n = 0
        for future in as_completed(running):
            if future.cancelled():
                continue  # cancelled further down, once the minutes were over
            n += 1
            job = running[future]
            results[job], arrays[job] = future.result()
            write_runs(folder, results, arrays)
            took = (time.time() - start) / 60
            minutes_left = took / n * (len(left) - n)
            print(f"{n}/{len(left)}  {in_words(job, results[job])}  {minutes_left:.0f} min left", flush=True)
            if took > minutes:
                for other in running:
                    other.cancel()
    except BrokenProcessPool:
        raise OSError("a worker was killed, perhaps for lack of memory; the same command continues") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    return {job: results[job] for job in jobs if job in results}


def in_words(job, result):
    """A run in one line, for the terminal: 'steps 100  loss 1.234'."""
    words = []
    for name, value in (job._asdict() | vars(result)).items():
        words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(words)


def write_runs_json(folder, script, arguments, model, data_hash, results):
    """Write the run.json of a command's runs, as docs/authors.md describes it. results: {job: result}, make_runs'."""
    path = folder / "run.json"
    figures = {run_name(job): vars(result) for job, result in results.items()}
    # a command that made no run leaves what is there: it names the machine that made them
    if not path.exists() or path.stat().st_mtime < (folder / "results.csv").stat().st_mtime:
        run_folder.write_run_json(path, script, arguments, model, data_hash, figures)


def write_runs(folder, results, arrays):
    """Write windows.npz, then results.csv, whose line says that a run's arrays are there."""
    packed = {}
    for job in arrays:
        for name, array in arrays[job].items():
            packed[f"{run_name(job)}/{name}"] = array.astype(np.float32)
    with replace_file(folder / "windows.npz") as f:
        np.savez_compressed(f, **packed)
    write_csv(folder / "results.csv", [job._asdict() | vars(result) for job, result in results.items()])


# --- texts, and losses work by work ---


def load_data(name, model, splits):
    """data.load for this model, in windows of at most 256 tokens, as train.py has them."""
    config = model.config
    return datasets.load(name, model.tokenizer, config.vocab_size, min(config.block_size, 256), splits)


def tokens_a_byte(split):
    """A loss in nats a token times this is in nats a byte; 1 where the length of the text is unknown."""
    return split.n_tokens / split.n_bytes if split.n_bytes else 1.0


def read_works(name, split, model):
    """Return {title: Stream} of a split, cut at the lines that are TITLES: a window belongs to one work only.

    What has no such line, or is no text, is one work, called after its folder. Raises ValueError for more works than
    intervals are made for, and for one without a window.
    """
    path = datasets.find(name, [split])[split]
    whole = load_data(name, model, [split])[split]  # the loader's own checks
    if path.suffix != ".txt":
        return {path.parent.name: whole}
    pieces = {}
    title = path.parent.name
    for line in path.read_bytes().splitlines(keepends=True):
        found = TITLES.get(line.strip().decode("utf-8", "replace"), title)
        if found not in pieces:  # a title that comes again, as a speaker's name does, begins nothing
            title = found
        pieces.setdefault(title, []).append(line)
    works = {}
    for title, lines in pieces.items():
        raw = b"".join(lines)
        works[title] = datasets.Stream(datasets.tokens_of(raw, model.tokenizer), whole.block_size, len(raw))
        if len(works[title]) == 0:
            raise ValueError(f"{path}: what stands under {title!r} is too short to predict anything")
    if len(works) > len(T_975) + 1:
        raise ValueError(f"{path} holds {len(works)} works, and intervals are made for at most {len(T_975) + 1}")
    return works


@torch.no_grad()
def window_losses(model, split, config, n_windows=None):
    """Return the nats of n_windows evenly spaced windows of a split, or of all, and each one's number of targets.

    Two float64 arrays (windows,): nats.sum() / targets.sum() is train.evaluate's loss. Leaves eval mode on.
    """
    model.eval()
    device = model.lm_head.weight.device
    ids = datasets.evenly_spaced(split, n_windows or len(split))
    nats = []
    targets = []
    for i in range(0, len(ids), config.batch_size):
        x, y = datasets.to_device(split.windows(ids[i : i + config.batch_size]), device)
        with autocast(model, config):
            logits, _ = model(x)  # (B, T, vocab_size)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-1, reduction="none")
        nats.append(losses.cpu().double().view_as(y).sum(1))
        targets.append((y >= 0).sum(1).cpu())
    return torch.cat(nats).numpy(), torch.cat(targets).double().numpy()


def work_losses(model, works, config, n_windows=None, diverged=False):
    """Read every work whole, or n_windows evenly spaced windows of each.

    works: read_works'. Returns three arrays (blocks,), a block being up to BLOCK windows in a row of one work: 'nats',
    'bytes', and 'work', which one. Where training diverged, or a loss is not finite, all nats are infinite.
    """
    found = {"nats": [], "bytes": [], "work": []}
    for i, split in enumerate(works.values()):
        nats, targets = window_losses(model, split, config, n_windows)
        starts = np.arange(0, len(nats), BLOCK)
        found["nats"].append(np.add.reduceat(nats, starts))
        found["bytes"].append(np.add.reduceat(targets, starts) / tokens_a_byte(split))
        found["work"].append(np.full(len(starts), i))
    found = {name: np.concatenate(parts) for name, parts in found.items()}
    if diverged or not np.isfinite(found["nats"]).all():
        found["nats"] = np.full(len(found["nats"]), np.inf)
    return found


# --- how sure one may be of a mean ---


def student(values):
    """The mean of values, (n,) with n ≤ 10, and Student's 95 % interval: (mean, low, high), ends NaN for n = 1."""
    n = len(values)
    mean = float(np.mean(values))
    half = T_975[n - 1] * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def block_noise(nats, n_bytes):
    """The middle 95 % of bootstrap resamples of one work's blocks: how far a mean moves with the passages read.

    nats, n_bytes: (blocks,), the first a method's less another's. It says nothing of other works. Returns (low, high)
    in nats a byte.
    """
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(nats), np.full(len(nats), 1 / len(nats)), N_RESAMPLES)  # (N_RESAMPLES, blocks)
    return np.quantile(drawn @ nats / (drawn @ n_bytes), (0.025, 0.975)).tolist()


@cache  # a table takes hundreds of differences, and drawing is most of the work
def resamples(n_items, n_draws):
    """N_RESAMPLES bootstrap resamples, as weights: of items (N_RESAMPLES, n_items), of draws (N_RESAMPLES, n_draws)."""
    rng = np.random.default_rng(0)
    item_weights = rng.multinomial(n_items, np.full(n_items, 1 / n_items), N_RESAMPLES) / n_items
    draw_weights = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), N_RESAMPLES) / n_draws
    return item_weights, draw_weights


def accuracy_difference(ours, theirs):
    """Accuracy of ours less theirs, both (draws, templates, items) bool of the same draws and items.

    Returns its value, the middle 95 % of bootstrap resamples of draws and items, crossed, and Student's interval over
    the draws: (value, low, high, t low, t high), the last two NaN for one draw.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    n_draws, _, n_items = ours.shape
    of_draw = np.median(ours.mean(-1), -1) - np.median(theirs.mean(-1), -1)  # (draws,)
    item_weights, draw_weights = resamples(n_items, n_draws)
    # (N_RESAMPLES, draws) each
    medians = [np.median(np.einsum("bi,dti->bdt", item_weights, right), -1) for right in (ours, theirs)]
    low, high = np.quantile((draw_weights * (medians[0] - medians[1])).sum(-1), (0.025, 0.975))
    value, t_low, t_high = student(of_draw)
    return value, float(low), float(high), t_low, t_high


# --- tables and pictures ---


def markdown(head, rows):
    """A Markdown table. head: the columns' names; rows: lists of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(value, low, high, form=".2f"):
    """A value and its interval or quartiles as a table has them."""
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def count_seeds(n):
    """How tables name a number of seeds."""
    return "1 seed" if n == 1 else f"{n} seeds"


def file_hash(path):
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save_text(text, path):
    with replace_file(path, text=True) as f:
        f.write(text + "\n")
