import io

import pytest
from rich.console import Console

from actors.progress import StageProgress, StageReport, duration, size, status_line
from actors.units import Receipt


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(terminal: bool, finished: bool = True) -> str:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    progress = StageProgress(console, clock)
    progress.begin("collect", 40, done=10)
    for _ in range(30):
        clock.now += 1.0
        progress.advance(Receipt("u", rows=100))
    progress.note("unit u3 failed on worker-0: OSError: [Errno 5]")
    report = StageReport("collect", 40, 10, 3000, 60_000, 3 * 2**20, 30.0, 2**30, 1, quarantined=(7, 9))
    progress.end(report, finished)
    return out.getvalue()


def test_plain_output_has_a_line_every_few_seconds() -> None:
    lines = [line for line in shown(terminal=False).splitlines() if "rows/s, " in line]
    assert len(lines) == 6
    assert lines[0] == "collect: 15/40 units, 100 rows/s, 25 s left"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_closing_table_stands_at_the_end(terminal: bool) -> None:
    text = shown(terminal)
    for part in ("[Errno 5]", "3,000 (100/s)", "60,000 (2,000/s)", "3.0 MiB", "1.0 GiB a worker", "2 (ids 7, 9)"):
        assert part in text
    assert "stopped" not in text


def test_a_stopped_stage_says_how_to_go_on() -> None:
    assert "collect: stopped with 40 of 40 units done; run again to resume." in shown(terminal=False, finished=False)


def test_rate_and_time_left_come_from_this_run_alone() -> None:
    assert status_line(10, 40, 0, 0, 5.0) == "10/40 units"
    assert status_line(20, 40, 10, 1000, 100.0) == "20/40 units, 10 rows/s, 3 min left"


def test_durations_and_sizes() -> None:
    assert [duration(s) for s in (0.25, 42, 600, 7500)] == ["0.2 s", "42 s", "10 min", "2 h 05 min"]
    assert [size(b) for b in (0, 1023, 1536, 2**31, 2**40)] == ["0 B", "1023 B", "1.5 KiB", "2.0 GiB", "1.0 TiB"]
