"""What PEFT's (IA)³ does that its users would not guess, and what nanoIA3 does on the same input.

    python -m tests.oracles.surprises      # runs every row on the installed PEFT and prints a Markdown table

Both sides run on the same small random LLaMA of transformers'. Figures that vary from one processor to another are
printed as words.
"""

import logging
import sys
import tempfile
import warnings
from importlib.metadata import version

import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model

import train
from ia3 import IA3, attach, stack
from merge import merge
from tools.convert import from_hf

N_EMBD = 32
N_HIDDEN = 48
SIZES = {"vocab_size": 61, "hidden_size": N_EMBD, "intermediate_size": N_HIDDEN, "num_attention_heads": 4}
ENDS = {"bos_token_id": 60, "eos_token_id": 60}


def make_theirs(n_layer=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=n_layer, tie_word_embeddings=True, **SIZES, **ENDS)
    return transformers.LlamaForCausalLM(config).eval()


def make_ours(theirs):
    """Read transformers' model as tools.convert does, from the folder that transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return from_hf(folder)


def make_batch(rows, seed=0):
    return torch.randint(0, SIZES["vocab_size"], (rows, 16), generator=torch.Generator().manual_seed(seed))


def wrap(base, name="default", **settings):
    return get_peft_model(base, IA3Config(task_type="CAUSAL_LM", **settings), adapter_name=name).eval()


def fill(peft, name, value):
    """Set all vectors of one adapter to one number."""
    for key, p in peft.named_parameters():
        if key.endswith(f"ia3_l.{name}"):
            p.data.fill_(value)


def width(peft, name, module="down_proj"):
    """The number of entries of an adapter's vector at a module of the first layer."""
    return next(p.numel() for key, p in peft.named_parameters() if key.endswith(f"{module}.ia3_l.{name}"))


def refusal(call, *args):
    """The class of the exception that call(*args) raises, or 'accepted'."""
    try:
        call(*args)
    except ValueError as e:
        return f"refused ({type(e).__name__})"
    return "accepted"


def warned(caught):
    n = len([w for w in caught if w.category is UserWarning])  # the others are deprecations
    return "without a warning" if n == 0 else "with a warning"


# --- the rows: each returns (what is done, what PEFT does, what nanoIA3 does) ---


def adapter_names():
    idx = make_batch(2)
    peft = wrap(make_theirs(), "one")
    peft.add_adapter("two", peft.peft_config["one"])
    fill(peft, "two", 2.0)
    logits = {}
    for name in ("two", "one"):  # one stays active
        peft.set_adapter(name)
        logits[name] = peft(idx).logits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mixed = peft(idx, adapter_names=["one", "two"]).logits
    got = [name for name in logits if torch.equal(mixed[1], logits[name][1])]

    ours = make_ours(make_theirs())
    two = IA3(ours.config)
    for p in two.parameters():
        p.data.fill_(2.0)
    attach(ours, two)
    alone = ours(idx)[0]
    attach(ours, stack([None, two]))
    same = torch.equal(ours(idx, task_ids=torch.tensor([0, 1]))[0][1], alone[1])
    what = 'A batch of two rows with `adapter_names=["one", "two"]` (here `task_ids`). Which task does row 2 get?'
    return what, f"{' and '.join(got)}, {warned(caught)}", "two, bit for bit" if same else "another"


def feedforward_as_a_string():
    targets = ["k_proj", "v_proj", "down_proj"]
    plain = width(wrap(make_theirs(), target_modules=targets, feedforward_modules="down_proj"), "default")
    pattern = width(wrap(make_theirs(), target_modules=targets, feedforward_modules=".*down_proj"), "default")
    config = make_ours(make_theirs()).config
    what = (
        f'`feedforward_modules="down_proj"` (here `sites="ff"`). How long is the vector at `down_proj`, '
        f"which has {N_HIDDEN} inputs and {N_EMBD} outputs?"
    )
    theirs = f'{plain}: the string must match the whole path, and `".*down_proj"` gives {pattern}'
    return what, theirs, refusal(IA3, config, "ff")


def feedforward_of_a_second_adapter():
    targets = ["k_proj", "v_proj", "down_proj"]
    peft = wrap(make_theirs(), "one", target_modules=targets, feedforward_modules=[])
    two = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=["down_proj"])
    peft.add_adapter("two", two)
    ours = make_ours(make_theirs())
    stacked = stack([IA3(ours.config, ["k", "v"]), IA3(ours.config)])
    what = (
        'A first adapter without `feedforward_modules`, then a second one with `["down_proj"]`. How long is the '
        "second's vector there?"
    )
    return what, f"{width(peft, 'two')}: the first adapter's choice holds for both", str(stacked.l_ff.size(-1))


def share(n, total):
    """A share in words, since roundings differ from one processor to another."""
    if n == 0:
        return "none"
    if n == total:
        return "all"
    return "about half" if 0.3 < n / total < 0.7 else "some"


def moved(vectors):
    """Where the entries stand after training from ones."""
    entries = torch.cat([p.detach().float().flatten() for p in vectors])
    below = share((entries < 1).sum(), len(entries))
    above = share((entries > 1).sum(), len(entries))
    return f"below 1: {below}, above 1: {above}"


def train_ten_steps(vectors, loss_of, lr):
    vectors = list(vectors)
    optimizer = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(make_batch(8, seed=step)).backward()
        optimizer.step()
    return moved(vectors)


def vectors_in_bfloat16(lr):
    peft = wrap(make_theirs()).bfloat16()
    trained = [p for p in peft.parameters() if p.requires_grad]
    theirs = train_ten_steps(trained, lambda idx: peft(idx, labels=idx).loss, lr)

    ours = make_ours(make_theirs())
    attach(ours).bfloat16()
    refused = refusal(train.train, ours, {}, train.TrainConfig(steps=10, lr=lr))
    vectors = attach(ours)  # float32 again
    in_float32 = train_ten_steps(vectors.parameters(), lambda idx: ours(idx[:, :-1], idx[:, 1:])[1], lr)
    what = f"Vectors cast to bfloat16, ten steps of AdamW at {lr:g}. Where are their entries, which began at 1?"
    return what, theirs, f"{refused}; in float32 {in_float32}"


def deeper_adapter():
    with tempfile.TemporaryDirectory() as folder:
        wrap(make_theirs(n_layer=4)).save_pretrained(folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            peft = PeftModel.from_pretrained(make_theirs(), folder)
        layers = {key.split("layers.")[1].split(".")[0] for key, _ in peft.named_parameters() if "ia3_l" in key}

        deeper = make_ours(make_theirs(n_layer=4))
        attach(deeper).save(f"{folder}/ia3.npz")
        refused = refusal(IA3.load, f"{folder}/ia3.npz", make_ours(make_theirs()))
    what = "An adapter of a model of 4 layers, loaded on a model of 2"
    return what, f"loads the first {len(layers)} layers' vectors, {warned(caught)}", refused


def mean_of_two_tasks():
    peft = wrap(make_theirs(), "one", target_modules=["k_proj"], feedforward_modules=[])
    two = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    peft.add_adapter("two", two)
    fill(peft, "one", 3.0)
    peft.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean")
    mean = next(p for key, p in peft.named_parameters() if key.endswith("k_proj.ia3_l.mean"))

    ours = make_ours(make_theirs())
    one, two = IA3(ours.config, ["k"]), IA3(ours.config, ["v"])
    one.l_k.data.fill_(3.0)
    l_k = stack([one, two]).l_k.mean(0)
    what = "The mean of a task with l_k = 3 and one that does not scale keys (`add_weighted_adapter`, here `stack`)"
    return what, f"l_k = {mean.max():g}: the missing vector counts 0", f"l_k = {l_k.max():g}: it counts 1"


def experts():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(num_hidden_layers=1, num_key_value_heads=2, num_local_experts=4, **SIZES)
    mixtral = transformers.MixtralForCausalLM(config)
    refused = refusal(make_ours, mixtral)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = wrap(mixtral)
    modules = [key.split(".ia3_l")[0].split(".")[-1] for key, _ in peft.named_parameters() if "ia3_l" in key]
    what = "Mixtral with the default targets. Which modules of a layer get a vector?"
    return what, f"{', '.join(modules)}: no expert does, {warned(caught)}", refused


def encoder():
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=1, **SIZES))
    refused = refusal(make_ours, bert)
    peft = get_peft_model(bert, IA3Config())
    paths = [key.split("layer.0.")[1].split(".ia3_l")[0] for key, _ in peft.named_parameters() if "ia3_l" in key]
    what = "BERT with the default targets. Which modules of a layer get a vector?"
    return what, f"{', '.join(paths)}: `output.dense` also matches the attention's", refused


def disabled_once():
    idx = make_batch(2)
    peft = wrap(make_theirs())
    fill(peft, "default", 2.0)
    peft.merge_adapter()
    with peft.disable_adapter():
        peft(idx)
    k_proj = peft.base_model.model.model.layers[0].self_attn.k_proj

    ours = make_ours(make_theirs())
    for p in attach(ours).parameters():
        p.data.fill_(2.0)
    merged = merge(ours)
    before = merged(idx)[0]
    ours.ia3 = None
    ours(idx)
    same = torch.equal(merged(idx)[0], before)
    what = "One forward pass of a merged model under `disable_adapter()` (here `ia3 = None`). Is it merged afterwards?"
    return what, "yes" if k_proj.merged else "no: it is unmerged and stays so", "yes: it is a copy" if same else "no"


def tied_head():
    peft = wrap(make_theirs(), target_modules=["lm_head"], feedforward_modules=[])
    fill(peft, "default", 2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embedding = peft.merge_and_unload().get_input_embeddings().weight
    factor = (embedding / make_theirs().get_input_embeddings().weight).mean()

    ours = make_ours(make_theirs())
    attach(ours)
    refused = refusal(IA3, ours.config, ["lm_head"])
    what = "A tied head as the target, its vector all 2, merged. What becomes of the embedding?"
    return what, f"it is {factor:g} times as large, {warned(caught)}", f"{refused}: no such site"


def main():
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rows = [
        adapter_names(),
        feedforward_as_a_string(),
        feedforward_of_a_second_adapter(),
        vectors_in_bfloat16(3e-3),
        vectors_in_bfloat16(1e-3),
        mean_of_two_tasks(),
        deeper_adapter(),
        disabled_once(),
        tied_head(),
        experts(),
        encoder(),
    ]
    print(f"| what is done | PEFT {version('peft')} | nanoIA3 |")
    print("| --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
