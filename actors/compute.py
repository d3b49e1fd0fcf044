"""Scoring without a store: gradient rows are computed, multiplied with the query state and dropped.

A unit is (checkpoint, shard) and leaves one block [n, Q], which score.py adds up. Unprojected, no row is ever made: each
module's gradients are multiplied with the queries' inside the backward pass.
"""

from typing import Any

import numpy as np
import safetensors.numpy

from actors.collect import receipt_of
from actors.context import WorkerContext
from actors.leftovers import put
from actors.specs import GradientSpec
from actors.units import Receipt, Unit
from engine.batches import plan_batches
from engine.gradients import GradientBatch, nonfinite
from engine.methods.contract import Rows, ScoreBlock, load_method
from storage.gradients import DONE, QUARANTINED


def compute_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Compute one shard's block under one checkpoint from its examples."""
    model, spec, score = settings["model"], settings["gradients"], settings["score"]
    at = unit.payload
    state = context.state(score.label, at["checkpoint"])
    onto = spec.projection.kind == "none"
    hooks = context.gradients(model, at["checkpoint"], spec, "onto" if onto else "rows", state)
    method, task = load_method(score.method, score.method_settings), context.task(model)
    rows = context.rows(score.home, score.corpus, at)
    lengths = np.array([row["length"] for row in rows])
    block = empty_block(len(rows), len(state.losses))
    bad: dict[int, str] = {}
    for positions in plan_batches(lengths, spec.token_budget):
        out = hooks(task.loss, task.collate([rows[i] for i in positions]).to(context.device))
        fill(block, positions, out, method.score(rows_of(out, spec, onto), state))
        bad |= {int(positions[i]): where for i, where in nonfinite(out, hooks.projector.layout).items()}
    block["state"][list(bad)] = QUARANTINED
    written = put(context, settings, unit, block_key(score.label, at), safetensors.numpy.save(block))
    ids = context.ids(score.home, score.corpus, at)
    return receipt_of(unit, ids, int(lengths.sum()), bad, [written])


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


def fill(block: dict[str, np.ndarray], positions: np.ndarray, out: GradientBatch, scored: ScoreBlock) -> None:
    """Put one batch into its lines of the block."""
    block["scores"][positions] = scored.scores.double().numpy()
    block["losses"][positions] = out.losses.cpu().numpy()
    if scored.self_influence is not None:
        block["self_influence"][positions] = scored.self_influence.numpy()


def block_key(label: str, at: dict[str, Any]) -> str:
    return f"scores/{label}/blocks/{at['checkpoint']}/{at['segment']}-{at['start']:09d}.safetensors"
