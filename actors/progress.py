"""What a person sees of a running stage: a bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from actors.units import Receipt


@dataclass(frozen=True)
class StageReport:
    """What a stage did. Rows, tokens, bytes and seconds are those of this run, quarantined rows those of the stage."""

    stage: str
    units: int  # in the stage
    skipped: int  # of them done by an earlier run or by another driver
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0  # wall clock
    peak_memory: int = 0  # of the largest worker, in bytes
    retries: int = 0  # units that were started again
    quarantined: dict[int, str] = field(default_factory=dict)  # id, and where it was not finite


class StageProgress:
    """Shows one stage after another on a console."""

    def __init__(
        self,
        console: Console | None = None,  # None: standard error
        clock: Callable[[], float] = time.monotonic,
        every: float = 5.0,  # seconds between plain lines
        listen: Callable[[str, str, Receipt | None], None] = lambda what, stage, receipt: None,  # begin, unit, end
    ) -> None:
        self.console = console or Console(stderr=True, width=None if sys.stderr.isatty() else 140)
        self.clock = clock
        self.every = every
        self.listen = listen
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @property
    def done(self) -> int:
        """Return how many units of the stage are done, by whomever."""
        return self._done

    def begin(self, stage: str, units: int, done: int) -> None:
        """Start a stage of so many units, of which some were done before."""
        self._stage, self._units, self._done, self._skipped, self._rows = stage, units, done, done, 0
        self._began = self._spoke = self.clock()
        self.listen("begin", stage, None)
        if self.console.is_terminal and not self.console.is_dumb_terminal:  # a dumb one moves no cursor
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(stage, total=units, completed=done, status=self._status())
            self._bar.start()
        else:
            self._say(f"{stage}: {units} units" + (f", {done} of them done before" if done else ""))

    def skip(self, rows: int) -> None:
        """Count one unit that another driver has finished."""
        self._skipped += 1
        self._count(rows)

    def advance(self, receipt: Receipt) -> None:
        """Count one finished unit."""
        self.listen("unit", self._stage, receipt)
        self._count(receipt.rows)

    def _count(self, rows: int) -> None:
        self._done += 1
        self._rows += rows
        if self._bar:
            self._bar.update(self._task, completed=self._done, status=self._status())
        elif self.clock() - self._spoke >= self.every:
            self._spoke = self.clock()
            self._say(f"{self._stage}: {self._status()}")

    def note(self, text: str) -> None:
        """Show a line that must not be missed: a failure, a lost worker."""
        self._say(f"{self._stage}: {text}")

    def end(self, report: StageReport, finished: bool) -> None:
        """Close the stage and show what this run did; `finished` is false when it stopped or was interrupted."""
        self.listen("end", report.stage, None)
        if self._bar:
            self._bar.stop()
            self._bar = None
        if finished:
            self._say(f"{self._stage}: done, {self._rows:,} rows in {duration(report.seconds)}")
        else:
            self._say(f"{self._stage}: stopped with {self._done} of {self._units} units done; run again to resume.")

    def _status(self) -> str:
        elapsed = self.clock() - self._began
        return status_line(self._done, self._units, self._done - self._skipped, self._rows, elapsed)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def status_line(done: int, units: int, done_here: int, rows: int, elapsed: float) -> str:
    """Return `40/96 units, 312 rows/s, 3 min left`; rate and time left once a unit was done in this run."""
    counted = f"{done}/{units} units"
    if not done_here or elapsed <= 0:
        return counted
    left = (units - done) * elapsed / done_here
    return f"{counted}, {rows / elapsed:,.0f} rows/s, {duration(left)} left"


def report_table(reports: list[StageReport]) -> Group:
    """Return the closing table of a job, one line a stage, at most 80 columns wide; below it what went wrong, if anything did.

    A stage stands under the first word of its name; `units` are those of this run, of all where an earlier one did some.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("stage", "units", "time", "rows", "rows/s", "tokens/s", "written", "memory"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for report in reports:
        per_second = 1 / report.seconds if report.seconds > 0 else 0.0
        here = f"{report.units - report.skipped}/" if report.skipped else ""
        table.add_row(
            kind(report), f"{here}{report.units}", duration(report.seconds), f"{report.rows:,}",
            f"{report.rows * per_second:,.0f}", f"{report.tokens * per_second:,.0f}", size(report.bytes),
            size(report.peak_memory),
        )  # fmt: skip
    notes = []
    if any(report.retries for report in reports):
        again = ", ".join(f"{report.retries} of {kind(report)}" for report in reports if report.retries)
        notes.append(f"units started again: {again}")
    bad: dict[int, str] = {}
    for report in reversed(reports):  # what the first stage that met a row says of it
        bad |= report.quarantined
    if bad:
        notes.append(f"{len(bad)} rows set aside, not finite: {quarantined_text(bad)}")
    return Group(table, *map(Text, notes))


def kind(report: StageReport) -> str:
    """Return what a stage does, without the label or set that it does it for: `score`."""
    return report.stage.partition("-")[0]


def quarantined_text(rows: Mapping[int, str]) -> str:
    """Return the first ten rows that were set aside, each with where it was not finite, and how many more there are."""
    more = f"; and {len(rows) - 10} more" if len(rows) > 10 else ""
    return "; ".join(f"id {row}: {rows[row]}" for row in sorted(rows)[:10]) + more


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min` or `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return bytes in binary units, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
