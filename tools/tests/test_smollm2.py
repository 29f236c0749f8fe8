"""data/smollm2.pt, the real base, against transformers' and tokenizers' reading of the same GGUF file.

Only where `python -m tools.convert smollm2` has made it, and fetched the file that stands beside it.
"""

from pathlib import Path

import pytest
import torch
from helpers import odd_texts
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaForCausalLM

import common
from sample import chat_turn, generate
from tools.convert import from_gguf, to_hf

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "data/smollm2.pt"
GGUF = ROOT / "data/smollm2.gguf"

pytestmark = pytest.mark.skipif(
    not GGUF.exists(), reason="no data/smollm2.gguf: python -m tools.convert smollm2 fetches it"
)


@pytest.fixture(scope="module")
def theirs():
    return LlamaForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours():
    return common.load(CHECKPOINT)


def test_the_dequantized_weights_are_theirs_bit_for_bit_and_the_file_holds_them_rounded(theirs, ours):
    read = from_gguf(GGUF)
    expected = theirs.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, t in read.state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, expected[name]), name
        assert torch.equal(t.bfloat16().float(), ours.state_dict()[name]), name
    assert read.config == ours.config
    rope = theirs.config.rope_parameters
    assert (ours.config.rope_base, ours.config.n_kv_head) == (rope["rope_theta"], theirs.config.num_key_value_heads)


def test_the_config_is_smollm2s(ours):
    config = ours.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head, config.n_hidden) == (30, 576, 9, 3, 1536)
    assert (config.vocab_size, config.block_size, config.rope_base, config.norm_eps) == (49152, 8192, 1e5, 1e-5)
    assert config.tied and config.rope_scaling is None


@torch.no_grad()
def test_greedy_text_is_theirs_token_for_token(theirs, ours):
    for p in theirs.parameters():
        p.copy_(p.bfloat16())  # the same weights, rounded; both run in float32
    for text in ("The capital of France is", "Q: What is 17 + 25?\nA:", "def fibonacci(n):\n"):
        prompt = torch.tensor([ours.tokenizer.encode_ordinary(text)])
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(generate(ours, prompt, 40, temperature=0), expected), text


@torch.no_grad()
def test_an_answer_ends_itself_here_and_in_transformers(tmp_path, ours):
    """What ends a text goes out with to-hf, so transformers stops where we do, without being asked to."""
    to_hf(ours, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = torch.tensor([chat_turn(ours.tokenizer, "What is the capital of France?")])
    found = generate(ours, prompt, 40, temperature=0, end=ours.tokenizer.eos)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    assert torch.equal(found, expected)
    assert found.size(1) < prompt.size(1) + 40
    assert ours.tokenizer.decode(found[0].tolist()).endswith("Paris.<|im_end|>")
    # behind the system message that the template begins with, the turn is chat_turn's
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    chat = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turn, add_generation_prompt=True)
    assert chat["input_ids"][-prompt.size(1) :] == prompt[0].tolist()


def test_ids_are_those_of_the_tokenizers_library(ours):
    """transformers' GGUF reader forgets the file's rule for digits, so the oracle is put together from its parts."""
    import gguf

    fields = gguf.GGUFReader(GGUF).fields
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    theirs = Tokenizer(BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert len(ours.tokenizer.bytes_without_token) == 21
    with_missing = 0
    for text in [*odd_texts(), (ROOT / "data/plays/val.txt").read_text()[:100_000]]:
        ids = ours.tokenizer.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        with_missing += any(byte in ours.tokenizer.bytes_without_token for byte in text.encode())
    assert with_missing > 100
    assert ours.tokenizer.decode([1, *ours.tokenizer.encode_ordinary("In 1623, a book"), 2]) == (
        "<|im_start|>In 1623, a book<|im_end|>"
    )
