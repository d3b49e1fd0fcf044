"""Reading back everything that a run says it holds: what is missing, truncated or altered, by unit and rows.

Covered are the objects of all done-records, the rows of corpora, the metadata of gradient stores, and the tables of
indices that no done-record names. Blocks of a label whose index stands are left out: they were deleted on purpose.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa

from storage.damage import check_object, in_parallel, mark_damaged
from storage.gradients import altered_metadata
from storage.index import SORTED, ScoreIndex
from storage.journal import DoneRecords, Journal
from storage.locations import Location, ObjectRecord
from storage.segments import Segment, committed_segments, ingest_stage, rows_key

THREADS = 8
OF_ROWS = re.compile(r"(?P<segment>\d{6}\.\d+)-(?P<start>\d{9})$")


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be. Without a unit no job makes it anew."""

    key: str
    what: str  # "is missing", "has 3 of 12 bytes", …
    stage: str | None = None
    unit: str | None = None
    rows: str | None = None  # "rows 16:32 of segment 000000.0"

    def __str__(self) -> str:
        of = (
            ""
            if self.unit is None
            else f" (stage {self.stage}, unit {self.unit}{', ' + self.rows if self.rows else ''})"
        )
        return f"{self.key} {self.what}{of}"


@dataclass
class Verdict:
    """What a verification looked at and found."""

    objects: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


Found = tuple[int, int, list[Damage]]  # objects, bytes and damages of one task


def verify(run: Location, threads: int = THREADS, mark: bool = True) -> Verdict:
    """Read everything and return what is wrong; with `mark`, let the next job make the damaged units anew.

    Memory: one listing of the journal, and per thread a few MiB of the object that it reads.
    """
    verdict = Verdict()
    for objects, size, damages in in_parallel(_tasks(run), threads):
        verdict.objects += objects
        verdict.bytes += size
        verdict.damages += damages
    if mark:
        by_unit: dict[tuple[str, str], list[str]] = {}
        for damage in verdict.damages:
            if damage.stage is not None and damage.unit is not None:
                by_unit.setdefault((damage.stage, damage.unit), []).append(f"{damage.key} {damage.what}")
        for (stage, unit), found in by_unit.items():
            mark_damaged(run, stage, unit, found)
    return verdict


def _tasks(run: Location) -> Iterator[Callable[[], Found]]:
    finished = ScoreIndex.labels(run)
    stages = dict.fromkeys(key.split("/")[1] for key in run.list("journal"))
    for name in {key.split("/")[1]: None for key in run.list("corpus") if key.endswith("/segment.json")}:
        journal = Journal(run, ingest_stage(name))
        noted = {*journal.done(), *journal.damaged()}  # since they were damaged once: looked at below
        for segment in committed_segments(run, name):
            if segment.name not in noted:
                yield partial(_check_segment, run, name, segment)
    yield partial(_check_metadata, run)
    for stage in stages:
        kind, _, label = stage.partition("-")
        if kind in ("compute", "lissa") and label in finished:  # what they left was added up, and deleted
            continue
        journal = Journal(run, stage)
        records = journal.done()
        for unit in records:
            yield partial(_check_unit, run, stage, unit, records)
        for unit in journal.damaged():
            yield partial(_known, stage, unit)
    for label in finished:
        if f"index-{label}" not in stages:
            for name in SORTED:
                yield partial(_check_table, ScoreIndex.open(run, label), name)


def _check_unit(run: Location, stage: str, unit: str, records: DoneRecords) -> Found:
    record = records[unit]
    place = OF_ROWS.search(unit)
    rows = None
    if place:
        start = int(place["start"])
        rows = f"rows {start}:{start + record.get('rows', 0)} of segment {place['segment']}"
    objects = [ObjectRecord(**one) for one in record.get("objects", [])]
    found = [(one.key, check_object(run, one)) for one in objects]
    damages = [Damage(key, what, stage, unit, rows) for key, what in found if what]
    return len(objects), sum(one.size for one in objects), damages


def _check_segment(run: Location, corpus: str, segment: Segment) -> Found:
    key, rows = rows_key(corpus, segment.name), f"rows 0:{segment.rows}, ids from {segment.base}"
    if segment.sha256 is None or segment.size is None:  # of an early version
        return 1, 0, [] if run.exists(key) else [Damage(key, "is missing", ingest_stage(corpus), segment.name, rows)]
    what = check_object(run, ObjectRecord(key, segment.size, segment.sha256))
    return 1, segment.size, [Damage(key, what, ingest_stage(corpus), segment.name, rows)] if what else []


def _check_metadata(run: Location) -> Found:
    looked, wrong = altered_metadata(run)
    return looked, 0, [Damage(key, what) for key, what in wrong.items()]


def _check_table(index: ScoreIndex, name: str) -> Found:
    key = f"index/{index.label}/{name}.parquet"
    try:
        rows = sum(batch.num_rows for batch in index.table(name))
        with index.open_table(name) as table:
            what = None if rows == table.rows else f"has {rows} of {table.rows} rows"
    except FileNotFoundError:
        what = None if name in ("influenced", "queries") else "is missing"  # which older indices do not have
    except (OSError, pa.ArrowException) as error:
        what = f"does not read ({error})"
    return 1, 0, [Damage(key, what, f"index-{index.label}", "tables")] if what else []


def _known(stage: str, unit: str) -> Found:
    place = OF_ROWS.search(unit)
    rows = f"from row {int(place['start'])} of segment {place['segment']}" if place else None
    return 0, 0, [Damage("(known)", "waits to be made anew", stage, unit, rows)]
