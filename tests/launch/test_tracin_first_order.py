"""The figures of tracin.first-order on effects whose answer is known."""

import pytest
import torch

from engine.methods.tracin_ideal import StepEffect
from launch.experiments.tracin_first_order import by_digit, cell_of, compare, gates, runs

DIGITS = torch.tensor([1.0, 100.0])


def effects(slope: float, bend: float) -> list[StepEffect]:
    """Return 50 steps of two test digits of very different scale whose falls follow slope and a square."""
    said = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * DIGITS
    return [StepEffect(slope * s + bend * s.square() / DIGITS, s) for s in said]


def test_slope_and_correlation_are_taken_for_each_digit() -> None:
    found = compare(effects(0.8, 0.0), seed=0)
    assert found["slope"] == pytest.approx([0.8, 0.8])
    assert found["r"] == pytest.approx([1, 1])
    assert found["r_all"] == pytest.approx(1)
    bent = compare(effects(1.0, 2.0), seed=0)
    assert bent["slope"] == pytest.approx([1, 1])  # a symmetric bend leaves the slope and lowers the correlation
    assert max(bent["r"]) < 0.8
    assert len(bent["pairs"][0]) == len(bent["pairs"][1]) == 100


def test_correlation_is_judged_at_small_rates_and_the_slope_at_the_smallest_from_both_sides() -> None:
    slopes = {(1, 0.1): 0.5, (1, 0.01): 0.9, (32, 0.01): 1.06}
    config = {"batches": [{"size": 1, "rates": [0.1, 0.01]}, {"size": 32, "rates": [0.01]}], "seeds": [0, 1]}
    assert runs(config) == list(slopes)
    done = {
        cell_of(run, seed): compare(effects(slope + 0.02 * seed, 0.0), seed)
        for run, slope in slopes.items()
        for seed in config["seeds"]
    }
    assert by_digit(config, done, (1, 0.1), "slope") == pytest.approx([0.51, 0.51])
    judged = {gate.name: gate.record()["pass"] for gate in gates(config, done) if gate.threshold is not None}
    assert judged == {
        "r, η = 0.01, batch size 1": True,
        "slope at least, η = 0.01, batch size 1": False,
        "slope at most, η = 0.01, batch size 1": True,
        "r, η = 0.01, batch size 32": True,
        "slope at least, η = 0.01, batch size 32": True,
        "slope at most, η = 0.01, batch size 32": False,
    }
