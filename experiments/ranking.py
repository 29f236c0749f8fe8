"""Learn to choose: labelled choices, the paper's three losses (section 3.2), rank classification (section 3.1).

    python -m experiments.ranking --data FOLDER --out DIR                        # learn, then rank val
    python -m experiments.ranking --data FOLDER --out DIR --k 32 --seeds 0 1 2   # from 32 examples, three times
    python -m experiments.ranking --data FOLDER --out NEW --evaluate --test      # rank test by the untouched base
    python -m experiments.ranking --data FOLDER --out NEW --evaluate --test --ia3 ia3.npz    # or by saved vectors

FOLDER holds train.jsonl, val.jsonl and, for --test, test.jsonl, one {"prompt": text, "choices": [text, text, ...],
"label": n} per line, n being the right choice, counted from 0. The model scores every choice by its log-likelihood
after the prompt, divided by its length in tokens, and answers with the best. (The authors' choices end in an end token,
ours do not.)

DIR gets ia3.npz, metrics.csv, last.pt and run.json, as from train.py, and predictions-val.csv or predictions-test.csv:
each item's right choice, the choice made, and the mean log-likelihood per token of every choice, in nats. Several seeds
get a folder each in DIR, and about.json says what they share. After Ctrl-C the same command continues: finished seeds
are kept, and the one that was stopped begins again. Where there are several, further --seeds can be added. An
evaluation wants a folder of its own and writes the predictions and run.json.

The interval over items is Wilson's: how far the accuracy may be off for the items drawn. The interval over seeds is
Student's.
"""

import argparse
import copy
import csv
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import common
import data as datasets
import disk
from experiments import lab
from experiments.prompt_cache import PromptCache
from ia3 import IA3, attach, fingerprint
from run_folder import hash_vectors, write_run_json
from train import TrainConfig, default_lr, train

LOSSES = ("lm", "ul", "ln")


class Choices(datasets.Examples):
    """Examples to choose in, as train() takes them. examples: [(prompt ids, [choice ids, ...], label)]."""

    def __init__(self, examples):
        self.examples = examples

    def labels(self):
        """Which choice is right in each example, (len(self),) long."""
        return torch.tensor([label for _, _, label in self.examples])

    def windows(self, ids):
        """The examples ids: inputs and targets (B, N, T) long for up to N choices, and the labels (B,) long.

        Targets are -1 on prompts, on padding, and all along where an example has fewer choices than N.
        """
        rows = [self.examples[i] for i in ids]
        n = max(len(choices) for _, choices, _ in rows)
        longest = max(len(prompt) + len(choice) for prompt, choices, _ in rows for choice in choices) - 1
        x = torch.zeros(len(rows), n, longest, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, (prompt, choices, _) in enumerate(rows):
            for i, choice in enumerate(choices):
                both = torch.tensor(prompt + choice)
                x[row, i, : len(both) - 1] = both[:-1]
                y[row, i, len(prompt) - 1 : len(both) - 1] = both[len(prompt) :]
        return x, y, torch.tensor([label for _, _, label in rows])


class SharedPrompts(Choices):
    """The same examples in batches that hold each prompt once, not once per choice.

    Prompts are padded on the left, so that they end together, and padding is not attended to. It shifts a text's
    positions, which changes nothing with rotary embeddings: only distances count. task_ids (len(self),) long: each
    example's task, for vectors that are stacked.
    """

    def __init__(self, examples, task_ids=None):
        super().__init__(examples)
        self.task_ids = task_ids

    def windows(self, ids):
        """The examples ids: prompts (B, P), choices (B, N, L) with -1 behind, padding (B,), labels (B,), all long.

        With task_ids, theirs, (B,), stand before the labels.
        """
        rows = [self.examples[i] for i in ids]
        lengths = [len(prompt) for prompt, _, _ in rows]
        padding = [max(lengths) - length for length in lengths]
        n = max(len(choices) for _, choices, _ in rows)
        longest = max(len(choice) for _, choices, _ in rows for choice in choices)
        x = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        y = torch.full((len(rows), n, longest), -1)
        for row, (prompt, choices, _) in enumerate(rows):
            x[row, padding[row] :] = torch.tensor(prompt)
            for i, choice in enumerate(choices):
                y[row, i, : len(choice)] = torch.tensor(choice)
        inputs = [x, y, torch.tensor(padding)]
        if self.task_ids is not None:
            inputs.append(self.task_ids[ids])
        return *inputs, torch.tensor([label for _, _, label in rows])


def load_choices(path, tokenizer, block_size):
    """Read a .jsonl of choices. Returns Choices.

    tokenizer: the model's. Raises OSError where the file is missing, and ValueError with the file and line of what is
    wrong: not JSON, other fields, one choice only, a label beyond the choices, a text that the tokenizer fails on, an
    empty choice or prompt, or more tokens than block_size.
    """
    examples = []
    for where, row in datasets.json_lines(Path(path)):
        if not isinstance(row, dict) or not isinstance(row.get("choices"), list):
            raise ValueError(f'{where}: expected {{"prompt": text, "choices": [text, text], "label": n}}')
        texts = [row.get("prompt"), *row["choices"]]
        label = row.get("label")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: the prompt and the choices must be texts")
        if len(row["choices"]) < 2:
            raise ValueError(f"{where}: there must be at least two choices, not {len(row['choices'])}")
        if type(label) is not int or not 0 <= label < len(row["choices"]):
            raise ValueError(f"{where}: label {label!r} is not one of 0 to {len(row['choices']) - 1}")
        try:
            prompt, *choices = [tokenizer.encode_ordinary(text) for text in texts]
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        if not prompt or not all(choices):
            raise ValueError(f"{where}: the prompt or a choice is empty")
        longest = len(prompt) + max(len(choice) for choice in choices)
        if longest - 1 > block_size:
            raise ValueError(f"{where}: {longest} tokens do not fit block_size {block_size}")
        examples.append((prompt, choices, label))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return Choices(examples)


def draw_examples(split, k, seed):
    """Draw k of split's examples, equally many per label as far as there are. For one seed, smaller draws begin larger.

    Raises ValueError where there are fewer than k.
    """
    if not 1 <= k <= len(split):
        raise ValueError(f"k must be from 1 to the data's {len(split)} examples, not {k}")
    order = np.random.default_rng(seed).permutation(len(split)).tolist()
    n_before = Counter()
    turns = {}  # of each example, among those of its label
    for i in order:
        _, _, label = split.examples[i]
        turns[i] = n_before[label]
        n_before[label] += 1
    by_turn = sorted(order, key=turns.get)  # the labels take turns
    return Choices([split.examples[i] for i in by_turn[:k]])


# --- log-likelihoods ---


def token_log_likelihoods(model, x, y):
    """log p(y_t | x, y_<t) in nats, (B, N, T), and where there is a token, (B, N, T) bool; 0 where there is none."""
    hidden = model.hidden(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, N, T, n_embd)
    return log_likelihoods(model, hidden, y)


def choice_log_likelihoods(model, prompts, choices, padding, task_ids=None, prefix=None):
    """The same for SharedPrompts' windows: (B, N, L) nats, and where there is a token.

    task_ids (B,) long: each prompt's task, where the model's vectors are stacked. prefix: a PromptCache that has read
    what stands before the prompts, which are then of equal length.
    """
    n = choices.size(1)
    cache = PromptCache(model, padding) if prefix is None else copy.deepcopy(prefix)
    end = model.hidden(prompts, task_ids, cache)[:, -1:]  # (B, 1, n_embd), predicts a choice's first token
    hidden = end.repeat_interleave(n, 0)
    y = choices.flatten(0, 1)  # (B·N, L)
    if y.size(1) > 1:
        if task_ids is not None:
            task_ids = task_ids.repeat_interleave(n)
        rest = model.hidden(y[:, :-1].clamp(min=0), task_ids, cache)
        hidden = torch.cat((hidden, rest), 1)  # (B·N, L, n_embd)
    log_p, there = log_likelihoods(model, hidden, y)
    return log_p.view_as(choices), there.view_as(choices)


def log_likelihoods(model, hidden, y):
    """The same from what the head reads, (…, n_embd), and the tokens that it is to predict, y (…), -1 for none."""
    there = y >= 0
    head = model.lm_head.weight
    wide = torch.promote_types(head.dtype, torch.float32)  # bfloat16: steps of 1/8 in a logit of 20, choices would tie
    with torch.autocast(head.device.type, enabled=False):  # which would round to bfloat16 again
        logits = F.linear(hidden[there].to(wide), head.to(wide))  # (tokens, vocab_size): the head only where it is read
    log_p = -F.cross_entropy(logits, y[there], reduction="none")  # (tokens,)
    return torch.zeros(y.shape, dtype=log_p.dtype, device=y.device).masked_scatter(there, log_p), there


def normalized(log_p, there):
    """β(x, y) = 1/T Σ_t log p(y_t | x, y_<t) of every choice, (B, N); -inf where an example has no such choice."""
    T = there.sum(-1)
    return (log_p.sum(-1) / T.clamp(min=1)).masked_fill(T == 0, -torch.inf)


# --- the paper's losses (section 3.2) ---


def loss_lm(log_p, there, labels):
    """L_LM = -1/T Σ_t log p(y_t | x, y_<t) of the right choice: section 3.2's first loss. Nats a token.

    The mean is over the right choices' tokens of the batch, so a long choice weighs more than a short one.
    """
    rows = torch.arange(len(labels), device=labels.device)
    return -log_p[rows, labels].sum() / there[rows, labels].sum()


def loss_ul(log_p, there, labels):
    """L_UL = -Σ_n Σ_t log(1 - p(ŷ_t⁽ⁿ⁾ | x, ŷ_<t⁽ⁿ⁾)) / Σ_n T⁽ⁿ⁾, over the wrong ŷ⁽ⁿ⁾: unlikelihood, section 3.2.

    The sums run over the wrong choices of the whole batch. The authors' code takes log(1 - p + 0.01), so that p = 1
    stays finite, at the price of a loss below 0 where p is small. Here the formula is the paper's, with p held below
    1 - 1e-6.
    """
    rows = torch.arange(len(labels), device=labels.device)
    wrong = there.clone()
    wrong[rows, labels] = False
    log_not_p = torch.log(-torch.expm1(log_p[wrong].clamp(max=-1e-6)))  # log(1 - p), exact for small p
    return -log_not_p.sum() / wrong.sum()


def loss_ln(log_p, there, labels):
    """L_LN = -log(exp β(x, y) / (exp β(x, y) + Σ_n exp β(x, ŷ⁽ⁿ⁾))), section 3.2's length-normalized softmax, meaned.

    The authors' code has the same as a cross-entropy over the choices' mean log-likelihoods.
    """
    return F.cross_entropy(normalized(log_p, there), labels)


def make_loss(losses=LOSSES, log_likelihoods_of=token_log_likelihoods):
    """The sum of some of 'lm', 'ul', 'ln' with weights 1, as a loss_fn(model, *inputs, labels) for train().

    log_likelihoods_of(model, *inputs): as token_log_likelihoods. train() weighs the parts of a batch by their targets,
    and none of these losses is a mean over them: val_loss, and a step with grad_accum, depend on how a batch is cut.
    Raises ValueError for other losses, or for none.
    """
    if not losses or not set(losses) <= set(LOSSES) or len(set(losses)) < len(losses):
        raise ValueError(f"losses must be some of {', '.join(LOSSES)}, each once, not {','.join(losses) or 'none'}")
    terms = [{"lm": loss_lm, "ul": loss_ul, "ln": loss_ln}[name] for name in losses]

    def loss_fn(model, *batch):
        *inputs, labels = batch
        log_p, there = log_likelihoods_of(model, *inputs)
        return sum(term(log_p, there, labels) for term in terms)

    return loss_fn


# --- rank classification (section 3.1) ---


@torch.no_grad()
def scores(model, split, prefix=()):
    """β of every choice of every example, (len(split), most choices) float64; -inf where an example has no such choice.

    split: Choices. prefix: token ids before every prompt. It is read once, and each prompt once for all of its choices.
    """
    if not isinstance(split, SharedPrompts):
        split = SharedPrompts(split.examples)
    device = model.lm_head.weight.device
    cache = None
    if len(prefix) > 0:
        cache = PromptCache(model, torch.zeros(1, dtype=torch.long, device=device))
        model.hidden(torch.tensor([list(prefix)], device=device), cache=cache)

    by_length = {}  # prompts of one length need no padding
    for i, (prompt, _, _) in enumerate(split.examples):
        by_length.setdefault(len(prompt), []).append(i)
    longest = max(len(prompt) + max(map(len, choices)) for prompt, choices, _ in split.examples)
    # fewer at once behind a long prefix: each choice gets a copy of its keys and values
    n_at_once = min(max(16384 // (len(prefix) + longest), 1), 16)

    most = max(len(choices) for _, choices, _ in split.examples)
    beta = torch.full((len(split), most), -torch.inf, dtype=torch.float64)
    for group in by_length.values():
        for start in range(0, len(group), n_at_once):
            ids = group[start : start + n_at_once]
            *inputs, _ = datasets.to_device(split.windows(ids), device)
            found = normalized(*choice_log_likelihoods(model, *inputs, prefix=cache))  # (len(ids), N)
            beta[ids, : found.size(1)] = found.cpu().double()
    return beta


# --- the command ---


def wilson(share, n):
    """Wilson's 95 % interval for a share of n items: (low, high)."""
    z = 1.96
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def read(args, names, model):
    """Return {name: Choices} of the files NAME.jsonl in --data."""
    if model.tokenizer is None:
        raise ValueError(f"{args.base} names no tokenizer")
    splits = {}
    for name in names:
        splits[name] = load_choices(args.data / f"{name}.jsonl", model.tokenizer, model.config.block_size)
    return splits


def learn(model, splits, ranked, args, seed, folder):
    """Train vectors, from ones or from --ia3, and rank by them; all of it is saved into folder.

    What folder has of it is not done again. Returns the share of splits[ranked] that is right. Raises ValueError if
    --out holds runs of other settings.
    """
    attach(model, None if args.ia3 is None else IA3.load(args.ia3, model))
    if args.lr is None:
        args.lr = default_lr(model)
    train_split = splits["train"] if args.k is None else draw_examples(splits["train"], args.k, seed)
    config = TrainConfig(
        steps=args.steps,
        lr=args.lr,
        batch_size=args.batch_size,
        seed=seed,
        schedule="linear",
        eval_interval=args.steps,
        out=str(folder),
        resume=True,
    )
    about = {name: getattr(args, name) for name in ("lr", "k", "steps", "batch_size", "losses")}
    about |= {"ranked": ranked, "fingerprint": fingerprint(model)}
    about["first_vectors"] = hash_vectors(dict(model.named_parameters()))
    about["data_hash"] = {name: split.data_hash()[:16] for name, split in splits.items()}
    about["seeds"] = seed if folder == Path(args.out) else {folder.name: seed}  # only seeds with folders can be added
    lab.open_folder(Path(args.out), about)

    if all((folder / name).exists() for name in ("ia3.npz", f"predictions-{ranked}.csv", "run.json")):
        share = read_share(folder / "run.json")
    else:
        train(model, {"train": train_split, "val": splits["val"]}, config, make_loss(args.losses.split(",")))
        how = {"lr": config.lr, "steps": config.steps, "seed": seed, "data_hash": train_split.data_hash()}
        model.ia3.save(folder / "ia3.npz", how)
        share = rank(model, splits[ranked], ranked, vars(args) | how, folder)
    print(f"seed {seed}: {share:.1%} of {ranked} right", flush=True)
    return share


def read_share(path):
    """The share that is right in a run.json that rank() wrote. Raises ValueError where it is something else."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["figures"]["accuracy"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not what this command wrote: remove it to rank again") from None


def rank(model, split, ranked, arguments, folder):
    """Rank split, which is called ranked, into folder's predictions and run.json. Returns the share that is right."""
    share = predict(model, split, folder / f"predictions-{ranked}.csv")
    figures = {"ranked": ranked, "n_items": len(split), "accuracy": share}
    write_run_json(folder / "run.json", "ranking.py", arguments, model, arguments.get("data_hash"), figures)
    return share


def predict(model, split, path):
    """Rank split's choices and write what was chosen to the CSV path. Returns the share that is right."""
    beta = scores(model.eval(), split)  # (examples, most choices)
    chosen = beta.argmax(-1)
    with disk.replace_file(path, text=True) as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["item", "gold", "chosen", *[f"log_likelihood_{n}" for n in range(beta.size(1))]])
        for item, (_, choices, label) in enumerate(split.examples):
            log_likelihoods = beta[item].tolist()[: len(choices)]
            blanks = [""] * (beta.size(1) - len(choices))
            writer.writerow([item, label, chosen[item].item(), *log_likelihoods, *blanks])
    return (chosen == split.labels()).double().mean().item()


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of train.jsonl, val.jsonl, test.jsonl")
    add("--base", default=lab.BASE, help="a checkpoint (default: data/base.pt)")
    add("--ia3", metavar="NPZ", help="vectors to start from instead of ones, or to evaluate")
    add("--evaluate", action="store_true", help="learn nothing: rank by --ia3, or by the base")
    add("--test", action="store_true", help="rank test.jsonl instead of val.jsonl")
    add("--losses", default="lm,ul,ln", help="which are summed (default: %(default)s)")
    add("--k", type=int, help="learn from so many examples, balanced by label (default: all)")
    add("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: 0.003, the paper's; 0.1 on a small GPT)")
    add("--batch-size", type=int, default=8, help="examples per step (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="each draws examples and their order (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda or cpu")
    add("--out", default="out/ranking", help="folder of the run (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.out:
        raise ValueError("the name of the output is empty")
    if len(set(args.seeds)) < len(args.seeds) or len(args.seeds) > 10:
        raise ValueError("--seeds takes at most ten numbers, each once")
    make_loss(args.losses.split(","))  # refuses other names before anything is read
    return args


def run(argv):
    args = parse(argv)
    device = common.pick_device(args.device)
    out = Path(args.out)
    ranked = "test" if args.test else "val"
    folders = {seed: out / f"seed-{seed}" for seed in args.seeds}
    if args.evaluate or (len(args.seeds) == 1 and not list(out.glob("seed-*"))):
        folders = {args.seeds[0]: out}
    if args.evaluate or not (out / "about.json").exists():  # else a training goes on, if its settings are the same
        for folder in (out, *folders.values()):
            for name in (f"predictions-{ranked}.csv", "ia3.npz", "last.pt", "run.json", "about.json"):
                if (folder / name).exists():
                    raise ValueError(f"{folder} holds another run's {name}: name another --out")

    model = common.load(args.base).to(device)
    if args.evaluate:
        splits = read(args, [ranked], model)
        if args.ia3 is not None:
            model.ia3 = IA3.load(args.ia3, model)
        shares = [rank(model, splits[ranked], ranked, vars(args), out)]
    else:
        splits = read(args, {"train", "val", ranked}, model)
        shares = [learn(model, splits, ranked, args, seed, folder) for seed, folder in folders.items()]

    n = len(splits[ranked])
    share = sum(shares) / len(shares)
    low, high = wilson(share, n)
    print(f"{ranked} accuracy: {share:.1%}, 95 % over {n} items {low:.1%} to {high:.1%}")
    if len(shares) > 1:
        _, low, high = lab.student(shares)
        print(f"95 % over {len(shares)} seeds {low:.1%} to {high:.1%}")
    return 0


def main(argv=None):
    return common.exit_status("ranking.py", run, argv, lab.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
