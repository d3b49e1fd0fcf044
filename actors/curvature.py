"""Units of curvature: the sum of products over one reduction block, one repetition of LiSSA, some columns of a sketch.

A product's partial travels back in its receipt and is added up by the driver (operator.py). A repetition, and columns of
a sketch, are found wholly here, on the local operator, and written down as every other unit's result; one that takes long
is worked on in turns, each from the state that the one before saved.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from actors.context import WorkerContext
from actors.leftovers import put
from actors.solver_states import SolverStates, Unfinished, take_turn
from actors.specs import CurvatureSpec
from actors.states import SavedState, gradients_key, unfinished_key
from actors.units import Receipt, Unit
from engine.stochastic_solvers import (
    Lissa,
    LissaState,
    Sketch,
    SketchState,
    lissa_batches,
    lissa_repetition,
    sketch_batches,
    sketch_columns,
    sketch_matrix,
)
from storage.gradients import DONE


def curvature_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Send back Σ curvature × block, float64 (size, k): over a reduction block, or over the ids of the payload."""
    held = context.curvature(settings["model"], settings["gradients"], settings["curvature"])
    block, at = torch.tensor(settings["block"]), unit.payload
    if "ids" in at:
        total = held.batch_total(np.array(at["ids"], dtype=np.int64), block)
        return Receipt(unit.key, rows=len(at["ids"]), value=total.numpy())
    ids = np.array(settings["ids"][at["first"] : at["last"]])
    return Receipt(unit.key, rows=len(ids), value=held.total(ids, block).numpy())


def lissa_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Write x of one repetition for one block of queries, float64 (size, k)."""
    spec: CurvatureSpec = settings["curvature"]
    lissa: Lissa = settings["lissa"]
    at = unit.payload
    held = context.curvature(settings["model"], settings["gradients"], spec)
    states = _states(context, settings, unit)
    state = states.latest(unit.key, LissaState, context.device)
    ids, repetition = torch.tensor(settings["ids"]), at["repetition"]
    drawn = lissa_batches(ids, lissa, repetition)
    operator = held.local(np.unique(drawn[state.iteration if state else 0 :].numpy()), settings["l2"])
    asked = SavedState.open(context.run, gradients_key(settings["label"], spec.checkpoint))
    b = held.curvature.coordinates.join(asked.window(at["first"], at["last"]).arrays).to(context.device)
    x = take_turn(lissa_repetition(operator, b, ids, lissa, repetition, settings["largest"], state), states, unit.key)
    if isinstance(x, Unfinished):
        return Receipt(unit.key, unfinished=f"{x.state.iteration:,} of {lissa.iterations:,} iterations")
    written = put(context, settings, unit, at["key"], safetensors.numpy.save({"x": x.cpu().numpy()}))
    states.clear()
    return Receipt(unit.key, rows=len(drawn.unique()), bytes=written.size, objects=[asdict(written)])


def sketch_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Write one block of the sketch's columns, float32 [k, O·I] a parameter."""
    sketch: Sketch = settings["sketch"]
    block = unit.payload["block"]
    held = context.curvature(settings["model"], settings["gradients"], settings["curvature"])
    states = _states(context, settings, unit)
    state = states.latest(unit.key, SketchState, context.device)
    coordinates, ids = held.curvature.coordinates, torch.tensor(settings["ids"])
    drawn = torch.stack([torch.cat(sketch_batches(ids, sketch, block, t + 1)) for t in range(sketch.iterations)])
    operator = held.local(np.unique(drawn[state.iteration if state else 0 :].numpy()), settings["l2"])
    g = sketch_matrix({w.name: w.size for w in coordinates.weights}, sketch, block).to(context.device)
    s = take_turn(sketch_columns(operator, g, ids, sketch, block, settings["largest"], state), states, unit.key)
    if isinstance(s, Unfinished):
        return Receipt(unit.key, unfinished=f"{s.state.iteration:,} of {sketch.iterations:,} iterations")
    arrays = {name: part.float().cpu().contiguous() for name, part in coordinates.split(s).items()}
    written = put(context, settings, unit, unit.payload["key"], safetensors.torch.save(arrays))
    states.clear()
    return Receipt(unit.key, rows=len(drawn.unique()), bytes=written.size, objects=[asdict(written)])


def _states(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> SolverStates:
    """Return what saves a unit's states, while this worker's driver has the unit."""
    folder = f"{unfinished_key(settings['label'])}/{unit.key}"
    return SolverStates(context.run, folder, lambda: settings["claim"].check(context.run, unit.key))


def gram_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Send back GᵀG of one shard's stored rows and, behind it, how many there are: float64 [D² + 1]."""
    spec: CurvatureSpec = settings["curvature"]
    rows = context.stored_rows(spec.home, spec.corpus, spec.checkpoint, unit.payload)
    good = rows.state == DONE
    block = np.concatenate([rows.rows[name][good] for name in settings["arrays"]], 1).astype(np.float64)
    return Receipt(unit.key, rows=len(good), value=np.append(block.T @ block, float(good.sum())))
