"""What a job does besides for methods that solve with the curvature: their rows, candidates and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from actors.candidates import find_candidates, recall_of
from actors.index import IndexJob, merged_top
from actors.plan import checkpoint_units, shards
from actors.score import load_scores, scores_key
from actors.solve_job import figures_key
from actors.specs import GradientSpec, ScoreSpec, declare_stage, digest
from engine.knn import faiss_module
from engine.methods.contract import Method, inverse_of, load_method, nearest_of
from engine.methods.inverse import InverseCurvature, without_effect
from launch.config import Config
from launch.stage_records import LeasedJournal
from storage.corpus import Corpus
from storage.damage import read_checked
from storage.locations import Location, ObjectRecord

if TYPE_CHECKING:
    from launch.job import Job

CANDIDATES = "candidates"  # the unit of a solve that they are


def default_modules(config: Config) -> str:
    """Return which modules are looked at unless the config says: whole gradients are taken of the top layers alone."""
    inverse = inverse_of(load_method(config.method.name, config.method.settings()))
    return "top" if inverse and inverse.solver != "projected" else "changed"


def check_rows(method: Method, config: Config, say: Callable[[str], None]) -> None:
    """Refuse rows that a method with an inverse curvature cannot score, and say which of its settings have no effect.

    Raises ValueError saying which it can.
    """
    inverse, g, name = inverse_of(method), config.gradients, config.method.name
    if inverse and (idle := without_effect(inverse.solver, config.method.settings())):
        say(f"warning: {', '.join(f'method.{one}' for one in idle)}: without effect on method.solver={inverse.solver}")
    if nearest_of(method):
        faiss_module()
    if inverse is None:
        return
    if inverse.solver == "projected":
        if not g.store:
            raise ValueError(
                "method.solver=projected solves on stored rows: set gradients.store=true, or choose another"
            )
        return
    if g.projection != "none":
        raise ValueError(
            f"gradients.projection={g.projection} is not allowed with method {name}: curvature products need whole "
            f"gradients. Set gradients.projection=none and gradients.store=false"
            + (", or method.solver=projected." if name == "influence" else ".")
        )
    if nearest_of(method) and g.store:
        raise ValueError(
            f"gradients.store=True is not allowed with method {name}, which reads a few examples: set false"
        )


def solved_sizes(inverse: InverseCurvature, seen: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of every array of a query that is solved for: stored columns, or whole parameters."""
    if inverse.solver == "projected":
        return seen["arrays"]
    return dict(zip(seen["parameters"], seen["sizes"], strict=True))


def choose_candidates(
    job: Job, notes: LeasedJournal, score: ScoreSpec, gradients: GradientSpec, corpus: Corpus, rows: int,
    say: Callable[[str], None],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Return the candidates and probes of every query, found once by the features of both sides; none for most methods.

    `notes`: the solve's journal, in which they are a unit. Features that were damaged are made anew in any case.
    """
    nearest = nearest_of(load_method(score.method, score.method_settings))
    if nearest is None:
        return None
    queries = Corpus.open(job.run, score.queries)
    sets = [(score.corpus, score.home, corpus), (score.queries, None, queries)]
    folder, (pieces, asked) = make_features(job, score, gradients, nearest.features, sets, rows)
    with job.lease.turn(f"solve-{score.label}", say):
        if CANDIDATES not in notes.done():
            seed, key = gradients.projection.seed, candidates_key(score.label)
            found = find_candidates(job.run, corpus, queries, pieces, asked, folder, nearest, seed)
            data = safetensors.numpy.save(found)
            job.lease.check()
            job.run.delete(key)  # of a driver that was killed here, or damaged
            job.run.create(key, data)
            notes.commit(CANDIDATES, {"objects": [asdict(ObjectRecord.of(key, data))]})
    found = read_candidates(job.run, score.label)
    return torch.from_numpy(found["candidates"]), torch.from_numpy(found["probes"])


def make_features(
    job: Job, score: ScoreSpec, gradients: GradientSpec, kind: str,
    sets: list[tuple[str, str | None, Corpus]],  # name, the run that holds it if not this one, and the set
    rows: int,  # of a shard
) -> tuple[str, list[list[dict[str, Any]]]]:  # fmt: skip
    """Leave the features of these sets under the scores' checkpoint; return their folder and every set's units' payloads."""
    [checkpoint] = score.checkpoints
    made = {
        "model": job.model.record(), "checkpoint": job.model.checkpoint(checkpoint).fingerprint,
        "features": kind, "token_budget": gradients.token_budget, "shard_rows": rows,
    }  # fmt: skip
    folder = digest(made)[:6]
    settings = {"model": job.model, "token_budget": gradients.token_budget, "features": kind, "folder": folder}
    payloads = []
    for name, home, corpus in sets:
        units = checkpoint_units((checkpoint,), [piece | {"home": home} for piece in shards(corpus, rows)], name)
        declare_stage(job.run, f"features-{name}-{folder}", made | {"home": home})
        job.stage(f"features-{name}-{folder}", "features", settings, units)
        payloads.append([unit.payload for unit in units])
    return folder, payloads


def candidates_key(label: str) -> str:
    return f"states/{label}/candidates.safetensors"


def read_candidates(run: Location, label: str) -> dict[str, np.ndarray]:
    """Return what find_candidates found. Raises DamagedObject."""
    return safetensors.numpy.load(read_checked(run, f"solve-{label}", CANDIDATES, candidates_key(label)))


def about_solve(index: IndexJob, method: Method, say: Callable[[str], None]) -> dict[str, Any]:
    """Return what the scores' description says of their solve, and of candidates what they miss."""
    figures = index.run.read_json(figures_key(index.score.label))
    about = {"damping": figures["damping"], "solve": figures, "self_influence": None}
    nearest = nearest_of(method)
    if nearest is None:
        return about
    others = read_candidates(index.run, index.score.label)["others"]
    shards_ = (load_scores(index.run, scores_key(index.score.label, piece)) for piece in index.shards)
    probes = np.concatenate([shard.probes for shard in shards_ if shard.probes is not None])
    recall = recall_of(merged_top(index), probes, others, nearest.count)
    shares = ", ".join(f"{share:.1%} of the {m} strongest" for m, share in recall.items())
    if shares:
        say(f"candidates hold, by an estimate from {len(probes):,} other examples, {shares}")
    return about | {"candidates": asdict(nearest) | {"recall": recall, "probes": len(probes)},
                    "totals": "sum over the queries whose candidate the example is"}  # fmt: skip
