"""Segments of a corpus: what their two files hold, which are committed, and writing one from a stream of records.

corpus/<set>/<segment>.<gen>/rows.parquet    own columns, original fields, struct `encoded` (see `rows`)
corpus/<set>/<segment>.<gen>/segment.json    the Segment below; it commits the segment
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.locations import Location, ObjectConflict
from storage.rows import ENCODED, OWN, infer_schema, rename_field, to_batch

ROW_GROUP = 4096  # rows that are read at once
COUNTS = ("documents", "truncated", "chunked", "skipped")

Record = tuple[dict[str, Any], str]  # fields, and where they stand: "reviews.jsonl line 17"
Encode = Callable[[dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Segment:
    """One committed segment."""

    name: str  # "000000.0": number and generation
    base: int  # id of its first row
    rows: int
    tokens: int
    records: int  # source records it was made from
    counts: dict[str, int]  # documents; truncated (examples); chunked (documents in several chunks); skipped (none)
    ends: bool  # the source ended with this segment
    fingerprint: str  # sha256 over the segment before and this one's content


@dataclass
class Tally:
    """What a segment being written has come to so far."""

    rows: int = 0
    tokens: int = 0
    records: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


def rows_key(corpus: str, segment: str) -> str:
    return f"corpus/{corpus}/{segment}/rows.parquet"


def committed_segments(run: Location, corpus: str) -> list[Segment]:
    """Return the segments that have a segment.json, the highest generation of each, in order."""
    latest: dict[str, tuple[int, str]] = {}
    for key in run.list(f"corpus/{corpus}"):
        if key.endswith("/segment.json"):
            number, _, generation = key.split("/")[-2].partition(".")
            latest[number] = max(latest.get(number, (-1, "")), (int(generation), key))
    return [Segment(**run.read_json(key)) for _, (_, key) in sorted(latest.items())]


def write_segment(
    run: Location,
    corpus: str,
    before: list[Segment],
    source: Iterator[Record],  # false once nothing is left
    encode: Encode,
    segment_rows: int,
    may_commit: Callable[[], None],  # called between the rows and their record; raises to leave it uncommitted
) -> Segment:
    """Write the next segment, commit it and return it. Rows left by a killed ingest are replaced.

    It takes documents until it has `segment_rows` rows. ValueError as for `corpus.ingest`.
    """
    name = f"{len(before):06d}.0"
    key = rows_key(corpus, name)
    if run.exists(f"corpus/{corpus}/{name}/segment.json"):
        raise ObjectConflict(
            f"segment {name} of corpus {corpus!r} was committed meanwhile: another job holds {run.uri}."
        )
    run.delete(key)  # without its segment.json nobody has read it
    schema = read_schema(run, corpus, before[0].name) if before else None
    tally = Tally()
    digest = hashlib.sha256(before[-1].fingerprint.encode() if before else b"")
    stream = _example_rows(source, encode, before, segment_rows, tally)
    with run.create_from(key) as file, ExitStack() as stack:
        writer = None
        while group := list(itertools.islice(stream, ROW_GROUP)):
            rows, places = [row for row, _ in group], [place for _, place in group]
            schema = schema or infer_schema(rows, places)
            writer = writer or stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            writer.write_batch(to_batch(rows, schema, places), row_group_size=ROW_GROUP)
            for row in rows:
                digest.update(_canonical(row))
        if schema is None:
            raise ValueError(f"corpus {corpus!r}: none of {tally.records} records gave an example (skipped as empty).")
        if writer is None:  # only skipped records were left
            pq.ParquetWriter(file, schema).close()
    base = before[-1].base + before[-1].rows if before else 0
    segment = Segment(name, base, **asdict(tally), ends=not source, fingerprint=digest.hexdigest())
    may_commit()
    run.create_json(f"corpus/{corpus}/{name}/segment.json", asdict(segment))
    return segment


def read_schema(run: Location, corpus: str, segment: str) -> pa.Schema:
    """Return the types of a segment's columns."""
    with run.open(rows_key(corpus, segment)) as file:
        return pq.read_schema(file)


def _example_rows(
    source: Iterator[Record], encode: Encode, before: list[Segment], segment_rows: int, tally: Tally
) -> Iterator[Record]:
    """Yield one row per example, until the segment is full at the end of a document; count in `tally`."""
    base = before[-1].base + before[-1].rows if before else 0
    first_document = sum(segment.records for segment in before)
    for record, place in source:
        document = first_document + tally.records
        try:
            chunks = encode(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        tally.records += 1
        tally.counts["documents"] += bool(chunks)
        tally.counts["skipped"] += not chunks
        tally.counts["chunked"] += len(chunks) > 1
        originals = {rename_field(name): value for name, value in record.items() if name != "id"}
        source_id = str(document if record.get("id") is None else record["id"])
        for number, encoded in enumerate(chunks):
            row = _row(originals, encoded, place, tally)
            row |= {"id": base + tally.rows, "source_id": source_id, "doc_id": document, "chunk": number}
            tally.rows += 1
            yield row, place
        if tally.rows >= segment_rows:
            return


def _row(originals: dict[str, Any], encoded: dict[str, Any], place: str, tally: Tally) -> dict[str, Any]:
    fields = dict(encoded)
    tally.counts["truncated"] += bool(fields.pop("truncated", False))
    taken = sorted(fields.keys() & OWN.keys())
    if taken:
        raise ValueError(f"{place}: encode must not return {taken[0]!r}, a column of every corpus. Use another name.")
    length = len(fields["input_ids"]) if "input_ids" in fields else 1
    tally.tokens += length
    own = {name: fields.pop(name) for name in originals if name in fields}  # a chunk's own text for the document's
    return {**originals, **own, ENCODED: fields, "length": length}


def _canonical(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON lacks in a fingerprint."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
