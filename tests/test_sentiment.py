"""The rated sentences: what prepare.py makes of an archive, a small made one and, slow, the real one."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import data
from data import prepare
from data.tokenizer import Tokenizer

DATA = Path(prepare.__file__).parent
TASKS = ("movies", "products", "news", "tweets", "source", "movies-ab", "movies-flipped")
SPLITS = ("train", "val", "test")
BYTES = Tokenizer("bytes", 257)


def made_sets():
    """{set: [(id, rating, text)]}, each with 40 clear cases, 20 a class, and more to trip over."""

    def text(name, number):
        return f"The {name} café says {{}} and {{this}}, number {number}."

    sets = {}
    for name in ("movies", "tweets"):
        sets[name] = [(str(i), "1.0" if i % 2 else "-1", text(name, i)) for i in range(1, 41)]
    for name in ("products", "news"):  # 10 reviews or articles of 4 sentences
        ids = [(i, f"{1 + i // 4}_{1 + i % 4}") for i in range(40)]
        sets[name] = [(number, "2.5" if i % 2 else "-1.0625", text(name, i)) for i, number in ids]
    sets["movies"].insert(0, ("51", "3.5", "Spoken of in the pilot!"))
    sets["movies"] += [
        ("52", "3.5", "... spoken of, in the PILOT"),
        ("53", "0.99", "Not bad."),
        ("54", "-0.99", "Meh."),
    ]
    sets["tweets"] += [("61", "2", "@anonymous THE TWEETS café says and &lt;this: number 1!!! http://url_removed")]
    sets["tweets"] += [("62", "3", "@anonymous :) :)"), ("63", "-2", "The news café says {} and {this} number 3")]
    sets["tweets"] += [("64", "0", "So.")]
    return sets


PILOT_IDS = [*map(str, range(1, 21)), "52"]


def make_archive(path):
    """An sdist as the real one is built: an archive in an archive, CRLF, UTF-8, no line break at the end."""

    def add(tar, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name, rows in made_sets().items():
            content = "\r\n".join("\t".join(row) for row in rows).encode()
            add(tar, f"hutto_ICWSM_2014/{prepare.RATED_FILES[name]}", content)
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder that prepare.py made of the small archive: 5 a class, of news 3."""
    pilot = tmp_path / "pilot.txt"
    pilot.write_text("# why\n" + " ".join(PILOT_IDS[:7]) + "\n" + " ".join(PILOT_IDS[7:]) + "\n")
    monkeypatch.setattr(prepare, "PILOT", pilot)
    monkeypatch.setattr(prepare, "PER_CLASS", {"movies": 5, "products": 5, "news": 3, "tweets": 5})
    prepare.prepare_sentiment(make_archive(tmp_path / "made.tar.gz"), tmp_path / "made")
    return tmp_path / "made"


def read(folder, task, kind, split):
    lines = (folder / task / kind / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_split(folder, task, kind="choices-1"):
    return {split: read(folder, task, kind, split) for split in SPLITS}


def all_rows(folder, task):
    return [row for split in SPLITS for row in read(folder, task, "choices-1", split)]


def sentence(row):
    return row["prompt"].removeprefix("Sentence: ").rsplit("\n", 1)[0]  # in the first template


def test_what_is_rated_between_is_dropped_and_its_share_printed(made, capsys, tmp_path):
    prepare.prepare_sentiment(tmp_path / "made.tar.gz", made)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "movies: 44 sentences, 5% dropped as ambiguous, 1 as repeated",
        "products: 40 sentences, 0% dropped as ambiguous, 0 as repeated",
        "news: 40 sentences, 0% dropped as ambiguous, 0 as repeated",
        "tweets: 44 sentences, 2% dropped as ambiguous, 3 as repeated",
    ]
    ratings = {f"{name}-{row[0]}": float(row[1]) for name, rows in made_sets().items() for row in rows}
    for task in ("movies", "products", "news", "tweets"):
        for row in all_rows(made, task):
            assert abs(ratings[row["id"]]) >= 1
            assert row["choices"][row["label"]] == (" positive" if ratings[row["id"]] > 0 else " negative")
    ids = {row["id"] for row in all_rows(made, "movies")}
    assert {"movies-1", "movies-2"} <= ids  # +1 and -1 themselves are clear


def test_a_text_is_copied_as_it_stands(made):
    """Braces, accents and all, though templates are filled by str.format."""
    for row in all_rows(made, "products"):
        review, number = map(int, row["id"].removeprefix("products-").split("_"))
        text = f"The products café says {{}} and {{this}}, number {4 * (review - 1) + number - 1}."
        assert row["prompt"] == f"Sentence: {text}\nSentiment:"


def test_val_and_test_are_balanced_and_train_has_the_rest(made):
    for task, n in (("movies", 5), ("products", 5), ("news", 3), ("tweets", 5), ("movies-flipped", 5)):
        rows = by_split(made, task)
        for split in ("val", "test"):
            assert [row["label"] for row in rows[split]].count(1) == n, (task, split)
            assert len(rows[split]) == 2 * n
        if task in ("movies", "tweets"):
            assert len(rows["train"]) == (21 if task == "movies" else 20)  # nothing is lost
    for split, n in (("val", 6), ("test", 6)):
        labels = [row["label"] for row in by_split(made, "source")[split]]
        assert [labels.count(label) for label in range(4)] == [n] * 4
    assert 0 < sum(row["label"] for row in by_split(made, "movies")["test"][:5]) < 5  # classes are mixed, not in a row


def test_no_text_stands_twice_however_it_is_written(made):
    """Over all splits of all four sets: a set may be trained on before another is tested."""
    texts = []
    for task in ("movies", "products", "news", "tweets"):
        texts += [sentence(row) for row in all_rows(made, task)]
    letters = ["".join(c for c in text.lower() if c.isascii() and c.isalnum()) for text in texts]
    assert len(set(letters)) == len(letters)
    ids = {row["id"] for task in ("movies", "tweets") for row in all_rows(made, task)}
    assert "movies-51" in ids and not {"movies-52", "tweets-61", "tweets-62", "tweets-63"} & ids


def test_a_review_or_an_article_stands_in_one_split(made):
    for task in ("products", "news"):
        groups = {split: {row["id"].split("_")[0] for row in rows} for split, rows in by_split(made, task).items()}
        assert all(groups.values())
        assert len(set().union(*groups.values())) == sum(map(len, groups.values())) == 10


def test_what_is_tested_was_trained_on_nowhere(made):
    train = {row["id"] for task in TASKS for row in read(made, task, "choices-1", "train")}
    val = {row["id"] for task in TASKS for row in read(made, task, "choices-1", "val")}
    test = {row["id"] for task in TASKS for row in read(made, task, "choices-1", "test")}
    assert len(test) == 10 + 10 + 6 + 10
    assert not test & train and not test & val and not val & train


def test_what_the_pilot_saw_is_in_no_test(made):
    """By its text, too: 51 is kept, 52 is in the pilot's list, and both are the same sentence."""
    for task in TASKS:
        for split in ("val", "test"):
            ids = {row["id"] for row in read(made, task, "choices-1", split)}
            assert not ids & {f"movies-{number}" for number in [*PILOT_IDS, "51"]}, (task, split)
    train = {row["id"] for row in read(made, "movies", "choices-1", "train")}
    assert {f"movies-{number}" for number in [*range(1, 21), 51]} <= train


def test_the_variants_of_movies_are_the_same_sentences_with_other_answers(made):
    for split in SPLITS:
        plain = read(made, "movies", "choices-1", split)
        flipped = read(made, "movies-flipped", "choices-1", split)
        letters = read(made, "movies-ab", "choices-1", split)
        assert [row["id"] for row in plain] == [row["id"] for row in flipped] == [row["id"] for row in letters]
        assert [row["prompt"] for row in plain] == [row["prompt"] for row in flipped]
        assert [row["label"] for row in plain] == [1 - row["label"] for row in flipped]
        assert [" AB"[row["label"] + 1] for row in plain] == [row["choices"][row["label"]][1:] for row in letters]
    for prompt, _ in prepare.LETTERS:
        assert not any(word in prompt for word in ("good", "bad", "entiment", "pleased", "itive", "gative"))


def test_source_is_the_set_that_the_id_names(made):
    for split in SPLITS:
        rows = read(made, "source", "choices-1", split)
        assert rows and all(list(prepare.RATED_FILES)[row["label"]] == row["id"].split("-")[0] for row in rows)
        assert {" movies", " products", " news", " Twitter"} == {row["choices"][row["label"]] for row in rows}


def test_the_four_folders_hold_the_same_examples_in_the_same_order(made):
    for task in TASKS:
        templates = set()
        for split in SPLITS:
            choices = [read(made, task, f"choices-{number}", split) for number in (1, 2, 3)]
            for *rows, example in zip(*choices, read(made, task, "completions", split), strict=True):
                assert [row["template"] for row in rows] == [1, 2, 3]
                assert len({row["prompt"] for row in rows}) == 3
                assert {row["id"] for row in rows} == {example["id"]} and len({row["label"] for row in rows}) == 1
                assert all(sentence(rows[0]) in row["prompt"] for row in rows)
                drawn = rows[example["template"] - 1]
                assert example["prompt"] == drawn["prompt"]
                assert example["completion"] == drawn["choices"][drawn["label"]]
                templates.add(example["template"])
        assert templates == {1, 2, 3}


def test_train_reads_them(made):
    for task in TASKS:
        loaded = data.load(made / task / "completions", BYTES, 257, 512, SPLITS)
        assert [len(loaded[split]) for split in SPLITS] == [len(read(made, task, "completions", s)) for s in SPLITS]


@pytest.mark.parametrize("templates", [prepare.SENTIMENT, prepare.LETTERS, prepare.SOURCE])
def test_answers_are_of_unequal_length(templates):
    """In bytes, the phrases of the second and third templates; and the longest answer is another one in each."""
    lengths = [[len(BYTES.encode_ordinary(choice)) for choice in choices] for _, choices in templates]
    for n in lengths[1:]:
        assert len(set(n)) == len(n)
    assert lengths[1].index(max(lengths[1])) != lengths[2].index(max(lengths[2]))


@pytest.mark.slow
@pytest.mark.parametrize("templates", [prepare.SENTIMENT, prepare.LETTERS, prepare.SOURCE])
def test_answers_are_of_unequal_length_in_tokens_or_of_one(templates):
    tokenizer = Tokenizer("gpt2", 50257)
    try:
        tokenizer.encode_ordinary("x")
    except OSError as e:
        pytest.skip(f"tiktoken could not fetch gpt2's ranks: {type(e).__name__}")
    lengths = [[len(tokenizer.encode_ordinary(choice)) for choice in choices] for _, choices in templates]
    assert set(lengths[0]) == {1}
    for n in lengths[1:]:
        assert len(set(n)) == len(n)


def digest(folder):
    """One hash of every file's path and bytes."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jsonl"))
    found = hashlib.sha256()
    for path in paths:
        found.update(path.encode() + (folder / path).read_bytes())
    return found.hexdigest()


def test_another_process_writes_the_same_bytes(made, tmp_path):
    """Under other seeds of Python's own hashes, and with what an earlier run left lying there."""
    before = digest(made)
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(DATA)!r})
import prepare
prepare.PILOT = pathlib.Path({str(prepare.PILOT)!r})
prepare.PER_CLASS = {prepare.PER_CLASS!r}
prepare.prepare_sentiment({str(tmp_path / "made.tar.gz")!r}, pathlib.Path(sys.argv[1]))
"""
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, made], env=env, check=True, capture_output=True)
        assert digest(made) == before
    assert not list(made.rglob("*.tmp"))


# digest() of what the real archive gives: an experiment's results stand on these splits and templates
REAL = "5a6d33f7060b3e2793e33ded5bcf2fd89432aa7883576df05554961a2b8f2036"


@pytest.mark.slow
def test_the_real_archive(tmp_path, capfd):
    try:
        archive = prepare.fetch(prepare.RATED_SDIST, prepare.RATED_SHA256, tmp_path)
    except subprocess.CalledProcessError:
        if "No matching distribution" not in capfd.readouterr().err:
            raise
        pytest.skip("pip finds no package index here")
    prepare.prepare_sentiment(archive, tmp_path / "real")
    page = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"$ python data/prepare.py sentiment\n{capfd.readouterr().out}```" in page
    for task in TASKS:
        rows = by_split(tmp_path / "real", task)
        n_classes = 4 if task == "source" else 2
        for split in ("val", "test"):
            labels = [row["label"] for row in rows[split]]
            n = 100 if task == "news" else 200
            assert [labels.count(label) for label in range(n_classes)] == [n] * n_classes, (task, split)
        assert len(rows["train"]) >= 1000
    pilot = {f"movies-{number}" for number in prepare.read_pilot()}
    train = {row["id"] for row in read(tmp_path / "real", "movies", "choices-1", "train")}
    assert len(pilot) == 300 and pilot <= train
    with tarfile.open(archive) as outer:  # how many people rated a sentence, as data/README.md has it
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = outer.extractfile(name).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        for name, file in prepare.RATED_FILES.items():
            ratings = tar.extractfile(f"hutto_ICWSM_2014/{file.replace('GroundTruth', 'anonDataRatings')}").read()
            counts = [len(json.loads(line.split("\t")[3])) for line in ratings.decode("utf-8").split("\r\n") if line]
            assert min(counts) == (15 if name == "movies" else 20)
    assert digest(tmp_path / "real") == REAL
