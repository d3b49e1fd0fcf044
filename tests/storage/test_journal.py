"""What is done stays done; events are kept in order; no test waits for a real clock."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from storage.journal import EventLog, Journal
from storage.locations import Location


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

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


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
