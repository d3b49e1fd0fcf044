import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors import score
from actors.score import Part, ShardScores, add_up, load_scores, query_blocks, save_scores
from actors.specs import ScoreSpec
from engine.methods.contract import QueryState, ScoreBlock
from engine.topk import TopK, top_k
from storage.gradients import DONE, QUARANTINED
from storage.locations import Location

SPEC = ScoreSpec("l", "tracin", {}, ("a", "b"), "q", "train", None, True, top_k=2, dense=True)
IDS = np.array([10, 11, 12])


def part(weight: float, scores: Any, state: tuple[int, ...] = (DONE, DONE, DONE), own: Any = None) -> Part:
    scores = torch.as_tensor(scores)
    n, queries = scores.shape
    blocks = (ScoreBlock(scores[:, window], own) for window in score.windows(queries, score._QUERY_BLOCK))
    return Part(weight, np.array(state, np.uint8), np.full(n, weight), queries, blocks)


def at_once(ids: np.ndarray, parts: list[tuple[float, np.ndarray]], good: np.ndarray, k: int) -> tuple[Any, ...]:
    """Return sum, totals and top-k of all queries in one piece: what windows of queries must not change."""
    total = parts[0][0] * parts[0][1].astype(np.float64)
    for weight, scores in parts[1:]:
        total = total + weight * scores.astype(np.float64)
    return (
        np.where(good[:, None], total, np.nan),
        np.where(good, total.sum(1), np.nan),
        top_k(ids[good], total[good], k),
    )


def test_windows_of_queries_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(score, "_RANKED", 3)
    generator = np.random.default_rng(0)
    blocks = [(w, generator.normal(size=(30, 21)).astype(np.float32)) for w in (0.3, 0.7, 0.1)]
    state = [DONE] * 30
    state[4] = QUARANTINED
    ids, good = np.arange(30) + 5, np.array(state) == DONE
    spec = replace(SPEC, top_k=6)
    found = add_up(ids, (part(w, s, tuple(state)) for w, s in blocks), spec)
    total, totals, top = at_once(ids, blocks, good, 6)
    assert found.dense is not None
    assert found.dense.tobytes() == total.astype(np.float32).tobytes()
    assert found.totals.tobytes() == totals.tobytes()
    assert (found.top.ids == top.ids).all()
    assert found.top.scores.tobytes() == top.scores.tobytes()
    _, other, _ = at_once(ids, [(2 * w, s) for w, s in blocks], good, 6)
    assert found.totals.tobytes() != other.tobytes()


def test_memory_beside_the_sum_does_not_grow_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "_QUERY_BLOCK", 16)
    monkeypatch.setattr(score, "_RANKED", 16)

    def extra(queries: int) -> int:
        scores = torch.zeros(200, queries)
        tracemalloc.start()
        add_up(np.arange(200), iter([part(1.0, scores, (DONE,) * 200)]), replace(SPEC, dense=False))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - 200 * queries * 8

    assert extra(1600) < 2 * extra(160)


def test_blocks_are_weighed_and_added_before_the_ranking() -> None:
    own = torch.tensor([1.0, 2.0, 3.0])
    parts = [part(0.5, [[2.0], [4.0], [6.0]], own=own), part(2.0, [[3.0], [0.0], [-4.0]], own=own)]
    found = add_up(IDS, iter(parts), SPEC)
    assert found.totals.tolist() == [7.0, 2.0, -5.0]
    assert found.self_influence.tolist() == [2.5, 5.0, 7.5]
    assert found.losses.tolist() == [2.0] * 3, "those of the last checkpoint"
    assert found.top.ids[:, 0].tolist() == [[10, 11], [12, 11]]
    assert found.dense is not None
    assert found.dense.ravel().tolist() == [7.0, 2.0, -5.0]


def test_a_row_set_aside_at_one_checkpoint_is_in_no_ranking() -> None:
    nan = float("nan")
    parts = [part(1.0, [[1.0], [2.0], [3.0]]), part(1.0, [[1.0], [2.0], [nan]], (DONE, DONE, QUARANTINED))]
    found = add_up(IDS, iter(parts), SPEC)
    assert found.state.tolist() == [DONE, DONE, QUARANTINED]
    assert found.top.ids[0, 0].tolist() == [11, 10]
    assert np.isnan(found.totals).tolist() == [False, False, True]
    assert np.isnan(found.self_influence).all(), "there were no norms"


def test_the_scores_of_a_shard_without_any_good_row() -> None:
    found = add_up(IDS, iter([part(1.0, [[0.0]] * 3, (QUARANTINED,) * 3)]), SPEC)
    assert found.top.ids.shape == (2, 1, 0)


@pytest.mark.parametrize("dense", [None, np.ones((3, 1), np.float32)])
def test_scores_come_back_as_they_were(dense: np.ndarray | None, tmp_path) -> None:
    top = TopK(np.array([[[10]], [[12]]]), np.array([[[1.0]], [[-1.0]]]))
    numbers = np.arange(3.0)
    shard = ShardScores(IDS, np.ones(3, np.uint8), top, numbers, numbers + 1, numbers + 2, dense)
    run = Location(str(tmp_path))
    run.create("scores/x", save_scores(shard))
    found = load_scores(run, "scores/x")
    assert (found.ids == IDS).all()
    assert (found.top.ids == top.ids).all()
    assert (found.losses == shard.losses).all()
    assert (found.dense is None) == (dense is None)


def test_queries_come_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.score._QUERY_BLOCK", 2)
    rows = torch.arange(10.0).reshape(5, 2)
    blocks = list(query_blocks(QueryState({"rows": rows}, rows, rows[:, 0], 0.5, (0,))))
    assert [len(block.losses) for block in blocks] == [2, 2, 1]
    assert torch.equal(torch.cat([block.arrays["rows"] for block in blocks]), rows)
