"""What a call costs: interleaved times, and what can be counted instead of timed."""

import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def seconds(call, device):
    """Wall clock of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(contestants, repeats, device, warmup=2):
    """Return {name: [seconds of each repeat]}. contestants, {name: call}, take turns, so that whatever else the machine
    does falls on all of them alike.
    """
    times = {name: [] for name in contestants}
    for repeat in range(warmup + repeats):
        for name, call in contestants.items():
            took = seconds(call, device)
            if repeat >= warmup:
                times[name].append(took)
    return times


def ratio(times, others):
    """Median and quartiles of times over others, repeat by repeat: a slow moment of the machine cancels out."""
    ratios = [t / other for t, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def count_flops(call):
    """Return the FLOPs of a call's linear maps and those of its attention (both products, by the MATH kernel: torch's
    counter has no entry for the CPU's fused one). A multiplication and its addition are two.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "bmm" in str(op))
    return sum(found.values()) - attention, attention


def count_saved(forward, model):
    """Bytes of activations that autograd keeps for backward: each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # alive until all is counted, so that no storage is freed and its place taken by another
    del result
    return sum(kept.values())


def device_name(device):
    """The processor's name and the number of threads, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        cpu = cpu.partition(": ")[2]
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {torch.get_num_threads()} threads"
