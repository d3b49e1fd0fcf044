"""How far a run is and how it does, from what stands in it alone: stages, their units and rows, the driver, what went wrong."""

import datetime
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from actors.plan import shards
from actors.specs import digest
from storage.corpus import Corpus
from storage.index import ScoreIndex
from storage.journal import Journal
from storage.leases import Drivers
from storage.locations import Location

NOTES = 20  # events that health shows


@dataclass(frozen=True)
class StageState:
    """How far one stage is. `bad` and `age` are looked up on request: they cost a read for every unit done."""

    stage: str
    done: int  # units
    units: int
    rows: int  # done
    damaged: int = 0  # units that were done, and are to be made anew
    bad: int | None = None  # rows set aside as not finite
    age: float | None = None  # seconds since a unit was last done, by the clocks of driver and reader


class RunWatch:
    """Watches a run. It remembers when its drivers' counters last moved, as no two clocks can be compared."""

    def __init__(self, run: Location, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self._drivers = Drivers(run, clock)

    def read(self) -> dict[str, Any]:
        """Return state (waiting, running, finished or stalled), stages with units done, and when this was looked up."""
        found = stages(self.run)
        complete = bool(found) and all(stage.done == stage.units for stage in found)
        scored = any(stage.stage.startswith("index-") for stage in found)
        if self._drivers.living():
            state = "running"
        elif complete and scored:
            state = "finished"
        else:
            state = "stalled" if self.run.exists("manifest.json") or found else "waiting"
        now = datetime.datetime.now(datetime.UTC).isoformat()
        rows = [{name: value for name, value in asdict(one).items() if value is not None} for one in found]
        return {"state": state, "stages": rows, "updated": now}


def drivers(run: Location) -> list[dict[str, Any]]:
    """Return the leases that are not over, each with its number.

    `gone`: its process ran on this very host and is no more.
    """
    known = Drivers(run)
    leases = [known.lease(number) | {"number": number} for number in known.numbers()]
    return [one | {"gone": known.process_is_gone(one)} for one in leases if not one["released"]]


def stages(run: Location, detail: bool = False, now: Callable[[], float] = time.time) -> list[StageState]:
    """Return every stage that the run declares, in the order of the job; with `detail` bad rows and age too."""
    names = [key.removeprefix("stages/").removesuffix(".json") for key in run.list("stages")]
    found = [_ingest(run, name) for name in names if name.startswith("ingest-")]
    finished = ScoreIndex.labels(run)
    for name in sorted(names):
        if name.startswith("collect-"):
            record = run.read_json(f"stages/{name}.json")
            count = len(run.list("checkpoints"))
            found.append(_sharded(run, name, run, name.removeprefix("collect-"), record["shard_rows"], count))
    for name in sorted(names):
        if name.startswith("features-"):
            record, corpus = run.read_json(f"stages/{name}.json"), feature_set(name)
            home = Location.parse(record["home"]) if record.get("home") else run
            found.append(_sharded(run, name, home, corpus, record["shard_rows"], 1))
    for name in sorted(names):
        if name.startswith("score-"):
            found += _scoring(run, name.removeprefix("score-"), finished)
    return [_in_detail(run, one, now) for one in found] if detail else found


def feature_set(stage: str) -> str:
    """Return the set whose features a stage makes: features-<set>-<hash of all that they depend on>."""
    return stage.removeprefix("features-").rpartition("-")[0]


def _ingest(run: Location, name: str) -> StageState:
    damaged = len(Journal(run, name).damaged())
    try:
        return StageState(name, 1 - bool(damaged), 1, Corpus.open(run, name.removeprefix("ingest-")).rows, damaged)
    except FileNotFoundError:
        return StageState(name, 0, 1, 0, damaged)


def _scoring(run: Location, label: str, finished: list[str]) -> list[StageState]:
    record = run.read_json(f"stages/score-{label}.json")
    home = Location.parse(record["home"]) if record["home"] else run
    count, rows = len(record["checkpoints"]), record["shard_rows"]
    prepare = Journal(run, f"prepare-{label}")
    found = [StageState(f"prepare-{label}", len(prepare.done()), count, 0, len(prepare.damaged()))]
    if record["method"] == "representer":
        head = Journal(run, f"head-{label}")
        found.insert(0, StageState(f"head-{label}", len(head.done()), 1, 0, len(head.damaged())))
    if not record["stored"]:
        found.append(_sharded(run, f"compute-{label}", home, record["corpus"], rows, count))
    found.append(_sharded(run, f"score-{label}", home, record["corpus"], rows, 1))
    damaged = len(Journal(run, f"index-{label}").damaged())
    return [*found, StageState(f"index-{label}", int(label in finished and not damaged), 1, 0, damaged)]


def _sharded(run: Location, stage: str, home: Location, corpus: str, shard_rows: int, times: int) -> StageState:
    try:
        pieces = shards(Corpus.open(home, corpus), shard_rows)
    except FileNotFoundError:
        pieces = []
    sizes = {(p["segment"], p["start"]): p["stop"] - p["start"] for p in pieces}
    journal = Journal(run, stage)
    done = journal.done()
    places = [unit.rsplit("-", 2)[1:] for unit in done]  # […-]<set>-<segment>-<start>
    rows = sum(sizes.get((segment, int(start)), 0) for segment, start in places)
    return StageState(stage, len(done), len(pieces) * times, rows, len(journal.damaged()))


def _in_detail(run: Location, stage: StageState, now: Callable[[], float]) -> StageState:
    records = [record for _, record in Journal(run, stage.stage).done().items()]
    bad = {row for record in records for row in record.get("quarantined", {})}
    times = [record["committed"] for record in records if "committed" in record]
    age = round(now() - max(times), 1) if times else None
    return StageState(**asdict(stage) | {"bad": len(bad), "age": age})


def altered_records(run: Location) -> dict[str, str]:
    """Return what is wrong with the records of identity, checkpoints and stages, by key: they carry a hash each."""
    wrong = {}
    for key in ["manifest.json", *run.list("checkpoints"), *run.list("stages")]:
        try:
            record = run.read_json(key)
        except FileNotFoundError:
            wrong[key] = "is missing"
        except OSError:
            wrong[key] = "does not parse"
        else:
            if not key.endswith(".found.json") and record.pop("hash", None) != digest(record):
                wrong[key] = "is altered: its hash is not the one recorded"
    return wrong


def health(run: Location) -> dict[str, Any]:
    """Return how many events of each kind (failed, lost, quarantined) a run has seen, and the latest ones."""
    lines = [line for key in run.list("events") for line in run.read(key).decode().splitlines()]
    events = sorted((json.loads(line) for line in lines), key=lambda event: event["time"])
    shown = ("time", "kind", "stage", "unit", "error", "reason")
    latest = [{name: event[name] for name in shown if name in event} for event in events[-NOTES:]]
    return {"events": dict(Counter(event["kind"] for event in events)), "latest": latest}
