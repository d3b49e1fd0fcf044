"""A shard's scores of multi-stage influence: the sum of both parts, and beside it how much goes through Θ alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from actors.collect import receipt_of
from actors.context import WorkerContext
from actors.leftovers import put
from actors.score import Part, add_up, computed_block, save_scores, scores_key
from actors.specs import ScoreSpec
from actors.units import Receipt, Unit
from engine.methods.contract import ScoreBlock
from storage.gradients import DONE, QUARANTINED


def multistage_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Score one shard of the pretraining corpus from its computed block [n, 2Q] and save what is kept."""
    spec: ScoreSpec = settings["score"]
    at, [checkpoint] = unit.payload, spec.checkpoints
    ids, state = context.ids(spec.home, spec.corpus, at), context.state(spec.label, checkpoint)
    block = computed_block(context, spec, at, checkpoint)
    own, through_shared = np.split(block["scores"], 2, axis=1)
    both = ScoreBlock(torch.from_numpy(own + through_shared), None)
    part = Part(state.weight, block["state"], block["losses"], own.shape[1], iter([both]))
    shard = add_up(ids, iter([part]), spec, erased=context.corpus(spec.home, spec.corpus).erased())
    own *= state.weight
    places, queries = np.searchsorted(ids, shard.top.ids), np.arange(own.shape[1])[None, :, None]
    totals = np.where(shard.state == DONE, own.sum(1), np.nan)
    shard = replace(shard, through_own=own[places, queries], total_through_own=totals)
    bad = {int(i): "an earlier stage set it aside" for i in np.flatnonzero(shard.state == QUARANTINED)}
    return receipt_of(unit, ids, 0, bad, [put(context, settings, unit, scores_key(spec.label, at), save_scores(shard))])
