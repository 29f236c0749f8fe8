"""The training loop: one for (IA)³, for full fine-tuning and for pretraining, on a laptop or on GPUs.

    python train.py                                            # (IA)³: data/base.pt learns 1623 spelling
    python train.py --data path/to/folder --base my.pt         # your own text, your own base
    python train.py --method full --out out/full               # every weight instead
    python train.py --base scratch --data plays --steps 5000   # a new base
    torchrun --nproc-per-node 8 train.py ...                   # any of these on eight GPUs

train() optimizes whatever requires a gradient; build() makes what the flags ask for. Batches and dropout are functions
of the seed, the step and the process, so a resumed run sees what an uninterrupted one would have seen.
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist

import common
import data as datasets
import disk
from data.tokenizer import N_IDS, Tokenizer
from ia3 import IA3, SITES, attach, unwrap
from model import GPT, GPTConfig
from run_folder import RunFolder, write_run_json
from sample import complete


@dataclass
class TrainConfig:
    """What train() does. Raises ValueError for values out of bounds."""

    lr: float  # the peak; it has no default here, because it depends on the model (default_lr)
    steps: int = 200
    schedule: str = "cosine"  # or "linear": the decay to zero after the warmup
    warmup: float = 0.06  # share of the steps in which the learning rate rises
    batch_size: int = 16  # windows or examples per step, over all parts and processes
    grad_accum: int = 1  # parts that a process cuts its batch into, one in memory at a time
    weight_decay: float = 0.1  # AdamW's, on matrices of weights, never on vectors of (IA)³
    grad_clip: float = 1.0  # the largest gradient norm
    eval_interval: int = 20  # steps between evaluations, each of which writes a checkpoint
    eval_windows: int = 64  # windows of val in an evaluation
    seed: int = 0  # draws the batches and the dropout
    dtype: str = "float32"  # or "bfloat16": autocast, where the weights are float32
    out: str | None = None  # the folder of the run; None keeps nothing
    resume: bool = False  # continue the run in out from its last checkpoint, if it has one

    def __post_init__(self):
        whole = {
            "steps": (1, 10**9),
            "batch_size": (1, 10**5),
            "grad_accum": (1, 10**5),
            "eval_interval": (1, 10**9),
            "eval_windows": (1, 10**9),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in whole.items():
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{flag(name)} must be a whole number, not {getattr(self, name)}")
            check_bounds(name, getattr(self, name), low, high)
        check_bounds("lr", self.lr, 1e-12, 1000)
        check_bounds("warmup", self.warmup, 0, 1)
        check_bounds("weight_decay", self.weight_decay, 0, 1000)
        check_bounds("grad_clip", self.grad_clip, 1e-12, math.inf)
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"--schedule must be cosine or linear, not {self.schedule}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, not {self.dtype}")
        world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        if self.batch_size < world * self.grad_accum:
            raise ValueError(f"--batch-size must be at least {world} processes × --grad-accum {self.grad_accum}")


def flag(name):
    """A setting's name as it is typed: '--batch-size'."""
    return "--" + name.replace("_", "-")


def check_bounds(name, value, low, high):
    if not low <= value <= high:
        raise ValueError(f"{flag(name)} must be from {low} to {high}, not {value}")


# --- the loop ---


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
    """Mean cross-entropy in nats per target."""
    return model(x, y)[1]


def train(model, data, config, loss_fn=lm_loss, should_stop=None):
    """Optimize whatever in model requires a gradient, for config.steps steps of AdamW.

    data: {'train': split, 'val': split} as data.load returns it: a batch is inputs, targets (-1 for none), and whatever
    else the split adds. loss_fn(model, *batch): the mean loss over the batch's targets; any other mean is only
    approximated where a batch is read in parts or by several processes. should_stop(): called before every step; if it
    returns True, the run ends there. Under torchrun every process must give the same answer. With config.out, every
    evaluation and such an end write last.pt and metrics.csv there.

    Returns the history, a list of one dict per evaluation; train_loss is the mean over the steps since the one before.
    The model ends in eval mode. Seeds torch's random generator at every step. Raises FloatingPointError for a loss or a
    gradient that is not finite. Raises ValueError if there is nothing to train, if vectors stand on a base that is not
    frozen or are coarser than float32, and if config.out holds a run, unless config.resume continues it.
    """
    check_trained(model)
    rank, world = ranks()
    device = model.lm_head.weight.device

    # AdamW. Weight decay pulls towards 0, and a vector starts at 1: only matrices of weights are decayed
    trained = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.dim() >= 2 and not name.startswith("ia3.")]
    others = [p for name, p in trained.items() if p.dim() < 2 or name.startswith("ia3.")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=device.type == "cuda")

    # a new run, or where an earlier one stopped
    step = 0
    history = []  # one dict per evaluation
    losses = []  # of the steps since the last evaluation
    folder = None
    if config.out is not None:
        folder = RunFolder(config, model, data, trained, optimizer)
        if folder.holds_a_run():
            step, history, losses = folder.load()
            if rank == 0:
                folder.write_metrics(history)  # a kill may have come before the last row was written

    parts = get_batch(data["train"], step, config, device)
    started = time.time()
    n_steps = n_tokens = 0  # since then
    while True:
        # every eval_interval steps and at the end: the loss on val, a line, a checkpoint
        due = step % config.eval_interval == 0 or step == config.steps
        is_new = not history or history[-1]["step"] < step  # a run resumed at an evaluation has its row
        if due and is_new:
            seconds = max(time.time() - started, 1e-9)
            train_loss = sum(losses) / len(losses) if losses else math.nan
            val_loss = evaluate(model, data["val"], config, loss_fn, config.eval_windows)
            if not math.isfinite(val_loss):
                raise FloatingPointError(f"val loss {val_loss} at step {step}: try a smaller --lr")
            row = {
                "step": step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "lr": learning_rate(step, config),  # of the next step
                "tokens_per_second": n_tokens / seconds,
            }
            history.append(row)
            losses = []
            if rank == 0:
                print(progress(row, config.steps, n_steps / seconds), flush=True)
                if folder is not None:
                    folder.save(step, history, losses)
            started = time.time()
            n_steps = n_tokens = 0
        if step == config.steps:
            break
        if should_stop is not None and should_stop():
            if rank == 0 and folder is not None:
                folder.save(step, history, losses)
            break

        # forward and backward, one part of the batch in memory at a time
        model.train()
        optimizer.zero_grad(set_to_none=True)
        rng = np.random.default_rng((config.seed, step, rank))
        torch.manual_seed(int(rng.integers(2**63)))  # for dropout
        loss = torch.zeros((), device=device)
        for part, share in parts:
            with autocast(model, config):
                part_loss = loss_fn(model, *part) * share  # the sum over all parts and processes is the batch's mean
            part_loss.backward()
            loss += part_loss.detach()
            n_tokens += part[0].numel() * world  # with padding; every process has about as many

        # with several processes: the sums over all of them
        if world > 1:
            for t in [loss, *[p.grad for p in trained.values()]]:
                dist.all_reduce(t)

        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)

        # fetch the next batch, while a GPU is still busy with this one
        parts = get_batch(data["train"], step + 1, config, device)

        # the step; .item() waits for a GPU, so only now look whether loss and gradient are finite
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(f"loss {loss:g}, gradient {norm:g} at step {step}: try a smaller --lr")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        losses.append(loss.item())
        n_steps += 1
        step += 1

    model.eval()
    return history


def check_trained(model):
    """Raise ValueError if nothing is trained, if a base is trained beside its vectors, or if these are too coarse."""
    model = unwrap(model)
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
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def get_batch(split, step, config, device):
    """This process's rows of a step's batch, in config.grad_accum parts.

    Returns [(the part's tensors on device, its share of the whole batch's targets)]. A part's mean loss times its
    share, summed over all parts and processes, is the whole batch's mean loss.
    """
    rank, world = ranks()
    batch = split.batch(config.seed, step, config.batch_size)  # the whole one in every process
    n_targets = count_targets(batch)
    own_rows = torch.arange(config.batch_size)[rank::world]
    parts = []
    for rows in own_rows.tensor_split(config.grad_accum):
        part = [t[rows] for t in batch]
        parts.append((datasets.to_device(part, device), count_targets(part) / n_targets))
    return parts


def count_targets(batch):
    return (batch[1] >= 0).sum().item()


def autocast(model, config):
    """bfloat16 autocast for weights that are kept in float32; a base stored in bfloat16 needs none."""
    weight = model.lm_head.weight
    on = config.dtype == "bfloat16" and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on)


@torch.no_grad()
def evaluate(model, split, config, loss_fn=lm_loss, n_windows=None):
    """Mean loss in nats per target, over n_windows evenly spaced windows of split, or over all. Leaves eval mode on."""
    rank, world = ranks()
    ids = datasets.evenly_spaced(split, n_windows or len(split))[rank::world]
    total = torch.zeros(2, dtype=torch.float64)  # nats, targets
    model.eval()  # no dropout
    for i in range(0, len(ids), config.batch_size):
        batch = split.windows(ids[i : i + config.batch_size])
        n_targets = count_targets(batch)
        with autocast(model, config):
            loss = loss_fn(model, *datasets.to_device(batch, model.lm_head.weight.device))
        total += torch.tensor([loss.item() * n_targets, n_targets], dtype=torch.float64)
    if world > 1:
        total = total.to(model.lm_head.weight.device)  # NCCL sums on GPUs only
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def progress(row, steps, steps_per_second):
    """The line that an evaluation prints."""
    line = f"step {row['step']:5d}/{steps}  val {row['val_loss']:.4f}"
    if steps_per_second > 0:
        left = round((steps - row["step"]) / steps_per_second)
        line += f"  loss {row['train_loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        line += f"  {left // 60}:{left % 60:02} left"
    return line


# --- the command line ---


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # the defaults stand once, in TrainConfig, and %(default)s shows them; build() settles lr and dtype
    defaults = {f.name: f.default for f in fields(TrainConfig)} | {"lr": None, "dtype": "auto"}
    parser.set_defaults(**defaults)

    add = parser.add_argument_group("what learns what").add_argument
    add("--base", default="data/base.pt", help="a checkpoint, or 'scratch' for a new GPT (default: %(default)s)")
    add("--data", default="folio", help="plays, folio, sonnets, kjv, or a folder of your own (default: %(default)s)")
    add("--method", default="ia3", choices=("ia3", "full"), help="the vectors, or every weight; scratch: always full")
    add("--ia3", metavar="NPZ", help="vectors to start from, instead of ones")
    add("--sites", help="what gets a vector (default: k,v,ff; with --ia3 the file's own)")
    add("--out", help="folder of the run (default: out/ and the data's name)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint, if it has one")

    add = parser.add_argument_group("AdamW").add_argument
    add("--lr", type=float, help="peak (default: vectors 0.003, on a GPT below 10 M weights 0.1; all weights 0.001)")
    add("--steps", type=int, help="how many (default: %(default)s)")
    add("--schedule", choices=("cosine", "linear"), help="decay to zero (default: %(default)s)")
    add("--warmup", type=float, help="share of the steps in which the rate rises (default: %(default)s)")
    add("--weight-decay", type=float, help="on weights, never on vectors (default: %(default)s)")
    add("--grad-clip", type=float, help="largest gradient norm (default: %(default)s)")

    add = parser.add_argument_group("batches and evaluations").add_argument
    add("--batch-size", type=int, help="windows or examples per step (default: %(default)s)")
    add("--grad-accum", type=int, help="parts of a batch, one in memory at a time (default: %(default)s)")
    add("--block-size", type=int, help="of a window, in tokens (default: the model's, at most 256; scratch: 128)")
    add("--eval-interval", type=int, help="steps from one to the next (default: %(default)s)")
    add("--eval-windows", type=int, help="windows of val in each; all at the end (default: %(default)s)")
    add("--seed", type=int, help="of batches, dropout and a new model's weights (default: %(default)s)")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of a frozen base or autocast (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on a GPU)")

    add = parser.add_argument_group("a new GPT, --base scratch").add_argument
    add("--n-layer", type=int, help="layers (default: 6)")
    add("--n-head", type=int, help="heads (default: 6)")
    add("--n-embd", type=int, help="width (default: 192)")
    add("--tokenizer", choices=("bytes", "gpt2"), help="what a token is (default: bytes)")
    args = parser.parse_args(argv)
    if args.base == "scratch":
        args.method = "full"
    return args


def default_lr(model):
    """The peak learning rate: of vectors the paper's, or what the small bundled base needs; of all weights 0.001."""
    if model.lm_head.weight.requires_grad:
        return 0.001
    small = isinstance(model, GPT) and sum(p.numel() for p in model.parameters()) < 10**7
    return 0.1 if small else 0.003


def new_model(args):
    """A GPT with random weights, of the sizes that the flags give."""
    sizes = {"block_size": 128, "n_layer": 6, "n_head": 6, "n_embd": 192}
    for name in sizes:
        if getattr(args, name) is not None:
            sizes[name] = getattr(args, name)
            check_bounds(name, sizes[name], 1, 10**5)
    if 12 * sizes["n_layer"] * sizes["n_embd"] ** 2 > 10**10:  # 40 GB: refused before memory is filled
        raise ValueError("--n-layer and --n-embd make more than 10 billion weights: convert a published base instead")
    torch.manual_seed(args.seed)
    tokenizer = args.tokenizer or "bytes"
    vocab_size = N_IDS[tokenizer]
    model = GPT(GPTConfig(vocab_size=vocab_size, **sizes))
    model.tokenizer = Tokenizer(tokenizer, vocab_size)
    return model


def check_flags(args):
    """Raise ValueError for flags that do not go together."""
    if args.base != "scratch":
        for name in ("n_layer", "n_head", "n_embd", "tokenizer"):
            if getattr(args, name) is not None:
                raise ValueError(f"{flag(name)} goes with --base scratch: {args.base} has its own")
    if args.method == "full" and (args.ia3 is not None or args.sites is not None):
        raise ValueError("--ia3 and --sites go with --method ia3: full trains the weights")
    if args.ia3 is not None and args.sites is not None:
        raise ValueError("--sites goes without --ia3: the file has its own")
    check_bounds("seed", args.seed, 0, 2**63 - 1)


def make_vectors(args, model):
    """The vectors of --ia3, or ones at --sites."""
    if args.ia3 is not None:
        return IA3.load(args.ia3, model)
    return IA3(model.config, SITES if args.sites is None else args.sites.split(","))


def build(args):
    """Return the model and the data that the flags ask for, and set those flags that depend on the model or machine."""
    model = new_model(args) if args.base == "scratch" else common.load(args.base, dtype=None)
    if args.block_size is None:
        args.block_size = min(model.config.block_size, 256)
    check_bounds("block_size", args.block_size, 1, model.config.block_size)
    data = datasets.load(args.data, model.tokenizer, model.config.vocab_size, args.block_size)

    device = common.pick_device(args.device)
    if args.dtype == "auto":
        args.dtype = common.pick_dtype(device, None if args.method == "full" else model)
    if args.method == "full":
        model.to(device, torch.float32)  # under autocast if --dtype is bfloat16
    else:
        vectors = make_vectors(args, model)
        model.to(device, getattr(torch, args.dtype))  # frozen, so it is stored in the dtype it computes in
        attach(model, vectors)  # float32
        args.sites = ",".join(name.removeprefix("l_") for name in vectors.matrices())
    args.device = str(device)
    if args.lr is None:
        args.lr = default_lr(model)
    return model, data


def prepare_folder(args):
    """Settle on args.out. Raises ValueError if it holds a run that is not to be resumed, or an input of this one."""
    if args.out is None:
        args.out = f"out/{os.path.basename(os.path.abspath(args.data))}"
    if os.path.basename(os.path.normpath(args.out)) in ("", ".", ".."):
        raise ValueError(f"--out {args.out!r} does not name a folder of its own")
    names = ("last.pt", "metrics.csv", "ia3.npz", "ckpt.pt", "run.json")
    # RunFolder refuses last.pt, too; this comes before the base is loaded, and covers what report() writes
    there = [name for name in names if os.path.exists(f"{args.out}/{name}")]
    can_resume = "last.pt" in there
    if there and not (args.resume and can_resume):
        way = "--resume continues it; otherwise " if can_resume else ""
        raise ValueError(f"{args.out} holds a run: {way}remove it or choose another --out")
    inputs = [args.base, *datasets.find(args.data).values()]
    if args.ia3 is not None:
        inputs.append(args.ia3)
    for name in names:
        disk.check_output(f"{args.out}/{name}", inputs)


def compile_model(args, model):
    """torch.compile the model if --compile says so, by default on a GPU. It needs a C++ compiler."""
    on_gpu = model.lm_head.weight.device.type == "cuda"
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    if args.compile and not has_compiler:
        raise ValueError("--compile needs a C++ compiler: g++, or the one that CXX names")
    if args.compile or (args.compile is None and on_gpu and has_compiler):
        model.compile()
    elif args.compile is None and on_gpu:
        print("there is no C++ compiler here, so a step is slower than it could be", file=sys.stderr)


def train_until_interrupted(model, data, config):
    """train(), but Ctrl-C lets the step finish, so that what is saved is whole. A second one stops at once."""
    _, world = ranks()
    if world > 1:  # each process would stop at a step of its own
        return train(model, data, config)
    stop = threading.Event()
    usual = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        return train(model, data, config, should_stop=stop.is_set)
    finally:
        signal.signal(signal.SIGINT, usual)


def run(argv):
    """One run: from flags to a folder of files."""
    args = parse(argv)
    check_flags(args)
    prepare_folder(args)
    model, data = build(args)
    if "RANK" in os.environ:  # torchrun's
        device = model.lm_head.weight.device
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu)
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    rank, _ = ranks()
    if rank == 0:
        n = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{n:,} values learn {args.data} on {args.base} ({model.lm_head.weight.device}, {args.dtype})")
    compile_model(args, model)
    prompt = data["val"].prompt(64)
    before = complete(model, prompt, temperature=0.5)

    history = train_until_interrupted(model, data, config)
    if history[-1]["step"] < config.steps:
        print(f"train.py: stopped; --resume continues from {args.out}/last.pt", file=sys.stderr)
        return 130

    loss = evaluate(model, data["val"], config)
    after = complete(model, prompt, temperature=0.5)
    if rank == 0:
        report(args, model, data, loss, before, after)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def report(args, model, data, loss, before, after):
    """Save what was trained and how, show the texts before and after, and say what to do next."""
    val = data["val"]
    data_hash = data["train"].data_hash()
    how = {"lr": args.lr, "steps": args.steps, "seed": args.seed, "data_hash": data_hash}
    if args.method == "ia3":
        model.ia3.save(f"{args.out}/ia3.npz", how)
    else:
        common.save(model, f"{args.out}/ckpt.pt")
    figures = {"val_loss": loss, "n_values": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    write_run_json(f"{args.out}/run.json", "train.py", vars(args), model, data_hash, figures)
    bits = ""
    if val.n_bytes:
        bits = f", {loss * val.n_tokens / val.n_bytes / math.log(2):.4f} bits per byte"
    print(f"\nbefore:\n{before[0]}\n\nafter:\n{after[0]}\n")
    print(f"val, all of it: {loss:.4f} nats per token{bits}")
    out = shlex.quote(args.out)
    print(f"next: python -m tools.plot {out}")
    if args.method == "ia3":
        task = f"--base {shlex.quote(args.base)} --ia3 {out}/ia3.npz"
        text = f"--data {shlex.quote(args.data)} --block-size {args.block_size}"
        if model.tokenizer is not None:
            print(f"      python sample.py {task}")
        print(f"      python merge.py {task} {text} --out {out}/merged.pt")


def main(argv=None):
    return common.exit_status("train.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
