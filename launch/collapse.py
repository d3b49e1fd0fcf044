"""Near-identical examples shown once, as the strongest of them."""

from dataclasses import dataclass
from typing import Any

from engine.duplicates import near_identical
from storage.corpus import Corpus


@dataclass(frozen=True)
class Groups:
    """One side of an answer by groups of near-identical examples."""

    rows: list[dict[str, Any]]  # the strongest of each group, best first, with `near_identical`: the ids of the others
    looked_at: int  # rows that were put into groups
    count: int  # groups that they make


def collapse_rows(rows: list[dict[str, Any]], corpus: Corpus, field: str, k: int) -> Groups:
    """Return the first k groups of one side's rows, which are best first.

    Texts are compared in full, as the corpus holds them. ValueError where the examples have none.
    """
    records = read_records(corpus, [row["id"] for row in rows])
    texts = [records[row["id"]].get(field) for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"near-identical examples are found by their text: these have no text in field {field!r}")
    first = near_identical([str(text) for text in texts])
    groups = {leader: [rows[i]["id"] for i, own in enumerate(first) if own == leader] for leader in sorted(set(first))}
    shown = [rows[leader] | {"near_identical": ids[1:]} for leader, ids in list(groups.items())[:k]]
    return Groups(shown, len(rows), len(groups))


def shortfall(groups: Groups, side: str, k: int, kept: int) -> str | None:
    """Return what to say of a side that has fewer than k groups, `kept` rows being all there are of it; None if not."""
    if groups.count >= k:
        return None
    if groups.looked_at < kept:
        return f"{groups.count} of {k} {side}: no other example has that sign"
    return (
        f"{groups.count} of {k} {side}: the {kept} that output.top_k keeps are so many groups. Score with a larger "
        f"output.top_k, under another output.label, for more."
    )


def read_records(corpus: Corpus, ids: list[int]) -> dict[int, dict[str, Any]]:
    """Return the rows of these examples by id, encoded fields included; each part of the corpus is decoded once."""
    found = {}
    for segment in corpus.segments:
        for example in sorted(i for i in set(ids) if segment.base <= i < segment.base + segment.rows):
            at = example - segment.base
            found[example] = corpus.read(segment, at, at + 1)[0]
    return found
