from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_workers import MemoryJournal, ToyWorker, toy_stage

from actors.pool import InProcessPool
from actors.progress import StageProgress
from actors.run_stage import StageStopped, run_stage
from actors.schedule import Event, Limits
from actors.units import Stage, Unit


class Sink:
    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def write(self, kind: str, **fields: Any) -> None:
        self.written.append({"kind": kind, **fields})


def keys(stage: Stage) -> list[str]:
    return [unit.key for unit in stage.units]


def test_every_unit_is_committed_and_counted(tmp_path: Path) -> None:
    stage, journal = toy_stage("double", tmp_path), MemoryJournal()
    report = run_stage(InProcessPool(ToyWorker, 2), stage, journal)
    assert sorted(journal.records) == keys(stage)
    assert journal.records["u3"]["objects"][0]["value"] == 6
    assert (report.units, report.skipped, report.rows, report.tokens, report.bytes) == (6, 0, 60, 180, 2400)
    assert report.peak_memory == 1000


def test_done_units_are_skipped(tmp_path: Path) -> None:
    stage, journal = toy_stage("double", tmp_path), MemoryJournal()
    journal.records = {"u0": {"rows": 10}, "u5": {"rows": 10}, "x": {}}
    report = run_stage(InProcessPool(ToyWorker), stage, journal)
    assert (report.skipped, report.rows) == (2, 40)
    assert run_stage(InProcessPool(ToyWorker), stage, journal).skipped == 6


def test_storage_errors_and_lost_workers_are_got_over_and_written_down(tmp_path: Path) -> None:
    for function, payload, kind in (("fail_at_first", "failures", "failed"), ("exit_at_first", "deaths", "lost")):
        folder = tmp_path / function
        folder.mkdir()
        stage, journal, sink = toy_stage(function, folder, **{payload: 2}), MemoryJournal(), Sink()
        report = run_stage(InProcessPool(ToyWorker, 2), stage, journal, events=sink)
        assert sorted(journal.records) == keys(stage)
        assert report.retries >= 2
        assert [event["kind"] for event in sink.written] == [kind, kind]
        assert all(event["stage"] == "toy" for event in sink.written)


def test_three_storage_errors_stop_the_stage_and_a_rerun_resumes(tmp_path: Path) -> None:
    stage, journal = toy_stage("fail_at_first", tmp_path, failures=3), MemoryJournal()
    pool = InProcessPool(ToyWorker, 2)
    with pytest.raises(
        StageStopped, match=r"unit u1 failed 3 times, .*OSError: SlowDown\. \d of 6 are done; run again"
    ):
        run_stage(pool, stage, journal)
    run_stage(pool, stage, journal)
    assert sorted(journal.records) == keys(stage)


def test_a_bug_stops_at_once_with_its_traceback(tmp_path: Path) -> None:
    stage, journal = toy_stage("break_down", tmp_path), MemoryJournal()
    with pytest.raises(StageStopped, match=r"KeyError: 'no such module'") as stopped:
        run_stage(InProcessPool(ToyWorker), stage, journal)
    assert "toy_workers.py" in stopped.value.detail
    assert journal.records == {}


def test_a_poison_unit_is_named(tmp_path: Path) -> None:
    stage = toy_stage("exit_at_first", tmp_path, deaths=99)
    journal = MemoryJournal()
    with pytest.raises(StageStopped, match="unit u1 took down 3 workers while other units succeed"):
        run_stage(InProcessPool(ToyWorker, 2), stage, journal)
    assert "u1" not in journal.records


class InterruptedPool(InProcessPool):
    def wait(self, timeout: float) -> list[Event]:
        events = super().wait(timeout)
        if self.waits == 0:
            raise KeyboardInterrupt
        self.waits -= 1
        return events

    waits = 4


def test_ctrl_c_leaves_nothing_in_flight_and_the_next_stage_starts_clean(tmp_path: Path) -> None:
    pool, journal, out = InterruptedPool(ToyWorker), MemoryJournal(), io.StringIO()
    progress = StageProgress(Console(file=out))
    with pytest.raises(KeyboardInterrupt):
        run_stage(pool, toy_stage("double", tmp_path), journal, progress)
    assert 0 < len(journal.records) < 6
    assert f"stopped with {len(journal.records)} of 6 units done; run again to resume" in out.getvalue()
    pool.waits = 99
    other = MemoryJournal()
    run_stage(pool, Stage("other", "double", {"factor": 3}, [Unit(f"u{n}", {"value": n}) for n in range(6)]), other)
    assert [other.records[f"u{n}"]["objects"][0]["value"] for n in range(6)] == [0, 3, 6, 9, 12, 15]


class SilentPool(InProcessPool):
    def wait(self, timeout: float) -> list[Event]:
        return []


def test_a_silent_pool_stops_by_the_clock(tmp_path: Path) -> None:
    clock = iter(range(0, 100_000, 600))
    with pytest.raises(StageStopped, match="no unit was done for"):
        run_stage(SilentPool(ToyWorker), toy_stage("double", tmp_path), MemoryJournal(), clock=lambda: next(clock))


def test_too_many_bad_rows_stop_also_on_a_rerun(tmp_path: Path) -> None:
    journal = MemoryJournal()
    journal.records = {f"u{n}": {"rows": 10, "quarantined": {"2": "the loss"} if n == 2 else {}} for n in range(6)}
    stage, pool = toy_stage("double", tmp_path), InProcessPool(ToyWorker)
    with pytest.raises(StageStopped, match="1 of 60 rows are not finite: id 2: the loss"):
        run_stage(pool, stage, journal)
    assert run_stage(pool, stage, journal, limits=Limits(max_bad_fraction=0.02)).quarantined == {2: "the loss"}


class Shared:
    """The claims of one of two drivers: some units are the other's, who finishes them or leaves."""

    def __init__(self, others: dict[str, bool]) -> None:
        self.others = others  # unit, and whether it is finished there
        self.looked = 0

    def take(self, unit_key: str) -> bool:
        return unit_key not in self.others

    def look(self, units: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        self.looked += 1
        if self.looked == 1:
            return {}, []  # the other one is still at it
        asked = list(units)
        done = {unit: {"rows": 10} for unit in asked if self.others[unit]}
        free = [unit for unit in asked if not self.others.pop(unit)]
        return done, free


def test_units_of_another_driver_are_waited_for_and_taken_if_it_leaves(tmp_path: Path) -> None:
    stage, journal = toy_stage("double", tmp_path), MemoryJournal()
    claims, slept = Shared({"u0": True, "u3": False, "u5": True}), list[float]()
    out = io.StringIO()
    progress = StageProgress(Console(file=out, width=200))
    pool = InProcessPool(ToyWorker, 2)
    report = run_stage(pool, stage, journal, progress, claims=claims, sleep=slept.append)
    assert sorted(journal.records) == ["u1", "u2", "u3", "u4"]
    assert (report.units, report.skipped, report.rows) == (6, 2, 40)
    assert slept, "it sleeps while the rest is with others"
    assert "toy: done, 60 rows" in out.getvalue()


def test_a_stage_that_another_driver_never_ends_stops(tmp_path: Path) -> None:
    slept = [0.0]
    with pytest.raises(StageStopped, match="Running: nothing, 1 units are with other drivers"):
        run_stage(
            InProcessPool(ToyWorker), toy_stage("double", tmp_path), MemoryJournal(), clock=lambda: sum(slept),
            poll_seconds=100.0, claims=Forever(), sleep=slept.append,
        )  # fmt: skip


class Forever:
    def take(self, unit_key: str) -> bool:
        return unit_key != "u0"

    def look(self, units: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        return {}, []
