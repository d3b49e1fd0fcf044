"""Standard errors of scores that are means over checkpoints: of a shard's strongest, its totals and its self-influence."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.masks import average
from engine.topk import TopK


@dataclass(frozen=True)
class Errors:
    """Standard errors of one shard's scores, float64."""

    top: np.ndarray  # [2, Q, k], in the order of the top-k
    totals: np.ndarray  # [n], NaN for rows that are not scored
    self_influence: np.ndarray  # [n], likewise


def shard_errors(
    ids: np.ndarray,  # int64 [n], ascending
    top: TopK,  # of these rows
    good: np.ndarray,  # bool [n], rows that are scored
    blocks: list[dict[str, np.ndarray]],  # scores [n, Q] and self_influence [n] of every checkpoint
) -> Errors:
    """Return the standard errors of a shard's means over the checkpoints."""
    errors = _error(block["scores"] for block in blocks)
    places, queries = np.searchsorted(ids, top.ids), np.arange(errors.shape[1])[None, :, None]
    return Errors(
        errors[places, queries],
        np.where(good, _error(block["scores"].sum(1) for block in blocks), np.nan),
        np.where(good, _error(block["self_influence"] for block in blocks), np.nan),
    )


def _error(blocks: Iterable[np.ndarray]) -> np.ndarray:
    _, error = average(torch.from_numpy(np.asarray(block)) for block in blocks)
    assert error is not None
    return error.numpy()


def merged_errors(top: TopK, shards: Iterable[tuple[TopK, np.ndarray | None]]) -> np.ndarray | None:
    """Return the standard errors of a top-k over all shards from those of each, [2, Q, k]; None if the shards have none."""
    found = np.full(top.scores.shape, np.nan)
    for part, errors in shards:
        if errors is None:
            return None
        for side, query in np.ndindex(*part.ids.shape[:2]):
            own, asked = part.ids[side, query], top.ids[side, query]
            known = dict(zip(own.tolist(), errors[side, query].tolist(), strict=True))
            found[side, query] = [known.get(i, e) for i, e in zip(asked.tolist(), found[side, query], strict=True)]
    return found
