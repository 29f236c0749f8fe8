"""Byte-level BPE: others list merges, our Tokenizer has ranks. Where both give the same ids, one becomes the other.

Merges are pairs of tokens that become one, in the order in which they are tried. tiktoken, and so Tokenizer, has none:
it takes a piece of text that is a token as it is, and else joins the two neighbours that make the token of the lowest
id, again and again. Both give the same ids if, and only if, the merges say what the ids say; check_merges looks.

Others spell a token in letters, one for each byte: 'Ġthe' is b' the'.
"""

from itertools import pairwise


def alphabet():
    """{letter: byte} of GPT-2's spelling: a byte that Latin-1 prints is that letter, the others from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [i for i in range(256) if i not in printed]
    return {chr(i): i for i in printed} | {chr(0x100 + n): i for n, i in enumerate(others)}


ALPHABET = alphabet()
LETTERS = {byte: letter for letter, byte in ALPHABET.items()}


def as_bytes(token):
    """'Ġthe' is b' the'. Raises ValueError for a letter that is no byte's."""
    try:
        return bytes(ALPHABET[letter] for letter in token)
    except KeyError:
        raise ValueError(f"the token {token!r} is not in the spelling of byte-level BPE") from None


def as_letters(token):
    """b' the' is 'Ġthe'."""
    return "".join(LETTERS[byte] for byte in token)


def split(token, ranks):
    """Merge token's bytes by the ranks, {bytes: id}, below its own. Returns what is left.

    Two parts are token's last merge. More are left if ranks never make it.
    """
    own = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
        lowest = min(joined)
        if lowest >= own:
            break
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def all_halves(token, ranks):
    """Every pair of tokens that make token."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    return [(a, b) for a, b in cuts if a in ranks and b in ranks]


# --- out: the merges of our ranks ---


def to_merges(ranks):
    """Return [(bytes, bytes)] that give the ids of ranks where a piece that is a token is taken as it is."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = split(token, ranks)
        if len(parts) == 2:
            merges.append(parts)
        elif len(parts) > 2:
            merges += all_halves(token, ranks)
    return merges


# --- in: our ranks of their merges ---


def from_merges(pattern, vocabulary, merges, special, whole_pieces=False, plain=()):
    """Return a byte-level BPE as Tokenizer takes it: a dict of pattern, ranks and special_tokens.

    pattern       one of data's, which cuts a text into pieces
    vocabulary    {token in letters: id}, with or without special
    merges        [(token, token)], in letters
    special       {text: id}
    whole_pieces  whether a piece that is a token is taken as it is, without merges
    plain         those of special that are found in a text, too

    Raises ValueError where Tokenizer would give other ids.
    """
    ranks = {as_bytes(token): i for token, i in vocabulary.items() if token not in special}
    for token in special:
        if token in ALPHABET and token in vocabulary:  # a text's own byte would then have no token
            raise ValueError(f"{token!r} is a special token and a byte's own")
    check_merges(ranks, [(as_bytes(a), as_bytes(b)) for a, b in merges], whole_pieces)
    about = {"pattern": pattern, "ranks": ranks, "special_tokens": special}
    if plain:
        check_plain(plain, special)
        about["plain_tokens"] = list(plain)
    return about


def check_merges(ranks, pairs, whole_pieces):
    """Raise ValueError unless merging pairs in their order is merging by ranks.

    Split a token by ranks. If two parts remain, their merge must be listed. If more remain, merging by ranks never
    makes the token: then a piece that is a token must be taken whole, and all merges of two tokens to it be listed.
    """
    listed = {token: set() for token in ranks}
    order = []
    for a, b in pairs:
        if a not in ranks or b not in ranks or a + b not in ranks:
            raise ValueError(f"the merge of {a!r} and {b!r} does not join two tokens to a third")
        listed[a + b].add((a, b))
        order.append(ranks[a + b])
    if order != sorted(order):
        raise ValueError("the merges are not in the order of the ids")
    for token in ranks:
        parts = split(token, ranks)
        if len(parts) == 2:
            fits = tuple(parts) in listed[token]
        elif len(parts) > 2:
            fits = whole_pieces and listed[token] == set(all_halves(token, ranks))
        else:
            fits = True  # a byte
        if not fits:
            raise ValueError(f"the merges do not make the token {token!r} as the ids do")


def check_plain(plain, special):
    """Raise ValueError where two tokens can share a letter: which is found would then depend on the library."""
    for text in plain:
        for other in special:
            if other != text and (can_overlap(text, other) or can_overlap(other, text)):
                raise ValueError(f"the added tokens {text!r} and {other!r} overlap")


def can_overlap(a, b):
    """Whether b can begin within a in a text."""
    return any(a[i:].startswith(b) or b.startswith(a[i:]) for i in range(len(a)))
