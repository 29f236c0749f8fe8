"""Does a library do what the paper says on GPT-2? Its forward pass against the formulas, written out with hooks.

    PYTHONPATH=. python tests/oracles/paper.py      # every one of this project, PEFT and AdapterHub that is installed

AdapterHub needs an older transformers than PEFT's here, so it has an environment of its own:

    python -m venv hub && hub/bin/pip install -r requirements.txt adapters==1.3.0
    PYTHONPATH=. hub/bin/python tests/oracles/paper.py

Each library's vectors are set to the same random values, in float64, on the same small GPT-2 of transformers.
"""

import logging
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
from gpt2 import SIZES, make_batch, make_theirs

from ia3 import IA3, attach
from merge import merge
from tools.convert import from_hf
from tools.hf_gpt2 import published

C = SIZES["n_embd"]


def draw(*shape, seed):
    return 1 + 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


L_Q, L_K, L_V = (draw(SIZES["n_layer"], C, seed=seed) for seed in (1, 2, 3))
L_FF = draw(SIZES["n_layer"], 4 * C, seed=4)
ONES = torch.ones_like(L_Q)


def formula(l_k=L_K, l_ff_before_gelu=False):
    """Logits of section 3.3's formulas: hooks on transformers' GPT-2, and on no library of adapters."""
    model = make_theirs().double()
    for i, block in enumerate(model.transformer.h):
        scale = torch.cat([ONES[i], l_k[i], L_V[i]])
        block.attn.c_attn.register_forward_hook(lambda module, inputs, out, scale=scale: out * scale)
        if l_ff_before_gelu:
            block.mlp.c_fc.register_forward_hook(lambda module, inputs, out, l_ff=L_FF[i]: out * l_ff)
        else:
            block.mlp.c_proj.register_forward_pre_hook(lambda module, inputs, l_ff=L_FF[i]: (inputs[0] * l_ff,))
    return model(make_batch()[0]).logits


def row(what, a, b):
    print(f"    {what:62s} max |Δlogit| {(a - b).abs().max():.1e}")


def this_project():
    n = IA3(published("gpt2")).count()
    print(f"this project: {n:,} values on the 124M shape")
    with tempfile.TemporaryDirectory() as folder:
        make_theirs().save_pretrained(folder)
        model = from_hf(folder).double()
    vectors = attach(model).double()
    vectors.l_k.data, vectors.l_v.data, vectors.l_ff.data = L_K, L_V, L_FF
    logits = model(make_batch()[0])[0]
    row("against the paper's formula", logits, formula())
    row("merged against unmerged", merge(model)(make_batch()[0])[0], logits)


def peft():
    from peft import IA3Config, get_peft_model

    def wrap(model):
        return get_peft_model(model, IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True))

    big = wrap(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    n = sum(p.numel() for p in big.parameters() if p.requires_grad)
    print(f"PEFT {version('peft')}, its default targets: {n:,} values on the 124M shape")
    model = wrap(make_theirs()).double().eval()

    def fill(l_q):
        for i, block in enumerate(model.base_model.model.transformer.h):
            block.attn.c_attn.ia3_l["default"].data = torch.cat([l_q[i], L_K[i], L_V[i]]).unsqueeze(1)
            block.mlp.c_proj.ia3_l["default"].data = L_FF[i].unsqueeze(0)
        return model(make_batch()[0]).logits

    row("query part at ones, against the paper's formula", fill(ONES), formula())
    logits = fill(L_Q)
    row("query part free, against the paper's formula", logits, formula())
    row("query part free, against the formula with l_k ← l_q ⊙ l_k", logits, formula(L_Q * L_K))
    row("merged against unmerged", model.merge_and_unload()(make_batch()[0]).logits, logits)


def adapterhub():
    import adapters

    def wrap(model):
        adapters.init(model)
        model.add_adapter("task", config="ia3")
        model.train_adapter("task")
        return model

    big = wrap(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    n = sum(p.numel() for name, p in big.named_parameters() if "lora_B" in name)
    print(f"AdapterHub (adapters {version('adapters')}): {n:,} values on the 124M shape")
    model = wrap(make_theirs()).double().eval()
    for i, block in enumerate(model.transformer.h):
        block.attn.c_attn.loras["task"].lora_B.data = torch.cat([L_K[i], L_V[i]]).unsqueeze(1)
        block.mlp.c_fc.loras["task"].lora_B.data = L_FF[i].unsqueeze(1)
    logits = model(make_batch()[0]).logits
    row("against the paper's formula", logits, formula())
    row("against the formula with l_ff before the GELU", logits, formula(l_ff_before_gelu=True))
    model.merge_adapter("task")
    row("merged against unmerged", model(make_batch()[0]).logits, logits)
    same = torch.equal(
        model.transformer.h[0].attn.c_attn.bias, make_theirs().double().transformer.h[0].attn.c_attn.bias
    )
    print(f"    its merge {'leaves' if same else 'scales'} c_attn's bias{' as it was' if same else ''}")


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        this_project()
        for package, measure in (("peft", peft), ("adapters", adapterhub)):
            try:
                version(package)
            except PackageNotFoundError:
                print(f"{package}: not installed here")
                continue
            measure()


if __name__ == "__main__":
    main()
