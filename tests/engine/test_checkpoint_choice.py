"""TracIn's appendix D as a rule: which checkpoints of a loss curve are kept, and what is said of the others."""

import math
import re
from collections import Counter

import numpy as np
import pytest

from engine import checkpoint_choice
from engine.checkpoint_choice import choose_checkpoints, losses_at, noisy_start

STEEP = [1.0, 0.4, 0.5, 0.3, 0.25, 0.2, 0.15, 0.1, 0.09, 0.08, 0.05, 0.04, 0.02, 0.01, 0.0, 0.0]


def kept(losses: list[float | None], count: int) -> list[int]:
    return [i for i, verdict in enumerate(choose_checkpoints(losses, count)) if verdict.kept]


def slow_choice(losses: list[float], count: int) -> list[int]:
    """Return what is kept of a curve without a noisy start, one level of the loss after the other, by a full scan."""
    chosen: list[int] = []
    for part in range(1, count + 1):
        level = losses[0] - 0.95 * (losses[0] - min(losses)) * part / count
        fits = [
            i for i, loss in enumerate(losses)
            if loss <= level and loss < min(losses[:i], default=loss) and (not chosen or i > chosen[-1])
        ]  # fmt: skip
        if not fits:
            return []
        chosen.append(fits[0])
    return chosen


def test_equals_the_levels_scanned_one_by_one() -> None:
    generator, compared = np.random.default_rng(0), 0
    for _ in range(300):
        losses = list(np.exp(-0.2 * np.arange(20)) + 0.02 * generator.standard_normal(20))
        truth = slow_choice(losses, 4)
        lows = [i for i in range(1, 20) if losses[i] < min(losses[:i])]
        done = next(i for i in lows if losses[i] <= losses[0] - 0.95 * (losses[0] - min(losses)))
        if truth and truth[-1] <= done and noisy_start(losses) == 0:
            assert kept(losses, 4) == truth
            compared += 1
    assert compared > 100


def test_is_denser_where_the_loss_falls_faster() -> None:
    fast_then_slow = [1.0 - 0.09 * i for i in range(8)] + [0.37 - 0.02 * i for i in range(1, 17)]
    assert sum(i < 8 for i in kept(fast_then_slow, 6)) == 4  # 63 % of the fall in a third of the time
    assert kept(STEEP, 4) == [1, 3, 4, 10]


@pytest.mark.parametrize(
    ("curve", "position", "why"),
    [
        (STEEP, 0, "first: nothing to compare it with"),
        (STEEP, 2, "no decrease: the loss was 0.4 before it"),
        (STEEP, 7, "between two that are kept"),
        (STEEP, 13, "training has converged: 95% of the fall of the loss was over before it"),
        (STEEP, 4, "part 3 of 4 of the fall"),
        ([2.3, 2.9, 2.0, 2.6, *STEEP[1:]], 2, "noisy start: more than half of the decrease was lost again"),
        ([1.0, None, *STEEP[1:]], 1, "no loss is logged since the checkpoint before it"),
    ],
)
def test_says_why(curve: list[float | None], position: int, why: str) -> None:
    verdict = choose_checkpoints(curve, 4)[position]
    assert (verdict.why, verdict.kept) == (why, why.startswith("part"))


def test_a_noisy_start_ends_where_its_gains_are_kept() -> None:
    assert noisy_start([2.3, 1.9, 2.2, 1.8, 2.1, 1.5, 1.2, 1.0]) == 4
    assert noisy_start([2.3, 1.9, 2.0, 1.8, 1.9, 1.5, 1.2, 1.0]) == 0  # only fluctuates on its way down
    assert noisy_start([1.0, 0.5, 0.4, 0.6, 0.9]) == 0  # overfitting at the end is no start
    assert min(kept([2.3, 1.9, 2.2, 1.8, 2.1, 1.5, 1.2, 1.0], 3)) > 4
    assert kept([1.0, 0.5, 0.4, 0.6, 0.9], 2) == [1, 2]


def test_a_plateau_after_convergence_and_equal_losses_give_nothing() -> None:
    plateau = [math.exp(-i) for i in range(5)] + [0.0183 - 1e-6 * i for i in range(50)]
    assert max(kept(plateau, 3)) <= 4
    steps = [loss for level in (1.0, 0.6, 0.3, 0.1) for loss in [level] * 4]
    assert kept(steps, 3) == [4, 8, 12]  # a staircase: the first checkpoint of every stair


def test_scale_and_level_of_the_loss_do_not_count() -> None:
    for curve in (STEEP, [2.3, 2.9, 2.0, 2.6, *STEEP[1:]]):
        assert [v.kept for v in choose_checkpoints(curve, 4)] == [
            v.kept for v in choose_checkpoints([128 * loss for loss in curve], 4)
        ]
        assert kept([loss + 0.5 for loss in curve], 4) == kept(curve, 4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_keeps_as_many_as_asked_for_when_there_are_exactly_so_many(count: int) -> None:
    losses = [1.0] + [0.9 - 0.1 * i for i in range(count - 1)] + [0.0]  # the last part is by far the largest
    assert kept(losses, count) == list(range(1, count + 1))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, 0.5, 0.2, 0.1], "choose=6 is not allowed: of 4 checkpoints 3 lie where .* (1: first)"),
        ([1.0, 1.1, 1.2], "of 3 checkpoints 0 lie where .* (1: first, 2: no decrease)"),
        ([0.5], "of 1 checkpoints 0 lie"),
        ([None, None], "of 2 checkpoints 0 lie where .* (2: no loss is logged since the checkpoint before it)"),
        ([1.0, 0.0, 0.5, 0.5], "1 lie where .* (1: first, 2: training has converged). Choose at most that many"),
    ],
)
def test_too_few_are_refused_with_the_reasons(losses: list[float | None], said: str) -> None:
    pattern = re.escape(said).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        choose_checkpoints(losses, 6)


def test_a_checkpoints_loss_is_the_mean_since_the_one_before() -> None:
    curve = [(1, 9.0), (6, 5.0), (10, 3.0), (11, 2.0), (20, 1.0), (40, 0.5)]
    assert losses_at([10, 20, 30, 40], curve) == [17 / 3, 1.5, None, 0.5]
    assert losses_at([20, 30, 40], curve) == [1.5, None, 0.5]  # the oldest were deleted: step 1 does not count
    assert losses_at([10], curve) == [17 / 3]
    assert losses_at([10, 20], []) == [None, None]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match=f"the loss logged at step 7 is {loss}. List the checkpoints"):
        losses_at([10], [(3, 1.0), (7, loss)])


def test_random_curves_give_one_verdict_each_and_only_new_lows_are_kept() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        losses = list(generator.random(30) * np.linspace(1, 0.2, 30))
        try:
            verdicts = choose_checkpoints(losses, 2)
        except ValueError:
            continue
        assert Counter(v.kept for v in verdicts) == {True: 2, False: 28}
        assert all(losses[i] < min(losses[:i]) for i, v in enumerate(verdicts) if v.kept)


def test_mutants_of_the_rule_are_caught(caught) -> None:
    def compare() -> None:
        assert kept([2.3, 1.9, 2.2, 1.8, 2.1, *STEEP[1:]], 4) == [5, 7, 8, 12]  # levels 1.37, 0.94, 0.52, 0.09

    def evenly(losses: list[float], top: float, whole: float, count: int) -> list[int]:
        return [round((i + 1) * len(losses) / count) - 1 for i in range(count)]

    caught(compare, checkpoint_choice, "noisy_start", lambda losses: 0)
    caught(compare, checkpoint_choice, "CONVERGED", 1.0)
    caught(compare, checkpoint_choice, "_spread", evenly)
