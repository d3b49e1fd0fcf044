"""A small job that tells how long and how large the whole one will be: the same stages on a part of the corpus, timed.

Times of units come from when they were committed, so that what a stage costs once (a model loaded) is told from what it costs
by the row. Rows are the corpus's first ones; how many tokens all have is looked at separately.
"""

import io
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from actors.context import cache_folder, make_task
from actors.progress import StageProgress
from actors.units import Receipt
from engine.memory import CPU_TOKENS
from engine.methods.contract import Method, inverse_of, load_method
from engine.tasks.contract import Task, encode
from launch.config import Config, CorpusSection, make_config
from launch.job import score
from launch.solve_time import SolveTime, probe_settings, read_solve
from launch.sources import model_spec
from storage.gradients import SETTINGS_KEY, GradientStore, StoreSettings
from storage.locations import Location
from storage.readers import read_records

BATCHES = 24  # that the probe computes under each checkpoint
UNITS = 8  # that its rows are cut into
QUERIES = 256  # at most
COUNTED = 20_000  # records that are encoded to count examples and tokens; of more, so many evenly spread
FIRST = 500  # records that tell how long examples are


@dataclass(frozen=True)
class Counted:
    """How large a corpus is."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class StageTime:
    """What a stage of the probe took."""

    seconds: float
    each: float = 0.0  # seconds a unit, beyond what is done once for every checkpoint
    once: float = 0.0  # seconds of what is done once for every checkpoint
    units: int = 0


@dataclass(frozen=True)
class Probe:
    """What was measured, and of what."""

    rows: int
    tokens: int
    queries: int
    checkpoints: int
    shard_rows: int
    stages: dict[str, StageTime]  # ingest, start, collect, prepare, features, compute, score, other, index
    solve: SolveTime | None  # of a method with an inverse curvature
    bytes: dict[str, int]  # by folder of the run
    store: StoreSettings | None
    seen: dict[str, Any]  # what inspect found of the model
    peak_memory: int  # of a worker


@dataclass
class Timeline:
    """Listens to a job, and keeps when what happened."""

    began: float = field(default_factory=time.monotonic)
    said: float = 0.0  # when the job last said something before its first stage
    spans: dict[str, list[float]] = field(default_factory=dict)  # begin and end by stage
    done: dict[str, list[tuple[float, str]]] = field(default_factory=dict)  # when which unit was
    peak_memory: int = 0

    def say(self, _: str) -> None:
        if not self.spans:
            self.said = self._now()

    def listen(self, what: str, stage: str, receipt: Receipt | None) -> None:
        if what == "unit" and receipt is not None:
            self.done.setdefault(stage, []).append((self._now(), receipt.unit))
            self.peak_memory = max(self.peak_memory, receipt.peak_memory)
        else:
            self.spans.setdefault(stage, []).append(self._now())

    def progress(self) -> StageProgress:
        return StageProgress(Console(file=io.StringIO()), listen=self.listen)

    def stages(self, solves: bool = False) -> dict[str, StageTime]:
        """Return the time of every part of the job, which must have ended by now; together they are all of it."""
        ended = self._now()
        by_kind = {name.partition("-")[0]: name for name in self.spans}
        started = self.spans[by_kind["inspect"]][1] if "inspect" in by_kind else min(map(min, self.spans.values()))
        found = {"ingest": StageTime(self.said), "start": StageTime(started - self.said)}
        for kind in ("collect", "prepare", "compute", "score"):
            if kind in by_kind:
                found[kind] = self._stage(by_kind[kind])
        if solves:
            begins = [self.spans[by_kind[kind]][0] for kind in ("compute", "score") if kind in by_kind]
            features = sum(end - begin for name, (begin, end) in self.spans.items() if name.startswith("features-"))
            found["features"] = StageTime(features)
            found["solve"] = StageTime(min(begins) - self.spans[by_kind["prepare"]][1] - features)
        scored = self.spans[by_kind["score"]][1]
        found["index"] = StageTime(ended - scored)
        found["other"] = StageTime(ended - sum(stage.seconds for stage in found.values()))
        return found

    def _stage(self, name: str) -> StageTime:
        begin, end = self.spans[name]
        times = sorted(self.done.get(name, []))
        by_checkpoint: dict[str, list[float]] = {}
        for at, unit in times:
            by_checkpoint.setdefault(unit.rsplit("-", 3)[0], []).append(at)
        gaps = [b - a for own in by_checkpoint.values() for a, b in pairwise(own)]
        each = median(gaps) if gaps else 0.0
        once = max(0.0, end - begin - each * len(times)) / max(1, len(by_checkpoint))
        return StageTime(end - begin, each, once, len(times))

    def _now(self) -> float:
        return time.monotonic() - self.began


def count(section: CorpusSection, task: Task) -> Counted:
    """Return how many examples and tokens a source comes to: exact up to 20,000 records, of more estimated. Two readings."""

    def records() -> Iterable[Any]:
        return islice(read_records(section.path, split=section.split), section.limit)

    total = sum(1 for _ in records())
    step = max(1, total // COUNTED)
    rows = [row for record, _ in islice(records(), 0, None, step) for row in encode(task, record)]
    share = total / len(range(0, total, step))
    return Counted(round(len(rows) * share), round(sum(map(_length, rows)) * share))


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) if "input_ids" in row else 1


def take_probe(config: Config, folder: Path) -> Probe:
    """Run the job on the corpus's first rows in this folder and return what it took. Raises what the job raises."""
    assert config.queries is not None
    model, folders = model_spec(config, lambda _: None)
    task = make_task(model, folders[0], cache_folder())
    first = islice(read_records(config.corpus.path, split=config.corpus.split), FIRST)
    lengths = [_length(row) for record, _ in first for row in encode(task, record)]
    records = max(UNITS * 4, round(BATCHES * CPU_TOKENS * len(lengths) / max(1, sum(lengths))))
    method = load_method(config.method.name, config.method.settings())
    inverse = inverse_of(method)
    small = _small(config, method, model.checkpoints, folder / "run", min(records, config.corpus.limit or records))
    timeline = Timeline()
    label = score(small, timeline.say, timeline.progress())
    stages = timeline.stages(solves=inverse is not None)
    run = Location.parse(small.run.uri)
    solve = read_solve(run, label, stages["solve"].seconds) if inverse else None
    return _read_probe(run, small, stages, solve, timeline.peak_memory)


def _small(config: Config, method: Method, checkpoints: tuple[Any, ...], run: Path, records: int) -> Config:
    """Return the job on so many records under the first and the last checkpoint, by one worker of this machine.

    With an inverse curvature it has one block of queries.
    """
    ends = {one.name: one for one in (checkpoints[0], checkpoints[-1])}.values()
    data = config.model_dump(exclude_unset=True)
    data["run"] = {"uri": str(run), "seed": config.run.seed}
    listed = [{"path": one.uri, "learning_rate": one.learning_rate, "step": one.step} for one in ends]
    data["checkpoints"] = {"path": [{k: v for k, v in one.items() if v is not None} for one in listed]}
    data["corpus"] = data["corpus"] | {"limit": records}
    assert config.queries is not None
    inverse = inverse_of(method)
    most = inverse.query_block if inverse else QUERIES
    data["queries"] = data["queries"] | {"limit": min(config.queries.limit or most, most)}
    data["method"] = {"name": config.method.name, **config.method.settings(), **probe_settings(method)}
    data["gradients"] = data.get("gradients", {}) | {"shard_rows": max(1, records // UNITS)}
    cluster = {"device": config.cluster.device, "backend": config.cluster.backend, "workers": 1, "address": "local"}
    return make_config(data | {"cluster": cluster})


def _read_probe(
    run: Location, small: Config, stages: dict[str, StageTime], solve: SolveTime | None, peak_memory: int
) -> Probe:
    assert small.queries is not None
    segments = {name: _segments(run, name) for name in ("train", small.queries.name)}
    found = [key for key in run.list("stages") if key.endswith(".found.json")]
    sizes: dict[str, int] = {}
    for key in run.list():
        kind = _kind(key)
        sizes[kind] = sizes.get(kind, 0) + run.size(key)
    return Probe(
        rows=sum(one["rows"] for one in segments["train"]),
        tokens=sum(one["tokens"] for one in segments["train"]),
        queries=sum(one["rows"] for one in segments[small.queries.name]),
        checkpoints=len(run.list("checkpoints")),
        shard_rows=small.gradients.shard_rows or 1,
        stages=stages,
        solve=solve,
        bytes=sizes,
        store=GradientStore.open(run).settings if run.exists(SETTINGS_KEY) else None,
        seen=run.read_json(found[0]),
        peak_memory=peak_memory,
    )  # fmt: skip


def _kind(key: str) -> str:
    """Return under what the bytes of an object are counted."""
    folder, _, rest = key.partition("/")
    if not rest or rest == "store.json":
        return "other"
    if folder == "corpus":
        return f"corpus/{rest.partition('/')[0]}"
    return "answers" if rest.endswith("/answers.json") else folder


def _segments(run: Location, name: str) -> list[dict[str, Any]]:
    keys = [key for key in run.list(f"corpus/{name}") if key.endswith("/segment.json")]
    return [run.read_json(key) for key in keys]


def describe(probe: Probe) -> dict[str, Any]:
    """Return a probe as JSON can hold it."""
    return json.loads(json.dumps(asdict(probe)))
