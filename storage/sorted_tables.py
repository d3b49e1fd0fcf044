"""Parquet tables sorted by one integer column: what stands under a value is read from the row groups that hold it.

A table is kept open with the range of every row group, so that a look-up decodes one group or two and never the file.
"""

import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.locations import Location


class SortedTable:
    """An open table. Threads may share it; memory: the footer and one look-up."""

    def __init__(self, run: Location, key: str, by: str) -> None:
        self.by, self._lock = by, threading.Lock()
        path = run.local_path()
        try:
            self._file = pq.ParquetFile(run.open(key) if path is None else path / key)
        except pa.ArrowException as error:
            raise OSError(f"{run.uri}/{key} is damaged: {error}. Delete index and journal of this label.") from error
        self.schema: pa.Schema = self._file.schema_arrow
        self._lows, self._highs = _ranges(self._file, by)

    @property
    def rows(self) -> int:
        return self._file.metadata.num_rows

    @property
    def groups(self) -> int:
        return len(self._lows)

    @property
    def last(self) -> int | None:
        """Return the highest value of the sorted column, None for a table without rows."""
        return int(self._highs[-1]) if self.groups else None

    def where(self, value: int, columns: list[str] | None = None) -> pa.Table:
        """Return the rows with this value, in their order; none if it is not there."""
        return self.between(value, value, columns)

    def between(self, first: int, last: int, columns: list[str] | None = None) -> pa.Table:
        """Return the rows whose value lies in first … last, both included."""
        begin = int(np.searchsorted(self._highs, first, "left"))
        end = int(np.searchsorted(self._lows, last, "right"))
        if begin >= end:
            return pa.schema([f for f in self.schema if columns is None or f.name in columns]).empty_table()
        table = self._read(list(range(begin, end)), columns)
        values = table[self.by].to_numpy()
        start, stop = np.searchsorted(values, first, "left"), np.searchsorted(values, last, "right")
        return table.slice(int(start), int(stop - start)).select(columns or self.schema.names)

    def take(self, values: np.ndarray) -> pa.Table:
        """Return the rows with any of these values, sorted; for a table that has each value once.

        Cost: every row group that holds one of them is read once.
        """
        wanted = np.unique(values)
        parts = [self.schema.empty_table()]
        for group in np.unique(np.searchsorted(self._highs, wanted, "left")):
            if group < self.groups:
                table = self._read([int(group)], None)
                parts.append(table.filter(pa.array(np.isin(table[self.by].to_numpy(), wanted))))
        return pa.concat_tables(parts)

    def columns(self, names: list[str]) -> pa.Table:
        """Return whole columns."""
        with self._lock:
            return self._file.read(names, use_threads=False)

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the table in batches. For one reader at a time."""
        yield from self._file.iter_batches(columns=columns, use_threads=False)

    def close(self) -> None:
        self._file.close(force=True)

    def __enter__(self) -> "SortedTable":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, groups: list[int], columns: list[str] | None) -> pa.Table:
        """Return row groups. In this thread alone: a read that outlives the process's main thread would abort it."""
        needed = None if columns is None else list(dict.fromkeys([*columns, self.by]))
        with self._lock:
            return self._file.read_row_groups(groups, columns=needed, use_threads=False)


def _ranges(file: pq.ParquetFile, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest value of every row group, from the footer."""
    place = file.schema_arrow.get_field_index(by)
    found = [file.metadata.row_group(group).column(place).statistics for group in range(file.metadata.num_row_groups)]
    kept = [one for one in found if one is not None and one.has_min_max]
    if len(kept) < len(found):
        raise OSError(f"a Parquet table says no range of {by!r} for its row groups: write the index again")
    lows, highs = (np.array([getattr(one, end) for one in kept], dtype=np.int64) for end in ("min", "max"))
    return lows, highs
