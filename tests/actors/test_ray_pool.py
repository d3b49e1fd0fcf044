"""What only Ray's pool can show: processes that die, resources that are not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_workers import BrokenWorker, MemoryJournal, ToyWorker, toy_stage

from actors.pool import PoolError
from actors.ray_pool import RayPool, worker_environment
from actors.run_stage import StageStopped, run_stage
from actors.schedule import Ready
from actors.units import Stage

cluster_test = pytest.mark.cluster


def wait_until_ready(pool: RayPool) -> None:
    deadline = time.monotonic() + 60
    while len(pool.workers) < pool.size:
        assert time.monotonic() < deadline, "the workers are not up after 60 s"
        pool.wait(0.5)


def test_cpu_workers_have_one_thread_and_gpu_workers_their_cpus() -> None:
    assert worker_environment(1.0, 0.0)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(4.0, 0.0)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(4.0, 1.0)["OMP_NUM_THREADS"] == "4"


def test_without_ray_the_pool_says_what_to_call() -> None:
    import ray

    if not ray.is_initialized():
        with pytest.raises(ValueError, match=r"cluster\.connect"):
            RayPool(ToyWorker, 1)


@cluster_test
def test_a_stage_on_ray_runs_in_other_processes_with_one_thread(local_ray: None, tmp_path: Path) -> None:
    stage, journal = toy_stage("double", tmp_path, units=12), MemoryJournal()
    with RayPool(ToyWorker, 2) as pool:
        run_stage(pool, stage, journal)
    answers = [record["objects"][0] for record in journal.records.values()]
    assert len(answers) == 12
    assert os.getpid() not in {answer["pid"] for answer in answers}
    assert {answer["OMP_NUM_THREADS"] for answer in answers} == {"1"}
    assert {answer["MALLOC_TRIM_THRESHOLD_"] for answer in answers} == {str(2**33)}


@cluster_test
def test_a_worker_that_dies_in_mid_unit_is_replaced_and_its_units_rerun(local_ray: None, tmp_path: Path) -> None:
    stage, journal = toy_stage("die_at_first", tmp_path, deaths=2), MemoryJournal()
    with RayPool(ToyWorker, 2) as pool:
        report = run_stage(pool, stage, journal)
        assert len(pool.workers) + sum(slot.starting is not None for slot in pool._slots) == 2
    assert sorted(journal.records) == [unit.key for unit in stage.units]
    assert report.retries >= 2


@cluster_test
def test_a_poison_unit_is_named(local_ray: None, tmp_path: Path) -> None:
    stage, journal = toy_stage("die_at_first", tmp_path, deaths=99), MemoryJournal()
    with RayPool(ToyWorker, 2) as pool, pytest.raises(StageStopped, match="unit u1 took down 3 workers"):
        run_stage(pool, stage, journal)


@cluster_test
@pytest.mark.parametrize("how", ["ray.kill", "sigkill"])
def test_an_actor_killed_from_outside_is_replaced(local_ray: None, tmp_path: Path, how: str) -> None:
    import ray

    stage, journal = toy_stage("double", tmp_path, units=4), MemoryJournal()
    stage = Stage("toy", "nap", stage.settings, stage.units)
    for unit in stage.units:
        unit.payload["seconds"] = 60 if unit.key == "u0" else 0
    with RayPool(ToyWorker, 2) as pool:
        begun = tmp_path / "u0.begun"

        def kill() -> None:
            while not begun.exists():
                time.sleep(0.05)
            slot = next(s for s in pool._slots if any(u.key == "u0" for u in s.tasks.values()))
            if how == "ray.kill":
                ray.kill(slot.actor)
            else:
                os.kill(pids[slot.name], signal.SIGKILL)

        pids = worker_pids(pool, tmp_path)
        killer = threading.Thread(target=kill)
        killer.start()
        report = run_stage(pool, stage, journal)
        killer.join()
    assert sorted(journal.records) == ["u0", "u1", "u2", "u3"]
    assert report.retries >= 1
    assert report.seconds < 50


def worker_pids(pool: RayPool, folder: Path) -> dict[str, int]:
    """Return each worker's process id, asked of the workers themselves."""
    wait_until_ready(pool)
    stage = toy_stage("double", folder)
    pids: dict[str, int] = {}
    for worker in pool.workers:
        pool.submit(worker, stage, stage.units[0])
    while len(pids) < pool.size:
        for event in pool.wait(1.0):
            pids[event.worker] = event.receipt.objects[0]["pid"]  # type: ignore[union-attr]
    return pids


class Clock:
    """Stands still until told to move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@cluster_test
def test_a_pending_worker_is_an_error_that_names_the_resources(local_ray: None) -> None:
    clock = Clock()
    with RayPool(ToyWorker, 1, gpus=1.0, clock=clock) as pool:
        clock.now = 60.0
        assert pool.wait(0.01) == []
        clock.now = 61.0
        with pytest.raises(PoolError) as error:
            pool.wait(0.01)
    message = str(error.value)
    assert "worker 0 of 1 is still pending after 61 s" in message
    assert "asks for 1 CPU, 1 GPU; the cluster has 4 CPU (" in message
    assert "0 GPU (0 free)" in message


@cluster_test
def test_a_replacement_that_stays_pending_is_only_a_warning_while_others_work(
    local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with RayPool(ToyWorker, 2, clock=clock) as pool:
        wait_until_ready(pool)
        lost, other = pool.workers
        pool._actor_class = pool._actor_class.options(num_gpus=1)  # stands for a node that does not come back
        pool.replace(lost)
        clock.now = 61.0
        assert pool.wait(0.01) == pool.wait(0.01) == []
        assert caplog.text.count("worker 0 of 2 is still pending") == 1
        assert caplog.text.count("Going on with 1 of 2 workers") == 1
        pool.replace(other)
        with pytest.raises(PoolError, match="worker 0 of 2 is still pending"):
            pool.wait(0.01)


@cluster_test
def test_workers_beyond_the_least_come_when_there_is_room(local_ray: None, tmp_path: Path) -> None:
    """Four CPUs: of three workers that take two each, one must stay out, and is no error however long it waits."""
    clock, stage, journal = Clock(), toy_stage("double", tmp_path, units=6), MemoryJournal()
    with RayPool(ToyWorker, 1, cpus=2.0, most=3, clock=clock) as pool:
        assert pool.size == 1
        deadline = time.monotonic() + 180  # two processes to start, on a machine that may be busy
        while len(pool.workers) < 2:
            assert time.monotonic() < deadline
            pool.wait(0.5)
        clock.now = 10_000.0
        run_stage(pool, stage, journal, clock=clock)
        assert len(pool.workers) == 2
        assert {name.partition("@")[0] for name in pool.workers} < {f"worker-{n}.0" for n in range(3)}
    assert len(journal.records) == 6


@cluster_test
def test_an_elastic_pool_waits_longer_for_its_least(local_ray: None) -> None:
    clock = Clock()
    with RayPool(ToyWorker, 1, gpus=1.0, most=2, clock=clock) as pool:
        clock.now = 899.0
        assert pool.wait(0.01) == []
        clock.now = 901.0
        with pytest.raises(PoolError, match="of 1 is still pending after 901 s"):
            pool.wait(0.01)


@cluster_test
def test_a_lost_node_blames_no_unit_and_the_others_go_on(tmp_path: Path) -> None:
    """In a process of its own: a process is connected to one cluster only."""
    script = Path(__file__).with_name("lose_a_node.py")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
    ran = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == {"committed": 6, "lost_with_node": [True]}


@cluster_test
def test_a_worker_that_cannot_be_made_is_an_error_at_once(local_ray: None) -> None:
    with (
        RayPool(BrokenWorker, 1) as pool,
        pytest.raises(PoolError, match="could not start: ValueError: no such device"),
    ):
        wait_until_ready(pool)


@cluster_test
def test_a_pool_serves_one_stage_after_another(local_ray: None, tmp_path: Path) -> None:
    with RayPool(ToyWorker, 1) as pool:
        pids = set()
        for name in ("one", "two"):
            journal = MemoryJournal()
            units = toy_stage("double", tmp_path).units
            run_stage(pool, Stage(name, "double", {"factor": 1}, units), journal)
            pids |= {record["objects"][0]["pid"] for record in journal.records.values()}
        assert len(pids) == 1
        assert not any(isinstance(event, Ready) for event in pool.wait(0.1))
