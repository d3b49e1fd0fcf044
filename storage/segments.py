"""Segments of a corpus: what their two files hold, which are committed, and writing one from a stream of records.

corpus/<set>/<segment>.<gen>/rows.parquet    own columns, original fields, struct `encoded` (see `rows`)
corpus/<set>/<segment>.<gen>/segment.json    the Segment below; it commits the segment
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.locations import Location, ObjectConflict, ObjectRecord
from storage.rows import ENCODED, OWN, blanked, infer_schema, rename_field, to_batch

ROW_GROUP = 4096  # rows that are read at once
COUNTS = ("documents", "truncated", "chunked", "skipped")

Record = tuple[dict[str, Any], str]  # fields, and where they stand: "reviews.jsonl line 17"
Encode = Callable[[dict[str, Any]], list[dict[str, Any]]]


class SourceChanged(OSError):  # noqa: N818  it is what the reader of the message is told
    """The source no longer begins with what the corpus holds of it."""


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
    fingerprint: str  # sha256 over the segment before and this one's content, as the source had it
    size: int | None = None  # bytes of rows.parquet; None in a run of an early version
    sha256: str | None = None  # of rows.parquet
    blanked: int = 0  # erased rows of which nothing but the id is left


@dataclass
class Tally:
    """What a segment being written has come to so far."""

    rows: int = 0
    tokens: int = 0
    records: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


def rows_key(corpus: str, segment: str) -> str:
    return f"corpus/{corpus}/{segment}/rows.parquet"


def ingest_stage(corpus: str) -> str:
    """Return the name under which damaged segments of a corpus stand in the journal."""
    return f"ingest-{corpus}"


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
    if run.exists(f"corpus/{corpus}/{name}/segment.json"):
        raise ObjectConflict(
            f"segment {name} of corpus {corpus!r} was committed meanwhile: another job holds {run.uri}."
        )
    tally = Tally()
    fingerprint, object_ = _write_rows(run, corpus, name, before, source, encode, segment_rows, tally, frozenset())
    segment = Segment(
        name, _end(before), **asdict(tally), ends=not source, fingerprint=fingerprint,
        size=object_.size, sha256=object_.sha256,
    )  # fmt: skip
    may_commit()
    run.create_json(f"corpus/{corpus}/{name}/segment.json", asdict(segment))
    return segment


def rewrite_segment(
    run: Location,
    corpus: str,
    before: list[Segment],
    segment: Segment,
    source: Iterator[Record],  # of the segment's records alone
    encode: Encode,
    erased: frozenset[int],  # ids that stay blank if the segment was compacted
) -> ObjectRecord:
    """Write a committed segment's rows again and return their record; `segment.json` stays.

    SourceChanged if the source no longer has the records that the segment was made of.
    """
    blank = erased if segment.blanked else frozenset[int]()
    found = _write_rows(run, corpus, segment.name, before, source, encode, segment.rows + 1, Tally(), blank)
    if found[0] != segment.fingerprint:
        run.delete(rows_key(corpus, segment.name))
        raise SourceChanged(
            f"segment {segment.name} of corpus {corpus!r} of {run.uri} is damaged, and its source has changed since: "
            f"restore the source to make it anew, or use another run."
        )
    return found[1]


def blank_segment(run: Location, corpus: str, segment: Segment, name: str, erased: frozenset[int]) -> Segment:
    """Write and commit another generation of a segment, called `name`, that holds nothing of these ids; return it."""
    key = rows_key(corpus, name)
    run.delete(key)  # of one that was killed
    with run.create_from(key) as file:
        with run.open(rows_key(corpus, segment.name)) as source:
            old = pq.ParquetFile(source, page_checksum_verification=True)
            with rows_writer(file, old.schema_arrow) as writer:
                for batch in old.iter_batches(ROW_GROUP, use_threads=False):
                    writer.write_batch(blanked(batch, erased), row_group_size=ROW_GROUP)
        object_ = written(key, file)
    new = replace(segment, name=name, size=object_.size, sha256=object_.sha256, blanked=len(erased))
    run.create_json(f"corpus/{corpus}/{name}/segment.json", asdict(new))
    return new


def _write_rows(
    run: Location, corpus: str, name: str, before: list[Segment], source: Iterator[Record], encode: Encode,
    segment_rows: int, tally: Tally, blank: frozenset[int],
) -> tuple[str, ObjectRecord]:  # fmt: skip
    """Write the rows of a segment over what is there; return their fingerprint, chained, and the object's record."""
    key = rows_key(corpus, name)
    run.delete(key)  # of an ingest that was killed, or damaged
    schema = read_schema(run, corpus, before[0].name) if before else None
    digest = hashlib.sha256(before[-1].fingerprint.encode() if before else b"")
    stream = example_rows(source, encode, before, segment_rows, tally)
    with run.create_from(key) as file:
        with ExitStack() as stack:
            writer = None
            while group := list(itertools.islice(stream, ROW_GROUP)):
                rows, places = [row for row, _ in group], [place for _, place in group]
                schema = schema or infer_schema(rows, places)
                writer = writer or stack.enter_context(rows_writer(file, schema))
                writer.write_batch(blanked(to_batch(rows, schema, places), blank), row_group_size=ROW_GROUP)
                for row in rows:
                    digest.update(canonical(row))
            if schema is None:
                nothing = f"none of {tally.records} records gave an example (skipped as empty)"
                raise ValueError(f"corpus {corpus!r}: {nothing}.")
            if writer is None:  # only skipped records were left
                rows_writer(file, schema).close()
        return digest.hexdigest(), written(key, file)


def _end(segments: list[Segment]) -> int:
    """Return the id that follows the last row of these segments."""
    return segments[-1].base + segments[-1].rows if segments else 0


def rows_writer(file: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    """Return what writes a segment's rows; every page carries a checksum."""
    return pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


def written(key: str, file: IO[bytes]) -> ObjectRecord:
    """Return the record of a file that was just written for this key."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    return ObjectRecord(key, file.tell(), digest.hexdigest())


def read_schema(run: Location, corpus: str, segment: str) -> pa.Schema:
    """Return the types of a segment's columns."""
    with run.open(rows_key(corpus, segment)) as file:
        return pq.read_schema(file)


def example_rows(
    source: Iterator[Record], encode: Encode, before: list[Segment], segment_rows: int, tally: Tally
) -> Iterator[Record]:
    """Yield one row per example, until the segment is full at the end of a document; count in `tally`."""
    base = _end(before)
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


def canonical(row: dict[str, Any]) -> bytes:
    """Return what stands for a row in a fingerprint."""
    return json.dumps(row, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON lacks in a fingerprint."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
