"""What is done and what happened: done-records of units, events of a driver. Who is at work is in `leases`.

    journal/<stage>/<unit>/done.<n>     create-only; the highest n counts
    journal/<stage>/<unit>/damaged.<n>  create-only; what the done-record of this n names is damaged: the unit is to be made
                                        again and is then done.<n+1>
    journal/<stage>/<unit>/lease.<n>    create-only; the driver that has taken the unit (see `leases`)
    events/<driver>.<n>.jsonl           what happened, one JSON object a line, in order of n

What a unit is, is its stage's affair.
"""

import json
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from storage.locations import Location, ObjectConflict

UNIT_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*(/[A-Za-z0-9][A-Za-z0-9._+=,@-]*)*")
READERS = 32  # done-records read at a time when all are wanted


class DoneRecords(Mapping[str, dict[str, Any]]):
    """The record that counts of every unit done, read when it is asked for; which units are done is known at once."""

    def __init__(self, run: Location, latest: dict[str, str]) -> None:
        self._run, self._latest, self._read = run, latest, dict[str, dict[str, Any]]()

    def __getitem__(self, unit: str) -> dict[str, Any]:
        if unit not in self._read:
            self._read[unit] = self._run.read_json(self._latest[unit])
        return self._read[unit]

    def items(self) -> ItemsView[str, dict[str, Any]]:
        """Return units and records; those not read yet are read side by side, as on S3 each costs a round trip."""
        unread = [unit for unit in self._latest if unit not in self._read]
        with ThreadPoolExecutor(max_workers=READERS) as readers:
            for _ in readers.map(self.__getitem__, unread):
                pass
        return super().items()

    def __contains__(self, unit: object) -> bool:
        return unit in self._latest

    def __iter__(self) -> Iterator[str]:
        return iter(self._latest)

    def __len__(self) -> int:
        return len(self._latest)


@dataclass(frozen=True)
class Marks:
    """The highest number of each kind of record that a unit has, −1 for none."""

    done: int = -1
    damaged: int = -1
    lease: int = -1

    @property
    def is_done(self) -> bool:
        return self.done > self.damaged

    @property
    def is_damaged(self) -> bool:
        return self.damaged >= self.done and self.damaged >= 0


class Journal:
    """The done-records of one stage."""

    def __init__(self, run: Location, stage: str) -> None:
        self.run, self.stage = run, stage
        self._folder = f"journal/{_checked(stage)}"

    def done(self) -> DoneRecords:
        """Return the record of each unit done, the one of highest n, units in order of their keys. Cost: one listing.

        A unit whose objects were found damaged since is not done.
        """
        marks = self._marks(self._folder)
        latest = {unit: own.done for unit, own in sorted(marks.items()) if own.is_done}
        return DoneRecords(self.run, {unit: self._key(unit, number) for unit, number in latest.items()})

    def damaged(self) -> list[str]:
        """Return the units that are to be made again, in order of their keys. Cost: one listing."""
        return sorted(unit for unit, own in self._marks(self._folder).items() if own.is_damaged)

    def commit(self, unit_key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Note a unit as done and return the record that counts: the first one since the unit was last found damaged.

        ValueError for a key with characters that no path should have.
        """
        unit = _checked(unit_key)
        try:
            self.run.create_json(self._key(unit, 0), record)
        except ObjectConflict:
            own = self.marks(unit)[unit]
            if own.is_done:
                return self.run.read_json(self._key(unit, own.done))
            self.run.create_json(self._key(unit, own.damaged + 1), record)
        return record

    def record(self, unit_key: str) -> dict[str, Any] | None:
        """Return the record of one unit, None unless it is done. Cost: one listing of its own records, one read."""
        unit = _checked(unit_key)
        own = self.marks(unit).get(unit, Marks())
        return self.run.read_json(self._key(unit, own.done)) if own.is_done else None

    def is_damaged(self, unit_key: str) -> bool:
        """Tell whether one unit is to be made again. Cost: one listing of its own records."""
        unit = _checked(unit_key)
        return self.marks(unit).get(unit, Marks()).is_damaged

    def before(self, unit_key: str) -> dict[str, Any] | None:
        """Return the record that a unit had when it was last found damaged, None if it never was."""
        unit = _checked(unit_key)
        own = self.marks(unit).get(unit, Marks())
        key = self._key(unit, own.damaged)
        return self.run.read_json(key) if own.damaged >= 0 and self.run.exists(key) else None

    def mark_damaged(self, unit_key: str, found: dict[str, Any]) -> bool:
        """Note that what a unit wrote is damaged, so that the next job makes it anew; False if that is known already."""
        unit = _checked(unit_key)
        own = self.marks(unit).get(unit, Marks())
        if own.is_damaged:
            return False
        if own.done < 0:  # an index or a segment of an early version, which the journal did not name
            self.commit(unit, {"objects": [], "noted_by": "verify"})
        self.run.create_json(f"{self._folder}/{unit}/damaged.{max(own.done, 0)}", found)
        return True

    def marks(self, unit_key: str = "") -> dict[str, Marks]:
        """Return which records units have: every one of the stage, or one of them. Cost: one listing."""
        return self._marks(f"{self._folder}/{_checked(unit_key)}" if unit_key else self._folder)

    def read(self, unit_key: str, number: int) -> dict[str, Any]:
        """Return the done-record of a unit that has this number."""
        return self.run.read_json(self._key(_checked(unit_key), number))

    def lease_key(self, unit_key: str, number: int) -> str:
        """Return the key of a unit's claim."""
        return f"{self._folder}/{_checked(unit_key)}/lease.{number}"

    def _marks(self, folder: str) -> dict[str, Marks]:
        """Return what stands under a folder of this stage, by unit."""
        marks: dict[str, Marks] = {}
        for key in self.run.list(folder):
            unit, _, file = key.removeprefix(f"{self._folder}/").rpartition("/")
            name, _, number = file.partition(".")
            if unit and name in ("done", "damaged", "lease"):
                own = marks.get(unit, Marks())
                marks[unit] = replace(own, **{name: max(getattr(own, name), int(number))})
        return marks

    def _key(self, unit: str, number: int) -> str:
        return f"{self._folder}/{unit}/done.{number}"


class EventLog:
    """Append-only events of one driver, buffered and written as numbered objects."""

    def __init__(
        self,
        run: Location,
        driver: str,
        every: int = 200,  # events per object at most
        seconds: float = 10,  # an event waits no longer than this for the next one to write it out
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.run, self.driver = run, _checked(driver)
        self.every, self.seconds, self.clock, self.now = every, seconds, clock, now
        lead = f"events/{driver}."
        keys = [key.removeprefix(lead).removesuffix(".jsonl") for key in run.list("events") if key.startswith(lead)]
        self._number = max((int(key) for key in keys if key.isdigit()), default=-1) + 1
        self._lines: list[str] = []
        self._flushed = clock()
        self._lock = threading.Lock()

    def write(self, kind: str, **fields: Any) -> None:
        """Add an event with the time of day in seconds; thread-safe. It is on disk after the next flush."""
        line = json.dumps({"time": round(self.now(), 3), "kind": kind, **fields}, ensure_ascii=False)
        with self._lock:
            self._lines.append(line)
            if len(self._lines) >= self.every or self.clock() - self._flushed >= self.seconds:
                self._flush()

    def close(self) -> None:
        with self._lock:
            self._flush()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _flush(self) -> None:
        if self._lines:
            data = "".join(f"{line}\n" for line in self._lines).encode()
            self.run.create(f"events/{self.driver}.{self._number:06d}.jsonl", data)
            self._number += 1
            self._lines.clear()
        self._flushed = self.clock()


def _checked(key: str) -> str:
    if not UNIT_KEY.fullmatch(key):
        raise ValueError(f"key {key!r} is not allowed: letters, digits and ._+=,@- in parts joined by slashes.")
    return key
