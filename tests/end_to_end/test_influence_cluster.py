"""Influence and FastIF on Ray leave the bytes that the in-process pool leaves, whoever is killed in mid-solve."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.run import Run
from tests.end_to_end import drivers
from tests.end_to_end.answers import digests, events
from tests.end_to_end.conftest import Settings, run_job, tiny_job
from tests.end_to_end.drivers import Folder, gated_task, hold, holder, let_go
from tests.end_to_end.gated import seen
from tests.end_to_end.test_influence import ARTEFACTS, METHOD, WHOLE

pytestmark = pytest.mark.cluster
METHODS: dict[str, dict[str, Any]] = {
    "cg": METHOD | {"tolerance": 1e-6},
    "lissa": METHOD | {"solver": "lissa", "depth": 10},
    "long lissa": METHOD | {"solver": "lissa", "depth": 60, "repetitions": 2, "query_block": 16},
    "sketch": METHOD | {"solver": "sketch", "columns": 5, "depth": 8},
    "fastif": {"name": "fastif", "neighbours": 6, "recall_sample": 5, "depth": 10, "repetitions": 2},
}


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What the in-process pool leaves."""
    found = {}
    for name, method in METHODS.items():
        run = tmp_path_factory.mktemp("expected") / "run"
        found[name] = digests(run_job(tiny_job(inputs, run, gradients=WHOLE, method=method)), *ARTEFACTS)
    return found


@pytest.mark.parametrize(("name", "workers"), [("cg", 1), ("cg", 2), ("lissa", 2), ("sketch", 2), ("fastif", 2)])
def test_ray_workers_leave_the_same_bytes(
    settings: Settings, expected: dict[str, dict[str, bytes]], local_ray: None, name: str, workers: int
) -> None:
    ray = {"backend": "ray", "workers": workers}
    run = run_job(settings(gradients=WHOLE, method=METHODS[name], cluster=ray))
    assert digests(run, *ARTEFACTS) == expected[name]


@pytest.mark.parametrize("name", ["cg", "lissa"])
def test_a_worker_killed_in_mid_solve_changes_nothing(
    settings: Settings, inputs: Path, tmp_path: Path, expected: dict[str, dict[str, bytes]], local_ray: None, name: str
) -> None:
    gate = tmp_path / "gate"
    ray = {"backend": "ray", "workers": 2}
    config = settings(task=gated_task(inputs, gate), gradients=WHOLE, method=METHODS[name], cluster=ray)
    hold(gate, row=20, times=5)  # in the middle of λ_max

    def kill() -> None:
        os.kill(holder(gate), signal.SIGKILL)
        let_go(gate)

    killer = threading.Thread(target=kill)
    killer.start()
    run = run_job(config)
    killer.join()
    assert digests(run, *ARTEFACTS) == expected[name]
    lost = [event for event in events(run) if event["kind"] == "lost"]
    assert [event["stage"] for event in lost] == ["curvature"]


def solving(path: Path, inputs: Path, method: str, at_once: str) -> Folder:
    """Return a user's folder whose job solves so, one of the saved states' waits being 0 in the driver and its workers."""
    folder = Folder.make(path, inputs)
    job = yaml.safe_load((path / "job.yaml").read_text())
    job |= {"gradients": job["gradients"] | WHOLE, "method": METHODS[method]}
    (path / "job.yaml").write_text(yaml.safe_dump(job))
    with (path / "config.py").open("a") as file:  # the task's module, which all of them import
        file.write(f"\n\nfrom actors import solver_states\n\nsolver_states.{at_once} = 0.0\n")
    return folder


def test_a_driver_killed_in_mid_solve_goes_on_from_its_saved_state(
    inputs: Path, tmp_path: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    folder = solving(tmp_path, inputs, "cg", "SECONDS")  # every state is saved
    hold(folder.gate, row=20, times=15)
    first = folder.start()
    first.reaches(folder.gate)
    drivers.wait_until(lambda: list(folder.run.glob("journal/solve-scores/solver.*")), "a saved state")
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL
    assert len(list(folder.run.glob("journal/solve-scores/solver.*[0-9]"))) in (2, 3)  # killed between write and delete
    begun = seen(folder.gate, 20)
    let_go(folder.gate)

    status, said = folder.start().ends()
    assert status == 0, said
    assert digests(Run.open(str(folder.run)), *ARTEFACTS) == expected["cg"]
    assert not list(folder.run.glob("journal/solve-scores/solver.*"))
    assert begun > 15


def test_a_worker_killed_in_mid_repetition_goes_on_from_its_saved_state(
    inputs: Path, tmp_path: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """Every iteration is a turn of its own, which any worker may take."""
    whole = gated_task(inputs, tmp_path / "whole")
    run_job(tiny_job(inputs, tmp_path / "undisturbed", task=whole, gradients=WHOLE, method=METHODS["long lissa"]))
    folder = solving(tmp_path, inputs, "long lissa", "TURN")
    hold(folder.gate, row=12, times=seen(tmp_path / "whole", 12) - 3)  # LiSSA draws it once more, then it is scored
    driver = folder.start()
    held = driver.reaches(folder.gate)
    saved = [int(state.suffix[1:]) for state in folder.run.glob("states/scores/unfinished/block-*/solver.*[0-9]")]
    assert max(saved) >= 9
    os.kill(held, signal.SIGKILL)
    let_go(folder.gate)
    status, said = driver.ends()
    assert status == 0, said
    run = Run.open(str(folder.run))
    assert digests(run, *ARTEFACTS) == expected["long lissa"]
    assert [event["stage"] for event in events(run) if event["kind"] == "lost"] == ["lissa-scores"]
