"""Who is at work on a run. Several drivers may be: each has a lease, and takes the units that it works on one by one.

    journal/run/lease.<n>              driver n: its host, process and counter, which it rewrites every ten seconds
    journal/run/over.<n>               create-only; driver n has ended, or was found dead: nothing is held by it any more
    journal/run/turns/<what>/lease.<k> whose turn it is with what only one driver at a time may do; over.<k>: it is done
    journal/<stage>/<unit>/lease.<k>   create-only; the driver that the unit is with, the highest k counts

A driver is dead when its process on the reader's own host is gone, or when its counter stood still for a minute of the
reader's monotonic clock: no two clocks are ever compared. It stops by itself before that, so a unit is in two hands at once
only if a driver was found dead that was not; what its workers then write, `Claim` and create-only objects see to.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil

from storage.journal import Journal, Marks
from storage.locations import Location, ObjectConflict, to_json

LEASES = "journal/run"
BEAT = 10.0  # seconds between two rewrites by the holder
PATIENCE = 60.0  # seconds a counter must stand still before its driver is taken for dead
POLL = 2.0  # seconds between two looks at somebody else's work
SAME_PROCESS = 60.0  # seconds by which a process's start may seem to move when the host's clock is set


class RunBusy(OSError):  # noqa: N818
    """Another driver works on this run, and one of the two wants it alone."""


class LeaseLost(OSError):  # noqa: N818
    """This driver was taken for dead, or could not write for so long that it may have been."""


class Drivers:
    """What is known of a run's drivers. It remembers when each one's counter last moved, by its own clock."""

    def __init__(self, run: Location, clock: Callable[[], float] = time.monotonic, host: str | None = None) -> None:
        self.run, self.clock, self.host = run, clock, host or socket.gethostname()
        self._moved: dict[int, tuple[int, float]] = {}  # counter, and when it was first seen at that
        self._over: set[int] = set()

    def numbers(self) -> list[int]:
        """Return the numbers of the leases that are not over, ascending. Cost: one listing."""
        leases, over = set[int](), set[int]()
        for key in self.run.list(LEASES):
            name, _, number = key.removeprefix(f"{LEASES}/").partition(".")
            if name in ("lease", "over"):
                (leases if name == "lease" else over).add(int(number))
        self._over |= over
        return sorted(leases - self._over)

    def lease(self, number: int) -> dict[str, Any]:
        """Return what a driver's lease says. OSError if it is missing: leases must not be deleted."""
        try:
            return self.run.read_json(lease_key(number))
        except FileNotFoundError as error:
            raise OSError(f"{self.run.uri}/{lease_key(number)} is missing: leases must not be deleted.") from error

    def is_over(self, number: int) -> bool:
        """Tell whether a driver has ended or is dead."""
        if number not in self._over and self.run.exists(over_key(number)):
            self._over.add(number)
        return number in self._over or self._is_dead(number)

    def end(self, number: int, by: str) -> None:
        """Note that a driver is over, so that it stops if it is not: before anything is taken from it."""
        if number not in self._over:
            with suppress(ObjectConflict):  # somebody else said so
                self.run.create_json(over_key(number), {"by": by, "time": round(time.time(), 3)})
        self._over.add(number)

    def living(self) -> list[int]:
        """Return the numbers of the drivers that are not over. One whose counter stands still lives for a minute."""
        return [number for number in self.numbers() if not self.is_over(number)]

    def _is_dead(self, number: int) -> bool:
        lease = self.lease(number)
        if lease["released"] or self.process_is_gone(lease):
            return True
        counter, since = self._moved.get(number, (None, 0.0))
        if counter != lease["counter"]:
            self._moved[number] = (lease["counter"], self.clock())
            return False
        return self.clock() - since >= PATIENCE

    def process_is_gone(self, lease: dict[str, Any]) -> bool:
        """Tell whether a driver ran on this very host and its process is no more."""
        if lease["host"] != self.host:
            return False
        started = _started_at(lease["pid"])
        return started is None or (lease["started"] is not None and abs(started - lease["started"]) > SAME_PROCESS)


@dataclass(frozen=True)
class Claim:
    """By what right a worker works on a stage: its driver's lease. It travels with the stage.

    A worker that was given up (its driver died, it was cut off) may go on for a while; it must not undo anything.
    """

    stage: str
    lease: int  # the driver's

    def check(self, run: Location, unit: str) -> None:
        """Raise LeaseLost if this unit is done and whole, if its driver is over or if the unit is with another one."""
        journal = Journal(run, self.stage)
        if journal.record(unit) is not None:
            raise LeaseLost(f"unit {unit} of {run.uri} is done already: what this worker made of it differs, and goes.")
        number = journal.marks(unit).get(unit, Marks()).lease
        holder = self.lease if number < 0 else run.read_json(journal.lease_key(unit, number))["driver"]
        if holder != self.lease or _was_ended(run, self.lease):
            raise LeaseLost(
                f"another driver has taken unit {unit} of {run.uri} over: what this worker made of it goes."
            )


class RunLease:
    """One driver's place at a run while in its `with` block; a daemon thread keeps it alive.

    `alone`: entering raises RunBusy while another driver lives, and others are refused meanwhile. `check` raises LeaseLost
    once another driver has found this one dead, or once the lease could not be rewritten for a minute.
    """

    def __init__(
        self,
        run: Location,
        driver: str = "driver",
        alone: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        host: str | None = None,  # of this process; an argument for tests
        pid: int | None = None,
    ) -> None:
        self.run, self.driver, self.alone, self.clock, self.sleep = run, driver, alone, clock, sleep
        self.host, self.pid = host or socket.gethostname(), pid or os.getpid()
        self.drivers = Drivers(run, clock, self.host)
        self.nonce = secrets.token_hex(8)
        self.number = -1  # of this lease; a later driver has a higher one
        self._counter, self._alive_at = 0, clock()
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lease", daemon=True)

    def __enter__(self) -> "RunLease":
        self.number = max(_numbers(self.run), default=-1)
        created = False
        while not created:
            self.number += 1
            try:
                self.run.create(lease_key(self.number), self._content(released=False))
                created = True
            except ObjectConflict:
                continue  # another driver came at the same moment
        self._alive_at = self.clock()
        self._thread.start()
        try:
            self._refuse_company()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            self._release()

    def check(self) -> None:
        """Raise LeaseLost if this driver must stop."""
        if self._lost is None and self.clock() - self._alive_at > PATIENCE:
            self._lost = f"could not be rewritten for {PATIENCE:.0f} s"
        if self._lost is not None:
            sentence = f"the lease of {self.driver} on {self.run.uri} {self._lost}"
            raise LeaseLost(f"{sentence}. This driver stops; what is done stays done. Run again to resume.")

    def beat(self) -> None:
        """Rewrite the lease with the next counter, or note that it is over. The thread's one step."""
        if self.run.exists(over_key(self.number)):
            self._lost = f"was taken over by {self.run.read_json(over_key(self.number))['by']}"
            return
        self._counter += 1
        self.run.replace(lease_key(self.number), self._content(released=False))
        self._alive_at = self.clock()

    @contextmanager
    def turn(self, what: str, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Do something while no other driver does the same, and wait until then. LeaseLost as `check`."""
        folder, told = f"{LEASES}/turns/{what}", False
        while (number := self._next_turn(folder)) is None:
            if not told:
                say(f"waiting for another driver: {what}")
            told = True
            self.sleep(POLL)
            self.check()
        try:
            yield
        finally:
            self.run.create_json(f"{folder}/over.{number}", {"driver": self.number, "nonce": self.nonce})

    def taken(self, key: str, damaged: int = -1) -> bool:
        """Create this lease's claim under a key and tell whether it is ours: False if another driver was first."""
        try:
            self.run.create_json(key, {"driver": self.number, "nonce": self.nonce, "damaged": damaged})
        except ObjectConflict:
            return False
        return True

    def is_free(self, driver: int) -> bool:
        """Tell whether what a driver has claimed may be taken; one that was found dead is told so first."""
        if not self.drivers.is_over(driver):
            return False
        self.drivers.end(driver, self._me())
        return True

    def _next_turn(self, folder: str) -> int | None:
        """Return the number of the turn that is ours now, None while it is another driver's."""
        keys = [key.rpartition("/")[2].partition(".") for key in self.run.list(folder)]
        leases = [int(number) for name, _, number in keys if name == "lease"]
        last = max(leases, default=-1)
        held = last >= 0 and ("over", ".", str(last)) not in keys
        if held and not self.is_free(self.run.read_json(f"{folder}/lease.{last}")["driver"]):
            return None
        return last + 1 if self.taken(f"{folder}/lease.{last + 1}") else None

    def _refuse_company(self) -> None:
        """Raise RunBusy if another driver shows a sign of life and one of the two wants to be alone."""
        for number in self.drivers.numbers():
            other = self.drivers.lease(number)
            if number == self.number or not (self.alone or other.get("alone")):
                continue
            while not self.drivers.is_over(number):
                if self.drivers.lease(number)["counter"] != other["counter"]:
                    by = f"{other['driver']} (process {other['pid']} on {other['host']})"
                    sentence = f"{self.run.uri} is being worked on by {by}"
                    raise RunBusy(f"{sentence}. Wait until it ends or stop it, or use another run.")
                self.sleep(POLL)
            self.drivers.end(number, self._me())

    def _release(self) -> None:
        self.run.replace(lease_key(self.number), self._content(released=True))
        self.drivers.end(self.number, self._me())

    def _keep(self) -> None:
        while self._lost is None and not self._stop.wait(BEAT):
            try:
                self.beat()
            except OSError:
                continue  # the next beat may succeed; `check` gives up after a minute without one

    def _me(self) -> str:
        return f"{self.driver} (process {self.pid} on {self.host})"

    def _content(self, released: bool) -> bytes:
        return to_json(
            {
                "driver": self.driver,
                "host": self.host,
                "pid": self.pid,
                "started": _started_at(self.pid),
                "alone": self.alone,
                "nonce": self.nonce,
                "counter": self._counter,
                "time": round(time.time(), 3),  # for people; no two clocks are compared
                "released": released,
            }
        )


class UnitClaims:
    """The units of one stage that this driver has taken, and how those that others have come along."""

    def __init__(self, lease: RunLease, journal: Journal) -> None:
        self.lease, self.journal = lease, journal
        self._marks = journal.marks()
        self._mine: set[str] = set()
        self._claims: dict[tuple[str, int], dict[str, Any]] = {}  # of other drivers, by unit and number

    def take(self, unit: str) -> bool:
        """Take a unit; False if it is done by now or with a driver that lives. Cost: one create-only put, if free."""
        if unit in self._mine:
            return True
        own = self._marks.get(unit, Marks())
        if own.lease >= 0 and not own.is_done and self._is_void(unit, own):
            own = self.journal.marks(unit).get(unit, own)  # it may have been done before its driver ended
        free = not own.is_done and (own.lease < 0 or self._is_void(unit, own))
        if not free or not self.lease.taken(self.journal.lease_key(unit, own.lease + 1), own.damaged):
            return False
        self._mine.add(unit)
        return True

    def look(self, units: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Return the done-records of those of these units that are done by now, and those that are free. One listing."""
        self._marks = self.journal.marks()
        wanted = [(unit, self._marks[unit]) for unit in units]
        done = {unit: self.journal.read(unit, own.done) for unit, own in wanted if own.is_done}
        return done, [unit for unit, own in wanted if unit not in done and self._is_void(unit, own)]

    def _is_void(self, unit: str, own: Marks) -> bool:
        """Tell whether a claim counts no more: its driver is over, or the unit was done under it and then damaged."""
        place = (unit, own.lease)
        if place not in self._claims:
            self._claims[place] = self.lease.run.read_json(self.journal.lease_key(unit, own.lease))
        claim = self._claims[place]
        return own.damaged > claim["damaged"] or self.lease.is_free(claim["driver"])


def _was_ended(run: Location, number: int) -> bool:
    """Tell whether a driver was found dead by another: one that left by itself has nothing that others took."""
    return run.exists(over_key(number)) and not run.read_json(lease_key(number))["released"]


def lease_key(number: int) -> str:
    return f"{LEASES}/lease.{number}"


def over_key(number: int) -> str:
    return f"{LEASES}/over.{number}"


def _numbers(run: Location) -> list[int]:
    leads = (f"{LEASES}/lease.", f"{LEASES}/over.")
    return [int(key.rpartition(".")[2]) for key in run.list(LEASES) if key.startswith(leads)]


def _started_at(pid: int) -> float | None:
    """Return when a process of this host began, so that a number used again is not taken for it; None if it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
