"""Candidates by nearest features, and what they miss."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Nearest:
    """Which training examples a query is compared with: the nearest by L2 distance of features."""

    count: int  # k
    features: str  # a key of engine.features.FEATURES
    anchors: bool  # one list for all queries: the nearest of their mean
    recall_sample: int  # other examples that each sampled query is compared with


def estimated_recall(
    candidates: np.ndarray,  # scores of the query's strongest candidates
    probes: np.ndarray,  # scores of other examples, drawn at random
    others: int,  # how many there are that are no candidates
    m: int,
) -> float:
    """Return the estimated share of the m examples strongest by |score| that are candidates.

    Each probe stands for others/len(probes) examples (Horvitz & Thompson 1952); the strongest are counted until there
    are m.
    """
    if others == 0:
        return 1.0
    weight = np.concatenate([np.ones(len(candidates)), np.full(len(probes), others / len(probes))])
    own = np.concatenate([np.ones(len(candidates)), np.zeros(len(probes))])
    order = np.argsort(-np.abs(np.concatenate([candidates, probes])), kind="stable")
    before = np.cumsum(weight[order]) - weight[order]
    counted = np.clip(m - before, 0, weight[order])  # of each, as much as is left of m
    return float((counted * own[order]).sum() / counted.sum())
