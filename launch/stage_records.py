"""What the driver notes of its stages: done-records under its lease, the index's objects, and what was made anew."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from actors.index import IndexJob, build_index
from actors.neighbours import EXACT, about_key, answer_with, index_key
from storage.damage import record_of
from storage.index import ScoreIndex
from storage.journal import Journal
from storage.leases import RunLease
from storage.locations import Location

TABLES = "tables"  # the unit of an index that holds its Parquet tables and their description


@dataclass(frozen=True)
class LeasedJournal:
    """A stage's journal that commits only while this process holds the run."""

    journal: Journal
    lease: RunLease

    def done(self) -> Mapping[str, Mapping[str, Any]]:
        return self.journal.done()

    def commit(self, unit: str, record: dict[str, Any]) -> None:
        self.lease.check()
        self.journal.commit(unit, record | {"committed": round(time.time(), 3)})  # for people, who ask how old it is

    def say_rebuilt(self, units: list[str], say: Callable[[str], None]) -> None:
        """Say of units that were damaged and are made anew whether their bytes are what they were."""
        for unit in units:
            before, after = self.journal.before(unit), self.journal.record(unit)
            if before is None or after is None:
                continue
            was, now = ({one["key"]: one["sha256"] for one in record["objects"]} for record in (before, after))
            other = sorted(key for key in was if now.get(key) != was[key])
            how = "as it was, byte for byte"
            if other:
                how = f"with other bytes, {', '.join(other)}: what was made of it before may differ by rounding"
            say(f"{self.journal.stage}: damaged unit {unit} is made anew {how}")


def unit_seconds(run: Location, stage: str, unit: str) -> float:
    """Return the seconds of a stage's units whose names begin so."""
    records = Journal(run, stage).done()
    return float(sum(record.get("seconds", 0.0) for name, record in records.items() if name.startswith(unit)))


def finish_index(job: IndexJob, lease: RunLease, neighbours: str, say: Callable[[str], None]) -> None:
    """Build what of the index is not there whole, and note its objects."""
    run, label = job.run, job.score.label
    journal = LeasedJournal(Journal(run, f"index-{label}"), lease)
    damaged = journal.journal.damaged()
    lease.check()
    if TABLES in damaged:
        run.delete(f"index/{label}/meta.json")
    if label not in ScoreIndex.labels(run):
        build_index(job)
    if TABLES not in journal.done():
        tables = [key for key in run.list(f"index/{label}") if key.endswith((".parquet", "/meta.json"))]
        journal.commit(TABLES, {"objects": _records(run, tables)})
    for key in run.list(f"scores/{label}/blocks"):  # what the shards were added up from; the index stands
        run.delete(key)
    if neighbours in damaged:
        run.delete(about_key(label, neighbours))
    answer_with(job, neighbours, say)
    if neighbours != EXACT and neighbours not in journal.done():
        journal.commit(
            neighbours, {"objects": _records(run, [index_key(label, neighbours), about_key(label, neighbours)])}
        )
    journal.say_rebuilt(damaged, say)


def _records(run: Location, keys: list[str]) -> list[dict[str, Any]]:
    return [asdict(record_of(run, key)) for key in keys]
