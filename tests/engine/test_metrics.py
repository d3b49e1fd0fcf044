import numpy as np
import pytest

from engine.metrics import auroc, bootstrap_interval, found_in_top
from tests import oracles


def test_auroc_equals_counting_pairs_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60), rng.random(60) < 0.3
    assert auroc(scores, positive) == pytest.approx(oracles.auroc(scores, positive), abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - oracles.auroc(scores, positive), abs=1e-12)
    assert auroc(np.arange(4), np.array([0, 0, 1, 1])) == 1.0


def test_auroc_of_one_kind_is_refused():
    with pytest.raises(ValueError, match="3 positives, 0 negatives"):
        auroc(np.arange(3), np.ones(3))


def test_found_in_top_counts_positives_among_the_highest():
    scores, positive = np.array([0.1, 0.9, 0.8, 0.2, 0.8]), np.array([1, 1, 0, 0, 1])
    assert found_in_top(scores, positive, 0.4) == pytest.approx(1 / 3)
    assert found_in_top(scores, positive, 0.6) == pytest.approx(2 / 3)
    assert found_in_top(scores, positive, 1.0) == 1.0


def test_bootstrap_interval_is_near_the_normal_one_and_repeats():
    values = np.random.default_rng(1).normal(2.0, 1.0, 100)
    low, high = bootstrap_interval(values, draws=2000)
    half = 1.96 * values.std() / 10
    assert low == pytest.approx(values.mean() - half, abs=0.05)
    assert high == pytest.approx(values.mean() + half, abs=0.05)
    assert bootstrap_interval(values, draws=2000) == (low, high)
    assert bootstrap_interval(np.full(5, 3.0)) == (3.0, 3.0)


def test_bootstrap_of_a_median_holds_the_median():
    values = np.append(np.random.default_rng(2).normal(1.0, 0.1, 40), 1000.0)
    low, high = bootstrap_interval(values, draws=2000, statistic=np.median)
    assert low < np.median(values) < high < 1.2
