"""One run of fewshot.py: sentences as token ids, examples in a context, what learns from them, and what it scores.

fewshot.py holds the protocol, and says what each of these is for.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data as datasets
from data import prepare
from experiments import ranking, rivals
from ia3 import attach
from model import GPT
from train import TrainConfig, train

SETS = ("movies", "products", "tweets", "news")
BATCH_SIZE = 8
N_PROMPT = 16  # learned tokens of prompt tuning
RIVALS = {  # how to add it, the rates to choose from
    "full": (rivals.add_full, (1e-5, 3e-5, 1e-4)),
    "lora4": (partial(rivals.add_lora_llama, r=4, names=("q_proj", "v_proj")), (3e-4, 1e-3, 3e-3)),
    "lora-all": (partial(rivals.add_lora_all, r=1), (3e-4, 1e-3, 3e-3)),
    "prompt": (partial(rivals.add_prompt_llama, n_prompt=N_PROMPT), (1e-2, 3e-2, 1e-1)),
}
LABELS = {"source": prepare.SOURCE, "movies-ab": prepare.LETTERS}  # the other tasks: SENTIMENT
CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 4
IM_START, IM_END = [1], [2]  # SmolLM2's <|im_start|> and <|im_end|>, which encode_ordinary would spell out
SYSTEM = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the chat template's own


# --- sentences as token ids ---


def read_task(folder, task, split):
    """Return the sentences of a split, dicts: label, and by template prompts (texts) and choices (lists of texts)."""
    files = []
    for number in (1, 2, 3):
        path = Path(folder) / task / f"choices-{number}/{split}.jsonl"
        files.append([row for _, row in datasets.json_lines(path)])
    rows = []
    for versions in zip(*files, strict=True):
        if len({(row["id"], row["label"]) for row in versions}) > 1:
            raise ValueError(f"{folder}/{task}: the templates' {split}.jsonl do not hold the same sentences")
        prompts = [row["prompt"] for row in versions]
        choices = [row["choices"] for row in versions]
        rows.append({"label": versions[0]["label"], "prompts": prompts, "choices": choices})
    return rows


def content_free(task):
    """Contextual calibration's sentences, which say nothing, as read_task has a sentence."""
    templates = LABELS.get(task, prepare.SENTIMENT)
    rows = []
    for text in CONTENT_FREE:
        prompts = [prompt.format(text) for prompt, _ in templates]
        rows.append({"label": 0, "prompts": prompts, "choices": [choices for _, choices in templates]})
    return rows


def draw(rows, k, seed):
    """k of rows, as many of each label. Of one seed the smaller draws begin the larger.

    Raises ValueError where k is no multiple of the number of labels, or there are too few examples of one.
    """
    n_labels = len(rows[0]["choices"][0])
    if k < 1 or k % n_labels:
        raise ValueError(f"k must be a multiple of the {n_labels} labels, not {k}")
    dice = np.random.default_rng(seed)
    piles = []
    for label in range(n_labels):
        pile = [row for row in rows if row["label"] == label]
        piles.append([pile[i] for i in dice.permutation(len(pile))[: k // n_labels]])
    if min(map(len, piles)) < k // n_labels:
        raise ValueError(f"there are fewer than {k // n_labels} examples of a label")
    return [pile[i] for i in range(k // n_labels) for pile in piles]


def ask(tokenizer, form, row, template):
    """A sentence as (prompt ids, [ids of each choice], label), as ranking has it. ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("this base names no tokenizer")
    prompt, choices = row["prompts"][template], row["choices"][template]
    encode = tokenizer.encode_ordinary
    if form == "plain":
        return encode(prompt), [encode(choice) for choice in choices], row["label"]
    user = IM_START + encode(f"user\n{prompt}") + IM_END + encode("\n")
    ids = user + IM_START + encode("assistant\n")
    return ids, [encode(choice.strip()) for choice in choices], row["label"]


def context(tokenizer, form, shots, template):
    """The ids before the question: examples with their answers, and in a chat the system's message before them."""
    encode = tokenizer.encode_ordinary
    ids = [] if form == "plain" else IM_START + encode(SYSTEM) + IM_END + encode("\n")
    for row in shots:
        prompt, choices, label = ask(tokenizer, form, row, template)
        ids += prompt + choices[label]
        ids += encode("\n\n") if form == "plain" else IM_END + encode("\n")
    return ids


# --- prompts of different lengths in a batch, each read once for all of its choices, in training too ---


class SharedPrompts(ranking.Choices):
    """Choices for a Llama. Prompts end together: what is shorter stands further right, behind padding that is not seen.

    That moves a text's positions, which is nothing to rotary ones: only distances count (a GPT-2 would mind).
    """

    def windows(self, ids):
        """The examples ids: prompts (B, P), choices (B, N, L) with -1 behind, padding (B,), labels (B,), all long."""
        rows = [self.examples[i] for i in ids]
        n = max(len(choices) for _, choices, _ in rows)
        longest = max(len(choice) for _, choices, _ in rows for choice in choices)
        end = max(len(prompt) for prompt, _, _ in rows)
        padding = torch.tensor([end - len(prompt) for prompt, _, _ in rows])
        x = torch.zeros(len(rows), end, dtype=torch.long)
        y = torch.full((len(rows), n, longest), -1)
        for row, (prompt, choices, _) in enumerate(rows):
            x[row, padding[row] :] = torch.tensor(prompt)
            for i, choice in enumerate(choices):
                y[row, i, : len(choice)] = torch.tensor(choice)
        return x, y, padding, torch.tensor([label for _, _, label in rows])


class PromptCache:
    """What a Llama's hidden() takes as a cache: first the prompts go in, then the choices. Gradients pass through."""

    def __init__(self, model, padding):
        if isinstance(model, GPT):
            raise ValueError("this wants a Llama: padding before a prompt would move a GPT-2's positions")
        self.layers = [PromptLayer(padding) for _ in range(model.config.n_layer)]

    def start(self, _ia3, _task_ids):
        return self.layers[0].length


class PromptLayer:
    def __init__(self, padding):
        self.padding = padding  # (B,)
        self.length = 0

    def append(self, k, v):
        """As sample.LayerCache's. k, v: (B, n_kv_head, P, d_head) of the prompts, then (B·N, …, T, …) of choices."""
        T = k.size(2)
        own = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
        if self.length == 0:
            self.k, self.v, self.length = k, v, T
            real = torch.arange(T, device=k.device) >= self.padding.unsqueeze(1)  # (B, P)
            self.real = real[:, None, None]  # (B, 1, 1, P)
            return k, v, own & self.real | torch.eye(T, dtype=torch.bool, device=k.device)  # padding sees itself
        n = k.size(0) // self.k.size(0)
        before = self.real.repeat_interleave(n, 0).expand(-1, -1, T, -1)  # (B·N, 1, T, P)
        seen = torch.cat((before, own.expand(len(before), 1, T, T)), -1)  # (B·N, 1, T, P + T)
        k = torch.cat((self.k.repeat_interleave(n, 0), k), 2)
        return k, torch.cat((self.v.repeat_interleave(n, 0), v), 2), seen


def choice_log_likelihoods(model, prompts, choices, padding, task_ids=None):
    """As ranking.token_log_likelihoods, of SharedPrompts' windows: (B, N, L) nats, and where there is a token.

    task_ids (B,) long: each prompt's task, where the model's vectors are stacked.
    """
    cache = PromptCache(model, padding)
    end = model.hidden(prompts, task_ids, cache)[:, -1:]  # (B, 1, n_embd), which predicts a choice's first token
    y = choices.flatten(0, 1)  # (B·N, L)
    hidden = end.repeat_interleave(choices.size(1), 0)
    if y.size(1) > 1:
        if task_ids is not None:
            task_ids = task_ids.repeat_interleave(choices.size(1))
        rest = model.hidden(y[:, :-1].clamp(min=0), task_ids, cache)
        hidden = torch.cat((hidden, rest), 1)  # (B·N, L, n_embd)
    log_p, there = ranking.log_likelihoods(model, hidden, y)
    return log_p.view_as(choices), there.view_as(choices)


# --- scores ---


@torch.no_grad()
def scores(model, split, task_ids=None):
    """ranking.scores of SharedPrompts without a prefix: (len(split), most choices). task_ids: (len(split),) or None."""
    order = sorted(range(len(split)), key=lambda i: len(split.examples[i][0]))  # little padding
    beta = torch.full((len(split), max(len(choices) for _, choices, _ in split.examples)), -torch.inf)
    for i in range(0, len(split), 32):
        ids = order[i : i + 32]
        prompts, choices, padding = datasets.to_device(split.windows(ids)[:3], model.lm_head.weight.device)
        tasks = None if task_ids is None else task_ids[ids]
        found = ranking.normalized(*choice_log_likelihoods(model, prompts, choices, padding, tasks))
        beta = beta.to(found.dtype)
        beta[ids, : found.size(1)] = found.cpu()
    return beta


def score_in(model, rows, template, form="plain", shots=(), soft=()):
    """β of rows in one template, (rows, N), behind the examples shots and, first, the ids soft."""
    examples = [ask(model.tokenizer, form, row, template) for row in rows]
    prefix = [*soft, *context(model.tokenizer, form, shots, template)]
    if prefix:
        return ranking.scores(model, ranking.Choices(examples), prefix)
    return scores(model, SharedPrompts(examples))


def score(model, rows, form="plain", shots=(), soft=()):
    """score_in of all templates: (templates, rows, N)."""
    return torch.stack([score_in(model, rows, t, form, shots, soft) for t in range(3)]).double().numpy()


@torch.no_grad()
def read(model, rows):
    """What the head reads at the end of each prompt, (templates, rows, n_embd)."""
    found = []
    for t in range(3):
        prompts = [ask(model.tokenizer, "plain", row, t)[0] for row in rows]
        found.append(
            [model.hidden(torch.tensor([p], device=model.lm_head.weight.device))[0, -1].cpu() for p in prompts]
        )
    return torch.stack([torch.stack(ends) for ends in found]).double()


def calibrated(beta, free):
    """Zhao et al. 2021, section 4: log(p / p_cf), p and p_cf normalized over the choices, p_cf a mean over free.

    beta: (templates, rows, N); free: (templates, content-free sentences, N). Returns (templates, rows, N).
    """

    def softmax(b):
        p = np.exp(b - b.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)

    return np.log(softmax(beta)) - np.log(softmax(free).mean(1, keepdims=True))


def fit(x, labels, offset):
    """Softmax regression by L-BFGS: the W (N, d) and b (N,) of offset + W x + b, of least nats + |W|² / 2.

    x (m, d), offset (m, N) float64. Without features (d = 0) that is one bias a label.
    """
    w = torch.zeros(offset.size(1), x.size(1), dtype=torch.float64, requires_grad=True)
    b = torch.zeros(offset.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(offset + x @ w.T + b, labels, reduction="sum") + w.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach(), b.detach()


def floors(model, train_rows, rows, beta, settings):
    """Predictions of what learns least, {name: (templates, rows)}: a bias a label, and logistic regression."""
    arrays = {}
    ends = read(model, rows)
    for seed in settings["seeds"]:
        drawn = draw(train_rows, max(settings["ks"]), seed)
        labels = torch.tensor([row["label"] for row in drawn])
        seen, seen_ends = torch.from_numpy(score(model, drawn)), read(model, drawn)
        for k in settings["ks"]:  # the smaller draws begin the larger
            biased, probed = [], []
            for t in range(3):
                _, b = fit(torch.zeros(k, 0, dtype=torch.float64), labels[:k], seen[t, :k])
                biased.append((torch.from_numpy(beta[t]) + b).argmax(-1))
                mean, deviation = seen_ends[t, :k].mean(0), seen_ends[t, :k].std(0) + 1e-6
                w, b = fit((seen_ends[t, :k] - mean) / deviation, labels[:k], torch.zeros_like(seen[t, :k]))
                probed.append(((ends[t] - mean) / deviation @ w.T + b).argmax(-1))
            arrays[f"biases-{k}-{seed}"] = torch.stack(biased).numpy()
            arrays[f"probe-{k}-{seed}"] = torch.stack(probed).numpy()
    return arrays


# --- a run ---


def other_sets(settings, task):
    """The training sentences of the sentiment sets that task is not."""
    return [row for name in SETS if name != task for row in read_task(settings["data"], name, "train")]


def train_on(model, split, lr, steps, seed=0, losses=ranking.LOSSES, dtype="float32"):
    """Train what requires a gradient on SharedPrompts, by the paper's losses and schedule.

    dtype: bfloat16 is autocast for float32 weights; a base that is held in it needs none. Raises as train() does.
    """
    settings = {"batch_size": BATCH_SIZE, "weight_decay": 0.0, "schedule": "linear", "eval_interval": steps}
    config = TrainConfig(steps=steps, lr=lr, seed=seed, eval_windows=1, dtype=dtype, **settings)
    # on a CPU and so short a text, going back through the fused kernel takes longer
    with sdpa_kernel(SDPBackend.MATH):
        train(model, {"train": split, "val": split}, config, ranking.make_loss(losses, choice_log_likelihoods))


def pairs_to_learn(tokenizer, rows, soft=()):
    """SharedPrompts of rows in all templates, each behind the ids soft."""
    pairs = [ask(tokenizer, "plain", row, t) for row in rows for t in range(3)]
    return SharedPrompts([([*soft, *prompt], choices, label) for prompt, choices, label in pairs])


def learn(model, rows, lr, steps, seed, losses=ranking.LOSSES, soft=(), dtype="float32"):
    """train_on rows in all templates, each behind the ids soft. Returns 1 where that diverged, else 0."""
    try:
        train_on(model, pairs_to_learn(model.tokenizer, rows, soft), lr, steps, seed, losses, dtype)
    except FloatingPointError:
        return 1
    return 0


def measure(settings, split, task, method, form, k, lr, steps, order, seed):
    """One run: learn or put examples into the context, then score a split. Returns its results and arrays."""
    started = time.time()
    torch.manual_seed(seed)  # initial values, where they are random
    dtype = getattr(torch, settings["dtype"])
    held = torch.float32 if method == "full" else dtype  # steps of 1e-5 would vanish in bfloat16 weights
    model = common.load(settings["base"], held).to(settings["device"])
    train_rows = read_task(settings["data"], task, "train")
    rows = read_task(settings["data"], task, split)[: settings["items"]]
    diverged = 0
    shots = []
    soft = []
    if method in ("icl", "icl-other"):
        pool = train_rows if method == "icl" else other_sets(settings, task)
        drawn = draw(pool, k, seed)
        shots = [drawn[i] for i in np.random.default_rng((seed, order)).permutation(k)]
    elif method == "transfer":
        attach(model)
        diverged = learn(model, draw(other_sets(settings, task), settings["n_source"], seed), lr, steps, seed)
        if k:
            diverged |= learn(model, draw(train_rows, k, seed), lr, steps, seed)
    elif method in RIVALS:
        rivals.attach(model, RIVALS[method][0])
        soft = range(model.config.vocab_size, model.config.vocab_size + N_PROMPT) if method == "prompt" else []
        model.to(settings["device"])
        diverged = learn(model, draw(train_rows, k, seed), lr, steps, seed, soft=soft, dtype=settings["dtype"])
    elif method != "zero":  # ia3, ia3-lm, ia3-lm-ul, ...
        attach(model)
        losses = method.split("-")[1:] or ranking.LOSSES
        diverged = learn(model, draw(train_rows, k, seed), lr, steps, seed, losses)
    model.eval()
    if method == "full":
        model.to(dtype)
    beta = np.nan_to_num(score(model, rows, form, shots, soft), nan=-np.inf)
    arrays = {"beta": beta, "labels": np.array([row["label"] for row in rows])}
    if method in ("zero", "icl", "icl-other"):
        arrays["free"] = score(model, content_free(task), form, shots)
    if method == "zero" and form == "plain":
        arrays |= floors(model, train_rows, rows, beta, settings)
    return {"accuracy": accuracy_of([right(arrays)]), "diverged": diverged, "seconds": time.time() - started}, arrays


# --- statistics ---


def right(run, by=None):
    """Where a run's predictions are right: (templates, items) bool.

    by: what they are calibrated by: 'free', content-free sentences; 'beta', the questions themselves, without their
    labels (batch calibration: Zhou et al. 2023, arXiv:2309.17249); None: nothing.
    """
    beta = run["beta"] if by is None else calibrated(run["beta"], run[by])
    return beta.argmax(-1) == run["labels"]


def accuracy_of(draws):
    """draws: a (templates, items) bool each. The mean over draws of the median over templates."""
    return float(np.mean([np.median(found.mean(-1)) for found in draws]))
