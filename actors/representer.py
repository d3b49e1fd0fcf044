"""Representer points over shards: the last layer is trained again by sums over stored features, and scores read them.

A pass over all features is a small stage, as a curvature product is (operator.py): the weights are sent once, every shard
gives one float64 partial, and partials are added in a fixed tree.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from actors.context import WorkerContext
from actors.features import features_key
from actors.operator import MemoryJournal, summed
from actors.plan import shard_key
from actors.pool import Pool
from actors.run_stage import EventSink, Journal, run_stage
from actors.specs import ScoreSpec
from actors.states import head_figures_key, head_key
from actors.units import Receipt, Stage, Unit
from engine.methods.contract import Rows
from engine.representer import Head, HeadSettings, Partial, coefficients, retrain_head, shard_loss
from engine.solvers import finish
from storage.gradients import DONE, QUARANTINED
from storage.locations import Location, ObjectRecord, to_json


@dataclass(frozen=True)
class HeadJob:
    """What the last layer is trained again from."""

    run: Location
    pool: Pool
    events: EventSink
    score: ScoreSpec
    folder: str  # of the features
    units: list[Unit]  # of the features' stage: one a shard
    settings: HeadSettings
    notes: Journal  # where the finished layer is noted down


def solve_head(job: HeadJob, say: Callable[[str], None]) -> None:
    """Leave the stationary last layer where scoring reads it, unless it is there. Raises FloatingPointError."""
    label = job.score.label
    if "head" in job.notes.done():
        return
    settings = {"score": job.score, "folder": job.folder}
    classes, width = sizes(job, settings)

    def total(weights: Tensor) -> Partial:
        shared = job.pool.share(weights.numpy())
        flat = summed(job.pool, "head", settings | {"weights": shared}, job.units, job.events)
        return Partial(flat[0], flat[2:].view(classes, width), int(flat[1]))

    head = finish(retrain_head(total, classes, width, job.settings))
    say(
        f"head: {classes} classes of {width} features, stationary after {head.iterations} steps: ‖∇‖ = "
        f"{head.gradient_norm:.1e}, so a logit is its sum over {head.count:,} examples to {head.error:.1e} ‖f‖"
    )
    figures = {key: value for key, value in vars(head).items() if key != "weights"}
    data = {
        head_key(label): safetensors.torch.save({"weights": head.weights}),
        head_figures_key(label): to_json(figures | {"error": head.error, "features": job.folder}),
    }
    for key, content in data.items():
        job.run.delete(key)  # of a driver that was killed here
        job.run.create(key, content)
    job.notes.commit("head", {"objects": [asdict(ObjectRecord.of(key, content)) for key, content in data.items()]})


def sizes(job: HeadJob, settings: dict[str, Any]) -> tuple[int, int]:
    """Return the number of classes of the training examples and of features. Raises ValueError for a single class."""
    found = [0, 0]

    def take(receipt: Receipt) -> None:
        found[:] = [max(a, int(b)) for a, b in zip(found, receipt.value, strict=True)]

    run_stage(job.pool, Stage("head-sizes", "head-sizes", settings, job.units), MemoryJournal(), take=take)
    if found[0] < 2:
        raise ValueError("all training examples have class 0: method representer needs at least two classes")
    return found[0], found[1]


def head_sizes_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Send back one more than the largest class of a shard, and the width of its features."""
    features, target = live_features(context, settings, unit.payload)
    return Receipt(unit.key, rows=len(target), value=np.array([int(target.max(initial=-1)) + 1, features.shape[1]]))


def head_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Send back a shard's loss, count and gradient of the last layer's weights: float64 [2 + K · H]."""
    features, target = live_features(context, settings, unit.payload)
    part = shard_loss(torch.tensor(settings["weights"]), torch.from_numpy(features), torch.from_numpy(target))
    value = torch.cat([part.loss.view(1), torch.tensor([float(part.count)]).double(), part.gradient.flatten()])
    return Receipt(unit.key, rows=len(target), value=value.numpy())


def live_features(
    context: WorkerContext, settings: dict[str, Any], at: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return features [n, H] and classes [n] of a shard's examples, without those that are erased or not finite."""
    score: ScoreSpec = settings["score"]
    held = shard_features(context, score.corpus, settings["folder"], at["checkpoint"], at)
    kept = np.isfinite(held["features"]).all(1) & ~context.erased(score.home, score.corpus, at)
    return held["features"][kept], held["target"][kept]


def shard_features(
    context: WorkerContext, name: str, folder: str, checkpoint: str, at: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return `features` [n, H] and `target` [n] of a shard of a set."""
    unit = f"{checkpoint}-{shard_key(name, at)}"
    key = features_key(folder, at | {"set": name, "checkpoint": checkpoint})
    return context.arrays(f"features-{name}-{folder}", unit, key)


def feature_rows(
    context: WorkerContext, spec: ScoreSpec, at: dict[str, Any], ids: np.ndarray, checkpoint: str
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Return a shard's examples as scoring takes them, their state, and their losses under the last layer trained again."""
    weights, figures = context.head(spec.label)
    held = shard_features(context, spec.corpus, figures["features"], checkpoint, at)
    features, target = (torch.from_numpy(held[name]) for name in ("features", "target"))
    head = Head(weights, 0.0, 0.0, 0, figures["count"], figures["penalty"])
    arrays = {"features": features, "alpha": coefficients(head, features, target), "target": target[:, None]}
    losses = torch.nn.functional.cross_entropy(features.double() @ weights.T, target, reduction="none")
    state = np.where(np.isfinite(held["features"]).all(1), DONE, QUARANTINED).astype(np.uint8)
    return Rows(torch.from_numpy(ids), arrays, None, ()), state, losses.numpy()
