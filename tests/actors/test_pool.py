"""What every pool must do, run on each of them; what Ray's alone must do is in test_ray_pool.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_workers import ToyWorker, toy_stage

from actors.pool import InProcessPool, Pool, worker_name
from actors.schedule import Done, Event, Failed, Lost, Ready

MakePool = Callable[[int], Pool]


@pytest.fixture(params=["process", pytest.param("ray", marks=pytest.mark.cluster)])
def make_pool(request: pytest.FixtureRequest) -> Iterator[MakePool]:
    pools: list[Pool] = []

    def make(workers: int) -> Pool:
        if request.param == "process":
            pools.append(InProcessPool(ToyWorker, workers))
        else:
            from actors.ray_pool import RayPool

            request.getfixturevalue("local_ray")
            pools.append(RayPool(ToyWorker, workers))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def wait_for(pool: Pool, count: int, kind: type, seconds: float = 60.0) -> list:
    """Return the first events up to `count` of a kind; nothing else may be among them but Ready."""
    found: list[Event] = []
    deadline = time.monotonic() + seconds
    while sum(isinstance(event, kind) for event in found) < count:
        assert time.monotonic() < deadline, f"waited {seconds} s, got {found}"
        found += pool.wait(1.0)
    assert all(isinstance(event, kind | Ready) for event in found), found
    return [event for event in found if isinstance(event, kind)]


def test_every_worker_reports_ready_under_its_own_name(make_pool: MakePool) -> None:
    pool = make_pool(2)
    names = [event.worker for event in wait_for(pool, 2, Ready)]
    assert sorted(names) == sorted(pool.workers)
    assert len(set(names)) == pool.size == 2


def test_units_of_a_worker_are_each_done_once_and_signed(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    wait_for(pool, 1, Ready)
    stage = toy_stage("double", tmp_path)
    for unit in stage.units:
        pool.submit(pool.workers[0], stage, unit)
    done = sorted(wait_for(pool, 6, Done), key=lambda event: event.receipt.unit)  # two overlap: any order
    assert [event.receipt.unit for event in done] == [unit.key for unit in stage.units]
    assert [event.receipt.objects[0]["value"] for event in done] == [0, 2, 4, 6, 8, 10]
    assert pool.wait(0.01) == []
    assert {event.receipt.worker for event in done} == set(pool.workers) == {event.worker for event in done}


def test_an_os_error_is_a_storage_failure_and_the_worker_lives_on(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    wait_for(pool, 1, Ready)
    worker, stage = pool.workers[0], toy_stage("fail_at_first", tmp_path, failures=1)
    pool.submit(worker, stage, stage.units[1])
    (failure,) = wait_for(pool, 1, Failed)
    assert (failure.worker, failure.unit, failure.kind) == (worker, "u1", "storage")
    assert failure.error == "OSError: SlowDown"
    pool.submit(worker, stage, stage.units[1])
    assert wait_for(pool, 1, Done)[0].worker == worker


@pytest.mark.parametrize(
    ("function", "kind", "error"),
    [
        ("refuse", "mistake", "method.damping=-0.1 is not allowed"),
        ("break_down", "bug", "KeyError: 'no such module'"),
    ],
)
def test_no_other_exception_is_tried_again(
    make_pool: MakePool, tmp_path: Path, function: str, kind: str, error: str
) -> None:
    pool = make_pool(1)
    wait_for(pool, 1, Ready)
    stage = toy_stage(function, tmp_path)
    pool.submit(pool.workers[0], stage, stage.units[0])
    (failure,) = wait_for(pool, 1, Failed)
    assert (failure.kind, failure.error) == (kind, error)
    assert "toy_workers.py" in failure.detail


def test_an_error_that_does_not_pickle_still_arrives(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    wait_for(pool, 1, Ready)
    stage = toy_stage("raise_own_error", tmp_path)
    pool.submit(pool.workers[0], stage, stage.units[0])
    (failure,) = wait_for(pool, 1, Failed)
    assert (failure.kind, failure.error) == ("storage", "OwnError: s3://b/c has 3 bytes")


def test_a_worker_that_exits_is_lost_once_and_replaced_under_a_new_name(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1)
    wait_for(pool, 1, Ready)
    worker, stage = pool.workers[0], toy_stage("exit_at_first", tmp_path, deaths=1)
    sleeping = toy_stage("nap", tmp_path)
    pool.submit(worker, stage, stage.units[1])
    pool.submit(worker, sleeping, sleeping.units[2])
    (lost,) = wait_for(pool, 1, Lost)
    assert lost.worker == worker
    assert not lost.with_node
    assert pool.workers == []
    pool.replace(worker)
    (ready,) = wait_for(pool, 1, Ready)
    assert ready.worker != worker
    pool.submit(ready.worker, stage, stage.units[1])
    assert [event.receipt.unit for event in wait_for(pool, 1, Done)] == ["u1"], "u2 went with the lost worker"
    assert pool.wait(0.01) == []


def test_replacing_a_worker_drops_what_it_had(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2)
    wait_for(pool, 2, Ready)
    stage = toy_stage("nap", tmp_path)
    first, second = pool.workers
    pool.submit(first, stage, stage.units[0])
    pool.replace(first)
    other = toy_stage("double", tmp_path)
    pool.submit(second, other, other.units[3])
    assert [event.receipt.unit for event in wait_for(pool, 1, Done)] == ["u3"]


def test_an_unknown_worker_is_refused(make_pool: MakePool, tmp_path: Path) -> None:
    pool, stage = make_pool(1), toy_stage("double", tmp_path)
    with pytest.raises(ValueError, match="worker nobody is not up"):
        pool.submit("nobody", stage, stage.units[0])
    with pytest.raises(ValueError, match="worker nobody does not exist"):
        pool.replace("nobody")


def test_a_pool_without_workers_is_refused(make_pool: MakePool) -> None:
    with pytest.raises(ValueError, match="workers=0 is not allowed"):
        make_pool(0)


def test_a_worker_name_says_where_and_which() -> None:
    assert worker_name(2, 1, "node-3") == "worker-2.1@node-3"
