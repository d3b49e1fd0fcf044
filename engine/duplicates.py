"""Texts that say the same, in groups.

Two texts are near-identical if their words are the same but for case, punctuation and white space, or if the sets of their
three-word sequences have a Jaccard similarity of at least 0.8 (Broder 1997, shingles). A group is what such pairs connect,
so it does not depend on the order of the texts. Every pair is compared exactly: the texts are the few hundred of a top-k.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

SIMILAR = 0.8
_SHINGLE = 3  # words


def near_identical(texts: Sequence[str]) -> list[int]:
    """Return every text's group, as the position of the group's first text."""
    group = list(range(len(texts)))
    known: list[frozenset[tuple[str, ...]]] = []
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for here, text in enumerate(texts):
        own = shingles(text)
        shared = Counter(other for shingle in own for other in holders[shingle])
        for other, both in shared.items():
            if both / (len(own) + len(known[other]) - both) >= SIMILAR:
                _join(group, other, here)
        for shingle in own:
            holders[shingle].append(here)
        known.append(own)
    return [_first(group, position) for position in range(len(texts))]


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the text's sequences of three words, of all its words if it has fewer; never none."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", plain) or plain.split()
    count = max(1, len(words) - _SHINGLE + 1)
    return frozenset(tuple(words[start : start + _SHINGLE]) for start in range(count))


def _first(group: list[int], position: int) -> int:
    while group[position] != position:
        position = group[position]
    return position


def _join(group: list[int], a: int, b: int) -> None:
    first, last = sorted((_first(group, a), _first(group, b)))
    group[last] = first
