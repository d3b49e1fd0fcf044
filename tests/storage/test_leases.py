"""Several drivers at one run: who is alive, who has which unit, whose turn it is. No test waits for a real clock."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from storage.journal import Journal
from storage.leases import Claim, Drivers, LeaseLost, RunBusy, RunLease, UnitClaims
from storage.locations import Location, to_json

NOBODY = 2**22 + 1  # above the largest process number that Linux gives


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


def abandoned(run: Location, clock: Clock, **fields: Any) -> RunLease:
    """A driver that died without a word, while it was another host's unless told otherwise."""
    first = lease(run, clock, "first", **{"host": "elsewhere"} | fields)
    first.__enter__()
    first._stop.set()
    return first


def claims(held: RunLease) -> UnitClaims:
    return UnitClaims(held, Journal(held.run, "collect"))


def test_drivers_work_side_by_side_and_leave_by_themselves(place: Location, clock: Clock) -> None:
    with lease(place, clock, "first") as first, lease(place, clock) as second:
        assert (first.number, second.number) == (0, 1)
        assert Drivers(place, clock).living() == [0, 1]
        first.check()
        second.check()
    assert Drivers(place, clock).living() == []
    assert [place.read_json(f"journal/run/lease.{n}")["released"] for n in (0, 1)] == [True, True]
    with pytest.raises(KeyError), lease(place, clock) as third:
        raise KeyError
    assert third.number == 2
    assert clock.now == 0


def test_two_that_come_at_once_have_numbers_of_their_own(
    run: Location, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lease(run, clock, "first") as first:
        monkeypatch.setattr("storage.leases._numbers", lambda run: [])  # as it was before the first came
        with lease(run, clock) as second:
            assert (first.number, second.number) == (0, 1)


def test_a_unit_is_with_one_driver(place: Location, clock: Clock) -> None:
    with lease(place, clock, "first") as first, lease(place, clock) as second:
        ours, theirs = claims(first), claims(second)
        assert ours.take("a")
        assert ours.take("a"), "again, after a failure"
        assert not theirs.take("a")
        assert theirs.take("b")
        assert theirs.look(["a"]) == ({}, [])
        first_journal = Journal(place, "collect")
        first_journal.commit("a", {"rows": 3})
        assert theirs.look(["a"]) == ({"a": {"rows": 3}}, [])
        assert not theirs.take("a")
        assert not claims(second).take("a"), "not even by a driver that comes later"


def test_what_a_driver_that_left_had_is_free_unless_it_is_done(run: Location, clock: Clock) -> None:
    with lease(run, clock) as second:
        late = claims(second)
        with lease(run, clock, "first") as first:
            for unit in ("a", "b"):
                assert claims(first).take(unit)
            assert not late.take("a")
            late.look(["a", "b"])
            Journal(run, "collect").commit("b", {})
        assert not late.take("b"), "it was done after we last looked"
        assert late.look(["a", "b"]) == ({"b": {}}, ["a"])
        assert late.take("a")


@pytest.mark.parametrize("fields", [{"host": None, "pid": NOBODY}, {"pid": NOBODY}, {}])
def test_a_dead_drivers_units_are_free_after_a_minute_or_at_once(
    run: Location, clock: Clock, fields: dict[str, Any]
) -> None:
    dead = abandoned(run, clock, **fields)
    assert claims(dead).take("a")
    with lease(run, clock) as held:
        others, freed = claims(held), list[str]()
        while not freed:
            _, freed = others.look(["a"])
            if not freed:
                clock.now += 1
                held.beat()
        assert clock.now == (0 if fields.get("host", 1) is None else 60)
        assert others.take("a")
        with pytest.raises(LeaseLost, match="another driver has taken unit a of"):
            Claim("collect", dead.number).check(run, "a")
        Claim("collect", held.number).check(run, "a")
        dead.beat()
        with pytest.raises(LeaseLost, match=r"of first on .* was taken over by second \(process"):
            dead.check()
    assert run.read_json("journal/run/lease.0")["released"] is False


def test_a_driver_found_dead_may_undo_nothing_even_where_nobody_came_yet(run: Location, clock: Clock) -> None:
    dead = abandoned(run, clock, pid=NOBODY)
    for unit in ("a", "b"):
        claims(dead).take(unit)
    with lease(run, clock) as held:
        others = claims(held)
        others.look(["a"])
        clock.now = 60
        held.beat()
        assert others.take("a")
        with pytest.raises(LeaseLost):
            Claim("collect", dead.number).check(run, "b")


def test_a_counter_that_moves_late_keeps_the_units(run: Location, clock: Clock) -> None:
    slow = abandoned(run, clock)
    assert claims(slow).take("a")
    with lease(run, clock) as held:
        others = claims(held)
        for now in (0, 58, 59, 117):
            clock.now = now
            held.beat()
            if now == 58:
                slow.beat()
            assert others.look(["a"]) == ({}, [])
        slow.check()


def test_a_process_number_used_again_is_not_the_driver(run: Location, clock: Clock) -> None:
    first = abandoned(run, clock, host=None)
    content = run.read_json("journal/run/lease.0")
    run.replace("journal/run/lease.0", to_json({**content, "started": 1.0}))
    assert Drivers(run, clock).is_over(first.number)


def test_a_driver_that_cannot_write_for_a_minute_stops(run: Location, clock: Clock) -> None:
    with lease(run, clock) as held:
        clock.now = 59
        held.check()
        held.beat()
        clock.now = 118
        held.check()
        clock.now = 120
        with pytest.raises(LeaseLost, match="could not be rewritten for 60 s"):
            held.check()


def test_a_damaged_unit_is_free_though_its_driver_lives(run: Location, clock: Clock) -> None:
    journal = Journal(run, "collect")
    with lease(run, clock, "first") as first, lease(run, clock) as second:
        assert claims(first).take("a")
        journal.commit("a", {})
        journal.mark_damaged("a", {})
        assert claims(second).take("a")
        assert not claims(first).take("a"), "it is the second's until it is done"
        journal.commit("a", {"anew": True})
        assert claims(first).look(["a"]) == ({"a": {"anew": True}}, [])


def test_one_driver_at_a_time_has_its_turn(run: Location, clock: Clock) -> None:
    order, said = list[str](), list[str]()
    with lease(run, clock, "first") as first, lease(run, clock) as second:
        turn = first.turn("ingest")
        turn.__enter__()

        def leave() -> None:
            if clock.now >= 10:
                order.append("first left")
                turn.__exit__(None, None, None)
                clock.on_sleep = lambda: None

        clock.on_sleep = leave
        with second.turn("ingest", said.append):
            order.append("second")
        with first.turn("ingest", said.append):
            order.append("first again")
    assert order == ["first left", "second", "first again"]
    assert said == ["waiting for another driver: ingest"]


def test_a_dead_drivers_turn_goes_on(run: Location, clock: Clock) -> None:
    dead = abandoned(run, clock)
    turn = dead.turn("ingest")  # held on to, as it ends when it is collected
    turn.__enter__()
    with lease(run, clock) as held:
        clock.on_sleep = held.beat
        with held.turn("ingest"):
            assert 60 <= clock.now <= 62


@pytest.mark.parametrize(("first_alone", "second_alone"), [(True, False), (False, True), (True, True)])
def test_who_wants_a_run_alone_is_alone(place: Location, clock: Clock, first_alone: bool, second_alone: bool) -> None:
    with lease(place, clock, "first", alone=first_alone) as first:
        clock.on_sleep = first.beat
        with (
            pytest.raises(RunBusy, match=rf"worked on by first \(process {os.getpid()} on .*\)\. Wait until it ends"),
            lease(place, clock, alone=second_alone),
        ):
            pass
        assert clock.now < 60
        first.check()
    with lease(place, clock, alone=second_alone):
        pass
    assert Drivers(place, clock).living() == []


def test_a_dead_driver_does_not_keep_another_from_being_alone(run: Location, clock: Clock) -> None:
    abandoned(run, clock)
    second = lease(run, clock, alone=True)
    clock.on_sleep = second.beat
    with second:
        assert 60 <= clock.now <= 64
