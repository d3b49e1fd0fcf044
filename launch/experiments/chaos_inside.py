"""Chaos in this process: faults that are injected into the workers of an in-process pool, and into writing to the disk."""

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from actors.context import WorkerContext
from actors.run_stage import StageStopped
from actors.units import Receipt, Unit
from actors.worker import UNIT_FUNCTIONS
from launch.config import make_config
from launch.experiments.chaos_run import Corruption, corrupt, done_units, make_job, undisturbed, verdict
from launch.experiments.chaos_trial import STOPS, schedule
from launch.job import score
from storage import local
from storage.locations import Location
from storage.verify import verify


class Killed(BaseException):
    """Ends the driver in the middle of a unit."""


@dataclass
class Injected:
    """What is to happen to a run, and what has."""

    run: Location
    plan: list[tuple[int, str]]
    random: random.Random
    counts: dict[str, int] = field(default_factory=dict)
    before: int = 0  # units done before the first fault
    corruptions: list[Corruption] = field(default_factory=list)
    full: str | None = None  # the unit that meets a full disk, until the driver stops for it

    def around(self, function: Callable[..., Receipt]) -> Callable[..., Receipt]:
        """Return a unit function that fails when it is time to."""

        def failing(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
            kind = self._due()
            if kind == "object spoiled":
                self.corruptions.append(corrupt(self.run, self.random, self.corruptions))
            if kind == "request failed":
                raise OSError(errno.EIO, "the connection was reset")
            if kind == "disk filled":
                self.full = unit.key
            with patch.object(local, "_link", no_space) if self.full == unit.key else unchanged():
                receipt = function(context, settings, unit)
            if kind == "worker killed":  # all is written, and nobody knows
                raise SystemExit(137)
            if kind == "driver killed":
                raise Killed
            return receipt

        return failing

    def _due(self) -> str | None:
        done = len(done_units(self.run))
        if self.full or not self.plan or done < self.plan[0][0]:
            return None
        _, kind = self.plan.pop(0)
        self.before = self.before or done
        if kind != "object spoiled":
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return kind


def no_space(*_: Any) -> bool:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def unchanged() -> Iterator[None]:
    yield


def run_inside(config: dict[str, Any], cell: str) -> dict[str, Any]:
    """Carry out a cell's faults on a run of an in-process pool; return what came of it."""
    memory = Path("/dev/shm")  # where there is one: nothing here depends on a disk
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        job = make_job(folder, config)
        expected = undisturbed(folder, job)
        run = Location.parse(str(folder / "run"))
        draw = random.Random(cell)
        injected = Injected(run, schedule(config["faults"], expected.records, draw), draw)
        stops = drive(injected, job)
        for _ in range(config["spoiled_at_rest"]):
            injected.corruptions.append(corrupt(run, draw, injected.corruptions))
        named = verify(run).damages
        stops += drive(injected, job)
        damages = [{"key": one.key, "unit": one.unit} for one in named]
        said = "\n".join(stops)
        return {
            "faults": {**injected.counts, "object spoiled": len(injected.corruptions)},
            "units_before_the_first": injected.before,
            "stops": [" ".join(stop.replace(name, "").split())[:200] for stop in stops],
            "unnamed": [one.key for one in injected.corruptions if not one.is_named(said, damages)],
            "whole": not verify(run).damages,
            **verdict(run, expected),
        }


def drive(injected: Injected, job: dict[str, Any]) -> list[str]:
    """Run the job again and again until it comes to its end; return what it stopped with."""
    stops: list[str] = []
    config = make_config(job | {"run": injected.run.uri, "cluster": {"backend": "in-process", "workers": 2}})
    stages = {name: injected.around(UNIT_FUNCTIONS[name]) for name in ("collect", "compute", "prepare", "score")}
    with patch.dict(UNIT_FUNCTIONS, stages):
        while len(stops) <= STOPS:
            try:
                score(config, lambda _: None)
                return stops
            except Killed:
                continue
            except (OSError, StageStopped) as error:
                stops.append(str(error))
                injected.full = None
    raise OSError(f"the job stopped {len(stops)} times, last with: {stops[-1]}")
