"""The loop that runs a stage: events from the pool, through the schedule, to the journal. Every stage is this loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from actors.pool import Pool
from actors.progress import StageProgress, StageReport, quarantined_text
from actors.schedule import (
    Commit,
    Done,
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
    Tick,
)
from actors.units import Receipt, Stage


class Journal(Protocol):
    """The done-records of one stage (storage.journal)."""

    def done(self) -> Mapping[str, Mapping[str, Any]]: ...

    def commit(self, unit_key: str, record: dict[str, Any]) -> Any: ...


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
) -> StageReport:
    """Run every unit that has no done-record yet, and commit each one's receipt once.

    The pool stays open for the next stage. However this ends, nothing of the stage is left in flight: when it stops or
    is interrupted, the workers still at it are replaced. StageStopped: the schedule gave up; OSError: the journal
    could not be read or written; PoolError: workers cannot start. After any of them the same call resumes.
    """
    before = journal.done()
    schedule = Schedule(stage, before, limits or Limits(), clock(), pool.size)
    began, finished = clock(), False
    report = StageReport(stage.name, units=len(stage.units), skipped=len(schedule.done))
    if progress:
        progress.begin(stage.name, len(stage.units), len(schedule.done))
    try:
        news: list[Event] = [Ready(worker) for worker in pool.workers]
        while True:
            write_down(news, stage, progress, events)
            committed = carry_out(schedule.handle([Tick(clock()), *news]), pool, stage, journal, progress)
            for receipt in committed:
                take(receipt)
            report = count(report, committed)
            if schedule.finished:
                break
            news = pool.wait(poll_seconds)
        finished = True
    finally:
        for worker in schedule.busy:
            pool.replace(worker)
        report = replace(
            report,
            seconds=clock() - began,
            retries=schedule.retries,
            quarantined=schedule.bad_rows,
        )
        if progress:
            progress.end(report, finished)
    return report


def carry_out(
    instructions: list[Instruction], pool: Pool, stage: Stage, journal: Journal, progress: StageProgress | None
) -> list[Receipt]:
    """Do as the schedule says and return the receipts committed. Workers get their next unit before the commits.

    StageStopped is raised after everything else, so that what was done is committed.
    """
    receipts = []
    for instruction in sorted(instructions, key=lambda one: isinstance(one, Commit)):
        match instruction:
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
    return receipts


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
