"""The job: from a config to a scored, indexed run. Every stage can be killed and run again.

ingest → inspect → collect → prepare → score → index
"""

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from actors.cluster import connect, resources, worker_plan
from actors.context import make_task
from actors.index import IndexJob, build_index, build_neighbour_index
from actors.plan import checkpoint_units, shard_rows, shard_units, shards
from actors.pool import InProcessPool, Pool
from actors.progress import StageProgress
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.schedule import Limits
from actors.specs import CheckpointSpec, GradientSpec, ModelSpec, ScoreSpec, declare_stage, digest
from actors.units import Stage, Unit
from actors.worker import MakeWorker
from engine.methods.contract import load_method
from engine.projection import Projection
from engine.tasks.contract import Task, encode
from launch.config import Config, CorpusSection
from storage.checkpoints import find_checkpoints, fingerprint
from storage.corpus import Corpus, ingest
from storage.gradients import GradientStore, StoreSettings
from storage.journal import EventLog, Journal, RunLease
from storage.locations import Location
from storage.readers import read_records

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
TRAIN = "train"


@dataclass
class Job:
    """A running job: the config, its run, and what the stages share."""

    config: Config
    run: Location
    pool: Pool
    model: ModelSpec
    progress: StageProgress
    events: EventLog
    lease: RunLease

    def stage(self, name: str, function: str, settings: dict[str, Any], units: list[Unit]) -> None:
        """Run one stage to its end."""
        self.lease.check()
        limits = Limits(max_bad_fraction=self.config.cluster.max_bad_fraction)
        stage = Stage(name, function, settings, units)
        run_stage(self.pool, stage, Journal(self.run, name), self.progress, self.events, limits)


def score(config: Config, say: Callable[[str], None] = print) -> str:
    """Run the whole job and return the label of its scores.

    Raises ValueError for a mistake in config or data, OSError for storage, StageStopped when a stage gives up; the same
    call then resumes.
    """
    if config.queries is None:
        raise ValueError("queries is missing: say which predictions are asked about, for example queries: test.jsonl")
    run = Location.parse(config.run.uri)
    run.probe()
    with RunLease(run) as lease:
        model, folder = model_spec(config)
        task = make_task(model, folder, cache_folder())
        home = Location.parse(config.run.store) if config.run.store else run
        if config.run.store is None:
            ingest_set(run, TRAIN, config.corpus, task, say)
        ingest_set(run, config.queries.name, config.queries, task, say)
        record_identity(run, config, model)
        with worker_pool(config, run) as pool, EventLog(run, socket.gethostname()) as events:
            job = Job(config, run, pool, model, StageProgress(), events, lease)
            seen = inspect(job, say)
            gradients = gradient_spec(config, seen)
            if config.gradients.store and config.run.store is None:
                collect(job, gradients, seen)
            return score_and_index(job, gradients, seen, home, say)


def cache_folder() -> Path:

    return Path(tempfile.gettempdir()) / "influence-engine"


def model_spec(config: Config) -> tuple[ModelSpec, Path]:
    """Return the model's checkpoints with their learning rates and fingerprints, and the first one's local folder."""
    given = config.checkpoints.path
    if given is None:
        raise ValueError("checkpoints is missing: name a Trainer output folder, a model folder, or a list")
    found = find_checkpoints(given, config.checkpoints.learning_rate)
    folders = [c.path.fetch(cache_folder()) for c in found]
    specs = tuple(
        CheckpointSpec(c.name, c.path.uri, c.step, float(c.learning_rate or 0.0), fingerprint(folder))
        for c, folder in zip(found, folders, strict=True)
    )
    model = ModelSpec(
        config.task.name, config.task.settings, specs, config.gradients.compute, config.gradients.attention
    )
    return model, folders[0]


def ingest_set(run: Location, name: str, section: CorpusSection, task: Task, say: Callable[[str], None]) -> None:
    """Stage 0: stream records once into rows. A set that is already there stays as it is."""
    records = islice(read_records(section.path, split=section.split), section.limit)
    report = ingest(run, name, records, lambda record: encode(task, record))
    say(
        f"{name}: {report.examples:,} examples of {report.documents:,} records, {report.tokens:,} tokens, "
        f"{report.truncated:,} truncated, {report.chunked:,} chunked"
    )


@contextmanager
def worker_pool(config: Config, run: Location) -> Iterator[Pool]:
    """Give the pool that the config asks for."""
    cluster = config.cluster
    if cluster.backend == "in-process":
        with InProcessPool(MakeWorker(run.uri, "cpu")) as pool:
            yield pool
        return
    connect(cluster.address or "auto")
    plan = worker_plan(cluster.workers, cluster.device, resources())
    device = "cuda" if plan.gpus else "cpu"
    with RayPool(MakeWorker(run.uri, device), plan.count, plan.cpus, plan.gpus) as ray_pool:
        yield ray_pool


def inspect(job: Job, say: Callable[[str], None]) -> dict[str, Any]:
    """Let a worker load the model once and say what it found: parameters, layout, coverage."""
    config = job.config
    settings = {
        "modules": config.gradients.modules,
        "projection": asdict(projection(config)),
        "stored": config.gradients.store or config.gradients.projection != "none",
        "coverage": config.gradients.coverage,
        "checkpoints": [c.fingerprint for c in job.model.checkpoints],
        "model": job.model.record(),
    }
    name = f"inspect-{digest(settings)[:6]}"
    declare_stage(job.run, name, settings)
    key = f"stages/{name}.found.json"
    carried = settings | {
        "model": job.model,
        "projection": projection(config),
        "home": config.run.store,
        "corpus": TRAIN,
    }
    job.stage(name, "inspect", carried, [Unit("model", {"key": key})])
    seen = job.run.read_json(key)
    say(f"{len(seen['parameters'])} parameters looked at, {sum(seen['sizes']):,} of {seen['model_size']:,} numbers")
    if seen["coverage"]:
        share = seen["coverage"]["share"]
        say(
            f"coverage: they carry {share:.1%} of the gradient that training used ({seen['coverage']['examples']} examples)"
        )
        if share < 0.95:
            missing = ", ".join(f"{n} {s:.1%}" for n, s in seen["coverage"]["missing"])
            say(f"warning: coverage below 95 %. Not looked at: {missing}. Widen gradients.modules if that matters.")
    return seen


def projection(config: Config) -> Projection:
    g = config.gradients
    return Projection(g.projection, g.dim, config.run.seed)


def gradient_spec(config: Config, seen: dict[str, Any]) -> GradientSpec:
    g = config.gradients
    return GradientSpec(tuple(seen["parameters"]), projection(config), g.norms, g.token_budget)


def record_identity(run: Location, config: Config, model: ModelSpec) -> None:
    """Write what the run is about, or refuse a config that is about something else; and every checkpoint's own file."""
    settings = {k: v for k, v in config.task.settings.items() if k not in ("tokenizer", "model")}
    declare_stage(run, "identity", {"task": config.task.name, "settings": settings})
    for checkpoint in model.checkpoints:
        run.create_json(f"checkpoints/{checkpoint.name}.json", asdict(checkpoint))


def collect(job: Job, gradients: GradientSpec, seen: dict[str, Any]) -> None:
    """Stage 1: every checkpoint's gradient rows of every shard into the store."""
    config, corpus = job.config.gradients, Corpus.open(job.run, TRAIN)
    columns, itemsize = sum(seen["arrays"].values()), _ITEMSIZE[config.dtype]
    rows = config.shard_rows or shard_rows(corpus, seen["model_size"], columns, itemsize)
    store = GradientStore.create(
        job.run,
        StoreSettings(
            arrays=seen["arrays"], ranges=seen["ranges"], modules=seen["parameters"], dtype=config.dtype,
            compression=config.compression, norms=config.norms,
            extra={"projection": asdict(gradients.projection), "architecture": seen["architecture"], "shard_rows": rows},
        ),
    )  # fmt: skip
    for checkpoint in job.model.checkpoints:
        for segment in corpus.segments:
            store.prepare(TRAIN, checkpoint.name, segment.name, segment.rows, rows)
    declare_stage(
        job.run, f"collect-{TRAIN}",
        {"model": job.model.record(), "gradients": asdict(gradients), "shard_rows": rows, "dtype": config.dtype},
    )  # fmt: skip
    names = tuple(c.name for c in job.model.checkpoints)
    settings = {"model": job.model, "gradients": gradients}
    job.stage(f"collect-{TRAIN}", "collect", settings, checkpoint_units(names, shards(corpus, rows), TRAIN))


def score_and_index(
    job: Job, gradients: GradientSpec, seen: dict[str, Any], home: Location, say: Callable[[str], None]
) -> str:
    """Stages 2 to 4: prepare the queries, score every shard, merge into the index."""
    config = job.config
    assert config.queries is not None
    method = load_method(config.method.name, config.method.settings())
    names = tuple(job.model.checkpoints[i].name for i in method.checkpoints(len(job.model.checkpoints)))
    stored = config.gradients.store
    corpus = Corpus.open(home, TRAIN)
    rows = _score_shard_rows(job, home, corpus, seen, stored)
    what: dict[str, Any] = {
        "method": config.method.name, "method_settings": config.method.settings(), "checkpoints": names,
        "queries": config.queries.name, "corpus": TRAIN, "home": config.run.store, "stored": stored,
        "top_k": config.output.top_k, "dense": config.output.dense,
    }  # fmt: skip
    record = what | {"gradients": asdict(gradients), "model": job.model.record(), "shard_rows": rows}
    label = config.output.label or f"{config.method.name}-{config.queries.name}-{digest(record)[:6]}"
    declare_stage(job.run, f"score-{label}", record)
    spec = ScoreSpec(label=label, **what)
    settings = {"model": job.model, "gradients": gradients, "score": spec}
    job.stage(f"prepare-{label}", "prepare", settings, [Unit(name, {"checkpoint": name}) for name in names])
    pieces = shards(corpus, rows)
    if not stored:
        job.stage(f"compute-{label}", "compute", settings, checkpoint_units(names, pieces, TRAIN))
    job.stage(f"score-{label}", "score", settings, shard_units(pieces, TRAIN))
    index = IndexJob(job.run, job.model, spec, method.score_unit, "document", asdict(gradients.projection), pieces)
    build_index(index)
    if config.output.neighbours != "exact":
        build_neighbour_index(index, config.output.neighbours, say)
    return label


def _score_shard_rows(job: Job, home: Location, corpus: Corpus, seen: dict[str, Any], stored: bool) -> int:
    if stored:
        return int(GradientStore.open(home).settings.extra["shard_rows"])
    return job.config.gradients.shard_rows or shard_rows(corpus, seen["model_size"], 0, 4)
