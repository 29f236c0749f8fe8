#!/bin/bash
# The rated tweets in the source distribution of vaderSentiment 3.3.2 (Hutto & Gilbert 2014): 199 of 4,200 labels are
# not the mean of the ratings that come with them.
#
# Each of the four data sets has a file of texts with their mean rating and a file of raw ratings, and the README says
# that the two correspond. For reviews and editorials they do. For the tweets 199 means differ, by up to 1.13 on the
# scale from -4 to 4, all of them among the thousand tweets that more than 90 people rated. No sign differs.
# The README also promises at least 20 raters everywhere: 7,275 of the 10,605 sentences on movies have 15 to 19.
#
# Output seen (labels that differ from the mean of their ratings last):
#   movieReviewSnippets  10,605 texts    15 to 29 raters, 7,275 texts under 20    0 differ
#   amazonReviewSnippets  3,708 texts    20 to 20 raters, 0 texts under 20        0 differ
#   nytEditorialSnippets  5,190 texts    20 to 20 raters, 0 texts under 20        0 differ
#   tweets                4,200 texts    20 to 99 raters, 0 texts under 20        199 differ by up to 1.13, 0 in sign
#
# Exits 1 if that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check setuptools==80.9.0
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
    --no-build-isolation --dest "$folder" vaderSentiment==3.3.2
tar -xzf "$folder/vaderSentiment-3.3.2.tar.gz" -C "$folder"
tar -xzf "$folder/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz" -C "$folder"
"$folder/venv/bin/python" - "$folder/hutto_ICWSM_2014" <<'END'
import json
import sys
from pathlib import Path


def read(name):
    """{id: the other fields} of a tab-delimited file; one begins with a byte order mark."""
    text = (Path(sys.argv[1]) / name).read_bytes().decode("utf-8-sig", errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if "\t" in line]
    return {row[0]: row[1:] for row in rows}


found = []
for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
    labels = read(f"{name}_GroundTruth.txt")
    raw = read(f"{name}_anonDataRatings.txt")
    differences = []
    counts = []
    signs = 0
    for key, fields in labels.items():
        ratings = json.loads(raw[key][-1])
        mean = sum(ratings) / len(ratings)
        counts.append(len(ratings))
        if abs(float(fields[0]) - mean) > 1e-6:
            differences.append(abs(float(fields[0]) - mean))
            signs += float(fields[0]) * mean < 0
    few = len([count for count in counts if count < 20])
    largest = f" by up to {max(differences):.2f}, {signs} in sign" if differences else ""
    told = f"{len(differences)} differ{largest}"
    raters = f"{min(counts)} to {max(counts)} raters, {few:,} texts under 20"
    print(f"{name:20s} {len(labels):6,} texts    {raters:41s} {told}")
    found.append((len(labels), len(differences), few))
sys.exit(found != [(10605, 0, 7275), (3708, 0, 0), (5190, 0, 0), (4200, 199, 0)])
END
