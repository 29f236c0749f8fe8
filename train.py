"""The training loop: one for (IA)³, for full fine-tuning and for pretraining; on a laptop, a GPU, or many.

    python train.py                                            # (IA)³: data/base.pt learns 1623 spelling
    python train.py --data path/to/folder --base my.pt         # your own text, your own base
    python train.py --method full --out out/full               # every weight instead
    python train.py --base scratch --data plays --steps 5000   # a new base
    torchrun --nproc-per-node 8 train.py ...                   # any of these on eight GPUs

train() optimizes whatever requires a gradient; build() makes what the flags ask for. Batches and dropout are functions
of the seed, the step and the process, so a resumed run sees what an uninterrupted one would have.
"""

import argparse
import csv
import math
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import common
import data as datasets
from ia3 import IA3, SITES, attach, fingerprint
from model import GPT, GPTConfig
from sample import complete

COLUMNS = ("step", "train_loss", "val_loss", "lr", "tokens_per_second")  # of metrics.csv; lr is the next step's


def flag(default, help, choices=None, bounds=None):
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


@dataclass
class TrainConfig:
    """What train() does. Raises ValueError for values out of bounds.

    Every field is a flag of the command line, too; there lr's default depends on the model, dtype's on the device and
    out's on the data.
    """

    steps: int = flag(200, "optimizer steps", bounds=(1, 10**9))
    lr: float = flag(0.1, "peak learning rate", bounds=(1e-12, 1000))  # for the small bundled base; 3e-3 for others
    schedule: str = flag("cosine", "the decay to zero after the warmup", choices=("cosine", "linear"))
    warmup: float = flag(0.06, "share of the steps in which the learning rate rises", bounds=(0, 1))
    batch_size: int = flag(16, "windows or examples a step, over all parts and processes", bounds=(1, 10**5))
    grad_accum: int = flag(1, "parts that a process cuts its batch into, one in memory at a time", bounds=(1, 10**5))
    weight_decay: float = flag(0.1, "AdamW's, on matrices, never on vectors of (IA)³", bounds=(0, 1000))
    grad_clip: float = flag(1.0, "largest gradient norm", bounds=(1e-12, math.inf))
    eval_interval: int = flag(20, "steps between evaluations, each of which writes a checkpoint", bounds=(1, 10**9))
    eval_windows: int = flag(64, "windows of val in an evaluation; at a run's end all is read", bounds=(1, 10**9))
    seed: int = flag(0, "draws the batches, the dropout and a new model's weights", bounds=(0, 2**63 - 1))
    dtype: str = flag("float32", "bfloat16: autocast, or a frozen base stored in it", choices=("float32", "bfloat16"))
    out: str | None = flag(None, "folder of the run")
    resume: bool = flag(False, "go on with the run in --out from its last checkpoint, if it has one")

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            bounds = f.metadata["bounds"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
            if f.type is int and type(value) is not int:
                raise ValueError(f"{f.name} must be a whole number, not {value}")
            if bounds and not bounds[0] <= value <= bounds[1]:
                raise ValueError(f"{f.name} must be from {bounds[0]} to {bounds[1]}, not {value}")
        world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        if self.batch_size < world * self.grad_accum:
            raise ValueError(f"batch_size must be at least {world} processes × grad_accum {self.grad_accum}")


def learning_rate(step, config):
    """A linear rise over the warmup, then the schedule's decay to zero."""
    warmup = int(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)  # above 0 at step 0, all of lr at step warmup
    done = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def lm_loss(model, x, y):
    """Mean cross-entropy in nats a target token."""
    return model(x, y)[1]


def train(model, data, config, loss_fn=None, should_stop=None):
    """Optimize whatever in model requires a gradient, for config.steps steps of AdamW.

    data: {'train': split, 'val': split} as data.load returns it. loss_fn(model, *batch): the mean loss over the batch's
    target tokens (default: lm_loss). should_stop(): asked before every step; true ends the run there, saved; under
    torchrun every process must answer the same. With config.out, every evaluation writes last.pt and metrics.csv there.

    Returns the history, a list of one dict per evaluation; train_loss is the mean over the steps since the one before.
    The model ends in eval mode. Seeds torch's random generator at every step. Raises FloatingPointError for a loss or a
    gradient that is not finite, and ValueError for nothing to train, for vectors on a base that is not frozen, for
    vectors in less than float32, and for a run in config.out that cannot be resumed.
    """
    if loss_fn is None:
        loss_fn = lm_loss
    check_vectors(model)
    rank, world = ranks()
    device = model.lm_head.weight.device

    # AdamW. Weight decay pulls to 0, and a vector starts at 1: only other matrices are decayed
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.dim() >= 2 and not name.startswith("ia3.")]
    others = [p for name, p in trained.items() if p.dim() < 2 or name.startswith("ia3.")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=device.type == "cuda")

    # where an earlier run of this folder was stopped
    step = 0
    history = []  # one dict per evaluation
    losses = []  # of the steps since the last evaluation
    settings = {}  # of a run that is saved: all but out and resume must be the same when it is resumed
    if config.out is not None:
        settings = asdict(config) | {"fingerprint": fingerprint(model), "data_hash": data["train"].data_hash()}
        if config.resume and os.path.exists(f"{config.out}/last.pt"):
            step, history, losses = load_run(settings, trained, optimizer)

    wrapped = DistributedDataParallel(model) if world > 1 else model
    parts = get_batch(data["train"], step, config, device)
    n_tokens = 0
    first = step  # since then, tokens and seconds are counted
    started = time.time()
    while True:
        # every eval_interval steps and at the end: the loss on val, a line, a checkpoint
        due = step % config.eval_interval == 0 or step == config.steps
        if due and step not in [row["step"] for row in history]:  # a resumed run may have it already
            seconds = max(time.time() - started, 1e-9)
            tokens_per_second = n_tokens / seconds
            train_loss = sum(losses) / len(losses) if losses else math.nan
            val_loss = evaluate(model, data["val"], config, loss_fn, config.eval_windows)
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"val loss {val_loss} at step {step}: try a smaller lr")
            row = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
            history.append(row | {"lr": learning_rate(step, config), "tokens_per_second": tokens_per_second})
            losses = []
            if rank == 0:
                line = f"step {step:5d}/{config.steps}  val {val_loss:.4f}"
                if step > 0:
                    left = round((config.steps - step) * seconds / max(step - first, 1))
                    line += f"  loss {train_loss:.4f}  {tokens_per_second:,.0f} tokens/s"
                    line += f"  {left // 60}:{left % 60:02} left"
                print(line, flush=True)
                save_run(step, history, losses, settings, trained, optimizer)
            n_tokens = 0
            first = step
            started = time.time()
        if step == config.steps:
            return history
        if should_stop is not None and should_stop():
            if rank == 0:
                save_run(step, history, losses, settings, trained, optimizer)
            return history

        # forward and backward, one part of the batch in memory at a time
        model.train()
        optimizer.zero_grad(set_to_none=True)
        dice = np.random.default_rng((config.seed, step, rank))
        torch.manual_seed(int(dice.integers(2**63)))  # for dropout
        loss = torch.zeros((), device=device)
        for i, (part, share) in enumerate(parts):
            if world > 1:
                wrapped.require_backward_grad_sync = i == len(parts) - 1  # DDP reduces once a step
            with autocast(model, config):
                part_loss = loss_fn(wrapped, *part) * share
            (part_loss * world).backward()  # DDP takes the mean over processes, but the shares sum to one already
            loss += part_loss.detach()
            n_tokens += part[0].numel() * world
        if world > 1:
            dist.all_reduce(loss)

        # clip the gradient
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)

        # the next batch, while a GPU is still busy with this one
        parts = get_batch(data["train"], step + 1, config, device)

        # the step
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(f"loss {loss:g}, gradient {norm:g} at step {step}: try a smaller lr")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        losses.append(loss.item())
        step += 1


def check_vectors(model):
    """Raise ValueError if nothing is trained, if a base is trained beside its vectors, or these in below float32."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing in this model requires a gradient: ia3.attach gives it vectors to train")
    if model.ia3 is None:
        return
    if any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("ia3.")):
        raise ValueError("these vectors stand on a base that is not frozen: ia3.attach(model, vectors) freezes it")
    for name, p in model.ia3.matrices().items():
        if torch.finfo(p.dtype).bits < 32:
            raise ValueError(f"{name} is {p.dtype}, too coarse to train: cast the base first, then ia3.attach")


def ranks():
    """Return this process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def get_batch(split, step, config, device):
    """This process's rows of a step's global batch, in grad_accum parts.

    Returns [(the part's tensors on device, its share of the batch's targets)]; over all processes shares sum to one.
    """
    rank, world = ranks()
    batch = split.batch(config.seed, step, config.batch_size)
    n_targets = (batch[1] >= 0).sum().item()
    rows = torch.arange(config.batch_size)[rank::world]  # this process's
    parts = []
    for part_rows in rows.tensor_split(config.grad_accum):
        part = [t[part_rows] for t in batch]
        share = (part[1] >= 0).sum().item() / n_targets
        parts.append((datasets.to_device(part, device), share))
    return parts


def autocast(model, config):
    """bfloat16 autocast for weights that are kept in float32; a base stored in bfloat16 needs none."""
    weight = model.lm_head.weight
    on = config.dtype == "bfloat16" and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on)


@torch.no_grad()
def evaluate(model, split, config, loss_fn=lm_loss, n_windows=None):
    """Mean loss in nats a target token, over n_windows evenly spaced windows of split or over all, without overlap."""
    rank, world = ranks()
    ids = datasets.evenly_spaced(split, n_windows or len(split))[rank::world]
    total = torch.zeros(2, dtype=torch.float64)  # nats, target tokens
    model.eval()  # and left so: without dropout
    for i in range(0, len(ids), config.batch_size):
        batch = split.windows(ids[i : i + config.batch_size])
        n_targets = (batch[1] >= 0).sum().item()
        with autocast(model, config):
            loss = loss_fn(model, *datasets.to_device(batch, model.lm_head.weight.device))
        total += torch.tensor([loss.item() * n_targets, n_targets], dtype=torch.float64)
    if world > 1:
        total = total.to(model.lm_head.weight.device)  # NCCL sums on GPUs only
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def save_run(step, history, losses, settings, trained, optimizer):
    """Write last.pt, all that a resumed run needs, and metrics.csv, the history; nothing for a run without a folder."""
    if not settings:
        return
    state = {"step": step, "history": history, "losses": losses, "settings": settings}
    state |= {"trained": trained, "optimizer": optimizer.state_dict()}
    with common.replace_file(f"{settings['out']}/last.pt") as f:
        torch.save(state, f)
    write_metrics(history, settings["out"])


def write_metrics(history, out):
    with common.replace_file(f"{out}/metrics.csv", text=True) as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(history)


def load_run(settings, trained, optimizer):
    """Put back the run in settings["out"], and write its metrics.csv anew. Returns step, history, losses.

    Raises ValueError where last.pt is damaged, or another run's: another config, base, data, or other weights.
    """
    path = f"{settings['out']}/last.pt"
    state = common.load_file(path)
    try:
        for name, value in state["settings"].items():
            if name not in ("resume", "out") and value != settings[name]:
                raise ValueError(f"it is another run's: its {name} is {value}, not {settings[name]}")
        if state["trained"].keys() != trained.keys():
            raise ValueError(f"it trained {', '.join(state['trained'])}, not {', '.join(trained)}")
        for name, p in trained.items():
            p.data.copy_(common.check_weight(state["trained"][name], name, p.shape))
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        history = [{name: row[name] for name in COLUMNS} for row in state["history"]]
        losses = [float(loss) for loss in state["losses"]]
        if type(step) is not int or not 0 <= step <= settings["steps"] or not history:
            raise ValueError(f"its step is {step}, of {settings['steps']}, after {len(history)} evaluations")
        if ranks()[0] == 0:
            write_metrics(history, settings["out"])  # a kill may have come before the last row was written
        return step, history, losses
    except Exception as e:  # a damaged or older file may lack anything
        why = e if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
        raise ValueError(f"{path} cannot be resumed: {why}; remove the folder to start anew") from None


# --- the command line ---


def default_lr(model):
    """The peak learning rate of vectors: the paper's, or what the small bundled base wants."""
    small = isinstance(model, GPT) and sum(p.numel() for p in model.parameters()) < 10**7
    return 0.1 if small else 0.003


def build(args):
    """Return the model and the data that the flags ask for; fills in what they leave to the model and the machine."""
    device, args.dtype = common.pick_device(args.device, args.dtype or "auto")
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd") if getattr(args, name) is not None}
    if args.base == "scratch":
        args.method = "full"
        torch.manual_seed(args.seed)
        vocab_size = datasets.N_IDS[args.tokenizer or "bytes"]
        defaults = {"n_layer": 6, "n_head": 6, "n_embd": 192}
        model = GPT(GPTConfig(args.block_size or 128, vocab_size, **(defaults | sizes)))
        model.tokenizer = datasets.Tokenizer(args.tokenizer or "bytes", vocab_size)
    elif sizes or args.tokenizer:
        raise ValueError(f"--{next(iter(sizes), 'tokenizer')} goes with --base scratch: {args.base} has its own")
    else:
        model = common.load(args.base)
    if args.block_size is None:
        args.block_size = min(model.config.block_size, 256)
    if not 1 <= args.block_size <= model.config.block_size:
        raise ValueError(f"block_size must be from 1 to the model's {model.config.block_size}, not {args.block_size}")
    data = datasets.load(args.data, model.tokenizer, model.config.vocab_size, args.block_size)
    if args.lr is None:
        args.lr = 0.001 if args.method == "full" else default_lr(model)
    if args.method == "full":
        if args.ia3 is not None or args.sites is not None:
            raise ValueError("--ia3 and --sites go with --method ia3: full trains the weights")
        return model.to(device), data  # float32 weights, under autocast where dtype is bfloat16
    if args.ia3 is not None:
        if args.sites is not None:
            raise ValueError("--sites goes without --ia3: the file has its own")
        vectors = IA3.load(args.ia3, model)
    else:
        vectors = IA3(model.config, SITES if args.sites is None else args.sites.split(","))
    model.to(device, getattr(torch, args.dtype))  # frozen, so it is stored in the dtype in which it computes
    attach(model, vectors)  # float32
    return model, data


def parse(argv):
    """Return the command line's flags: those below, and every field of TrainConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="data/base.pt", help="a checkpoint, or 'scratch' for a new GPT (default: %(default)s)")
    add("--data", default="folio", help="plays, folio, sonnets, kjv, or a folder of your own (default: %(default)s)")
    add("--method", default="ia3", choices=("ia3", "full"), help="the vectors, or every weight; scratch: always full")
    add("--ia3", metavar="NPZ", help="vectors to start from, instead of ones")
    add("--sites", help="what gets a vector (default: k,v,ff; with --ia3 the file's own)")
    add("--block-size", type=int, help="training window in tokens (default: the model's, at most 256; scratch: 128)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--n-layer", type=int, help="scratch: layers (default: 6)")
    add("--n-head", type=int, help="scratch: heads (default: 6)")
    add("--n-embd", type=int, help="scratch: width (default: 192)")
    add("--tokenizer", choices=("bytes", "gpt2"), help="scratch: what a token is (default: bytes)")
    told = {  # the defaults that depend on the model and the machine
        "lr": "0.003 for vectors, 0.1 on a GPT below 10 million weights; 0.001 for all weights",
        "dtype": "bfloat16 where CUDA has it, else float32",
        "out": "out/ and the data's name",
    }
    for f in fields(TrainConfig):
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            add(name, action="store_true", help=f.metadata["help"])
        else:
            default = None if f.name in told else f.default
            help = f"{f.metadata['help']} (default: {told.get(f.name, f.default)})"
            kind = f.type if f.type in (int, float) else str
            add(name, type=kind, default=default, choices=f.metadata["choices"], help=help)
    return parser.parse_args(argv)


def prepare_folder(args):
    """Settle on args.out. Raises ValueError where a run is there already, or where we would write over an input."""
    if args.out is None:
        args.out = f"out/{os.path.basename(os.path.abspath(args.data))}"
    if os.path.basename(os.path.normpath(args.out)) in ("", ".", ".."):
        raise ValueError(f"--out {args.out!r} names no folder of its own")
    names = ("last.pt", "metrics.csv", "ia3.npz", "ckpt.pt")
    there = [name for name in names if os.path.exists(f"{args.out}/{name}")]
    if there and not (args.resume and "last.pt" in there):
        raise ValueError(f"{args.out} holds a run: --resume goes on from its last.pt; else remove it or name another")
    inputs = [args.base, *datasets.find(args.data).values()]
    if args.ia3 is not None:
        inputs.append(args.ia3)
    for name in names:
        common.check_output(f"{args.out}/{name}", inputs)


def run(argv):
    """One run: from flags to a folder of files."""
    args = parse(argv)
    prepare_folder(args)
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ValueError("--compile wants a C++ compiler: g++, or the one that CXX names")
    model, data = build(args)
    if "RANK" in os.environ:  # torchrun's
        device = model.lm_head.weight.device
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    rank, world = ranks()
    if rank == 0:
        n = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{n:,} values learn {args.data} on {args.base} ({model.lm_head.weight.device}, {args.dtype})")
    if args.compile:
        model.compile()

    # Ctrl-C lets the step finish, so that what is saved is whole; a second one stops at once
    stop = threading.Event()
    handler = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        stop.set()
        signal.signal(signal.SIGINT, handler)

    prompt = data["val"].prompt(64)
    before = complete(model, prompt, temperature=0.5)
    if world == 1:
        signal.signal(signal.SIGINT, on_interrupt)
    try:
        history = train(model, data, config, should_stop=stop.is_set)
    finally:
        signal.signal(signal.SIGINT, handler)
    if history[-1]["step"] < config.steps:  # stopped before the last evaluation
        raise KeyboardInterrupt

    loss = evaluate(model, data["val"], config)
    after = complete(model, prompt, temperature=0.5)
    if rank == 0:
        report(args, model, data["val"], loss, before, after)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def report(args, model, val, loss, before, after):
    """Save what was trained, show the texts before and after, and say what to do next."""
    if args.method == "ia3":
        made = f"{args.out}/ia3.npz"
        model.ia3.save(made)
    else:
        made = f"{args.out}/ckpt.pt"
        common.save(model, made)
    bits = ""
    if val.n_bytes:
        bits = f", {loss * val.n_tokens / val.n_bytes / math.log(2):.4f} bits a byte"
    print(f"\nbefore:\n{before[0]}\n\nafter:\n{after[0]}\n")
    print(f"val, all of it: {loss:.4f} nats a token{bits}")
    print(f"next: python -m tools.plot {args.out}")
    if args.method == "ia3":
        if model.tokenizer is not None:
            print(f"      python sample.py --base {args.base} --ia3 {made}")
        print(f"      python merge.py --base {args.base} --ia3 {made} --data {args.data} --out {args.out}/merged.pt")


def main(argv=None):
    stopped = "stopped; --resume goes on from the last checkpoint"
    return common.exit_status("train.py", run, argv, stopped)


if __name__ == "__main__":
    sys.exit(main())
