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
from engine.methods.inverse import InverseCurvature
from launch.config import Config
from storage.corpus import Corpus

if TYPE_CHECKING:
    from launch.job import Job


def default_modules(config: Config) -> str:
    """Return which modules are looked at unless the config says: whole gradients are taken of the top layers alone."""
    inverse = inverse_of(load_method(config.method.name, config.method.settings()))
    return "top" if inverse and inverse.solver != "projected" else "changed"


def check_rows(method: Method, config: Config) -> None:
    """Refuse rows that a method with an inverse curvature cannot score. Raises ValueError saying which it can."""
    inverse, g, name = inverse_of(method), config.gradients, config.method.name
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
    job: Job, score: ScoreSpec, gradients: GradientSpec, corpus: Corpus, rows: int
) -> tuple[Tensor, Tensor] | None:
    """Return the candidates and probes of every query, found once by the features of both sides; none for most methods."""
    nearest = nearest_of(load_method(score.method, score.method_settings))
    if nearest is None:
        return None
    key = candidates_key(score.label)
    if not job.run.exists(key):
        [checkpoint], queries = score.checkpoints, Corpus.open(job.run, score.queries)
        made = {
            "model": job.model.record(), "checkpoint": job.model.checkpoint(checkpoint).fingerprint,
            "features": nearest.features, "token_budget": gradients.token_budget, "shard_rows": rows,
        }  # fmt: skip
        folder = digest(made)[:6]
        settings = {"model": job.model, "token_budget": gradients.token_budget} | {
            "features": nearest.features, "folder": folder,
        }  # fmt: skip
        payloads = []
        for name, home, whole in ((score.corpus, score.home, corpus), (score.queries, None, queries)):
            pieces = [piece | {"home": home} for piece in shards(whole, rows)]
            units = checkpoint_units((checkpoint,), pieces, name)
            declare_stage(job.run, f"features-{name}-{folder}", made)
            job.stage(f"features-{name}-{folder}", "features", settings, units)
            payloads.append([unit.payload for unit in units])
        found = find_candidates(
            job.run, corpus, queries, payloads[0], payloads[1], folder, nearest, gradients.projection.seed
        )
        job.lease.check()
        job.run.create(key, safetensors.numpy.save(found))
    found = safetensors.numpy.load(job.run.read(key))
    return torch.from_numpy(found["candidates"]), torch.from_numpy(found["probes"])


def candidates_key(label: str) -> str:
    return f"states/{label}/candidates.safetensors"


def about_solve(index: IndexJob, method: Method, say: Callable[[str], None]) -> dict[str, Any]:
    """Return what the scores' description says of their solve, and of candidates what they miss."""
    figures = index.run.read_json(figures_key(index.score.label))
    about = {"damping": figures["damping"], "solve": figures, "self_influence": None}
    nearest = nearest_of(method)
    if nearest is None:
        return about
    others = safetensors.numpy.load(index.run.read(candidates_key(index.score.label)))["others"]
    shards_ = (load_scores(index.run, scores_key(index.score.label, piece)) for piece in index.shards)
    probes = np.concatenate([shard.probes for shard in shards_ if shard.probes is not None])
    recall = recall_of(merged_top(index), probes, others, nearest.count)
    shares = ", ".join(f"{share:.1%} of the {m} strongest" for m, share in recall.items())
    if shares:
        say(f"candidates hold, by an estimate from {len(probes):,} other examples, {shares}")
    return about | {"candidates": asdict(nearest) | {"recall": recall, "probes": len(probes)},
                    "totals": "sum over the queries whose candidate the example is"}  # fmt: skip
