"""What convert.py reads and refuses, the fetching of published weights from a small local server, and the count."""

import contextlib
import http.server
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import make_gpt, make_ia3, make_idx
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file as save_safe

import convert
import train
from ia3 import IA3
from model import GPT

TINY = {"vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with base.pt, hf/, ia3.npz, adapter/ and a text, all of one random tiny GPT."""
    monkeypatch.chdir(tmp_path)
    model = make_gpt()
    model.save("base.pt")
    convert.save_hf(model, "hf")
    vectors = make_ia3(model)
    vectors.save("ia3.npz")
    convert.save_peft(vectors, "adapter", "base.pt")
    Path("text").mkdir()
    for split in ("train", "val"):
        Path(f"text/{split}.txt").write_text("And God saw the light, that it was good. " * 3)
    return tmp_path


def check(folder, capsys, flags, message, script=convert):
    """One line that holds message, status 2, and not a byte of the folder changed. Returns the line."""
    before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    capsys.readouterr()
    assert script.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{script.__name__}.py: ") and err.count("\n") == 1 and not out, err
    assert message in err, err
    assert {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")} == before
    return err


def change_json(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


def change_weights(**changes):
    """Put tensors into hf/pytorch_model.bin, or take them out (None); __ stands for a dot."""
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    for name, t in changes.items():
        name = "transformer." + name.replace("__", ".")
        weights.pop(name, None)
        if t is not None:
            weights[name] = t
    torch.save(weights, "hf/pytorch_model.bin")


def change_safe(path, **changes):
    """The same for a .safetensors file, under the names that PEFT uses."""
    tensors = load_safe(path)
    for name, t in changes.items():
        name = "base_model.model.transformer." + name.replace("__", ".")
        tensors.pop(name, None)
        if t is not None:
            tensors[name] = t
    save_safe(tensors, path, {"format": "pt"})


def cut(path, share=0.5):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: int(share * len(whole))])


# --- folders and files ---


@pytest.mark.parametrize("source", ["hf", "hf/pytorch_model.bin", Path("hf")])
def test_folders_and_files_hold_the_same_model(folder, source):
    model = GPT.from_pretrained(source)
    expected = make_gpt()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in expected.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight  # tied
    assert model.config == expected.config and model.tokenizer == "bytes" and not model.training
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())


def test_safetensors_is_read_and_goes_before_the_other_file(folder):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    save_safe({name: t.contiguous() + 1 for name, t in weights.items()}, "hf/model.safetensors")
    for source in ("hf", "hf/model.safetensors"):
        found = GPT.from_pretrained(source).transformer.wpe.weight
        assert torch.equal(found, make_gpt().transformer.wpe.weight + 1)


def test_without_the_safetensors_package(folder, capsys, monkeypatch):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    save_safe({name: t.contiguous() + 1 for name, t in weights.items()}, "hf/model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert torch.equal(GPT.from_pretrained("hf").lm_head.weight, make_gpt().lm_head.weight)  # the other file
    os.remove("hf/pytorch_model.bin")
    check(folder, capsys, "count hf".split(), "pip install safetensors")
    check(folder, capsys, "to-peft --base base.pt --ia3 ia3.npz --out new".split(), "pip install safetensors")
    check(folder, capsys, "from-peft --base base.pt --adapter adapter".split(), "pip install safetensors")


def test_neither_transformers_nor_peft_is_imported(folder):
    for script in ("convert", "model", "merge", "ia3"):
        assert "import transformers" not in Path(convert.__file__).with_name(f"{script}.py").read_text()
        assert "import peft" not in Path(convert.__file__).with_name(f"{script}.py").read_text()


def test_a_nanogpt_checkpoint_with_a_compiled_models_names_and_masks(folder):
    checkpoint = torch.load("base.pt", weights_only=True)
    weights = {f"_orig_mod.{name}": t for name, t in checkpoint["model"].items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    checkpoint = {"model": weights, "model_args": checkpoint["model_args"], "iter_num": 5, "config": {"seed": 1}}
    torch.save(checkpoint | {"best_val_loss": torch.tensor(1.5), "optimizer": {}}, "ckpt.pt")
    model, idx = GPT.from_pretrained("ckpt.pt"), make_idx(make_gpt())
    assert torch.equal(model(idx)[0], make_gpt()(idx)[0])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: os.remove("hf/config.json"), "hf/config.json"),
        (lambda: Path("hf/config.json").write_text("{"), "hf/config.json is not JSON"),
        (lambda: Path("hf/config.json").write_text("[]"), "no JSON object"),
        (lambda: Path("hf/config.json").write_bytes(b"\xff\xfe"), "hf/config.json is not JSON"),
        (lambda: change_json("hf/config.json", model_type="llama"), "of type 'llama', not 'gpt2'"),
        (lambda: change_json("hf/config.json", n_layer=None), "whole number as n_layer"),
        (lambda: change_json("hf/config.json", n_head=3), "n_embd 16 is not divisible by n_head 3"),
        (lambda: change_json("hf/config.json", n_layer=3), "has 2 layers, but its config says n_layer 3"),
        (lambda: change_json("hf/config.json", n_layer=10**9), "has 2 layers"),
        (lambda: change_json("hf/config.json", n_embd=32), "wte.weight is torch.float32 (257, 16)"),
        (lambda: change_json("hf/config.json", n_positions=8), "wpe.weight is torch.float32 (16, 16)"),
        (lambda: change_json("hf/config.json", n_embd=2**70), "beyond a tensor's"),
        (lambda: change_json("hf/config.json", n_embd=2**40), "hf/pytorch_model.bin"),
        (lambda: change_json("hf/config.json", activation_function="relu"), "activation_function 'relu'"),
        (lambda: change_json("hf/config.json", layer_norm_epsilon=1e-6), "layer_norm_epsilon 1e-06"),
        (lambda: change_json("hf/config.json", n_inner=32), "n_inner 32"),
        (lambda: change_json("hf/config.json", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer"),
        (lambda: os.remove("hf/pytorch_model.bin"), "neither model.safetensors nor pytorch_model.bin"),
        (lambda: cut("hf/pytorch_model.bin"), "hf/pytorch_model.bin is truncated"),
        (lambda: torch.save([1], "hf/pytorch_model.bin"), "holds no weights by name"),
        (lambda: torch.save({"model.layers.0.q_proj.weight": torch.ones(2)}, "hf/pytorch_model.bin"), "has 0 layers"),
        (lambda: change_weights(h__1__ln_2__bias=None), "has no h.1.ln_2.bias"),
        (lambda: change_weights(h__1__attn__rotary=torch.ones(1)), "h.1.attn.rotary is not GPT-2's"),
        (lambda: change_weights(h__0__mlp__c_fc__weight=torch.ones(64, 16)), "h.0.mlp.c_fc.weight is torch.float32"),
        (lambda: change_weights(wpe__weight=torch.ones(16, 16).long()), "wpe.weight is torch.int64"),
        (lambda: change_weights(wpe__weight="words"), "wpe.weight is str"),
        (lambda: Path("hf/model.safetensors").write_bytes(b"\xff" * 99), "hf/model.safetensors is damaged"),
    ],
)
def test_folders_that_are_not_gpt2s(folder, capsys, spoil, message):
    spoil()
    check(folder, capsys, ["count", "hf"], message)
    flags = "--data text --steps 2 --device cpu --out run --init hf".split()
    check(folder, capsys, flags, message, script=train)


def test_safetensors_with_lying_headers(folder, capsys):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    save_safe({name: t.contiguous() for name, t in weights.items()}, "whole.safetensors")
    whole = Path("whole.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    about = json.loads(whole[8 : 8 + header])
    moved = about | {"transformer.wpe.weight": about["transformer.wpe.weight"] | {"data_offsets": [0, 10**12]}}
    taller = about | {"transformer.wpe.weight": about["transformer.wpe.weight"] | {"shape": [10**6, 16]}}

    def file(about):
        text = json.dumps(about).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + header :]

    lies = [(2**63).to_bytes(8, "little") + whole[8:], whole[: len(whole) // 2], whole[:5], b"", file(moved)]
    for lie in [*lies, file(taller)]:
        Path("hf/model.safetensors").write_bytes(lie)
        check(folder, capsys, ["count", "hf"], "hf/model.safetensors is damaged")


def test_an_untied_head_is_refused(folder, capsys):
    weights = torch.load("hf/pytorch_model.bin", weights_only=True)
    torch.save(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, "hf/pytorch_model.bin")
    check(folder, capsys, ["count", "hf"], "head is tied")


def test_a_bare_file_does_not_tell_its_heads(folder, capsys):
    os.replace("hf/pytorch_model.bin", "weights.bin")
    check(folder, capsys, ["count", "weights.bin"], "nor beside a config.json")


def test_what_is_not_there(folder, capsys):
    check(folder, capsys, ["count", "gpt3"], "no file or folder gpt3; by name there are gpt2, gpt2-medium")
    check(folder, capsys, [], "the following arguments are required")
    check(folder, capsys, ["to-onnx"], "invalid choice")
    check(folder, capsys, ["to-peft", "--base"], "expected one argument")


# --- adapters ---


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: os.remove("adapter/adapter_config.json"), "adapter/adapter_config.json"),
        (lambda: change_json("adapter/adapter_config.json", peft_type="LORA"), "of type 'LORA', not 'IA3'"),
        (lambda: os.remove("adapter/adapter_model.safetensors"), "neither adapter_model.safetensors nor"),
        (lambda: cut("adapter/adapter_model.safetensors"), "is damaged"),
        (lambda: change_safe(ADAPTER, h__1__attn__c_attn__ia3_l=None), "has no h.1.attn.c_attn.ia3_l"),
        (lambda: change_safe(ADAPTER, h__0__mlp__c_proj__ia3_l=None), "has no h.0.mlp.c_proj.ia3_l"),
        (lambda: change_safe(ADAPTER, h__2__attn__c_attn__ia3_l=torch.ones(48, 1)), "h.2.attn.c_attn.ia3_l is no"),
        (lambda: change_safe(ADAPTER, h__0__mlp__c_fc__ia3_l=torch.ones(64, 1)), "h.0.mlp.c_fc.ia3_l is no (IA)³"),
        (lambda: change_safe(ADAPTER, h__0__attn__c_attn__ia3_l=torch.ones(96, 1)), "(96, 1), but this base takes"),
        (lambda: change_safe(ADAPTER, h__0__mlp__c_proj__ia3_l=torch.ones(16, 1)), "(16, 1), but this base takes"),
        (lambda: change_safe(ADAPTER, h__1__mlp__c_proj__ia3_l=torch.full((1, 64), torch.nan)), "l_ff holds NaN"),
        (lambda: save_safe({}, ADAPTER), "nothing in it"),
    ],
)
def test_adapters_that_do_not_fit(folder, capsys, spoil, message):
    spoil()
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out new.npz".split(), message)


ADAPTER = "adapter/adapter_model.safetensors"


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(folder, capsys):
    make_gpt(seed=1).save("other.pt")
    check(folder, capsys, "from-peft --base other.pt --adapter adapter".split(), "another base of this shape")
    make_gpt(n_layer=3).save("other.pt")
    check(folder, capsys, "from-peft --base other.pt --adapter adapter".split(), "another base")


def test_a_query_part_that_overflows_l_k_is_refused(folder, capsys):
    huge = torch.full((48, 1), 1e30)
    change_safe(ADAPTER, h__0__attn__c_attn__ia3_l=huge)
    check(folder, capsys, "from-peft --base base.pt --adapter adapter".split(), "l_k holds NaN or infinity")


def test_the_base_is_not_overwritten(folder, capsys):
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out base.pt".split(), "would replace")
    check(folder, capsys, "to-hf --base hf --out hf".split(), "would replace")
    check(folder, capsys, "to-hf --base hf/pytorch_model.bin --out hf".split(), "would replace")
    Path("hf/model.safetensors").write_bytes(b"another model")
    check(folder, capsys, "to-hf --base base.pt --out hf".split(), "which would be opened instead")


def test_vectors_do_not_go_where_a_folder_is(folder, capsys):
    check(folder, capsys, "from-peft --base base.pt --adapter adapter --out hf".split(), "--out hf is a folder")
    assert not os.path.exists("hf.tmp")


def test_commands_there_and_back(folder, capsys):
    assert convert.main("to-peft --base base.pt --ia3 ia3.npz --out a".split()) == 0
    assert (
        convert.main("from-peft --base hf --adapter a --out back.npz".split()) == 0
    )  # the same base in another format
    assert "folded" not in capsys.readouterr().out
    first, back = (IA3.load(path, GPT.from_pretrained("base.pt")) for path in ("ia3.npz", "back.npz"))
    assert all(torch.equal(t, back.matrices()[name]) for name, t in first.matrices().items())
    assert convert.main("to-hf --base base.pt --out home".split()) == 0
    assert Path("home/pytorch_model.bin").read_bytes() == Path("hf/pytorch_model.bin").read_bytes()
    assert not list(folder.rglob("*.tmp"))


# --- published weights ---


class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.server.body under the hub's path; cut: announces all of it and ends after so many bytes."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        if self.server.announces:
            self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who refuses an answer hangs up before all of it is written
            self.wfile.write(self.server.body[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub that publishes a tiny 'gpt2', and an empty cache."""
    monkeypatch.setitem(convert.SIZES, "gpt2", (2, 2, 16))
    weights = {
        name: t.t() if name.endswith(convert.CONV1D) else t
        for name, t in make_gpt(vocab_size=50257, block_size=1024).transformer.state_dict().items()
    }
    torch.save(weights, tmp_path / "weights.bin", _use_new_zipfile_serialization=False)  # as in 2019
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.body, server.asked = (tmp_path / "weights.bin").read_bytes(), []
        server.announces, server.cut, server.status = True, None, 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        server.cache = tmp_path / "cache/hub/checkpoints"
        yield server
        server.shutdown()


def test_published_weights_are_fetched_once(hub, capsys):
    models = [GPT.from_pretrained("gpt2") for _ in range(2)]
    assert hub.asked == ["/openai-community/gpt2/resolve/main/pytorch_model.bin"]
    assert capsys.readouterr().err.count("fetching ") == 1
    assert [path.name for path in hub.cache.iterdir()] == ["gpt2-pytorch_model.bin"]
    expected = make_gpt(vocab_size=50257, block_size=1024)
    for model in models:
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in expected.state_dict().items())
        assert model.tokenizer == "gpt2"


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_connection_cut_half_way_and_the_next_run_fetches_again(hub, capsys, share):
    hub.cut = int(share * len(hub.body))
    flags = ["--init", "gpt2", "--device", "cpu"]
    assert train.main(flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("fetching ") and len(err) == 2
    assert f"the connection ended after {hub.cut:,} of {len(hub.body):,} bytes" in err[1]
    assert "gpt2-pytorch_model.bin" in err[1] and not list(hub.cache.iterdir())
    hub.cut = None
    GPT.from_pretrained("gpt2")
    assert len(hub.asked) == 2


def test_a_page_instead_of_weights_is_not_kept(hub):
    whole, hub.body = hub.body, b"<html>Sign in to this network</html>"
    with pytest.raises(ValueError, match="removed, so that the next run fetches it again"):
        GPT.from_pretrained("gpt2")
    assert not list(hub.cache.iterdir())
    hub.body = whole
    GPT.from_pretrained("gpt2")


def test_another_models_weights_under_the_name_are_refused(hub):
    weights = torch.load(hub.cache.parents[2] / "weights.bin", weights_only=True)
    torch.save(weights | {"wte.weight": torch.ones(257, 16)}, hub.cache.parents[2] / "weights.bin")
    hub.body = (hub.cache.parents[2] / "weights.bin").read_bytes()
    with pytest.raises(ValueError, match=r"wte.weight is torch.float32 \(257, 16\), but this GPT-2 has floats \(50257"):
        GPT.from_pretrained("gpt2")


def test_no_network_says_what_was_tried_and_what_would_do(hub, tmp_path, capsys, monkeypatch):
    hub.status = 503
    check(tmp_path, capsys, ["to-hf", "--base", "gpt2"], "HTTP Error 503")
    hub.status, hub.announces = 200, False
    check(tmp_path, capsys, ["to-hf", "--base", "gpt2"], "its length is not announced")
    monkeypatch.setenv("HF_ENDPOINT", "hub")
    check(tmp_path, capsys, ["to-hf", "--base", "gpt2"], "unknown url type")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no one listens there
    line = check(tmp_path, capsys, ["to-hf", "--base", "gpt2"], "Connection refused")
    for part in ("http://127.0.0.1:9/openai-community/gpt2/resolve", "a local pytorch_model.bin", str(hub.cache)):
        assert part in line


# --- the count ---


def test_the_count(folder, capsys):
    assert convert.main(["count", *convert.SIZES, "base.pt", "hf"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    rows = [row.split() for row in rows]
    assert head.split()[0] == "model" and [row[0] for row in rows] == [*convert.SIZES, "base.pt", "hf"]
    # values trained, from the paper's formula n_layer · (2·n_embd + d_ff); parameters as GPT-2's are known to have
    assert [row[4] for row in rows] == ["55,296", "147,456", "276,480", "460,800", "192", "192"]
    assert [row[3] for row in rows[:4]] == ["124,439,808", "354,823,168", "774,030,080", "1,557,611,200"]
    base = make_gpt()
    blocks = sum(p.numel() for p in base.transformer.h.parameters())
    assert rows[4][5:8] == [f"{192 / sum(p.numel() for p in base.parameters()):.4%}", f"{192 / blocks:.4%}", "3.1250%"]
    assert rows[4][1:3] == ["2", "16"] and rows[0][7] == "0.0651%"
    assert rows[4][8] == f"{os.path.getsize('ia3.npz'):,}"
    assert all(0 < int(row[8].replace(",", "")) - 4 * int(row[4].replace(",", "")) <= 2048 for row in rows)
