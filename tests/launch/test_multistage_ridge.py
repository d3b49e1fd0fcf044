"""The figures of multistage.ridge tell a wrong adjoint from a right one."""

import pytest
from torch import Tensor

from engine import multistage
from engine.multistage import Parts
from launch.experiments import multistage_ridge
from launch.validate import experiment_config


def test_half_of_alpha_and_a_dropped_part_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment_config("multistage.ridge", toy=False)
    judged = multistage_ridge.gates(
        config, {cell: multistage_ridge.run_cell(config, cell) for cell in config["alphas"]}
    )
    assert all(gate.record()["pass"] for gate in judged if gate.threshold is not None)

    def half(f: Tensor, own: multistage.Inverse, pretraining: multistage.Inverse, shared, alpha: float) -> Parts:
        return multistage.updated(f, own, pretraining, shared, alpha / 2)

    def one_part(*given) -> Parts:
        parts = multistage.fixed(*given)
        return Parts(parts.through_own, 0 * parts.through_shared)

    for cell, name, wrong in (("updated", "updated", half), ("fixed", "fixed", one_part)):
        with monkeypatch.context() as patch:
            patch.setattr(multistage_ridge, name, wrong)
            assert multistage_ridge.run_cell(config, cell)["error"] > 1e-2
