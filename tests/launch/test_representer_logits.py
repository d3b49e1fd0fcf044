"""What representer.logits calls an error: none at the minimum, and what a layer that is not stationary leaves."""

import pytest
import torch

from engine.representer import HeadSettings, retrain_head_here
from launch.experiments.representer_logits import EXPERIMENT, largest_error
from tests.conftest import Caught

FEATURES = torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = (FEATURES[:, 0] + 0.3 * FEATURES[:, 1] > 0).long()


def test_sums_are_logits_at_the_minimum_alone(caught: Caught) -> None:
    def compare() -> None:
        head = retrain_head_here([(FEATURES, LABELS)], 2, HeadSettings(0.01))
        assert largest_error(head, FEATURES, LABELS, FEATURES[:7]) < 1e-8

    import launch.experiments.representer_logits as module

    right = module.coefficients
    caught(compare, module, "coefficients", lambda *given: 2 * right(*given))
    early = retrain_head_here([(FEATURES, LABELS)], 2, HeadSettings(0.01, tolerance=1e-3))
    assert 1e-6 < largest_error(early, FEATURES, LABELS, FEATURES[:7]) < 1.0
    head = retrain_head_here([(FEATURES, LABELS)], 2, HeadSettings(0.01))
    own = (FEATURES @ head.weights.T).argmax(1)
    assert (largest_error(head, FEATURES, own, FEATURES[:7]) > 1e-3) == bool((own != LABELS).any())


@pytest.mark.parametrize(("error", "passed"), [(1e-12, True), (1e-6, False)])
def test_the_gate_asks_for_exact_sums(error: float, passed: bool) -> None:
    one = {"error_early": 1.0, "error_distilled": 1.0, "gradient": 1e-11, "iterations": 9, "accuracy": 0.7}
    gate = EXPERIMENT.gates({}, {"penalty-1": one | {"error": error}, "penalty-2": one | {"error": 0.0}})[0]
    assert gate.record()["pass"] is passed
