"""The training loop: one for (IA)³, for full fine-tuning and for pretraining; on a laptop, a GPU, or many.

    python train.py                                            # (IA)³: data/base.pt learns 1623 spelling
    python train.py --data path/to/folder --init my.pt         # your own text, your own base
    python train.py --method full --out out/full               # every weight instead
    python train.py --init scratch --data plays --steps 5000   # a new base
    torchrun --nproc-per-node 8 train.py ...                   # any of these on eight GPUs

train() optimizes whatever requires a gradient and knows no method; build() makes what the flags ask for. Batches are
a function of (seed, step), so a resumed run sees what an uninterrupted one would have.
"""

import argparse
import csv
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from typing import get_args

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data as datasets
from ia3 import IA3, attach
from model import GPT, GPTConfig, load_file, pick_device
from sample import complete


def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class TrainConfig:
    """What a run is. Every field is a flag of the command line. Raises ValueError for values out of range."""

    data: str = flag("folio", "a name under data/ (plays, folio, sonnets, kjv), or the path of a folder of your own")
    init: str = flag("data/base.pt", "the base: a checkpoint, or 'scratch' for a new model (implies --method full)")
    method: str = flag("ia3", "train the vectors, or every weight", ("ia3", "full"))
    ia3: str | None = flag(None, "a .npz of vectors to start from, instead of ones")
    targets: str = flag("k,v,ff", "which activations get a vector; with --ia3, those that it has")
    steps: int = flag(200, "optimizer steps")
    lr: float | None = flag(None, "peak learning rate (default: 0.1 for ia3, 0.001 for full)")
    schedule: str = flag("cosine", "the decay to zero after the warmup", ("cosine", "linear"))
    warmup: float = flag(0.06, "share of the steps in which the learning rate rises")
    batch_size: int = flag(16, "windows or examples a step, over all parts and processes")
    grad_accum: int = flag(1, "parts that a process cuts its batch into, one in memory at a time")
    block_size: int | None = flag(None, "training window in tokens (default: the model's; scratch: 128)")
    weight_decay: float = flag(0.1, "AdamW's, on matrices of the base only, never on vectors")
    grad_clip: float = flag(1.0, "largest gradient norm")
    eval_interval: int = flag(20, "steps between evaluations, each of which writes a checkpoint")
    eval_windows: int = flag(64, "windows of val in an evaluation during the run; at its end all of val is read")
    seed: int = flag(0, "draws the batches, the dropout and a new model's weights")
    device: str = flag("auto", "cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    dtype: str = flag("auto", "auto: bfloat16 where CUDA has it, else float32", ("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the model")
    out: str | None = flag(None, "folder of the run (default: out/ and the data's name)")
    resume: bool = flag(False, "go on with the run in --out from its last checkpoint, if it has one")
    overwrite: bool = flag(False, "replace the run in --out")
    n_layer: int | None = flag(None, "scratch: layers (default: 6)")
    n_head: int | None = flag(None, "scratch: heads (default: 6)")
    n_embd: int | None = flag(None, "scratch: width (default: 192)")
    dropout: float | None = flag(None, "scratch: dropout (default: 0)")
    tokenizer: str | None = flag(None, "scratch: bytes or gpt2 (default: bytes)", ("bytes", "gpt2"))

    def __post_init__(self):
        self.method = "full" if self.init == "scratch" else self.method
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in (*choices, f.default):
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
        if self.ia3 and self.method == "full":
            raise ValueError("ia3, vectors to start from, goes with method ia3: full trains the weights")
        self.lr = {"ia3": 0.1, "full": 0.001}[self.method] if self.lr is None else self.lr
        for name in ("steps", "batch_size", "grad_accum", "block_size", "eval_interval", "eval_windows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        if self.batch_size < world * self.grad_accum:
            raise ValueError(f"batch_size must be at least {world} processes × grad_accum {self.grad_accum}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0 and finite, not {self.lr}")
        if not (0 <= self.warmup <= 1 and 0 <= self.weight_decay < math.inf and self.grad_clip > 0 and self.seed >= 0):
            raise ValueError("warmup must be from 0 to 1, weight_decay and seed at least 0, grad_clip above 0")


def lm_loss(model, x, y):
    """Mean cross-entropy in nats a target token."""
    return model(x, y)[1]


def learning_rate(step, config):
    """A linear rise over the warmup, then the schedule's decay to zero."""
    warmup = int(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(config.steps - warmup, 1)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done))


def autocast(model, config):
    """bfloat16 autocast for weights that are kept in float32; a base stored in bfloat16 needs none."""
    weight = model.lm_head.weight
    on = config.dtype == "bfloat16" and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on)


def ranks():
    """Return this process's rank and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def evaluate(model, split, config, loss_fn=lm_loss, n_windows=None):
    """Mean loss in nats a target token, over n_windows evenly spaced windows of split or over all, without overlap."""
    rank, world = ranks()
    n = min(n_windows or len(split), len(split))
    ids = torch.linspace(0, len(split) - 1, n, dtype=torch.float64).long().tolist()[rank::world]
    total = torch.zeros(2, dtype=torch.float64)  # nats, target tokens
    model.eval()  # and left so: without dropout
    for i in range(0, len(ids), config.batch_size):
        batch = datasets.to_device(split.windows(ids[i : i + config.batch_size]), model.lm_head.weight.device)
        n_targets = (batch[1] >= 0).sum().item()
        with autocast(model, config):
            total += torch.tensor([loss_fn(model, *batch).item() * n_targets, n_targets])
    if world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def get_batch(split, step, config, device):
    """This process's rows of a step's global batch: grad_accum parts, each with its share of the batch's targets."""
    rank, world = ranks()
    batch = split.batch(config.seed, step, config.batch_size)
    n_targets = (batch[1] >= 0).sum().item()
    rows = torch.arange(config.batch_size)[rank::world].tensor_split(config.grad_accum)
    parts = [[t[r] for t in batch] for r in rows]
    return [(datasets.to_device(part, device), (part[1] >= 0).sum().item() / n_targets) for part in parts]


def backward(model, parts, loss_fn, amp):
    """Leave the gradient of the whole batch's mean loss in .grad. Returns that loss, a scalar tensor."""
    _, world = ranks()
    loss = 0.0
    for i, (part, share) in enumerate(parts):
        model.require_backward_grad_sync = i == len(parts) - 1  # DDP's: reduce once a step
        with amp:
            part_loss = loss_fn(model, *part) * share
        (part_loss * world).backward()  # DDP takes the mean over processes, but the shares sum to one already
        loss += part_loss.detach()
    if world > 1:
        dist.all_reduce(loss)
    return loss


def train(model, data, config, loss_fn=lm_loss):
    """Optimize whatever in model requires a gradient, for config.steps steps of AdamW.

    data: {'train': split, 'val': split} as data.load returns it. loss_fn(model, *batch): the mean loss over the batch's
    target tokens. With config.out, every evaluation writes last.pt and metrics.csv there. Returns the history, a dict
    an evaluation, with train_loss the mean over the steps since the one before. The model ends in eval mode. Raises
    FloatingPointError for a loss that is not finite, KeyboardInterrupt after Ctrl-C, the step being done and saved.
    """
    rank, world = ranks()
    device = model.lm_head.weight.device
    torch.manual_seed(config.seed + rank)  # dropout
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # weight decay pulls to 0, and a vector starts at 1: base matrices only
    decayed = [p for name, p in trained.items() if p.dim() >= 2 and not name.startswith("ia3.")]
    others = [p for name, p in trained.items() if p.dim() < 2 or name.startswith("ia3.")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    wrapped = DistributedDataParallel(model) if world > 1 else model

    about = asdict(config) | {"base": model.ia3 and model.ia3.base}  # what a run and its resumption have in common
    step, history, losses = 0, [], []
    if config.resume and os.path.exists(f"{config.out}/last.pt"):
        step, history, losses = load_run(about, trained, optimizer)
    interrupts = []  # Ctrl-C lets the step finish, so that what is saved is whole; a second one stops at once
    handler = signal.getsignal(signal.SIGINT)
    if world == 1:
        signal.signal(signal.SIGINT, lambda *_: (interrupts.append(1), signal.signal(signal.SIGINT, handler)))
    try:
        parts, clock, n_steps, n_tokens = get_batch(data["train"], step, config, device), time.time(), 0, 0
        while True:
            seconds = max(time.time() - clock, 1e-9)
            rate, left = n_tokens / seconds, (config.steps - step) * seconds / max(n_steps, 1)
            train_loss = sum(losses) / len(losses) if losses else math.nan
            evaluated = {row["step"] for row in history}  # a resumed run starts at a step that may be
            due = (step % config.eval_interval == 0 or step == config.steps) and step not in evaluated
            if due:
                val_loss = evaluate(model, data["val"], config, loss_fn, config.eval_windows)
                if not math.isfinite(val_loss):
                    raise FloatingPointError(f"val loss {val_loss} at step {step}: try a smaller lr")
                row = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
                history.append(row | {"lr": learning_rate(step, config), "tokens_per_second": rate})
                losses = []
                if rank == 0:
                    save_run(step, history, losses, about, trained, optimizer)
                clock, n_steps, n_tokens = time.time(), 0, 0
            if rank == 0 and (due or sys.stdout.isatty()):
                line = f"step {step:5d}/{config.steps}  val {history[-1]['val_loss']:.4f}"
                if step > 0:
                    line += f"  loss {train_loss:.4f}  {rate:,.0f} tokens/s  {left // 60:.0f}:{left % 60:02.0f} left"
                tty = sys.stdout.isatty()
                print("\r" * tty + line.ljust(79 * tty), end="\n" if due else "", flush=True)
            if step == config.steps:
                return history
            if interrupts:
                save_run(step, history, losses, about, trained, optimizer)
                raise KeyboardInterrupt(f"stopped at step {step}")
            model.train()  # and now the step, with dropout
            loss = backward(wrapped, parts, loss_fn, autocast(model, config))
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.grad_clip)
            n_tokens += sum(part[0].numel() for part, _ in parts) * world
            parts = get_batch(data["train"], step + 1, config, device)  # while a GPU is still busy with this one
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise FloatingPointError(f"loss {loss:g}, gradient {norm:g} at step {step}: try a smaller lr")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step, n_steps = step + 1, n_steps + 1
    finally:
        signal.signal(signal.SIGINT, handler)


def save_run(step, history, losses, about, trained, optimizer):
    """Write metrics.csv and all that a resumed run needs, each under a temporary name and then renamed."""
    out = about["out"]
    if not out:
        return
    os.makedirs(out, exist_ok=True)
    state = {"step": step, "history": history, "losses": losses, "config": about, "optimizer": optimizer.state_dict()}
    state |= {"trained": trained, "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    with open(f"{out}/last.pt.tmp", "wb") as last, open(f"{out}/metrics.csv.tmp", "w", newline="") as f:
        torch.save(state, last)
        writer = csv.DictWriter(f, history[0])
        writer.writeheader()
        writer.writerows(history)
    for name in ("last.pt", "metrics.csv"):
        os.replace(f"{out}/{name}.tmp", f"{out}/{name}")


def load_run(about, trained, optimizer):
    """Put back the run in about["out"]. Returns its step, history, latest losses; ValueError if it is another run's."""
    state = load_file(f"{about['out']}/last.pt")
    for name, value in state["config"].items():
        if name not in ("resume", "overwrite", "device", "compile", "out") and value != about[name]:
            raise ValueError(f"the run in {about['out']} has {name} {value}, not {about[name]}")
    for name, p in trained.items():
        p.data.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"], state["history"], state["losses"]


def build(config):
    """Return the model and the data that config asks for; fills in what config left to the model and the machine."""
    device, config.dtype = pick_device(config.device, config.dtype)
    names = ("n_layer", "n_head", "n_embd", "dropout")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.init == "scratch":
        torch.manual_seed(config.seed)
        vocab_size = datasets.get_tokenizer(config.tokenizer or "bytes").n_vocab
        defaults = {"block_size": config.block_size or 128, "n_layer": 6, "n_head": 6, "n_embd": 192}
        model = GPT(GPTConfig(vocab_size=vocab_size, **(defaults | sizes)))
    elif sizes or config.tokenizer:
        raise ValueError(f"{next(iter(sizes), 'tokenizer')} goes with --init scratch: {config.init} has its own")
    else:
        model = GPT.from_pretrained(config.init)
    config.block_size = config.block_size or model.config.block_size
    if config.block_size > model.config.block_size:
        raise ValueError(f"block_size {config.block_size} is beyond the model's {model.config.block_size}")
    data = datasets.load(config.data, model.tokenizer, model.config.vocab_size, config.block_size)
    if config.method == "full":
        return model.to(device), data  # float32 weights, under autocast where dtype is bfloat16
    vectors = IA3.load(config.ia3, model) if config.ia3 else IA3(model.config, config.targets.split(","))
    model.to(device, getattr(torch, config.dtype))  # frozen, so it is stored in the dtype in which it computes
    attach(model, vectors)  # float32
    return model, data


def parse(argv):
    """Return the TrainConfig of a command line. Raises ValueError for one that makes no sense."""

    def fail(message):
        raise ValueError(message)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for f in fields(TrainConfig):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind = (get_args(f.type) or [f.type])[0]  # float of float | None
        if kind is bool:
            parser.add_argument(name, action="store_true", help=help)
        else:
            help += "" if f.default is None else " (default: %(default)s)"
            parser.add_argument(name, type=kind, default=f.default, choices=f.metadata["choices"], help=help)
    return TrainConfig(**vars(parser.parse_args(argv)))


def run(config):
    """One run: from flags to a folder of files."""
    config.out = config.out or f"out/{os.path.basename(os.path.normpath(config.data))}"
    made = f"{config.out}/{'ia3.npz' if config.method == 'ia3' else 'ckpt.pt'}"
    files = [f"{config.out}/{name}" for name in ("last.pt", "metrics.csv", "ia3.npz", "ckpt.pt")]
    if any(map(os.path.exists, files)) and not (config.overwrite or (config.resume and os.path.exists(files[0]))):
        raise FileExistsError(f"{config.out} holds a run: --resume goes on from its last.pt, --overwrite replaces it")
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group()
    model, data = build(config)
    first = ranks()[0] == 0  # of torchrun's processes: the one that prints and writes
    if first:
        n = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{n:,} values of {config.init} learn {config.data} ({model.lm_head.weight.device}, {config.dtype})")
    if config.compile:
        model.compile()
    val = data["val"]
    before = complete(model, val.prompt(64), temperature=0.5)
    if first and not config.resume:
        kept = [os.path.realpath(path) for path in (config.init, config.ia3 or "")]  # what this run starts from
        for file in filter(os.path.exists, files):
            if os.path.realpath(file) not in kept:
                os.remove(file)
    train(model, data, config)
    loss = evaluate(model, val, config)
    if first:
        (model.ia3 if config.method == "ia3" else model).save(made)
        bits = f", {loss * val.n_tokens / val.n_bytes / math.log(2):.4f} bits a byte" if val.n_bytes else ""
        print(f"\nbefore:\n{before[0]}\n\nafter:\n{complete(model, val.prompt(64), temperature=0.5)[0]}\n")
        print(f"val, all of it: {loss:.4f} nats a token{bits}\nnext: python plot.py {config.out}")
        if config.method == "ia3":
            print(f"      python sample.py --base {config.init} --ia3 {made}")
            print(f"      python merge.py --base {config.init} --ia3 {made} --out {config.out}/merged.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


def main(argv=None):
    try:
        return run(parse(argv))
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"train.py: {str(e) or 'stopped'}; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
