"""(IA)³ beside its rivals on one base: what each learns, what it costs, how sure that is.

    python -m experiments.compare --quick    # 5 steps, one rate for all, a few windows: to see that it works
    python -m experiments.compare --plan     # how many runs are left, and how many hours
    python -m experiments.compare --counts   # what a method keeps for backward, by where it stands: counted, no clock
    python -m experiments.compare            # everything; after Ctrl-C the same command continues
    python -m experiments.compare --methods full lora4 ia3 --steps 400 --lr full=1e-3 lora4=0.03 ia3=0.18 --data folio
    python -m experiments.compare --methods vera --seeds 2 --steps 40 --lr 0.1 --data folio --out out/vera    # one row
    python -m experiments.compare --base my.pt --data path/to/folder --forget path/to/another --out out/mine
    python -m experiments.compare --base data/smollm2.pt --data folio --methods full lora-all ia3 --seeds 2 \
        --lr full=3e-5 lora-all=1e-3 ia3=3e-3 --out out/compare-smollm2

**What is compared.** Every method (experiments/rivals.py) trains with train.train() on the same windows in the same
order: 100 steps of 16 windows (1×), AdamW without weight decay, 6 % warmup, cosine decay, gradient norm 1. What is
reported is the last step, on test, for seeds 1 to 5. A seed draws the batches, and the initial values where a method
has random ones; (IA)³ starts from ones, so for it seeds vary the batches only. On folio (IA)³, full fine-tuning and
LoRA r = 4 also train 4×, 400 steps, at the rate of 1×: the fifth command.

**Learning rates.** A method's rate is chosen for each data on its val (256 windows, 1×, mean of seeds 0 and 1):
half-decades until the best has a worse one on either side, then the quarter-decades beside it. Nothing else is chosen,
and nothing by test.

**Losses and intervals.** A test is read work by work, and a loss is the mean of the works'. What is claimed is about
these works on this base: the sampling unit is the work, so an interval is Student's t over the works' means (five
plays: 4 degrees of freedom). With fewer than three works there is none, and each is shown by itself. How seeds differ
is shown beside it, as t over the seeds' means. Where either includes 0, no ranking is claimed. In the picture, the thin
bar of a dot shows how far one work's figure moves with the passages read: it is of resampled blocks of 32 windows. A
run that diverges counts as infinite.

**The gap** is what full fine-tuning of as many steps gains over the base.

**Forgetting** is how much the loss on --forget's test (plays, the base's own text; 256 windows of each work) rises
while the task is switched on. Switched off, whatever leaves the base's tensors alone forgets nothing, by construction.

**A Llama** has (IA)³, LoRA r = 1 on all linear maps and full fine-tuning only, and steps of 8 windows of 256 tokens.
What is frozen is stored in bfloat16; full fine-tuning has float32 weights and autocast. The last command is a look at a
pretrained model, no ranking: two seeds, 64 windows a work, rates not chosen here ((IA)³'s is the paper's, the others'
few-shot's).

**Files** in --out: what lab.py says of a folder of runs (a run's arrays: nats and bytes of every block of the test, and
the curve of its loss on val), costs.csv (of a GPT, without --methods), table.md, and pictures: beside.png, rates.png,
curves.png. A folder takes more methods, seeds, steps and data later; a second rate of the same method needs another
folder.
"""

import argparse
import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
import data as datasets
from experiments import clocks, compare_tables, costs, lab, rivals
from experiments.compare_tables import RATE_SEEDS, Job, Result, mean_losses
from experiments.rivals import METHODS
from ia3 import fingerprint
from model import GPT
from train import TrainConfig, train

FIRST_RATE = 0.03  # where the search for a learning rate begins
VAL_WINDOWS = 256  # by which it chooses


# --- a run ---


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder share."""

    base: str
    folders: dict  # {data's name: its folder}
    forget: str  # whose test shows forgetting
    device: str
    dtype: str
    is_llama: bool = False
    batch_size: int = 16
    grad_accum: int = 1
    curve: int = 32  # windows of val, for the curves
    test_windows: int | None = None  # of each work; None: all
    forget_windows: int = 256

    def config(self, **fields):
        """A TrainConfig. Where the dtype is bfloat16, weights that are float32 compute under autocast."""
        fields = {"lr": FIRST_RATE, "weight_decay": 0.0, "dtype": self.dtype} | fields  # it needs an lr even to measure
        return TrainConfig(batch_size=self.batch_size, grad_accum=self.grad_accum, eval_windows=self.curve, **fields)

    def model(self, method, seed):
        """The base with a method attached. Weights that learn are float32; a Llama's that are frozen are bfloat16."""
        torch.manual_seed(seed)  # initial values, where they are random
        held = torch.bfloat16 if self.is_llama and method != "full" else torch.float32
        model = common.load(self.base, held)
        rivals.attach(model, METHODS[method].add)
        return model.to(self.device)

    def tests(self, data):
        """What a run on data is measured on: (prefix of its arrays, text, windows of each work)."""
        return [("", data, self.test_windows), ("forget_", self.forget, self.forget_windows)]


def measure(settings, job):
    """One run: train, then measure val, or test and forgetting. Returns its Result and a test's arrays."""
    model = settings.model(job.method, job.seed)
    n_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = lab.load_data(settings.folders[job.data], model, ("train", "val"))
    config = settings.config()  # of the base, which is not trained
    history = []
    diverged = False
    if job.method != "base":
        every = job.steps if job.stage == "lr" else max(job.steps // 20, 1)  # of 100 steps, 21 points of a curve
        config = settings.config(steps=job.steps, lr=job.lr, seed=job.seed, eval_interval=every)
        try:
            history = train(model, data, config)
        except FloatingPointError:
            diverged = True
    if job.stage == "lr":
        loss = math.inf if diverged else loss_on_val(model, data["val"], config)
        return Result(n_values, loss, None), {}

    curve = [(row["step"], row["val_loss"] * lab.tokens_a_byte(data["val"])) for row in history]
    arrays = {"curve": np.array(curve).reshape(-1, 2)}
    means = []
    for kind, text, n_windows in settings.tests(job.data):
        works = lab.read_works(settings.folders[text], "test", model)
        found = lab.work_losses(model, works, config, n_windows, diverged)
        arrays |= {f"{kind}{name}": array for name, array in found.items()}
        means.append(float(lab.stack_works([arrays], kind).mean()))
    loss, forgotten = means
    return Result(n_values, loss, forgotten), arrays


def loss_on_val(model, val, config):
    """Nats a byte, by which a rate is chosen; infinite where it is no number."""
    nats, targets = lab.window_losses(model, val, config, VAL_WINDOWS)
    loss = nats.sum() / targets.sum() * lab.tokens_a_byte(val)
    return loss if math.isfinite(loss) else math.inf


# --- choosing a learning rate ---


def rate(i):
    """The i-th quarter-decade: 1 at 0, 1.8 at 1, 3 at 2, 5.6 at 3, 10 at 4, 0.56 at -1."""
    return float(f"{(1, 1.8, 3, 5.6)[i % 4]}e{i // 4}")


def index_of_rate(lr):
    """The i of rate(i)."""
    return round(4 * math.log10(lr))


def rates_to_try(losses, middle):
    """The i of the rates that the search needs next; none when it is over.

    losses: {rate: mean loss} so far; middle: the i to look around first, a half-decade (an even i).
    """
    if not losses:
        return {middle - 2, middle, middle + 2}
    tried = {index_of_rate(lr) for lr in losses}
    best = index_of_rate(min(losses, key=losses.get))
    half_decades = {best - 2, best + 2}
    if best % 2 == 0 and not half_decades <= tried:
        return half_decades - tried
    return {best - 1, best + 1} - tried


def choose_rates(measure_jobs, data, steps, middles):
    """Return {method: the learning rate that is best on data's val}.

    measure_jobs(jobs) returns {job: Result} of these jobs; middles: {method: rates_to_try's middle}.
    """
    losses = {method: {} for method in middles}
    results = {}
    while True:
        jobs = []
        for method, middle in middles.items():
            for i in sorted(rates_to_try(losses[method], middle)):
                jobs += [Job("lr", data, method, rate(i), steps, seed) for seed in RATE_SEEDS]
        if not jobs:
            return {method: min(of_lr, key=of_lr.get) for method, of_lr in losses.items()}
        results |= measure_jobs(jobs)
        losses |= mean_losses(results, data, steps)


def middle_of(lr):
    """The half-decade to begin with where lr was best elsewhere."""
    return 2 * round(index_of_rate(lr) / 2)


# --- which runs ---


def jobs_on_test(data, rates, steps, seeds):
    """The runs on data's test: the base's, then every method's, seed by seed. rates: {method: learning rate}."""
    jobs = [Job("test", data, "base", 0.0, 0, 0)]
    for seed in range(1, seeds + 1):
        jobs += [Job("test", data, method, lr, steps, seed) for method, lr in rates.items()]
    return jobs


def check_rates(jobs, results, folder):
    """Raise ValueError where folder's results have one of these runs at another rate: its draws would be mixed."""
    rates = {(job.data, job.method, job.steps): job.lr for job in results if job.stage == "test"}
    for job in jobs:
        there = rates.get((job.data, job.method, job.steps), job.lr)
        if there != job.lr:
            raise ValueError(f"{folder} holds {job.method} on {job.data} at lr {there}, not {job.lr}: name a new --out")


def print_plan(settings, data_names, methods, given, args, results):
    """Print how many runs are left and how long they take, by a step and a forward pass timed here.

    given: {method: rate}; the other methods' rates are searched, which takes about 7 of them on the first data and 5
    on the others. results: of the runs that are there.
    """
    model = settings.model(methods[0], 0)
    done = {job._replace(lr=0.0) for job in results}  # as jobs has them: a search has yet to choose
    n_runs = n_steps = n_windows = 0
    for data in data_names:
        expected = 7 if data == data_names[0] else 5
        n = len(RATE_SEEDS) * rates_left(mean_losses(results, data, args.steps), methods, given, expected)
        jobs = jobs_on_test(data, dict.fromkeys(methods, 0.0), args.steps, args.seeds)
        left = [job for job in jobs if job not in done]
        n_runs += n + len(left)
        n_steps += n * args.steps + sum(job.steps for job in left)
        n_windows += n * (VAL_WINDOWS + 2 * settings.curve)
        n_windows += len(left) * windows_of_test(settings, data, model)

    split = lab.load_data(settings.folders[data_names[0]], model, ("train", "val"))["train"]
    a_step, a_window = clocks.pace(model, split, settings.config())
    hours = (n_steps * a_step + n_windows * a_window) / args.workers / 3600
    print(f"{n_runs} runs are left, {n_steps:,} steps, {n_windows:,} windows read: ", end="")
    print(f"about {hours:.1f} hours on {args.workers} cores", flush=True)


def rates_left(losses, methods, given, expected):
    """How many rates the searches have still to try, about: each tries as many as expected, and at least one more.

    losses: mean_losses'.
    """
    n = 0
    for method in methods:
        tried = losses.get(method, {})
        if method not in given and rates_to_try(tried, middle_of(FIRST_RATE)):
            n += max(expected - len(tried), 1)
    return n


def windows_of_test(settings, data, model):
    """How many windows a run on data's test reads: val's for the curve, 21 times, and those of both texts."""
    n = 21 * settings.curve
    for _, text, n_windows in settings.tests(data):
        works = lab.read_works(settings.folders[text], "test", model)
        n += sum(min(len(work), n_windows or len(work)) for work in works.values())
    return n


# --- the command line ---

ON_LLAMA = ("full", "lora-all", "ia3")  # the methods that a Llama can have
QUICK_RATE = 3e-3
REPEATS = 25  # of what is timed


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    add("--data", nargs="+", default=["folio", "kjv"], help="names under data/ or folders with a test")
    add("--forget", default="plays", help="whose test shows forgetting (default: %(default)s)")
    add("--methods", nargs="+", metavar="NAME", help="of METHODS in rivals.py (default: all; of a Llama, three)")
    add("--seeds", type=int, default=5, help="runs of each method, at most 10 (default: %(default)s)")
    add("--steps", type=int, default=100, help="optimizer steps (default: %(default)s)")
    add("--lr", nargs="+", metavar="RATE", help="a rate for all, or METHOD=RATE (default: searched on val)")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda or cpu")
    add("--workers", type=int, default=2, help="runs at once, a thread each (default: %(default)s)")
    add("--out", type=Path, default=Path("out/compare"), help="folder (default: %(default)s)")
    add("--quick", action="store_true", help="the first data, one seed, 5 steps; into OUT/quick")
    add("--plan", action="store_true", help="say how many runs and hours are left, and stop")
    add("--counts", action="store_true", help="print what is kept for backward, by place, and stop")
    return parser.parse_args(argv)


def choose_methods(names, base, is_llama):
    """The methods to compare: those named, or all that the base can have. Raises ValueError for others.

    A method that finds nothing to train is left out: BitFit, on a base without biases.
    """
    known = ON_LLAMA
    if not is_llama:
        others = [name for name in METHODS if name != "base"]
        known = [name for name in others if METHODS[name].add(copy.deepcopy(base))]  # add returns what is trained
    for name in names or []:
        if name not in known:
            raise ValueError(f"method {name} is not one that this base can have: {', '.join(known)}")
    return [name for name in known if name in (names or known)]


def given_rates(texts, methods):
    """{method: rate} of --lr's texts: RATE for all, METHOD=RATE for one. Raises ValueError for others."""
    rates = {}
    for text in texts or []:
        name, _, number = text.rpartition("=")
        if name and name not in methods:
            raise ValueError(f"lr {text}: the methods are {', '.join(methods)}")
        try:
            lr = TrainConfig(lr=float(number)).lr
        except ValueError as e:
            raise ValueError(f"lr {text}: {e}") from None
        rates |= dict.fromkeys([name] if name else methods, lr)
    return rates


def name_of(folder):
    """What runs call the data in a folder: by its last part."""
    return Path(folder).absolute().name


def make_settings(args, is_llama):
    """The Settings that the command line asks for."""
    device = common.pick_device(args.device)
    dtype = "bfloat16" if is_llama else common.pick_dtype(device)
    named = [*args.data, args.forget]
    folders = {name_of(folder): folder for folder in named}
    if len(folders) < len(set(named)):
        raise ValueError("two of these folders have the same name, and runs go by it: rename one")
    sizes = {}
    if is_llama:
        # half the rows of twice the tokens, as many at once as its logits leave room for
        sizes = {"batch_size": 8, "grad_accum": 2, "curve": 8, "test_windows": 64, "forget_windows": 64}
    if args.quick:
        sizes |= {"curve": 2, "test_windows": 8, "forget_windows": 8}
    return Settings(args.base, folders, name_of(args.forget), str(device), dtype, is_llama, **sizes)


def describe(settings, base, quick):
    """What the runs of a folder must agree on, for about.json. Reads all data, so that a mistake in them shows now."""
    about = {"fingerprint": fingerprint(base), "forget": settings.forget, "dtype": settings.dtype, "quick": quick}
    about |= {"batch_size": settings.batch_size, "data_hash": {}, "works": {}}
    for name, folder in settings.folders.items():
        splits = lab.load_data(folder, base, ("train", "val", "test"))
        about["data_hash"][name] = "".join(split.data_hash()[:16] for split in splits.values())
        about["works"][name] = list(lab.read_works(folder, "test", base))
    return about


def search_and_test(settings, data_names, methods, given, args, out):
    """Data by data: search the rates that are not given, then run the tests.

    A search begins where the data before ended. Returns {data: {method: its rate}} and {job: result} of the tests.
    """

    def measure_jobs(jobs):
        return lab.make_runs(jobs, partial(measure, settings), Result, out, args.workers)

    middles = {method: middle_of(FIRST_RATE) for method in methods if method not in given}
    rates = {}
    done = {}
    earlier, _ = lab.load_runs(out, Job, Result)
    for data in data_names:
        chosen = choose_rates(measure_jobs, data, args.steps, middles)
        middles = {method: middle_of(lr) for method, lr in chosen.items()}
        rates[data] = {method: (given | chosen)[method] for method in methods}
        jobs = jobs_on_test(data, rates[data], args.steps, args.seeds)
        check_rates(jobs, earlier, out)
        done |= measure_jobs(jobs)
    return rates, done


def one_batch(settings, folder, base):
    """A training step's batch: what a step costs is counted and timed on it."""
    split = lab.load_data(folder, base, ("train", "val"))["train"]
    return datasets.to_device(split.batch(0, 0, settings.batch_size), torch.device(settings.device))


def run(argv):
    args = parse(argv)
    lab.check_counts(args.workers, args.seeds)
    base = common.load(args.base)
    is_llama = not isinstance(base, GPT)
    out = args.out
    if args.quick:
        out = args.out / "quick"
        args.data = args.data[:1]
        args.seeds = 1
        args.steps = 5
    settings = make_settings(args, is_llama)
    settings.config(steps=args.steps)  # a mistake shows before any run

    if args.counts:
        if is_llama:
            raise ValueError("--counts is for a GPT: a Llama lacks some of these places")
        print(costs.places(settings.model, one_batch(settings, args.data[0], base), settings.config()))
        return 0

    methods = choose_methods(args.methods, base, is_llama)
    given = given_rates(args.lr, methods)
    if args.quick:
        given = dict.fromkeys(methods, QUICK_RATE) | given
    data_names = [name_of(folder) for folder in args.data]
    about = describe(settings, base, args.quick)
    results, _ = lab.load_runs(out, Job, Result)
    for data in data_names:
        check_rates(jobs_on_test(data, given, args.steps, args.seeds), results, out)  # before any run, where it can be
    print_plan(settings, data_names, methods, given, args, results)
    if args.plan:
        return 0

    lab.open_folder(out, about)
    rates, done = search_and_test(settings, data_names, methods, given, args, out)
    if not is_llama and args.methods is None and not (out / "costs.csv").exists():
        print("measuring costs", flush=True)
        repeats = 2 if args.quick else REPEATS
        batch = one_batch(settings, args.data[0], base)
        measured = costs.measure(settings.model, batch, settings.config(), methods, repeats)
        lab.write_csv(out / "costs.csv", [vars(cost) for cost in measured])
    text = compare_tables.write(out)
    arguments = vars(args) | {"methods": methods, "lr": rates, "device": settings.device, "dtype": settings.dtype}
    lab.write_runs_json(out, "compare.py", arguments, base.to(settings.device), about["data_hash"], done)
    print(text)
    return 0


def main(argv=None):
    return common.exit_status("compare.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
