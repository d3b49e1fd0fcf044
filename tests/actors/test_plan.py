from types import SimpleNamespace

import pytest

from actors.plan import checkpoint_units, power_below, shard_rows, shard_units, shards


def corpus(*rows: int, tokens: int = 100) -> SimpleNamespace:
    """Return segments of these lengths, every row of so many tokens."""
    segments = [SimpleNamespace(name=f"{i:06d}.0", rows=n, tokens=n * tokens) for i, n in enumerate(rows)]
    return SimpleNamespace(segments=segments, rows=sum(rows))


def test_shards_cover_every_row_once_and_cross_no_segment() -> None:
    pieces = shards(corpus(40, 5), 16)
    assert [(p["segment"], p["start"], p["stop"]) for p in pieces] == [
        ("000000.0", 0, 16), ("000000.0", 16, 32), ("000000.0", 32, 40), ("000001.0", 0, 5)
    ]  # fmt: skip


def test_units_are_named_by_their_rows_with_the_checkpoint_outside() -> None:
    pieces = shards(corpus(40), 32)
    assert [u.key for u in shard_units(pieces, "train")] == ["train-000000.0-000000000", "train-000000.0-000000032"]
    units = checkpoint_units(("a", "b"), pieces, "train")
    assert [u.payload["checkpoint"] for u in units] == ["a", "a", "b", "b"]
    assert len({u.key for u in units}) == 4


@pytest.mark.parametrize(
    ("rows", "model", "columns", "expected"),
    [
        (10, 1000, 0, 32),  # never below 32
        (10**7, 1000, 0, 8192),  # never above 8192
        (10**6, 10**9, 0, 32),  # 2·10^12 operations are 5 rows of 100 tokens
        (10**6, 10**7, 0, 256),  # 500 rows
        (10**6, 1000, 8192, 1024),  # 16 MiB of rows
        (2000, 1000, 0, 64),  # a sixteenth of a small corpus, 125
    ],
)
def test_a_shard_has_the_most_rows_within_bytes_work_and_share(
    rows: int, model: int, columns: int, expected: int
) -> None:
    assert shard_rows(corpus(rows), model, columns, 2) == expected  # type: ignore[arg-type]


def test_powers() -> None:
    assert [power_below(n) for n in (1, 2, 3, 1023.9, 1024)] == [1, 2, 2, 512, 1024]
