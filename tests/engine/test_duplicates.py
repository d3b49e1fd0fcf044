"""Near-identical texts: what counts as one, and that groups depend on the texts alone."""

import random

import pytest

from engine import duplicates
from engine.duplicates import near_identical
from tests.conftest import Caught

LONG = "one of those pictures whose promising if rather precious premise is undercut by amateurish execution in the end"


def sets_of(texts: list[str]) -> set[frozenset[str]]:
    found = near_identical(texts)
    return {frozenset(t for t, own in zip(texts, found, strict=True) if own == leader) for leader in set(found)}


def jaccard(a: str, b: str) -> float:
    """Return the share of three-word sequences that two texts have in common, by hand."""
    first, second = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("other", [LONG.upper(), f"  {LONG}!! ", LONG.replace(" ", "\n"), LONG.replace("if", "if,")])
def test_case_punctuation_and_space_do_not_count(other: str) -> None:
    assert near_identical([LONG, "something else", other]) == [0, 1, 0]


def test_the_threshold_is_where_it_says(caught: Caught) -> None:
    words = LONG.split()

    def compare() -> None:
        for cut in range(1, len(words) - 2):
            other = " ".join(words[cut:])
            same = near_identical([LONG, other]) == [0, 0]
            assert same == (jaccard(LONG, other) >= 0.8), cut

    caught(compare, duplicates, "SIMILAR", 0.6)


def test_groups_are_transitive_and_independent_of_order() -> None:
    words = [f"w{i}" for i in range(40)]
    chain = [" ".join(words[i : i + 30]) for i in range(0, 10, 2)]  # each near its neighbour, the ends far apart
    assert jaccard(chain[0], chain[1]) >= 0.8 > jaccard(chain[0], chain[-1])
    texts = [*chain, "quite another text", "a third one"]
    expected = {frozenset(chain), frozenset({"quite another text"}), frozenset({"a third one"})}
    for seed in range(20):
        mixed = random.Random(seed).sample(texts, len(texts))
        assert sets_of(mixed) == expected


def test_a_group_is_named_by_its_first_text() -> None:
    assert near_identical(["b", "a", "B!", "a", "c"]) == [0, 1, 0, 1, 4]


def test_short_and_odd_texts() -> None:
    assert near_identical(["good film", "film good", "good", "Good film."]) == [0, 1, 2, 0]
    assert near_identical(["", " ", "!!!", "???"]) == [0, 0, 2, 3]
    assert near_identical([]) == []
