"""Turn-over dropout's units: every query under every example's masks, forward alone, one block [n, Q] a unit.

A unit is (checkpoint, shard). Queries of like length share a batch; what lies below the first masked layer runs once for
each of them in a unit. The examples' own losses under their two masks and without any come from the same unit.
"""

from typing import Any

import numpy as np
import safetensors.numpy
import torch

from actors.collect import live_batches, receipt_of
from actors.compute import block_key, empty_block
from actors.context import WorkerContext
from actors.leftovers import put
from actors.specs import ScoreSpec
from actors.units import Receipt, Unit
from engine.batches import Batch, plan_batches
from engine.masks import Side
from engine.methods.contract import Rows, load_method
from engine.methods.turnover import TurnOverDropout
from engine.turnover_scores import full_losses, paired_losses
from storage.gradients import ERASED, QUARANTINED

_BOTH: tuple[Side, ...] = ("own", "flipped")
_SHARE = 8  # of a forward pass's tokens: one batch of queries, which then runs under so many masks at once


def turnover_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Compute one shard's block under one checkpoint: the queries' losses under each side of its examples' masks."""
    score: ScoreSpec = settings["score"]
    at = unit.payload
    state = context.state(score.label, at["checkpoint"])
    method = load_method(score.method, score.method_settings)
    assert isinstance(method, TurnOverDropout)
    ids, rows = context.ids(score.home, score.corpus, at), context.rows(score.home, score.corpus, at)
    gone = context.erased(score.home, score.corpus, at)
    live = np.flatnonzero(~gone)
    examples, losses = own_losses(context, settings, at, rows, gone)
    pairs = masked_losses(context, settings, at, ids[live], method.sides)
    found = {name: torch.from_numpy(array) for name, array in pairs.items()} | {
        "example": torch.from_numpy(examples[live])
    }
    scored = method.score(Rows(torch.from_numpy(ids[live]), found, None, ()), state)
    assert scored.self_influence is not None
    block = empty_block(len(rows), len(state.losses))
    block["state"][gone] = ERASED
    block["scores"][live], block["self_influence"][live] = scored.scores.numpy(), scored.self_influence.numpy()
    block["losses"][live] = losses[live]
    finite = np.isfinite(block["scores"]).all(1) & np.isfinite(block["self_influence"]) & np.isfinite(losses)
    bad = {int(i): "a loss under its masks" for i in np.flatnonzero(~finite & ~gone)}
    block["state"][list(bad)] = QUARANTINED
    written = put(context, settings, unit, block_key(score.label, at), safetensors.numpy.save(block))
    tokens = int(sum(row["length"] for row in rows))
    return receipt_of(unit, ids, tokens, bad, [written])


def masked_losses(
    context: WorkerContext, settings: dict[str, Any], at: dict[str, Any], ids: np.ndarray, sides: tuple[Side, ...]
) -> dict[str, np.ndarray]:
    """Return every query's loss under every example's masks, float64 [n, Q] for each side."""
    model, score, budget = settings["model"], settings["score"], settings["gradients"].token_budget
    estimator, task = context.masked(model, at["checkpoint"]), context.task(model)
    corpus = context.corpus(None, score.queries)
    asked = [row for s in corpus.segments for row in corpus.read(s, 0, s.rows)]
    lengths = np.array([row["length"] for row in asked], dtype=np.int64)
    found: dict[str, np.ndarray] = {side: np.empty((len(ids), len(asked))) for side in sides}
    for positions in plan_batches(lengths, max(1, budget // _SHARE)):
        batch = task.collate([asked[i] for i in positions]).to(context.device)
        fits = max(1, budget // max(1, int(lengths[positions].max())))
        blocks = estimator.losses(torch.from_numpy(ids), batch, sides, fits)
        for side, block in zip(sides, blocks, strict=True):
            found[side][:, positions] = block.cpu().numpy()
    return found


def own_losses(
    context: WorkerContext, settings: dict[str, Any], at: dict[str, Any], rows: list[dict], gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return every example's loss under its own mask and its flip, float64 [n, 2], and without masks, [n]."""
    model = settings["model"]
    task, turnover = context.task(model), context.masked(model, at["checkpoint"]).turnover
    under, plain = np.full((len(rows), 2), np.nan), np.full(len(rows), np.nan)
    for positions in live_batches(rows, gone, settings["gradients"].token_budget):
        batch: Batch = task.collate([rows[i] for i in positions]).to(context.device)
        for column, side in enumerate(_BOTH):
            under[positions, column] = paired_losses(turnover, task.loss, batch, batch.ids, side).cpu().numpy()
        plain[positions] = full_losses(turnover, task.loss, batch).cpu().numpy()
    return under, plain
