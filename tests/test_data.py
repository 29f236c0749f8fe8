"""The texts, the tokenizers, and batches as a function of (seed, step)."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
from conftest import make_gpt, make_llama
from data import prepare
from data.tokenizer import GPT2, N_IDS, Tokenizer

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
            least = 15e3 if name == "sonnets" else 100e3
            assert least <= size <= most, (name, split, size)
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


BYTES = Tokenizer("bytes", 257)


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = Tokenizer("gpt2", 50304)
    try:
        tokenizer.encode_ordinary("a")
    except OSError as e:
        pytest.skip(f"tiktoken could not fetch gpt2's ranks: {type(e).__name__}")
    return tokenizer


def test_a_byte_is_its_own_token():
    everything = "".join(map(chr, range(0x20, 0x250))) + "\n\t€ 𝄞"
    assert BYTES.encode_ordinary(everything) == list(everything.encode())
    assert BYTES.decode(BYTES.encode_ordinary(everything)) == everything
    assert BYTES.encode_ordinary("<|endoftext|>") == list(b"<|endoftext|>") and BYTES.decode([256]) == "<|endoftext|>"
    assert copy.deepcopy(BYTES) is BYTES and BYTES.about == "bytes"


def test_ids_that_pad_a_vocabulary_stand_for_no_text():
    assert Tokenizer("bytes", 300).decode([65, 257, 299, 66]) == "AB"


@pytest.mark.parametrize(
    "about, vocab_size, message",
    [
        ("words", 257, "unknown tokenizer 'words': there are bytes, gpt2"),
        (7, 257, "unknown tokenizer '7'"),
        ("bytes", 256, "tokenizer bytes has 257 ids, but the vocabulary only 256"),
        ("gpt2", 257, "tokenizer gpt2 has 50257 ids, but the vocabulary only 257"),
    ],
)
def test_tokenizers_that_there_are_not_or_that_do_not_fit_are_refused(about, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(about, vocab_size)


def test_gpt2s_tokenizer_is_tiktokens(gpt2):
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 50300, 995]) == "Hello world"  # padding, as in nanoGPT's vocabulary of 50304
    assert gpt2.encoding.n_vocab == N_IDS["gpt2"] and BYTES.encoding.n_vocab == N_IDS["bytes"]


def test_gpt2_reads_text_in_utf_8_and_its_bytes_are_counted(gpt2, tmp_path):
    (tmp_path / "val.txt").write_text("Hello world, ² ³ " * 9, encoding="utf-8")
    val = data.load(tmp_path, gpt2, 50304, 16, ["val"])["val"]
    assert val.tokens.tolist() == gpt2.encode_ordinary("Hello world, ² ³ " * 9) and val.n_bytes == 19 * 9
    (tmp_path / "val.txt").write_bytes(b"caf\xe9" * 99)
    with pytest.raises(ValueError, match=r"val.txt is not UTF-8 text \(byte 3\)"):
        data.load(tmp_path, gpt2, 50304, 16, ["val"])


def test_a_text_of_one_window_is_enough(tmp_path):
    (tmp_path / "train.txt").write_text("x" * 17)
    (tmp_path / "val.txt").write_text("x" * 17)
    assert [len(split) for split in data.load(tmp_path, Tokenizer("bytes", 257), 257, 16).values()] == [1, 1]
    with pytest.raises(ValueError, match="holds 17 tokens, too few for one window of block_size 17"):
        data.load(tmp_path, Tokenizer("bytes", 257), 257, 17)


def test_of_several_kinds_of_file_the_documented_order_decides(tmp_path):
    for kind in ("txt", "bin", "jsonl"):
        for split in ("train", "val"):
            (tmp_path / f"{split}.{kind}").touch()
        assert {path.suffix for path in data.find(tmp_path).values()} == {f".{kind}"}


def test_whoever_reads_val_alone_reads_the_val_of_training(tmp_path):
    """A val.jsonl beside train.txt and val.txt is not for them; without any train, val's own kind decides."""
    for name in ("train.txt", "val.txt", "val.jsonl", "test.bin"):
        (tmp_path / name).touch()
    assert data.find(tmp_path, ["val"]) == {"val": tmp_path / "val.txt"}
    (tmp_path / "train.txt").unlink()
    assert data.find(tmp_path, ["val"]) == {"val": tmp_path / "val.jsonl"}
    assert data.find(tmp_path, ["test"]) == {"test": tmp_path / "test.bin"}


def test_every_byte_of_a_stream_is_predicted_once():
    tokens = np.arange(23, dtype=np.uint8)
    stream = data.Stream(tokens, block_size=5)
    x, y = stream.windows(range(len(stream)))
    assert len(stream) == 5 and x.shape == y.shape == (5, 5) and x.dtype == torch.long
    assert y[y >= 0].tolist() == list(range(1, 23))
    assert torch.equal(x[y >= 0] + 1, y[y >= 0])
    assert len(data.Stream(tokens[:21], 5)) == 4  # windows that fit exactly have no empty one behind them


def test_a_batch_is_a_function_of_seed_and_step():
    stream = data.Stream(np.arange(10_000, dtype=np.uint16), block_size=7)
    x, y = stream.batch(seed=1, step=5, batch_size=4)
    assert torch.equal(x + 1, y) and x.shape == (4, 7)
    assert torch.equal(stream.batch(1, 5, 4)[0], x)
    assert not torch.equal(stream.batch(1, 6, 4)[0], x) and not torch.equal(stream.batch(2, 5, 4)[0], x)
    short = data.Stream(np.arange(10), block_size=7)
    assert set(short.batch(0, 0, 100)[0][:, 0].tolist()) == {0, 1, 2}  # every start that leaves a whole window


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
    return data.load(tmp_path, BYTES, 257, 16)["train"]


def test_an_example_may_fill_the_window(tmp_path):
    """17 tokens, the end token among them, are 16 inputs and 16 targets."""
    write_jsonl(tmp_path / "val.jsonl", [{"prompt": "0123456789", "completion": "012345"}])
    assert data.load(tmp_path, BYTES, 257, 16, ["val"])["val"].windows([0])[0].shape == (1, 16)


def test_only_completions_carry_loss_and_rows_are_padded(examples):
    x, y = examples.windows([0, 1, 2])
    assert x.shape == (3, 9)  # "long one!"; its end token is a target only
    # nothing precedes the x of "xy"
    assert [row[row >= 0].tolist() for row in y] == [[*b"cde", 256], [*b"y", 256], [*b"!", 256]]
    assert bytes(x[0].tolist()) == b"abcde\0\0\0\0"
    assert y[0].tolist() == [-1, *b"cde", 256, -1, -1, -1, -1]


def test_a_prompt_to_go_on_from_does_not_give_the_completion_away(examples):
    assert examples.prompt(64).tolist() == [[*b"ab"]] and examples.prompt(1).tolist() == [[*b"b"]]
    examples.examples = examples.examples[1:]  # without a prompt one token there must be
    assert examples.prompt(64).tolist() == [[*b"x"]]
    stream = data.Stream(np.arange(20), 8)
    assert stream.prompt(5).tolist() == [[0, 1, 2, 3, 4]] and stream.prompt(64).size(1) == 20


def test_the_hash_of_a_split_tells_it_from_others(examples):
    tokens = np.arange(98, dtype=np.uint8)
    other = tokens.copy()
    other[50] += 1
    splits = [data.Stream(tokens, 8), data.Stream(tokens, 9), data.Stream(tokens.view(np.uint16), 8)]
    splits += [data.Stream(other, 8), examples, data.Examples(examples.examples[:2])]
    assert len({split.data_hash() for split in splits}) == 6
    assert data.Stream(tokens.copy(), 8).data_hash() == splits[0].data_hash()
    assert data.Examples(list(examples.examples)).data_hash() == examples.data_hash()


def test_an_epoch_reads_every_example_once(examples):
    for epoch in range(4):
        first = sorted(row[0].item() for step in range(3) for row in examples.batch(0, 3 * epoch + step, 1)[0])
        assert first == sorted(b"axl")
    assert examples.batch(0, 0, 7)[0].shape == (7, 9)  # a batch larger than the data
    orders = {tuple(examples.batch(seed, 0, 3)[0][:, 0].tolist()) for seed in range(20)}
    assert len(orders) > 3  # of six
    epochs = {tuple(examples.batch(0, epoch, 3)[0][:, 0].tolist()) for epoch in range(20)}
    assert len(epochs) > 3


def test_a_batch_that_crosses_an_epoch_takes_from_both_what_is_theirs():
    examples = data.Examples([([1], [i]) for i in range(5)])
    seen = [y for step in range(10) for y in examples.batch(0, step, 2)[1].flatten().tolist()]
    assert [sorted(seen[i : i + 5]) for i in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4


def test_bin_files_are_nanogpts_and_memory_mapped(tmp_path):
    for split in ("train", "val"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").write_bytes(b"never opened")  # nanoGPT's for characters: fine without a tokenizer
    train = data.load(tmp_path, None, 100, 16)["train"]
    assert isinstance(train.tokens, np.memmap) and train.n_bytes is None and train.n_tokens == 99
    assert train.windows([1])[0][0].tolist() == list(range(16, 32))


def test_a_name_under_data_and_any_path_work(tmp_path, monkeypatch):
    assert data.load("sonnets", BYTES, 257, 128)["val"].n_bytes == (DATA / "sonnets/val.txt").stat().st_size
    (tmp_path / "val.txt").write_bytes(bytes(range(256)))  # any bytes are text to the bytes tokenizer
    val = data.load(tmp_path, BYTES, 257, 128, ["val"])["val"]
    assert val.tokens.tolist() == list(range(256))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sonnets").symlink_to(tmp_path)  # a folder of the user's, called as one of ours
    for here in (".", "../" + tmp_path.name, "./sonnets", "sonnets/"):
        assert data.load(here, BYTES, 257, 128, ["val"])["val"].tokens.tolist() == list(range(256))
    assert data.load("sonnets", BYTES, 257, 128, ["val"])["val"].n_bytes == (DATA / "sonnets/val.txt").stat().st_size


def good_folder(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("enough text for a window of sixteen")
    return tmp_path


def raw(kind, content):
    """What writes content as both splits' files of that kind into a folder."""

    def write(folder):
        for split in ("train", "val"):
            (folder / f"{split}.{kind}").write_bytes(content)

    return write


def jsonl(line):
    return raw("jsonl", b'{"prompt": "a", "completion": "b"}\n\n' + line.encode() + b"\n")


@pytest.mark.parametrize(
    "spoil, tokenizer, message",
    [
        (lambda f: (f / "val.txt").unlink(), BYTES, "val.txt is missing"),
        (lambda f: (f / "train.txt").unlink(), BYTES, "holds no train.jsonl, train.bin or train.txt"),
        (lambda f: (f / "train.txt").write_text(""), BYTES, "train.txt holds 0 tokens, too few"),
        (lambda f: (f / "val.txt").write_text("x" * 16), BYTES, "val.txt holds 16 tokens, too few"),
        (lambda f: None, None, "tokenizer is unknown"),
        (raw("bin", np.full(99, 257, np.uint16).tobytes()), BYTES, "id 257, beyond"),
        (raw("bin", b"abc"), BYTES, "uint16 .*: 3 bytes"),
        (raw("bin", np.arange(1, 99, dtype=np.uint32).tobytes()), BYTES, "0 in every second place"),
        (raw("bin", np.arange(1, 99, dtype=np.int64).tobytes()), BYTES, "0 in every second place"),
        (lambda f: (raw("bin", bytes(range(99, 199)))(f), (f / "meta.pkl").touch()), BYTES, "meta.pkl"),
        (raw("bin", b""), BYTES, "empty"),
        (jsonl('{"prompt": "a"'), BYTES, "train.jsonl line 3: not JSON"),
        (jsonl('{"prompt": "a"}'), BYTES, "train.jsonl line 3: .*prompt.*completion"),
        (jsonl('{"prompt": "a", "completion": 7}'), BYTES, "train.jsonl line 3: .*prompt.*completion"),
        (jsonl('["a", "b"]'), BYTES, "train.jsonl line 3: .*prompt.*completion"),
        (jsonl('{"prompt": "a", "completion": ""}'), BYTES, "train.jsonl line 3"),
        (jsonl('{"prompt": "0123456789", "completion": "01234567"}'), BYTES, "line 3: 19 tokens do not fit"),
        (jsonl("\xff"), BYTES, "train.jsonl line 3: not JSON"),
        (jsonl("[" * 100_000), BYTES, "train.jsonl line 3: not JSON"),
        (jsonl('{"prompt": "a", "choices": ["b", "c"], "answer": 0}'), BYTES, "line 3: choices to rank: python -m exp"),
        (jsonl('{"prompt": "", "completion": "b"}'), BYTES, "train.jsonl line 3"),
        (raw("jsonl", b"\n"), BYTES, "holds no examples"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, tokenizer, message):
    spoil(good_folder(tmp_path))
    with pytest.raises((ValueError, OSError), match=message):
        data.load(tmp_path, tokenizer, 257, 16)


def llm_c(magic, version, tokens):
    """A token file of llm.c's: a header of 256 numbers, and the tokens."""
    return np.array([magic, version, len(tokens)] + [0] * 253, dtype=np.int32).tobytes() + tokens.tobytes()


@pytest.mark.parametrize(
    "vocab_size, width, to_file",
    [
        (65536, np.uint16, np.ndarray.tobytes),
        (65537, np.uint32, np.ndarray.tobytes),
        (128256, np.uint16, lambda tokens: llm_c(20240520, 1, tokens)),
        (128256, np.uint32, lambda tokens: llm_c(20240801, 7, tokens)),
    ],
    ids=["nanoGPT", "wide", "llm.c", "llm.c wide"],
)
def test_ids_are_as_wide_as_the_vocabulary_or_the_header_says(tmp_path, vocab_size, width, to_file):
    """A file of half that width is refused: two of its ids read as one are beyond the vocabulary."""
    end = min(vocab_size, np.iinfo(width).max + 1)
    tokens = np.arange(end - 600, end, dtype=width)
    raw("bin", to_file(tokens))(tmp_path)
    assert np.array_equal(data.load(tmp_path, None, vocab_size, 16)["val"].tokens, tokens)
    if width == np.uint32:
        raw("bin", np.arange(2, 602, dtype=np.uint16).tobytes())(tmp_path)
        with pytest.raises(ValueError, match=f"uint32 .* beyond the vocabulary of {vocab_size}"):
            data.load(tmp_path, None, vocab_size, 16)


class PanicException(BaseException):
    """As tiktoken raises it: not an Exception."""


class Panics:
    def encode(self, text, **_):
        raise PanicException("a long story of Rust's")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_where_tiktoken_panics_one_line_names_the_file(tmp_path, kind):
    tokenizer = Tokenizer("gpt2", 50304)
    tokenizer.encoding = Panics()
    raw("txt", b"a" * 99)(tmp_path)
    if kind == "jsonl":
        jsonl("")(tmp_path)
    with pytest.raises(ValueError, match=f"train.{kind}"):
        data.load(tmp_path, tokenizer, 50304, 16)


def test_without_a_network_tiktokens_folder_is_named(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name):
        raise OSError("Max retries exceeded with url, and more")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer("gpt2", 50304).encode_ordinary("a")


# What the loss is of


INSTRUCTIONS = [
    {"prompt": "Modern: I have seen it.\nFolio: ", "completion": "I haue seene it."},
    {"prompt": "Modern: Go up.\nFolio: ", "completion": "Goe vp."},
    {"prompt": "Modern: He is kind to us.\nFolio: ", "completion": "Hee is kinde to vs."},
]


def read_instructions(folder, rows):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    return data.load(folder, BYTES, 257, 64)["train"]


def test_prompt_targets_carry_no_loss_but_the_prompt_counts(tmp_path):
    """In float64, whose rounding is below 1e-12 of a loss of about 6 nats."""
    model = make_gpt(block_size=64).double()
    split = read_instructions(tmp_path, INSTRUCTIONS)
    x, y = split.windows([0])
    n_prompt = len(INSTRUCTIONS[0]["prompt"])
    loss = model(x, y)[1]
    log_p = model(x)[0].log_softmax(-1)[0, n_prompt - 1 :]
    assert torch.allclose(loss, -log_p.gather(1, y[0, n_prompt - 1 :, None]).mean(), rtol=1e-12)
    edited = x.clone()
    edited[0, 3] = ord("X")  # a prompt token: no target of its own, but context
    assert (model(edited, y)[1] - loss).abs() > 1e-6


def test_padding_changes_nothing(tmp_path):
    """The batch's loss is the mean over all completion tokens, as if each example were read alone. Float64."""
    model = make_gpt(block_size=64).double()
    split = read_instructions(tmp_path, INSTRUCTIONS)
    x, y = split.windows([0, 1, 2])
    alone = [split.windows([i]) for i in range(3)]
    n = torch.tensor([(t >= 0).sum() for _, t in alone])
    losses = torch.stack([model(*pair)[1] for pair in alone])
    assert len({t.size(1) for _, t in alone}) == 3
    assert torch.allclose(model(x, y)[1], (losses * n).sum() / n.sum(), rtol=1e-12)
    other = x.clone()
    other[1, alone[1][0].size(1) :] = 7  # what stands in the padding
    assert not torch.equal(other, x)
    assert torch.allclose(model(other, y)[1], model(x, y)[1], rtol=1e-12)


# A byte-level BPE's own tokenizer, as a Llama's checkpoint holds it


def small_bpe():
    ranks = {bytes([i]): i for i in range(97, 123)} | {b"ab": 200, b" ": 201}
    return {"pattern": GPT2, "ranks": ranks, "special_tokens": {"<end>": 256}}


def test_a_checkpoint_holds_its_tokenizer_whole(tmp_path):
    model = make_llama()
    model.tokenizer = Tokenizer(small_bpe(), 257, bos=97, eos=[256, 98], chat_template="{{ x }}")
    common.save(model, tmp_path / "a.pt")
    again = common.load(tmp_path / "a.pt").tokenizer
    assert (again.bos, again.eos, again.chat_template) == (97, [256, 98], "{{ x }}")
    assert again.about == small_bpe() and again.decode([200, 256, 255]) == "ab<end>"
    assert again.encode_ordinary("ab a") == model.tokenizer.encode_ordinary("ab a") != []


def test_ends_that_are_not_a_tokenizers_are_refused():
    for control in ({"bos": 300}, {"eos": [97, 5]}, {"eos": 256}, {"chat_template": 7}):
        with pytest.raises(ValueError, match=r"bos|eos|template"):
            Tokenizer(small_bpe(), 257, **control)
    for about, end in (("bytes", 256), ("gpt2", 50256)):
        named = Tokenizer(about, 50257)
        assert (named.bos, named.eos) == (end, [end])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ranks": {b"a": 0, b"b": 0}}, "the same id"),
        ({"special_tokens": {"<end>": 97}}, "the same id"),
        ({"special_tokens": {"<end>": 257}}, "from 0 to the vocabulary's 256"),
        ({"ranks": {b"a": -1}}, "from 0 to the vocabulary's 256"),
        ({"ranks": {b"a": 1.0}}, "must be whole numbers"),
        ({"ranks": {"a": 1}}, "ranks must be a dict of bytes"),
        ({"ranks": [b"a"]}, "ranks must be a dict of bytes"),
        ({"special_tokens": {b"end": 256}}, "special_tokens must be a dict of str"),
        ({"pattern": None}, "pattern must be"),
        ({"pattern": "."}, "pattern must be"),
        ({"merges": []}, "has pattern, ranks, special_tokens, not"),
        ({"plain_tokens": ["<other>"]}, "must be special_tokens, too"),
        ({"ranks": {b"a": 0}, "plain_tokens": ["<end>"]}, "a token for every byte"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(small_bpe() | changed, 257)
