"""The score index: Parquet tables that answer "what moved this prediction" and "what did this example move".

    index/<label>/by_query.parquet      query, rank, side, id, score, …: sorted by query
    index/<label>/influenced.parquet    the same rows without texts, sorted by id: which queries an example moved
    index/<label>/by_example.parquet    id, …: one row per training example, sorted by id
    index/<label>/queries.parquet       query, …: one row per query, sorted by query
    index/<label>/meta.json             method, score unit, damping, …; written last, it commits the index

The tables are streamed in and read by row group, all but `influenced`, which is sorted in memory. What the scores mean
is the method's affair. Older indices have neither `influenced` nor `queries`.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.corpus import erased_ids
from storage.locations import Location
from storage.sorted_tables import SortedTable

ROW_GROUP = 4096  # rows decoded by a look-up
BY_QUERY = {"query": pa.int64(), "rank": pa.int64(), "side": pa.string(), "id": pa.int64(), "score": pa.float64()}
BY_EXAMPLE = {"id": pa.int64()}
QUERIES = {"query": pa.int64()}
SORTED = {"by_query": "query", "influenced": "id", "by_example": "id", "queries": "query"}
INFLUENCED = ["id", "query", "side", "rank", "score"]
SIDES = ("proponent", "opponent")


@dataclass(frozen=True)
class ScoreIndex:
    """One label's finished index. Picklable."""

    run: Location
    label: str
    meta: dict[str, Any]

    @classmethod
    def open(cls, run: Location, label: str) -> "ScoreIndex":
        """Return a finished index. FileNotFoundError names the labels that there are."""
        key = f"index/{label}/meta.json"
        if not run.exists(key):
            there = ", ".join(cls.labels(run)) or "none"
            raise FileNotFoundError(f"{run.uri} has no score index {label!r}: there are {there}. Score first.")
        return cls(run, label, run.read_json(key))

    @staticmethod
    def labels(run: Location) -> list[str]:
        """Return the labels of all finished indices of a run, sorted."""
        keys = [key.split("/") for key in run.list("index")]
        return sorted(parts[1] for parts in keys if len(parts) == 3 and parts[2] == "meta.json")

    def top(self, query: int, k: int) -> tuple[pa.Table, pa.Table]:
        """Return (proponents, opponents) of a query, best first, at most k rows each.

        ValueError for a query that the index does not have, or fewer than one row asked for.
        """
        if k < 1:
            raise ValueError(f"top={k} is not allowed: must be at least 1.")
        with self.open_table("by_query") as table:
            rows, last = table.where(query), table.last
        rows, there_were = self._kept(rows), rows.num_rows
        if not there_were:
            there = "no rows" if last is None else f"rows 0 to {last}"
            raise ValueError(f"index {self.label!r} has no query {query}: it has {there}.")
        ordered = rows.sort_by("rank")
        proponents, opponents = (ordered.filter(pc.equal(ordered["side"], side)).slice(0, k) for side in SIDES)
        return proponents, opponents

    def example(self, example: int) -> dict[str, Any]:
        """Return what the index says of one training example. ValueError if it does not have it."""
        with self.open_table("by_example") as table:
            rows = self._kept(table.where(example))
        if not rows.num_rows:
            raise ValueError(f"index {self.label!r} has no example {example}.")
        return rows.to_pylist()[0]

    def table(self, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield one of the tables in batches, all columns by default; erased examples are left out."""
        needed = None if columns is None or "id" in columns else [*columns, "id"]
        with self.open_table(name) as table:
            there = "id" in table.schema.names
            for batch in table.batches(needed if there else columns):
                kept = self._kept(pa.Table.from_batches([batch])) if there else pa.Table.from_batches([batch])
                yield from kept.select(columns or table.schema.names).to_batches()

    def _kept(self, rows: pa.Table) -> pa.Table:
        """Return the rows of examples that are not erased by now."""
        home = self.meta.get("corpus_home")
        erased = erased_ids(Location.parse(home) if home else self.run, self.meta.get("corpus", "train"))
        gone = pc.is_in(rows["id"], pa.array(sorted(erased), pa.int64()))
        return rows.filter(pc.invert(gone)) if erased else rows

    def open_table(self, name: str) -> SortedTable:
        """Return one of the tables, open; FileNotFoundError if this index was made without it."""
        return SortedTable(self.run, f"index/{self.label}/{name}.parquet", SORTED[name])


def write_index(
    run: Location,
    label: str,
    meta: dict[str, Any],  # method, score_unit, granularity, damping, projection, model fingerprint, query set, queries
    by_query: Iterable[
        pa.Table
    ],  # columns of BY_QUERY and any others; rank from 0 within query and side; queries ascending
    by_example: Iterable[pa.Table],  # id and any others, ids ascending
    queries: Iterable[pa.Table],  # query and any others, queries ascending
) -> ScoreIndex:
    """Stream the tables, then commit with meta.json; tables left by a killed writer are replaced.

    Memory: one batch, then ids and scores of `by_query` to sort them the other way round. An index that is finished
    stays as it is if its meta is the same; ObjectConflict if not. ValueError for a column that is missing or a table out
    of order.
    """
    folder = f"index/{label}"
    if not run.exists(f"{folder}/meta.json"):
        _write_sorted(run, f"{folder}/by_query.parquet", by_query, BY_QUERY, "query")
        _write_sorted(run, f"{folder}/by_example.parquet", by_example, BY_EXAMPLE, "id")
        _write_sorted(run, f"{folder}/queries.parquet", queries, QUERIES, "query")
        with SortedTable(run, f"{folder}/by_query.parquet", "query") as rows:
            turned = sort_by_example(rows)
        columns = {name: BY_QUERY[name] for name in INFLUENCED}
        _write_sorted(run, f"{folder}/influenced.parquet", [turned], columns, "id")
    run.create_json(f"{folder}/meta.json", meta)
    return ScoreIndex.open(run, label)


def sort_by_example(by_query: SortedTable) -> pa.Table:
    """Return the rows of `by_query` sorted by id, each example's strongest first, ties by query."""
    rows = by_query.columns(INFLUENCED)
    strength = pc.negate(pc.abs(rows["score"]))
    keys = [("id", "ascending"), ("strength", "ascending"), ("query", "ascending")]
    return rows.append_column("strength", strength).sort_by(keys).drop_columns(["strength"])


def _write_sorted(
    run: Location, key: str, tables: Iterable[pa.Table], columns: dict[str, pa.DataType], by: str
) -> None:
    run.delete(key)
    with run.create_from(key) as file, ExitStack() as stack:
        writer = None
        for table in _row_groups(_in_order(tables, columns, key, by)):
            writer = writer or stack.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))
            writer.write_table(table, row_group_size=ROW_GROUP)
        if writer is None:
            pq.ParquetWriter(file, pa.schema(list(columns.items()))).close()


def _in_order(tables: Iterable[pa.Table], columns: dict[str, pa.DataType], key: str, by: str) -> Iterator[pa.Table]:
    last = None
    for table in tables:
        typed = _typed(table, columns, key)
        if not typed.num_rows:
            continue
        values = typed[by].to_numpy()
        if (values[1:] < values[:-1]).any() or (last is not None and values[0] < last):
            raise ValueError(f"{key} must be written in order of {by!r}, has {values[0]} to {values[-1]} after {last}.")
        last = values[-1]
        yield typed


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows again in tables of ROW_GROUP rows or somewhat more, so that small batches make no small groups."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        if rows >= ROW_GROUP:
            yield pa.concat_tables(held)
            held, rows = [], 0
    if held:
        yield pa.concat_tables(held)


def _typed(table: pa.Table, columns: dict[str, pa.DataType], key: str) -> pa.Table:
    missing = columns.keys() - set(table.column_names)
    if missing:
        raise ValueError(f"{key} lacks the column {min(missing)!r}, has {', '.join(table.column_names)}.")
    for name, kind in columns.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table
