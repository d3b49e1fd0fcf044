"""Corpora: streamed in once, read by row ever after. A corpus is an append-only list of segments (see `segments`).

    corpus/<set>/<segment>.<gen>/      rows and the record that commits them
    corpus/<set>/erased/<n>.json       ids that every answer leaves out

How a record becomes tokens is the task's affair, passed in as `encode`.
"""

import itertools
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.locations import Location
from storage.rows import ENCODED, from_table
from storage.segments import ROW_GROUP, Encode, Record, Segment, committed_segments, rows_key, write_segment


@dataclass(frozen=True)
class IngestReport:
    """What a corpus holds after an ingest; `ingested` are the examples that this call added."""

    examples: int
    tokens: int
    documents: int
    truncated: int
    chunked: int
    skipped: int
    ingested: int
    repeated: int  # records whose own id an earlier one has; counted by the call that ended the ingest
    first_repeated: str | None  # the id of the first of them


@dataclass
class Corpus:
    """A finished corpus, open for reading. Picklable; open files stay with the process."""

    run: Location
    name: str
    segments: list[Segment]
    _files: dict[str, pq.ParquetFile] = field(default_factory=dict, repr=False)
    _groups: dict[str, tuple[int, pa.Table]] = field(default_factory=dict, repr=False)
    _erased: set[int] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, run: Location, name: str) -> "Corpus":
        """Return the corpus up to its last finished ingest. FileNotFoundError if there is none."""
        segments = committed_segments(run, name)
        while segments and not segments[-1].ends:
            segments.pop()
        if not segments:
            raise FileNotFoundError(f"{run.uri} holds no finished corpus {name!r}. Ingest it first, or run again.")
        return cls(run, name, segments)

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def fingerprint(self) -> str:
        return self.segments[-1].fingerprint

    def erased(self) -> set[int]:
        """Return the ids that every answer leaves out, as they stood when this object was first asked."""
        if self._erased is None:
            keys = self.run.list(f"corpus/{self.name}/erased")
            self._erased = {example for key in keys for example in self.run.read_json(key)["ids"]}
        return self._erased

    def erase(self, ids: list[int]) -> None:
        """Leave these ids out of every answer from now on. ValueError for an id that the corpus does not have."""
        for example in ids:
            self._locate(example)
        number = len(self.run.list(f"corpus/{self.name}/erased"))
        self.run.create_json(f"corpus/{self.name}/erased/{number:06d}.json", {"ids": sorted(ids)})
        self._erased = None

    def read(self, segment: Segment, start: int, stop: int) -> list[dict[str, Any]]:
        """Return rows start:stop of a segment, erased ones included, encoded fields merged over original ones."""
        return from_table(self._table(segment, start, stop))

    def schema(self) -> pa.Schema:
        """Return the columns of its rows: our own, the original fields, `encoded`."""
        return self._file(self.segments[0]).schema_arrow

    def column(self, name: str) -> Iterator[pa.RecordBatch]:
        """Yield one column of all rows in id order, in batches, erased ones included."""
        for segment in self.segments:
            yield from self._file(segment).iter_batches(columns=[name], use_threads=False)

    def repeated(self) -> tuple[int, str | None]:
        """Return how many records have an id that an earlier one has, and the first such id. Memory: 8 bytes a record."""
        hashes = array("Q")
        for source_id in self._records():
            hashes.append(int.from_bytes(blake2b(source_id.encode(), digest_size=8).digest()))
        found, first, counts = np.unique(np.frombuffer(hashes, np.uint64), return_index=True, return_counts=True)
        if len(found) == len(hashes):
            return 0, None
        earliest = int(first[counts > 1].min())
        return len(hashes) - len(found), next(itertools.islice(self._records(), earliest, None))

    def _records(self) -> Iterator[str]:
        """Yield every record's own id, that of a chunked document once."""
        for ids, chunks in zip(self.column("source_id"), self.column("chunk"), strict=True):
            yield from pc.filter(ids.column(0), pc.equal(chunks.column(0), 0)).to_pylist()

    def row(self, example: int) -> dict[str, Any]:
        """Return one example's original fields with id, source_id, doc_id, chunk and length.

        ValueError for an id that the corpus does not have, or that was erased.
        """
        if example in self.erased():
            raise ValueError(f"example {example} of corpus {self.name!r} was erased.")
        segment = self._locate(example)
        table = self._table(segment, example - segment.base, example - segment.base + 1)
        return from_table(table.select([name for name in table.column_names if name != ENCODED]))[0]

    def find(self, source_id: str) -> int:
        """Return the example, of a chunked document the first, with the corpus's own id.

        ValueError if there is none, or if several records have it, naming them.
        """
        first: dict[int, int] = {}  # by document
        for segment in self.segments:
            columns = self._file(segment).read(columns=["source_id", "doc_id"], use_threads=False)
            rows = pc.indices_nonzero(pc.equal(columns["source_id"], str(source_id)))
            for row, document in zip(rows.to_pylist(), columns["doc_id"].take(rows).to_pylist(), strict=True):
                if segment.base + row not in self.erased():
                    first.setdefault(document, segment.base + row)
        if not first:
            raise ValueError(f"corpus {self.name!r} has no example with source id {source_id!r}.")
        if len(first) > 1:
            rows = ", ".join(map(str, list(first.values())[:5])) + (", …" if len(first) > 5 else "")
            raise ValueError(
                f"source id {source_id!r} names {len(first)} records of corpus {self.name!r}: ask for one by its row, {rows}."
            )
        return next(iter(first.values()))

    def close(self) -> None:
        """Close the open files; reading opens them again."""
        for file in self._files.values():
            file.close(force=True)
        self._files.clear()
        self._groups.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_groups": {}, "_erased": None}

    def _locate(self, example: int) -> Segment:
        for segment in self.segments:
            if segment.base <= example < segment.base + segment.rows:
                return segment
        raise ValueError(f"example {example} is not in corpus {self.name!r}, which has ids 0 to {self.rows - 1}.")

    def _file(self, segment: Segment) -> pq.ParquetFile:
        if segment.name not in self._files:
            key = rows_key(self.name, segment.name)
            file = _open_parquet(self.run, key)
            if file.metadata.num_rows != segment.rows:
                found = f"{key} has {file.metadata.num_rows} rows, its segment.json says {segment.rows}"
                raise OSError(f"{self.run.uri}: {found}. Restore it, or ingest into another run.")
            self._files[segment.name] = file
        return self._files[segment.name]

    def _table(self, segment: Segment, start: int, stop: int) -> pa.Table:
        if not 0 <= start <= stop <= segment.rows:
            raise ValueError(f"rows {start}:{stop} of segment {segment.name} are not allowed: it has {segment.rows}.")
        if start == stop:
            return self._file(segment).schema_arrow.empty_table()
        groups = range(start // ROW_GROUP, (stop - 1) // ROW_GROUP + 1)
        table = pa.concat_tables([self._group(segment, group) for group in groups])
        return table.slice(start - groups[0] * ROW_GROUP, stop - start)

    def _group(self, segment: Segment, group: int) -> pa.Table:
        kept = self._groups.get(segment.name)  # batches of one shard come from the same row group again and again
        if kept is None or kept[0] != group:
            try:
                kept = (group, self._file(segment).read_row_group(group, use_threads=False))
            except pa.ArrowException as error:
                raise OSError(f"{self.run.uri}: rows of segment {segment.name} are damaged: {error}.") from error
            self._groups[segment.name] = kept
        return kept[1]


def ingest(
    run: Location,
    name: str,
    records: Iterator[Record],
    encode: Encode,
    segment_rows: int = 1 << 20,  # a segment ends with the document that reaches it
    may_commit: Callable[[], None] = lambda: None,  # called before each commit; raises to stop (RunLease.check)
    append: bool = False,  # add the records to a finished corpus; otherwise a finished corpus stays as it is
) -> IngestReport:
    """Stream records into segments and return what the corpus then holds; a killed ingest goes on where it stopped.

    The source must yield the same records in the same order again. Memory: one row group and 8 bytes a record. Only one
    process ingests at a time; the run's lease, asked by `may_commit`, sees to that. ValueError with the record's place
    for what `encode` refuses, for a new field and for a type that does not fit; ValueError for an empty source.
    """
    segments = committed_segments(run, name)
    if segments and segments[-1].ends and not append:
        return _report(segments)
    held = sum(segment.rows for segment in segments)
    done = _records_of_open_ingest(segments)
    source = _Peekable(records)
    passed = sum(1 for _ in itertools.islice(source, done))
    if passed < done:
        raise ValueError(f"corpus {name!r}: {done} records were ingested before, the source now has only {passed}.")
    if not segments and not source:
        raise ValueError(f"corpus {name!r}: the source has no records. Check its path and format.")
    while source:
        segments.append(write_segment(run, name, segments, source, encode, segment_rows, may_commit))
    ingested = sum(segment.rows for segment in segments) - held
    return _report(segments, ingested, *Corpus(run, name, segments).repeated())


class _Peekable(Iterator[Record]):
    """An iterator that is false once nothing is left."""

    def __init__(self, items: Iterator[Record]) -> None:
        self.items = iter(items)
        self.head = list(itertools.islice(self.items, 1))

    def __bool__(self) -> bool:
        return bool(self.head)

    def __next__(self) -> Record:
        if not self.head:
            raise StopIteration
        item = self.head[0]
        self.head = list(itertools.islice(self.items, 1))
        return item


def _records_of_open_ingest(segments: list[Segment]) -> int:
    """Return how many records of the source stand in segments since the last finished ingest."""
    tail = itertools.takewhile(lambda segment: not segment.ends, reversed(segments))
    return sum(segment.records for segment in tail)


def _open_parquet(run: Location, key: str) -> pq.ParquetFile:
    try:
        path = run.local_path()
        return pq.ParquetFile(run.open(key) if path is None else path / key)  # Arrow closes files of its own by itself
    except pa.ArrowException as error:
        raise OSError(f"{run.uri}/{key} is damaged: {error}. Restore it, or ingest into another run.") from error


def _report(
    segments: list[Segment], ingested: int = 0, repeated: int = 0, first_repeated: str | None = None
) -> IngestReport:
    counts = {name: sum(segment.counts[name] for segment in segments) for name in segments[0].counts}
    rows, tokens = (sum(getattr(segment, name) for segment in segments) for name in ("rows", "tokens"))
    return IngestReport(rows, tokens, **counts, ingested=ingested, repeated=repeated, first_repeated=first_repeated)
