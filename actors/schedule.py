"""Which unit runs where, and what to do when something fails: events in, instructions out.

Pure: no I/O, no threads, no clock of its own (`Tick` brings the time). Every rule about retries lives here. Work is
taken, not assigned: a worker gets its next unit when it has room. The pools (pool.py, ray_pool.py) make the events,
run_stage.py carries out the instructions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from actors.units import Receipt, Stage, Unit


@dataclass(frozen=True)
class Ready:
    """A worker is up. Worker names are never used twice, not even by a replacement."""

    worker: str


@dataclass(frozen=True)
class Done:
    worker: str
    receipt: Receipt


@dataclass(frozen=True)
class Failed:
    """A unit raised: `storage` for an OSError, which is tried again; `mistake` in config or data and `bug`, which are not."""

    worker: str
    unit: str
    error: str  # "OSError: SlowDown"
    kind: Literal["storage", "mistake", "bug"]
    detail: str = ""  # the worker's traceback


@dataclass(frozen=True)
class Lost:
    """A worker is gone with everything it had in flight. With its whole node: nobody's fault, no unit is blamed."""

    worker: str
    reason: str
    with_node: bool = False


@dataclass(frozen=True)
class Taken:
    """Another driver has the unit that this worker was to get."""

    worker: str
    unit: str


@dataclass(frozen=True)
class Elsewhere:
    """What became of a unit that another driver had: its done-record, or None, and it is free again."""

    unit: str
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class Tick:
    now: float  # seconds of a monotonic clock


@dataclass(frozen=True)
class Run:
    worker: str
    unit: Unit


@dataclass(frozen=True)
class Replace:
    worker: str


@dataclass(frozen=True)
class Commit:
    receipt: Receipt


@dataclass(frozen=True)
class Stop:
    message: str
    detail: str = ""  # the traceback of a bug


Event = Ready | Done | Failed | Lost | Taken | Elsewhere | Tick
Instruction = Run | Replace | Commit | Stop


@dataclass(frozen=True)
class Limits:
    """When a stage gives up."""

    attempts: int = 3  # OSErrors of one unit
    kills: int = 3  # workers that one unit took down while others succeed
    in_flight: int = 2  # units per worker: one runs, one waits, so that no worker idles for a round trip
    stall_seconds: float = 1800.0  # without any unit done or getting on
    max_bad_fraction: float = 0.001  # quarantined rows, of all rows of the stage


class Schedule:
    """The state of one stage: what waits, what runs where, what is done and what went wrong."""

    def __init__(
        self,
        stage: Stage,
        done: Mapping[str, Mapping[str, Any]],  # done-records of earlier runs by unit key; other keys are ignored
        limits: Limits,
        now: float,  # seconds, the same clock as Tick
        expected_workers: int = 1,  # how many the pool will have once all are up
    ) -> None:
        self.stage = stage
        self.limits = limits
        self.now = self.last_done = now
        self.expected_workers = expected_workers
        self.queue = deque(unit for unit in stage.units if unit.key not in done)
        self.in_flight: dict[str, list[Unit]] = {}  # by worker, oldest first: that one is running
        self.gone: set[str] = set()
        self.elsewhere: dict[str, Unit] = {}  # with other drivers, by key
        self.done = {unit.key for unit in stage.units if unit.key in done}
        self.done_here = self.done_elsewhere = 0  # units done since this object was made, here and by other drivers
        self.seconds: dict[str, float] = {}  # spent so far on units that were given back unfinished
        self.attempts: dict[str, int] = {}
        self.kills: dict[str, int] = {}
        self.deaths_in_a_row = 0  # worker processes that died since a unit was last done
        self.retries = 0
        records = [record for key, record in done.items() if key in self.done] if self.done else []
        self.rows = sum(record.get("rows", 0) for record in records)
        self.quarantined = [(int(k), v) for record in records for k, v in record.get("quarantined", {}).items()]
        self.stop: Stop | None = None

    @property
    def finished(self) -> bool:
        return len(self.done) == len(self.stage.units)

    @property
    def bad_rows(self) -> dict[int, str]:
        """Return the rows that were not finite, ids ascending, each with the first place where it was not."""
        places: dict[int, str] = {}
        for row, where in sorted(self.quarantined):
            places.setdefault(row, where)
        return places

    @property
    def busy(self) -> list[str]:
        """Return the workers that have something in flight."""
        return [worker for worker, units in self.in_flight.items() if units]

    def handle(self, events: Iterable[Event]) -> list[Instruction]:
        """Return what to do after these events. After a Stop nothing is started any more."""
        instructions: list[Instruction] = []
        for event in events:
            instructions += self._take_in(event)
        self._check_quarantine()
        self._check_stall()
        if self.stop:
            return [*instructions, self.stop]
        return [*instructions, *self._hand_out()]

    def _take_in(self, event: Event) -> list[Instruction]:
        match event:
            case Tick(now):
                self.now = now
            case Ready(worker):
                if worker not in self.gone:
                    self.in_flight.setdefault(worker, [])
            case Done(worker, receipt):
                return self._take_in_done(worker, receipt)
            case Failed():
                self._take_in_failure(event)
            case Taken(worker, key):
                unit = self._remove(worker, key)
                if unit is not None:
                    self.elsewhere[key] = unit
            case Elsewhere(key, record):
                self._take_in_elsewhere(self.elsewhere.pop(key), record)
            case Lost(worker):
                if worker not in self.gone:
                    self._take_in_loss(event)
                    return [Replace(worker)]
        return []

    def _take_in_done(self, worker: str, receipt: Receipt) -> list[Instruction]:
        """Only the worker that holds a unit can finish it: a late answer of a lost one changes nothing."""
        unit = self._remove(worker, receipt.unit)
        if unit is None:
            return []
        self.deaths_in_a_row = 0
        self.last_done = self.now
        seconds = self.seconds.pop(unit.key, 0.0) + receipt.seconds
        if receipt.unfinished:
            self.seconds[unit.key] = seconds
            self.attempts.pop(unit.key, None)  # it gets on: only what fails without getting on is given up
            self.kills.pop(unit.key, None)
            self.queue.appendleft(unit)
            return []
        self.done.add(receipt.unit)
        self.done_here += 1
        self.rows += receipt.rows
        self.quarantined += receipt.quarantined.items()
        return [Commit(replace(receipt, seconds=seconds))]

    def _take_in_elsewhere(self, unit: Unit, record: Mapping[str, Any] | None) -> None:
        if record is None:
            self.queue.appendleft(unit)
            return
        self.done.add(unit.key)
        self.done_elsewhere += 1
        self.last_done = self.now
        self.rows += record.get("rows", 0)
        self.quarantined += [(int(k), v) for k, v in record.get("quarantined", {}).items()]

    def _take_in_failure(self, failure: Failed) -> None:
        unit = self._remove(failure.worker, failure.unit)
        if unit is None:
            return
        attempts = self.attempts[unit.key] = self.attempts.get(unit.key, 0) + 1
        if failure.kind == "mistake":
            self._give_up(
                f"{failure.error} (Unit {unit.label()}.) {self._progress()}; mend it and run again to resume."
            )
        elif failure.kind == "bug":
            self._give_up(
                f"unit {unit.label()} failed on {failure.worker}: {failure.error}. This is no storage error, so it is "
                f"not tried again. {self._progress()}; mend it and run again to resume.",
                failure.detail,
            )
        elif attempts >= self.limits.attempts:
            self._give_up(
                f"unit {unit.label()} failed {attempts} times, last on {failure.worker}: {failure.error.rstrip('.')}. "
                f"{self._progress()}; run again to resume."
            )
        else:
            self.retries += 1
            self.queue.append(unit)  # last in line, which leaves an overloaded store some time

    def _take_in_loss(self, loss: Lost) -> None:
        """Put the worker's units back in front, in order; blame the one that was running."""
        units = self.in_flight.pop(loss.worker, [])
        self.gone.add(loss.worker)
        self.retries += len(units)
        if not units or loss.with_node:
            self.queue.extendleft(reversed(units))
            return
        running, *waiting = units
        kills = self.kills[running.key] = self.kills.get(running.key, 0) + 1
        self.deaths_in_a_row += 1
        if kills + 1 < self.limits.kills:
            waiting = units
        else:  # one more and it is poison: the others first, which tells it from a cluster that is going down
            self.queue.append(running)
        self.queue.extendleft(reversed(waiting))
        if kills >= self.limits.kills and self.done_here:
            self._give_up(
                f"unit {running.label()} took down {kills} workers while other units succeed, last {loss.worker}: "
                f"{loss.reason}. Look at its rows and at the worker's memory. {self._progress()}; run again to resume."
            )
        elif self.deaths_in_a_row >= 3 * max(self.limits.kills, self.expected_workers):
            self._give_up(
                f"{self.deaths_in_a_row} workers died in a row with no unit done between them, last {loss.worker} at "
                f"unit {running.label()}: {loss.reason}. Look at the workers' memory and logs. "
                f"{self._progress()}; run again to resume."
            )

    def _hand_out(self) -> list[Instruction]:
        """Give each worker one unit, then a second; the last ones singly, so that none waits behind another."""
        instructions: list[Instruction] = []
        while self.queue and self.in_flight:
            tail = len(self.queue) <= max(len(self.in_flight), self.expected_workers)
            worker = min(self.in_flight, key=lambda name: len(self.in_flight[name]))
            if len(self.in_flight[worker]) >= (1 if tail else self.limits.in_flight):
                break
            unit = self.queue.popleft()
            self.in_flight[worker].append(unit)
            instructions.append(Run(worker, unit))
        return instructions

    def _check_quarantine(self) -> None:
        """Stop when more rows are bad than the whole stage may have; its rows are extrapolated from the units done."""
        if not self.done:
            return
        expected_rows = self.rows / len(self.done) * len(self.stage.units)
        bad = len(self.quarantined)
        if bad > self.limits.max_bad_fraction * expected_rows:
            rows = self.bad_rows
            shown = "; ".join(f"id {row}: {where}" for row, where in list(rows.items())[:5])
            more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
            self._give_up(
                f"{bad} of {self.rows} rows are not finite: {shown}{more}. cluster.max_bad_fraction="
                f"{self.limits.max_bad_fraction} of the stage is allowed. Look at these rows, leave them out or "
                f"raise it. {self._progress()}; run again to resume."
            )

    def _check_stall(self) -> None:
        waited = self.now - self.last_done
        if not self.finished and waited > self.limits.stall_seconds:
            held = "; ".join(f"{worker}: {units[0].label()}" for worker, units in self.in_flight.items() if units)
            others = f", {len(self.elsewhere)} units are with other drivers" if self.elsewhere else ""
            self._give_up(
                f"no unit was done for {waited / 60:.0f} minutes (allowed are {self.limits.stall_seconds / 60:.0f}). "
                f"Running: {held or 'nothing'}{others}. {self._progress()}; run again to resume."
            )

    def _remove(self, worker: str, key: str) -> Unit | None:
        """Return the unit that this worker had in flight, now no longer; None if it had not."""
        units = self.in_flight.get(worker, [])
        for position, unit in enumerate(units):
            if unit.key == key:
                return units.pop(position)
        return None

    def _give_up(self, message: str, detail: str = "") -> None:
        self.stop = self.stop or Stop(f"stage {self.stage.name}: {message}", detail)

    def _progress(self) -> str:
        return f"{len(self.done)} of {len(self.stage.units)} are done"
