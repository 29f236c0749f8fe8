"""What tools/ reads, broken on purpose (tests/damage.py): Hugging Face's and PEFT's folders, GGUF, what is drawn."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file as save_safe
from test_gguf import make_model, write_gguf

import common
from conftest import make_gpt, make_ia3, make_llama_with_bpe
from tests import damage
from tools import convert, plot

PICTURES = 20  # damages of what is drawn: a picture takes a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One good file of every kind, all of one tiny base."""
    folder = tmp_path_factory.mktemp("good")
    model = make_gpt(n_layer=1, n_embd=8, block_size=8)
    common.save(model, folder / "base.pt")
    (folder / "run").mkdir()
    vectors = make_ia3(model)
    vectors.save(folder / "run/ia3.npz")
    convert.to_peft(vectors, folder / "adapter", "base.pt")
    model.ia3 = None
    (folder / "run/metrics.csv").write_text(
        "step,train_loss,val_loss,lr,tokens_per_second\n0,nan,2.0,0.1,0.0\n1,1.5,1.8,0.0,9.0\n"
    )
    convert.to_hf(model, folder / "hf")
    shutil.copytree(folder / "hf", folder / "safe")
    save_safe(torch.load(folder / "hf/pytorch_model.bin", weights_only=True), folder / "safe/model.safetensors")
    convert.to_hf(make_llama_with_bpe(n_layer=1, block_size=8), folder / "llama")
    weights = torch.load(folder / "llama/pytorch_model.bin", weights_only=True)
    (folder / "llama/pytorch_model.bin").unlink()
    save_safe(weights, folder / "llama/model-1.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (folder / "llama/model.safetensors.index.json").write_text(json.dumps(index))
    write_gguf(folder / "llama.gguf", make_llama_with_bpe(n_layer=1, block_size=8))
    quantized = make_model(n_embd=32, n_hidden=32)
    write_gguf(folder / "quantized.gguf", quantized, "Q4_1")
    make_ia3(convert.from_gguf(folder / "quantized.gguf")).save(folder / "quantized.npz")
    return folder


HF = "hf {folder}/%s --out {folder}/new/base.pt"
FROM_PEFT = "from-peft --base {folder}/base.pt --adapter {folder}/adapter --out {folder}/new/ia3.npz"
TO_GGUF = "to-gguf --gguf {folder}/quantized.gguf --ia3 {folder}/quantized.npz --out {folder}/new/merged.gguf"
READERS = {  # the file that is damaged: the command that reads it
    "hf/pytorch_model.bin": HF % "hf",
    "hf/config.json": HF % "hf",
    "safe/model.safetensors": HF % "safe",
    "llama/config.json": HF % "llama",
    "llama/tokenizer.json": HF % "llama",
    "llama/model.safetensors.index.json": HF % "llama",
    "adapter/adapter_model.safetensors": FROM_PEFT,
    "adapter/adapter_config.json": FROM_PEFT,
    "llama.gguf": "gguf {folder}/llama.gguf --out {folder}/new/base.pt",
    "quantized.gguf": TO_GGUF,
    "run/metrics.csv": "{folder}/run",
    "run/ia3.npz": "{folder}/run",
}


def read(name, folder):
    script = plot if name.startswith("run/") else convert
    return script.main(READERS[name].format(folder=folder).split())


def rewrite(path, dice):
    """damage.rewrite, the same of safetensors, and bytes of GGUF's header, where most of its meaning is."""
    if path.suffix == ".gguf":
        raw = bytearray(path.read_bytes())
        for _ in range(dice.randint(1, 4)):
            raw[dice.randrange(min(4000, len(raw)))] = dice.choice([0, 1, 255, dice.randrange(256)])
        path.write_bytes(raw)
        return True
    if path.suffix != ".safetensors":
        return damage.rewrite(path, dice)
    tensors = damage.damage_meaning(load_safe(path), dice)
    save_safe({name: t.contiguous() for name, t in tensors.items() if is_storable(t)}, path)
    return True


def is_storable(t):
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(folder, tmp_path, capsys, name):
    n = PICTURES if name.startswith("run/") else damage.DAMAGES
    damage.damage_and_read(folder, tmp_path / "work", name, partial(read, name), capsys, n, rewrite)


@pytest.mark.parametrize("name", READERS)
def test_no_code_of_a_file_runs(folder, tmp_path, capsys, name):
    damage.check_no_code_runs(folder, tmp_path / "work", name, partial(read, name), capsys)
