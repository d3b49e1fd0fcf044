"""The χ² test of tracin.checkpoints by hand, and what its gate asks."""

import numpy as np
import pytest
import torch

from launch.experiments.tracin_checkpoints import chi_squared, class_counts, gates


def test_chi_squared_is_the_sum_over_cells_and_ignores_classes_that_never_occur() -> None:
    table = np.array([[30, 10, 20], [20, 25, 15], [10, 25, 25]])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    with_empty = np.insert(table, 1, 0, axis=1).tolist()
    p, v = chi_squared(with_empty)
    draws = np.random.default_rng(0).chisquare(4, 200_000)
    assert p == pytest.approx((draws >= statistic).mean(), abs=1e-3)
    assert v == pytest.approx((statistic / table.sum() / 2) ** 0.5)
    assert chi_squared([[5, 7], [5, 7], [5, 7]]) == (pytest.approx(1), pytest.approx(0))


def test_the_seed_that_differs_least_decides() -> None:
    alike, apart = [[20] * 10] * 3, [[20] * 10, [1] * 5 + [39] * 5, [39] * 5 + [1] * 5]

    def passed(*tables: list[list[int]]) -> bool:
        done = {
            f"seed-{i}": {"given": table, "found": table, "dealt": alike, "in_all": 0.5}
            for i, table in enumerate(tables)
        }
        return gates({}, done)[0].record()["pass"]

    assert passed(apart, apart)
    assert not passed(apart, alike)


def test_classes_are_counted_among_the_rows_given() -> None:
    assert class_counts(torch.tensor([3, 3, 0, 9]), np.array([0, 1, 3])) == [0, 0, 0, 2, 0, 0, 0, 0, 0, 1]
