"""tools/plot.py and tools/architecture.py: pictures that show what is there, and one line for what cannot be drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import check_refused, cut

from conftest import make_gpt, make_ia3
from tools import architecture, plot

HEADER = "step,train_loss,val_loss,lr,tokens_per_second\n"
METRICS = HEADER + "0,nan,5.5,0.1,0\n2,5.2,5.0,0.1,900\n4,4.9,4.8,0.1,900\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with two runs, of which a has vectors, and three tasks of one base with 2 heads."""
    monkeypatch.chdir(tmp_path)
    for run in ("a", "b"):
        Path(run).mkdir()
        Path(f"{run}/metrics.csv").write_text(METRICS)
    for seed, path in enumerate(("a/ia3.npz", "1.npz", "2.npz")):
        make_ia3(make_gpt(), seed).save(path)
    make_ia3(make_gpt(), sites=("k", "ff")).save("3.npz")
    return tmp_path


@pytest.fixture
def panels(monkeypatch):
    """The axes of what is drawn, in order, with the picture in each."""
    drawn = []
    imshow = plot.plt.Axes.imshow
    monkeypatch.setattr(plot.plt.Axes, "imshow", lambda *a, **k: drawn.append(imshow(*a, **k)) or drawn[-1])
    return drawn


def is_picture(path):
    pixels = plot.plt.imread(path)
    return min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05  # and not a blank one


def test_losses_and_vectors_of_runs(folder, capsys):
    assert plot.main(["a", "b"]) == 0
    assert capsys.readouterr().out.split() == ["a/loss.png", "a/vectors.png"]
    assert is_picture("a/loss.png") and is_picture("a/vectors.png") and not Path("b/vectors.png").exists()
    assert not list(folder.rglob("*.tmp"))


def test_curves_are_called_by_their_runs_names(tmp_path, monkeypatch):
    """Also where matplotlib would see a formula, or pass over the label."""
    named = []
    legend = plot.plt.Axes.legend
    monkeypatch.setattr(plot.plt.Axes, "legend", lambda axes: named.extend(legend(axes).get_texts()))
    runs = [tmp_path / "1/_a", tmp_path / r"1/x$\frac$"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "metrics.csv").write_text(METRICS)
    plot.plot_losses(runs, tmp_path / "a.png")
    assert [text.get_text() for text in named] == ["val, _a", "train, _a", r"val, x\$\frac\$", r"train, x\$\frac\$"]


def test_the_heatmap_is_white_at_one_and_diverges_around_it(tmp_path, panels):
    matrices = {"l_k": np.array([[1.0, 0.5, 1.5]], np.float32), "l_ff": np.array([[1.0] * 12], np.float32)}
    about = b'{"config": {"n_embd": 3, "n_head": 1}}'
    np.savez(tmp_path / "a.npz", about=np.bytes_(about), **matrices)
    plot.plot_vectors([tmp_path / "a.npz"], tmp_path / "a.png")
    assert len(panels) == 2
    one, low, high = panels[0].to_rgba(panels[0].get_array())[0, :, :3]
    assert one.min() > 0.95  # white
    assert low[2] > low[0] and high[0] > high[2]  # blue is inhibited, red amplified
    assert panels[0].norm(0.5) == pytest.approx(1 - panels[0].norm(1.5))  # the same distance is the same strength


def test_tasks_stand_side_by_side_on_one_scale_with_their_heads_apart(folder, panels, capsys):
    assert plot.main("--tasks 1.npz 2.npz 3.npz --out new/tasks.png".split()) == 0
    assert is_picture("new/tasks.png")
    assert [image.get_array().shape for image in panels] == 2 * [(2, 16), (2, 16), (2, 64)] + [(2, 16), (2, 64)]
    assert {(image.norm.vmin, image.norm.vmax) for image in panels} == {(panels[0].norm.vmin, panels[0].norm.vmax)}
    for image in panels:
        lines = [line.get_xdata()[0] for line in image.axes.lines]
        assert lines == ([7.5] if image.get_array().shape[1] == 16 else [])  # heads of 8 channels; none in the MLP
    rows = capsys.readouterr().out.splitlines()[2:-2]
    assert [row.split("|")[1].strip() for row in rows] == [f"{t} {m}" for t in "12" for m in ("l_k", "l_v", "l_ff")] + [
        "3 l_k",
        "3 l_ff",
    ]


def test_the_census():
    scales = np.array([1.0, 1.009, 0.991, 0.98, 0.0, 0.5, 1.02, 7.0, -0.1, -3.0])
    assert plot.census(scales) == (0.3, 0.3, 0.2, 0.2)


@pytest.mark.parametrize(
    "text, message",
    [
        (HEADER, "metrics.csv holds no rows"),
        ("step,loss\n1,2\n", "metrics.csv is not what train.py writes (KeyError)"),
        (HEADER + "0,nan\n", "metrics.csv is not what train.py writes (TypeError)"),
        (HEADER + "1e3,1,1,0.1,0\n", "metrics.csv is not what train.py writes (ValueError)"),
        (METRICS + f"{10**30},1,1,0.1,0\n", "metrics.csv has steps beyond 0 to a billion"),
        (HEADER + "0,nan,nan,0.1,0\n1,nan,nan,0.1,0\n", "metrics.csv has losses"),
        (METRICS + "5,1,1e300,0.1,0\n", "metrics.csv has losses"),
        (METRICS + "5,inf,1,0.1,0\n", "metrics.csv has losses"),
    ],
)
def test_metrics_that_train_would_not_write(folder, capsys, text, message):
    Path("b/metrics.csv").write_text(text)
    check_refused(plot, capsys, "a b", f"b/{message}")


@pytest.mark.parametrize(
    "n_embd, n_head, arrays",
    [
        (16, 2, {}),
        (16, 0, {"l_k": np.ones((2, 16))}),
        (1, 2, {"l_k": np.ones((2, 16))}),  # d_head 0
        (2, 2, {"l_k": np.ones((1, 5000))}),  # 5000 heads
        (16, 2, {"l_k": np.ones(16)}),
        (16, 2, {"l_k": np.ones((0, 16))}),
        (16, 2, {"l_k": np.ones((1001, 16))}),
        (16, 2, {"l_q": np.ones((2, 16))}),
        (16, 2, {"l_k": np.full((2, 16), np.nan)}),
        (16, 2, {"l_k": np.ones((2, 16), complex)}),
        (10000, 1, {"l_k": np.ones((1000, 10001), bool)}),  # a small file that unfolds to much
    ],
)
def test_what_is_no_file_of_vectors(folder, capsys, n_embd, n_head, arrays):
    about = json.dumps({"config": {"n_embd": n_embd, "n_head": n_head}})
    np.savez_compressed("bad.npz", about=np.bytes_(about), **arrays)
    check_refused(plot, capsys, "--tasks 1.npz bad.npz", "bad.npz is")


def test_what_cannot_be_drawn(folder, capsys):
    for flags, message in (
        ("", "name folders of runs, or vectors"),
        ("a --tasks 1.npz", "name folders of runs, or vectors"),
        ("a --out b.png", "--out goes with --tasks"),
        ("nowhere", "nowhere holds no metrics.csv"),
        ("--tasks nowhere.npz", "nowhere.npz"),
        ("--tasks 1.npz --out 1.npz", "which this command reads"),
    ):
        check_refused(plot, capsys, flags, message)
    cut("1.npz")
    check_refused(plot, capsys, "--tasks 1.npz", "1.npz is")
    Path("b/ia3.npz").write_bytes(Path("1.npz").read_bytes())
    check_refused(plot, capsys, "a b", "b/ia3.npz is")  # and no picture of a


def test_the_picture_of_the_block(tmp_path, capsys):
    assert architecture.main(["--out", f"{tmp_path}/a.png"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.png\n" and is_picture(tmp_path / "a.png")
