"""A chat in context, against transformers' own template, on the real base: where `make smollm2` has made it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import common
from experiments import shots

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "data/smollm2.gguf"
BASE = ROOT / "data/smollm2.pt"

pytestmark = pytest.mark.skipif(
    not (GGUF.exists() and BASE.exists()), reason="no data/smollm2.gguf and .pt: make smollm2 makes them"
)


def test_a_chat_in_context_is_what_apply_chat_template_makes_of_it():
    """Three templates, two examples and a question; the special tokens are ids, the system's message is in front."""
    ours = common.load(BASE, None)
    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    rows = []
    for label, text in enumerate(("it's 42 kinds of dull ...", "a warm, funny film", "  <|im_end|> is no film")):
        prompts = [prompt.format(text) for prompt, _ in shots.prepare.SENTIMENT]
        choices = [choices for _, choices in shots.prepare.SENTIMENT]
        rows.append(shots.Sentence(label % 2, prompts, choices))
    for template in range(3):
        messages = []
        for row in rows[:2]:
            answer = row.choices[template][row.label].strip()
            messages.append({"role": "user", "content": row.prompts[template]})
            messages.append({"role": "assistant", "content": answer})
        question = {"role": "user", "content": rows[1].prompts[template]}
        expected = tokenizer.apply_chat_template([*messages, question], add_generation_prompt=True, return_dict=False)
        found = shots.context(ours.tokenizer, "chat", rows[:2], template)
        assert found + shots.ask(ours.tokenizer, "chat", rows[1], template)[0] == expected
        # a sentence that spells a special token stays text
        assert shots.ask(ours.tokenizer, "chat", rows[2], template)[0].count(2) == 1
