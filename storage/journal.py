"""What is done, who is at work, and what happened: done-records of units, the lease on a run, events of a driver.

    journal/<stage>/<unit>/done.<n>     create-only; the highest n counts
    journal/<stage>/<unit>/damaged.<n>  create-only; what the done-record of this n names is damaged: the unit is to be made
                                        again and is then done.<n+1>
    journal/run/lease.<n>               driver, host, process and counter; its holder rewrites it, the highest n counts
    events/<driver>.<n>.jsonl           what happened, one JSON object a line, in order of n

A lease is free when released, when its process on the reader's own host is gone, or when its counter stood still for a
minute of the reader's monotonic clock: no two clocks are ever compared. What a unit is, is its stage's affair.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import psutil

from storage.locations import Location, ObjectConflict, to_json

UNIT_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*(/[A-Za-z0-9][A-Za-z0-9._+=,@-]*)*")
LEASES = "journal/run"
BEAT = 10.0  # seconds between two rewrites by the holder
PATIENCE = 60.0  # seconds a counter must stand still before the lease is taken over
POLL = 2.0  # seconds between two looks at somebody else's counter
READERS = 32  # done-records read at a time when all are wanted
SAME_PROCESS = 60.0  # seconds by which a process's start may seem to move when the host's clock is set


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
    """The highest number of either kind of record that a unit has, −1 for none."""

    done: int = -1
    damaged: int = -1

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
            own = self._marks(f"{self._folder}/{unit}")[unit]
            if own.is_done:
                return self.run.read_json(self._key(unit, own.done))
            self.run.create_json(self._key(unit, own.damaged + 1), record)
        return record

    def record(self, unit_key: str) -> dict[str, Any] | None:
        """Return the record of one unit, None unless it is done. Cost: one listing of its own records, one read."""
        unit = _checked(unit_key)
        own = self._marks(f"{self._folder}/{unit}").get(unit, Marks())
        return self.run.read_json(self._key(unit, own.done)) if own.is_done else None

    def is_damaged(self, unit_key: str) -> bool:
        """Tell whether one unit is to be made again. Cost: one listing of its own records."""
        unit = _checked(unit_key)
        return self._marks(f"{self._folder}/{unit}").get(unit, Marks()).is_damaged

    def before(self, unit_key: str) -> dict[str, Any] | None:
        """Return the record that a unit had when it was last found damaged, None if it never was."""
        unit = _checked(unit_key)
        own = self._marks(f"{self._folder}/{unit}").get(unit, Marks())
        key = self._key(unit, own.damaged)
        return self.run.read_json(key) if own.damaged >= 0 and self.run.exists(key) else None

    def mark_damaged(self, unit_key: str, found: dict[str, Any]) -> bool:
        """Note that what a unit wrote is damaged, so that the next job makes it anew; False if that is known already."""
        unit = _checked(unit_key)
        own = self._marks(f"{self._folder}/{unit}").get(unit, Marks())
        if own.is_damaged:
            return False
        if own.done < 0:  # an index or a segment of an early version, which the journal did not name
            self.commit(unit, {"objects": [], "noted_by": "verify"})
        self.run.create_json(f"{self._folder}/{unit}/damaged.{max(own.done, 0)}", found)
        return True

    def _marks(self, folder: str) -> dict[str, Marks]:
        """Return what stands under a folder of this stage, by unit."""
        marks: dict[str, Marks] = {}
        for key in self.run.list(folder):
            unit, _, file = key.removeprefix(f"{self._folder}/").rpartition("/")
            name, _, number = file.partition(".")
            if unit and name in ("done", "damaged"):
                own = marks.get(unit, Marks())
                marks[unit] = replace(own, **{name: max(getattr(own, name), int(number))})
        return marks

    def _key(self, unit: str, number: int) -> str:
        return f"{self._folder}/{unit}/done.{number}"


class RunBusy(OSError):  # noqa: N818
    """Another driver works on this run."""


class LeaseLost(OSError):  # noqa: N818
    """Another driver has taken the run over."""


@dataclass(frozen=True)
class Claim:
    """By what right a worker works on a stage: its driver's lease. It travels with the stage.

    A worker that was given up (its driver died, it was cut off) may go on for a while; it must not undo anything.
    """

    stage: str
    lease: int  # the driver's

    def check(self, run: Location, unit: str) -> None:
        """Raise LeaseLost if this unit is done and whole, or if another driver holds the run by now."""
        if Journal(run, self.stage).record(unit) is not None:
            raise LeaseLost(f"unit {unit} of {run.uri} is done already: what this worker made of it differs, and goes.")
        if max(_lease_numbers(run)) > self.lease:
            raise LeaseLost(f"another driver has taken {run.uri} over: what this worker made of {unit} goes.")


class RunLease:
    """Holds a run for one driver while in its `with` block; a daemon thread keeps it alive.

    Entering raises RunBusy naming the holder (at the first sign of life, at the latest after a minute); `check` raises
    LeaseLost once another driver has taken over, or once the lease could not be rewritten for a minute.
    """

    def __init__(
        self,
        run: Location,
        driver: str = "driver",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        host: str | None = None,  # of this process; an argument for tests
        pid: int | None = None,
    ) -> None:
        self.run, self.driver, self.clock, self.sleep = run, driver, clock, sleep
        self.host, self.pid = host or socket.gethostname(), pid or os.getpid()
        self.nonce = secrets.token_hex(8)
        self._number, self._counter = 0, 0
        self._lost: str | None = None
        self._alive_at = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lease", daemon=True)

    @property
    def number(self) -> int:
        """Return which lease of the run this is; a later driver has a higher one."""
        return self._number

    def __enter__(self) -> "RunLease":
        number, holder = self._highest()
        if holder is not None:
            self._wait_until_free(number, holder)
        self._number = number + 1
        try:
            self.run.create(self._key(self._number), self._content(released=False))
        except ObjectConflict as error:
            raise self._busy(self.run.read_json(self._key(self._number))) from error
        self._alive_at = self.clock()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            self.run.replace(self._key(self._number), self._content(released=True))

    def check(self) -> None:
        """Raise LeaseLost if this driver must stop."""
        if self._lost is None and self.clock() - self._alive_at > PATIENCE:
            self._lost = f"could not be rewritten for {PATIENCE:.0f} s"
        if self._lost is not None:
            sentence = f"the lease of {self.driver} on {self.run.uri} {self._lost}"
            raise LeaseLost(f"{sentence}. This driver stops; what is done stays done. Run again to resume.")

    def beat(self) -> None:
        """Rewrite the lease with the next counter, or note that a higher one is there. The thread's one step."""
        if self.run.exists(self._key(self._number + 1)):
            holder = self.run.read_json(self._key(self._number + 1))
            self._lost = f"was taken over by {holder['driver']} (process {holder['pid']} on {holder['host']})"
            return
        self._counter += 1
        self.run.replace(self._key(self._number), self._content(released=False))
        self._alive_at = self.clock()

    def _keep(self) -> None:
        while self._lost is None and not self._stop.wait(BEAT):
            try:
                self.beat()
            except OSError:
                continue  # the next beat may succeed; `check` gives up after a minute without one

    def _wait_until_free(self, number: int, holder: dict[str, Any]) -> None:
        """Return once the highest lease is free. RunBusy at its holder's first sign of life."""
        since = self.clock()
        counter = holder["counter"]
        while not self._is_free(holder) and self.clock() - since < PATIENCE:
            self.sleep(POLL)
            latest, holder = self._highest_of(number)
            if latest != number or holder["counter"] != counter:
                raise self._busy(holder)

    def _is_free(self, holder: dict[str, Any]) -> bool:
        if holder["released"]:
            return True
        if holder["host"] != self.host:
            return False
        started = _started_at(holder["pid"])
        return started is None or holder["started"] is None or abs(started - holder["started"]) > SAME_PROCESS

    def _highest(self) -> tuple[int, dict[str, Any] | None]:
        numbers = _lease_numbers(self.run)
        if not numbers:
            return -1, None
        return max(numbers), self.run.read_json(self._key(max(numbers)))

    def _highest_of(self, number: int) -> tuple[int, dict[str, Any]]:
        latest, holder = self._highest()
        if holder is None:
            raise OSError(f"{self.run.uri}/{self._key(number)} is missing: leases must not be deleted. Run again.")
        return latest, holder

    def _busy(self, holder: dict[str, Any]) -> RunBusy:
        by = f"{holder['driver']} (process {holder['pid']} on {holder['host']})"
        return RunBusy(f"{self.run.uri} is being worked on by {by}. Wait until it ends or stop it, or use another run.")

    def _content(self, released: bool) -> bytes:
        return to_json(
            {
                "driver": self.driver,
                "host": self.host,
                "pid": self.pid,
                "started": _started_at(self.pid),
                "nonce": self.nonce,
                "counter": self._counter,
                "time": round(time.time(), 3),  # for people; no two clocks are compared
                "released": released,
            }
        )

    def _key(self, number: int) -> str:
        return f"{LEASES}/lease.{number}"


def _lease_numbers(run: Location) -> list[int]:
    return [int(key.rpartition(".")[2]) for key in run.list(LEASES) if "/lease." in key]


def _started_at(pid: int) -> float | None:
    """Return when a process of this host began, so that a number used again is not taken for it; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


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
