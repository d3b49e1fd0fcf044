"""The job: from a config to a scored, indexed run. Every stage can be killed and run again.

ingest → inspect → collect → prepare → (solve) → score → index
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.cluster import connect, nodes, resources, worker_plan
from actors.context import cache_folder, make_task
from actors.index import Fields, IndexJob
from actors.metrics import JobMetrics
from actors.plan import checkpoint_units, shard_rows, shard_units, shards
from actors.pool import InProcessPool, Pool
from actors.progress import StageProgress, StageReport, report_table
from actors.ray_pool import RayPool
from actors.run_stage import run_stage
from actors.schedule import Limits
from actors.solve import refuse_unfit, solve
from actors.solve_job import SolveJob
from actors.specs import GradientSpec, ModelSpec, declare_stage, digest
from actors.states import gradients_key, state_key
from actors.units import Receipt, Stage, Unit
from actors.worker import MakeWorker
from engine.knn import faiss_module
from engine.memory import CPU_TOKENS
from engine.methods.contract import Method, inverse_of, load_method
from engine.projection import Projection
from engine.tasks.contract import Task
from launch.config import Config
from launch.forward import check_forward, one_of_each_training, score_forward
from launch.influence import about_solve, check_rows, choose_candidates, default_modules, solved_sizes
from launch.messages import tell
from launch.multistage import PRETRAIN, open_stages, score_stages
from launch.paths import refuse_relative_paths, refuse_unseen_paths
from launch.scoring import declare_scores
from launch.sources import TRAIN, ingest_set, model_spec, record_identity, same_model
from launch.stage_records import LeasedJournal, finish_index
from storage.corpus import Corpus
from storage.damage import noting_damage
from storage.gradients import SETTINGS_KEY, GradientStore, StoreSettings
from storage.journal import EventLog, Journal
from storage.leases import Claim, RunLease, UnitClaims
from storage.locations import Location
from storage.readers import source_files

_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


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
    fields: Fields
    folders: list[Path]  # of the checkpoints, on this machine
    reports: list[StageReport] = field(default_factory=list)
    metrics: JobMetrics | None = None  # None without Ray

    def stage(self, name: str, function: str, settings: dict[str, Any], units: list[Unit]) -> None:
        """Run one stage to its end."""
        limits = Limits(max_bad_fraction=self.config.cluster.max_bad_fraction)
        journal = LeasedJournal(Journal(self.run, name), self.lease)
        damaged = [unit.key for unit in units if unit.key in set(journal.journal.damaged())]
        stage = Stage(name, function, settings | {"claim": Claim(name, self.lease.number)}, units)
        claims = UnitClaims(self.lease, journal.journal)

        def take(receipt: Receipt | None) -> None:
            if self.metrics:
                self.metrics.state(name, len(units), self.progress.done, len(self.pool.workers))
                if receipt:
                    self.metrics.count(name, receipt)

        report = run_stage(self.pool, stage, journal, self.progress, self.events, limits, take=take, claims=claims)
        take(None)
        self.reports.append(report)
        journal.say_rebuilt(damaged, self.progress.note)


def score(config: Config, say: Callable[[str], None] = tell, progress: StageProgress | None = None) -> str:
    """Run the whole job and return the label of its scores; `progress` shows it, on standard error by default.

    Raises ValueError for a mistake in config or data, OSError for storage, StageStopped when a stage gives up; the same
    call then resumes. What can be known to be wrong before anything is written is refused without a run.
    """
    refuse_relative_paths(config)
    method = load_method(config.method.name, config.method.settings())
    config = one_of_each_training(config, method, say)
    if config.queries is None:
        raise ValueError("queries is missing: say which predictions are asked about, for example queries: test.jsonl")
    model, folders = model_spec(config, say)
    check_method(method, model, config)
    check_rows(method, config, say)
    check_forward(method, config, model, folders, say)
    task = make_task(model, folders[0], cache_folder())
    stages = open_stages(config, model, folders, task, say)
    for source in [config.queries] if config.run.store else [config.corpus, config.queries]:
        source_files(source.path)  # raises if there are none
    run = Location.parse(config.run.uri)
    run.probe()
    with RunLease(run) as lease, noting_damage(run):
        home = Location.parse(config.run.store) if config.run.store else run
        with lease.turn("ingest", say):
            run.sweep()
            record_identity(run, model, folders[0], task)
            if config.run.store:
                same_model(home, run, model)
            else:
                ingest_set(run, TRAIN, config.corpus, task, config.task.name, folders[0], say, lease.check)
            ingest_set(run, config.queries.name, config.queries, task, config.task.name, folders[0], say, lease.check)
            if stages:
                stages.ingest(run, say, lease.check)
        driver = f"{socket.gethostname()}-{lease.number}"  # never two at once under one name
        models = [model, stages.model] if stages else [model]
        with worker_pool(config, run, models) as pool, EventLog(run, driver) as events:
            job = Job(config, run, pool, model, progress or StageProgress(), events, lease, shown_fields(task), folders)
            job.metrics = JobMetrics(run.uri) if isinstance(pool, RayPool) else None
            if method.reads != "gradients":
                return reported(job, score_forward(job, home, say))
            if stages:
                looked = [
                    inspect(one, say, list(weights), corpus)
                    for one, weights, corpus in (
                        (job, stages.weights.finetuning, TRAIN),
                        (replace(job, model=stages.model), stages.weights.pretraining, PRETRAIN),
                    )
                ]
                joint, before = (gradient_spec(config, seen, pool.device) for seen in looked)
                return reported(job, score_stages(job, stages, (joint, before), say))
            seen = inspect(job, say)
            gradients = gradient_spec(config, seen, pool.device)
            if inverse := inverse_of(method):
                refuse_unfit(inverse, solved_sizes(inverse, seen), Corpus.open(run, config.queries.name).rows)
            if config.gradients.store and config.run.store is None:
                collect(job, gradients, seen)
            if config.gradients.store and config.run.store:
                check_store(config, home, seen)
            return reported(job, score_and_index(job, gradients, seen, home, say))


def reported(job: Job, label: str) -> str:
    """Print what the stages did, and return the label."""
    looked = [report for report in job.reports if not report.stage.startswith("inspect-")]  # it has no rows
    job.progress.console.print(report_table(looked))
    return label


def shown_fields(task: Task) -> Fields:
    """Return the record's fields that answers show: those that the task reads, else `text` and `label`."""
    label = getattr(task, "label_field", None) or getattr(task, "target_field", None) or "label"
    return Fields(getattr(task, "text_field", None) or "text", label)


def check_method(method: Method, model: ModelSpec, config: Config) -> None:
    """Refuse a method that asks for a checkpoint, an η or norms that are not there. Raises ValueError naming it."""
    taken = [model.checkpoints[i] for i in method.checkpoints(len(model.checkpoints))]
    unknown = [c.name for c in taken if c.learning_rate is None]
    if method.weighs_by_learning_rate and unknown:
        raise ValueError(f"the learning rate of {unknown[0]} is not known: set checkpoints.learning_rate")
    if method.weighs_by_learning_rate and not any(c.learning_rate for c in taken):
        raise ValueError(
            "all learning rates are 0, so every score would be: set learning_rate in the list of checkpoints"
        )
    if config.output.neighbours != "exact":
        if not config.gradients.store:
            raise ValueError(f"output.neighbours={config.output.neighbours} needs rows: set gradients.store=true")
        faiss_module()
    if method.needs_norms and not config.gradients.norms:
        raise ValueError(f"gradients.norms=False is not allowed with method {config.method.name}: it needs exact norms")


@contextmanager
def worker_pool(config: Config, run: Location, models: list[ModelSpec]) -> Iterator[Pool]:
    """Give the pool that the config asks for."""
    cluster = config.cluster
    if cluster.backend == "in-process":
        workers = cluster.workers if isinstance(cluster.workers, int) else 1
        with InProcessPool(MakeWorker(run.uri, "cpu"), workers) as pool:
            yield pool
        return
    if connect(cluster.address or "auto") and len(nodes()) > 1:
        refuse_unseen_paths(run, models, config.run.store)
    plan = worker_plan(cluster.workers, cluster.device, resources())
    device = "cuda" if plan.gpus else "cpu"
    with RayPool(MakeWorker(run.uri, device), plan.count, plan.cpus, plan.gpus, plan.most) as ray_pool:
        yield ray_pool


def inspect(
    job: Job, say: Callable[[str], None], modules: list[str] | None = None, corpus: str = TRAIN
) -> dict[str, Any]:
    """Let a worker load the model once and say what it found: parameters (or those of `modules`), layout, coverage."""
    config = job.config
    settings = {
        "modules": modules or config.gradients.modules or default_modules(config),
        "projection": asdict(projection(config)),
        "stored": config.gradients.store or config.gradients.projection != "none",
        "coverage": config.gradients.coverage,
        "token_budget": config.gradients.token_budget,
        "norms": config.gradients.norms,
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
        "corpus": corpus,
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
        if silent := seen["coverage"]["silent"]:
            more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
            say(
                f"warning: the gradient of {', '.join(silent[:5])}{more} is zero on all {seen['coverage']['examples']} "
                f"examples, so these add nothing (a LoRA A while its B is still zero, an expert that none of them met)."
            )
    if seen["alone"]:
        say(f"every example is run alone, which is slower: {seen['alone']}")
    return seen


def projection(config: Config) -> Projection:
    g = config.gradients
    return Projection(g.projection, g.dim, config.run.seed)


def gradient_spec(config: Config, seen: dict[str, Any], device: str) -> GradientSpec:
    g = config.gradients
    budget = seen["token_budget"] if g.token_budget == "auto" else g.token_budget
    if g.token_budget == "auto" and device == "cpu":
        budget = min(budget, CPU_TOKENS)  # a GPU may have looked at the model
    if seen["alone"]:
        budget = 1  # of one token: a batch for every example
    return GradientSpec(tuple(seen["parameters"]), projection(config), g.norms, budget)


def store_settings(config: Config, seen: dict[str, Any], shard_rows: int) -> StoreSettings:
    """Return what every row of this job's store has in common."""
    g = config.gradients
    return StoreSettings(
        arrays=seen["arrays"], ranges=seen["ranges"], modules=seen["parameters"], dtype=g.dtype,
        compression=g.compression, norms=g.norms,
        extra={"projection": g.projection, "dim": g.dim, "seed": config.run.seed, "shard_rows": shard_rows},
    )  # fmt: skip


def check_store(config: Config, home: Location, seen: dict[str, Any]) -> None:
    """Refuse another run's store whose rows are not what this job's queries would be. Raises StoreMismatch."""
    store = GradientStore.open(home)
    own = store_settings(config, seen, store.settings.extra["shard_rows"])
    store.check(replace(own, dtype=store.settings.dtype, compression=store.settings.compression))


def collect(job: Job, gradients: GradientSpec, seen: dict[str, Any]) -> None:
    """Stage 1: every checkpoint's gradient rows of every shard into the store."""
    config, corpus = job.config.gradients, Corpus.open(job.run, TRAIN)
    columns, itemsize = sum(seen["arrays"].values()), _ITEMSIZE[config.dtype]
    rows = config.shard_rows or _stored_shard_rows(job.run) or shard_rows(corpus, seen["model_size"], columns, itemsize)
    store = GradientStore.create(job.run, store_settings(job.config, seen, rows))
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
    method = load_method(config.method.name, config.method.settings())
    stored = config.gradients.store
    corpus = Corpus.open(home, TRAIN)
    rows = _score_shard_rows(job, home, corpus, seen, stored)
    spec = declare_scores(job, gradients, corpus, rows, stored)
    label, names = spec.label, spec.checkpoints
    settings = {"model": job.model, "gradients": gradients, "score": spec}
    pieces, inverse = shards(corpus, rows), inverse_of(method)
    key = gradients_key if inverse else state_key
    units = [Unit(name, {"checkpoint": name, "key": key(label, name)}) for name in names]
    job.stage(f"prepare-{label}", "prepare", settings, units)
    if inverse:
        notes = LeasedJournal(Journal(job.run, f"solve-{label}"), job.lease)
        chosen = choose_candidates(job, notes, spec, gradients, corpus, rows, say)
        with job.lease.turn(f"solve-{label}", say):
            solve(
                SolveJob(
                    job.run, job.pool, notes, job.stage, job.lease.check, job.events, say, job.model, gradients, spec,
                    inverse, corpus, solved_sizes(inverse, seen), pieces, rows, chosen,
                )
            )  # fmt: skip
    if not stored:
        job.stage(f"compute-{label}", "compute", settings, checkpoint_units(names, pieces, TRAIN))
    job.stage(f"score-{label}", "score", settings, shard_units(pieces, TRAIN))
    granularity = job.run.read_json("manifest.json")["granularity"]
    index = IndexJob(
        job.run, job.model, spec, method.score_unit, granularity, asdict(gradients.projection), pieces, job.fields
    )
    if inverse:
        index = replace(index, about=about_solve(index, method, say))
    with job.lease.turn(f"index-{label}", say):
        finish_index(index, job.lease, config.output.neighbours, say)
    return label


def _stored_shard_rows(run: Location) -> int | None:
    """Return the shard length of a store that is there already, which a corpus keeps when it grows."""
    return int(GradientStore.open(run).settings.extra["shard_rows"]) if run.exists(SETTINGS_KEY) else None


def _score_shard_rows(job: Job, home: Location, corpus: Corpus, seen: dict[str, Any], stored: bool) -> int:
    if stored:
        return int(GradientStore.open(home).settings.extra["shard_rows"])
    return job.config.gradients.shard_rows or shard_rows(corpus, seen["model_size"], 0, 4)
