"""The tiny job on Ray leaves the bytes that the in-process pool leaves, whoever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch import Run, job
from storage.journal import Journal
from storage.leases import PATIENCE
from tests.end_to_end import drivers
from tests.end_to_end.answers import dense, digests, events, oracle_scores
from tests.end_to_end.conftest import Settings, run_job, tiny_job
from tests.end_to_end.drivers import Folder, Head, gated_task, hold, holder, let_go
from tests.end_to_end.gated import tally

pytestmark = pytest.mark.cluster
FOLDERS = ("gradients", "scores", "index")
UNITS = 9  # of collect: three checkpoints of three shards
FIRST_ROWS = {5, 16, 32}  # one row of each shard, none of them the id of a query


@pytest.fixture(scope="session")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the in-process pool leaves."""
    run = run_job(tiny_job(inputs, tmp_path_factory.mktemp("expected") / "run"))
    return digests(run, *FOLDERS)


def left(run: Path | str) -> dict[str, bytes]:
    return digests(Run.open(str(run)), *FOLDERS)


def computed(gate: Path, first: int = 0) -> list[tuple[str, int]]:
    """Return the units that were begun, as (checkpoint's mark, row), from this line of the books on."""
    return [(mark, row) for _, _, mark, ids in tally(gate)[first:] for row in FIRST_ROWS & set(ids)]


@pytest.mark.parametrize(("workers", "step"), [(1, 1), (2, -1)], ids=["one worker", "two in opposite order"])
def test_workers_and_order_leave_the_same_bytes(
    settings: Settings, inputs: Path, tmp_path: Path, expected: dict[str, bytes], local_ray: None,
    monkeypatch: pytest.MonkeyPatch, workers: int, step: int,
) -> None:  # fmt: skip
    gate = tmp_path / "gate"
    for name, made in (("checkpoint_units", job.checkpoint_units), ("shard_units", job.shard_units)):
        monkeypatch.setattr(job, name, lambda *args, made=made: made(*args)[::step])
    run_job(settings(task=gated_task(inputs, gate), cluster={"backend": "ray", "workers": workers}))
    assert left(tmp_path / "run") == expected
    assert len({pid for pid, *_ in tally(gate)} - {os.getpid()}) == workers
    assert {threads for _, threads, *_ in tally(gate)} == {1}
    assert len(computed(gate)) == len(set(computed(gate))) == UNITS  # every unit once


def test_other_batches_change_scores_within_the_tolerance(
    settings: Settings, inputs: Path, tmp_path: Path, local_ray: None
) -> None:
    exact = {"dtype": "float32", "projection": "none", "modules": ["classifier*"]}
    one = run_job(settings(run=str(tmp_path / "one"), gradients=exact))
    on_ray = {"backend": "ray", "workers": 2}
    two = run_job(settings(run=str(tmp_path / "two"), gradients=exact | {"token_budget": 400}, cluster=on_ray))
    _, _, bound = oracle_scores(one, inputs / "model", ["classifier.weight", "classifier.bias"])
    assert (np.abs(dense(one) - dense(two)) <= 1e-5 * bound).all()


def test_a_worker_killed_in_the_middle_of_collect_changes_nothing(
    settings: Settings, inputs: Path, tmp_path: Path, expected: dict[str, bytes], local_ray: None
) -> None:
    gate = tmp_path / "gate"
    config = settings(task=gated_task(inputs, gate), cluster={"backend": "ray", "workers": 2})
    hold(gate, row=20, times=1)
    killed = []

    def kill() -> None:
        killed.append(holder(gate))
        os.kill(killed[0], signal.SIGKILL)
        let_go(gate)

    killer = threading.Thread(target=kill)
    killer.start()
    run = run_job(config)
    killer.join()
    assert left(tmp_path / "run") == expected
    lost = [event for event in events(run) if event["kind"] == "lost"]
    assert [event["stage"] for event in lost] == ["collect-train"]
    assert killed[0] != os.getpid()
    assert len(Journal(run.location, "collect-train").done()) == UNITS


def test_a_killed_driver_then_an_interrupted_one_then_the_end(
    inputs: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = Folder.make(tmp_path, inputs)
    hold(folder.gate, row=20, times=1)  # under the second checkpoint
    first = folder.start()
    leftover = first.reaches(folder.gate)
    drivers.wait_until(lambda: len(folder.collected()) >= UNITS / 3, "the first checkpoint's records")
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL
    after_kill, begun = folder.collected(), len(tally(folder.gate))
    assert len(after_kill) < UNITS
    let_go(folder.gate)  # whatever is left of the first driver's workers goes on beside the second driver

    hold(folder.gate, row=40, times=2)  # under the third
    began = time.monotonic()
    second = folder.start()
    second.reaches(folder.gate)
    assert time.monotonic() - began < PATIENCE / 2  # nobody waited for the dead driver's lease to run out
    os.killpg(second.process.pid, signal.SIGINT)  # as a terminal does: everything that the driver started gets it too
    status, said = second.ends()
    assert status == 130, said
    assert "interrupted: what was done is kept; run the same command again to resume" in said
    assert "Traceback" not in said
    assert f"collect-train: {UNITS} units, {len(after_kill)} of them done before" in said
    after_interrupt = folder.collected()
    assert not Path(f"/proc/{leftover}").exists()
    let_go(folder.gate)

    status, said = folder.start().ends()
    assert status == 0, said
    assert f"collect-train: {UNITS} units, {len(after_interrupt)} of them done before" in said
    assert left(folder.run) == expected
    done = folder.collected()
    assert len(done) == UNITS
    assert {key: done[key] for key in after_interrupt} == after_interrupt
    assert {key: after_interrupt[key] for key in after_kill} == after_kill
    again = computed(folder.gate, begun)
    assert len(set(again)) == UNITS - len(after_kill)  # only what was not done, or in flight
    assert len(again) - len(set(again)) <= 2 * 2  # in flight at the interrupt, or a leftover's
    leases = [json.loads((folder.run / f"journal/run/lease.{n}").read_text()) for n in range(3)]
    assert [lease["released"] for lease in leases] == [False, True, True]


def test_a_terminated_driver_says_so_and_the_job_resumes(
    inputs: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = Folder.make(tmp_path, inputs)
    hold(folder.gate, row=20, times=1)
    driver = folder.start()
    driver.reaches(folder.gate)
    driver.process.terminate()
    status, said = driver.ends()
    assert status == 143, said
    assert said.splitlines()[-1] == "interrupted: what was done is kept; run the same command again to resume"
    assert "SIGTERM" not in said, "no stack of Ray's"
    assert json.loads((folder.run / "journal/run/lease.0").read_text())["released"]
    let_go(folder.gate)
    assert folder.start().ends()[0] == 0
    assert left(folder.run) == expected


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with drivers.ray_head() as head:
        yield head


def test_a_submitted_job_end_to_end(head: Head, inputs: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    run, file = tmp_path / "run", tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(tiny_job(inputs, run, cluster={"backend": "ray", "workers": 2})))
    submitted = head.submit("python", "launch/score.py", str(file))
    assert submitted.returncode == 0, submitted.stdout
    assert f"scores scores are in {run}" in submitted.stdout
    assert left(run) == expected
    asked = subprocess.run(
        [sys.executable, drivers.ROOT / "launch" / "query.py", run, "--query", "2", "--json"],
        cwd=tmp_path, env=drivers.environment(), text=True, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    found = json.loads(asked.stdout)
    best = Run.open(str(run)).top(2, k=1).to_pylist()[0]
    assert (found["proponents"][0]["id"], found["proponents"][0]["score"]) == (best["id"], best["score"])
    shipped = head.shipped()
    folders = {name.partition("/")[0] for name in shipped if "/" in name}
    assert {"engine", "actors", "storage", "launch", "configs"} <= folders
    assert not folders & {"tests", "runs", ".venv", ".git", ".mypy_cache", "docs"}
    assert sum(shipped.values()) < 2 * 2**20


def test_a_relative_path_in_a_job_is_refused_and_the_job_fails(head: Head, inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(tiny_job(inputs, "runs/relative", cluster={"backend": "ray"})))
    submitted = head.submit("python", "launch/score.py", str(file))
    assert submitted.returncode == 1
    assert "error: run.uri='runs/relative' is relative, which is not allowed inside a Ray job" in submitted.stdout
    assert "failed" in submitted.stdout.lower()


def test_two_nodes_share_the_work_and_are_told_apart(inputs: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """In a process of its own: a process is connected to one cluster only."""
    config = tiny_job(inputs, tmp_path / "run", cluster={"backend": "ray", "workers": 2})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    script = Path(__file__).with_name("two_nodes.py")
    env = drivers.environment(PYTHONPATH=str(drivers.ROOT))
    ran = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=150, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert left(tmp_path / "run") == expected
    assert not list((tmp_path / "run").glob(".token*"))
    assert result["shared"] == []
    assert len(result["blind"]) == 1
    assert result["second"][:8] in result["blind"][0]
    assert "run.uri=" in result["refused"]
    assert result["blind"][0] in result["refused"]
    assert "with several nodes a local path must be on storage that all of them mount" in result["refused"]
