"""tools/convert.py: its commands, PEFT's adapters, published weights from a small local server, and the count.

What a folder holds is in test_hf_folder.py and test_hf_tokenizer.py, GGUF in test_gguf.py. That the numbers are PEFT's
is shown in tests/oracles/.
"""

import hashlib
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import change_json, check_refused, cut, is_same, snapshot
from safetensors.torch import load_file as load_safe
from safetensors.torch import save_file as save_safe

import common
from conftest import make_gpt, make_ia3, make_llama, make_llama_with_bpe
from ia3 import IA3
from merge import merge
from tools import convert, hf_gpt2

ADAPTER = "adapter/adapter_model.safetensors"
FROM_PEFT = "from-peft --base base.pt --adapter adapter --out new.npz"


def write_all(model):
    """In the working directory: base.pt, hf/, ia3.npz and adapter/, all of model."""
    common.save(model, "base.pt")
    convert.to_hf(model, "hf")
    vectors = make_ia3(model)
    vectors.save("ia3.npz")
    convert.to_peft(vectors, "adapter", "base.pt")


@pytest.fixture
def gpt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(make_gpt())


@pytest.fixture
def llama(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(make_llama_with_bpe())


def check(capsys, flags, message):
    check_refused(convert, capsys, flags, message)


# --- a base and its vectors go out and come back ---


@pytest.mark.parametrize("make_base", [make_gpt, make_llama_with_bpe])
def test_vectors_and_bases_go_out_and_come_back(tmp_path, monkeypatch, capsys, make_base):
    """The base in the dtype that is stored, or merged in float32; the vectors bit for bit."""
    monkeypatch.chdir(tmp_path)
    write_all(make_base().bfloat16())
    assert convert.main("to-hf --base base.pt --out plain".split()) == 0
    stored = common.load("base.pt", dtype=torch.float32 if make_base is make_gpt else None)
    assert is_same(convert.from_hf("plain"), stored)
    assert convert.main("to-hf --base base.pt --ia3 ia3.npz --out merged".split()) == 0
    base = common.load("base.pt")
    base.ia3 = IA3.load("ia3.npz", base)
    assert is_same(convert.from_hf("merged"), merge(base)) and not is_same(convert.from_hf("merged"), base)
    assert convert.main("to-peft --base base.pt --ia3 ia3.npz --out a".split()) == 0
    assert ("ones for the queries" in capsys.readouterr().out) == (make_base is make_gpt)
    assert convert.main("from-peft --base base.pt --adapter a --out back.npz".split()) == 0
    assert "folded" not in capsys.readouterr().out
    back = IA3.load("back.npz", base).matrices()
    assert all(torch.equal(t, back[name]) for name, t in base.ia3.matrices().items())
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_the_safetensors_package(gpt, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for flags in ("to-peft --base base.pt --ia3 ia3.npz --out new", FROM_PEFT):
        check(capsys, flags, "pip install safetensors")


# --- PEFT's adapters ---


def change_adapter(changes):
    """Put vectors into the adapter, or take them out (None), under their modules' names. Its fingerprint goes."""
    tensors = load_safe(ADAPTER)
    (top,) = {name.removeprefix("base_model.model.").partition(".")[0] for name in tensors}
    for module, t in changes.items():
        name = f"base_model.model.{top}.{module}.ia3_l"
        tensors.pop(name, None)
        if t is not None:
            tensors[name] = t
    save_safe(tensors, ADAPTER, {"format": "pt"})


def test_files_that_are_no_adapter(gpt, capsys):
    whole = Path(ADAPTER).read_bytes()
    cut(ADAPTER)
    check(capsys, FROM_PEFT, "is damaged")
    save_safe({}, ADAPTER)
    check(capsys, FROM_PEFT, "nothing in it")
    os.remove(ADAPTER)
    check(capsys, FROM_PEFT, "adapter holds no adapter_model.safetensors or adapter_model.bin")
    Path(ADAPTER).write_bytes(whole)
    change_json("adapter/adapter_config.json", peft_type="LORA")
    check(capsys, FROM_PEFT, "of type 'LORA', not 'IA3'")
    os.remove("adapter/adapter_config.json")
    check(capsys, FROM_PEFT, "adapter/adapter_config.json")


@pytest.mark.parametrize(
    "make_base, name, value, message",
    [
        (make_gpt, "h.2.attn.c_attn", torch.ones(48, 1), "h.2.attn.c_attn.ia3_l is not an (IA)³ vector of this base"),
        (make_gpt, "h.0.mlp.c_fc", torch.ones(64, 1), "h.0.mlp.c_fc.ia3_l is not"),
        (make_gpt, "h.0.attn.c_attn", torch.ones(96, 1), "(96, 1), not (48, 1)"),
        (make_gpt, "h.1.mlp.c_proj", torch.full((1, 64), torch.nan), "ia3_l holds NaN"),
        # 1e30 as l_q and as l_k: each is a float32, and their product is none
        (make_gpt, "h.0.attn.c_attn", torch.full((48, 1), 1e30), f"{ADAPTER}: l_k holds NaN"),
        (make_llama, "layers.2.self_attn.v_proj", torch.ones(8, 1), "layers.2.self_attn.v_proj.ia3_l"),
        (make_llama, "layers.0.self_attn.q_proj", torch.ones(16, 1), "q_proj.ia3_l"),
        (make_llama, "layers.0.self_attn.k_proj", torch.ones(1, 8), "(1, 8), not (8, 1)"),
        (make_llama, "layers.0.mlp.down_proj", torch.ones(16, 1), "(16, 1), not (1, 40)"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, monkeypatch, capsys, make_base, name, value, message):
    monkeypatch.chdir(tmp_path)
    write_all(make_base())
    change_adapter({name: value})
    check(capsys, FROM_PEFT, message)


def test_layers_without_vectors_are_told(gpt, capsys):
    change_adapter({"h.1.attn.c_attn": None, "h.1.mlp.c_proj": None})
    assert convert.main(FROM_PEFT.split()) == 0
    assert "1 of the base's 2 layers" in capsys.readouterr().out
    vectors = IA3.load("new.npz", common.load("base.pt"))
    assert all((l[1] == 1).all() and (l[0] != 1).any() for l in vectors.matrices().values())


def test_an_adapter_of_another_base_is_refused(llama, capsys):
    for other in (make_llama_with_bpe(seed=1), make_llama_with_bpe(n_layer=3), make_gpt()):
        common.save(other, "base.pt")
        check(capsys, FROM_PEFT, "another base of this shape")
    change_adapter({})  # without its fingerprint
    check(capsys, FROM_PEFT, "ia3_l is not an (IA)³ vector of this base")


# --- what is read and what is written ---


def test_only_our_checkpoints_are_bases(gpt, capsys):
    for flags in ("count hf", "count hf/pytorch_model.bin", "to-hf --base hf/pytorch_model.bin --out new"):
        check(capsys, flags, "hf")
    check(capsys, "count gpt3", "gpt3")
    check(capsys, "hf gpt3 --out new.pt", "no file or folder gpt3")


def test_a_command_that_is_none(capsys):
    for flags in ([], ["to-onnx"], ["hf", "hf"], ["to-peft", "--base"]):
        with pytest.raises(SystemExit) as e:
            convert.main(flags)
        assert e.value.code == 2


@pytest.mark.parametrize(
    "flags",
    [
        "from-peft --base base.pt --adapter adapter --out base.pt",
        f"from-peft --base base.pt --adapter adapter --out {ADAPTER}",
        "from-peft --base base.pt --adapter adapter --out adapter/adapter_config.json",
        "hf hf --out hf/pytorch_model.bin",
        "hf hf --out hf/../hf/config.json",
        "hf hf --out hf/tokenizer.json",
        "hf hf --out hf/generation_config.json",
        "hf hf --out hf/chat_template.jinja",
        "hf shards --out shards/model.safetensors.index.json",
        "hf shards/model.safetensors.index.json --out shards/model-1.safetensors",
        "gguf base.gguf --out base.gguf",
        "to-gguf --gguf base.gguf --ia3 ia3.npz --out base.gguf",
        "to-gguf --gguf base.gguf --ia3 ia3.npz --out ia3.npz",
        "to-hf --base out/pytorch_model.bin --out out",
        "to-hf --base base.pt --ia3 out/config.json --out out",
        "to-hf --base out/tokenizer.json --out out",
        "to-hf --base base.pt --ia3 out/tokenizer_config.json --out out",
        "to-peft --base base.pt --ia3 adapter/adapter_config.json --out adapter",
        "to-peft --base adapter/adapter_model.safetensors --ia3 ia3.npz --out adapter",
        "smollm2 --out new.gguf",
    ],
)
def test_no_output_replaces_what_the_command_reads(llama, capsys, monkeypatch, flags):
    monkeypatch.setattr(convert.smollm2, "fetch", lambda path: Path(path).write_bytes(b""))
    Path("base.gguf").write_bytes(b"")
    shutil.copytree("hf", "shards")
    os.remove("shards/pytorch_model.bin")
    Path("shards/model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "model-1.safetensors"}}')
    check(capsys, flags, "which this command reads")


def test_outputs_that_cannot_be(gpt, capsys):
    check(capsys, "from-peft --base base.pt --adapter adapter --out hf", "hf exists and is not a regular file")
    check(capsys, "to-hf --base base.pt --out base.pt", "base.pt")
    for flags in ("hf hf", "to-hf --base base.pt", "to-peft --base base.pt --ia3 ia3.npz"):
        check(capsys, f"{flags} --out=", "the name of the output is empty")
    check(capsys, "to-hf --base base.pt --out adapter", "adapter_config.json, which would be opened")
    check(capsys, "to-peft --base base.pt --ia3 ia3.npz --out hf", "hf holds a model")


def test_ctrl_c_is_one_line_and_130(gpt, capsys, monkeypatch):
    def press(model, f):
        f.write(b"half")
        raise KeyboardInterrupt

    before = snapshot()
    monkeypatch.setattr(torch, "save", press)
    assert convert.main("hf hf --out base.pt".split()) == 130
    assert capsys.readouterr().err == "convert.py: stopped\n"
    assert snapshot() == before


# --- published weights ---


class Server(http.server.BaseHTTPRequestHandler):
    """A hub: announces the SHA-256 of self.server.body, and leads to /cdn/…, where the body is."""

    def do_GET(self):
        hub = self.server
        hub.asked.append(f"{self.command} {self.path}")
        is_file = self.path.startswith("/cdn/")
        self.send_response(hub.status if is_file or hub.status != 200 else 302)
        self.send_header("Content-Length", str(len(hub.body) if is_file else 0))
        if not is_file:
            self.send_header("Location", f"/cdn{self.path}")
            if hub.sha256:
                self.send_header("X-Linked-ETag", f'"{hub.sha256}"')
        self.end_headers()
        if is_file:
            self.wfile.write(hub.body[: hub.cut])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub that publishes a tiny 'gpt2', an empty cache, and an empty working directory."""
    monkeypatch.setitem(convert.SIZES, "gpt2", (2, 2, 16))
    model = make_gpt(vocab_size=50257, block_size=1024)
    weights = {name.removeprefix("transformer."): t for name, t in hf_gpt2.describe(model)[1].items()}  # as in 2019
    torch.save(weights, tmp_path / "published.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.body = (tmp_path / "published.bin").read_bytes()
        server.sha256 = hashlib.sha256(server.body).hexdigest()
        server.asked = []
        server.cut = None
        server.status = 200
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        server.path = tmp_path / "cache/hub/checkpoints/gpt2/pytorch_model.bin"
        yield server
        server.shutdown()


def refused(hub, capsys, message):
    """The command fails with one last line that holds message, and nothing is in the cache or the working directory."""
    capsys.readouterr()
    assert convert.main(["gpt2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("convert.py: ") and message in line and str(hub.path) in line, line
    assert not list(hub.path.parent.glob("*")) and not os.listdir()


def test_published_weights_are_fetched_once(hub):
    for _ in range(2):
        assert convert.main("gpt2 --out gpt2.pt".split()) == 0
    path = "/openai-community/gpt2/resolve/main/pytorch_model.bin"
    assert hub.asked == [f"HEAD {path}", f"GET {path}", f"GET /cdn{path}"]
    model = common.load("gpt2.pt")
    assert is_same(model, make_gpt(vocab_size=50257, block_size=1024)) and model.tokenizer.about == "gpt2"


def test_what_is_not_the_announced_file_leaves_nothing_and_the_next_run_fetches_again(hub, capsys):
    sha256 = hub.sha256
    hub.sha256 = "0" * 64
    refused(hub, capsys, "hash")
    hub.sha256 = sha256
    hub.cut = len(hub.body) // 2
    refused(hub, capsys, "hash")
    hub.cut = None
    assert convert.main(["gpt2"]) == 0


def test_a_server_that_announces_no_sha256_is_refused(hub, capsys):
    for sha256 in (None, "0" * 40):  # git's hash, which the hub announces for small files
        hub.sha256 = sha256
        refused(hub, capsys, "SHA-256")
    assert not any(line.startswith("GET") for line in hub.asked)


def test_no_network_says_what_was_tried_and_what_would_do(hub, capsys, monkeypatch):
    hub.status = 503
    refused(hub, capsys, "HTTP Error 503")
    # 9: no one listens there
    for endpoint in ("hub", "http://127.0.0.1:port", "http://127.0.0.1:9"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused(hub, capsys, f"{endpoint}/openai-community/gpt2/resolve")


def test_a_damaged_file_in_the_cache_is_named_and_stays(hub, tmp_path, capsys):
    hub.path.parent.mkdir(parents=True)
    for damaged in (hub.body[:-1000], b"<html>Sign in to this network</html>", b""):
        hub.path.write_bytes(damaged)
        check_refused(convert, capsys, "gpt2", str(hub.path), tmp_path)
    check_refused(convert, capsys, f"gpt2 --out {hub.path}", "which this command reads", tmp_path)
    assert not hub.asked


# --- the count ---


def test_the_count_of_published_models(capsys):
    """Values from the paper's formula, parameters as the models are known to have.

    Under a hundredth of a percent at a width of 4096, where GPT-2's block needs more than 5000.
    """
    names = [*convert.SIZES, "LLaMA-7B", "Llama-3-8B", "SmolLM2-135M"]
    head, rows = count(capsys, names)
    assert head[0] == "model" and list(rows) == names
    trained = ["55,296", "147,456", "276,480", "460,800", "614,400", "524,288", "57,600"]
    assert [row[4] for row in rows.values()] == trained
    assert [rows[name][3] for name in convert.SIZES] == ["124,439,808", "354,823,168", "774,030,080", "1,557,611,200"]
    assert [rows[name][5] for name in names[4:]] == ["0.0091%", "0.0065%", "0.0428%"]
    assert rows["gpt2"][7] == "0.0651%" and rows["LLaMA-7B"][7] == "-"  # the formula is GPT-2's


@pytest.mark.parametrize("make_base", [make_gpt, make_llama])
def test_the_count_of_a_checkpoint(tmp_path, monkeypatch, capsys, make_base):
    monkeypatch.chdir(tmp_path)
    write_all(make_base())
    base = make_base()
    n = make_ia3(base).count()
    base.ia3 = None
    n_all = sum(p.numel() for p in base.parameters())
    n_blocks = sum(p.numel() for p in base.blocks.parameters())
    _, rows = count(capsys, ["base.pt"])
    assert rows["base.pt"][1:5] == ["2", "16", f"{n_all:,}", str(n)]
    assert rows["base.pt"][5:7] == [f"{n / n_all:.4%}", f"{n / n_blocks:.4%}"]
    assert rows["base.pt"][7:] == ["3.1250%" if make_base is make_gpt else "-", f"{os.path.getsize('ia3.npz'):,}"]


def count(capsys, names):
    assert convert.main(["count", *names]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return head, {row[0]: row for row in rows}
