"""What a job does for methods that take no gradient: turn-over dropout and representer points, forward passes alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.index import IndexJob
from actors.plan import checkpoint_units, forward_rows, shard_units, shards
from actors.representer import HeadJob, solve_head
from actors.solve import one_thread
from actors.specs import GradientSpec, ModelSpec, ScoreSpec, declare_stage, digest
from actors.states import head_figures_key, state_key
from actors.units import Unit
from engine.methods.contract import Method, load_method
from engine.methods.representer import Representer
from engine.models import parameter_count
from engine.projection import Projection
from engine.turnover import RECORD
from launch.config import Config
from launch.scoring import declare_scores
from launch.sources import TRAIN, content
from launch.stage_records import LeasedJournal, finish_index
from launch.turnover import trainings
from storage.checkpoints import STATE
from storage.corpus import Corpus
from storage.journal import Journal
from storage.locations import Location

if TYPE_CHECKING:
    from launch.job import Job

TOKENS = {"cpu": 8192, "cuda": 65_536}  # padded tokens of one forward pass: no backward pass holds them


def one_of_each_training(config: Config, method: Method, say: Callable[[str], None]) -> Config:
    """Return the config with the last checkpoint of every training alone, for a method that asks trained masks."""
    path = config.checkpoints.path
    if method.reads != "ids" or not isinstance(path, str):
        return config
    checkpoints = config.checkpoints.model_copy(update={"path": trainings(path, say)})
    return config.model_copy(update={"checkpoints": checkpoints})


def check_forward(
    method: Method, config: Config, model: ModelSpec, folders: list[Path], say: Callable[[str], None]
) -> None:
    """Refuse what a method without gradients cannot be asked. Raises ValueError naming it."""
    if method.reads == "gradients":
        return
    if config.output.neighbours != "exact":
        raise ValueError(
            f"output.neighbours={config.output.neighbours} is not allowed with method {config.method.name}, which stores "
            f"no rows: use exact"
        )
    if method.reads == "ids":
        check_masks(config, model, folders, say)


def check_masks(config: Config, model: ModelSpec, folders: list[Path], say: Callable[[str], None]) -> None:
    """Refuse checkpoints without masks, or with the same ones; warn of masks that were drawn for another corpus."""
    known: dict[str, str] = {}
    for checkpoint, folder in zip(model.checkpoints, folders, strict=True):
        if not (folder / RECORD).exists():
            raise ValueError(
                f"checkpoint {checkpoint.name} has no {RECORD}: it was not trained with turn-over dropout. Train it with "
                f"train.turnover, or choose another method."
            )
        masks = json.dumps(json.loads((folder / RECORD).read_text())["masks"], sort_keys=True)
        if masks in known:
            raise ValueError(
                f"checkpoints {known[masks]} and {checkpoint.name} have the same masks: scores are averaged over trainings "
                f"under other masks (train.turnover.seeds). List one checkpoint of each."
            )
        known[masks] = checkpoint.name
        state = json.loads((folder / STATE).read_text()) if (folder / STATE).exists() else {}
        trained_on = state.get("training", {}).get("corpus", {}).get("content")
        if trained_on and config.run.store is None and trained_on != content(config.corpus.path):
            say(
                f"warning: {checkpoint.name} was trained on another corpus than {config.corpus.path}: a mask belongs to the "
                f"row that it was trained with, so rows must be the same in the same order"
            )


def score_forward(job: Job, home: Location, say: Callable[[str], None]) -> str:
    """Stages 2 to 4: what the method prepares of the queries, every shard's scores, the index."""
    method = load_method(job.config.method.name, job.config.method.settings())
    corpus = Corpus.open(home, TRAIN)
    stages = representer_stages if method.reads == "features" else turnover_stages
    spec, pieces, about = stages(job, corpus, say)
    job.stage(f"score-{spec.label}", "score", carried(job, spec), shard_units(pieces, TRAIN))
    granularity = job.run.read_json("manifest.json")["granularity"]
    index = IndexJob(
        job.run, job.model, spec, method.score_unit, granularity, {"kind": "none"}, pieces, job.fields, about
    )
    with job.lease.turn(f"index-{spec.label}", say):
        finish_index(index, job.lease, job.config.output.neighbours, say)
    return spec.label


Prepared = tuple[ScoreSpec, list[dict[str, Any]], dict[str, Any]]  # shards, and what the scores say of themselves


def turnover_stages(job: Job, corpus: Corpus, say: Callable[[str], None]) -> Prepared:
    """Leave the queries' losses, and every shard's block under every training."""
    assert job.config.queries is not None
    asked = Corpus.open(job.run, job.config.queries.name)
    work = 2 * parameter_count(job.folders[0]) * sum(segment.tokens for segment in asked.segments)
    rows = job.config.gradients.shard_rows or forward_rows(corpus, 2 * work, asked.rows)
    spec = declare_scores(job, forward_spec(job), corpus, rows, stored=False)
    pieces = shards(corpus, rows)
    job.stage(f"prepare-{spec.label}", "prepare", carried(job, spec), prepare_units(spec))
    units = checkpoint_units(spec.checkpoints, pieces, TRAIN)
    job.stage(f"compute-{spec.label}", "turnover", carried(job, spec), units)
    return spec, pieces, about_masks(len(spec.checkpoints))


def representer_stages(job: Job, corpus: Corpus, say: Callable[[str], None]) -> Prepared:
    """Leave every example's features, the last layer trained again on them, and the queries' features."""
    config = job.config
    method = load_method(config.method.name, config.method.settings())
    assert isinstance(method, Representer)
    asked = Corpus.open(job.run, config.queries.name) if config.queries else corpus
    tokens = sum(segment.tokens for segment in corpus.segments) / max(1, corpus.rows)
    rows = config.gradients.shard_rows or forward_rows(corpus, 2 * parameter_count(job.folders[0]) * tokens, asked.rows)
    spec, pieces = declare_scores(job, forward_spec(job), corpus, rows, stored=True), shards(corpus, rows)
    made = {
        "model": job.model.record(), "checkpoint": job.model.checkpoint(spec.checkpoints[0]).fingerprint,
        "features": "head", "token_budget": forward_spec(job).token_budget, "shard_rows": rows,
    }  # fmt: skip
    folder = digest(made)[:6]
    declare_stage(job.run, f"features-{TRAIN}-{folder}", made | {"home": spec.home})
    units = checkpoint_units(spec.checkpoints, [piece | {"home": spec.home} for piece in pieces], TRAIN)
    settings = {"model": job.model, "token_budget": made["token_budget"], "features": "head", "folder": folder}
    job.stage(f"features-{TRAIN}-{folder}", "features", settings, units)
    notes = LeasedJournal(Journal(job.run, f"head-{spec.label}"), job.lease)
    with job.lease.turn(f"head-{spec.label}", say), one_thread():
        solve_head(HeadJob(job.run, job.pool, job.events, spec, folder, units, method.head, notes), say)
    job.stage(f"prepare-{spec.label}", "prepare", carried(job, spec), prepare_units(spec))
    return spec, pieces, about_head(job, spec, method)


def carried(job: Job, spec: ScoreSpec) -> dict[str, Any]:
    return {"model": job.model, "gradients": forward_spec(job), "score": spec}


def prepare_units(spec: ScoreSpec) -> list[Unit]:
    return [Unit(name, {"checkpoint": name, "key": state_key(spec.label, name)}) for name in spec.checkpoints]


def forward_spec(job: Job) -> GradientSpec:
    """Return the record of no gradients, with the tokens of a forward pass."""
    g = job.config.gradients
    budget = TOKENS[job.pool.device] if g.token_budget == "auto" else g.token_budget
    return GradientSpec((), Projection("none", g.dim, job.config.run.seed), False, budget)


def about_masks(seeds: int) -> dict[str, Any]:
    """Return what the scores' description says of turn-over dropout."""
    error = {"standard_error": "over mask seeds, a column of its own beside score, total and self-influence"}
    return {
        "sign": "positive: the sub-network that never saw the example has the larger loss on the query (a proponent)",
        "self_influence": "mean over mask seeds of the example's loss under its flipped mask less that under its own",
        "mask_seeds": seeds,
    } | (error if seeds > 1 else {})


def about_head(job: Job, spec: ScoreSpec, method: Representer) -> dict[str, Any]:
    """Return what the scores' description says of representer points."""
    whose = "the query's own class" if method.logit == "label" else "the class that the retrained last layer answers"
    return {
        "sign": f"positive: the example raises the logit of {whose}; no loss, never compared with other scores",
        "self_influence": "what the example adds to the logit of its own class on itself",
        "head": job.run.read_json(head_figures_key(spec.label)),
    }
