"""Text and pictures."""

import numpy as np
import pytest
import torch
from conftest import make_gpt, make_ia3

import plot
import sample
import train
from ia3 import IA3
from model import GPT


@pytest.fixture
def folder(tiny_run):
    folder, _ = tiny_run
    for seed in (1, 2):
        make_ia3(make_gpt(), seed).save(folder / f"{seed}.npz")
    return folder


def run_sample(folder, capsys, flags=""):
    assert sample.main(f"--base {folder}/base.pt --prompt A --tokens 20 --device cpu {flags}".split()) == 0
    return capsys.readouterr().out


def test_the_same_seed_draws_the_same_text(folder, capsys):
    first = run_sample(folder, capsys)
    assert first.startswith("A") and run_sample(folder, capsys) == first
    assert run_sample(folder, capsys, "--seed 1") != first
    assert run_sample(folder, capsys, "--tokens 0") == "A\n"


def test_vectors_change_the_text_and_ones_do_not(folder, capsys):
    model = make_gpt()
    train.attach(model).save(folder / "ones.npz")
    base = run_sample(folder, capsys)
    assert run_sample(folder, capsys, f"--ia3 {folder}/ones.npz") == base
    assert run_sample(folder, capsys, f"--ia3 {folder}/1.npz") != base


def test_several_tasks_are_sampled_in_one_batch_each_as_it_is_alone(folder):
    """Greedy, since rows of a batch share one stream of random numbers."""
    model = GPT.from_pretrained(folder / "base.pt")
    tasks = [IA3.load(folder / f"{seed}.npz", model) for seed in (1, 2)]
    prompt = torch.tensor([[65, 66], [65, 66], [65, 66]])
    train.attach(model, sample.stack([*tasks, None]))
    together = sample.complete(model, prompt, 20, temperature=0, tasks=torch.tensor([0, 1, 2]))
    for task, text in zip([*tasks, None], together, strict=True):
        model.ia3 = task
        assert sample.complete(model, prompt[:1], 20, temperature=0) == [text]
    assert len(set(together)) == 3


def test_ids_that_pad_a_vocabulary_are_left_out_of_the_text():
    model = make_gpt(vocab_size=300)  # as nanoGPT pads gpt2's 50257 to 50304
    model.tokenizer = "bytes"
    ids = model.generate(torch.tensor([[65]]), 50, 1.0, 300, None, torch.Generator().manual_seed(0))[0].tolist()
    assert max(ids) > 256
    text = sample.complete(model, torch.tensor([[65]]), 50, 1.0, 300)[0]
    assert text == sample.datasets.get_tokenizer("bytes").decode([t for t in ids if t < 257])


def test_side_by_side_prints_columns_under_their_names(folder, capsys):
    assert sample.side_by_side(["a", "bb"], ["one\ntwo three", "four"], width=7).split("\n") == [
        "a        bb",
        "-        --",
        "one      four",
        "two",
        "three",
    ]
    out = run_sample(folder, capsys, f"--ia3 {folder}/1.npz {folder}/2.npz")
    assert out.split()[:4] == ["1", "2", "-", "-"]  # of 1.npz and 2.npz


def test_plot_draws_losses_and_vectors(tiny_run, capsys):
    folder, flags = tiny_run
    train.main([*flags, "--out", f"{folder}/a"])
    train.main([*flags, "--out", f"{folder}/b", "--method", "full"])
    capsys.readouterr()
    assert plot.main([f"{folder}/a", f"{folder}/b"]) == 0
    assert capsys.readouterr().out.split() == [f"{folder}/a/loss.png", f"{folder}/a/vectors.png"]
    for name in ("loss", "vectors"):
        pixels = plot.plt.imread(folder / f"a/{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05  # a picture, and not a blank one
    assert not (folder / "b/vectors.png").exists()


def test_the_heatmap_is_white_at_one_and_diverges_around_it(tmp_path, monkeypatch):
    matrices = {"l_k": np.array([[1.0, 0.5, 1.5]], np.float32), "l_ff": np.array([[1.0] * 12], np.float32)}
    np.savez(tmp_path / "a.npz", about=np.bytes_(b"{}"), **matrices)
    images = []
    imshow = plot.plt.Axes.imshow
    monkeypatch.setattr(plot.plt.Axes, "imshow", lambda *a, **k: images.append(imshow(*a, **k)) or images[-1])
    plot.plot_vectors(tmp_path / "a.npz", tmp_path / "a.png")
    assert len(images) == 2
    one, low, high = images[0].to_rgba(images[0].get_array())[0, :, :3]
    assert one.min() > 0.95  # white
    assert low[2] > low[0] and high[0] > high[2]  # blue is inhibited, red amplified
    assert images[0].norm(0.5) == pytest.approx(1 - images[0].norm(1.5))  # the same distance is the same strength
