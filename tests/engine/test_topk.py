import itertools

import numpy as np
import pytest

from engine import topk
from engine.topk import TopK, merge, top_k
from tests import oracles


def tied_scores(n: int = 60, queries: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(n) + 2**40
    return ids, rng.integers(-3, 4, (n, queries)).astype(np.float64)  # seven values: nearly everything is a tie


def pairs(found: TopK) -> tuple[list, list]:
    both = [
        [list(zip(s.tolist(), i.tolist(), strict=True)) for s, i in zip(scores, ids, strict=True)]
        for scores, ids in zip(found.scores, found.ids, strict=True)
    ]
    return both[0], both[1]


@pytest.mark.parametrize("k", [0, 1, 5, 59, 60, 100])
def test_both_ends_equal_a_full_sort_with_ties_by_id(k):
    ids, scores = tied_scores()
    assert pairs(top_k(ids, scores, k)) == oracles.top_k(ids, scores, k)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_merges_in_any_order_equal_one_sort(k):
    ids, scores = tied_scores()
    parts = [top_k(ids[s], scores[s], k) for s in (slice(0, 7), slice(7, 9), slice(9, 40), slice(40, 60))]
    truth = oracles.top_k(ids, scores, k)
    for order in itertools.permutations(parts):
        left = merge(merge(merge(order[0], order[1], k), order[2], k), order[3], k)
        tree = merge(merge(order[0], order[1], k), merge(order[2], order[3], k), k)
        assert pairs(left) == pairs(tree) == truth


def test_an_empty_shard_merges_to_the_other():
    ids, scores = tied_scores()
    empty = top_k(ids[:0], scores[:0], 3)
    assert pairs(merge(empty, top_k(ids, scores, 3), 3)) == oracles.top_k(ids, scores, 3)


def test_float32_scores_and_infinities_are_ranked():
    scores = np.array([[1.0], [np.inf], [-np.inf]], dtype=np.float32)
    found = top_k(np.array([5, 6, 7]), scores, 2)
    assert found.ids.tolist() == [[[6, 5]], [[7, 5]]]
    assert found.scores.dtype == np.float64


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        top_k(np.array([1, 2]), np.array([[0.0], [np.nan]]), 1)


def test_swapped_ends_and_forgotten_ties_are_caught(caught):
    ids, scores = tied_scores()

    def compare() -> None:
        assert pairs(topk.top_k(ids, scores, 5)) == oracles.top_k(ids, scores, 5)

    lowest = topk._lowest
    caught(compare, topk, "_lowest", lambda ids, keys, k: lowest(ids, -keys, k))
    caught(compare, topk, "_lowest", lambda ids, keys, k: np.argsort(keys, axis=0, kind="stable")[:k])
