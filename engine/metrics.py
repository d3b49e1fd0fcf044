"""Figures that say how good a ranking is."""

from collections.abc import Callable

import numpy as np
from scipy import stats


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the chance that a positive outranks a negative, ties counted half (Mann-Whitney)."""
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        raise ValueError(f"AUROC needs both kinds: {n} positives, {m} negatives")
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def found_in_top(scores: np.ndarray, positive: np.ndarray, share: float) -> float:
    """Return the share of positives that stand in the top share of the scores, ties broken by position."""
    positive = np.asarray(positive, dtype=bool)
    count = round(share * len(scores))
    top = np.argsort(-np.asarray(scores), kind="stable")[:count]
    return float(positive[top].sum() / positive.sum())


def bootstrap_interval(
    values: np.ndarray,
    seed: int = 0,
    draws: int = 10_000,
    statistic: Callable[..., np.ndarray] = np.mean,  # or np.median: of every row of (draws, n), with axis=1
) -> tuple[float, float]:
    """Return the statistic's 95 % percentile interval, resampling the given units (seeds, queries, subsets, pairs)."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(statistic(values[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)
