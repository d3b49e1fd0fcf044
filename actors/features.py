"""The stage that leaves one feature vector per example, float32 [n, H] a shard, under features/<set>/<checkpoint>/.

Features of a last layer that is trained again come with the examples' classes, int64 [n]. The folder below is named after
all that a feature's bits depend on.
"""

from typing import Any

import numpy as np
import safetensors.numpy

from actors.collect import receipt_of
from actors.context import WorkerContext
from actors.leftovers import put
from actors.specs import ModelSpec
from actors.units import Receipt, Unit
from engine.batches import plan_batches
from engine.features import classes, features


def features_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Compute one shard's features; one that is not finite is set aside, all NaN."""
    model: ModelSpec = settings["model"]
    at = unit.payload
    task, network = context.task(model), context.model(model, at["checkpoint"])
    rows = context.rows(at["home"], at["set"], at)
    lengths = np.array([row["length"] for row in rows])
    found: np.ndarray | None = None
    target = np.zeros(len(rows), dtype=np.int64)
    for positions in plan_batches(lengths, settings["token_budget"]):
        batch = task.collate([rows[i] for i in positions]).to(context.device)
        part = features(task, network, batch, settings["features"]).float().cpu().numpy()
        if found is None:
            found = np.empty((len(rows), part.shape[1]), dtype=np.float32)
        found[positions] = part
        if settings["features"] == "head":
            target[positions] = classes(task, batch).numpy()
    assert found is not None
    bad = {int(i): "the features" for i in np.flatnonzero(~np.isfinite(found).all(1))}
    found[list(bad)] = np.nan
    key = features_key(settings["folder"], at)
    arrays = {"features": found} | ({"target": target} if settings["features"] == "head" else {})
    written = put(context, settings, unit, key, safetensors.numpy.save(arrays))
    return receipt_of(unit, context.ids(at["home"], at["set"], at), int(lengths.sum()), bad, [written])


def features_key(folder: str, at: dict[str, Any]) -> str:
    return f"features/{at['set']}/{at['checkpoint']}/{folder}/{at['segment']}-{at['start']:09d}.safetensors"
