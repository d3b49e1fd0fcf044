"""How far a run is: which stages were declared, how many of their units are done, and whether a driver is at work."""

import datetime
import json
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil

from actors.plan import shards
from storage.corpus import Corpus
from storage.index import ScoreIndex
from storage.journal import LEASES, PATIENCE, Journal
from storage.locations import Location

NOTES = 20  # events that health shows


class RunProgress:
    """Watches a run. It remembers when the driver's counter last moved, as no two clocks can be compared."""

    def __init__(self, run: Location, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.clock = run, clock
        self._beat: tuple[Any, float] | None = None  # what the lease said, and when it first said so

    def read(self) -> dict[str, Any]:
        """Return state (waiting, running, finished or stalled), stages with units done, and when this was looked up."""
        stages = self.stages()
        complete = bool(stages) and all(stage["done"] == stage["units"] for stage in stages)
        scored = any(stage["stage"].startswith("index-") for stage in stages)
        if self._is_held():
            state = "running"
        elif complete and scored:
            state = "finished"
        else:
            state = "stalled" if self.run.exists("manifest.json") or stages else "waiting"
        return {"state": state, "stages": stages, "updated": datetime.datetime.now(datetime.UTC).isoformat()}

    def stages(self) -> list[dict[str, Any]]:
        """Return stage, done, units and rows done of every stage that the run declares, in the order of the job."""
        names = [key.removeprefix("stages/").removesuffix(".json") for key in self.run.list("stages")]
        found = [self._ingest(name) for name in names if name.startswith("ingest-")]
        finished = ScoreIndex.labels(self.run)
        for name in sorted(names):
            if name.startswith("collect-"):
                record = self.run.read_json(f"stages/{name}.json")
                count = len(self.run.list("checkpoints"))
                found.append(self._sharded(name, self.run, name.removeprefix("collect-"), record["shard_rows"], count))
        for name in sorted(names):
            if name.startswith("score-"):
                found += self._scoring(name.removeprefix("score-"), finished)
        return found

    def _ingest(self, name: str) -> dict[str, Any]:
        try:
            rows, done = Corpus.open(self.run, name.removeprefix("ingest-")).rows, 1
        except FileNotFoundError:
            rows, done = 0, 0
        return {"stage": name, "done": done, "units": 1, "rows": rows}

    def _scoring(self, label: str, finished: list[str]) -> list[dict[str, Any]]:
        record = self.run.read_json(f"stages/score-{label}.json")
        home = Location.parse(record["home"]) if record["home"] else self.run
        count, rows = len(record["checkpoints"]), record["shard_rows"]
        prepared = len(Journal(self.run, f"prepare-{label}").done())
        found = [{"stage": f"prepare-{label}", "done": prepared, "units": count, "rows": 0}]
        if not record["stored"]:
            found.append(self._sharded(f"compute-{label}", home, record["corpus"], rows, count))
        found.append(self._sharded(f"score-{label}", home, record["corpus"], rows, 1))
        found.append({"stage": f"index-{label}", "done": int(label in finished), "units": 1, "rows": 0})
        return found

    def _sharded(self, stage: str, home: Location, corpus: str, shard_rows: int, times: int) -> dict[str, Any]:
        try:
            pieces = shards(Corpus.open(home, corpus), shard_rows)
        except FileNotFoundError:
            pieces = []
        sizes = {(p["segment"], p["start"]): p["stop"] - p["start"] for p in pieces}
        done = Journal(self.run, stage).done()
        places = [unit.rsplit("-", 2)[1:] for unit in done]  # […-]<set>-<segment>-<start>
        rows = sum(sizes.get((segment, int(start)), 0) for segment, start in places)
        return {"stage": stage, "done": len(done), "units": len(pieces) * times, "rows": rows}

    def _is_held(self) -> bool:
        """Return whether a driver holds the run and shows signs of life."""
        numbers = [int(key.rpartition(".")[2]) for key in self.run.list(LEASES) if "/lease." in key]
        if not numbers:
            return False
        holder = self.run.read_json(f"{LEASES}/lease.{max(numbers)}")
        if holder["released"]:
            return False
        if holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"]):
            return False
        sign = (max(numbers), holder["counter"])
        if self._beat is None or self._beat[0] != sign:
            self._beat = (sign, self.clock())
        return self.clock() - self._beat[1] <= PATIENCE


def health(run: Location) -> dict[str, Any]:
    """Return how many events of each kind (failed, lost, quarantined) a run has seen, and the latest ones."""
    lines = [line for key in run.list("events") for line in run.read(key).decode().splitlines()]
    events = sorted((json.loads(line) for line in lines), key=lambda event: event["time"])
    shown = ("time", "kind", "stage", "unit", "error", "reason")
    latest = [{name: event[name] for name in shown if name in event} for event in events[-NOTES:]]
    return {"events": dict(Counter(event["kind"] for event in events)), "latest": latest}
