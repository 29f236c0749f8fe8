"""Pictures of runs: losses, and the vectors around one."""

import numpy as np
import pytest

import train
from tools import plot


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
