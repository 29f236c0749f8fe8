"""Text from the command line: the same seed, the same text; vectors change it; several tasks stand side by side."""

from functools import partial

import pytest
import torch

import common
import sample
from conftest import make_gpt, make_ia3, make_idx, make_llama, write_run
from data.tokenizer import GPT2, Tokenizer
from ia3 import attach, fingerprint
from sample import generate


@pytest.fixture
def folder(make_model, tmp_path):
    folder, _ = write_run(tmp_path, make_model())
    attach(make_model()).save(folder / "ones.npz")
    for seed in (1, 2):
        make_ia3(make_model(), seed).save(folder / f"{seed}.npz")
    return folder


def run_sample(folder, capsys, flags=""):
    assert sample.main(f"--base {folder}/base.pt --prompt A --tokens 20 --device cpu {flags}".split()) == 0
    return capsys.readouterr().out


def test_the_same_seed_draws_the_same_text_and_every_setting_another(folder, capsys):
    first = run_sample(folder, capsys)
    assert first.startswith("A") and run_sample(folder, capsys) == first
    for setting in ("--seed 1", "--temperature 9", "--temperature 0", f"--ia3 {folder}/1.npz"):
        assert run_sample(folder, capsys, setting) != first
    assert run_sample(folder, capsys, "--tokens 0") == "A\n"
    assert run_sample(folder, capsys, f"--ia3 {folder}/ones.npz") == first
    assert run_sample(folder, capsys, "--temperature 0") == run_sample(folder, capsys, "--top-k 1")


def test_several_tasks_are_sampled_in_one_batch_each_as_it_is_alone(folder, capsys):
    """Greedy, since rows of a batch share one stream of random numbers."""
    files = [f"{folder}/{name}.npz" for name in ("1", "2", "ones")]
    alone = [run_sample(folder, capsys, f"--temperature 0 --ia3 {file}").removesuffix("\n") for file in files]
    together = run_sample(folder, capsys, f"--temperature 0 --ia3 {' '.join(files)}")
    assert together == sample.side_by_side(["1", "2", "ones"], alone) + "\n"
    assert len(set(alone)) == 3


def test_side_by_side_prints_columns_under_their_names():
    """A long line is folded, an empty one stays, and a long name is cut."""
    assert sample.side_by_side(["a", "a name too long"], ["one\n\ntwo three", "four"], width=7).split("\n") == [
        "a        a name",
        "-        -------",
        "one      four",
        "",
        "two",
        "three",
    ]
    assert [sample.task_name(path) for path in ("out/kjv/ia3.npz", "kjv.npz", "ia3.npz")] == ["kjv", "kjv", "ia3"]


def test_ids_that_pad_a_vocabulary_are_left_out_of_the_text():
    model = make_gpt(vocab_size=300)  # as nanoGPT pads gpt2's 50257 to 50304
    model.tokenizer = Tokenizer("bytes", 300)
    ids = sample.generate(model, torch.tensor([[65]]), 50, 1.0, 300, None, torch.Generator().manual_seed(0))[0].tolist()
    assert max(ids) > 256
    text = sample.complete(model, torch.tensor([[65]]), 50, 1.0, 300)[0]
    assert text == model.tokenizer.encoding.decode([t for t in ids if t < 257])


def test_a_model_without_a_tokenizer_writes_ids():
    model = make_gpt()
    model.tokenizer = None
    assert sample.complete(model, torch.tensor([[65, 66]]), 0) == ["[65, 66]"]


def test_weights_stored_by_columns_are_the_same_model(make_model):
    model = make_model()
    make_ia3(model)
    idx = torch.arange(12).view(2, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model.double()(idx)[0]
    base = fingerprint(model)
    sample.store_by_columns(model)
    assert model.lm_head.weight.stride() == (1, 257)
    assert all(torch.equal(t.float(), before[name]) for name, t in model.state_dict().items())
    assert fingerprint(model) == base
    assert (model(idx)[0] - expected).abs().max() <= 1e-12  # sums in another order, in float64


def test_writing_stops_when_every_row_has_ended_and_a_text_stops_before_its_end(make_model):
    model = make_model()
    idx = make_idx(model, rows=2)[:, :3]
    draw = partial(generate, model, idx, 12, temperature=1.0, top_k=50)
    whole = draw(generator=torch.Generator().manual_seed(1))
    ends = [whole[0, 5].item(), whole[1, 9].item()]  # each row's own, and maybe the other's earlier
    found = draw(generator=torch.Generator().manual_seed(1), end=ends)
    stops = []
    for row in whole.tolist():
        stops.append(next(i for i in range(3, 15) if row[i] in ends))
    early, late = sorted(stops)
    assert early < late and whole[stops.index(early), late].item() not in ends  # one row ended before the other
    assert torch.equal(found, whole[:, : max(stops) + 1]) and found.size(1) < whole.size(1)
    model.tokenizer.eos = ends
    texts = [model.tokenizer.decode(row[:stop].tolist()) for row, stop in zip(whole, stops, strict=True)]
    assert sample.complete(model, idx, 12, temperature=1.0, top_k=50, seed=1) == texts


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ... }}{% endfor %}"


def test_a_users_text_never_becomes_a_control_token_and_a_chat_has_just_three(tmp_path, capsys):
    model = make_llama(vocab_size=280, block_size=64)
    ranks = {bytes([i]): i + 2 for i in range(256)}
    about = {"pattern": GPT2, "ranks": ranks, "special_tokens": {"<|im_start|>": 0, "<|im_end|>": 1}}
    model.tokenizer = Tokenizer(about, 280, eos=[1], chat_template=CHATML)
    ids = sample.chat_turn(model.tokenizer, "<|im_end|>x")
    assert [ids.index(0), ids.count(0), ids.count(1)] == [0, 2, 1]
    assert model.tokenizer.decode(ids) == "<|im_start|>user\n<|im_end|>x<|im_end|>\n<|im_start|>assistant\n"
    common.save(model, tmp_path / "chat.pt")
    flags = f"--base {tmp_path}/chat.pt --tokens 1 --device cpu --prompt"
    assert sample.main([*flags.split(), "a <|im_end|>"]) == 0
    assert capsys.readouterr().err.count("<|im_end|>") == 1  # a warning
    assert sample.main([*flags.split(), "a", "--chat"]) == 0
    assert not capsys.readouterr().err
    model.tokenizer = Tokenizer(about, 280, eos=[1], chat_template="<|start_header_id|>")
    common.save(model, tmp_path / "chat.pt")
    assert sample.main([*flags.split(), "a", "--chat"]) == 2
    assert "<|start_header_id|>" in capsys.readouterr().err
