"""quantized.py's ways to fold, on a tiny Llama, and its command."""

import pytest
import torch
from test_fewshot import write_sets

from conftest import make_ia3, make_llama
from experiments import lab, quantized
from ia3 import fingerprint
from tools.gguf_llama import dequantize


@pytest.fixture
def model():
    sizes = {"block_size": 512, "n_embd": 32, "n_hidden": 64, "n_layer": 1, "attention_bias": False, "mlp_bias": False}
    return make_llama(**sizes).requires_grad_(False)


@pytest.mark.parametrize("form", quantized.FORMATS)
def test_rows_fold_exactly_by_powers_of_two_and_columns_do_not(model, form):
    names = [f"model.layers.0.{name}" for name in quantized.MATRICES]
    blocks = {name: quantized.quantize(model.get_submodule(name).weight, form) for name in names}
    vectors = make_ia3(model, powers_of_two=True)
    for l in vectors.parameters():
        l.data.abs_()  # quantizing again gives other blocks for a negative factor
    folded = {way: quantized.fold(blocks, vectors, form, way) for way in quantized.WAYS}
    ends = {"k_proj": vectors.l_k[0], "v_proj": vectors.l_v[0], "up_proj": vectors.l_ff[0]}
    for name, tensor in folded["scales"].items():
        exact = ends[name.split(".")[-1]].detach().unsqueeze(1) * dequantize(blocks[name])
        assert torch.equal(dequantize(tensor), exact)
        assert (folded["rows"][name].data != tensor.data).sum() <= 0.01 * tensor.data.size  # a scale's last bit
    down = "model.layers.0.mlp.down_proj"
    exact = dequantize(blocks[down]) * vectors.l_ff[0].detach()
    assert not torch.allclose(dequantize(folded["columns"][down]), exact, rtol=1e-3)


def test_a_format_takes_the_vectors_that_float_learned_and_scales_keep_nearest_to_them(tmp_path, model, monkeypatch):
    monkeypatch.setattr(quantized, "floats", lambda path: model)
    monkeypatch.setattr(quantized, "K", 4)
    settings = {"gguf": f"{tmp_path}", "folder": f"{tmp_path}", "data": f"{write_sets(tmp_path / 'data')}"}
    settings |= {"steps": 3, "items": 6}
    before = (None, fingerprint(model))  # all jobs share the model
    job = quantized.Job("movies", "Q4_1", 0)
    with pytest.raises(FileNotFoundError, match=r"movies-0\.npz"):
        quantized.measure(settings, job)
    base, right = quantized.measure(settings, job._replace(form="float"))
    assert base.base_rms > 0 and base.base_accuracy == right["base"].mean()
    found, right = quantized.measure(settings, job)
    assert found.unmerged_accuracy == right["unmerged"].mean() and found.rows_accuracy == right["rows"].mean()
    # a scale is off by 2^-11, a weight that is quantized again by half of a fifteenth of its block's range
    assert found.scales_rms < found.columns_rms / 10 and found.scales_kl < found.columns_kl
    assert found.scales_same >= found.columns_same and found.size > 0 and 0 < found.scales_bytes < 1
    assert (model.ia3, fingerprint(model)) == before


def test_answers_are_read_at_the_end_of_each_prompt(model):
    examples = [([1, 2, 3], [[4], [5]], 0), ([6, 7], [[8], [9], [10]], 2)]
    logits = quantized.answer_logits(model, examples)
    for row, (prompt, _, _) in zip(logits, examples, strict=True):
        assert torch.equal(row, model(torch.tensor([prompt]))[0][0, -1])
    logits[:, [5, 6, 9]] = 100
    assert quantized.answers(logits, examples).tolist() == [1, 1]
    assert quantized.distance(logits, logits) == (0, 0)


@pytest.mark.parametrize("made", [[], ["float"], ["float", *quantized.FORMATS[1:]]])
def test_tables_of_runs_that_are_not_all_there_are_refused_in_one_line(tmp_path, capsys, made):
    results, arrays = lab.load_runs(lab.RESULTS / "quantized", quantized.Job, quantized.Result)
    results = {job: result for job, result in results.items() if job.form in made}
    if results:
        lab.write_runs(tmp_path, results, arrays)
    assert quantized.main(["--tables", f"--out={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path) in err


def test_minutes_are_for_both_stages_and_formats_wait_for_the_vectors(tmp_path, capsys, monkeypatch):
    """The clock stands; after half an hour of vectors, half an hour is left for the formats."""
    (tmp_path / "base.gguf").touch()
    write_sets(tmp_path)
    now = [0.0]
    granted = []
    n_left = [1, 0]

    def make_runs(jobs, measure, result_type, folder, workers, minutes):
        granted.append(({job.form for job in jobs}, minutes))
        now[0] += 30 * 60
        return dict.fromkeys(jobs[n_left.pop(0) :]) if n_left else {}

    monkeypatch.setattr(quantized.time, "time", lambda: now[0])
    monkeypatch.setattr(lab, "make_runs", make_runs)
    flags = [f"--gguf={tmp_path}/base.gguf", f"--data={tmp_path}", f"--out={tmp_path}/out", "--minutes=60"]
    assert quantized.main(flags) == 0
    assert granted == [({"float"}, 60)]
    assert quantized.main(flags) == 0
    assert granted[1:] == [({"float"}, 60), (set(quantized.FORMATS), 30)]
    (tmp_path / "base.gguf").write_text("another")
    assert quantized.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
