"""Corpora: streamed in once, read by row ever after. A corpus is an append-only list of segments (see `segments`).

    corpus/<set>/<segment>.<gen>/      rows and the record that commits them
    corpus/<set>/erased/<n>.json       ids that every answer leaves out

How a record becomes tokens is the task's affair, passed in as `encode`.
"""

import itertools
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.damage import DamagedObject
from storage.journal import Journal
from storage.locations import Location
from storage.rows import ENCODED, from_table, to_batch
from storage.segments import (
    ROW_GROUP,
    Encode,
    Record,
    Segment,
    SourceChanged,
    Tally,
    canonical,
    committed_segments,
    example_rows,
    ingest_stage,
    rewrite_segment,
    rows_key,
    write_segment,
)


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
            self._erased = erased_ids(self.run, self.name)
        return self._erased

    def erase(self, ids: list[int]) -> None:
        """Leave these ids out of every answer from now on. ValueError for an id that the corpus does not have."""
        for example in ids:
            self._locate(example)
        number = len(self.run.list(f"corpus/{self.name}/erased"))
        self.run.create_json(f"corpus/{self.name}/erased/{number:06d}.json", {"ids": sorted(ids)})
        self._erased = None

    def ids_of(self, source_ids: Collection[str]) -> list[int]:
        """Return all examples of the records with these ids of the corpus's own. ValueError names one that is not there."""
        found, ids, base = set[str](), list[int](), 0
        wanted = pa.array(sorted(source_ids), pa.string())
        for batch in self.column("source_id"):
            places = pc.indices_nonzero(pc.is_in(batch.column(0), wanted))
            ids += [base + place for place in places.to_pylist()]
            found |= set(batch.column(0).take(places).to_pylist())
            base += batch.num_rows
        if missing := sorted(set(source_ids) - found):
            raise ValueError(f"corpus {self.name!r} has no example with source id {missing[0]!r}.")
        return ids

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
                found = f"{self.run.uri}/{key} has {file.metadata.num_rows} rows, its segment.json says {segment.rows}"
                raise DamagedObject(self.run, ingest_stage(self.name), segment.name, found)
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
            file = self._file(segment)
            try:
                kept = (group, file.read_row_group(group, use_threads=False))
            except (pa.ArrowException, OSError) as error:
                if getattr(error, "errno", None):  # of the file system or the network, not of what was read
                    raise
                first, last = group * ROW_GROUP, min((group + 1) * ROW_GROUP, segment.rows)
                what = f"rows {first}:{last} of segment {segment.name} of corpus {self.name!r} are damaged ({error})"
                raise DamagedObject(self.run, ingest_stage(self.name), segment.name, what) from error
            self._groups[segment.name] = kept
        return kept[1]


def erased_ids(run: Location, name: str) -> set[int]:
    """Return the ids of a corpus that every answer leaves out, as they stand now. Cost: one listing, one read a file."""
    keys = run.list(f"corpus/{name}/erased")
    return {example for key in keys for example in run.read_json(key)["ids"]}


def ingest(
    run: Location,
    name: str,
    records: Iterator[Record],
    encode: Encode,
    segment_rows: int = 1 << 20,  # a segment ends with the document that reaches it
    may_commit: Callable[[], None] = lambda: None,  # called before each commit; raises to stop (RunLease.check)
    grow: bool = False,  # add what the source has beyond a finished corpus; otherwise that stays as it is
) -> IngestReport:
    """Stream records into segments and return what the corpus then holds; a killed ingest goes on where it stopped.

    The source must yield the same records in the same order again; to `grow`, every row held is compared, and
    SourceChanged names the first that differs. Segments that were found damaged are written again. Memory: one row
    group and 8 bytes a record. Only one process ingests at a time; the run's lease, asked by `may_commit`, sees to that.
    ValueError with the record's place for what `encode` refuses, for a new field and for a type that does not fit;
    ValueError for an empty source.
    """
    segments, journal = committed_segments(run, name), Journal(run, ingest_stage(name))
    damaged = set(journal.damaged()) & {segment.name for segment in segments}
    finished = bool(segments) and segments[-1].ends
    if finished and not grow and not damaged:
        return _report(segments)
    held = sum(segment.rows for segment in segments)
    source, erased = _Peekable(records), frozenset(Corpus(run, name, segments).erased())
    for number, segment in enumerate(segments):
        own = _Counted(itertools.islice(source, segment.records))
        if segment.name in damaged:
            may_commit()
            written = rewrite_segment(run, name, segments[:number], segment, own, encode, erased)
            journal.commit(segment.name, {"rows": segment.rows, "objects": [asdict(written)]})
        elif grow:
            _refuse_changed(Corpus(run, name, segments), number, own, encode, erased)
        for _ in own:
            pass
        if own.count < segment.records:
            passed, done = (sum(s.records for s in segments[:n]) for n in (number, len(segments)))
            has = f"the source now has only {passed + own.count}"
            raise SourceChanged(f"corpus {name!r}: {done} records were ingested before, {has}. Use another run.")
    if not segments and not source:
        raise ValueError(f"corpus {name!r}: the source has no records. Check its path and format.")
    while source and (grow or not finished):
        segments.append(write_segment(run, name, segments, source, encode, segment_rows, may_commit))
    ingested = sum(segment.rows for segment in segments) - held
    return _report(segments, ingested, *Corpus(run, name, segments).repeated())


def _refuse_changed(corpus: Corpus, number: int, source: "_Counted", encode: Encode, erased: frozenset[int]) -> None:
    """Raise SourceChanged naming the first row of a segment that the source no longer has as it is held."""
    segment, schema, at = corpus.segments[number], corpus.schema(), 0
    stream = example_rows(source, encode, corpus.segments[:number], segment.rows + 1, Tally())
    while group := list(itertools.islice(stream, ROW_GROUP)):
        batch = to_batch([row for row, _ in group], schema, [place for _, place in group])
        here = from_table(pa.Table.from_batches([batch]))
        held = corpus.read(segment, at, min(at + len(group), segment.rows))
        beyond: list[dict[str, Any]] = [{}] * (len(group) - len(held))
        for (_, place), now, was in zip(group, here, held + beyond, strict=True):
            if now["id"] not in erased and canonical(now) != canonical(was):
                field = next(key for key in now if canonical({key: now[key]}) != canonical({key: was.get(key)}))
                values = f"{field}={_short(was.get(field))} at {place}, its source now has {_short(now[field])}"
                raise SourceChanged(_changed(corpus, values))
        at += len(group)
    if at < segment.rows and source.count == segment.records:
        raise SourceChanged(_changed(corpus, f"{segment.rows} rows of segment {segment.name}, its source now has {at}"))


def _changed(corpus: Corpus, how: str) -> str:
    return (
        f"corpus {corpus.name!r} of run {corpus.run.uri} was made with {how}. A corpus may only grow at its end: use "
        f"another run, or restore that value."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Counted(Iterator[Record]):
    """An iterator that knows how many it has given."""

    def __init__(self, items: Iterator[Record]) -> None:
        self.items, self.count = items, 0

    def __next__(self) -> Record:
        item = next(self.items)
        self.count += 1
        return item


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


def _open_parquet(run: Location, key: str) -> pq.ParquetFile:
    try:
        path = run.local_path()  # Arrow closes files of its own by itself
        return pq.ParquetFile(run.open(key) if path is None else path / key, page_checksum_verification=True)
    except (pa.ArrowException, FileNotFoundError) as error:
        _, name, segment, _ = key.split("/")
        what = "is missing" if isinstance(error, FileNotFoundError) else f"does not open ({error})"
        raise DamagedObject(run, ingest_stage(name), segment, f"{run.uri}/{key} {what}") from error


def _report(
    segments: list[Segment], ingested: int = 0, repeated: int = 0, first_repeated: str | None = None
) -> IngestReport:
    counts = {name: sum(segment.counts[name] for segment in segments) for name in segments[0].counts}
    rows, tokens = (sum(getattr(segment, name) for segment in segments) for name in ("rows", "tokens"))
    return IngestReport(rows, tokens, **counts, ingested=ingested, repeated=repeated, first_repeated=first_repeated)
