"""The same job with the same answers: in a folder and on an S3 server, on one, two and three Ray nodes, by two drivers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.run import Run
from storage.journal import Journal
from storage.locations import Location
from storage.verify import verify
from tests.end_to_end import drivers
from tests.end_to_end.answers import digests
from tests.end_to_end.conftest import Settings, run_job, tiny_job
from tests.end_to_end.drivers import Folder, gated_task, hold, let_go
from tests.end_to_end.gated import tally
from tests.end_to_end.test_cluster import UNITS, computed
from tests.end_to_end.test_s3 import upload
from tests.storage.conftest import new_bucket, real_endpoint  # noqa: F401  fixture

pytestmark = pytest.mark.cluster
FOLDERS = ("gradients", "states", "scores", "index", "corpus")
NODES = (1, 2, 3)


def left(run: Run) -> dict[str, bytes]:
    """Return what a run holds, but the description of its index, which names where the checkpoints lie."""
    found = digests(run, *FOLDERS)
    found.pop("index/scores/meta.json")
    return found


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the in-process pool leaves in a folder."""
    return run_job(tiny_job(inputs, tmp_path_factory.mktemp("whole") / "run"))


def on_nodes(folder: Path, what: str, timeout: float) -> None:
    script = Path(__file__).with_name("on_nodes.py")
    env = drivers.environment(PYTHONPATH=str(drivers.ROOT))
    ran = subprocess.run(
        [sys.executable, script, folder, what], capture_output=True, text=True, timeout=timeout, env=env
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def homes(
    inputs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    real_endpoint: str,  # noqa: F811
) -> Iterator[dict[tuple[str, int], str]]:
    """Run the job in a folder and on a real S3 server, on each number of nodes; give the runs' addresses."""
    folder = tmp_path_factory.mktemp("anywhere")
    with pytest.MonkeyPatch.context() as patch:
        bucket = f"s3://{new_bucket(real_endpoint, patch)}"
        upload(inputs, Location.parse(f"{bucket}/inputs"))
        remote = {
            "corpus": f"{bucket}/inputs/train.jsonl", "queries": {"path": f"{bucket}/inputs/queries.jsonl"},
            "checkpoints": f"{bucket}/inputs/model",
        }  # fmt: skip
        places: dict[str, tuple[str, dict[str, Any]]] = {"folder": (str(folder), {}), "s3": (bucket, remote)}
        runs, jobs = dict[tuple[str, int], str](), []
        for count in NODES:
            for name, (home, sections) in places.items():
                runs[name, count] = f"{home}/run-{count}"
                cluster = {"backend": "ray", "workers": count}
                jobs.append(
                    {"nodes": count, "config": tiny_job(inputs, runs[name, count], cluster=cluster, **sections)}
                )
        (folder / "jobs.json").write_text(json.dumps(jobs))
        on_nodes(folder, "jobs", 280)
        yield runs


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("home", ["folder", "s3"])
def test_the_same_answers_anywhere(homes: dict[tuple[str, int], str], whole: Run, home: str, nodes: int) -> None:
    run = Run.open(homes[home, nodes])
    assert left(run) == left(whole)
    assert run.top(2, k=4).equals(whole.top(2, k=4))
    records = Journal(run.location, "collect-train").done()
    assert len(records) == UNITS
    assert len({record["worker"].partition(".")[0] for record in records.values()}) == nodes
    assert not verify(run.location).damages


def test_a_node_that_comes_later_takes_its_share(settings: Settings, inputs: Path, tmp_path: Path, whole: Run) -> None:
    gate = tmp_path / "gate"
    config = settings(task=gated_task(inputs, gate), cluster={"backend": "ray", "workers": {"min": 1, "max": 3}})
    hold(gate, row=20, times=1)  # under the second checkpoint: the run has begun
    (tmp_path / "grow.json").write_text(json.dumps(config))
    on_nodes(tmp_path, "grow", 200)
    assert digests(Run.open(config["run"]), "gradients", "scores") == digests(whole, "gradients", "scores")
    assert len({pid for pid, *_ in tally(gate)}) == 2


def test_two_drivers_share_the_work(inputs: Path, tmp_path: Path, whole: Run) -> None:
    folder = Folder.make(tmp_path, inputs)
    job = folder.path / "job.yaml"
    job.write_text(job.read_text().replace("workers: 2", "workers: 1"))
    hold(folder.gate, row=20, times=1)  # under the second checkpoint, and by the second driver under the third
    first = folder.start()
    first.reaches(folder.gate)
    second = folder.start()
    drivers.wait_until(lambda: len(list(folder.gate.glob("held.*"))) == 2, "the second driver at the gate", 150)
    assert first.process.poll() is None
    assert second.process.poll() is None
    let_go(folder.gate)
    for driver in (first, second):
        status, said = driver.ends()
        assert status == 0, said
    run = Run.open(str(folder.run))
    assert digests(run, "gradients", "scores") == digests(whole, "gradients", "scores")
    assert len(computed(folder.gate)) == len(set(computed(folder.gate))) == UNITS, "no unit twice"
    journal = Journal(run.location, "collect-train")
    with_whom = [run.location.read_json(journal.lease_key(unit, 0))["driver"] for unit in journal.done()]
    assert set(with_whom) == {0, 1}
    assert [own.lease for own in journal.marks().values()] == [0] * UNITS, "each was taken once"
    assert [run.location.read_json(f"journal/run/lease.{n}")["released"] for n in (0, 1)] == [True, True]
