"""edge.py: what is divided by what, whose peak a peak is, and which files and tables it refuses."""

import subprocess
import sys

import pytest

from experiments import edge, lab
from experiments.edge_contestant import peak_of_process


def test_a_speed_is_taken_over_transformers_and_over_the_base_file_round_by_round():
    times = {name: [4.0, 8.0] for name in edge.CONTESTANTS} | {edge.THEIRS: [8.0, 16.0], edge.BASE: [2.0, 4.0]}
    shared = dict.fromkeys(("load", "rounds", "hardware", "date", "versions"))
    rows = edge.rows_of(times, dict.fromkeys(times, 10**8), shared)
    assert [row.over_theirs for row in rows] == [1.0, 0.5, 0.5, 0.5, 0.25, 0.5]
    assert rows[-1].over_base == rows[-1].over_base_low == rows[-1].over_base_high == 2.0


@pytest.mark.skipif(peak_of_process() is None, reason="no /proc here")
def test_a_processs_peak_is_its_own():
    """The parent's is larger: it holds so much."""
    held = bytearray(2**28)
    assert peak_of_process() > len(held)
    call = "from experiments.edge_contestant import peak_of_process; a = bytearray(2**26); print(peak_of_process())"
    child = subprocess.run([sys.executable, "-c", call], cwd=lab.ROOT, capture_output=True, text=True, check=True)
    assert 2**26 < int(child.stdout) < 2**27  # Python takes some 10 MB


def test_a_prepared_folder_is_not_used_for_other_inputs(tmp_path):
    for name in ("base.gguf", "a.npz", "b.npz", "merged.gguf"):
        (tmp_path / name).write_text(name)
    edge.prepare(tmp_path / "base.gguf", tmp_path / "a.npz", tmp_path)
    edge.prepare(tmp_path / "base.gguf", tmp_path / "a.npz", tmp_path)  # all are there
    for inputs in (("base.gguf", "b.npz"), ("a.npz", "a.npz")):
        with pytest.raises(ValueError, match=str(tmp_path)):
            edge.prepare(*[tmp_path / name for name in inputs], tmp_path)


def test_peaks_that_are_not_known_leave_their_cells_empty(tmp_path):
    rows = lab.read_rows(lab.RESULTS / "edge/results.csv", edge.Row)
    lab.write_csv(tmp_path / "results.csv", [vars(row) | {"peak_bytes": None} for row in rows])
    assert edge.tables(tmp_path).count(" |  |  |\n") == len(rows)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({edge.THEIRS: {"contestant": "x"}}, f"lacks {edge.THEIRS}"),
        ({edge.MERGED: {"contestant": "x"}}, f"lacks {edge.MERGED}"),
        ({edge.BASE: {"over_theirs_low": 0.0}}, f"a time of {edge.BASE} that is not above 0"),
        ({edge.MERGED: {"over_base": float("nan")}}, f"a time of {edge.MERGED} that is not above 0"),
    ],
)
def test_an_edge_table_that_cannot_be_made_is_refused_in_one_line(changes, message, tmp_path, capsys):
    rows = lab.read_rows(lab.RESULTS / "edge/results.csv", edge.Row)
    lab.write_csv(tmp_path / "results.csv", [vars(row) | changes.get(row.contestant, {}) for row in rows])
    assert edge.main(["--tables", f"--out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and str(tmp_path) in err
