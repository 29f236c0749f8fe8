"""What a call costs: seconds, taken in turns, and FLOPs and bytes, which are counted and need no clock."""

import math
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
from train import autocast, lm_loss

# --- clocks ---


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


def equivalence(times, others):
    """The 90 % interval of the median of times over others: the order statistics that the sign test leaves standing.

    Where it lies within a margin around 1 the two are called equivalent: two one-sided tests, each at 5 %.
    """
    ratios = sorted(t / other for t, other in zip(times, others, strict=True))
    cut = max(int((len(ratios) + 1 - 1.645 * math.sqrt(len(ratios))) / 2), 1)  # the normal's 95 % point
    return ratios[cut - 1], ratios[-cut]


def ratio(name, times, others):
    """Median and quartiles of times over others, as {name: …, name_low: …, name_high: …}.

    Repeat by repeat, so that a slow moment of the machine cancels out.
    """
    ratios = [t / other for t, other in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


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


# --- a training step, and what can be counted of it ---


def training_step(model, batch, loss_fn, config):
    """Return a call that does one step: forward, backward, AdamW, which is made here with averages of its own.

    loss_fn(model, *batch) is a mean loss; config: a TrainConfig, for its dtype.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = batch[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)

    def step():
        with autocast(model, config):
            loss = loss_fn(model, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def pace(model, split, config):
    """Seconds of one core for a training step of a language model, and for one window's forward pass.

    On a CPU in the processor's time, which other programs lengthen less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = model.lm_head.weight.device
    batch = datasets.to_device(split.batch(0, 0, config.batch_size // config.grad_accum), device)
    step = training_step(model, batch, lm_loss, config)
    step()  # the first is slower

    def read():
        with torch.no_grad(), autocast(model, config):
            model(batch[0])

    times = []
    for call in (step, read):
        if device.type == "cuda":
            times.append(statistics.mean(seconds(call, device) for _ in range(3)))
            continue
        start = time.process_time()
        for _ in range(3):
            call()
        times.append((time.process_time() - start) / 3)
    torch.set_num_threads(threads)
    return times[0] * config.grad_accum, times[1] / len(batch[0])


def count_step(model, batch, loss_fn, config):
    """What a training step costs and needs no clock: a dict of values trained, FLOPs a token, and bytes kept."""

    def loss(batch):
        with autocast(model, config):
            return loss_fn(model, *batch)

    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = batch[0].size(1)
    # of one row: FLOPs grow with the rows, and counting attention needs memory for its square
    linear, attention = count_flops(lambda: loss([t[:1] for t in batch]).backward())
    for p in model.parameters():
        p.grad = None
    saved = count_saved(lambda: loss(batch), model)
    counts = {"values": values, "linear_flops": linear // tokens, "attention_flops": attention // tokens}
    return counts | {"saved_bytes": saved}


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
    """Bytes of activations that autograd keeps for backward: each storage once, the model's own tensors left out.

    Autocast's bfloat16 copies of float32 weights are not the model's own, so they count.
    """
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # t itself knows the graph, which would keep itself alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()  # alive until all is counted, so that no storage is freed and its place taken by another
    del result
    return sum(kept.values())


def peak_bytes(step, device, before):
    """Bytes of GPU memory that a contestant takes at most in a step; None on a CPU.

    before: bytes that were allocated before the contestant was made.
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def allocated(device):
    """Bytes of GPU memory in use; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
