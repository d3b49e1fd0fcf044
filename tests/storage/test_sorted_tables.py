"""A look-up reads the row groups that hold a value, and finds what a scan of the whole table finds."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.locations import Location
from storage.sorted_tables import SortedTable

VALUES = np.sort(np.random.default_rng(0).integers(0, 60, 200))


@pytest.fixture
def table(run: Location) -> SortedTable:
    place = Path(run.uri)
    place.mkdir()
    rows = pa.table({"id": VALUES, "text": [f"t{i}" for i in range(200)]})
    pq.write_table(rows, place / "t.parquet", row_group_size=7)
    return SortedTable(run, "t.parquet", "id")


def scan(table: SortedTable, first: int, last: int) -> list[dict]:
    """Return the rows between two values by looking at every one."""
    return [row for row in table.columns(["id", "text"]).to_pylist() if first <= row["id"] <= last]


def test_every_value_is_found_as_by_a_scan(table: SortedTable) -> None:
    for value in range(-2, 63):
        assert table.where(value).to_pylist() == scan(table, value, value)
    for first, last in ((0, 59), (3, 20), (20, 3), (-5, -1), (58, 99)):
        assert table.between(first, last).to_pylist() == scan(table, first, last)
    assert table.where(VALUES[50], ["text"]).column_names == ["text"]
    assert table.where(1000, ["text"]).column_names == ["text"]


def test_a_value_is_looked_for_in_its_own_row_groups(table: SortedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    inner = table._file.read_row_groups

    class Counting:
        def read_row_groups(self, groups: list[int], **more: object) -> pa.Table:
            read.extend(groups)
            return inner(groups, **more)

    monkeypatch.setattr(table, "_file", Counting())
    table.where(int(VALUES[100]))
    assert 100 // 7 in read
    assert len(read) <= 1 + (VALUES[100] == VALUES).sum()
    assert table.groups == 29


def test_a_wrong_bound_would_be_seen(table: SortedTable, monkeypatch: pytest.MonkeyPatch) -> None:
    value = int(
        next(v for v in VALUES if (v == VALUES).sum() > 1 and len({i // 7 for i in np.flatnonzero(v == VALUES)}) > 1)
    )
    assert table.where(value).num_rows == (value == VALUES).sum()
    monkeypatch.setattr(table, "_highs", table._highs - 1)  # a row group that ends with the value is passed over
    assert table.where(value).num_rows < (value == VALUES).sum()


def test_rows_are_taken_in_order(run: Location) -> None:
    Path(run.uri).mkdir()
    pq.write_table(
        pa.table({"id": np.arange(50), "square": np.arange(50) ** 2}), Path(run.uri) / "t.parquet", row_group_size=6
    )
    with SortedTable(run, "t.parquet", "id") as table:
        assert table.take(np.array([40, 3, 12, 99, 3]))["square"].to_pylist() == [9, 144, 1600]
        assert table.take(np.array([], dtype=np.int64)).num_rows == 0
        assert table.last == 49


def test_damage_is_named(run: Location) -> None:
    run.create("t.parquet", b"no table")
    with pytest.raises(OSError, match=r"t\.parquet is damaged"):
        SortedTable(run, "t.parquet", "id")


def test_a_table_without_ranges_is_refused(run: Location) -> None:
    Path(run.uri).mkdir()
    pq.write_table(pa.table({"id": [1, 2]}), Path(run.uri) / "t.parquet", write_statistics=False)
    with pytest.raises(OSError, match="says no range of 'id'"):
        SortedTable(run, "t.parquet", "id")
