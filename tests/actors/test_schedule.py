"""The scheduler alone: no pool, no clock, no I/O. The property tests play a cluster with seeded random events."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

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
from actors.units import Receipt, Stage, Unit


def make(units: int, done: dict | None = None, limits: Limits | None = None, workers: int = 1) -> Schedule:
    stage = Stage(
        "collect", "collect", {}, [Unit(f"u{n}", {"start": 10 * n, "stop": 10 * n + 10}) for n in range(units)]
    )
    return Schedule(stage, done or {}, limits or Limits(), now=0.0, expected_workers=workers)


def receipt(key: str, quarantined: tuple[int, ...] = ()) -> Receipt:
    return Receipt(key, rows=10, quarantined=dict.fromkeys(quarantined, "the loss"))


def runs(instructions: list[Instruction]) -> list[tuple[str, str]]:
    return [(one.worker, one.unit.key) for one in instructions if isinstance(one, Run)]


def stop_of(instructions: list[Instruction]) -> Stop:
    assert isinstance(instructions[-1], Stop), instructions
    return instructions[-1]


class Cluster:
    """Plays the pool: does as told, lets things happen in random order, keeps its own books of what is in flight."""

    def __init__(self, schedule: Schedule, workers: int, seed: int) -> None:
        self.schedule = schedule
        self.random = random.Random(seed)
        self.held: dict[str, list[str]] = {f"w{n}": [] for n in range(workers)}
        self.made = workers
        self.committed: list[str] = []
        self.stale: list[Event] = []  # answers that come twice or too late
        self.starting = list(self.held)
        self.failures: dict[str, int] = {}

    def obey(self, instructions: list[Instruction]) -> None:
        for one in instructions:
            match one:
                case Run(worker, unit):
                    assert worker not in self.starting
                    self.held[worker].append(unit.key)
                    assert len(self.held[worker]) <= 2
                case Replace(worker):
                    assert worker not in self.held, "only a lost worker is replaced, and once"
                    self.made += 1
                    self.held[f"w{self.made}"] = []
                    self.starting.append(f"w{self.made}")
                case Commit(receipt_):
                    self.committed.append(receipt_.unit)
                case Stop(message):
                    raise AssertionError(message)

    def happen(self) -> list[Event]:
        """Return one random thing that can happen to a cluster."""
        chance = self.random.random()
        if self.starting and (chance < 0.3 or len(self.starting) == len(self.held)):
            return [Ready(self.starting.pop(self.random.randrange(len(self.starting))))]
        if self.stale and chance < 0.4:
            return [self.random.choice(self.stale)]
        busy = [worker for worker in self.held if self.held[worker] and worker not in self.starting]
        if not busy:
            return [Tick(0.0)]
        worker = self.random.choice(busy)
        key = self.held[worker][0]
        if chance < 0.55:  # the node goes, with answers that were under way
            self.stale += [Done(worker, receipt(key)), Lost(worker, "again"), Failed(worker, key, "late", "bug")]
            del self.held[worker]
            return [Lost(worker, "node went", with_node=True)]
        if chance < 0.65 and self.failures.get(key, 0) < 2:
            self.failures[key] = self.failures.get(key, 0) + 1
            self.held[worker].pop(0)
            return [Failed(worker, key, "OSError: SlowDown", "storage")]
        self.held[worker].pop(0)
        self.stale.append(Done(worker, receipt(key)))
        return [Done(worker, receipt(key))]


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_events_commits_every_unit_exactly_once(seed: int) -> None:
    units, workers = 1 + seed % 23, 1 + seed % 5
    done = {f"u{n}": {"rows": 10} for n in range(0, units, 3)} if seed % 2 else {}
    cluster = Cluster(make(units, done, workers=workers), workers, seed)
    for _ in range(10_000):
        if cluster.schedule.finished:
            break
        cluster.obey(cluster.schedule.handle([event for _ in range(1 + seed % 3) for event in cluster.happen()]))
    assert sorted(cluster.committed + list(done)) == sorted(f"u{n}" for n in range(units))
    assert not any(cluster.held.values())


def test_a_stage_without_missing_units_is_finished_at_once() -> None:
    schedule = make(2, {"u0": {"rows": 10}, "u1": {"rows": 10}, "of another stage": {}})
    assert schedule.handle([Ready("a")]) == []
    assert schedule.finished


def test_every_worker_gets_one_before_any_gets_two_and_units_go_in_order() -> None:
    schedule = make(9, workers=2)
    assert runs(schedule.handle([Ready("a"), Ready("b")])) == [("a", "u0"), ("b", "u1"), ("a", "u2"), ("b", "u3")]
    assert runs(schedule.handle([Done("a", receipt("u0"))])) == [("a", "u4")]


def test_the_last_units_are_handed_out_singly() -> None:
    schedule = make(4, workers=2)
    assert runs(schedule.handle([Ready("a"), Ready("b")])) == [("a", "u0"), ("b", "u1")]
    assert runs(schedule.handle([Done("b", receipt("u1"))])) == [("b", "u2")]


def test_a_unit_that_gets_on_is_handed_out_again_and_never_stalls() -> None:
    schedule = make(1)
    schedule.handle([Ready("a")])
    half = replace(receipt("u0"), seconds=2.0, unfinished="half of it")
    for turn in range(1, 9):
        now = Tick(turn * 1000.0)
        assert schedule.handle([now, Done("a", half)]) == [Run("a", Unit("u0", {"start": 0, "stop": 10}))]
    assert not schedule.done
    assert not schedule.rows
    whole = replace(receipt("u0"), seconds=1.0)
    assert schedule.handle([Done("a", whole)]) == [Commit(replace(whole, seconds=17.0))], "the seconds of all turns"
    assert schedule.finished


def test_a_unit_is_given_up_only_for_what_happens_while_it_does_not_get_on() -> None:
    limits = Limits(attempts=2, kills=2)
    schedule = make(2, {"u1": {"rows": 10}}, limits)
    schedule.handle([Ready("a")])
    half = Done("a", replace(receipt("u0"), unfinished="half of it"))
    for _ in range(4):
        [again] = schedule.handle([Failed("a", "u0", "OSError: SlowDown", "storage")])
        assert isinstance(again, Run)
        [again] = schedule.handle([half])
        assert isinstance(again, Run)
    schedule.handle([Failed("a", "u0", "OSError: SlowDown", "storage")])
    stop_of(schedule.handle([Failed("a", "u0", "OSError: SlowDown", "storage")]))


def test_ready_twice_changes_nothing() -> None:
    schedule = make(9)
    schedule.handle([Ready("a")])
    assert schedule.handle([Ready("a")]) == []


def test_a_lost_worker_is_replaced_and_its_units_run_again_in_order() -> None:
    schedule = make(9)
    assert runs(schedule.handle([Ready("a")])) == [("a", "u0"), ("a", "u1")]
    assert schedule.handle([Lost("a", "gone")]) == [Replace("a")]
    assert runs(schedule.handle([Ready("b")])) == [("b", "u0"), ("b", "u1")]
    assert schedule.retries == 2


def test_late_answers_of_a_lost_worker_are_ignored() -> None:
    schedule = make(9)
    schedule.handle([Ready("a")])
    schedule.handle([Lost("a", "gone"), Ready("b")])
    late = [Done("a", receipt("u0")), Failed("a", "u1", "ValueError: x", "bug"), Lost("a", "gone"), Ready("a")]
    assert schedule.handle(late) == []
    assert isinstance(schedule.handle([Done("b", receipt("u0"))])[0], Commit)
    assert not any(isinstance(one, Commit) for one in schedule.handle([Done("b", receipt("u0"))]))


def test_a_storage_error_is_tried_three_times_then_named() -> None:
    schedule = make(2, {"u0": {"rows": 10}})
    schedule.handle([Ready("a@node-3")])
    failure = Failed("a@node-3", "u1", "OSError: SlowDown", "storage", "Traceback …")
    assert runs(schedule.handle([failure])) == [("a@node-3", "u1")]
    assert runs(schedule.handle([failure])) == [("a@node-3", "u1")]
    stop = stop_of(schedule.handle([failure]))
    assert stop.message == (
        "stage collect: unit u1 (rows 10:20) failed 3 times, last on a@node-3: OSError: SlowDown. "
        "1 of 2 are done; run again to resume."
    )
    assert stop.detail == "", "the events have it"


def test_a_failed_unit_goes_to_the_end_of_the_line() -> None:
    schedule = make(4, limits=Limits(in_flight=1))
    schedule.handle([Ready("a")])
    assert runs(schedule.handle([Failed("a", "u0", "OSError: x", "storage")])) == [("a", "u1")]
    assert [unit.key for unit in schedule.queue] == ["u2", "u3", "u0"]


def test_a_bug_stops_at_once_and_nothing_more_is_started() -> None:
    schedule = make(9)
    schedule.handle([Ready("a"), Ready("b")])
    bug = Failed("a", "u0", "KeyError: 'rows'", "bug", "Traceback …")
    instructions = schedule.handle([bug, Done("b", receipt("u1"))])
    assert [type(one) for one in instructions] == [Commit, Stop], "what is done is still committed"
    assert "KeyError: 'rows'" in stop_of(instructions).message
    assert stop_of(instructions).detail == "Traceback …"


def test_a_mistake_stops_at_once_with_its_message_alone() -> None:
    schedule = make(9)
    schedule.handle([Ready("a")])
    stop = stop_of(schedule.handle([Failed("a", "u0", "no such field", "mistake", "Traceback …")]))
    assert stop.message.startswith("stage collect: no such field (Unit u0 (rows 0:10).)")
    assert stop.detail == ""


def lose_workers(schedule: Schedule, times: int, killer: str | None, with_node: bool = False) -> list[Instruction]:
    """Run workers one after another: each dies when `killer` runs (None: whatever runs) and finishes all else."""
    instructions = schedule.handle([Ready("w0")])
    lost = 0
    for _ in range(200):
        if lost == times or schedule.stop or schedule.finished:
            break
        worker = f"w{lost}"
        running = schedule.in_flight[worker][0].key
        if killer in (None, running):
            lost += 1
            instructions = schedule.handle([Lost(worker, "exit code 9", with_node)])
            instructions += [] if schedule.stop else schedule.handle([Ready(f"w{lost}")])
        else:
            instructions = schedule.handle([Done(worker, receipt(running))])
    return instructions


@pytest.mark.parametrize("killer", ["u0", "u3", "u5"])
def test_a_unit_that_kills_three_workers_while_others_succeed_is_poison(killer: str) -> None:
    stop = stop_of(lose_workers(make(6), 99, killer))
    assert f"unit {killer} (rows" in stop.message
    assert "took down 3 workers" in stop.message
    assert "exit code 9" in stop.message


def test_units_that_only_waited_behind_a_killer_are_not_blamed() -> None:
    schedule = make(12)
    lose_workers(schedule, 99, "u0")
    assert schedule.kills == {"u0": 3}


def test_lost_nodes_never_use_up_anything() -> None:
    schedule = make(6)
    lose_workers(schedule, 100, None, with_node=True)
    assert schedule.stop is None
    assert schedule.kills == schedule.attempts == {}


def test_a_cluster_where_every_worker_dies_stops_without_calling_a_unit_poison() -> None:
    stop = stop_of(lose_workers(make(6, workers=2), 99, None))
    assert "9 workers died in a row" in stop.message


def test_a_stage_stops_after_half_an_hour_without_any_unit_done() -> None:
    schedule = make(9)
    schedule.handle([Ready("a")])
    schedule.handle([Tick(1000.0), Done("a", receipt("u0"))])
    assert not any(isinstance(one, Stop) for one in schedule.handle([Tick(2800.0)]))
    stop = stop_of(schedule.handle([Tick(2801.0)]))
    assert "no unit was done for 30 minutes" in stop.message
    assert "a: u1 (rows 10:20)" in stop.message
    assert "1 of 9 are done; run again to resume" in stop.message


def test_failures_do_not_count_as_progress() -> None:
    schedule = make(9)
    schedule.handle([Ready("a")])
    schedule.handle([Tick(1799.0), Failed("a", "u0", "OSError: x", "storage"), Lost("a", "gone", True)])
    stop_of(schedule.handle([Tick(1801.0)]))


def test_one_bad_row_of_the_first_ten_does_not_stop_a_large_stage() -> None:
    schedule = make(200)  # 2,000 rows: two may be bad
    schedule.handle([Ready("a")])
    assert not any(isinstance(one, Stop) for one in schedule.handle([Done("a", receipt("u0", (7,)))]))
    assert not any(isinstance(one, Stop) for one in schedule.handle([Done("a", receipt("u1", (17,)))]))
    instructions = schedule.handle([Done("a", receipt("u2", (27,)))])
    assert isinstance(instructions[0], Commit)
    assert (
        "3 of 30 rows are not finite: id 7: the loss; id 17: the loss; id 27: the loss."
        in stop_of(instructions).message
    )
    assert "max_bad_fraction" in stop_of(instructions).message


def test_bad_rows_are_judged_when_a_small_stage_ends_and_again_when_it_is_resumed() -> None:
    schedule = make(2)
    schedule.handle([Ready("a")])
    stop_of(schedule.handle([Done("a", receipt("u0", (3,)))]))
    record = {"rows": 10, "quarantined": {"3": "the loss"}}
    stop_of(make(1, {"u0": record}).handle([]))
    assert make(1, {"u0": record}, Limits(max_bad_fraction=0.1)).handle([]) == []


def test_many_bad_rows_are_shortened() -> None:
    schedule = make(3)
    schedule.handle([Ready("a")])
    message = stop_of(
        schedule.handle([Done("a", Receipt("u0", 100, quarantined=dict.fromkeys(range(50), "x")))])
    ).message
    assert "id 3: x; id 4: x; and 45 more." in message
