"""Turn-over dropout and representer points on Ray leave the bytes that the in-process pool leaves, whoever is killed."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run import Run
from tests.end_to_end.answers import digests, events
from tests.end_to_end.conftest import Settings, run_job, tiny_job
from tests.end_to_end.drivers import Folder, gated_task, hold, holder, let_go
from tests.end_to_end.test_turnover import trained

pytestmark = pytest.mark.cluster
__all__ = ["trained"]
FORWARD = "tests.end_to_end.gated:GatedForward"
METHODS: dict[str, dict[str, Any]] = {"turnover": {"name": "turnover"}, "representer": {"name": "representer"}}
HOLD = {"turnover": 7, "representer": 0}  # how often row 20 runs before it is held: in the second training, at once


@pytest.fixture
def asked(settings: Settings, trained: Path) -> Settings:
    """Make configs of the tiny job for a method, which turn-over dropout asks of its own checkpoints."""

    def make(name: str, **sections: Any) -> dict[str, Any]:
        own = {"checkpoints": str(trained)} if name == "turnover" else {}
        return settings(**own | {"method": METHODS[name]} | sections)

    return make


@pytest.fixture(scope="module")
def expected(inputs: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The scores that the in-process pool leaves."""
    found = {}
    for name, method in METHODS.items():
        own = {"checkpoints": str(trained)} if name == "turnover" else {}
        run = tmp_path_factory.mktemp("expected") / "run"
        found[name] = digests(run_job(tiny_job(inputs, run, method=method, **own)), "scores")
    return found


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ray_workers_leave_the_same_bytes(
    asked: Settings, expected: dict[str, dict[str, bytes]], local_ray: None, name: str, workers: int
) -> None:
    run = run_job(asked(name, cluster={"backend": "ray", "workers": workers}))
    assert digests(run, "scores") == expected[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_worker_changes_nothing(
    asked: Settings, inputs: Path, tmp_path: Path, expected: dict[str, dict[str, bytes]], local_ray: None, name: str
) -> None:
    gate = tmp_path / "gate"
    task = gated_task(inputs, gate, FORWARD)
    hold(gate, row=20, times=HOLD[name])

    def kill() -> None:
        os.kill(holder(gate), signal.SIGKILL)
        let_go(gate)

    killer = threading.Thread(target=kill)
    killer.start()
    run = run_job(asked(name, task=task, cluster={"backend": "ray", "workers": 2}))
    killer.join()
    assert digests(run, "scores") == expected[name]
    [lost] = [event for event in events(run) if event["kind"] == "lost"]
    assert lost["stage"] == "compute-scores" if name == "turnover" else lost["stage"].startswith("features-train-")


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_driver_goes_on_to_the_same_bytes(
    inputs: Path, trained: Path, tmp_path: Path, expected: dict[str, dict[str, bytes]], name: str
) -> None:
    folder = Folder.make(tmp_path, inputs)
    job = yaml.safe_load((tmp_path / "job.yaml").read_text())
    own = {"checkpoints": str(trained)} if name == "turnover" else {}
    task = job["task"] | {"name": "config:GatedForward"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | own | {"method": METHODS[name], "task": task}))
    hold(folder.gate, row=20, times=HOLD[name])
    first = folder.start()
    first.reaches(folder.gate)
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL
    let_go(folder.gate)

    status, said = folder.start().ends()
    assert status == 0, said
    assert digests(Run.open(str(folder.run)), "scores") == expected[name]
