"""Driving the tiny job as a person would: from a folder of one's own, as a process, or submitted to a Ray head."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storage.local import PARTIAL
from tests.end_to_end import gated
from tests.end_to_end.conftest import tiny_job

ROOT = Path(__file__).parents[2]
SCORE = ROOT / "launch" / "score.py"
RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "COLUMNS": "200",
}


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_", "OMP_"))}
    return kept | ENVIRONMENT | more


def wait_until(true: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """Return the first true value. AssertionError naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)
    return value


def gated_task(inputs: Path, gate: Path, name: str = "tests.end_to_end.gated:Gated") -> dict[str, Any]:
    """Return the task section of a gated job; its gate is made."""
    gate.mkdir(exist_ok=True)
    tokenizer = str(inputs / "model" / "checkpoint-10")
    return {"name": name, "settings": {"max_tokens": 16, "tokenizer": tokenizer, "gate": str(gate)}}


def hold(gate: Path, row: int, times: int) -> None:
    """Let the unit with this row wait, once it has been computed so many times."""
    (gate / "hold").write_text(f"{row} {times}")


def holder(gate: Path) -> int:
    """Return the process that waits at the gate."""
    return int(wait_until(lambda: list(gate.glob("held.*")), "a worker at the gate")[0].suffix[1:])


def let_go(gate: Path) -> None:
    (gate / "hold").unlink()
    for file in gate.glob("held.*"):
        file.unlink()


@dataclass
class Folder:
    """A user's own folder: job.yaml with a relative run, and a task of their own in a module named like one of ours."""

    path: Path

    @classmethod
    def make(cls, path: Path, inputs: Path) -> "Folder":
        shutil.copy(str(gated.__file__), path / "config.py")
        task = gated_task(inputs, path / "gate", "config:Gated")
        job = tiny_job(inputs, "run", task=task, cluster={"backend": "ray", "workers": 2})
        (path / "job.yaml").write_text(yaml.safe_dump(job))
        return cls(path)

    @property
    def gate(self) -> Path:
        return self.path / "gate"

    @property
    def run(self) -> Path:
        return self.path / "run"

    def start(self) -> "Driver":
        """Start `python launch/score.py job.yaml`, the head of a process group as in a terminal."""
        output = self.path / f"output.{len(list(self.path.glob('output.*')))}"
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, SCORE, "job.yaml"], cwd=self.path, env=environment(), stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=heed_interrupts,
            )  # fmt: skip
        return Driver(process, output)

    def collected(self) -> dict[str, bytes]:
        """Return the done-records of collect."""
        return {
            str(p.relative_to(self.run)): p.read_bytes()
            for p in self.run.glob("journal/collect-train/*/done.*")
            if p.suffix != PARTIAL
        }


@dataclass
class Driver:
    process: subprocess.Popen[bytes]
    output: Path

    def reaches(self, gate: Path) -> int:
        """Return its worker that waits at the gate."""
        wait_until(lambda: list(gate.glob("held.*")) or self.process.poll() is not None, "a worker at the gate")
        assert self.process.poll() is None, self.output.read_text()
        return holder(gate)

    def ends(self, seconds: float = 90.0) -> tuple[int, str]:
        """Return exit status and everything printed."""
        status = self.process.wait(seconds)
        return status, self.output.read_text()


def heed_interrupts() -> None:
    """Undo an ignored SIGINT, which a background job hands down to all it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A Ray head started apart from everything else."""

    url: str
    folder: Path

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit --working-dir . -- COMMAND` from the root of this repository."""
        return subprocess.run(
            [RAY, "job", "submit", "--address", self.url, "--working-dir", ".", "--", *command],
            cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip

    def shipped(self) -> dict[str, int]:
        """Return the files of the working folder that was uploaded, with their sizes; not what Python compiled there."""
        found = {}
        for folder in self.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"):
            for path in folder.rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    found[str(path.relative_to(folder))] = path.stat().st_size
        return found


@contextmanager
def ray_head() -> Iterator[Head]:
    """Give a head with two CPUs on ports of its own; ended by SIGTERM of its own process, and of nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path: sockets lie below it
    port = free_port()
    flags = ["port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    ports = [f"--{flag}={free_port()}" for flag in flags]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={port}", f"--temp-dir={folder}", "--object-store-memory=200000000", *ports],
            env=environment(), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(url), "the head")
        assert process.poll() is None, (folder / "head.log").read_text()
        yield Head(url, folder)
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/jobs/", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
