"""One run of fewshot.py: ask SmolLM2 a question, with examples before it or after learning from them, and score it.

fewshot.py holds the protocol and says what each of these is for; ranking.py has the scores and the losses.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import data as datasets
from data import prepare
from experiments import lab, ranking, rivals
from experiments.sites import attach_sites
from ia3 import attach
from train import TrainConfig, train

SETS = ("movies", "products", "tweets", "news")
TEMPLATES = {"source": prepare.SOURCE, "movies-ab": prepare.LETTERS}  # all other tasks: prepare.SENTIMENT
N_TEMPLATES = 3
CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
IM_START, IM_END = [1], [2]  # SmolLM2's <|im_start|> and <|im_end|>, which encode_ordinary would spell out
SYSTEM = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"  # from SmolLM2's chat template

BATCH_SIZE = 8
N_PROMPT = 16  # learned tokens of prompt tuning
LOSSES = {  # the losses of (IA)³'s runs that learn with some of ranking.LOSSES
    "ia3-lm": ("lm",),
    "ia3-ln": ("ln",),
    "ia3-lm-ul": ("lm", "ul"),
    "ia3-lm-ln": ("lm", "ln"),
}
OTHER_SITES = ("k,o,ff", "k,v,pre", "v,ff,x", "q,o,pre")  # fewshot_followup.py's, beside k,v,ff


def add_sites(model, sites):
    """attach_sites in the form of a rival."""
    return list(attach_sites(model, sites).parameters())


ADD = {  # how a method but (IA)³ is added: rivals.Method.add
    "full": rivals.add_full,
    "lora1": partial(rivals.add_lora_maps, r=1, names=("q_proj", "v_proj")),
    "lora4": partial(rivals.add_lora_maps, r=4, names=("q_proj", "v_proj")),
    "lora-all": partial(rivals.add_lora_maps, r=1),
    "prompt": partial(rivals.add_prompt_llama, n_prompt=N_PROMPT),
}
ADD |= {sites: partial(add_sites, sites=sites.split(",")) for sites in OTHER_SITES}
RIVALS = {  # fewshot.py's, and the rates to choose from
    "full": (1e-5, 3e-5, 1e-4),
    "lora4": (3e-4, 1e-3, 3e-3),
    "lora-all": (3e-4, 1e-3, 3e-3),
    "prompt": (1e-2, 3e-2, 1e-1),
}


# --- what there is to run ---


@dataclass(frozen=True)
class Settings:
    """The sizes of the experiment. The defaults are the protocol's."""

    base: str = str(lab.ROOT / "data/smollm2.pt")
    data: str = str(lab.ROOT / "data/sentiment")
    device: str = "cpu"
    dtype: str = "bfloat16"
    tasks: tuple = ("movies", "tweets", "news", "source", "movies-ab", "movies-flipped")
    seeds: tuple = (0, 1, 2, 3, 4)
    ks: tuple = (4, 16, 32, 64)
    k: int = 32  # of the primary comparison
    rate: float = 3e-3  # the paper's
    steps: int = 100
    n_source: int = 192  # labels of other sets in transfer
    items: int | None = None  # questions of a split; None: all


class Run(NamedTuple):
    """What is known of a run before it is made: results.csv's first columns.

    method: 'zero' (no examples), 'icl' (k examples in context), 'icl-other' (k of other sets in context), 'ia3' or one
    of LOSSES or ADD (learned from k examples), 'transfer' (learned from other sets, then from k examples).
    """

    split: str
    task: str
    method: str
    form: str = "plain"  # or "chat": how the question is put
    k: int = 0
    lr: float = 0.0
    steps: int = 0
    order: int = 0  # which order of the examples in context
    seed: int = 0  # which draw


@dataclass
class Result:
    """What a run found: results.csv's other columns."""

    accuracy: float
    diverged: int  # 1 where training did
    seconds: float


# --- sentences as token ids ---


class Sentence(NamedTuple):
    """A labelled sentence, put into each of the templates."""

    label: int
    prompts: list  # a text per template
    choices: list  # a list of texts per template


def read_task(folder, task, split):
    """Return the Sentences of a split. Raises OSError or ValueError for files that prepare.py did not write."""
    files = []
    for number in range(1, N_TEMPLATES + 1):
        path = Path(folder) / task / f"choices-{number}/{split}.jsonl"
        files.append([row for _, row in datasets.json_lines(path)])
    sentences = []
    for rows in zip(*files, strict=True):  # the same sentence in each template
        if len({(row["id"], row["label"]) for row in rows}) > 1:
            raise ValueError(f"{folder}/{task}: the templates' {split}.jsonl do not hold the same sentences")
        prompts = [row["prompt"] for row in rows]
        choices = [row["choices"] for row in rows]
        sentences.append(Sentence(rows[0]["label"], prompts, choices))
    return sentences


def content_free(task):
    """The Sentences of contextual calibration, which say nothing."""
    templates = TEMPLATES.get(task, prepare.SENTIMENT)
    choices = [choices for _, choices in templates]
    return [Sentence(0, [prompt.format(text) for prompt, _ in templates], choices) for text in CONTENT_FREE]


def draw(sentences, k, seed):
    """Draw k sentences, equally many per label. For one seed, the smaller draws begin the larger ones.

    Raises ValueError where k is not a multiple of the number of labels or a label has too few sentences.
    """
    n_labels = len(sentences[0].choices[0])
    if k < 1 or k % n_labels:
        raise ValueError(f"k must be a multiple of the {n_labels} labels, not {k}")
    n_each = k // n_labels
    rng = np.random.default_rng(seed)
    drawn = []  # per label
    for label in range(n_labels):
        own = [sentence for sentence in sentences if sentence.label == label]
        if len(own) < n_each:
            raise ValueError(f"there are fewer than {n_each} examples of a label")
        drawn.append([own[i] for i in rng.permutation(len(own))[:n_each]])
    return [of_label[i] for i in range(n_each) for of_label in drawn]  # the labels take turns


def ask(tokenizer, form, sentence, template):
    """A question as ranking has it: (prompt ids, [ids of each choice], label). ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("this base names no tokenizer")
    encode = tokenizer.encode_ordinary
    prompt = sentence.prompts[template]
    choices = sentence.choices[template]
    if form == "plain":
        return encode(prompt), [encode(choice) for choice in choices], sentence.label
    ids = IM_START + encode(f"user\n{prompt}") + IM_END + encode("\n")
    ids += IM_START + encode("assistant\n")
    return ids, [encode(choice.strip()) for choice in choices], sentence.label


def context(tokenizer, form, examples, template):
    """The ids before the question: the examples with their answers; a chat begins with the system's message."""
    encode = tokenizer.encode_ordinary
    ids = []
    if form == "chat":
        ids += IM_START + encode(SYSTEM) + IM_END + encode("\n")
    for sentence in examples:
        prompt, choices, label = ask(tokenizer, form, sentence, template)
        ids += prompt + choices[label]
        ids += encode("\n\n") if form == "plain" else IM_END + encode("\n")
    return ids


# --- scores ---


def score_template(model, sentences, template, form="plain", examples=(), soft=()):
    """β of every choice in one template, (sentences, N). Before each question stand the ids soft and the examples."""
    split = ranking.SharedPrompts([ask(model.tokenizer, form, sentence, template) for sentence in sentences])
    prefix = [*soft, *context(model.tokenizer, form, examples, template)]
    return ranking.scores(model, split, prefix)


def score_templates(model, sentences, form="plain", examples=(), soft=()):
    """score_template for every template: (templates, sentences, N) float64."""
    found = [score_template(model, sentences, t, form, examples, soft) for t in range(N_TEMPLATES)]
    return torch.stack(found).numpy()


def calibrated(beta, free):
    """Zhao et al. 2021, section 5: log(p / p_cf), p and p_cf normalized over the choices, p_cf a mean over free.

    beta: (templates, sentences, N); free: (templates, content-free sentences, N). Returns (templates, sentences, N),
    -inf where beta is: no such choice.
    """
    p = torch.from_numpy(beta).softmax(-1)
    p_cf = torch.from_numpy(free).softmax(-1).mean(1, keepdim=True)
    return np.where(np.isneginf(beta), -np.inf, (p.log() - p_cf.log()).numpy())


# --- the two floors: what the same labels give without touching the model ---


@torch.no_grad()
def prompt_ends(model, sentences):
    """What the head reads at the end of each prompt, (templates, sentences, n_embd) float64."""
    found = []
    for template in range(N_TEMPLATES):
        for sentence in sentences:
            prompt, _, _ = ask(model.tokenizer, "plain", sentence, template)
            idx = torch.tensor([prompt], device=model.lm_head.weight.device)
            found.append(model.hidden(idx)[0, -1].cpu())
    return torch.stack(found).double().view(N_TEMPLATES, len(sentences), -1)


def fit(x, labels, offset):
    """Softmax regression by L-BFGS: the W (N, d) and b (N,) of offset + W x + b with the least nats + |W|² / 2.

    x (m, d), offset (m, N), both float64. Without features (d = 0) it finds one bias per label.
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


def fit_biases(beta, labels, new_beta):
    """Answers to new questions, (questions,), from zero-shot scores and one bias per label.

    beta (k, N) and labels (k,): of the examples; new_beta (questions, N).
    """
    _, b = fit(torch.zeros(len(beta), 0, dtype=torch.float64), labels, beta)
    return (new_beta + b).argmax(-1)


def fit_probe(ends, labels, new_ends, n_labels):
    """Answers to new questions, (questions,), from logistic regression on standardized prompt_ends."""
    mean = ends.mean(0)
    deviation = ends.std(0) + 1e-6
    w, b = fit((ends - mean) / deviation, labels, torch.zeros(len(ends), n_labels, dtype=torch.float64))
    return ((new_ends - mean) / deviation @ w.T + b).argmax(-1)


def floors(model, sentences, beta, settings, task):
    """Both floors' answers for every K and draw: {'biases-K-seed' and 'probe-K-seed': (templates, sentences)}."""
    arrays = {}
    train_sentences = read_task(settings.data, task, "train")
    new_beta = torch.from_numpy(beta)
    new_ends = prompt_ends(model, sentences)
    for seed in settings.seeds:
        drawn = draw(train_sentences, max(settings.ks), seed)
        labels = torch.tensor([sentence.label for sentence in drawn])
        own_beta = torch.from_numpy(score_templates(model, drawn))
        own_ends = prompt_ends(model, drawn)
        for k in settings.ks:  # the smaller draws begin the larger ones
            biases = []
            probe = []
            for t in range(N_TEMPLATES):
                biases.append(fit_biases(own_beta[t, :k], labels[:k], new_beta[t]))
                probe.append(fit_probe(own_ends[t, :k], labels[:k], new_ends[t], beta.shape[-1]))
            arrays[f"biases-{k}-{seed}"] = torch.stack(biases).numpy()
            arrays[f"probe-{k}-{seed}"] = torch.stack(probe).numpy()
    return arrays


# --- learning ---


def pairs_to_learn(tokenizer, sentences, soft=()):
    """ranking.SharedPrompts of the sentences in all templates, each behind the ids soft."""
    pairs = []
    for sentence in sentences:
        for template in range(N_TEMPLATES):
            prompt, choices, label = ask(tokenizer, "plain", sentence, template)
            pairs.append(([*soft, *prompt], choices, label))
    return ranking.SharedPrompts(pairs)


def train_on(model, split, lr, steps, seed=0, losses=ranking.LOSSES, dtype="float32"):
    """Train what requires a gradient on SharedPrompts, with the paper's losses and schedule.

    dtype: bfloat16 is autocast for float32 weights; a base stored in bfloat16 needs none. Raises as train() does.
    """
    config = TrainConfig(
        steps=steps,
        lr=lr,
        seed=seed,
        dtype=dtype,
        batch_size=BATCH_SIZE,
        weight_decay=0.0,
        schedule="linear",
        eval_interval=steps,
        eval_windows=1,
    )
    # on a CPU and for texts this short, the backward pass of the fused attention kernel takes longer
    with sdpa_kernel(SDPBackend.MATH):
        train(model, {"train": split, "val": split}, config, ranking.make_loss(losses, ranking.choice_log_likelihoods))


# --- a run ---


def other_sets(settings, task):
    """The training sentences of the sentiment sets other than task."""
    sentences = []
    for name in SETS:
        if name != task:
            sentences += read_task(settings.data, name, "train")
    return sentences


def examples_in_context(settings, run):
    """The k examples before every question, in the run's order; none for a run that has none there."""
    if run.method == "icl":
        pool = read_task(settings.data, run.task, "train")
    elif run.method == "icl-other":
        pool = other_sets(settings, run.task)
    else:
        return []
    drawn = draw(pool, run.k, run.seed)
    order = np.random.default_rng((run.seed, run.order)).permutation(run.k)
    return [drawn[i] for i in order]


def soft_prompt(model, run):
    """The ids before every question that stand for a learned prompt; no other method has any."""
    n_words = model.config.vocab_size
    return list(range(n_words, n_words + N_PROMPT)) if run.method == "prompt" else []


def learned_model(settings, run):
    """The base after it has learned what the run says, if anything; and whether its training diverged."""
    dtype = getattr(torch, settings.dtype)  # in which it answers
    full = run.method == "full"
    held = torch.float32 if full else dtype  # in which it learns: steps of 1e-5 would vanish in bfloat16 weights
    model = common.load(settings.base, held).to(settings.device)
    if run.steps == 0:
        return model, False

    if run.method in ADD:
        rivals.attach(model, ADD[run.method])
        model.to(settings.device)
    else:
        attach(model)

    lessons = []  # one after the other
    if run.method == "transfer":
        lessons.append(draw(other_sets(settings, run.task), settings.n_source, run.seed))
    if run.k > 0:
        lessons.append(draw(read_task(settings.data, run.task, "train"), run.k, run.seed))
    losses = LOSSES.get(run.method, ranking.LOSSES)
    diverged = False
    for sentences in lessons:
        split = pairs_to_learn(model.tokenizer, sentences, soft_prompt(model, run))
        try:
            train_on(model, split, run.lr, run.steps, run.seed, losses, settings.dtype)
        except FloatingPointError:
            diverged = True
    if full:
        model.to(dtype)
    return model.eval(), diverged


def measure(settings, run):
    """Make one Run: learn from examples or put them into the context, then score a split.

    Returns its Result and its arrays: 'beta', (templates, sentences, N), and 'labels'; without training also 'free',
    the scores of the content-free sentences; for plain zero-shot also the floors' answers.
    """
    started = time.time()
    torch.manual_seed(run.seed)  # initial values, where they are random
    model, diverged = learned_model(settings, run)
    examples = examples_in_context(settings, run)
    sentences = read_task(settings.data, run.task, run.split)[: settings.items]
    beta = score_templates(model, sentences, run.form, examples, soft_prompt(model, run))
    beta = np.where(np.isnan(beta), -np.inf, beta)
    arrays = {"beta": beta, "labels": np.array([sentence.label for sentence in sentences])}
    if run.steps == 0:
        arrays["free"] = score_templates(model, content_free(run.task), run.form, examples)
    if run.method == "zero" and run.form == "plain":
        arrays |= floors(model, sentences, beta, settings, run.task)
    return Result(accuracy_of([right(arrays)]), int(diverged), time.time() - started), arrays


# --- statistics ---


def right(arrays, by=""):
    """Where a run's answers are right: (templates, sentences) bool.

    by: what they are calibrated by: 'free', content-free sentences; 'beta', the questions themselves without their
    labels (batch calibration: Zhou et al. 2023, arXiv:2309.17249); '', nothing.
    """
    beta = arrays["beta"]
    if by:
        beta = calibrated(beta, arrays[by])
    return beta.argmax(-1) == arrays["labels"]


def accuracy_of(draws):
    """The mean over draws of the median over templates. draws: a (templates, sentences) bool each."""
    return float(np.mean([np.median(found.mean(-1)) for found in draws]))
