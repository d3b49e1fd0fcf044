import io

import pytest
from rich.console import Console

from actors.progress import StageProgress, StageReport, duration, report_table, size, status_line
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
    report = StageReport(
        "collect", 40, 10, 3000, 60_000, 3 * 2**20, 30.0, 2**30, 1, quarantined={7: "the loss", 9: "a"}
    )
    progress.end(report, finished)
    return out.getvalue()


def test_plain_output_has_a_line_every_few_seconds() -> None:
    lines = [line for line in shown(terminal=False).splitlines() if "rows/s, " in line]
    assert len(lines) == 6
    assert lines[0] == "collect: 15/40 units, 100 rows/s, 25 s left"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_finished_stage_says_so(terminal: bool) -> None:
    text = shown(terminal)
    assert "[Errno 5]" in text
    assert "collect: done, 3,000 rows in 30 s" in text
    assert "stopped" not in text


def test_the_closing_table_has_a_line_a_stage() -> None:
    reports = [
        StageReport("collect", 40, 10, 3000, 60_000, 3 * 2**20, 30.0, 2**30, 1, quarantined={7: "the loss", 9: "a"}),
        StageReport("score", 4, 0),
    ]
    lines = printed(reports).splitlines()
    (collect,) = (line for line in lines if line.startswith("collect"))
    assert collect.split() == ["collect", "30/40", "30", "s", "3,000", "100", "2,000", "3.0", "MiB", "1.0", "GiB"]
    assert any(line.startswith("score ") for line in lines)
    assert lines[-2].startswith("units started again: 1 of collect")
    assert lines[-1].startswith("2 rows set aside, not finite: id 7: the loss; id 9: a")


def test_the_closing_table_fits_eighty_columns() -> None:
    long = {"rows": 9_999_999, "tokens": 10**9, "bytes": 10**9, "seconds": 9000.0, "peak_memory": 2**34}
    reports = [
        StageReport(f"{kind}-gradient-cosine-validation-3f29a1", 999, skip, **long)
        for kind, skip in (("collect", 444), ("prepare", 0), ("compute", 0), ("score", 0))
    ]
    text = printed(reports, width=80)
    assert "…" not in text
    assert len(text.splitlines()) == 5
    assert "999" in text.splitlines()[-1]


def printed(reports: list[StageReport], width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(report_table(reports))
    return out.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert len([line for line in shown(terminal=True).splitlines() if "rows/s, " in line]) == 6


def test_a_stopped_stage_says_how_to_go_on() -> None:
    assert "collect: stopped with 40 of 40 units done; run again to resume." in shown(terminal=False, finished=False)


def test_rate_and_time_left_come_from_this_run_alone() -> None:
    assert status_line(10, 40, 0, 0, 5.0) == "10/40 units"
    assert status_line(20, 40, 10, 1000, 100.0) == "20/40 units, 10 rows/s, 3 min left"


def test_durations_and_sizes() -> None:
    assert [duration(s) for s in (0.25, 42, 600, 7500)] == ["0.2 s", "42 s", "10 min", "2 h 05 min"]
    assert [size(b) for b in (0, 1023, 1536, 2**31, 2**40)] == ["0 B", "1023 B", "1.5 KiB", "2.0 GiB", "1.0 TiB"]
