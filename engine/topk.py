"""A running top-k at both ends of every query's scores, mergeable in any order, ties broken by the smaller id."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TopK:
    """Per query the k highest (`proponents`) and k lowest (`opponents`) scores, best first; shorter if there are fewer."""

    ids: np.ndarray  # int64 [2, Q, k]: proponents, opponents
    scores: np.ndarray  # float64 [2, Q, k]


def top_k(ids: np.ndarray, scores: np.ndarray, k: int) -> TopK:
    """Return both ends of scores [n, Q] for rows with these ids [n].

    Raises ValueError for a NaN: a quarantined row must be left out before.
    """
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: leave quarantined rows out before ranking")
    ends = [_lowest(ids, sign * scores, k) for sign in (-1.0, 1.0)]
    return TopK(
        np.stack([ids[order].T for order in ends]),
        np.stack([np.take_along_axis(scores, order, axis=0).T for order in ends]).astype(np.float64),
    )


def _lowest(ids: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """Return [min(k, n), Q]: row positions of the lowest keys of every column, ties by id."""
    n = len(ids)
    k = min(k, n)
    if k == 0:
        return np.empty((0, keys.shape[1]), dtype=np.int64)
    if k == n:
        return np.lexsort((np.broadcast_to(ids[:, None], keys.shape), keys), axis=0)
    bound = np.partition(keys, k - 1, axis=0)[k - 1]
    out = np.empty((k, keys.shape[1]), dtype=np.int64)
    for column in range(keys.shape[1]):
        near = np.flatnonzero(keys[:, column] <= bound[column])  # everything tied with the k-th is in the running
        out[:, column] = near[np.lexsort((ids[near], keys[near, column]))[:k]]
    return out


def without(top: TopK, ids: Collection[int]) -> TopK:
    """Return a top-k of the same shape that lacks these ids: the others move up, id −1 and NaN fill the end."""
    gone = np.isin(top.ids, np.fromiter(ids, np.int64, len(ids)))
    order = np.argsort(gone, axis=2, kind="stable")
    there = ~np.take_along_axis(gone, order, axis=2)
    return TopK(
        np.where(there, np.take_along_axis(top.ids, order, axis=2), -1),
        np.where(there, np.take_along_axis(top.scores, order, axis=2), np.nan),
    )


def merge(a: TopK, b: TopK, k: int) -> TopK:
    """Return the top-k of two disjoint sets of rows from the top-k of each."""
    ids = np.concatenate([a.ids, b.ids], axis=2)
    scores = np.concatenate([a.scores, b.scores], axis=2)
    keys = np.stack([-scores[0], scores[1]])
    order = np.lexsort((ids, keys), axis=2)[:, :, :k]
    return TopK(np.take_along_axis(ids, order, axis=2), np.take_along_axis(scores, order, axis=2))
