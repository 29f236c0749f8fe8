"""How fast SmolLM2 writes where it is used: nanoIA3 and transformers beside llama.cpp on files of several formats.

    python -m tools.convert smollm2 && python -m pip install -r requirements-edge.txt
    python -m experiments.edge --out experiments/results/edge     # minutes, on a quiet machine

One row, one thread: 32 tokens are read and 128 written, greedily. Every contestant is a process of its own, so that
its peak memory is its own, too: Python, the library and the weights. They take turns, and a ratio is taken round by
round. llama.cpp's Q4_1 is the published file; merged is the same with vectors folded in (tools/convert.py's to-gguf);
Q8_0 and F16 are made of it here. The other two read the same weights, in float32: bfloat16 is left out, since a
processor that does not multiply it took four minutes for one turn.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import gguf
import torch

import common
from experiments import clocks, lab
from experiments.edge_contestant import READ, THREADS, WRITTEN
from ia3 import IA3
from tools.convert import to_hf
from tools.gguf_llama import from_gguf, to_gguf

THEIRS = "transformers, float32"
BASE = "llama.cpp, Q4_1"
MERGED = "llama.cpp, Q4_1 merged"
CONTESTANTS = {  # name: edge_contestant's arguments, a file of a prepared folder among them
    THEIRS: ("transformers", "hf"),
    "nanoIA3, float32": ("nanoIA3", "base.pt", "float32"),
    "llama.cpp, F16": ("llama.cpp", "F16.gguf"),
    "llama.cpp, Q8_0": ("llama.cpp", "Q8_0.gguf"),
    BASE: ("llama.cpp", "Q4_1.gguf"),
    MERGED: ("llama.cpp", "merged.gguf"),
}


@dataclass
class Row:
    """A line of results.csv: a contestant, and what it shares with the others."""

    contestant: str
    seconds: float
    over_theirs: float  # the median of the time over transformers', with quartiles
    over_theirs_low: float
    over_theirs_high: float
    over_base: float  # the same over the base file's in llama.cpp
    over_base_low: float
    over_base_high: float
    peak_bytes: int | None
    load: float  # processes that were running, on average
    rounds: int
    hardware: str
    date: str
    versions: str


# --- the contest ---


def rewrite(source, kind, path):
    """Write the GGUF file source with every quantized matrix in another type, by the gguf package's own code."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        of = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(source, vectors, folder):
    """Make every contestant's file in folder, where it is not there yet. ValueError where it is of other inputs."""
    lab.open_folder(folder, {"gguf": lab.file_hash(source), "ia3": lab.file_hash(vectors)})
    if (folder / "merged.gguf").exists():
        return
    model = from_gguf(source)
    common.save(model, folder / "base.pt")
    to_hf(model, folder / "hf")
    shutil.copyfile(source, folder / "Q4_1.gguf")
    for kind in ("F16", "Q8_0"):
        rewrite(source, kind, folder / f"{kind}.gguf")
    to_gguf(source, IA3.load(vectors, model), folder / "merged.gguf")  # last: all are there


def measure(folder, rounds):
    """Return {contestant: seconds of each round} and {contestant: peak bytes}."""
    processes = {}
    for name, (library, file, *dtype) in CONTESTANTS.items():
        command = [sys.executable, "-m", "experiments.edge_contestant", library, str(folder / file), *dtype]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes[name] = subprocess.Popen(command, text=True, **pipes)

    def ask(name, line):
        processes[name].stdin.write(f"{line}\n")
        processes[name].stdin.flush()
        answer = processes[name].stdout.readline()
        if not answer:
            raise OSError(f"the process of {name} has ended: is its package installed?")
        return json.loads(answer)

    try:
        times = {name: [] for name in CONTESTANTS}
        for turn in range(1 + rounds):
            for name in CONTESTANTS:
                took = ask(name, "go")
                print(f"round {turn} of {rounds}: {name} {took:.2f} s", flush=True)
                if turn > 0:  # the first is a warm-up
                    times[name].append(took)
        return times, {name: ask(name, "end") for name in CONTESTANTS}
    finally:
        for process in processes.values():
            process.kill()


def rows_of(times, peaks, shared):
    """The Rows of measure's two dicts. shared: a Row's last fields, a dict from load on."""
    rows = []
    for name, took in times.items():
        ratios = clocks.ratio("over_theirs", took, times[THEIRS]) | clocks.ratio("over_base", took, times[BASE])
        rows.append(Row(name, statistics.median(took), peak_bytes=peaks[name], **ratios, **shared))
    return rows


# --- the table ---


def read_rows(folder):
    """Return {contestant: its Row}. Raises ValueError where the table would lack a row or divide by a time of 0."""
    path = folder / "results.csv"
    rows = {row.contestant: row for row in lab.read_rows(path, Row)}
    for name in (THEIRS, MERGED):
        if name not in rows:
            raise ValueError(f"{path} lacks {name}: remove it to measure again")
    for row in rows.values():
        times = [row.seconds, row.over_theirs, row.over_theirs_low, row.over_theirs_high]
        times += [row.over_base, row.over_base_low, row.over_base_high]
        if not all(time > 0 for time in times):  # NaN is not, either
            raise ValueError(f"{path} has a time of {row.contestant} that is not above 0: remove it to measure again")
    return rows


def tables(folder):
    """Return Markdown, made of results.csv in folder alone."""
    rows = read_rows(folder)
    theirs = rows[THEIRS]
    about = f"{theirs.hardware}, {THREADS} thread, {theirs.versions}, {theirs.date}; one row, {READ} tokens read"
    about += f" and {WRITTEN} written; medians (quartiles) of {theirs.rounds} rounds. Other programs ran too:"
    about += f" over the last minutes, {theirs.load:.1f} processes on average."
    head = ["contestant", "tokens a second", "speed over transformers'", "peak memory, MB", "of transformers'"]
    lines = []
    for row in rows.values():
        speed = lab.spread(1 / row.over_theirs, 1 / row.over_theirs_high, 1 / row.over_theirs_low)
        memory = ["", ""]
        if row.peak_bytes and theirs.peak_bytes:
            memory = [f"{row.peak_bytes / 1e6:.0f}", f"{row.peak_bytes / theirs.peak_bytes:.2f}"]
        lines.append([row.contestant, f"{WRITTEN / row.seconds:.1f}", speed, *memory])
    merged = rows[MERGED]
    ratio = lab.spread(1 / merged.over_base, 1 / merged.over_base_high, 1 / merged.over_base_low)
    return f"{about}\n\n{lab.markdown(head, lines)}\n\nMerged over the base file, tokens a second: {ratio}."


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=Path("data/smollm2.gguf"), help="(default: %(default)s)")
    vectors = Path("experiments/results/serving/movies.npz")
    parser.add_argument("--ia3", type=Path, default=vectors, help="vectors to merge (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, 2 or more (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("out/edge"), help="of the files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/edge"), help="of the results (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="make the table again, and run nothing")
    args = parser.parse_args(argv)
    if not args.tables:
        if args.rounds < 2:
            raise ValueError(f"rounds must be 2 or more, not {args.rounds}")
        prepare(args.gguf, args.ia3, args.folder)
        times, peaks = measure(args.folder, args.rounds)
        shared = {"load": os.getloadavg()[1], "rounds": args.rounds}
        shared["hardware"] = clocks.device_name(torch.device("cpu")).partition(",")[0]
        shared["date"] = datetime.date.today().isoformat()
        shared["versions"] = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "xllamacpp"))
        lab.write_csv(args.out / "results.csv", [vars(row) for row in rows_of(times, peaks, shared)])
    text = tables(args.out)
    lab.save_text(text, args.out / "table.md")
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("edge.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
