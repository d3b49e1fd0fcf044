"""Objects that are not what their done-record says: found, named, and marked so that the next job makes them anew."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


@contextmanager
def noting_damage(run: Location) -> Iterator[None]:
    """Note in a run's journal which of its objects is met damaged in here, so that its next job makes that unit anew.

    Another run's objects are left to its own job.
    """
    try:
        yield
    except DamagedObject as error:
        if error.run == run:
            mark_damaged(run, error.stage, error.unit, [error.what])
        raise


def mark_damaged(run: Location, stage: str, unit: str, found: list[str]) -> bool:
    """Note that a unit must be made anew, with what its own making needs; False if that is known already.

    What it was put together from may be gone by then, and is made anew too: the blocks of a shard scored without a store,
    and the solved blocks of a query state with what they are the mean of.
    """
    new = Journal(run, stage).mark_damaged(unit, {"found": found})
    kind, _, label = stage.partition("-")
    if kind == "score":
        _make_again(run, f"compute-{label}", stage, lambda key: key.endswith(f"-{unit}"))
    elif kind == "solve" and unit == "state":
        _make_again(run, stage, stage, lambda key: key.startswith("block-"))
        _make_again(run, f"lissa-{label}", stage, lambda key: True)
    return new


def _make_again(run: Location, stage: str, needed_by: str, chosen: Callable[[str], bool]) -> None:
    journal = Journal(run, stage)
    for unit in filter(chosen, list(journal.done())):
        journal.mark_damaged(unit, {"found": [f"{needed_by} needs it again"]})


def read_checked(run: Location, stage: str, unit: str, key: str) -> bytes:
    """Return an object that a unit wrote, compared with the unit's done-record if that names it.

    DamagedObject if it is missing or differs. Cost: one listing and one small read more than the object itself.
    """
    record = _noted(run, stage, unit, key)
    if record is None:
        return run.read(key)
    try:
        data = run.read(key)
    except FileNotFoundError as error:
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} is missing") from error
    if wrong := difference(record, len(data), hashlib.sha256(data).hexdigest()):
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} {wrong}")
    return data


def refuse_damaged(run: Location, stage: str, unit: str, key: str) -> None:
    """Compare an object with its unit's done-record, if that names it, without holding it. Raises DamagedObject."""
    record = _noted(run, stage, unit, key)
    if record is not None and (wrong := check_object(run, record)):
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} {wrong}")


def _noted(run: Location, stage: str, unit: str, key: str) -> ObjectRecord | None:
    """Return what the done-record says of the object; None if it does not name it. DamagedObject if it was found so."""
    journal = Journal(run, stage)
    noted = (journal.record(unit) or {}).get("objects", [])
    record = next((ObjectRecord(**one) for one in noted if one["key"] == key), None)
    if record is None and journal.is_damaged(unit):
        raise DamagedObject(run, stage, unit, f"{run.uri}/{key} was found damaged")
    return record


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
