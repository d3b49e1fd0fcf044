"""What is done stays done; one driver at a time; no test waits for a real clock."""

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from storage.journal import EventLog, Journal, LeaseLost, RunBusy, RunLease
from storage.locations import Location

NOBODY = 2**22 + 1  # above the largest process number that Linux gives


def test_units_are_done_once_committed(place: Location) -> None:
    journal = Journal(place, "collect")
    journal.commit("c0/000000.0/0", {"rows": 3})
    journal.commit("a", {"rows": 4})
    done = Journal(place, "collect").done()
    assert dict(done) == {"a": {"rows": 4}, "c0/000000.0/0": {"rows": 3}}
    assert len(done) == 2
    assert "b" not in done
    assert len(Journal(place, "score").done()) == 0


def test_the_first_commit_and_the_highest_record_count(run: Location) -> None:
    journal = Journal(run, "collect")
    assert journal.commit("a", {"by": 1}) == {"by": 1}
    assert journal.commit("a", {"by": 2}) == {"by": 1}
    assert journal.done()["a"] == {"by": 1}
    for number in (2, 11):
        run.create_json(f"journal/collect/a/done.{number}", {"by": number})
    assert journal.done()["a"] == {"by": 11}, "numbers are compared as numbers"


def test_many_units_cost_one_listing(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(run, "collect")
    for number in range(20):
        journal.commit(f"{number}", {})
    calls: list[str] = []
    for name in ("list", "read", "exists", "open"):
        real: Callable[..., Any] = getattr(Location, name)

        def counted(self: Location, *args: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(Location, name, counted)
    done = journal.done()
    assert [number for number in range(21) if str(number) not in done] == [20]
    assert calls == ["list"]


def test_records_are_read_side_by_side_and_once(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(run, "collect")
    for number in range(20):
        journal.commit(f"{number}", {"rows": number})
    together, reads = threading.Barrier(4, timeout=10), []
    read_json = Location.read_json

    def meeting(self: Location, key: str) -> Any:
        reads.append(key)
        together.wait()  # passed only by four reads at a time
        return read_json(self, key)

    monkeypatch.setattr(Location, "read_json", meeting)
    done = journal.done()
    assert {unit: record["rows"] for unit, record in done.items()} == {str(number): number for number in range(20)}
    assert done["7"] == {"rows": 7}
    assert len(dict(done.items())) == len(reads) == 20


def test_other_files_of_a_unit_are_no_done_records(run: Location) -> None:
    run.create_json("journal/collect/a/lease.0", {})
    run.create_json("journal/collect/solver.0", {})
    assert not Journal(run, "collect").done()


@pytest.mark.parametrize("key", ["../a", "a b", "", "a//b", "/a", "a%2F"])
def test_odd_keys_are_refused(run: Location, key: str) -> None:
    with pytest.raises(ValueError, match="is not allowed: letters, digits"):
        Journal(run, "collect").commit(key, {})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease(run: Location, clock: Clock, driver: str = "second", **fields: Any) -> RunLease:
    return RunLease(run, driver, clock=clock, sleep=clock.sleep, **fields)


def test_a_run_has_one_driver_at_a_time(place: Location, clock: Clock) -> None:
    with lease(place, clock, "first") as first:
        clock.on_sleep = first.beat
        with (
            pytest.raises(RunBusy, match=rf"worked on by first \(process {os.getpid()} on .*\)\. Wait until it ends"),
            lease(place, clock),
        ):
            pass
        assert clock.now < 60
        first.check()
    with lease(place, clock):
        pass
    assert place.list("journal/run") == ["journal/run/lease.0", "journal/run/lease.1"]
    assert [place.read_json(key)["released"] for key in place.list("journal/run")] == [True, True]


def test_the_lease_is_released_after_an_error(run: Location, clock: Clock) -> None:
    with pytest.raises(KeyError), lease(run, clock):
        raise KeyError
    with lease(run, clock):
        pass
    assert clock.now == 0


def abandoned(run: Location, clock: Clock, **fields: Any) -> RunLease:
    """A lease whose driver died without releasing it."""
    first = lease(run, clock, "first", **fields)
    first.__enter__()
    first._stop.set()
    return first


def test_a_dead_process_of_this_host_frees_it_at_once(run: Location, clock: Clock) -> None:
    abandoned(run, clock, pid=NOBODY)
    with lease(run, clock):
        assert clock.now == 0


def test_a_process_number_used_again_is_not_the_holder(run: Location, clock: Clock) -> None:
    abandoned(run, clock)
    content = run.read_json("journal/run/lease.0")
    run.replace(
        "journal/run/lease.0", str({**content, "started": 1.0}).replace("'", '"').replace("False", "false").encode()
    )
    with lease(run, clock):
        assert clock.now == 0


@pytest.mark.parametrize("fields", [{"host": "elsewhere", "pid": NOBODY}, {}])
def test_a_counter_that_stands_still_for_a_minute_frees_it(run: Location, clock: Clock, fields: dict[str, Any]) -> None:
    abandoned(run, clock, **fields)
    with lease(run, clock):
        assert 60 <= clock.now <= 64


def test_a_counter_that_moves_late_keeps_it(run: Location, clock: Clock) -> None:
    first = abandoned(run, clock, host="elsewhere")
    clock.on_sleep = lambda: first.beat() if clock.now == 58 else None
    with pytest.raises(RunBusy, match="on elsewhere"), lease(run, clock):
        pass


def test_a_holder_that_was_taken_over_stops(run: Location, clock: Clock) -> None:
    first = abandoned(run, clock, host="elsewhere")
    with lease(run, clock):
        before = run.read("journal/run/lease.0")
        first.beat()
        with pytest.raises(LeaseLost, match=r"of first on .* was taken over by second \(process"):
            first.check()
        assert run.read("journal/run/lease.0") == before
    first.__exit__(None, None, None)
    assert run.read_json("journal/run/lease.0")["released"] is False


def test_a_holder_that_cannot_write_for_a_minute_stops(run: Location, clock: Clock) -> None:
    with lease(run, clock) as held:
        clock.now = 59
        held.check()
        held.beat()
        clock.now = 118
        held.check()
        clock.now = 120
        with pytest.raises(LeaseLost, match="could not be rewritten for 60 s"):
            held.check()


def test_two_who_find_it_free_cannot_both_have_it(run: Location, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    second = lease(run, clock)
    highest = second._highest()
    with lease(run, clock, "first"):
        monkeypatch.setattr(second, "_highest", lambda: highest)
        with pytest.raises(RunBusy, match="worked on by first"):
            second.__enter__()


def written(run: Location) -> list[dict[str, Any]]:
    return [json.loads(line) for key in run.list("events") for line in run.read(key).splitlines()]


def test_events_are_kept_in_order_over_restarts(place: Location, clock: Clock) -> None:
    with EventLog(place, "node-1", every=2, clock=clock, now=lambda: 5.0) as events:
        events.write("lost", worker="w0")
        assert place.list("events") == []
        events.write("failed", unit="a")
        events.write("done")
    with EventLog(place, "node-1", clock=clock, now=lambda: 6.0) as events:
        events.write("again")
    assert place.list("events") == [f"events/node-1.{n:06d}.jsonl" for n in range(3)]
    assert written(place) == [
        {"kind": "lost", "time": 5.0, "worker": "w0"},
        {"kind": "failed", "time": 5.0, "unit": "a"},
        {"kind": "done", "time": 5.0},
        {"kind": "again", "time": 6.0},
    ]


def test_events_do_not_wait_for_a_full_buffer(run: Location, clock: Clock) -> None:
    events = EventLog(run, "host.domain", clock=clock)
    events.write("a")
    clock.now = 10
    events.write("b")
    assert [event["kind"] for event in written(run)] == ["a", "b"]
    events.close()
    assert len(run.list("events")) == 1
