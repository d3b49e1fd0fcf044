"""Marks of damage: a unit is done until it is found damaged, and again once it was made anew."""

import threading
from collections.abc import Callable

import pytest

from storage.damage import DamagedObject, check_object, in_parallel, mark_damaged, noting_damage, read_checked
from storage.journal import Journal
from storage.locations import Location, ObjectRecord


def test_a_damaged_unit_is_not_done_until_it_is_made_anew(place: Location) -> None:
    journal = Journal(place, "collect")
    for number in range(3):
        journal.commit("a", {"made": number})
        assert journal.record("a") == {"made": number}
        assert journal.commit("a", {"made": -1}) == {"made": number}, "the first one counts"
        assert mark_damaged(place, "collect", "a", ["x is missing"])
        assert not mark_damaged(place, "collect", "a", ["x is altered"]), "known already"
        assert (list(journal.done()), journal.damaged(), journal.record("a")) == ([], ["a"], None)
        assert journal.before("a") == {"made": number}
    assert place.list("journal/collect/a") == [
        f"journal/collect/a/{kind}.{n}" for kind in ("damaged", "done") for n in range(3)
    ]


def test_a_unit_that_no_record_named(run: Location) -> None:
    mark_damaged(run, "ingest-train", "000000.0", ["cut"])
    journal = Journal(run, "ingest-train")
    assert journal.damaged() == ["000000.0"]
    journal.commit("000000.0", {"objects": []})
    assert (journal.damaged(), list(journal.done())) == ([], ["000000.0"])


def test_blocks_of_a_shard_are_made_anew_with_it(run: Location) -> None:
    for unit in ("c-train-000000.0-000000000", "d-train-000000.0-000000000", "c-train-000000.0-000000016"):
        Journal(run, "compute-label").commit(unit, {})
    Journal(run, "score-label").commit("train-000000.0-000000000", {})
    mark_damaged(run, "score-label", "train-000000.0-000000000", ["cut"])
    assert list(Journal(run, "compute-label").done()) == ["c-train-000000.0-000000016"]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: run.delete("x"), "is missing"),
        (lambda run: run.replace("x", b"abc"), "has 3 of 4 bytes"),
        (lambda run: run.replace("x", b"abcde"), "is 5 bytes, was 4"),
        (lambda run: run.replace("x", b"abce"), "is altered"),
    ],
)
def test_what_is_wrong_is_said(place: Location, harm: Callable[[Location], None], said: str) -> None:
    place.create("x", b"abcd")
    record = ObjectRecord.of("x", b"abcd")
    Journal(place, "s").commit("u", {"objects": [vars(record)]})
    assert check_object(place, record) is None
    assert read_checked(place, "s", "u", "x") == b"abcd"
    harm(place)
    assert said in str(check_object(place, record))
    again = f"{said}.* It is of unit u of stage s. Run the job of .* again"
    with pytest.raises(DamagedObject, match=again), noting_damage(Location.parse("/another/run")):
        read_checked(place, "s", "u", "x")
    assert Journal(place, "s").damaged() == [], "it is left to the job of the run that has it"
    with pytest.raises(DamagedObject, match=again), noting_damage(place):
        read_checked(place, "s", "u", "x")
    assert Journal(place, "s").damaged() == ["u"]
    with pytest.raises(DamagedObject, match="was found damaged"):
        read_checked(place, "s", "u", "x")


def test_few_tasks_are_begun_ahead_and_their_order_stays() -> None:
    begun, most = [0], [0]
    lock = threading.Lock()

    def task(number: int) -> int:
        with lock:
            begun[0] += 1
        return number

    given = 0
    for number in in_parallel((lambda n=n: task(n) for n in range(50)), 3):
        assert number == given
        most[0] = max(most[0], begun[0] - given)
        given += 1
    assert given == 50
    assert most[0] <= 6
