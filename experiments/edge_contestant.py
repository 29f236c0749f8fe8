"""A contestant of edge.py, in a process of its own: python -m experiments.edge_contestant LIBRARY FILE

It loads a model, then writes once for every line of stdin and answers with the seconds that took; to the line "end" it
answers with the peak of its memory in bytes, or null. Only the library at hand is imported, since it is counted, too.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

READ, WRITTEN = 32, 128
THREADS = 1  # llama.cpp's threads wait for each other, so two are slow where another program holds a core
PROMPT = [504 + 7 * i for i in range(READ)]  # any ids


def load_ours(path, dtype):
    import torch

    import common
    from sample import generate

    torch.set_num_threads(THREADS)
    model = common.load(path, getattr(torch, dtype))
    return lambda: generate(model, torch.tensor([PROMPT]), WRITTEN, temperature=0)


def load_transformers(path):
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    idx = torch.tensor([PROMPT])
    length = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **length)


def load_llama_cpp(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 2 * (READ + WRITTEN)
    params.n_parallel = 1
    params.cpuparams.n_threads = THREADS
    params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)
    request = {"prompt": PROMPT, "n_predict": WRITTEN, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return lambda: server.handle_completions(request)


def peak_of_process():
    """The most memory that this process has held, in bytes; None where there is no /proc.

    VmHWM counts from the program's start. getrusage's ru_maxrss does not: a child begins with its parent's.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def main(argv=None):
    library, path, *dtype = sys.argv[1:] if argv is None else argv
    load = {"nanoIA3": load_ours, "transformers": load_transformers, "llama.cpp": load_llama_cpp}[library]
    write = load(path, *dtype)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        write()
        print(json.dumps(time.perf_counter() - start), flush=True)
    print(json.dumps(peak_of_process()), flush=True)
    os._exit(0)  # at once: llama.cpp's server may wait for itself at the interpreter's end


if __name__ == "__main__":
    sys.exit(main())
