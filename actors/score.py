"""Stage 3: every shard against the query state, in one unit with all checkpoints, down to a top-k and a few sums.

Blocks come from the store's rows, or without a store from what compute.py wrote; both are added in checkpoint order.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from actors.collect import receipt_of
from actors.compute import block_key, scored_ids
from actors.context import WorkerContext
from actors.leftovers import put
from actors.plan import shard_key
from actors.representer import feature_rows
from actors.specs import GradientSpec, ScoreSpec
from actors.standard_errors import shard_errors
from actors.units import Receipt, Unit
from engine.methods.contract import QueryState, Rows, ScoreBlock, averages, load_method
from engine.topk import TopK, top_k
from storage.damage import read_checked
from storage.gradients import DONE, ERASED, QUARANTINED
from storage.locations import Location

_QUERY_BLOCK = 1024  # queries multiplied with a shard and added up at a time
_RANKED = 256  # queries ranked at a time


@dataclass(frozen=True)
class Part:
    """What one checkpoint contributes to a shard."""

    weight: float
    state: np.ndarray  # uint8 [n]
    losses: np.ndarray  # float64 [n]
    queries: int
    blocks: Iterator[ScoreBlock]  # of consecutive windows of queries; only one is in memory


@dataclass(frozen=True)
class ShardScores:
    """What one shard leaves behind: the best and worst of it for every query, and one number per example and kind."""

    ids: np.ndarray  # int64 [n]
    state: np.ndarray  # uint8 [n]: 1 scored, 2 quarantined, 3 erased
    top: TopK
    totals: np.ndarray  # float64 [n]: Σ over queries
    self_influence: np.ndarray  # float64 [n], NaN without exact norms
    losses: np.ndarray  # float64 [n] at the last checkpoint
    dense: np.ndarray | None  # float32 [n, Q] if asked for
    probes: np.ndarray | None = None  # float64 [p, 2], query and score of examples that are no candidates
    errors: np.ndarray | None = None  # float64 [2, Q, k], standard errors of the top-k, where scores are means
    total_errors: np.ndarray | None = None  # float64 [n]
    self_errors: np.ndarray | None = None  # float64 [n]
    through_own: np.ndarray | None = (
        None  # float64 [2, Q, k], what of the top-k goes through Θ, for multi-stage influence
    )
    total_through_own: np.ndarray | None = None  # float64 [n]


def score_unit(context: WorkerContext, settings: dict[str, Any], unit: Unit) -> Receipt:
    """Score one shard under all checkpoints, from stored rows or from computed blocks, and save what is kept."""
    spec: ScoreSpec = settings["score"]
    at = unit.payload
    state = context.state(spec.label, spec.checkpoints[0])
    ids = scored_ids(context, spec, at, state)
    parts = stored_parts(context, settings, at, ids) if spec.stored else computed_parts(context, spec, at)
    shard = add_up(ids, parts, spec, state, context.corpus(spec.home, spec.corpus).erased())
    if averages(load_method(spec.method, spec.method_settings)) and len(spec.checkpoints) > 1:
        blocks = [computed_block(context, spec, at, checkpoint) for checkpoint in spec.checkpoints]
        own = shard_errors(ids, shard.top, shard.state == DONE, blocks)
        shard = replace(shard, errors=own.top, total_errors=own.totals, self_errors=own.self_influence)
    key = scores_key(spec.label, at)
    data = save_scores(shard)
    bad = {int(i): "an earlier stage set it aside" for i in np.flatnonzero(shard.state == QUARANTINED)}
    return receipt_of(unit, ids, 0, bad, [put(context, settings, unit, key, data)])


def stored_parts(
    context: WorkerContext, settings: dict[str, Any], at: dict[str, Any], ids: np.ndarray
) -> Iterator[Part]:
    """Yield every checkpoint's block of this shard, from the rows in the store."""
    spec: ScoreSpec = settings["score"]
    for name in spec.checkpoints:
        states = context.state_windows(spec.label, name)
        about = context.state(spec.label, name)
        yield state_block(context, spec, settings["gradients"], at, ids, name, states, about.weight, len(about.losses))


def state_block(
    context: WorkerContext, spec: ScoreSpec, gradients: GradientSpec, at: dict[str, Any], ids: np.ndarray,
    checkpoint: str, states: Iterable[QueryState], weight: float, queries: int,
) -> Part:  # fmt: skip
    """Return one checkpoint's block of a shard: its stored rows against the query state, given in windows of queries."""
    method = load_method(spec.method, spec.method_settings)
    if method.reads == "features":
        rows, good, losses = feature_rows(context, spec, at, ids, checkpoint)
    else:
        rows, good, losses = gradient_rows(context, spec, gradients, at, ids, checkpoint)
    blocks = (method.score(rows, part) for state in states for part in query_blocks(state))
    return Part(weight, good, losses, queries, blocks)


def gradient_rows(
    context: WorkerContext, spec: ScoreSpec, gradients: GradientSpec, at: dict[str, Any], ids: np.ndarray,
    checkpoint: str,
) -> tuple[Rows, np.ndarray, np.ndarray]:  # fmt: skip
    """Return a shard's stored rows, their state and their losses."""
    block = context.stored_rows(spec.home, spec.corpus, checkpoint, at)
    arrays = {name: torch.from_numpy(array) for name, array in block.rows.items()}
    norms = None if block.norms is None else torch.from_numpy(block.norms)
    return Rows(torch.from_numpy(ids), arrays, norms, gradients.parameters), block.state, block.losses


def windows(queries: int, size: int) -> list[slice]:
    """Return the windows of queries in which a shard is scored, so that its temporaries do not grow with their number."""
    return [slice(begin, min(begin + size, queries)) for begin in range(0, queries, size)]


def query_blocks(state: QueryState) -> Iterator[QueryState]:
    """Yield the state in windows of queries."""
    for window in windows(len(state.losses), _QUERY_BLOCK):
        arrays = {name: array[window] for name, array in state.arrays.items()}
        norms = None if state.norms is None else state.norms[window]
        yield QueryState(arrays, norms, state.losses[window], state.weight, state.chosen)


def add_up(
    ids: np.ndarray, parts: Iterator[Part], spec: ScoreSpec, asked: QueryState | None = None,
    erased: Collection[int] = (),
) -> ShardScores:  # fmt: skip
    """Return the shard's scores: Σ weight · block in checkpoint order, float64, before any top-k.

    Where `asked` names candidates, all but their scores are NaN, and its probes stand apart. Erased examples have none.

    Memory: the sum itself, float64 [n, Q], and temporaries of one window of queries.
    """
    total, own, state, losses = None, None, None, None
    for part in parts:
        stop = 0
        for block in part.blocks:
            window = slice(stop, stop + block.scores.shape[1])
            stop = window.stop
            scores = part.weight * block.scores.double().numpy()
            if total is None:
                total = np.empty((len(ids), part.queries))
            if state is None:
                total[:, window] = scores
            else:
                total[:, window] += scores
            if window.start == 0 and block.self_influence is not None:
                own = part.weight * block.self_influence.double().numpy() + (0.0 if own is None else own)
        state = part.state.copy() if state is None else np.maximum(state, part.state)
        losses = part.losses
    assert total is not None
    assert state is not None
    state[np.isin(ids, list(erased))] = ERASED
    good = state == DONE
    if asked is not None and asked.candidates is not None:
        return over_candidates(ids, total, state, np.asarray(losses), asked, spec)
    totals = np.where(good, total.sum(1), np.nan)
    own = np.full(len(ids), np.nan) if own is None else np.where(good, own, np.nan)
    top = ranked(ids, total, good, spec.top_k)
    dense = dense_scores(total, good) if spec.dense else None
    return ShardScores(ids, state, top, totals, own, np.asarray(losses), dense)


def ranked(ids: np.ndarray, total: np.ndarray, good: np.ndarray, k: int) -> TopK:
    """Return every query's top-k among the rows that are good."""
    parts = [top_k(ids[good], total[good, window], k) for window in windows(total.shape[1], _RANKED)]
    return TopK(np.concatenate([p.ids for p in parts], 1), np.concatenate([p.scores for p in parts], 1))


def over_candidates(
    ids: np.ndarray, total: np.ndarray, state: np.ndarray, losses: np.ndarray, asked: QueryState, spec: ScoreSpec
) -> ShardScores:
    """Return the scores of candidates alone, and beside them those of probes."""
    assert asked.candidates is not None
    good = (state == DONE)[:, None]
    candidate = good & pairs(ids, asked.candidates)
    total = np.where(good, total, np.nan)
    probes = None
    if asked.probes is not None:
        rows, queries = np.nonzero(good & pairs(ids, asked.probes))
        probes = np.stack([queries.astype(np.float64), total[rows, queries]], 1)
    total[~candidate] = np.nan
    tops = [padded(top_k(ids[own], column[own, None], spec.top_k), spec.top_k)
            for own, column in zip(candidate.T, total.T, strict=True)]  # fmt: skip
    top = TopK(np.concatenate([t.ids for t in tops], 1), np.concatenate([t.scores for t in tops], 1))
    totals = np.where(candidate.any(1), np.nansum(total, 1), np.nan)
    dense = total.astype(np.float32) if spec.dense else None
    return ShardScores(ids, state, top, totals, np.full(len(ids), np.nan), losses, dense, probes)


def pairs(ids: np.ndarray, chosen: torch.Tensor) -> np.ndarray:
    """Return bool [n, Q]: whether an example is among a query's chosen ones."""
    return np.stack([np.isin(ids, own) for own in chosen.numpy()], 1)


def padded(top: TopK, k: int) -> TopK:
    """Return a top-k of full length: id −1 and NaN where there are fewer."""
    more = ((0, 0), (0, 0), (0, k - top.ids.shape[2]))
    return TopK(np.pad(top.ids, more, constant_values=-1), np.pad(top.scores, more, constant_values=np.nan))


def dense_scores(total: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Return the scores as they are kept, float32 [n, Q], NaN for rows that are not good."""
    dense = total.astype(np.float32)
    dense[~good] = np.nan
    return dense


def computed_parts(context: WorkerContext, spec: ScoreSpec, at: dict[str, Any]) -> Iterator[Part]:
    """Yield every checkpoint's block of this shard, from what compute_unit wrote."""
    for checkpoint in spec.checkpoints:
        block = computed_block(context, spec, at, checkpoint)
        state, scores = context.state(spec.label, checkpoint), torch.from_numpy(block["scores"])
        own = None if np.isnan(block["self_influence"]).all() else torch.from_numpy(block["self_influence"])
        blocks = (ScoreBlock(scores[:, window], own) for window in windows(scores.shape[1], _QUERY_BLOCK))
        yield Part(state.weight, block["state"], block["losses"], scores.shape[1], blocks)


def computed_block(
    context: WorkerContext, spec: ScoreSpec, at: dict[str, Any], checkpoint: str
) -> dict[str, np.ndarray]:
    """Return what one checkpoint's unit computed of a shard. Raises DamagedObject."""
    unit = f"{checkpoint}-{shard_key(spec.corpus, at)}"
    key = block_key(spec.label, at | {"checkpoint": checkpoint})
    return safetensors.numpy.load(read_checked(context.run, f"compute-{spec.label}", unit, key))


def scores_key(label: str, at: dict[str, Any]) -> str:
    return f"scores/{label}/shards/{at['segment']}-{at['start']:09d}.safetensors"


def save_scores(shard: ShardScores) -> bytes:
    arrays = {k: v for k, v in vars(shard).items() if k != "top" and v is not None}
    arrays |= {"top_ids": shard.top.ids, "top_scores": shard.top.scores}
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def load_shard(run: Location, label: str, corpus: str, at: dict[str, Any]) -> ShardScores:
    """Return the scores of one shard, compared with its done-record. Raises DamagedObject."""
    key = scores_key(label, at)
    return _parse(read_checked(run, f"score-{label}", shard_key(corpus, at), key))


def load_scores(run: Location, key: str) -> ShardScores:
    return _parse(run.read(key))


def _parse(data: bytes) -> ShardScores:
    arrays = safetensors.numpy.load(data)
    top = TopK(arrays.pop("top_ids"), arrays.pop("top_scores"))
    return ShardScores(**arrays | {"top": top, "dense": arrays.get("dense")})
