"""The loop that runs a stage: events from the pool, through the schedule, to the journal. Every stage is this loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from actors.pool import Pool
from actors.progress import StageProgress, StageReport, quarantined_text
from actors.schedule import (
    Commit,
    Done,
    Elsewhere,
    Event,
    Failed,
    Instruction,
    Limits,
    Lost,
    Ready,
    Replace,
    Run,
    Schedule,
    Stop,
    Taken,
    Tick,
)
from actors.units import Receipt, Stage

LOOK = 5.0  # seconds between two looks at other drivers' units while there is work here


class Journal(Protocol):
    """The done-records of one stage (storage.journal)."""

    def done(self) -> Mapping[str, Mapping[str, Any]]: ...

    def commit(self, unit_key: str, record: dict[str, Any]) -> Any: ...


class Claims(Protocol):
    """Which units this driver may work on, where several share a run (storage.leases)."""

    def take(self, unit_key: str) -> bool:
        """Take a unit; False if it is done by now or another driver has it."""
        ...

    def look(self, units: Iterable[str]) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
        """Return the done-records of those of these units that are done by now, and which are free again."""
        ...


class AllOurs:
    """The claims of a driver whose stage no other one knows."""

    def take(self, unit_key: str) -> bool:
        return True

    def look(self, units: Iterable[str]) -> tuple[Mapping[str, Mapping[str, Any]], list[str]]:
        return {}, []


class EventSink(Protocol):
    """Where failures and losses are written down (storage.journal)."""

    def write(self, kind: str, **fields: Any) -> Any: ...


class StageStopped(RuntimeError):  # noqa: N818  it is what happened, and may be the user's own doing
    """A stage gave up. `str()` is one message for a person; `detail` the worker's traceback, if one is behind it."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail
        if detail:
            self.add_note(detail)


def run_stage(
    pool: Pool,
    stage: Stage,
    journal: Journal,
    progress: StageProgress | None = None,
    events: EventSink | None = None,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.monotonic,
    poll_seconds: float = 1.0,  # the longest wait for news
    take: Callable[[Receipt], None] = lambda receipt: None,  # sees every receipt committed
    claims: Claims | None = None,  # None: no other driver works on this stage
    sleep: Callable[[float], None] = time.sleep,
) -> StageReport:
    """Run every unit that has no done-record yet, and commit each one's receipt once.

    Units that another driver has are left to it and waited for. The pool stays open for the next stage. However this ends,
    nothing of the stage is left in flight: when it stops or is interrupted, the workers still at it are replaced.
    StageStopped: the schedule gave up; OSError: the journal could not be read or written; PoolError: workers cannot
    start. After any of them the same call resumes.
    """
    claims, before = claims or AllOurs(), journal.done()
    schedule = Schedule(stage, before, limits or Limits(), clock(), pool.size)
    others = _Others(claims, clock, sleep, poll_seconds)
    began, finished = clock(), False
    report = StageReport(stage.name, units=len(stage.units), skipped=len(schedule.done))
    if progress:
        progress.begin(stage.name, len(stage.units), len(schedule.done))
    try:
        news: list[Event] = [Ready(worker) for worker in pool.workers]
        while True:
            write_down(news, stage, progress, events)
            instructions = schedule.handle([Tick(clock()), *news])
            committed, taken = carry_out(instructions, pool, stage, journal, progress, claims)
            for receipt in committed:
                take(receipt)
            report = count(report, committed)
            if schedule.finished:
                break
            news = taken or others.news(schedule, pool)
        finished = True
    finally:
        for worker in schedule.busy:
            pool.replace(worker)
        report = replace(
            report,
            skipped=report.skipped + schedule.done_elsewhere,
            seconds=clock() - began,
            retries=schedule.retries,
            quarantined=schedule.bad_rows,
        )
        if progress:
            progress.end(report, finished)
    return report


class _Others:
    """Waits for news of the pool, and now and then looks at what other drivers have done."""

    def __init__(
        self, claims: Claims, clock: Callable[[], float], sleep: Callable[[float], None], poll_seconds: float
    ) -> None:
        self.claims, self.clock, self.sleep, self.poll_seconds = claims, clock, sleep, poll_seconds
        self._looked = clock()

    def news(self, schedule: Schedule, pool: Pool) -> list[Event]:
        """Return what happened; where nothing runs here and the rest is with others, at every poll."""
        idle = bool(schedule.elsewhere) and not schedule.busy
        if idle:
            self.sleep(self.poll_seconds)
        news = pool.wait(self.poll_seconds)
        if schedule.elsewhere and (idle or self.clock() - self._looked >= LOOK):
            self._looked = self.clock()
            done, free = self.claims.look(schedule.elsewhere)
            news = [
                *news,
                *(Elsewhere(unit, record) for unit, record in done.items()),
                *(Elsewhere(u, None) for u in free),
            ]
        return news


def carry_out(
    instructions: list[Instruction],
    pool: Pool,
    stage: Stage,
    journal: Journal,
    progress: StageProgress | None,
    claims: Claims,
) -> tuple[list[Receipt], list[Event]]:
    """Do as the schedule says; return the receipts committed, and which units another driver had.

    Workers get their next unit before the commits. StageStopped is raised after everything else, so that what was done
    is committed.
    """
    receipts, taken = list[Receipt](), list[Event]()
    for instruction in sorted(instructions, key=lambda one: isinstance(one, Commit)):
        match instruction:
            case Run(worker, unit) if not claims.take(unit.key):
                taken.append(Taken(worker, unit.key))
            case Run(worker, unit):
                pool.submit(worker, stage, unit)
            case Replace(worker):
                pool.replace(worker)
            case Commit(receipt):
                journal.commit(receipt.unit, receipt.record())
                receipts.append(receipt)
                if progress:
                    progress.advance(receipt)
    for instruction in instructions:
        if isinstance(instruction, Stop):
            raise StageStopped(instruction.message, instruction.detail)
    return receipts, taken


def write_down(news: list[Event], stage: Stage, progress: StageProgress | None, events: EventSink | None) -> None:
    """Write failures, losses and rows set aside to the event log and show them; what went well is in the journal."""
    for event in news:
        match event:
            case Failed(worker, unit, error, kind, detail):
                fields: dict[str, Any] = {"unit": unit, "error": error, "error_kind": kind, "detail": detail}
                name, text = "failed", f"unit {unit} failed on {worker}: {error}"
            case Done(worker, receipt) if receipt.quarantined:
                fields = {"unit": receipt.unit, "rows": receipt.record()["quarantined"]}
                name, text = "quarantined", f"set aside, not finite: {quarantined_text(receipt.quarantined)}"
            case Done(worker, receipt) if receipt.unfinished:
                if progress:
                    progress.note(f"unit {receipt.unit}: {receipt.unfinished}")
                continue
            case Elsewhere(unit, record) if record is not None:
                if progress:
                    progress.skip(record.get("rows", 0))
                continue
            case Lost(worker, reason, with_node):
                fields = {"reason": reason, "with_node": with_node}
                name, text = "lost", f"lost {worker}: {reason}"
            case _:
                continue
        if events:
            events.write(name, stage=stage.name, worker=worker, **fields)
        if progress:
            progress.note(text)


def count(report: StageReport, committed: list[Receipt]) -> StageReport:
    """Return the report with these receipts added."""
    for receipt in committed:
        report = replace(
            report,
            rows=report.rows + receipt.rows,
            tokens=report.tokens + receipt.tokens,
            bytes=report.bytes + receipt.bytes,
            peak_memory=max(report.peak_memory, receipt.peak_memory),
        )
    return report
