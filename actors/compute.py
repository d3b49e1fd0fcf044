"""Scoring without a store: gradient rows are computed, multiplied with the query state and dropped.

A unit is (checkpoint, shard) and leaves one block [n, Q], which score.py adds up. Unprojected, no row is ever made: each
module's gradients are multiplied with the queries' inside the backward pass, and along the inverse-curvature product of a
single query the loss is differentiated by forward mode (1.5 times as fast for one query, slower from two on, measured on
MiniLM). Where a state names candidates, only they are read. A state that is larger than a worker holds is read in windows
of queries, with a pass over the shard for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import safetensors.numpy
from torch import Tensor, nn

from actors.collect import live_batches, receipt_of
from actors.context import WorkerContext
from actors.leftovers import put
from actors.specs import GradientSpec, ScoreSpec
from actors.units import Receipt, Unit
from engine.batches import Batch
from engine.coordinates import Coordinates, chosen_coordinates
from engine.curvature import Loss, directional_derivatives
from engine.gradient_batch import GradientBatch, nonfinite
from engine.methods.contract import QueryState, Rows, ScoreBlock, inverse_of, load_method
from engine.projection import Range, RowLayout
from storage.gradients import DONE, ERASED, QUARANTINED

_ONE = RowLayout({"rows": 1}, (Range("*", "rows", 0, 1, 1, 1),))  # products with one query


def compute_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Compute one shard's block under one checkpoint from its examples."""
    model, spec, score = settings["model"], settings["gradients"], settings["score"]
    at = unit.payload
    asked = context.state(score.label, at["checkpoint"])
    onto = spec.projection.kind == "none"
    method, task = load_method(score.method, score.method_settings), context.task(model)
    ids = scored_ids(context, score, at, asked)
    rows = context.rows_of(score.home, score.corpus, ids)
    lengths = np.array([row["length"] for row in rows], dtype=np.int64)
    block = empty_block(len(rows), len(asked.losses))
    bad: dict[int, str] = {}
    gone = np.isin(ids, list(context.corpus(score.home, score.corpus).erased()))
    block["state"][gone] = ERASED
    first = 0
    for state in context.state_windows(score.label, at["checkpoint"]):  # all queries, unless they do not fit in memory
        for positions in live_batches(rows, gone, spec.token_budget):
            gradients, layout = gradients_of(context, settings, at["checkpoint"], state)
            out = gradients(task.loss, task.collate([rows[i] for i in positions]).to(context.device))
            fill(block, positions, first, out, method.score(rows_of(out, spec, onto), state))
            bad |= {int(positions[i]): where for i, where in nonfinite(out, layout).items()}
        first += len(state.losses)
    block["state"][list(bad)] = QUARANTINED
    written = put(context, settings, unit, block_key(score.label, at), safetensors.numpy.save(block))
    return receipt_of(unit, ids, int(lengths.sum()), bad, [written])


def gradients_of(
    context: WorkerContext, settings: dict[str, Any], checkpoint: str, state: QueryState
) -> tuple[Callable[[Loss, Batch], GradientBatch], RowLayout]:
    """Return what takes a batch to rows or to products with the queries, and their layout."""
    model, spec, score = settings["model"], settings["gradients"], settings["score"]
    onto = spec.projection.kind == "none"
    if onto and len(state.losses) == 1 and inverse_of(load_method(score.method, score.method_settings)):
        network = context.model(model, checkpoint)
        return partial(along, network, chosen_coordinates(network, spec.parameters), state.arrays), _ONE
    hooks = context.gradients(model, checkpoint, spec, "onto" if onto else "rows", state)
    return hooks, hooks.projector.layout


def along(
    network: nn.Module, chosen: Coordinates, arrays: dict[str, Tensor], loss: Loss, batch: Batch
) -> GradientBatch:
    """Return the batch's products with a single query's vector, in the place of hooks."""
    direction = chosen.join(arrays)[:, 0].to(next(network.parameters()).device)
    losses, products = directional_derivatives(network, loss, chosen, batch, direction)
    return GradientBatch(batch.ids, losses, {"rows": products[:, None]}, None)


def scored_ids(context: WorkerContext, score: ScoreSpec, at: dict[str, Any], state: QueryState) -> np.ndarray:
    """Return the ids of the shard that are scored, ascending: all, or the candidates and probes among them."""
    ids = context.ids(score.home, score.corpus, at)
    asked = [chosen.numpy().ravel() for chosen in (state.candidates, state.probes) if chosen is not None]
    return np.intersect1d(ids, np.concatenate(asked)) if asked else ids


def empty_block(rows: int, queries: int) -> dict[str, np.ndarray]:
    """Return what a block holds: scores [n, Q] and per example self-influence, loss and state."""
    return {
        "scores": np.full((rows, queries), np.nan),
        "self_influence": np.full(rows, np.nan),
        "losses": np.full(rows, np.nan),
        "state": np.full(rows, DONE, dtype=np.uint8),
    }


def rows_of(out: GradientBatch, spec: GradientSpec, onto: bool) -> Rows:
    """Return a batch as a method's score takes it: rows, or their finished products with the queries."""
    arrays = {name: array.cpu() for name, array in out.arrays.items()}
    norms = None if out.norms is None else out.norms.cpu()
    if onto:
        return Rows(out.ids, {}, norms, spec.parameters, arrays["rows"])
    return Rows(out.ids, arrays, norms, spec.parameters)


def fill(
    block: dict[str, np.ndarray], positions: np.ndarray, first: int, out: GradientBatch, scored: ScoreBlock
) -> None:
    """Put one batch into its lines of the block, from query `first` on."""
    block["scores"][positions, first : first + scored.scores.shape[1]] = scored.scores.double().numpy()
    block["losses"][positions] = out.losses.cpu().numpy()
    if scored.self_influence is not None:
        block["self_influence"][positions] = scored.self_influence.numpy()


def block_key(label: str, at: dict[str, Any]) -> str:
    return f"scores/{label}/blocks/{at['checkpoint']}/{at['segment']}-{at['start']:09d}.safetensors"
