import numpy as np
import pytest
import torch

from actors.score import ShardScores, add_up, load_scores, query_blocks, save_scores
from actors.specs import ScoreSpec
from engine.methods.contract import QueryState
from engine.topk import TopK
from storage.gradients import DONE, QUARANTINED
from storage.locations import Location

SPEC = ScoreSpec("l", "tracin", {}, ("a", "b"), "q", "train", None, True, top_k=2, dense=True)
IDS = np.array([10, 11, 12])


def part(weight: float, scores: list[list[float]], state: tuple[int, ...] = (DONE, DONE, DONE), own=None):
    losses = np.full(3, weight)
    return weight, np.array(state, np.uint8), torch.tensor(scores), own, losses


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
