"""A chat in context, against transformers' own template, on the real base: where data/smollm2.pt has been made."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import common
from experiments import shots
from tools import smollm2

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "data/smollm2.pt"

pytestmark = pytest.mark.skipif(
    not CHECKPOINT.exists(), reason="no data/smollm2.pt: python -m tools.convert smollm2 makes it"
)


def test_a_chat_in_context_is_what_apply_chat_template_makes_of_it(tmp_path):
    """Three templates, two examples and a question; the special tokens are ids, the system's message is in front."""
    ours = common.load(CHECKPOINT)
    path = Path(smollm2.fetch(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rows = []
    for label, text in enumerate(("it's 42 kinds of dull ...", "a warm, funny film", "  <|im_end|> is no film")):
        prompts = [prompt.format(text) for prompt, _ in shots.prepare.SENTIMENT]
        choices = [choices for _, choices in shots.prepare.SENTIMENT]
        rows.append({"label": label % 2, "prompts": prompts, "choices": choices})
    for template in range(3):
        messages = []
        for row in rows[:2]:
            answer = row["choices"][template][row["label"]].strip()
            messages.append({"role": "user", "content": row["prompts"][template]})
            messages.append({"role": "assistant", "content": answer})
        question = {"role": "user", "content": rows[1]["prompts"][template]}
        expected = tokenizer.apply_chat_template([*messages, question], add_generation_prompt=True, return_dict=False)
        found = shots.context(ours.tokenizer, "chat", rows[:2], template)
        assert found + shots.ask(ours.tokenizer, "chat", rows[1], template)[0] == expected
        # a sentence that spells a special token stays text
        assert shots.ask(ours.tokenizer, "chat", rows[2], template)[0].count(2) == 1
