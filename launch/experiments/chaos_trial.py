"""A run whose driver is a process of its own, and what is done to it: faults come when its journal has grown so far."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from launch.experiments.chaos_run import COUNTED, PACED, Corruption, corrupt, done_units, write_job
from launch.experiments.subjects import ROOT
from launch.status import status
from storage.locations import Location

SCRIPTS = ROOT / "launch"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"
}  # fmt: skip
HEALTH = {  # a hung node is given up after ten seconds rather than forty
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}
ACTOR = "ray::_Actor"  # a worker's process is called this
LOOK = 0.05  # seconds between two looks at the journal
PATIENCE = 300.0  # seconds without anything new after which a trial has failed
STOPS = 20  # times that drivers may stop by themselves


class Skipped(Exception):  # noqa: N818  it is what happened
    """This machine does not allow what a trial needs."""


@dataclass
class Place:
    """Where a run lies and its job works, and the faults that only this place has."""

    run: Location
    cluster: dict[str, Any] = field(default_factory=lambda: {"backend": "ray", "workers": 2})
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)  # what a driver is started through
    roots: Callable[[], list[int]] = list  # processes beside the driver that workers descend from
    faults: dict[str, Callable[["Trial"], bool]] = field(default_factory=dict)


def schedule(faults: dict[str, int], units: list[str], draw: random.Random) -> list[tuple[int, str]]:
    """Return when each fault comes, as a number of units done, and its kind, in that order.

    They are spread in random order over the stages that compute gradients, the first when one unit is done. If drivers are
    killed more than once, the last time is when all units are done, while the index is written.
    """
    kinds = [kind for kind, count in faults.items() for _ in range(count)]
    last = []
    if kinds.count("driver killed") > 1:
        kinds.remove("driver killed")
        last = [(sum(unit.startswith(COUNTED) for unit in units), "driver killed")]
    draw.shuffle(kinds)
    span = 0.95 * (sum(unit.startswith(PACED) for unit in units) - 1) / max(1, len(kinds))
    return [(1 + int((i + draw.random()) * span), kind) for i, kind in enumerate(kinds)] + last


class Trial:
    """Drivers of one run, one after the other, in its `with` block."""

    def __init__(self, folder: Path, place: Place, job: dict[str, Any], seed: str, pace: float) -> None:
        self.folder, self.place, self.run = folder, place, place.run
        self.random = random.Random(seed)
        self.corruptions: list[Corruption] = []
        self.damages: list[dict[str, Any]] = []  # that verifications named
        self.stops: list[str] = []  # the last words of drivers that stopped by themselves
        self.faults = {"worker killed": kill_worker, "driver killed": kill_driver, "object spoiled": spoil_object}
        self.faults |= place.faults
        self._pace = Path(job["task"]["settings"]["pace"])
        self._pace.write_text(str(pace))
        self._job = folder / "job.yaml"
        write_job(self._job, job | {"run": place.run.uri, "cluster": place.cluster})
        self._outputs: list[Path] = []
        self._seen: set[psutil.Process] = set()
        self.start()

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        self.remember()
        for process in self._seen:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def start(self) -> None:
        """Start a driver, as a person would: the same command every time."""
        output = self.folder / f"output.{len(self._outputs)}"
        command = [*self.place.command, sys.executable, str(SCRIPTS / "score.py"), str(self._job)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with output.open("wb") as file:
            self.driver = psutil.Popen(
                command, cwd=ROOT, env=environment | ENVIRONMENT | self.place.environment, stdout=file, stderr=file
            )
        self._outputs.append(output)
        self._seen.add(self.driver)

    def remember(self) -> None:
        """Note the driver's processes, so that none is left in the end."""
        with suppress(psutil.NoSuchProcess):
            self._seen |= set(self.driver.children(recursive=True))

    def goes_on(self) -> bool:
        """Return whether there is still work: False once a driver came to the end. One that stopped is started again."""
        ended = self.driver.poll()
        if ended == 0:
            return False
        if ended is not None:
            self.stops.append(self.last_words())
            if len(self.stops) > STOPS:
                raise OSError(f"the job stopped {len(self.stops)} times, last with: {self.stops[-1]}")
            self.start()
        return True

    def wait_for(self, true: Callable[[], Any], what: str) -> bool:
        """Wait until something is true, starting drivers that stop. False if the run came to its end before."""
        since, units = time.monotonic(), -1
        while not true():
            if not self.goes_on():
                return False
            now = len(done_units(self.run))
            if now != units:
                since, units = time.monotonic(), now
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(f"waited for {what} with {units} units done; {self.last_words()}")
            time.sleep(LOOK)
        return True

    def carry_out(self, plan: list[tuple[int, str]]) -> tuple[dict[str, int], int]:
        """Let the faults happen; return how many of each kind did, and how many units were done before the first."""
        counts: dict[str, int] = {}
        before = 0
        for units, kind in plan:
            if not self.wait_for(partial(self.has, units), f"{units} units"):
                break
            before = before or len(done_units(self.run))
            if self.faults[kind](self):
                counts[kind] = counts.get(kind, 0) + 1
        return counts, before

    def has(self, units: int) -> bool:
        return len(done_units(self.run)) >= units

    def finish(self) -> None:
        """Let the run come to its end without any more delay."""
        self._pace.unlink(missing_ok=True)
        self.wait_for(lambda: False, "the end")

    def verify(self) -> bool:
        """Do as `launch/status.py RUN --verify`: keep what it names and return whether all is well."""
        report = status(self.run, check=True)
        self.damages += report["verified"]["damages"]
        return bool(report["healthy"])

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the workers; those that are carrying out a unit first."""
        self.remember()
        found: list[tuple[bool, psutil.Process]] = []
        for root in [self.driver.pid, *self.place.roots()]:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(root).children(recursive=True):
                    name = _name(process)
                    if name.startswith(ACTOR):
                        found.append((not name.startswith(f"{ACTOR}.run"), process))
        return [process for _, process in sorted(found, key=lambda one: one[0])]

    def said(self) -> str:
        """Return all that the drivers printed."""
        return "".join(output.read_text(errors="replace") for output in self._outputs)

    def lost(self) -> int:
        """Return how many workers the drivers have said to be lost."""
        return self.said().count(": lost worker-")

    def last_words(self) -> str:
        lines = self._outputs[-1].read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "(nothing was printed)"

    def unnamed(self) -> list[str]:
        """Return the keys of spoiled objects that nobody named."""
        said = self.said()
        return [one.key for one in self.corruptions if not one.is_named(said, self.damages)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_worker(trial: Trial) -> bool:
    """Kill a worker, one that works if there is any; False if the run ended before."""
    if not trial.wait_for(trial.workers, "a worker"):
        return False
    alive = trial.workers()
    if not alive:
        return kill_worker(trial)
    victim = alive[0]
    victim.kill()
    gone, _ = psutil.wait_procs([victim], timeout=30)
    return bool(gone)


def kill_driver(trial: Trial) -> bool:
    """Kill the driver and start another at once; False if the run has come to its end."""
    trial.remember()
    if trial.driver.poll() is not None:
        return trial.goes_on() and kill_driver(trial)
    trial.driver.kill()
    trial.driver.wait()
    trial.start()
    return True


def spoil_object(trial: Trial) -> bool:
    """Flip a bit of a finished object, or cut it off, under the eyes of the driver."""
    trial.corruptions.append(corrupt(trial.run, trial.random, trial.corruptions))
    return True
