"""Density, rank correlation and the three scores of tracin.density against their definitions."""

import numpy as np
import pytest
import torch
from scipy import stats

from launch.experiments.tracin_density import (
    density,
    gates,
    mean_spearman,
    mlp,
    output,
    patients,
    squared_error,
    squared_norms,
)

CONFIG = {"data": "tests/data/diabetes.csv.gz", "rows": 40, "width": 5}


def test_density_is_the_inverse_mean_distance_to_the_nearest_others() -> None:
    points = np.array([[0.0, 0], [1, 0], [0, 2], [10, 0]])
    assert density(points, 2) == pytest.approx([1 / 1.5, 2 / (1 + 5**0.5), 2 / (2 + 5**0.5), 2 / (9 + 10)])


def test_measurements_and_target_are_standardised_over_the_patients() -> None:
    data = patients(CONFIG)
    assert (data["x"].shape, data["y"].shape) == ((40, 10), (40,))
    assert data["x"].mean(0).abs().max() < 1e-6
    assert data["x"].var(0, correction=0) == pytest.approx(1, abs=1e-5)


def test_self_influence_is_four_times_the_loss_times_the_squared_norm_of_the_outputs_gradient() -> None:
    torch.manual_seed(0)
    model, data = mlp(CONFIG), patients(CONFIG)
    own, losses = squared_norms(model, squared_error, data)
    assert own == pytest.approx(4 * losses * squared_norms(model, output, data)[0], rel=1e-4)
    for row in range(3):
        for weight in model.parameters():
            weight.requires_grad_(True)
        parts = torch.autograd.grad(squared_error(model, data)[row], list(model.parameters()))
        assert own[row] == pytest.approx(sum(float(part.double().square().sum()) for part in parts), rel=1e-4)


def test_correlation_is_the_mean_over_seeds_and_its_interval_resamples_patients() -> None:
    generator = np.random.default_rng(1)
    dense = generator.random(200)
    scores = np.array([-dense + generator.random(200), generator.random(200)])
    value, (low, high) = mean_spearman(scores, dense, draws=200)
    assert value == pytest.approx(np.mean([stats.spearmanr(row, dense).statistic for row in scores]))
    assert low < value < high


@pytest.mark.parametrize(("sign", "passed"), [(-1, True), (1, False)])
def test_gate_asks_that_the_whole_interval_lies_below_zero(sign: int, passed: bool) -> None:
    dense = density(patients(CONFIG)["x"].double().numpy(), 10)
    scores = {name: (sign * dense).tolist() for name in ("self_influence", "loss", "output")}
    gate = gates(CONFIG, {"seed-0": {"scores": scores, "explained": 0.5}})[0]
    assert gate.record()["pass"] is passed
