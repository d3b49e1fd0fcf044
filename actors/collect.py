"""Stages 1a and 1b: look at the model once, then compute every shard's gradient rows into the store."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.context import WorkerContext
from actors.leftovers import put, write_unit
from actors.specs import GradientSpec, ModelSpec
from actors.units import Receipt, Unit
from engine.adapters import adapter_parameters
from engine.batches import plan_batches
from engine.coordinates import top_layers
from engine.coverage import measure_coverage, why_alone
from engine.gradient_batch import GradientBatch, nonfinite
from engine.gradients import PerExampleGradients
from engine.memory import numbers_put_out, token_budget
from engine.models import read_state
from engine.parameters import Parameter, changed_parameters, select_parameters
from engine.projection import row_layout
from engine.tasks.contract import Task
from storage.gradients import DONE, ERASED, QUARANTINED, RowBlock
from storage.locations import to_json


def inspect_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Write what the other stages need to know of the model: chosen parameters, layout, coverage."""
    model: ModelSpec = settings["model"]
    last = model.checkpoints[-1].name
    network = context.model(model, last)
    moved = _moved(context, model, network)
    patterns = settings["modules"]
    if patterns in ("changed", "top"):
        upper = top_layers(network)
        patterns = [n for n in moved or ["*"] if patterns == "changed" or n in upper] or upper
    parameters = select_parameters(network, patterns)
    projection = settings["projection"]
    layout = row_layout(parameters, projection) if settings["stored"] else None
    task, rows, report = context.task(model), _sample(context, settings), None
    if settings["coverage"]:
        batches = [task.collate([row]).to(context.device) for row in rows]
        report = asdict(measure_coverage(network, parameters, task.loss, batches, set(moved) if moved else None))
    found = to_json(
        {
            "parameters": [p.name for p in parameters],
            "sizes": [p.size for p in parameters],
            "model_size": sum(w.numel() for w in network.parameters()),
            "arrays": layout.arrays if layout else {},
            "ranges": [asdict(r) for r in layout.ranges] if layout else [],
            "coverage": report,
            "alone": why_alone(network, parameters, task.loss, task.collate(rows).to(context.device)),
            "token_budget": _token_budget(context, settings, parameters, rows),
        }
    )
    written = put(context, settings, unit, unit.payload["key"], found)
    return Receipt(unit.key, bytes=len(found), objects=[asdict(written)])


def _token_budget(
    context: WorkerContext, settings: dict[str, Any], parameters: list[Parameter], rows: list[dict]
) -> int:
    """Return the budget that was asked for, or what suits this device: tried on the sample's longest row, repeated."""
    if settings["token_budget"] != "auto":
        return settings["token_budget"]
    model: ModelSpec = settings["model"]
    spec = GradientSpec(tuple(p.name for p in parameters), settings["projection"], settings["norms"], 1)
    task, last = context.task(model), model.checkpoints[-1].name
    longest = max(rows, key=lambda row: row["length"])
    network, one = context.model(model, last), task.collate([longest]).to(context.device)
    numbers = numbers_put_out(network, lambda: task.loss(network, one)) // longest["length"]

    def run(budget: int) -> None:
        hooks = context.gradients(model, last, spec, "rows" if settings["stored"] else "whole")
        hooks(task.loss, task.collate([longest] * max(1, budget // longest["length"])).to(context.device))

    return token_budget(context.device, run, numbers)


def _sample(context: WorkerContext, settings: dict[str, Any]) -> list[dict]:
    """Return the corpus's rows that are looked at, evenly spread: as many as the coverage report asks for, at least 3."""
    corpus = context.corpus(settings["home"], settings["corpus"])
    segment = corpus.segments[0]
    count = min(max(3, settings["coverage"]), segment.rows)
    live = np.setdiff1d(np.arange(segment.rows), np.fromiter(corpus.erased(), np.int64) - segment.base)
    count = min(count, len(live))
    places = [int(live[i * len(live) // count]) for i in range(count)]
    return [row for place in places for row in corpus.read(segment, place, place + 1)]


def _moved(context: WorkerContext, model: ModelSpec, network: nn.Module) -> list[str]:
    """Return what training moved: an adapter's own, else what differs between the first and the last checkpoint.

    None if there is only one. Where files and model name the weights differently, the first model is built for it.
    """
    adapted = adapter_parameters(network)
    if adapted or len(model.checkpoints) < 2:
        return adapted
    first, last = (read_state(context.folder(model, model.checkpoints[i].name)) for i in (0, -1))
    names, buffers = network.state_dict().keys(), {name for name, _ in network.named_buffers()}
    if not first.keys() <= names:
        ends = (context.folder(model, model.checkpoints[i].name) for i in (0, -1))
        first, last = (context.task(model).build(folder).state_dict() for folder in ends)
    return [name for name in changed_parameters(first, last) if name not in buffers]


def collect_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Compute one shard's gradient rows under one checkpoint and write them to the store.

    A worker's next unit reads its rows while this one computes, and computes while this one writes.
    """
    model, spec = settings["model"], settings["gradients"]
    at = unit.payload
    with context.reading:
        rows = context.rows(None, at["set"], at)
    with context.computing:
        hooks = context.gradients(model, at["checkpoint"], spec)
        gone = context.erased(None, at["set"], at)
        shard, bad = shard_gradients(hooks, context.task(model), rows, spec, context.device, gone)
        store = context.store(None)
    where = (at["set"], at["checkpoint"], at["segment"], at["start"])
    objects = write_unit(
        context, settings, unit, lambda: store.write(*where, shard), lambda: store.delete_shard(*where)
    )
    tokens = int(sum(row["length"] for row in rows))
    return receipt_of(unit, context.ids(None, at["set"], at), tokens, bad, objects)


def receipt_of(unit: Unit, ids: np.ndarray, tokens: int, bad: dict[int, str], objects: list) -> Receipt:
    """Return the receipt of a unit over these rows; `bad` says by position which were not finite, and where."""
    under = f" under {unit.payload['checkpoint']}" if "checkpoint" in unit.payload else ""
    return Receipt(
        unit.key,
        rows=len(ids),
        tokens=tokens,
        bytes=sum(o.size for o in objects),
        quarantined={int(ids[i]): f"{bad[i]}{under}" for i in sorted(bad)},
        objects=[asdict(o) for o in objects],
    )


def shard_gradients(
    hooks: PerExampleGradients, task: Task, rows: list[dict], spec: GradientSpec, device: torch.device,
    erased: np.ndarray | None = None,  # bool [n]
) -> tuple[RowBlock, dict[int, str]]:  # fmt: skip
    """Return the gradient rows, losses and norms of a shard in row order, and where which row is not finite.

    Such a row is quarantined, all NaN, as is an erased one, which is not looked at.
    """
    n, layout = len(rows), hooks.projector.layout
    arrays = {name: np.empty((n, width), dtype=np.float32) for name, width in layout.arrays.items()}
    losses, state, bad = np.empty(n), np.full(n, DONE, dtype=np.uint8), dict[int, str]()
    norms = np.empty((n, len(spec.parameters)), dtype=np.float32) if spec.norms else None
    ahead: tuple[np.ndarray, GradientBatch] | None = None

    def place(positions: np.ndarray, out: GradientBatch) -> None:
        for name, array in arrays.items():
            array[positions] = out.arrays[name].cpu().numpy()
        losses[positions] = out.losses.cpu().numpy()
        if norms is not None and out.norms is not None:
            norms[positions] = out.norms.cpu().numpy()
        for position, where in nonfinite(out, layout).items():
            row = int(positions[position])
            state[row], bad[row] = QUARANTINED, where
            losses[row] = np.nan
            for array in [*arrays.values()] + ([] if norms is None else [norms]):
                array[row] = np.nan

    gone = np.zeros(n, dtype=bool) if erased is None else erased
    for array in (*arrays.values(), losses, *(() if norms is None else (norms,))):
        array[gone] = np.nan
    state[gone] = ERASED
    for positions in live_batches(rows, gone, spec.token_budget):
        out = hooks(task.loss, task.collate([rows[i] for i in positions]).to(device))
        if ahead:
            place(*ahead)  # one behind: a GPU computes while the batch before is copied out
        ahead = positions, out
    if ahead:
        place(*ahead)
    return RowBlock(arrays, losses, norms, state), bad


def live_batches(rows: list[dict], erased: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Yield the positions of every batch of a shard, erased rows left out."""
    live = np.flatnonzero(~erased)
    for positions in plan_batches(np.array([rows[i]["length"] for i in live], dtype=np.int64), token_budget):
        yield live[positions]
