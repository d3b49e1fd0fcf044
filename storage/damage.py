"""Objects that are not what their done-record says: found, named, and marked so that the next job makes them anew."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from storage.journal import Journal
from storage.locations import Location, ObjectRecord

CHUNK = 4 << 20  # bytes of an object in memory at a time

Found = TypeVar("Found")


class DamagedObject(OSError):  # noqa: N818  it is what the reader of the message is told
    """Something that a unit wrote is missing, truncated or altered."""

    def __init__(self, run: Location, stage: str, unit: str, what: str) -> None:
        again = f"Run the job of {run.uri} again: it makes this unit anew"
        super().__init__(f"{what}. It is of unit {unit} of stage {stage}. {again}.")
        self.run, self.stage, self.unit, self.what = run, stage, unit, what

    def mark(self) -> None:
        """Note it in the journal, so that the unit is not taken as done any more."""
        mark_damaged(self.run, self.stage, self.unit, [self.what])


def mark_damaged(run: Location, stage: str, unit: str, found: list[str]) -> bool:
    """Note that a unit must be made anew, with what its own making needs; False if that is known already.

    A shard scored without a store is added up from blocks that are gone once the index stands: they are made anew too.
    """
    new = Journal(run, stage).mark_damaged(unit, {"found": found})
    if stage.startswith("score-"):
        blocks = Journal(run, f"compute-{stage.removeprefix('score-')}")
        for block in [key for key in blocks.done() if key.endswith(f"-{unit}")]:
            blocks.mark_damaged(block, {"found": [f"{stage} needs it again"]})
    return new


def read_checked(run: Location, stage: str, unit: str, key: str) -> bytes:
    """Return an object that a unit wrote, compared with the unit's done-record if that names it.

    DamagedObject if it is missing or differs. Cost: one listing and one small read more than the object itself.
    """
    journal = Journal(run, stage)
    noted = (journal.record(unit) or {}).get("objects", [])
    record = next((ObjectRecord(**one) for one in noted if one["key"] == key), None)
    if record is None:
        if journal.is_damaged(unit):
            raise DamagedObject(run, stage, unit, f"{run.uri}/{key} was found damaged")
        return run.read(key)
    try:
        data = run.read(key)
    except FileNotFoundError as error:
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} is missing") from error
    if wrong := difference(record, len(data), hashlib.sha256(data).hexdigest()):
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} {wrong}")
    return data


def check_object(run: Location, record: ObjectRecord) -> str | None:
    """Return what is wrong with an object, None if nothing is. Reads all of it, CHUNK bytes at a time."""
    digest, size = hashlib.sha256(), 0
    try:
        with run.open(record.key) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return "is missing"
    return difference(record, size, digest.hexdigest())


def difference(record: ObjectRecord, size: int, sha256: str) -> str | None:
    """Return in words how an object differs from its record, None if it does not."""
    if size != record.size:
        return (
            f"has {size:,} of {record.size:,} bytes"
            if size < record.size
            else f"is {size:,} bytes, was {record.size:,}"
        )
    return None if sha256 == record.sha256 else "is altered: its checksum is not the one recorded"


def record_of(run: Location, key: str) -> ObjectRecord:
    """Return the record of an object that is there, read CHUNK bytes at a time."""
    with run.open(key) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return ObjectRecord(key, file.tell(), digest.hexdigest())


def in_parallel(tasks: Iterable[Callable[[], Found]], threads: int) -> Iterator[Found]:
    """Yield the tasks' results in their order; at most two per thread are begun and not yet given out."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Found]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
