import itertools

import numpy as np
import pytest
import torch

from engine.batches import Batch, collate_ids, pad, plan_batches


def test_plan_covers_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    plan = plan_batches(lengths, 100)
    assert sorted(np.concatenate(plan).tolist()) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 100 for batch in plan)
    assert len(plan) < 100


def test_no_batch_of_the_plan_could_have_taken_the_next_row():
    lengths = np.random.default_rng(1).integers(1, 40, 100)
    plan = plan_batches(lengths, 90)
    for batch, following in itertools.pairwise(plan):
        assert (len(batch) + 1) * lengths[following[0]] > 90


def test_rows_of_equal_length_keep_their_order():
    assert [b.tolist() for b in plan_batches(np.array([2, 1, 2, 1]), 4)] == [[1, 3], [0, 2]]


def test_a_row_beyond_the_budget_stands_alone_and_no_rows_give_no_batches():
    assert [b.tolist() for b in plan_batches(np.array([50, 1, 60]), 10)] == [[1], [0], [2]]
    assert plan_batches(np.array([], dtype=np.int64), 10) == []


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="token_budget=0"):
        plan_batches(np.array([1]), 0)


def test_pad_puts_sequences_left():
    assert pad([np.array([5, 6], dtype=np.int32), np.array([7])], 9).tolist() == [[5, 6], [7, 9]]


def test_ids_hold_numbers_up_to_two_to_the_forty():
    ids = collate_ids([{"id": 2**40}, {"id": np.int64(2**40 + 1)}, {}])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [2**40, 2**40 + 1, -1]


def test_batch_moves_with_its_ids():
    batch = Batch(torch.tensor([3, 4]), {"x": torch.ones(2, 1)}).to(torch.device("cpu"))
    assert len(batch) == 2
    assert batch["x"].shape == (2, 1)
    assert batch.ids.tolist() == [3, 4]
