"""What a job does for multi-stage influence: two models, how their weights hang together, and the stages over both.

The top level of the config is fine-tuning, its section `pretrain` what came before; the scored corpus is pretraining's.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from actors.context import cache_folder, make_task
from actors.index import IndexJob
from actors.multistage import StagesJob, solve_stages
from actors.plan import checkpoint_units, shard_rows, shard_units, shards
from actors.solve import refuse_unfit
from actors.solve_job import SolveJob, figures_key
from actors.specs import GradientSpec, ModelSpec, ScoreSpec, declare, declare_stage, digest
from actors.states import gradients_key
from actors.units import Unit
from engine.coordinates import chosen_coordinates
from engine.methods.contract import load_method
from engine.methods.multistage import MultiStage
from engine.multistage import Shared, early_stopping, shared_places
from engine.parameters import select_parameters, supported_parameters
from engine.tasks.contract import Task
from launch.config import Config, PretrainSection
from launch.sources import TRAIN, ingest_set, model_spec
from launch.stage_records import LeasedJournal, finish_index
from storage.checkpoints import STATE
from storage.corpus import Corpus
from storage.journal import Journal
from storage.locations import Location
from storage.readers import source_files

if TYPE_CHECKING:
    from launch.job import Job

PRETRAIN = "pretrain"  # name of the scored set


@dataclass(frozen=True)
class Weights:
    """Which weights take part, in their models' order: numbers of each by name."""

    finetuning: dict[str, int]  # of (W, Θ)
    own: dict[str, int]  # of Θ
    pretraining: dict[str, int]  # of (W, U)
    names: dict[str, str]  # of W: name in pretraining -> name in fine-tuning
    shared: Shared  # where W stands in both


@dataclass(frozen=True)
class Stages:
    """Pretraining beside the job's own model, which is the fine-tuned one."""

    config: Config  # that of a job on pretraining alone
    model: ModelSpec
    task: Task
    folder: Path
    weights: Weights
    alpha: float | None  # None: W stays

    def ingest(self, run: Location, say: Callable[[str], None], may_commit: Callable[[], None]) -> None:
        """Note what pretraining was, and read its corpus into the run."""
        record = self.model.record() | {"checkpoint": asdict(self.model.checkpoints[-1]), "shared": self.weights.names}
        declare(run, "stages/pretrain.json", record, f"pretraining of run {run.uri}")
        ingest_set(run, PRETRAIN, self.config.corpus, self.task, self.config.task.name, self.folder, say, may_commit)


def open_stages(
    config: Config, model: ModelSpec, folders: list[Path], task: Task, say: Callable[[str], None]
) -> Stages | None:
    """Return pretraining as the config gives it; None for a job of one stage.

    Both models are loaded here once and held against each other. Raises ValueError for a section that is missing or not
    needed, names, shapes or values of shared weights that do not fit, and an α that cannot be known.
    """
    given, method = config.pretrain, load_method(config.method.name, config.method.settings())
    if given is None or not isinstance(method, MultiStage):
        return None
    modules = chosen_globs(config)
    source_files(given.corpus.path)  # raises if there are none
    first = config.model_copy(
        update={"task": given.task, "checkpoints": given.checkpoints, "corpus": given.corpus, "pretrain": None}
    )
    before, places = model_spec(first, say)
    before = replace(before, checkpoints=before.checkpoints[-1:])
    first_task = make_task(before, places[-1], cache_folder())
    [position] = method.checkpoints(len(folders))
    networks = first_task.build(places[-1]), task.build(folders[position])
    weights = paired(*networks, given, modules, method.case == "fixed")
    alpha = None if method.case == "fixed" else method.alpha or scheduled(folders[position])
    return Stages(first, before, first_task, places[-1], weights, alpha)


def chosen_globs(config: Config) -> list[str]:
    """Return the globs over (W, Θ). Raises ValueError for settings of rows that products along s do not have."""
    g = config.gradients
    if g.projection != "none" or g.store or config.run.store:
        raise ValueError(
            f"gradients.projection={g.projection} with gradients.store={str(g.store).lower()} is not allowed with method "
            f"multistage, which multiplies whole gradients and keeps none: set gradients.projection=none and "
            f"gradients.store=false, without run.store."
        )
    if isinstance(g.modules, str):
        raise ValueError(
            f"gradients.modules={g.modules} is not allowed with method multistage: list globs, or leave it out"
        )
    if config.output.neighbours != "exact":
        raise ValueError(
            f"output.neighbours={config.output.neighbours} is not allowed with method multistage: use exact"
        )
    return g.modules or ["*"]


def paired(
    pretraining: nn.Module, finetuning: nn.Module, given: PretrainSection, modules: list[str], fixed: bool
) -> Weights:
    """Return the weights of both stages. Θ and U are the chosen ones that are not shared.

    Raises ValueError naming a shared weight that is missing, not supported, or of another shape or, in case 1, value.
    """
    names = expand(given.shared, list(dict(pretraining.named_parameters())))
    chosen = []
    for stage, network, patterns, both in (
        ("pretraining", pretraining, given.modules, list(names)),
        ("fine-tuning", finetuning, modules, list(names.values())),
    ):
        known = {parameter.name for parameter in supported_parameters(network)[0]}
        if lost := [name for name in both if name not in known]:
            raise ValueError(
                f"pretrain.shared: {stage} has no weight {lost[0]} that gradients are taken of: {_few(known)}"
            )
        try:
            wanted = {parameter.name for parameter in select_parameters(network, patterns)} | set(both)
        except ValueError as error:
            where = "pretrain.modules" if stage == "pretraining" else "gradients.modules"
            raise ValueError(str(error).replace("gradients.modules", where)) from error
        chosen.append(chosen_coordinates(network, sorted(wanted)))
    shared = shared_places(chosen[0], chosen[1], names)  # raises where names or shapes do not fit
    values = dict(pretraining.named_parameters()), dict(finetuning.named_parameters())
    for name, other in names.items():
        if fixed and not torch.equal(values[0][name], values[1][other]):
            raise ValueError(
                f"pretrain.shared: {name} differs between pretraining and fine-tuning, but method.case=fixed says that W "
                f"stayed. Set method.case=updated, or give the checkpoint that fine-tuning started from."
            )
    sizes = [{weight.name: weight.size for weight in space.weights} for space in chosen]
    own = {name: size for name, size in sizes[1].items() if name not in set(names.values())}
    if fixed and not own:
        raise ValueError("gradients.modules leaves fine-tuning no weight of its own: choose those of its head as well")
    return Weights(sizes[1], own, sizes[0], names, shared)


def expand(shared: Mapping[str, str], known: list[str]) -> dict[str, str]:
    """Return name -> name for every weight: a `*` in the first stands for some text, and for the same one in the second.

    Raises ValueError for a name or glob that matches nothing, or two of which only one has a `*`.
    """
    names: dict[str, str] = {}
    for ours, theirs in shared.items():
        if ours.count("*") != theirs.count("*") or ours.count("*") > 1:
            raise ValueError(f"pretrain.shared: {ours}: {theirs} is not allowed: one * in both, or none")
        found = fnmatch.filter(known, ours)
        if not found:
            raise ValueError(f"pretrain.shared: {ours} matches no weight of pretraining, which has {_few(known)}")
        lead, _, tail = ours.partition("*")
        names |= {name: theirs.replace("*", name[len(lead) : len(name) - len(tail)]) for name in found}
    if not names:
        raise ValueError(
            "pretrain.shared is empty: name the weights that both stages have, for example {bert.*: bert.*}"
        )
    return names


def _few(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def scheduled(folder: Path) -> float:
    """Return α = 1/(2ηT) of a fine-tuning that took T steps, its mean logged rate η. ValueError if no rate is logged."""
    file = folder / STATE
    state = json.loads(file.read_text()) if file.exists() else {}
    rates = [entry["learning_rate"] for entry in state.get("log_history", []) if "learning_rate" in entry]
    if not rates or not sum(rates):
        raise ValueError(
            f"method.alpha is not set, and {folder} logs no learning rate to find it by: set it (paper: 0.01)"
        )
    return early_stopping(sum(rates) / len(rates), int(state["global_step"]))


def score_stages(
    job: Job, two: Stages, gradients: tuple[GradientSpec, GradientSpec], say: Callable[[str], None]
) -> str:
    """Prepare the queries under the fine-tuned model, solve both stages, score every pretraining shard, build the index.

    `gradients`: over (W, Θ) and over (W, U).
    """
    method = load_method(job.config.method.name, job.config.method.settings())
    assert isinstance(method, MultiStage)
    joint, before = gradients
    pieces, rows = _cut(job, two, PRETRAIN, two.weights.pretraining)
    spec = _declare(job, two, gradients, rows)
    fine = job.model.checkpoints[method.checkpoints(len(job.model.checkpoints))[0]].name
    asked = replace(spec, checkpoints=(fine,), corpus=TRAIN)
    unit = Unit(fine, {"checkpoint": fine, "key": gradients_key(spec.label, fine)})
    job.stage(f"prepare-{spec.label}", "prepare", {"model": job.model, "gradients": joint, "score": asked}, [unit])
    with job.lease.turn(f"solve-{spec.label}", say):
        solve_stages(_solves(job, two, method, gradients, (asked, spec), say))
    settings = {"model": two.model, "gradients": before, "score": spec}
    job.stage(f"compute-{spec.label}", "compute", settings, checkpoint_units(spec.checkpoints, pieces, PRETRAIN))
    job.stage(f"score-{spec.label}", "multistage", settings, shard_units(pieces, PRETRAIN))
    index = IndexJob(
        job.run, two.model, spec, method.score_unit, getattr(two.task, "granularity", "document"), {"kind": "none"},
        pieces, job.fields, about(job, spec, method),
    )  # fmt: skip
    with job.lease.turn(f"index-{spec.label}", say):
        finish_index(index, job.lease, "exact", say)
    return spec.label


def _cut(job: Job, two: Stages, name: str, sizes: dict[str, int]) -> tuple[list[dict[str, Any]], int]:
    """Return the shards of a set and their length."""
    corpus = Corpus.open(job.run, name)
    rows = job.config.gradients.shard_rows or shard_rows(corpus, sum(sizes.values()), 0, 4)
    return shards(corpus, rows), rows


def _declare(job: Job, two: Stages, gradients: tuple[GradientSpec, GradientSpec], rows: int) -> ScoreSpec:
    """Write the record of these scores, or compare it with the one that is there."""
    config = job.config
    assert config.queries is not None
    what: dict[str, Any] = {
        "method": config.method.name, "method_settings": config.method.settings(),
        "checkpoints": (two.model.checkpoints[-1].name,), "queries": config.queries.name, "corpus": PRETRAIN,
        "home": None, "stored": False, "top_k": config.output.top_k, "dense": config.output.dense,
    }  # fmt: skip
    record = what | {
        "gradients": [asdict(one) for one in gradients], "model": two.model.record(), "shard_rows": rows,
        "finetuned": job.model.record(), "finetuned_checkpoints": [c.fingerprint for c in job.model.checkpoints],
        "alpha": two.alpha,
    }  # fmt: skip
    label = config.output.label or f"{config.method.name}-{config.queries.name}-{digest(record)[:6]}"
    declare_stage(job.run, f"score-{label}", record, "another output.label")
    return ScoreSpec(label=label, **what)


def _solves(
    job: Job, two: Stages, method: MultiStage, gradients: tuple[GradientSpec, GradientSpec],
    specs: tuple[ScoreSpec, ScoreSpec], say: Callable[[str], None],
) -> StagesJob:  # fmt: skip
    """Return what both solves are given. Raises ValueError for one that does not fit in memory."""
    joint, before = gradients
    label, weights, fixed = specs[1].label, two.weights, two.alpha is None
    own = replace(joint, parameters=tuple(weights.own)) if fixed else joint
    found = []
    for stage, spec, model, chosen, inverse, sizes in (
        ("finetuning", specs[0], job.model, own, method.finetuning, weights.own if fixed else weights.finetuning),
        ("pretraining", specs[1], two.model, before, method.pretraining, weights.pretraining),
    ):
        name = f"{label}-{stage}"
        corpus, (pieces, rows) = Corpus.open(job.run, spec.corpus), _cut(job, two, spec.corpus, sizes)
        refuse_unfit(inverse, sizes, 2 * Corpus.open(job.run, spec.queries).rows)
        notes = LeasedJournal(Journal(job.run, f"solve-{name}"), job.lease)
        found.append(SolveJob(
            job.run, job.pool, notes, job.stage, job.lease.check, job.events, say, model, chosen,
            replace(spec, label=name), inverse, corpus, sizes, pieces, rows, None,
        ))  # fmt: skip
    notes = LeasedJournal(Journal(job.run, f"solve-{label}"), job.lease)
    return StagesJob(
        label, notes, found[0], found[1], joint, weights.finetuning, weights.shared, two.alpha, method.asked == "sum"
    )


def about(job: Job, spec: ScoreSpec, method: MultiStage) -> dict[str, Any]:
    """Return what the scores' description says of both stages."""
    figures = job.run.read_json(figures_key(spec.label))
    summed = {"asked": "query 0 is the sum of all queries of the set"} if method.asked == "sum" else {}
    return {
        "damping": {stage: figures[stage]["damping"] for stage in ("finetuning", "pretraining")},
        "solve": figures,
        "self_influence": None,
        "finetuned": vars(job.model.checkpoints[method.checkpoints(len(job.model.checkpoints))[0]]),
        "parts": "through_finetuned: by what fine-tuning makes of its own weights; through_shared: by the shared weights",
    } | summed
