"""tokenizer.json, or vocab.json and merges.txt, in and out: the ids are the tokenizers library's, or it is refused."""

import json
import os
import re
from pathlib import Path

import pytest
import tokenizers
import transformers
from helpers import change_json, odd_texts, read_json
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from conftest import make_gpt, make_llama_with_bpe
from data.tokenizer import GPT2, LLAMA3, SMOLLM2, Tokenizer
from tools import bpe
from tools.convert import from_hf, to_hf
from tools.hf_tokenizer import read_tokenizer, write_tokenizer

TRAIN = Path(__file__).parents[2] / "data/folio/train.txt"
LLAMA3_REGEX = (  # as its tokenizer.json has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pre_tokenizer(pattern):
    """The tokenizers library's own objects for what the pattern does."""
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == GPT2:
        return by_bytes
    if pattern == SMOLLM2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    cut = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_REGEX), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_theirs(pattern, alphabet=True):
    """Trained here, on folio and on digits and odd spaces; alphabet: with a token for every byte.

    SmolLM2's is trained without its rule for digits, so that there are tokens of several digits and of spaces before
    one, which only the rule keeps from being made.
    """
    theirs = tokenizers.Tokenizer(BPE())
    theirs.pre_tokenizer = pre_tokenizer(GPT2 if pattern == SMOLLM2 else pattern)
    text = TRAIN.read_text()[:100_000] + "In 1623,  16 23\n\n    1623 \t 45  \n it's I'LL don't" * 300
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<end>", "<start>"], initial_alphabet=letters)
    theirs.train_from_iterator([text], trainer)
    theirs.pre_tokenizer = pre_tokenizer(pattern)
    return theirs


def the_same_ids(theirs, ours):
    for text in [*odd_texts(), TRAIN.read_text()[100_000:120_000]]:
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


# --- tokenizer.json ---


@pytest.mark.parametrize("pattern", [GPT2, SMOLLM2, LLAMA3], ids=["gpt2", "smollm2", "llama3"])
@pytest.mark.parametrize("alphabet", [True, False], ids=["all bytes", "some bytes"])
def test_a_tokenizer_json_comes_in_and_goes_out(pattern, alphabet):
    """Bytes that the vocabulary has no token of are left out, since the text that it was trained on has none."""
    theirs = make_theirs(pattern, alphabet)
    assert pattern != SMOLLM2 or {"Ġ1623", "ĊĊĠĠĠ"} <= theirs.get_vocab().keys()
    theirs.save("tokenizer.json")
    ours = read_tokenizer(".", 700, {})
    assert ours.about["pattern"] == pattern and ours.about["special_tokens"] == {"<end>": 0, "<start>": 1}
    assert bool(ours.bytes_without_token) != alphabet
    the_same_ids(theirs, ours)
    assert ours.decode([0, *ours.encode_ordinary("In 1623"), 10**6]) == "<end>In 1623"  # and padding is no text
    write_tokenizer(ours, ".")
    assert read_tokenizer(".", 700, {}).about == ours.about
    for back in (
        tokenizers.Tokenizer.from_file("tokenizer.json"),
        transformers.AutoTokenizer.from_pretrained(".").backend_tokenizer,
    ):
        the_same_ids(back, ours)
        text = "<start>it's 1623<end>"  # which the library reads as special tokens, and decodes
        assert back.decode(back.encode(text).ids, skip_special_tokens=False) == text
        assert back.encode(text).ids == [1, *ours.encode_ordinary("it's 1623"), 0]


def test_added_tokens_that_are_not_special_are_found_in_a_text():
    """Those that are special stay text, and the library agrees once its setting leaves them so."""
    theirs = make_theirs(GPT2)
    theirs.add_tokens(["<new>", "1623"])
    theirs.add_special_tokens(["<sep>"])
    theirs.save("tokenizer.json")
    ours = read_tokenizer(".", 710, {})
    assert ours.about["special_tokens"] | {"<new>": 700, "1623": 701, "<sep>": 702} == ours.about["special_tokens"]
    text = "the <new> King in 1623<new><sep> <end>\n <new"
    theirs.encode_special_tokens = True  # as text, the library means
    assert {700, 701} < set(ours.encode_ordinary(text)) and 702 not in ours.encode_ordinary(text)
    assert ours.encode_ordinary(text) == theirs.encode(text).ids
    the_same_ids(theirs, ours)
    write_tokenizer(ours, ".")
    assert read_tokenizer(".", 710, {}).about == ours.about
    back = tokenizers.Tokenizer.from_file("tokenizer.json")
    back.encode_special_tokens = True
    assert back.encode(text).ids == theirs.encode(text).ids


def test_an_added_token_has_the_id_that_the_library_gives_it():
    """Behind a gap it is another one than the file says."""
    theirs = make_theirs(GPT2)
    theirs.add_tokens(["<new>"])
    theirs.save("tokenizer.json")
    change_tokenizer("added_tokens", lambda tokens: [*tokens[:-1], tokens[-1] | {"id": 705}], ".")
    assert tokenizers.Tokenizer.from_file("tokenizer.json").token_to_id("<new>") == 700
    with pytest.raises(ValueError, match=r"'<new>' has id 705.* 700"):
        read_tokenizer(".", 710, {})


@pytest.mark.parametrize("tokens", [["<a>", "<a>b"], ["zzing", "pzzing"], ["<sep", "p>"], ["<e"]], ids=" ".join)
def test_added_tokens_that_overlap_are_refused(tokens):
    """Which of them is found in a text is a matter of the library: here the longest, in tiktoken any."""
    theirs = make_theirs(GPT2)
    theirs.add_tokens(tokens)
    theirs.save("tokenizer.json")
    with pytest.raises(ValueError, match=r"the added tokens .* overlap"):
        read_tokenizer(".", 710, {})


def test_every_merge_that_makes_a_token_as_llama_3s_file_has_them():
    """With tokens that lower ids do not make of two: only a whole piece, or merges of higher ids first, become them."""
    theirs = make_theirs(LLAMA3)
    ranks = {bpe.as_bytes(token): i for token, i in theirs.get_vocab().items() if i > 1}
    ranks |= {b" zounds": 700, b"zo": 701, b"zounds": 702, b"12": 703, b"23": 704, b"123": 705}
    about = {"pattern": LLAMA3, "ranks": ranks, "special_tokens": {"<end>": 0, "<start>": 1}}
    assert len(bpe.split(b" zounds", ranks)) > 2 and len(bpe.split(b"123", ranks)) == 2
    write_tokenizer(Tokenizer(about, 710), ".")
    assert read_tokenizer(".", 710, {}).about == about
    merges = [(a, b) for token in sorted(ranks, key=ranks.get) for a, b in bpe.all_halves(token, ranks)]
    older = [f"{bpe.as_letters(a)} {bpe.as_letters(b)}" for a, b in merges]  # the older spelling of a pair
    change_tokenizer("model.merges", older, ".")
    ours = read_tokenizer(".", 710, {})
    assert ours.about == about
    theirs = tokenizers.Tokenizer.from_file("tokenizer.json")
    the_same_ids(theirs, ours)
    for text in ("zounds", " zounds", " zoundszounds", "xzounds zound 1234 12 3"):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, text
    change_tokenizer("model.ignore_merges", False, ".")
    with pytest.raises(ValueError, match="do not make the token b' zounds' as the ids do"):
        read_tokenizer(".", 710, {})
    other = tokenizers.Tokenizer.from_file("tokenizer.json")
    assert other.encode(" zounds").ids != ours.encode_ordinary(" zounds")  # so it is rightly refused


def test_merges_in_the_order_of_the_ids_are_not_enough():
    """Here abc is a and bc, but lower ids make ab and c of it: the library never makes it, tiktoken does."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    theirs = tokenizers.Tokenizer(BPE(vocab, [("a", "b"), ("b", "c"), ("a", "bc")]))
    theirs.pre_tokenizer = pre_tokenizer(GPT2)
    theirs.save("tokenizer.json")
    with pytest.raises(ValueError, match="do not make the token b'abc' as the ids do"):
        read_tokenizer(".", 6, {})
    ranks = {token.encode(): i for token, i in vocab.items()}
    ours = Tokenizer({"pattern": GPT2, "ranks": ranks, "special_tokens": {}}, 6)
    assert (theirs.encode("abc").ids, ours.encode_ordinary("abc")) == ([3, 2], [5])


# --- in a model's folder ---


@pytest.fixture
def hf():
    """hf/, a folder of a tiny LLaMA with a BPE of its own. Returns its Tokenizer."""
    model = make_llama_with_bpe()
    to_hf(model, "hf")
    return model.tokenizer


def test_a_gpt2_with_a_tokenizer_of_its_own(hf):
    """Also where its vocabulary has the size of GPT-2's."""
    to_hf(make_gpt(vocab_size=50257), "own")
    assert from_hf("own").tokenizer.about == "gpt2"
    write_tokenizer(hf, "own")
    model = from_hf("own")
    assert model.tokenizer.about == hf.about and model.tokenizer.decode(model.tokenizer.encode_ordinary("the")) == "the"
    to_hf(model, "again")
    assert from_hf("again").tokenizer.about == hf.about


def test_a_gpt2s_own_vocab_and_merges_are_read_and_never_guessed():
    """As many ids as GPT-2's, another vocabulary. The ids and what ends a text are transformers'."""
    to_hf(make_gpt(vocab_size=50257), "own")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(["the King's 1623 the thee th"] * 9, vocab_size=290, special_tokens=["<|endoftext|>"])
    theirs.save_model("own")
    assert not Path("own/tokenizer.json").exists()
    ours = from_hf("own").tokenizer
    theirs = transformers.GPT2Tokenizer("own/vocab.json", "own/merges.txt", split_special_tokens=True)
    for text in ("the King's  1623\n\nthee é", "<|endoftext|> the"):
        assert ours.encode_ordinary(text) == theirs.encode(text)
    assert ours.about["special_tokens"] == {"<|endoftext|>": 0} and ours.decode([0]) == "<|endoftext|>"
    assert ours.eos == [theirs.eos_token_id] == [0]
    n = len(ours.ids)
    Path("own/added_tokens.json").write_text(json.dumps({"<new>": n, "<pad>": n + 1}))
    Path("own/special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    tokens = {n: {"content": "<new>", "special": False}, n + 1: {"content": "<pad>", "special": True}}
    for settings in ({}, {"added_tokens_decoder": tokens}):
        Path("own/tokenizer_config.json").write_text(json.dumps(settings))
        theirs = transformers.AutoTokenizer.from_pretrained("own", split_special_tokens=True)
        ids = from_hf("own").tokenizer.encode_ordinary("the <new> King <pad>")
        assert ids == theirs("the <new> King <pad>").input_ids and n in ids and n + 1 not in ids
    os.rename("own/vocab.json", "own/vocab.json.off")
    assert from_hf("own").tokenizer is None


def test_what_begins_and_ends_a_text_comes_in_and_goes_home(hf):
    """transformers stops where ours does, and AutoTokenizer has the names and the chat template."""
    change_json("hf/config.json", bos_token_id=264, eos_token_id=[0, 20])
    change_json("hf/tokenizer_config.json", eos_token={"content": "<start>"})
    Path("hf/generation_config.json").write_text(json.dumps({"eos_token_id": [20, 0, 10**6]}))
    Path("hf/chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    model = from_hf("hf")
    assert (model.tokenizer.bos, model.tokenizer.eos) == (264, [264, 20, 0])  # the tokenizer's own first, none it lacks
    to_hf(model, "home")
    auto = transformers.AutoTokenizer.from_pretrained("home")
    assert (auto.bos_token_id, auto.eos_token_id) == (264, 264)
    assert auto.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    theirs = transformers.LlamaForCausalLM.from_pretrained("home")
    assert theirs.generation_config.eos_token_id == [264, 20, 0]
    again = from_hf("home").tokenizer
    assert (again.bos, again.eos, again.chat_template) == (264, [264, 20, 0], "{{ messages[0]['content'] }}!")


def test_a_model_without_a_tokenizer_or_with_bytes():
    """What ends a text is in config.json even so, if it is known; a LLaMA's default is sentencepiece's 2."""
    for vocab_size, ends in ((257, 256), (61, None)):
        to_hf(make_gpt(vocab_size=vocab_size), "gpt")
        assert read_json("gpt/config.json")["eos_token_id"] == ends
    model = make_llama_with_bpe()
    model.tokenizer = None
    to_hf(model, "llama")
    assert sorted(os.listdir("llama")) == ["config.json", "pytorch_model.bin"]
    assert transformers.LlamaConfig.from_pretrained("llama").eos_token_id == 2
    assert from_hf("llama").tokenizer is None


def test_what_older_and_other_files_say(hf):
    """Without use_regex, which is then true; trim_offsets is of places in the text, not of ids. No byte is unknown."""
    change_tokenizer("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False})
    change_tokenizer("model.unk_token", "<unk>")
    assert from_hf("hf").tokenizer.about == hf.about | {"pattern": GPT2}


# --- what is refused ---


def change_tokenizer(key, value, folder="hf"):
    """Set a place in tokenizer.json, such as model.type. value: a function takes what is there."""
    whole = read_json(f"{folder}/tokenizer.json")
    node = whole
    *way, last = key.split(".")
    for step in way:
        node = node[step]
    node[last] = value(node[last]) if callable(value) else value
    Path(f"{folder}/tokenizer.json").write_text(json.dumps(whole))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
PLAIN = {"id": 0, "content": "<new>", "special": False}
END = {"id": 0, "content": "<end>", "special": True}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model", [], "hf/tokenizer.json: AttributeError"),
        ("model.type", "Unigram", "a tokenizer of type 'Unigram'"),
        ("model.byte_fallback", True, "byte_fallback is True"),
        ("model.dropout", 0.1, "dropout is 0.1"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>'"),
        ("normalizer", {"type": "NFC"}, 'the normalizer {"type": "NFC"} is not known'),
        ("pre_tokenizer", None, "the pre_tokenizer null is not known"),
        ("pre_tokenizer", {"type": "Metaspace"}, 'pre_tokenizer {"type": "Metaspace"}'),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, '"add_prefix_space": true'),
        ("pre_tokenizer", BYTE_LEVEL | {"use_regex": False}, '"use_regex": false'),
        ("pre_tokenizer.pretokenizers", [SPLIT, BYTE_LEVEL], '"Regex": "'),
        ("pre_tokenizer.pretokenizers", [{"type": "Digits"}, BYTE_LEVEL], '"Digits"'),
        ("pre_tokenizer.pretokenizers", 5, "hf/tokenizer.json: TypeError"),
        ("added_tokens", [PLAIN], "'<new>' has id 0"),
        ("added_tokens", [END | {"special": False, "lstrip": True}], "'<end>' has lstrip"),
        ("added_tokens", [{"id": 0}], "'content'"),
        ("added_tokens", [END | {"id": 98, "content": "a"}], "'a' is a special token and a byte's own"),
        ("added_tokens", [END | {"id": 265, "content": ""}], "special_tokens"),
        ("model.merges", lambda m: [m[1], m[0], *m[2:]], "the merges are not in the order of the ids"),
        ("model.merges", lambda m: [m[0], *m[2:]], "the merges do not make the token b' th' as the ids do"),
        ("model.merges", lambda m: [*m[:2], ["t", "he"], *m[3:]], "b't' and b'he'"),
        ("model.merges", lambda m: [*m, ["x", "y"]], "b'x' and b'y'"),
        ("model.merges", lambda m: [*m, "xyz"], "hf/tokenizer.json: "),
        ("model.merges", lambda m: [*m, 5], "hf/tokenizer.json: TypeError"),
        ("model.vocab", lambda v: {token: i for token, i in v.items() if token != "th"}, "b't' and b'h'"),
        ("model.vocab", lambda v: v | {"日": 270}, "the token '日' is not in the spelling of byte-level BPE"),
        ("model.vocab", lambda v: v | {"th": "257"}, "hf/tokenizer.json: TypeError"),
        ("model.vocab", lambda v: v | {"x": 10**6}, "hf/tokenizer.json: a tokenizer's ids must be whole numbers"),
        ("model.vocab", lambda v: v | {"": 270}, "hf/tokenizer.json: "),
    ],
)
def test_tokenizers_that_are_another_kind(hf, key, value, message):
    change_tokenizer(key, value)
    check_refused(message)


def test_an_unknown_token_where_a_byte_has_none(hf):
    change_tokenizer("model.unk_token", "a")
    change_tokenizer("model.vocab", lambda v: {token: i for token, i in v.items() if token != "b"})
    check_refused("unk_token is 'a'")


def test_files_that_are_no_tokenizer_json(hf):
    for text, message in (("{", "hf/tokenizer.json is not JSON"), ("{}", "hf/tokenizer.json: KeyError: 'model'")):
        Path("hf/tokenizer.json").write_text(text)
        check_refused(message)


def check_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        from_hf("hf")
    assert "\n" not in str(e.value)
