"""The texts, the tokenizers, and batches as a function of (seed, step)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import prepare

DATA = Path(data.__file__).parent
CORPORA = ("plays", "folio", "sonnets", "kjv")


def text(name, split):
    return (DATA / name / f"{split}.txt").read_text(encoding="utf-8")


def test_no_long_line_stands_in_two_splits():
    """Not in two splits of one corpus, nor in any corpus's train, which the base or vectors read, and another's val."""
    lines = {
        split: {line.strip() for name in CORPORA for line in text(name, split).split("\n") if len(line.strip()) >= 40}
        for split in ("train", "val", "test")
    }
    assert min(map(len, lines.values())) > 3000
    assert not lines["train"] & lines["val"]
    assert not lines["train"] & lines["test"]
    assert not lines["val"] & lines["test"]


@pytest.mark.parametrize(
    "play, modern, folio",
    [
        ("Macbeth", "Is this a dagger which I see before me,", "To morrow, and to morrow, and to morrow,"),
        ("Twelfth Night", "If music be the food of love, play on,", "If Musicke be the food of Loue, play on,"),
        ("Julius Caesar", "The evil that men do lives after them;", "The euill that men do, liues after them,"),
        ("Merchant of Venice", "All that glisters is not gold,", "All that glisters is not gold,"),
        ("As You Like It", "And all the men and women merely players;", "And all the men and women, meerely Players;"),
        ("Richard II", "This royal throne of kings, this scepter'd isle,", "This royall Throne of Kings,"),
        ("Two Gentlemen of Verona", "Who is Silvia? What is she,", "Who is Siluia? what is she?"),
    ],
)
def test_held_out_plays_are_in_no_training_text_in_either_spelling(play, modern, folio):
    held = "val" if play in ("Macbeth", "Twelfth Night") else "test"
    only_1623 = play in ("As You Like It", "Richard II", "Two Gentlemen of Verona")
    corpora = ("folio",) if only_1623 else ("plays", "folio")
    for name in CORPORA:
        for split in ("train", "val", "test"):
            found = modern in text(name, split) or folio in text(name, split)
            assert found == (split == held and name in corpora), (name, split)


def test_sizes():
    for name in CORPORA:
        for split in ("val", "test"):
            size = (DATA / name / f"{split}.txt").stat().st_size
            most = 600e3 if (name, split) == ("folio", "test") else 250e3  # five plays, where the others hold two
            assert 100e3 <= size <= most or name == "sonnets", (name, split, size)
    assert 8e6 < sum(path.stat().st_size for path in DATA.glob("*/*.txt")) < 12e6


def test_prepare_drops_a_line_that_an_earlier_split_holds_however_it_is_punctuated():
    line = "When my love swears that she is made of truth,"
    corpora = {
        "a": {"train": f"{line}\nshort line\n", "val": "unlike, and long enough to be looked at here\n", "test": "x\n"},
        "b": {"train": "\n", "val": f"  {line.upper()[:-1]};\nshort line\n", "test": f"{line}\nkept\n"},
    }
    prepare.drop_repeats(corpora)
    assert corpora["b"] == {"train": "\n", "val": "short line\n", "test": "kept\n"}
    assert corpora["a"]["val"].startswith("unlike")


def test_a_byte_is_its_own_token():
    bytes_ = data.get_tokenizer("bytes")
    everything = "".join(map(chr, range(0x20, 0x250))) + "\n\t€ 𝄞"
    assert bytes_.encode_ordinary(everything) == list(everything.encode())
    assert bytes_.decode(bytes_.encode_ordinary(everything)) == everything
    assert bytes_.n_vocab == 257 and bytes_.eot_token == 256
    with pytest.raises(ValueError, match="unknown tokenizer"):
        data.get_tokenizer("words")


def test_gpt2s_tokenizer_is_tiktokens():
    try:
        gpt2 = data.get_tokenizer("gpt2")
    except OSError as e:
        pytest.skip(f"tiktoken could not fetch gpt2's ranks: {type(e).__name__}")
    assert gpt2.encode_ordinary("Hello world") == [15496, 995] and gpt2.n_vocab == 50257


def test_every_byte_of_a_stream_is_predicted_once():
    tokens = np.arange(23, dtype=np.uint8)
    stream = data.Stream(tokens, block_size=5)
    x, y = stream.windows(range(len(stream)))
    assert len(stream) == 5 and x.shape == y.shape == (5, 5) and x.dtype == torch.long
    assert y[y >= 0].tolist() == list(range(1, 23))
    assert torch.equal(x[y >= 0] + 1, y[y >= 0])


def test_a_batch_is_a_function_of_seed_and_step():
    stream = data.Stream(np.arange(10_000, dtype=np.uint16), block_size=7)
    x, y = stream.batch(seed=1, step=5, batch_size=4)
    assert torch.equal(x + 1, y) and x.shape == (4, 7)
    assert torch.equal(stream.batch(1, 5, 4)[0], x)
    assert not torch.equal(stream.batch(1, 6, 4)[0], x) and not torch.equal(stream.batch(2, 5, 4)[0], x)
    starts = {row[0].item() for step in range(3000) for row in stream.batch(0, step, 4)[0]}
    assert min(starts) < 20 and max(starts) > 10_000 - 8 - 20  # both ends are drawn


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def examples(tmp_path):
    rows = [
        {"prompt": "ab", "completion": "cde"},
        {"prompt": "", "completion": "xy"},
        {"prompt": "long one", "completion": "!"},
    ]
    for split in ("train", "val"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return data.load(tmp_path, "bytes", 257, 16)["train"]


def test_only_completions_carry_loss_and_rows_are_padded(examples):
    x, y = examples.windows([0, 1, 2])
    assert x.shape == (3, 8)  # "long one!" less its last character
    assert [bytes(row[row >= 0].tolist()).decode() for row in y] == ["cde", "y", "!"]  # nothing precedes the x of "xy"
    assert bytes(x[0].tolist()) == b"abcd\0\0\0\0"
    assert y[0].tolist() == [-1, *b"cde", -1, -1, -1, -1]


def test_a_prompt_to_go_on_from_does_not_give_the_completion_away(examples):
    assert examples.prompt(64).tolist() == [[*b"ab"]] and examples.prompt(1).tolist() == [[*b"b"]]
    examples.examples = examples.examples[1:]  # without a prompt one token there must be
    assert examples.prompt(64).tolist() == [[*b"x"]]
    stream = data.Stream(np.arange(20), 8)
    assert stream.prompt(5).tolist() == [[0, 1, 2, 3, 4]] and stream.prompt(64).size(1) == 20
    assert examples.n_tokens == 5


def test_an_epoch_reads_every_example_once(examples):
    for epoch in range(4):
        first = sorted(row[0].item() for step in range(3) for row in examples.batch(0, 3 * epoch + step, 1)[0])
        assert first == sorted(b"axl")
    assert examples.batch(0, 0, 7)[0].shape == (7, 8)  # a batch larger than the data


def test_bin_files_are_nanogpts_and_memory_mapped(tmp_path):
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    train = data.load(tmp_path, None, 100, 16)["train"]
    assert isinstance(train.tokens, np.memmap) and train.n_bytes is None
    assert train.windows([1])[0][0].tolist() == list(range(16, 32))


def test_a_name_under_data_and_any_path_work(tmp_path, monkeypatch):
    assert data.load("sonnets", "bytes", 257, 128)["val"].n_bytes == (DATA / "sonnets/val.txt").stat().st_size
    (tmp_path / "val.txt").write_bytes(bytes(range(256)))  # any bytes are text to the bytes tokenizer
    val = data.load(tmp_path, "bytes", 257, 128, ["val"])["val"]
    assert val.tokens.tolist() == list(range(256))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sonnets").symlink_to(tmp_path)  # a folder of the user's, called as one of ours
    for here in (".", "../" + tmp_path.name, "./sonnets", "sonnets/"):
        assert data.load(here, "bytes", 257, 128, ["val"])["val"].tokens.tolist() == list(range(256))
    assert data.load("sonnets", "bytes", 257, 128, ["val"])["val"].n_bytes == (DATA / "sonnets/val.txt").stat().st_size


def good_folder(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("enough text for a window of sixteen")
    return tmp_path


def jsonl(line):
    def write(folder):
        (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
        (folder / "val.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    return write


@pytest.mark.parametrize(
    "spoil, tokenizer, message",
    [
        (lambda f: (f / "val.txt").unlink(), "bytes", "val.txt is missing"),
        (lambda f: (f / "train.txt").unlink(), "bytes", "holds no train.jsonl, train.bin or train.txt"),
        (lambda f: (f / "train.txt").write_text(""), "bytes", "train.txt holds 0 tokens, too few"),
        (lambda f: (f / "val.txt").write_text("x" * 16), "bytes", "val.txt holds 16 tokens, too few"),
        (lambda f: (f / "train.txt").write_bytes(b"caf\xe9" * 99), "gpt2", "train.txt is not UTF-8 text"),
        (lambda f: None, None, "tokenizer is unknown"),
        (lambda f: np.full(99, 257, np.uint16).tofile(f / "train.bin"), "bytes", "token id 257, beyond"),
        (lambda f: (f / "train.bin").write_bytes(b"abc"), "bytes", "no file of uint16 tokens"),
        (lambda f: (f / "train.bin").write_bytes(b""), "bytes", "empty"),
        (jsonl('{"prompt": "a"'), "bytes", "train.jsonl line 3: not JSON"),
        (jsonl('{"prompt": "a"}'), "bytes", "train.jsonl line 3: wants"),
        (jsonl('{"prompt": "a", "completion": 7}'), "bytes", "train.jsonl line 3: wants"),
        (jsonl('["a", "b"]'), "bytes", "train.jsonl line 3: wants"),
        (jsonl('{"prompt": "a", "completion": ""}'), "bytes", "train.jsonl line 3: the completion is empty"),
        (jsonl('{"prompt": "0123456789", "completion": "0123456789"}'), "bytes", "line 3: 20 tokens do not fit"),
        (jsonl("\xff"), "bytes", "train.jsonl line 3: not JSON"),
        (lambda f: (f / "train.jsonl").write_text("\n"), "bytes", "holds no examples"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, tokenizer, message):
    spoil(good_folder(tmp_path))
    if tokenizer == "gpt2":
        try:
            data.get_tokenizer("gpt2")
        except OSError:
            pytest.skip("tiktoken could not fetch gpt2's ranks")
    with pytest.raises((ValueError, OSError), match=message):
        data.load(tmp_path, tokenizer, 257, 16)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(OSError, match="folio, kjv, plays, sonnets"):
        data.load("psalms", "bytes", 257, 16)
